"""The exact answer of a tiny story, found by listing, quadrature and Gaussian algebra, and by no method of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from ..session import isolated
from .density import Density
from .integrate import Converged, integrate
from .modes import Mode, find_mode
from .plan import Plan, make_plans

if TYPE_CHECKING:
    from ..posterior import Posterior


@dataclass(frozen=True, repr=False)
class Oracle:
    """What is exactly known about a story and its data.

    Attributes
    ----------
    how
        In words: what was listed, what was integrated how, and the numerical error.
    evidence
        log p(data); of a flat prior, up to a constant.
    mean, sd
        Posterior mean and standard deviation of every continuous latent, in the site's own shape.
    probs
        Posterior probabilities of every discrete latent: its own shape, then its levels in the order of its support.
    mode
        The highest point, where it was asked for.
    error
        Nats between the last two grids; 0 where nothing was integrated by nodes.
    """

    how: str
    evidence: float
    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    probs: dict[str, Tensor]
    error: float
    mode: Mode | None = None
    density: Density = field(default=None, compare=False)  # type: ignore[assignment]
    by_state: Tensor = field(default=None, compare=False)  # type: ignore[assignment]

    @property
    def improper(self) -> bool:
        """A prior is flat, so that the evidence is known up to a constant only."""
        return self.density.improper

    def together(self, site: str) -> Tensor:
        """Posterior probability that entries i and j of a discrete latent are in the same state: (n, n); blind to labels."""
        if site not in self.density.states:
            raise ValueError(f"{site!r} is no discrete latent; the story has {list(self.density.states)}")
        states = self.density.states[site].flatten(1)
        same = (states[:, :, None] == states[:, None, :]).double()
        return torch.einsum("s,sij->ij", self.by_state.softmax(0), same)

    def __repr__(self) -> str:
        lines = [f"Oracle: log evidence {self.evidence:.8f}{' (up to a constant)' if self.improper else ''}"]
        lines.append(f"  by {self.how}")
        for name, mean in self.mean.items():
            lines.append(f"  {name:<10} mean {_short(mean)}  sd {_short(self.sd[name])}")
        for name, p in self.probs.items():
            lines.append(f"  {name:<10} probabilities {_short(p)}")
        if self.mode is not None:
            lines.append(f"  {self.mode}")
        return "\n".join(lines)


def _short(value: Tensor) -> str:
    flat = value.flatten().tolist()
    shown = ", ".join(f"{v:.4g}" for v in flat[:8])
    return f"[{shown}{', ...' if len(flat) > 8 else ''}]" if value.ndim else f"{flat[0]:.6g}"


def solve(
    story: Any,
    data: Any,
    *,
    mode: str | None = None,
    points: tuple[str, ...] | None = None,
    at: Posterior | Mapping[str, Tensor] | None = None,
) -> Oracle:
    """The exact posterior of a tiny story.

    Every joint state of the discrete latents is listed.  Given each of them the continuous latents, in unconstrained
    coordinates, fall into groups that do not depend on each other; where the log density is quadratic a group is integrated by
    Gaussian algebra, elsewhere by a trapezoid rule that is refined until two grids agree.  All of that is found by evaluating
    the story's log density, which a plain trace with every site given its value computes; nothing is shared with `fit`.

    Parameters
    ----------
    story, data
        As for `fit`.
    mode
        "map" or "mle": also find the highest point of p(data, points) or p(data | points), all other latents summed and
        integrated out.
    points
        The sites that `mode` is about; by default the continuous latents that no plate of an observed site holds.
    at
        Where learned parameters and networks stand: a fitted posterior, or values by name; by default the story as it is.

    Returns
    -------
    Oracle

    Raises
    ------
    TypeError
        As for `fit`.
    ValueError
        The story is too big, with its number of joint states or of coordinates and what to shrink; or the integral has not
        settled.

    Examples
    --------
    >>> oracle = solve(story, x)              # doctest: +SKIP
    >>> oracle.evidence, oracle.mean["mu"]    # doctest: +SKIP
    """
    if mode not in (None, "map", "mle"):
        raise ValueError(f"mode must be 'map', 'mle' or None, got {mode!r}")
    with told_plainly():
        density = Density(*fitted(story, data, at))
        found = integrate(density, make_plans(density))
        oracle = describe(density, found)
        if mode is not None:
            oracle = replace(oracle, mode=find_mode(density, mode, points))
    return oracle


def fitted(story: Any, data: Any, at: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """The story that holds the learned networks, the data, and the learned parameters that are no network's."""
    if at is None or isinstance(at, Mapping):
        return story, data, dict(at or {})
    sites = {s.name for s in at.structure.learned}
    return at.problem.story, data, {n: v[0] for n, v in at.draws.items() if n in sites and "$$$" not in n}


class told_plainly:
    """A scope in which stories run without validation, as batches of numbers, and leave nothing behind."""

    def __enter__(self) -> None:
        import contextlib
        import warnings

        self.stack = contextlib.ExitStack()
        self.stack.enter_context(isolated(0, torch.float64))
        self.stack.enter_context(pyro.validation_enabled(False))
        self.stack.enter_context(torch.no_grad())
        self.stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")

    def __exit__(self, *error: Any) -> None:
        self.stack.close()


def describe(density: Density, found: Converged) -> Oracle:
    """Moments by site, probabilities of the discrete latents, and the words."""
    mean, sd = found.integral.moments()
    weight = found.integral.by_state.softmax(0)
    probs = {}
    for name, states in density.states.items():
        one_hot = torch.nn.functional.one_hot(states, len(density.levels[name])).double()
        probs[name] = torch.einsum("s,s...->...", weight, one_hot)
    places = density.places.values()
    return Oracle(
        how=words(density, found.plan, found),
        evidence=found.integral.evidence,
        mean={p.name: mean[p.entries].reshape(p.shape) for p in places},
        sd={p.name: sd[p.entries].reshape(p.shape) for p in places},
        probs=probs,
        error=found.error,
        density=density,
        by_state=found.integral.by_state,
    )


def words(density: Density, plan: Plan, found: Converged) -> str:
    """What was done."""
    parts = []
    if density.states:
        parts.append(f"listing {density.num_states:,} joint states of {', '.join(density.states)}")
    gaussian = sum(len(g.gaussian) for g in plan.groups)
    if gaussian:
        parts.append(f"Gaussian algebra in {gaussian} coordinates")
    grids = [len(g.grid) for g in plan.groups if g.grid]
    if plan.outer or grids:
        rule = "Gauss-Legendre panels up to the edge" if plan.jumps else "trapezoid rule"
        sizes = " + ".join(str(n) for n in grids) or "0"
        inside = f" within {len(plan.outer)}" if plan.outer else ""
        nodes = f"{found.integral.nodes:,} nodes a state" if density.states else f"{found.integral.nodes:,} nodes"
        parts.append(
            f"{rule} over {sizes}{inside} coordinates ({nodes}; the last two grids differ by {found.error:.1e} nats, moments "
            f"by {found.moment_error:.1e} sd)"
        )
    if not parts:
        parts.append("one evaluation of the density: nothing is latent")
    if density.learned:
        parts.append(f"{len(density.learned)} learned parameters held as they are")
    return "; ".join(parts)
