"""Rows kept out of the climb, whose bound says when to stop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from ..session import streams_kept
from .batches import by_row, is_latent

if TYPE_CHECKING:
    from .ascent import Leaves
    from .paired import PairTarget

#: Looks at the held-out rows in a run, looks without a gain that end it, and draws of the guide in one look.
LOOKS, PATIENCE, DRAWS = 100, 10, 4


class Holdout:
    """Early stopping (Prechelt, *Early stopping, but when?*, 1998): the best state on rows that were not climbed on.

    Parameters
    ----------
    target
        The climb's target; its batches are drawn from the other rows.
    rows
        Indices of the rows held out.
    steps
        Most steps of the climb.

    Attributes
    ----------
    history
        (step, mean bound a row) of every look.
    best
        The parameters of the highest look.
    """

    def __init__(self, target: PairTarget, rows: Tensor, steps: int) -> None:
        self.target, self.rows = target, rows
        self.every = max(1, steps // LOOKS)
        self.history: list[tuple[int, float]] = []
        self.best: Leaves | None = None
        self.seed = int(torch.randint(2**31, (), device="cpu"))

    @property
    def top(self) -> float:
        """The highest bound seen."""
        return max((value for _, value in self.history), default=-math.inf)

    def look(self, step: int, leaves: Leaves) -> bool:
        """Measure these parameters; whether the climb should end."""
        with streams_kept(), torch.no_grad(), pyro.validation_enabled(False):
            torch.manual_seed(self.seed)  # the same draws at every look: differences are the parameters' own
            value = float(torch.stack([self.bound(leaves) for _ in range(DRAWS)]).mean())
        if value > self.top:
            self.best = {n: v.detach().clone() for n, v in leaves.items()}
        self.history.append((step, value))
        tail = self.history[-PATIENCE:]
        return len(self.history) > PATIENCE and max(v for _, v in tail) < self.top

    def bound(self, leaves: Leaves) -> Tensor:
        """Mean over the rows of log p(x_n, z_n | globals) - log q(z_n) at one draw of the guide."""
        target = self.target
        trace: Any = target.guide_trace(leaves, self.rows)
        trace.compute_log_prob()
        guessed = [s for s in trace.nodes.values() if is_latent(s)]
        inside = [s for s in guessed if any(f.name == target.plate for f in s["cond_indep_stack"])]
        log_q: Any = sum(by_row(s["log_prob"], s, target.plate) for s in inside)
        given = {**{s["name"]: s["value"] for s in guessed}, **target.constrained(leaves, self.rows)}
        weights = target.weights(leaves)
        log_p = target.networks.run(weights, lambda: target.joint.rows(given, target.arguments(self.rows)))
        return (log_p - log_q).mean()


def split(rows: int, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the rows to climb on and of those held out, by the processor's random stream: the same on every device."""
    order = torch.randperm(rows, device="cpu").to(device)
    count = min(rows - 1, max(1, round(share * rows)))
    return order[count:].sort().values, order[:count].sort().values
