"""Tables of counts of which only what occurred is stored, in memory or on disk; rows become dense as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .gaps import Gapped, Gaps
from .lazy_rows import CELLS, LazyRows
from .mapped_files import still_there

#: Rows up to which a table is dense from the start: the story is told on all of them anyway.
FEW = 1000
#: Entries that are looked at in one go.
SPAN = 1_000_000


@dataclass(frozen=True)
class Rows:
    """N rows of counts of V words, compressed.

    Attributes
    ----------
    starts
        (N + 1,), where the entries of each row begin.
    words, counts
        The column of every entry, and its count.
    num_words
        V.
    """

    starts: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    num_words: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def on_disk(self) -> bool:
        """Whether entries are read from a file as they are needed."""
        return is_mapped(self.words) or is_mapped(self.counts)

    @property
    def widest(self) -> int:
        """Entries of the longest row."""
        found = 0
        for part in overlapping(self.starts, SPAN):
            if self.on_disk:
                check_starts(part[:-1], part[1:], len(self.words))
            found = max(found, int(np.diff(part).max(initial=0)))
        if self.on_disk and found > self.num_words:
            raise damaged(f"a row has {found} different words, and the vocabulary has {self.num_words}")
        return found

    def cut(self, first: int, last: int) -> Rows:
        """Consecutive rows."""
        a, b = int(self.starts[first]), int(self.starts[last])
        return Rows(np.asarray(self.starts[first : last + 1]) - a, self.words[a:b], self.counts[a:b], self.num_words)

    def take(self, rows: np.ndarray) -> Rows:
        """Some rows in the order given, in memory."""
        which, _, number = self.entries(rows)
        words, counts = self.loaded(number)
        starts = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=len(rows)))])
        return Rows(starts, words, counts, self.num_words)

    def without(self, rows: np.ndarray) -> Rows:
        """All but some rows (sorted numbers), which stay where they are."""
        first, last = np.asarray(self.starts[rows], np.int64), np.asarray(self.starts[rows + 1], np.int64)
        check_starts(first, last, len(self.words))
        entries = Gaps.of(first, last - first)
        starts: Any = Gapped(self.starts, Gaps.of(rows), entries.before)
        words, counts = (cast(np.ndarray, Gapped(values, entries)) for values in (self.words, self.counts))
        return Rows(starts, words, counts, self.num_words)

    def entries(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row (counted from 0), place in the row and number of every entry of some rows."""
        still_there(self.starts)
        if isinstance(rows, slice):
            begin, end = self.starts[rows.start : rows.stop], self.starts[rows.start + 1 : rows.stop + 1]
        else:
            begin, end = self.starts[rows], self.starts[rows + 1]
        widths = np.asarray(end) - np.asarray(begin)
        check_starts(np.asarray(begin), np.asarray(end), len(self.words))
        before = np.cumsum(widths) - widths
        which = np.repeat(np.arange(len(widths)), widths)
        place = np.arange(len(which)) - before[which]
        return which, place, np.asarray(begin, dtype=np.int64)[which] + place

    def loaded(self, part: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Words and counts of some entries; those of a file are read now, and checked.

        Raises
        ------
        ValueError
            The file holds what no counts can be.
        """
        still_there(self.words, self.counts)
        words, counts = self.words[part], self.counts[part]
        if self.on_disk:
            words, counts = np.array(words), np.array(counts)
            check_entries(words, counts, self.num_words)
        return words, counts

    def stretch(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts (from 0), words and counts of consecutive rows, as `loaded`."""
        still_there(self.starts)
        starts = np.asarray(self.starts[first : last + 1])
        if self.on_disk:
            check_starts(starts[:-1], starts[1:], len(self.words))
        return starts - starts[0], *self.loaded(slice(int(starts[0]), int(starts[-1])))

    def dense(self, rows: slice | np.ndarray, view: str, width: int) -> np.ndarray:
        """Some rows side by side, (n, width), whole numbers; shorter ones end in word 0 with count 0."""
        which, place, number = self.entries(rows)
        stretch = isinstance(rows, slice) and len(number)
        words, counts = self.loaded(slice(int(number[0]), int(number[-1]) + 1) if stretch else number)
        out = np.zeros((rows.stop - rows.start if isinstance(rows, slice) else len(rows), width), np.int64)
        out[which, np.asarray(words) if view == "table" else place] = words if view == "words" else counts
        return out


def damaged(what: str) -> ValueError:
    """What is told of files whose numbers no counts can have."""
    return ValueError(f"the stored counts are damaged: {what}; store them again")


def check_starts(begin: np.ndarray, end: np.ndarray, entries: int) -> None:
    """Refuse rows that do not lie one after the other.

    Raises
    ------
    ValueError
        Where they lie instead.
    """
    if len(begin) and (bool((end < begin).any()) or int(begin.min()) < 0 or int(end.max()) > entries):
        raise damaged(f"rows of {entries} entries begin at {int(begin.min())} to {int(begin.max())}, and not in order")


def check_entries(words: np.ndarray, counts: np.ndarray, num_words: int) -> None:
    """Refuse words beyond the vocabulary and counts below 0: machine code that met them would write where it must not.

    Raises
    ------
    ValueError
        The first of them.
    """
    if len(words) != len(counts):
        raise damaged(f"{len(words)} words and {len(counts)} counts")
    if not len(words):
        return
    if int(words.min()) < 0 or int(words.max()) >= num_words:
        first = int(words[(words < 0) | (words >= num_words)][0])
        raise damaged(f"there is a word {first} in a vocabulary of {num_words}")
    if not float(counts.min()) >= 0:
        raise damaged(f"there is a count of {float(counts.min()):g}")


def is_mapped(array: Any) -> bool:
    """Whether an array is part of a memory-mapped file."""
    array = array.array if isinstance(array, Gapped) else array
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def overlapping(starts: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Pieces of `starts`, each with the first entry of the next."""
    for a in range(0, len(starts) - 1, size):
        yield np.asarray(starts[a : a + size + 1])


@dataclass(frozen=True)
class Counts:
    """Rows as a story wants to see them.

    Attributes
    ----------
    rows
        What is stored.
    view
        "table" (N, V); "words", the ids of each row, or "counts", how often each occurs: (N, L), L those of the longest row.
    width
        V or L.
    """

    rows: Rows
    view: str
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, V) or (N, L)."""
        return (len(self.rows), self.width)

    @property
    def slow(self) -> bool:
        """Whether there is a file to be read."""
        return self.rows.on_disk

    def read(self, rows: slice | np.ndarray) -> Tensor:
        """Dense whole numbers."""
        return torch.from_numpy(self.rows.dense(rows, self.view, self.width))

    def cut(self, first: int, last: int) -> Counts:
        """Consecutive rows."""
        return replace(self, rows=self.rows.cut(first, last))

    def pick(self, rows: np.ndarray) -> Counts | None:
        """Some rows of those that lie in memory; of a file, only stretches can be had."""
        return None if self.rows.on_disk else replace(self, rows=self.rows.take(rows))

    def without(self, rows: np.ndarray) -> Counts:
        """All but some rows, not read."""
        return replace(self, rows=self.rows.without(rows))

    def taken(self, rows: np.ndarray) -> Counts:
        """Some rows, read now."""
        return replace(self, rows=self.rows.take(rows))

    def extremes(self) -> tuple[float, float]:
        """No count is missing, and none is below 0."""
        top = self.rows.words if self.view == "words" else self.rows.counts
        return 0.0, float(max((int(np.asarray(top[a : a + SPAN]).max()) for a in range(0, len(top), SPAN)), default=0))


def stored_rows(value: Any) -> Rows | None:
    """The compressed rows behind an argument, where there are any."""
    source = getattr(value, "source", None)
    return source.rows if isinstance(source, Counts) else None


# -- from what users have -------------------------------------------------------------------------------------------------


def stored_counts(name: str, value: Any) -> Tensor:
    """A sparse matrix of whole numbers, or an object of its form, as a tensor: dense where it is small.

    Parameters
    ----------
    value
        Has `indptr`, `indices`, `data` and `shape`, as SciPy's compressed rows, and perhaps `view` (see `Counts`).

    Raises
    ------
    TypeError
        A matrix of real numbers, which is a dense table for any story.
    ValueError
        Negative counts, or words beyond the columns; the first row is named.
    """
    matrix = value if hasattr(value, "indptr") and getattr(value, "format", "csr") == "csr" else value.tocsr()
    if np.asarray(matrix.data[:0]).dtype.kind not in "iu":
        raise TypeError(
            f"{name} is a sparse matrix ({type(value).__name__}) of {matrix.data.dtype}; pass {name}.toarray(), or, where it "
            f"holds counts, {name}.astype(int)"
        )
    if not getattr(value, "checked", False):
        matrix = canonical(name, matrix)
    rows = Rows(matrix.indptr, matrix.indices, matrix.data, int(matrix.shape[1]))
    view = getattr(value, "view", "table")
    source = Counts(rows, view, rows.num_words if view == "table" else max(1, rows.widest))
    small = len(rows) <= FEW or (not rows.on_disk and len(rows) * source.width <= CELLS)
    return source.read(slice(0, len(rows))) if small else LazyRows(source, torch.long)


def canonical(name: str, matrix: Any) -> Any:
    """Compressed rows without doubles, whose entries are counts of columns that exist."""
    if not is_mapped(matrix.data) and hasattr(matrix, "sum_duplicates") and not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    for a in range(0, len(matrix.data), SPAN):
        counts, words = matrix.data[a : a + SPAN], matrix.indices[a : a + SPAN]
        bad = (np.asarray(counts) < 0) | (np.asarray(words) < 0) | (np.asarray(words) >= matrix.shape[1])
        if bad.any():
            at = a + int(bad.argmax())
            row = int(np.searchsorted(matrix.indptr, at, side="right")) - 1
            raise ValueError(
                f"{name}: row {row} has count {int(matrix.data[at])} in column {int(matrix.indices[at])}; counts are whole "
                f"numbers from 0 in columns 0 to {matrix.shape[1] - 1}"
            )
    return matrix


def is_sparse_matrix(value: Any) -> bool:
    """Whether a value is a sparse matrix of SciPy, or compressed rows of another kind."""
    return (hasattr(value, "toarray") and hasattr(value, "nnz")) or (
        hasattr(value, "indptr") and hasattr(value, "indices") and hasattr(value, "data")
    )
