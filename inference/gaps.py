"""Rows held out of data that stay where they are: views that pass over them, so that nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mapped_files import still_there

Numbers = slice | np.ndarray


@dataclass(frozen=True)
class Gaps:
    """Stretches that are cut out of a long axis.

    Attributes
    ----------
    first
        (M,), where each begins, in order; none overlaps another.
    before
        (M + 1,), how much is cut out before each, and in all.
    """

    first: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, first: np.ndarray, lengths: np.ndarray | None = None) -> Gaps:
        """From where they begin, and their lengths (None: 1 each)."""
        first = np.asarray(first, dtype=np.int64)
        lengths = np.ones(len(first), np.int64) if lengths is None else np.asarray(lengths, dtype=np.int64)
        return cls(first, np.concatenate([[0], np.cumsum(lengths)]))

    @property
    def total(self) -> int:
        """How much is cut out."""
        return int(self.before[-1])

    def passed(self, position: Any) -> Any:
        """How many of them lie before positions on the shortened axis."""
        return np.searchsorted(self.first - self.before[:-1], position, side="right")

    def place(self, position: Any) -> Any:
        """Positions on the shortened axis as positions on the long one."""
        return position + self.before[self.passed(position)]

    def within(self, a: int, b: int) -> tuple[int, int, int, int]:
        """A stretch of the shortened axis: where it lies on the long one, and the first and last of the gaps inside."""
        if b <= a:
            return 0, 0, 0, 0
        start, stop = int(self.place(a)), int(self.place(b - 1)) + 1
        i, j = (int(np.searchsorted(self.first, end, side="left")) for end in (start, stop))
        return start, stop, i, j

    def part(self, start: int, i: int, j: int) -> Gaps:
        """Some of them, on an axis that begins at `start`."""
        return Gaps(self.first[i:j] - start, self.before[i : j + 1] - self.before[i])

    def kept(self, length: int) -> np.ndarray:
        """Which positions of a long axis are not cut out: (length,) of bool."""
        turns = np.zeros(length + 1, np.int32)
        np.add.at(turns, self.first, 1)
        np.add.at(turns, self.first + np.diff(self.before), -1)
        return np.cumsum(turns[:-1]) == 0


class Gapped:
    """A list (N,), perhaps in a file, without some stretches: read where it is asked for; `np.asarray` reads all of it.

    Parameters
    ----------
    array
        The whole list.
    gaps
        What is left out.
    shift
        (M + 1,), what is taken off numbers behind so many gaps: positions in another list that has gaps too.
    """

    def __init__(self, array: np.ndarray, gaps: Gaps, shift: np.ndarray | None = None) -> None:
        self.array, self.gaps, self.shift = array, gaps, shift
        self.dtype = array.dtype if shift is None else np.dtype(np.int64)

    def __len__(self) -> int:
        return len(self.array) - self.gaps.total

    def __getitem__(self, index: Any) -> Any:
        """A stretch as another view; what is at some numbers as an array."""
        if not isinstance(index, slice):
            number = np.where(np.asarray(index) < 0, np.asarray(index) + len(self), index)
            found = self.array[self.gaps.place(number)]
            return found if self.shift is None else found - self.shift[self.gaps.passed(number)]
        a, b, step = index.indices(len(self))
        if step != 1:
            return self[np.arange(a, b, step)]
        start, stop, i, j = self.gaps.within(a, b)
        shift = None if self.shift is None else self.shift[i : j + 1]
        if i == j:
            return self.array[start:stop] if shift is None else np.asarray(self.array[start:stop]) - shift[0]
        return Gapped(self.array[start:stop], self.gaps.part(start, i, j), shift)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        kept = self.gaps.kept(len(self.array))
        found = np.asarray(self.array)[kept]
        if self.shift is not None:
            found = found - self.shift[self.gaps.passed(np.arange(len(found)))]
        return found if dtype is None else found.astype(dtype, copy=False)


@dataclass(frozen=True)
class GappedTable:
    """Rows of a table in a file, or in another memory than the device's, without some of them."""

    table: Tensor
    gaps: Gaps
    slow: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        return (len(self.table) - self.gaps.total, *self.table.shape[1:])

    def read(self, rows: Numbers) -> Tensor:
        """Some rows."""
        still_there(self.table)
        if not isinstance(rows, slice):
            return self.table[torch.from_numpy(np.asarray(self.gaps.place(rows)))]
        start, stop, i, j = self.gaps.within(rows.start, rows.stop)
        found = self.table[start:stop]
        return found if i == j else found[torch.from_numpy(self.gaps.part(start, i, j).kept(stop - start))]

    def cut(self, first: int, last: int) -> GappedTable:
        """Consecutive rows, not read."""
        start, stop, i, j = self.gaps.within(first, last)
        return GappedTable(self.table[start:stop], self.gaps.part(start, i, j), self.slow)

    def extremes(self) -> tuple[float, float]:
        """One pass, over all rows: those that are left out are data too."""
        low, high = torch.aminmax(self.table)
        return float(low), float(high)
