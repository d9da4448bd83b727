"""New rows, predictions for rows with known covariates, and missing cells: all from the posterior predictive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .data import has_nan
from .handlers import Substitute, unwrap
from .lazy_rows import WHOLE, LazyRows, in_bytes
from .linear_gaussian import GaussianRows
from .local import row_integral, shared_locals
from .score import without_density

if TYPE_CHECKING:
    from .posterior import Posterior

#: Numbers that a prediction for all rows of a table in memory may hold.
HELD = 2_000_000_000
#: Draws of the globals among which sampled rows are divided.
SAMPLE_DRAWS = 50


def run_forward(posterior: Posterior, values: dict[str, Tensor], kwargs: dict[str, Any]) -> Any:
    """One trace with the globals at `values` and everything else drawn, observed sites too."""
    model = poutine.uncondition(Substitute(values)(posterior.problem.model))
    with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
        return poutine.trace(model).get_trace(**kwargs)


def spread_draws(posterior: Posterior, count: int) -> list[int]:
    """`count` indices of draws: evenly spaced where there are more, again and again where there are fewer (a point)."""
    indices = posterior.some_draws(count)
    return [indices[i % len(indices)] for i in range(count)] if len(indices) < count else indices


def global_values(posterior: Posterior, index: int) -> dict[str, Tensor]:
    """One draw of everything that is shared by the rows."""
    local = {s.name for s in posterior.structure.sites if s.local}
    return {n: v for n, v in posterior.draw(index).items() if n not in local}


def cycled(posterior: Posterior, num: int) -> dict[str, Any]:
    """Arguments with `num` rows: those of the fitted data, again and again; NaN filled, since it is drawn anyway."""
    rows = posterior.structure.row_arguments
    result = {}
    for name, value in posterior.problem.kwargs.items():
        if name in rows:
            value = value[torch.arange(num) % len(value)]
            value = value.nan_to_num(0.0) if value.is_floating_point() else value
        result[name] = value
    return result


def sample_rows(posterior: Posterior, num: int, seed: int | None) -> dict[str, Tensor]:
    """See `Posterior.sample`; without a seed, that of the fit plus one."""
    structure = posterior.structure
    if structure.num_rows is None or not structure.row_arguments:
        raise ValueError(
            "the story has no rows to draw anew (no data plate whose size an argument sets); use predict()"
        )
    if (reason := without_density(posterior)) and not structure.uncountable:
        raise ValueError(f"{reason}. Nor are there codes to draw new rows from")
    parts: list[dict[str, Tensor]] = []
    with posterior.problem.scope(posterior.seed + 1 if seed is None else seed):
        indices = posterior.some_draws(min(SAMPLE_DRAWS, num))
        posterior.problem.check_shared(cycled(posterior, max(num // len(indices), 2)))
        for k, i in enumerate(indices):
            size = num // len(indices) + (k < num % len(indices))
            trace = run_forward(posterior, global_values(posterior, i), cycled(posterior, max(size, 2)))
            parts.append(
                {
                    s.name: rows_first(trace, s.name, posterior)[:size]
                    for s in structure.sites
                    if s.local and s.kind not in ("param", "factor")
                }
            )
    if not parts[0]:
        raise ValueError(
            "the rows are told by pyro.factor alone, which has a density and no draws; sample a site to draw it"
        )
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def rows_first(trace: Any, name: str, posterior: Posterior) -> Tensor:
    """The value of a site with its data axis moved to the front."""
    node = trace.nodes[name]
    value = node["value"].detach()
    frame = next(
        (f for f in node["cond_indep_stack"] if f.name == posterior.structure.data_plate and f.vectorized), None
    )
    if frame is None:
        return value
    event = len(getattr(node["fn"], "event_shape", ()))
    axis = value.dim() - event + frame.dim
    return value.movedim(axis, 0) if 0 <= axis < value.dim() else value.expand(frame.size, *value.shape)


def predict(posterior: Posterior, data: Any, draws: int, seed: int | None) -> dict[str, Tensor]:
    """See `Posterior.predict`."""
    problem, structure = posterior.problem, posterior.structure
    kwargs = dict(problem.kwargs) if data is None else problem.with_data({} if data is None else fill(posterior, data))
    kwargs = {n: v.nan_to_num(0.0) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in kwargs.items()}
    check_room(posterior, kwargs, draws)
    fitted = data is None
    kept: dict[str, list[Tensor]] = {s.name: [] for s in structure.observed}
    with problem.scope(posterior.seed + 1 if seed is None else seed):
        for i in spread_draws(posterior, draws):
            values = posterior.draw(i) if fitted else global_values(posterior, i)
            trace = run_forward(posterior, values, kwargs)
            for name, found in kept.items():
                found.append(rows_first(trace, name, posterior))
    return {name: torch.stack(found) for name, found in kept.items()}


def check_room(posterior: Posterior, kwargs: dict[str, Any], draws: int) -> None:
    """Refuse to draw for every row of a large table what could not be held at once.

    Raises
    ------
    ValueError
        With the size, and what to do.
    """
    names = {s.argument for s in posterior.structure.observed}
    tables = [
        v for n, v in kwargs.items() if isinstance(v, LazyRows) or (n in names and isinstance(v, Tensor) and v.ndim)
    ]
    size = draws * sum(v.numel() for v in tables)
    if size > (WHOLE if any(isinstance(v, LazyRows) for v in tables) else HELD):
        rows = len(tables[0])
        raise ValueError(
            f"predict draws {size // draws // max(1, rows):,} numbers for each of {rows:,} rows under every draw "
            f"({in_bytes(8 * size)}); give it some rows, predict(data[:1000]), or take fewer draws, predict(..., draws=10)"
        )


def fill(posterior: Posterior, data: Any) -> Any:
    """Covariates with zeros for the observed arguments that they lack: the zeros are never read."""
    from collections.abc import Mapping

    if not isinstance(data, Mapping):
        return data
    rows = [len(v) for n, v in data.items() if n in posterior.structure.row_arguments and hasattr(v, "__len__")]
    observed = {s.argument for s in posterior.structure.observed}
    filled = dict(data)
    for name in posterior.structure.row_arguments:
        if name not in data and name in observed and rows:
            fitted = posterior.problem.kwargs[name]
            filled[name] = torch.zeros(rows[0], *fitted.shape[1:], dtype=fitted.dtype)
    return filled


@dataclass(frozen=True, repr=False)
class Imputation:
    """Missing cells of one argument.

    Attributes
    ----------
    values
        The data with posterior means in the missing cells.
    index
        (cells, dimensions), where they are.
    draws
        (draws, cells).
    """

    values: Tensor
    index: Tensor
    draws: Tensor

    @property
    def mean(self) -> Tensor:
        """Posterior mean of each missing cell."""
        return self.draws.mean(0)

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviation of each missing cell."""
        return self.draws.std(0)

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of each missing cell."""
        if not 0 < mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {mass}")
        ends = torch.tensor([(1 - mass) / 2, (1 + mass) / 2], dtype=self.draws.dtype)
        low, high = torch.quantile(self.draws, ends, dim=0)
        return low, high

    @property
    def lower(self) -> Tensor:
        """5 % quantile."""
        return self.interval()[0]

    @property
    def upper(self) -> Tensor:
        """95 % quantile."""
        return self.interval()[1]

    def __repr__(self) -> str:
        count = len(self.index)
        lines = [
            f"{count} missing cells of {tuple(self.values.shape)}" + (f", {len(self.draws)} draws" if count else "")
        ]
        for k in range(min(count, 8)):
            where = ", ".join(str(int(i)) for i in self.index[k])
            lines.append(f"  [{where}]  {self.mean[k]:.3g}  ({self.lower[k]:.3g} to {self.upper[k]:.3g})")
        return "\n".join(lines + (["  ..."] if count > 8 else []))


def impute(posterior: Posterior, data: Any, draws: int, seed: int | None) -> Imputation:
    """See `Posterior.impute`."""
    problem = posterior.problem
    kwargs = problem.kwargs if data is None else problem.with_data(data)
    sites = [s for s in posterior.structure.observed if s.argument in kwargs]
    name = next((s.argument for s in sites if has_nan(kwargs[s.argument])), None)
    if name is None:
        value = kwargs[sites[0].argument] if sites else torch.zeros(0)
        return Imputation(value, torch.zeros(0, value.dim(), dtype=torch.long), torch.zeros(1, 0))
    value = kwargs[name]
    holes = value.isnan()
    found = []
    with problem.scope(posterior.seed + 1 if seed is None else seed), torch.no_grad():
        indices = spread_draws(posterior, draws)
        anew = data is not None or posterior.structure.linear_gaussian
        known = shared_locals(posterior, kwargs, len(indices)) if anew else None
        for k, i in enumerate(indices):
            values = posterior.draw(i) if known is None else {**posterior.draw(i), **known[k]}
            found.append(complete(posterior, i, values, kwargs, name, not anew or known is not None)[holes])
    table = torch.stack(found)
    filled = value.clone()
    filled[holes] = table.mean(0)
    return Imputation(filled, holes.nonzero(), table)


def complete(
    posterior: Posterior, index: int, values: dict[str, Tensor], kwargs: dict[str, Any], name: str, fitted: bool
) -> Tensor:
    """The rows with their missing cells drawn, at one draw; the rows' latents are among its values if `fitted`."""
    joint = posterior.joint
    local = [b.name for b in joint.blocks if b.local]
    if local and posterior.structure.linear_gaussian and not fitted:
        exact = GaussianRows(joint, values, kwargs)
        values = {**values, **exact.split(exact.draw(1)[0])}
    elif local and not fitted:
        values = {**values, **{n: v[0] for n, v in row_integral(posterior, index, kwargs).resample_jointly(1).items()}}
    values = {**values, **draw_finite(posterior, values, kwargs)}
    result = kwargs[name].clone()
    with poutine.block(), pyro.validation_enabled(False):
        trace: Any = poutine.trace(Substitute(values)(posterior.problem.model)).get_trace(**kwargs)
    for site in posterior.structure.observed:
        if site.argument != name:
            continue
        node = trace.nodes[site.name]
        value = node["value"]
        holes = value.isnan()
        drawn = conditional_draw(node["fn"], value, holes)
        if value.shape == result.shape:
            result = torch.where(holes, drawn, result)
        else:  # the site observes a view of the argument: write through the same view
            view = result.as_strided(value.shape, value.stride(), value.storage_offset())
            view.copy_(torch.where(holes, drawn, value))
    return result


def draw_finite(posterior: Posterior, values: dict[str, Tensor], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """A joint draw of the finite latents, one site after another, each given the ones drawn before."""
    drawn: dict[str, Tensor] = {}
    for name in posterior.joint.finite:
        site = posterior.structure[name]
        probabilities = posterior.joint.local_probabilities(name, {**values, **drawn}, kwargs)
        states = torch.distributions.Categorical(probs=probabilities.clamp_min(0)).sample()
        if site.plates and posterior.structure.data_plate:
            states = posterior.joint.as_sampled(states, name)
        drawn[name] = states.to(posterior.problem.dtype) if site.family != "Categorical" else states
    return drawn


def conditional_draw(fn: Any, value: Tensor, holes: Tensor) -> Tensor:
    """Missing cells given the seen ones of their row: independent, or by Matheron's rule for a multivariate normal."""
    inner = unwrap(fn)
    if not isinstance(inner, torch.distributions.MultivariateNormal):
        return fn.sample()
    drawn = inner.sample()
    covariance = inner.covariance_matrix
    seen = ~holes
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
    inside = torch.where(both, covariance, eye)
    gap = torch.where(seen, value - drawn, torch.zeros_like(value))
    weights = torch.linalg.solve(inside, gap.unsqueeze(-1))
    across = torch.where(seen.unsqueeze(-2), covariance, torch.zeros_like(covariance))
    return drawn + (across @ weights).squeeze(-1)
