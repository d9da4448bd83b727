"""Chains over ranks: every rank moves its share of them, and all ranks end with all draws.

A chain has random numbers of its own (`sampling.spread`), so that it makes the same draws wherever it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..distributed import Ranks
from ..lifeline import Lifeline
from .backends import Backend, choose_backend
from .hamiltonian import Record
from .movers import Ensemble, Mover

if TYPE_CHECKING:
    from ..capture import ValueAndGrad

T = TypeVar("T")


def mine(ranks: Ranks, chains: int) -> slice:
    """This rank's share of the chains: consecutive ones, as many as on any other rank or one more."""
    return slice(chains * ranks.rank // ranks.size, chains * (ranks.rank + 1) // ranks.size)


def same_backend(
    ranks: Ranks, potential: ValueAndGrad, wanted: str, iterations: int, budget: float | None, deepest: int = 0
) -> Backend:
    """As `choose_backend`, on every rank the same one: clocks and compilers differ, draws must not.

    The first process of a machine builds machine code, the others of that machine find it.
    """

    def chosen(name: str) -> Backend:
        return choose_backend(potential, name, iterations, budget, deepest)

    if not ranks.several:
        return chosen(wanted)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    before = ranks.together(lambda: chosen(wanted) if first else None)
    name = ranks.first(before.name if before is not None else wanted)
    backend = ranks.together(lambda: before if before is not None and before.name == name else follow(chosen, name))
    if ranks.every(backend.name == name):
        return backend
    return Backend(potential.mode, f"a rank cannot run {name}", notice=backend.notice)


def follow(chosen: Callable[[str], Backend], name: str) -> Backend:
    """The backend of the first rank, or what there is instead."""
    try:
        return chosen(name)
    except ValueError:
        return chosen("auto")


def run_apart(ranks: Ranks, call: Callable[[Callable[[], bool]], None]) -> None:
    """Let every rank run its chains, however long they take, and hear of a failure on any of them.

    Parameters
    ----------
    call
        Is given a function that is to be asked now and then: it is False, and raises RankError where a rank has ended.
    """

    def run() -> None:
        with Lifeline(ranks) as line:
            call(line)

    ranks.together(run)


def collected(ranks: Ranks, own: Sequence[T]) -> list[T]:
    """What all ranks hold by chain, in the order of the chains."""
    return [item for part in ranks.gather(list(own)) for item in part] if ranks.several else list(own)


def all_records(ranks: Ranks, records: Sequence[Record]) -> list[Record]:
    """Every chain's record on every rank."""
    if not ranks.several:
        return list(records)
    for record in records:
        record.camera.latest = None  # snapshots stay where they are
    return collected(ranks, records)


@dataclass
class SharedMover:
    """Moves of all chains, of which every rank makes its share."""

    own: Mover
    ranks: Ranks

    def at(self, position: NDArray) -> Ensemble:
        """The ensemble at these positions."""
        part = mine(self.ranks, len(position))
        here = self.own.at(np.ascontiguousarray(position[part])) if part.stop > part.start else None
        shapes = (position.shape, position.shape[:1], position.shape)
        q, v, g = self.whole(part, shapes, None if here is None else (here.position, here.value, here.gradient))
        return Ensemble(q, v, g)

    def move(
        self, start: Ensemble, momentum: NDArray, steps: int, step: float, inverse: NDArray
    ) -> tuple[Ensemble, NDArray]:
        """Where `steps` leapfrog steps lead, and the momentum there; `inverse` is the inverse mass."""
        part = mine(self.ranks, len(momentum))
        arrays = None
        if part.stop > part.start:
            some = Ensemble(*(np.ascontiguousarray(a[part]) for a in (start.position, start.value, start.gradient)))
            end, p = self.own.move(some, np.ascontiguousarray(momentum[part]), steps, step, inverse)
            arrays = (end.position, end.value, end.gradient, p)
        wide, long = momentum.shape, momentum.shape[:1]
        q, v, g, p = self.whole(part, (wide, long, wide, wide), arrays)
        return Ensemble(q, v, g), p

    def chosen(self, taken: NDArray, new: Ensemble, old: Ensemble) -> Ensemble:
        """The new state of the chains that were taken, the old one of the others."""
        return self.own.chosen(taken, new, old)

    def whole(self, part: slice, shapes: Sequence[tuple[int, ...]], arrays: Sequence[NDArray] | None) -> list[NDArray]:
        """Arrays of all chains from every rank's part of them, in one message."""
        full = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        if arrays is not None:
            for table, array in zip(full, arrays, strict=True):
                table[part] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
        return [t.numpy() for t in self.ranks.total_of(*full)]


def shared_mover(mover: Mover, ranks: Ranks) -> Mover:
    """The mover, with the moves shared out where there are several ranks."""
    return SharedMover(mover, ranks) if ranks.several else mover
