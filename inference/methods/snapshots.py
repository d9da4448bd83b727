"""Where a chain stands between two iterations, kept so that an interrupted run goes on from there, bit by bit."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..saved_state import SavedState, fingerprint, particulars

if TYPE_CHECKING:
    from ..problem import Problem
    from .hamiltonian import Record

#: Seconds between two snapshots of a chain, and between two writes of the file.
EVERY = 2.0


@dataclass(frozen=True)
class Snapshot:
    """One chain between two iterations.

    Attributes
    ----------
    arrays
        position, gradient (dim,); inverse, factor, spread (dim,) or (dim, dim); mean (dim,); adaptation (6,): target,
        centre, error, average, count and step of the dual averaging; what was drawn so far under `positions` and `stats/...`.
    numbers
        value, done, seen, divergences, step, and the generator's state.
    """

    arrays: dict[str, NDArray]
    numbers: dict[str, Any]


class Camera:
    """Takes a chain's snapshots when they are due; never without a checkpoint."""

    def __init__(self, every: float = math.inf) -> None:
        self.every = every
        self.latest: Snapshot | None = None
        self._taken = time.perf_counter()

    @property
    def off(self) -> bool:
        """Whether no snapshot is ever wanted."""
        return math.isinf(self.every)

    @property
    def due(self) -> bool:
        """Whether it is time for another."""
        return not self.off and time.perf_counter() - self._taken >= self.every

    def keep(self, record: Record, generator: np.random.Generator, found: Snapshot) -> None:
        """A snapshot, with what the record holds."""
        kept = record.kept
        drawn = {"positions": record.positions[:kept].copy()}
        drawn |= {f"stats/{n}": v[:kept].copy() for n, v in record.stats.items()}
        numbers = {"divergences": int(record.divergences), "generator": generator.bit_generator.state}
        self.latest = Snapshot({**found.arrays, **drawn}, {**found.numbers, **numbers})
        self._taken = time.perf_counter()


class ChainFile:
    """The checkpoint of all chains of one run; of several ranks, each keeps its chains in a file of its own, PATH.RANK.

    Parameters
    ----------
    path, problem
        The file, and what is fitted.
    parts
        What else must be the same for a run to go on; the number of ranks need not be.
    """

    def __init__(self, path: Path, problem: Problem, *parts: Any) -> None:
        ranks, self.path, self.leads = problem.ranks, path, problem.ranks.leads
        own = Path(f"{path}.{ranks.rank}") if ranks.several else path
        self.state = SavedState(own, "NUTS", fingerprint(problem, *parts), particulars(problem, *parts))
        self.first = 0  # number of this rank's first chain
        self._written = time.perf_counter()

    def files(self) -> list[Path]:
        """Files that any number of ranks may have left."""
        left = self.path.parent.glob(self.path.name + ".*")
        return [self.path, *sorted(p for p in left if p.suffix[1:].isdigit())]

    def remove(self) -> None:
        """The run has come to its end, on all ranks."""
        for path in self.files() if self.leads else [self.state.path]:
            replace(self.state, path=path).remove()

    def read(self, chains: int) -> list[Snapshot] | None:
        """Every chain's snapshot, or None where there is no file.

        Raises
        ------
        ValueError
            The file is no checkpoint, or that of another run.
        """
        shots: dict[int, Snapshot] = {}
        for path in self.files():
            found = replace(self.state, path=path).read()
            if found is None:
                continue
            tensors, card = found
            arrays: list[dict[str, NDArray]] = [{} for _ in card["chains"]]
            for name, value in tensors.items():
                chain, rest = name.split("/", 1)
                arrays[int(chain)][rest] = value.numpy()
            for c, (a, n) in enumerate(zip(arrays, card["chains"], strict=True), card.get("first", 0)):
                if c not in shots or shots[c].numbers["done"] < n["done"]:
                    shots[c] = Snapshot(a, n)
        return [shots[c] for c in range(chains)] if len(shots) == chains else None

    def write(self, records: list[Record], now: bool = False) -> None:
        """Keep the chains' latest snapshots, if all have one and it is time, or `now`."""
        latest = [r.camera.latest for r in records]
        if any(s is None for s in latest) or not (
            now or time.perf_counter() - self._written >= records[0].camera.every
        ):
            return
        shots = [s for s in latest if s is not None]
        tensors = {
            f"{c}/{name}": torch.from_numpy(np.ascontiguousarray(value))
            for c, shot in enumerate(shots)
            for name, value in shot.arrays.items()
        }
        numbers = json.loads(json.dumps([s.numbers for s in shots]))
        self.state.write(tensors, {"chains": numbers, "first": self.first})
        self._written = time.perf_counter()
