"""Checkpoints of a climb: written while it runs, read when the same fit is asked for again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...distributed import ALONE, Ranks
from ...saved_state import SavedState, fingerprint, particulars
from .climb import Climb, Run

if TYPE_CHECKING:
    from ...joint import Block
    from ...problem import Problem
    from . import EM


@dataclass
class Saved:
    """The checkpoint of one group of runs, written every few iterations."""

    state: SavedState
    ranks: Ranks = ALONE
    every: int = 5

    @classmethod
    def for_fit(cls, em: EM, problem: Problem, blocks: tuple[Block, ...], offset: int) -> Saved:
        """Where this climb is kept; groups after the first have files of their own."""
        options = (em.estimate, em.tol, em.ridge, em.driver, em.batch_size, em.kernels, em.restarts)
        layout = [(b.name, b.shape) for b in blocks if not b.local]
        path = Path(str(em.checkpoint) + (f".{offset}" if offset else ""))
        parts = (options, layout, offset)
        return cls(SavedState(path, "EM", fingerprint(problem, *parts), particulars(problem, *parts)), problem.ranks)

    def write(self, climb: Climb) -> None:
        """Keep the state, if it is time; the first rank writes for all."""
        if climb.iteration % self.every or not self.ranks.leads:
            return
        tensors = {f"theta/{n}": v.contiguous() for n, v in climb.theta.items()}
        tensors |= {f"extra/{n}": v.contiguous() for n, v in climb.extra.items()}
        runs: list[dict[str, Any]] = []
        for r, run in enumerate(climb.runs):
            tensors |= {f"run{r}/{n}": v.contiguous().clone() for n, v in run.theta.items()}
            runs.append({k: v for k, v in vars(run).items() if k != "theta"})
        card = {"iteration": climb.iteration, "active": climb.active, "runs": runs, "rows": list(self.ranks.counts)}
        self.state.write(tensors, card)

    def resume(self, start: Climb) -> Climb:
        """The state that was kept, if it belongs to this fit; else the start.

        Raises
        ------
        ValueError
            The file belongs to another fit, or is no checkpoint.
        """
        found = self.state.of_first(self.ranks)
        if found is None:
            return start
        tensors, card = found
        if card.get("rows", []) != list(self.ranks.counts):  # other ranks have other blocks
            tensors = {n: v for n, v in tensors.items() if n not in ("extra/S", "extra/entropy")}
        device = next(iter(start.theta.values())).device if start.theta else torch.device("cpu")

        def part(prefix: str) -> dict[str, Tensor]:
            return {n[len(prefix) :]: v.to(device) for n, v in tensors.items() if n.startswith(prefix)}

        runs = [Run(part(f"run{r}/"), **{**values}) for r, values in enumerate(card["runs"])]
        return Climb(part("theta/"), runs, card["active"], card["iteration"], part("extra/"))
