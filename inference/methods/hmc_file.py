"""Checkpoints of chains that move together: every rank knows where all of them stand, and the first keeps the file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..saved_state import SavedState, fingerprint, particulars

if TYPE_CHECKING:
    from ..problem import Problem
    from .hmc import Moves

#: Seconds between two writes.
EVERY = 2.0
#: Iterations between two looks at the clock.
LOOK = 10


class MoveFile:
    """The checkpoint of one run; any number of ranks goes on from it.

    Parameters
    ----------
    path, problem
        The file, and what is fitted.
    parts
        What else must be the same for a run to go on.
    """

    def __init__(self, path: Path, problem: Problem, *parts: Any) -> None:
        self.ranks = problem.ranks
        self.state = SavedState(path, "HMC", fingerprint(problem, *parts), particulars(problem, *parts))
        self._written = time.perf_counter()

    def read(self) -> tuple[dict[str, NDArray], dict[str, Any]] | None:
        """Arrays and numbers of the run that was interrupted, on every rank; None where there is no file.

        Raises
        ------
        ValueError
            The file is no checkpoint, or that of another run.
        """
        found = self.state.of_first(self.ranks)
        if found is None:
            return None
        tensors, card = found
        return {n: np.array(v.numpy()) for n, v in tensors.items()}, card["numbers"]

    def write(self, moves: Moves, now: bool = False) -> None:
        """Keep where the chains stand, if it is time or `now`."""
        if not self.ranks.leads or not (now or (moves.done % LOOK == 0 and self._late()) or EVERY == 0.0):
            return
        arrays, numbers = moves.snapshot()
        tensors = {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in arrays.items()}
        self.state.write(tensors, {"numbers": json.loads(json.dumps(numbers))})
        self._written = time.perf_counter()

    def _late(self) -> bool:
        return time.perf_counter() - self._written >= EVERY

    def remove(self) -> None:
        """The run has come to its end."""
        if self.ranks.leads:
            self.state.remove()
