"""Looks at all numbers of a table, a piece at a time: what is asked of a file makes no table of its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

#: Numbers of a piece.
PIECE = 1_000_000


def pieces(value: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Consecutive rows, each with the number of its first."""
    width = max(1, value.numel() // max(1, len(value)))
    first = 0
    for part in value.split(max(1, PIECE // width)):
        yield first, part
        first += len(part)


def ends(value: Tensor) -> tuple[float, float]:
    """Smallest and largest number, missing ones (NaN) left out; infinite in the wrong order where there is none."""
    low, high = (float(v) for v in torch.aminmax(value))
    if not math.isnan(low):
        return low, high
    found = [column_ends_of(part.reshape(-1, 1)) for _, part in pieces(value)]
    return min(float(a) for a, _ in found), max(float(b) for _, b in found)


def column_ends(value: Tensor) -> tuple[Tensor, Tensor]:
    """The same of every column of a table (N, ...), flattened."""
    found = [column_ends_of(part.reshape(len(part), -1)) for _, part in pieces(value)]
    return torch.stack([a for a, _ in found]).amin(0), torch.stack([b for _, b in found]).amax(0)


def column_ends_of(part: Tensor) -> tuple[Tensor, Tensor]:
    """Of a piece (n, D)."""
    nan = part.isnan()
    return part.masked_fill(nan, math.inf).amin(0), part.masked_fill(nan, -math.inf).amax(0)


def where(value: Tensor, test: Callable[[Tensor], Tensor]) -> tuple[int, tuple[int, ...]]:
    """How many numbers pass a test, and the index of the first; an empty one where none does."""
    count, index = 0, tuple[int, ...]()
    for first, part in pieces(value):
        good = test(part)
        here = int(good.sum())
        if here and not count:
            place = int(good.flatten().int().argmax())
            row, *rest = map(int, np.unravel_index(int(place), tuple(good.shape)))
            index = (first + row, *rest)
        count += here
    return count, index
