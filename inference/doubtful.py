"""Rows whose integral over their latents importance sampling did not get, and whether their sum suffers from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .diagnostics import KHAT_LIMIT, pareto_khat

#: Rows whose weights are looked at closely: those whose first proposals counted least.
LOOKED = 256
#: Share of its draws that must count in a row that is not looked at further.
COUNTING = 0.5
#: Errors of a doubtful row that are allowed for, since heavy tails hide a part of theirs.
HIDDEN = 3.0
#: Share of the sum's standard error over rows that doubtful rows may bring.
BEARABLE = 0.1
#: Share of the rows that may be doubtful whatever they bring.
MANY = 0.05


@dataclass(frozen=True)
class Doubts:
    """What importance sampling is not to be trusted with.

    Attributes
    ----------
    rows
        Indices of rows with k-hat above 0.7, the worst first.
    khat, ess
        Of these rows.
    draws
        Proposals of each row.
    more
        Whether more rows may be like that: only some were looked at.
    """

    rows: Tensor
    khat: Tensor
    ess: Tensor
    draws: int
    more: bool = False


class RowWeights:
    """Keeps the weights of the rows whose first proposals counted least, to tell whether the sampling can be trusted."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.seen: list[Tensor] = []
        self.more = False

    def __call__(self, log_weights: Tensor) -> Tensor:
        """Note what is needed of one table (S, N); the table."""
        if self.rows is None:
            count = effective(log_weights).nan_to_num(-math.inf)
            self.rows = count.argsort()[:LOOKED]
            self.more = bool((count < COUNTING * len(log_weights)).sum() > LOOKED)
        some = log_weights[:, self.rows]
        self.seen.append(some - some.logsumexp(0))
        return log_weights

    def doubts(self) -> Doubts | None:
        """The rows that are not to be trusted; None where there are none, or too few draws to tell."""
        table = torch.cat(self.seen).double() if self.seen else torch.zeros(0, 0)
        if self.rows is None or len(table) < 100:
            return None
        count = effective(table)
        low = (count.nan_to_num(-math.inf) < COUNTING * len(table)).nonzero().flatten()
        khat = torch.tensor([pareto_khat(column) for column in table[:, low].T.cpu().numpy()], dtype=torch.float64)
        worst = khat.argsort(descending=True)
        worst = worst[khat[worst] > KHAT_LIMIT]
        if not len(worst):
            return None
        at = low[worst.to(low.device)]
        more = self.more and len(worst) == len(low)
        return Doubts(self.rows[at].cpu(), khat[worst], count[at].cpu(), len(table), more)


def effective(log_weights: Tensor) -> Tensor:
    """Effective number of draws of every row: (S, N) -> (N,)."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def harm(doubts: Doubts, rows: Tensor, errors: Tensor) -> tuple[float, float]:
    """Nats that doubtful rows may move the sum of all rows by, and the standard error of that sum over rows.

    A row's estimated log mean weight is low by about half its squared error on average, which adds up; what is left over
    averages out.  The standard error is that of the rows that can be trusted, NaN where there are fewer than two.
    """
    bad = doubts.rows.to(rows.device)
    error = torch.maximum(errors[bad], doubts.ess.to(errors).rsqrt())
    moved = HIDDEN * float(0.5 * error.square().sum() + error.square().sum().sqrt())
    sound = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    sound[bad] = False
    spread = float(rows[sound].std()) if int(sound.sum()) > 1 else math.nan
    return moved, spread * math.sqrt(len(rows))


def warning(doubts: Doubts | None, rows: Tensor, errors: Tensor, guided: bool) -> str:
    """What to distrust of the sum or mean over rows; "" where doubtful rows are too few to matter.

    Parameters
    ----------
    doubts
        What `RowWeights` found.
    rows, errors
        Log densities and their Monte Carlo errors, (N,).
    guided
        Whether the proposals are those of a fitted guide.
    """
    if doubts is None:
        return ""
    moved, spread = harm(doubts, rows, errors)
    count, total = len(doubts.rows), len(rows)
    if moved <= BEARABLE * spread and count <= MANY * total:
        return ""
    many = f"{'at least ' if doubts.more else ''}{count:,} of {total:,} row{'s' if total > 1 else ''}"
    why = "the guide guesses them too narrowly" if guided else "they are too many or far from normal around the mode"
    mend = "" if guided else ", or fit a guide that reads rows, SVI(guide=Amortised(...))"
    beside = f", beside a standard error of {spread:.2g} over rows" if math.isfinite(spread) else ""
    return (
        f"the latents of {many} are not integrated reliably by importance sampling, since {why}: row {int(doubts.rows[0])} has "
        f"k-hat {float(doubts.khat[0]):.2f} (above {KHAT_LIMIT}) and {float(doubts.ess[0]):.0f} effective draws of "
        f"{doubts.draws}. The sum over rows may be off by {moved:.2g} nats for it{beside}; score(data).doubtful lists rows, "
        f"posterior.ladder(data) tells of every one. Score smaller rows{mend}"
    )
