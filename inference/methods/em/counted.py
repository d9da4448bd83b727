"""Tables of counts of which most are zero, in the E-step of a mixture: only what occurred is looked at.

Where the sufficient statistic of a site is the value itself (multinomial, Poisson, Bernoulli), the rows' features X are the
compressed rows as they are stored.  The log joint of rows and components is :math:`X\\eta^\\top` and the expected statistics
are :math:`X^\\top r`: two products that cost as many multiplications as there are entries, for every component.  A zero adds
nothing to either, and its base measure is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ...lazy_rows import LazyRows, Numbers
from ...sparse_rows import Rows, stored_rows
from ...streaming import Stream
from .families import Family

#: Entries of a block of rows: with words of 4 bytes and counts of 8, some megabytes.
ENTRIES = 500_000


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
    def of(cls, value: Tensor, family: Family, dtype: torch.dtype) -> Counted | None:
        """Those of a table that is stored so, on the processor, where the family's statistic is the value itself."""
        if family.linear is None or not isinstance(value, LazyRows) or value.device.type != "cpu" or value.ndim != 2:
            return None
        rows = stored_rows(value)
        return None if rows is None or value.source.shape[1] != rows.num_words else cls(rows, dtype)

    @classmethod
    def from_table(cls, value: Tensor, dtype: torch.dtype) -> Counted:
        """Those of a dense table (N, V)."""
        made = sp.csr_matrix(value.numpy())
        return cls(Rows(made.indptr, made.indices, made.data, value.shape[1]), dtype)

    def read(self, rows: Numbers) -> tuple[Tensor, ...]:
        """Starts, columns and counts of some rows, in memory."""
        kept = self.rows
        if isinstance(rows, slice):
            starts = np.asarray(kept.starts[rows.start : rows.stop + 1])
            part: Numbers = slice(int(starts[0]), int(starts[-1]))
            starts = starts - starts[0]
        else:
            which, _, part = kept.entries(rows)
            starts = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=len(rows)))])
        kind = np.float32 if self.dtype == torch.float32 else np.float64
        words, counts = np.array(kept.words[part]), np.array(kept.counts[part], dtype=kind)
        return torch.from_numpy(starts.astype(words.dtype, copy=False)), torch.from_numpy(words), torch.from_numpy(counts)

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
