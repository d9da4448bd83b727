"""Tables of counts of which most are zero, in the E-step of a mixture: only what occurred is looked at.

Where the sufficient statistic of a site is the value itself (multinomial, Poisson, Bernoulli), the rows' features X are the
compressed rows as they are stored.  The log joint of rows and components is :math:`X\\eta^\\top` and the expected statistics
are :math:`X^\\top r`: two products that cost as many multiplications as there are entries, for every component.  A zero adds
nothing to either, and its base measure is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ...lazy_rows import CELLS, LazyRows, Numbers
from ...sparse_rows import Rows, stored_rows
from ...streaming import Stream
from .families import Family

#: Entries of a block of rows: with words of 4 bytes and counts of 8, some megabytes.
ENTRIES = 500_000
#: A dense table of so many numbers (not more: it may be a file), of which less than this share are not 0, is compressed.
LARGE, LARGEST, SHARE = 1_000_000, 100_000_000, 0.1
#: Rows on which that share is looked at.
LOOK = 512
KINDS = {torch.float32: np.float32, torch.float64: np.float64}


def suits(value: Any, family: Family) -> bool:
    """Whether a table of values is worked on as compressed rows.

    It is where the family's statistic is the value itself, and the table is stored so or has few numbers besides 0, on the
    processor: a card multiplies dense blocks faster than it gathers.
    """
    if family.linear is None or not isinstance(value, Tensor) or value.device.type != "cpu" or value.ndim != 2:
        return False
    if isinstance(value, LazyRows):
        rows = stored_rows(value)
        return rows is not None and value.source.shape[1] == rows.num_words
    if not LARGE <= value.numel() <= LARGEST or (value.is_floating_point() and bool(value.sum().isnan())):
        return False
    some = value[torch.linspace(0, len(value) - 1, min(len(value), LOOK)).long()]
    return float((some != 0).double().mean()) < SHARE


@dataclass(frozen=True)
class Counted:
    """The observed values of one site as compressed rows.

    Attributes
    ----------
    rows
        N rows of V columns; where they lie in files, they are read as they are needed.
    dtype
        Of the products.
    """

    rows: Rows
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor, dtype: torch.dtype) -> Counted:
        """Those of a table (N, V): as they are stored, or what a dense one has besides zeros."""
        rows = stored_rows(value)
        if rows is not None:
            return cls(rows, dtype)
        step, kind = max(1, CELLS // value.shape[1]), KINDS.get(dtype, np.float64)
        parts = [sp.csr_matrix(value[a : a + step].numpy()) for a in range(0, len(value), step)]
        starts = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(p.indptr) for p in parts]))])
        words = np.concatenate([p.indices.astype(np.int32) for p in parts])
        return cls(Rows(starts, words, np.concatenate([p.data.astype(kind) for p in parts]), value.shape[1]), dtype)

    def read(self, rows: Numbers) -> tuple[Tensor, ...]:
        """Starts, columns and counts of some rows, in memory."""
        kept = self.rows
        if isinstance(rows, slice):
            starts, words, counts = kept.stretch(rows.start, rows.stop)
        else:
            some = kept.take(rows)
            starts, words, counts = some.starts, some.words, some.counts
        counts = np.asarray(counts, dtype=KINDS.get(self.dtype, np.float64))
        return (
            torch.from_numpy(starts.astype(words.dtype, copy=False)),
            torch.from_numpy(words),
            torch.from_numpy(counts),
        )

    def matrix(self, pieces: tuple[Tensor, ...]) -> sp.csr_matrix:
        """SciPy's form of what was read."""
        starts, words, counts = (p.numpy() for p in pieces)
        return sp.csr_matrix((counts, words, starts), shape=(len(starts) - 1, self.rows.num_words))

    def block(self, rows: Numbers) -> sp.csr_matrix:
        """Some rows, (n, V)."""
        return self.matrix(self.read(rows))

    def each(self, rows: list[slice]) -> Iterator[sp.csr_matrix]:
        """Blocks of rows in order; from files, the next one is read while the present one is worked on."""
        if not self.rows.on_disk:
            yield from map(self.block, rows)
            return
        for _, pieces in Stream(self.read).each(rows):
            yield self.matrix(pieces)

    def base(self, family: Family, rows: list[slice]) -> float:
        """Sum of log h(x)."""
        if family.linear_base is None:
            return 0.0
        found = 0.0
        for block in self.each(rows):
            totals = torch.from_numpy(np.asarray(block.sum(1))).double().flatten()
            found += float(family.linear_base(torch.from_numpy(block.data).double(), totals))
        return found

    def fitting(self, rows: slice) -> Iterator[slice]:
        """Stretches of consecutive rows with at most `ENTRIES` entries, a row at least."""
        a = rows.start
        while a < rows.stop:
            starts = np.asarray(self.rows.starts[a : rows.stop + 1])
            room = int(np.searchsorted(starts, starts[0] + ENTRIES, side="right")) - 1
            b = min(rows.stop, a + max(1, room))
            yield slice(a, b)
            a = b


def times(block: sp.csr_matrix, table: Tensor) -> Tensor:
    """X @ table.T of rows X (n, V) and a table (C, V), as (C, n)."""
    return torch.from_numpy(block @ table.T.contiguous().numpy()).T.contiguous()


def back(block: sp.csr_matrix, weights: Tensor) -> Tensor:
    """weights @ X of weights (C, n) and rows X (n, V), (C, V)."""
    return torch.from_numpy(block.T @ weights.T.contiguous().numpy()).T
