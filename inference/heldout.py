"""Rows for training and rows held out: of data in memory by their numbers, of data on disk by views that pass over some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import lazy_rows
from .data import some_rows, take_rows
from .lazy_rows import HostTable, LazyRows
from .mapped_files import known_file
from .sparse_rows import FEW, Counts

if TYPE_CHECKING:
    from .problem import Problem

#: Rows, and numbers (entries, of counts), that are held out of data on disk at most: means over them are known to 1 % of a
#: row's sd, and more would be kept in memory.
MOST, MOST_CELLS = 10_000, 4_000_000


def split(problem: Problem, data: Any, test: Any, seed: int) -> tuple[Any, Any, list[str]]:
    """Training data, held-out data (or None), and what was done.

    Raises
    ------
    ValueError
        `test` is no share, or leaves no rows.
    """
    structure = problem.structure
    if test is None or (isinstance(test, int | float) and test == 0):
        return data, None, ["no rows were held out"]
    if not isinstance(test, int | float):
        return data, test, ["held-out rows: as given"]
    if not 0 < test < 1:
        raise ValueError(f"test={test!r} must be a share between 0 and 1, held-out data, or None")
    n, names, kwargs = structure.num_rows, structure.row_arguments, problem.kwargs
    if not n or not names:
        return data, None, ["the story has no data plate whose rows are arguments: no rows were held out"]
    count = round(n * test)
    if not 0 < count < n:
        raise ValueError(f"test={test!r} of {n} rows is {count}: nothing is left to fit or to hold out")
    said = f"held out at random (seed {seed})"
    random = torch.Generator().manual_seed(seed)
    if any(stays_away(kwargs[name]) for name in names):
        few = max(1, min(count, MOST, *(affordable(kwargs[name]) for name in names)))
        rows = some_rows(n, few, random).sort().values.numpy()
        if few < count:
            said += f"; {test:g} of all would be {count:,}, and as few of data on disk tell as much"
        kept, held = ({**kwargs, **{m: part(kwargs[m], rows) for m in names}} for part in (without, taken))
        return kept, held, [f"fitted to {n - few:,} rows, {few:,} {said}"]
    order = torch.randperm(n, generator=random, device="cpu")
    pick = {part: rows.sort().values for part, rows in (("test", order[:count]), ("train", order[count:]))}
    train, held = (take_rows(kwargs, names, pick[part]) for part in ("train", "test"))
    return train, held, [f"fitted to {n - count} rows, {count} {said}"]


def stays_away(value: Tensor) -> bool:
    """Whether rows are too many to be copied: read as they are needed, or from a large file."""
    if isinstance(value, LazyRows):
        return value.source.slow and value.numel() > lazy_rows.CELLS
    return value.numel() > lazy_rows.CELLS and known_file(value) is not None


def affordable(value: Tensor) -> int:
    """Rows of which the numbers, or entries, may be held in memory."""
    if isinstance(value, LazyRows) and isinstance(value.source, Counts):
        each = len(value.source.rows.words) / max(1, len(value))
    else:
        each = value.numel() / max(1, len(value))
    return int(MOST_CELLS / max(1.0, each))


def without(value: Tensor, rows: np.ndarray) -> Tensor:
    """All rows of an argument but some, whose sorted numbers are given; large ones are not read."""
    if isinstance(value, LazyRows) and hasattr(value.source, "without"):
        return value.like(value.source.without(rows))
    if stays_away(value) and (value.ndim > 1 or value.is_floating_point()):
        return LazyRows(HostTable(value).without(rows), value.dtype, value.device)
    keep = torch.ones(len(value), dtype=torch.bool)
    keep[torch.from_numpy(rows)] = False
    return value[keep.to(value.device)]


def taken(value: Tensor, rows: np.ndarray) -> Tensor:
    """Some rows of an argument, in memory."""
    if not isinstance(value, LazyRows):
        return value[torch.from_numpy(rows).to(value.device)]
    if not isinstance(value.source, Counts):
        return value.source.read(rows).to(dtype=value.dtype, device=value.device)
    found = value.source.taken(rows)
    small = len(rows) <= FEW or len(rows) * found.width <= lazy_rows.CELLS
    return found.read(slice(0, len(rows))).to(value.device) if small else value.like(found)
