"""A story's fitted guide asked about any rows: draws of their latents, and importance-sampled log densities.

A guide that reads its guess off the row (an encoder) has one for rows that it has never seen. Its draws, weighed by
w = p(x, u) / q(u | x), give consistent estimates of log p(x) (Burda, Grosse and Salakhutdinov, ICLR 2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .handlers import Substitute, unwrap
from .methods.batches import by_row, is_latent, without_holes

if TYPE_CHECKING:
    from .posterior import Posterior

#: Rows that the story is run on at once: draws of few rows are made side by side, many rows piece by piece.
WIDTH = 4096
#: Numbers among which latents are chosen, at most.
CELLS = 20_000_000
#: Rows on which a guide is tried.
FEW = 3


def guide_arguments(problem: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the guide is shown: missing cells filled with their columns' means, unless the story says that it sees them."""
    owner = getattr(problem.guide, "__self__", None)
    if getattr(owner, "guide_sees_missing", False):
        return kwargs
    return {name: without_holes(value) for name, value in kwargs.items()}


def is_amortised(posterior: Posterior) -> bool:
    """Whether the answer is a story's guide that has a guess for any number of rows."""
    structure, problem = posterior.structure, posterior.problem
    guided = posterior.diagnostics.get("guide") == "story" and problem.guide is not None
    rows = structure.row_arguments
    if not guided or not structure.continuous_locals or not rows or structure.data_plate is None:
        return False
    count = FEW + (structure.num_rows == FEW)
    few = {n: v[torch.arange(count) % len(v)] if n in rows else v for n, v in problem.kwargs.items()}
    try:
        with problem.scope(posterior.seed):
            GuideRows(posterior, 0, few, 1).run(few)
    except (ValueError, RuntimeError, IndexError, KeyError):
        return False  # it has numbers of its own for every fitted row
    return True


@dataclass
class GuideRows:
    """Rows whose latents a fitted guide guesses, at one draw of the globals.

    Parameters
    ----------
    posterior, index
        The answer, and which of its draws.
    kwargs
        The rows, as arguments of the story.
    proposals
        Draws of the guide a row.
    """

    posterior: Posterior
    index: int
    kwargs: dict[str, Any]
    proposals: int = 100

    def __post_init__(self) -> None:
        structure = self.posterior.structure
        draw = self.posterior.draw(self.index)
        local = {s.name for s in structure.continuous_locals}
        self.globals = {n: v for n, v in draw.items() if n not in local}
        self.names = structure.row_arguments
        self.n = len(self.kwargs[self.names[0]])
        self.points = False

    def guide_trace(self, kwargs: dict[str, Any]) -> Any:
        """One run of the fitted guide on these rows."""
        problem = self.posterior.problem
        assert problem.guide is not None
        fixed = {**self.posterior.extra.get("guide_params", {}), **self.globals}
        with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
            return poutine.trace(Substitute(fixed)(problem.guide)).get_trace(**guide_arguments(problem, kwargs))

    def run(self, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """One draw of the latents of these rows, and log p(x, u) - log q(u | x), (rows,)."""
        posterior, problem = self.posterior, self.posterior.problem
        rows = len(kwargs[self.names[0]])
        trace = self.guide_trace(kwargs)
        with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
            trace.compute_log_prob()
            plate = posterior.structure.data_plate
            sites = [
                s for s in trace.nodes.values() if is_latent(s) and any(f.name == plate for f in s["cond_indep_stack"])
            ]
            self.points = all(type(unwrap(s["fn"])).__name__ == "Delta" for s in sites)
            values = {s["name"]: s["value"] for s in sites}
            log_q = sum((by_row(s["log_prob"], s, plate) for s in sites), torch.zeros(rows, dtype=problem.dtype))
            log_p = posterior.joint.rows({**self.globals, **values}, kwargs)
        if log_p.shape != (rows,) or any(len(v) != rows for v in values.values()):
            raise ValueError(f"the guide guesses for other rows than the {rows} given")
        return values, log_p - log_q

    def draws(self, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """`count` draws of every row's latents, (count, N, ...) each, and their log weights (count, N)."""
        pieces = []
        for a in range(0, self.n, WIDTH):
            piece = {n: v[a : a + WIDTH] if n in self.names else v for n, v in self.kwargs.items()}
            pieces.append(self.piece(piece, count))
        values = {n: torch.cat([p[0][n] for p in pieces], 1) for n in pieces[0][0]}
        return values, torch.cat([p[1] for p in pieces], 1)

    def piece(self, kwargs: dict[str, Any], count: int, keep: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """`draws` of rows that are few enough to be run at once."""
        rows = len(kwargs[self.names[0]])
        side = max(1, min(count, WIDTH // rows))
        wide = {n: v.repeat(side, *[1] * (v.ndim - 1)) if n in self.names else v for n, v in kwargs.items()}
        found, weights = [], []
        for _ in range(-(-count // side)):
            values, ratio = self.run(wide)
            weights.append(ratio.reshape(side, rows))
            if keep:
                found.append({n: v.reshape(side, rows, *v.shape[1:]) for n, v in values.items()})
        merged = {n: torch.cat([f[n] for f in found])[:count] for n in found[0]} if found else {}
        return merged, torch.cat(weights)[:count]

    def log_weights(self) -> Tensor:
        """log p(x, u) - log q(u | x) at `proposals` draws: (proposals, N)."""
        parts = []
        for a in range(0, self.n, WIDTH):
            piece = {n: v[a : a + WIDTH] if n in self.names else v for n, v in self.kwargs.items()}
            parts.append(self.piece(piece, self.proposals, keep=False)[1])
        return torch.cat(parts, 1)

    def log_evidence(self) -> tuple[Tensor, Tensor]:
        """log p(x_n | globals) and the variance of the estimated density relative to its square: (N,) each."""
        weights = self.log_weights()
        value = weights.logsumexp(0) - math.log(len(weights))
        return value, (weights - value).exp().var(0) / len(weights)

    def resample(self, site: str, count: int = 10) -> Tensor:
        """Draws of a local from its posterior, by importance among the guide's: (count, N, ...event).

        A guide of points has nothing to choose among: its point is returned.
        """
        return self.resample_jointly(count)[site]

    def resample_jointly(self, count: int) -> dict[str, Tensor]:
        """Draws of all locals of a row together: (count, N, ...event) each."""
        values, weights = self.draws(self.proposals)
        if self.points:
            return {n: v[:1].expand(count, *v.shape[1:]) for n, v in values.items()}
        chosen = torch.distributions.Categorical(logits=weights.T).sample((count,))
        return {n: v[chosen, torch.arange(self.n)] for n, v in values.items()}


def new_locals(posterior: Posterior, kwargs: dict[str, Any], count: int) -> list[dict[str, Tensor]] | None:
    """`count` joint draws of new rows' locals at once, where all draws share the same globals; else None."""
    if not posterior.amortised or any(not b.local and not b.param for b in posterior.joint.blocks):
        return None
    rows = len(kwargs[posterior.structure.row_arguments[0]])
    width = sum(math.prod(b.shape[1:]) for b in posterior.joint.blocks if b.local)
    proposals = max(100, min(1000, CELLS // max(1, rows * width)))
    found = GuideRows(posterior, 0, kwargs, proposals).resample_jointly(count)
    return [{n: v[i] for n, v in found.items()} for i in range(count)]


@dataclass(frozen=True, repr=False)
class Units:
    """How much each unit of a code says of its row.

    Attributes
    ----------
    site
        The latent.
    kl
        Mean over rows of the divergence of the guide from the prior, unit by unit, (K,), in nats: 0 says nothing.
    active
        Whether the guide's mean differs between rows, (K,) of bool: its variance exceeds 0.01 (Burda and others, 2016).
    """

    site: str
    kl: Tensor
    active: Tensor

    @property
    def collapsed(self) -> bool:
        """Whether no unit is active: the posterior is the prior, and codes say nothing."""
        return not bool(self.active.any())

    def __repr__(self) -> str:
        most = ", ".join(f"{v:.2g}" for v in self.kl.sort(descending=True).values[:10].tolist())
        text = f"{self.site}: {int(self.active.sum())} of {len(self.kl)} units active, {self.kl.sum():.3g} nats a row"
        return text + f" (by unit {most}{', ...' if len(self.kl) > 10 else ''})" + ("; collapsed" * self.collapsed)


def units(posterior: Posterior, data: Any = None) -> dict[str, Units]:
    """Divergence and activity of every unit of the codes that a fitted guide gives rows: a detector of posterior collapse.

    Where a code's prior depends on another code, the divergence is that at one draw of the other one a row.

    Parameters
    ----------
    posterior
        An answer by a guide that has a guess for any rows.
    data
        Rows, as for `fit`; None for the fitted ones.

    Raises
    ------
    ValueError
        The answer is no such guide, or a code's divergence has no closed form.
    """
    from .score import active_units

    if not is_amortised(posterior):
        raise ValueError(
            "units need a story's own guide that reads its guess off the rows; fit with SVI(guide='story')"
        )
    kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
    rows = GuideRows(posterior, 0, kwargs)
    with posterior.problem.scope(posterior.seed), torch.no_grad():
        guide = rows.guide_trace(kwargs)
        values = {n: s["value"] for n, s in guide.nodes.items() if is_latent(s)}
        told, _ = posterior.joint.trace({**rows.globals, **values}, kwargs)
    found = {}
    for site in posterior.structure.continuous_locals:
        q, p = unwrap(guide.nodes[site.name]["fn"]), unwrap(told.nodes[site.name]["fn"])
        try:
            kl = torch.distributions.kl_divergence(q, p)
        except NotImplementedError:
            raise ValueError(
                f"the divergence of {type(q).__name__} from {type(p).__name__} at {site.name!r} has no closed form"
            ) from None
        count = len(values[site.name])
        found[site.name] = Units(
            site.name,
            kl.expand(values[site.name].shape).reshape(count, -1).mean(0),
            active_units(q.mean.expand(values[site.name].shape).reshape(count, -1)),
        )
    return found


def bounds(posterior: Posterior, data: Any = None, *, draws: int = 1000, k: int = 50) -> Any:
    """ELBO, IWAE(k) and importance-sampled log p(x_n) of rows from draws of the fitted guide: a `score.Ladder`.

    Parameters
    ----------
    posterior
        An answer by a guide that has a guess for any rows.
    data
        Rows, as for `fit`; None for the fitted ones.
    draws, k
        Draws a row, and draws of a block.

    Raises
    ------
    ValueError
        The answer is no such guide; or a latent has no density (its prior is improper, its guide a point).
    """
    from .score import ladder, without_density

    if not is_amortised(posterior):
        raise ValueError(
            "bounds need a story's own guide that reads its guess off the rows; fit with SVI(guide='story')"
        )
    if reason := without_density(posterior):
        raise ValueError(reason)
    kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
    with posterior.problem.scope(posterior.seed):
        return ladder(GuideRows(posterior, 0, kwargs, draws).log_weights(), k)
