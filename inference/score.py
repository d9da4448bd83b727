"""Log densities of rows, each with the name of its estimator, an error bar and a bound side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .posterior import Posterior


@dataclass(frozen=True, repr=False)
class Score:
    """Log density of rows.

    Attributes
    ----------
    rows
        log p(x_n | fitted data), (N,).
    estimator
        How it was computed, in words.
    monte_carlo_error
        Standard error of each row's estimate over the draws, (N,); zeros where nothing was simulated.
    bound
        "exact", "plug-in", "estimate" (consistent) or "estimate under q" (as good as the variational posterior).
    """

    rows: Tensor
    estimator: str
    monte_carlo_error: Tensor
    bound: str

    @property
    def mean(self) -> float:
        """Mean log density a row."""
        return self.rows.mean().item()

    @property
    def standard_error(self) -> float:
        """Of `mean`, over rows."""
        return (self.rows.std() / math.sqrt(len(self.rows))).item() if len(self.rows) > 1 else math.nan

    def __repr__(self) -> str:
        return (
            f"log density {self.mean:.4f} ± {self.standard_error:.4f} a row over {len(self.rows)} rows "
            f"({self.estimator}; {self.bound}; Monte Carlo error up to {self.monte_carlo_error.max().item():.2g})"
        )


def score(posterior: Posterior, data: Any, draws: int) -> Score:
    """See `Posterior.score`."""
    if posterior.structure.admixture:
        from .topics.answers import score as score_documents

        return score_documents(posterior, data, draws)
    kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
    if posterior.structure.continuous_locals:
        from .local import integrated_rows

        return integrated_rows(posterior, kwargs, draws)
    with posterior.problem.scope(posterior.seed), torch.no_grad():
        table = rows_by_draw(posterior, posterior.some_draws(draws), kwargs)
    return average(table, posterior.kind)


def average(table: Tensor, kind: str) -> Score:
    """Log of the mean density over draws (S, N), with the delta-method error of each row."""
    count = len(table)
    if count == 1:
        rule = "exact" if kind == "exact" else "plug-in"
        name = "exact by enumeration" if kind == "exact" else "plug-in density at the point estimate"
        return Score(table[0], name, torch.zeros_like(table[0]), rule)
    rows = table.logsumexp(0) - math.log(count)
    ratio = (table - rows).exp()
    error = ratio.std(0) / math.sqrt(count)
    name = f"posterior predictive density, mean over {count} draws"
    return Score(rows, name, error, "estimate under q" if kind == "variational" else "estimate")


def rows_by_draw(posterior: Posterior, indices: list[int], kwargs: dict[str, Any]) -> Tensor:
    """log p(x_n | draw) for each draw and row, finite locals summed out: (S, N). Vectorised where the story allows."""
    joint = posterior.joint
    values = {name: value[indices] for name, value in posterior.draws.items()}
    if len(indices) > 4 and values and not _draws_finite_globals(posterior):
        try:
            return torch.vmap(lambda v: joint.rows(v, kwargs), chunk_size=64)(values)
        except (RuntimeError, ValueError, NotImplementedError):
            pass  # the story uses an operation that has no batching rule
    return torch.stack([joint.rows(posterior.draw(i), kwargs) for i in indices])


def _draws_finite_globals(posterior: Posterior) -> bool:
    return any(not s.local for s in posterior.structure.finite) and posterior.structure.data_plate is not None
