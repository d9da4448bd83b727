"""Log densities of rows, each with the name of its estimator, an error bar and a bound side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from .posterior import Posterior

#: Draws that a question about rows is averaged over, evenly spaced among all.
ROW_DRAWS = 200
#: Rows from which fewer are taken where nobody asked for a number, draws x rows that are then looked at, and draws at least.
FEW_DRAWS_FROM, DRAWS_BY_ROWS, LEAST = 500_000, 100_000_000, 20


class ScoreNotice(UserWarning):
    """Log densities were estimated, and the sum or mean over the rows is not to be trusted."""


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
    warning
        What makes the sum or mean over rows and its error unreliable; "" where nothing is known to.
    doubtful
        Indices of rows whose own estimate is not to be trusted (k-hat above 0.7), the worst first: a few among many rows do
        not spoil the sum, and then there is no warning.
    """

    rows: Tensor
    estimator: str
    monte_carlo_error: Tensor
    bound: str
    warning: str = ""
    doubtful: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Mean log density a row."""
        return self.rows.mean().item()

    @property
    def standard_error(self) -> float:
        """Of `mean`, over rows."""
        return (self.rows.std() / math.sqrt(len(self.rows))).item() if len(self.rows) > 1 else math.nan

    def __repr__(self) -> str:
        spread = f" ± {self.standard_error:.4f} a row over {len(self.rows)} rows" if len(self.rows) > 1 else ""
        first = f"warning: {self.warning}\n" if self.warning else ""
        few = f"; {len(self.doubtful)} unreliable, see doubtful" if self.doubtful else ""
        return (
            f"{first}log density {self.mean:.4f}{spread or ' of all there is (no rows)'} "
            f"({self.estimator}; {self.bound}; Monte Carlo error up to {self.monte_carlo_error.max().item():.2g}{few})"
        )


def score(posterior: Posterior, data: Any, asked: int | None) -> Score:
    """See `Posterior.score`."""
    draws = ROW_DRAWS if asked is None else asked
    if posterior.structure.admixture:
        from .topics.answers import score as score_documents

        return score_documents(posterior, data, draws)
    kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
    if reason := without_density(posterior):
        raise ValueError(reason)
    if posterior.structure.continuous_locals:
        from .local import integrated_rows

        return integrated_rows(posterior, kwargs, draws)
    with posterior.problem.scope(posterior.seed), torch.no_grad():
        indices = posterior.some_draws(fewer(asked, posterior, kwargs))
        pieces = posterior.joint.pieces(kwargs)
        # A piece of the rows under all draws: a table of all rows under all of them would be many times the data.
        found = [average(rows_by_draw(posterior, indices, p), posterior.kind) for p in told(posterior, pieces, "log p")]
    if len(found) == 1:
        return found[0]
    rows, error = (torch.cat([getattr(s, n) for s in found]) for n in ("rows", "monte_carlo_error"))
    return replace(found[0], rows=rows, monte_carlo_error=error)


def fewer(asked: int | None, posterior: Posterior, kwargs: dict[str, Any]) -> int:
    """As many draws as asked; where nobody did, fewer of very many rows, each of which would wait for hours."""
    if asked is not None:
        return asked
    names = [n for n in posterior.structure.row_arguments if n in kwargs]
    rows = max((len(kwargs[n]) for n in names), default=1)
    return ROW_DRAWS if rows <= FEW_DRAWS_FROM else min(ROW_DRAWS, max(LEAST, DRAWS_BY_ROWS // rows))


def told(posterior: Posterior, pieces: list[Any], what: str) -> Iterator[Any]:
    """Pieces with a bar, where the fit had one and they take a while."""
    return iter(
        tqdm(pieces, desc=what, delay=3, leave=False, disable=not posterior.problem.progress or len(pieces) == 1)
    )


def without_density(posterior: Posterior) -> str | None:
    """Why rows have no density, or None."""
    endless = [s.name for s in posterior.structure.uncountable]
    if endless:
        return (
            f"n/a: {endless[0]!r} has infinitely many states, over which log p(x) is not summed; draws of it are in "
            f"posterior.draws[{endless[0]!r}]"
        )
    flat = [s.name for s in posterior.structure.continuous_locals if s.improper]
    if not flat:
        return None
    return (
        f"n/a (no density): the prior of {', '.join(flat)} in the rows is improper, so that log p(x) does not exist; compare "
        f"reconstructions instead, with posterior.local({flat[0]!r}, data)"
    )


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
    values = {name: posterior.in_precision(value[indices]) for name, value in posterior.draws.items()}
    if len(indices) > 4 and values and not _draws_finite_globals(posterior):
        try:
            return torch.vmap(lambda v: joint.rows(v, kwargs), chunk_size=64)(values)
        except (RuntimeError, ValueError, NotImplementedError):
            pass  # the story uses an operation that has no batching rule
    return torch.stack([joint.rows(posterior.draw(i), kwargs) for i in indices])


def _draws_finite_globals(posterior: Posterior) -> bool:
    return any(not s.local for s in posterior.structure.finite) and posterior.structure.data_plate is not None


# -- the ladder of bounds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Ladder:
    """Three estimates of log p(x_n) from the same draws of a guide, each at least as high as the one before.

    Attributes
    ----------
    elbo
        Mean log weight, (N,): a lower bound in expectation.
    iwae
        Mean over blocks of `k` draws of the log mean weight, (N,): a tighter lower bound in expectation (Burda, Grosse
        and Salakhutdinov, *Importance weighted autoencoders*, ICLR 2016).
    evidence
        Log mean weight of all draws, (N,): importance sampling, consistent, and low on average by about half of `error`
        squared.
    error
        Standard error of `evidence`, (N,), by the delta method.
    ess
        Effective number of draws, (N,).
    khat
        Pareto shape of the weights, (N,); above 0.7 neither `evidence` nor `error` is to be trusted.
    draws, k
        Draws, and draws of a block.
    """

    elbo: Tensor
    iwae: Tensor
    evidence: Tensor
    error: Tensor
    ess: Tensor
    khat: Tensor
    draws: int
    k: int

    def __repr__(self) -> str:
        bad = (self.khat > 0.7).double().mean().item()
        return (
            f"log p(x) a row over {len(self.elbo)} rows, {self.draws} draws: ELBO {self.elbo.mean().item():.4f} "
            f"(lower bound) <= IWAE({self.k}) {self.iwae.mean().item():.4f} (lower bound) <= importance sampling "
            f"{self.evidence.mean().item():.4f} (error of a row up to {self.error.max().item():.2g}; effective draws at "
            f"least {self.ess.min().item():.0f}; k-hat > 0.7 in {bad:.0%} of the rows)"
        )


def ladder(log_weights: Tensor, k: int = 50) -> Ladder:
    """ELBO, IWAE(k) and importance-sampled log p(x_n), from log p(x_n, z) - log q(z | x_n) at draws of q.

    Parameters
    ----------
    log_weights
        (S, N): draws by rows. A row's draws are independent; -inf is a weight of zero.
    k
        Draws of a block; where it does not divide S the last draws are in no block, and then `elbo` and `evidence` leave
        them out too, so that the order of the three holds.

    Raises
    ------
    ValueError
        `log_weights` is not a matrix, or has fewer than `k` draws; or `k` is below 1.
    """
    if log_weights.ndim != 2:
        raise ValueError(f"log_weights has the shape {tuple(log_weights.shape)}; it must be (draws, rows)")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(log_weights):
        raise ValueError(f"k={k!r} must be a whole number from 1 to the {len(log_weights)} draws of log_weights")
    from .diagnostics import pareto_khat

    blocks = len(log_weights) // k
    table = log_weights.detach().double()[: blocks * k]
    evidence = table.logsumexp(0) - math.log(len(table))
    ratio = (table - evidence).exp()
    return Ladder(
        elbo=table.mean(0),
        iwae=(table.unflatten(0, (blocks, k)).logsumexp(1) - math.log(k)).mean(0),
        evidence=evidence,
        error=ratio.std(0) / math.sqrt(len(table)) if len(table) > 1 else torch.full_like(evidence, math.nan),
        ess=ratio.sum(0) ** 2 / (ratio**2).sum(0),
        khat=torch.tensor(
            [pareto_khat(row) for row in table.cpu().numpy().T], dtype=torch.float64, device=table.device
        ),
        draws=len(table),
        k=k,
    )


def kl_per_unit(loc: Tensor, scale: Tensor) -> Tensor:
    """Mean over rows of KL(Normal(loc, scale) || Normal(0, 1)) of each unit: (N, K), (N, K) -> (K,), in nats.

    Zero says that the unit tells nothing of its row.
    """
    return (0.5 * (loc**2 + scale**2 - 1) - scale.log()).mean(0)


def active_units(loc: Tensor, threshold: float = 0.01) -> Tensor:
    """Which units' posterior means differ between rows: (N, K) -> (K,) of bool.

    A unit is active where the variance of its mean over rows exceeds `threshold` (Burda and others, 2016, section 5.2).

    Raises
    ------
    ValueError
        `loc` is not a matrix of at least two rows.
    """
    if loc.ndim != 2 or len(loc) < 2:
        raise ValueError(f"loc has the shape {tuple(loc.shape)}; it must be (rows, units) with two rows or more")
    return loc.var(0) > threshold
