"""Documents as compressed sparse rows, and in blocks of similar length that suit matrix products."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mapped_files import still_there
from ..sparse_rows import SPAN, Rows, check_entries, check_starts, is_mapped
from . import cards

#: Word places of a block: its topics x places stay in the cache.
CELLS = 8192
#: Documents of a block at most, and those of a file that are held.
MOST, PART = 512, 4096


@dataclass(frozen=True)
class Documents:
    """Counts of words in D documents.

    Attributes
    ----------
    starts
        (D + 1,), where the words of each document begin.
    words, counts
        Distinct word ids and how often each occurs, document after document.
    num_words
        V.
    times
        (D,) slices of time, or None.
    """

    starts: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    num_words: int
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> float:
        """Words of all documents, repetitions counted."""
        if not self.on_disk:
            return float(self.counts.sum())
        return float(sum(np.sum(self.counts[a : a + SPAN], dtype=np.float64) for a in range(0, len(self.counts), SPAN)))

    @property
    def on_disk(self) -> bool:
        """Whether words and counts are read from files as they are needed."""
        return is_mapped(self.words)

    @property
    def lengths(self) -> np.ndarray:
        """Words of each document, (D,)."""
        if self.on_disk:
            parts = [self.cut(a, min(a + 65_536, len(self))).lengths for a in range(0, len(self), 65_536)]
            return np.concatenate([np.zeros(0), *parts])
        return np.add.reduceat(np.append(self.counts, 0.0), self.starts[:-1]) * (np.diff(self.starts) > 0)

    @classmethod
    def from_stored(cls, rows: Rows, times: np.ndarray | None = None) -> Documents:
        """From compressed rows, which stay where they are."""
        return cls(rows.starts, rows.words, rows.counts, rows.num_words, times)

    def cut(self, first: int, last: int) -> Documents:
        """Consecutive documents, in memory."""
        still_there(self.starts, self.words, self.counts)
        starts = np.asarray(self.starts[first : last + 1], dtype=np.int64)
        if self.on_disk:
            check_starts(starts[:-1], starts[1:], len(self.words))
        part = slice(int(starts[0]), int(starts[-1]))
        words, counts = np.array(self.words[part], dtype=np.int64), np.array(self.counts[part], dtype=np.float64)
        if self.on_disk:
            check_entries(words, counts, self.num_words)
        times = None if self.times is None else self.times[first:last]
        return Documents(starts - starts[0], words, counts, self.num_words, times)

    @classmethod
    def from_rows(
        cls, words: np.ndarray, counts: np.ndarray, num_words: int, times: np.ndarray | None = None
    ) -> Documents:
        """From ids and counts (D, L) each, where count 0 is no word; repeated ids of one document are added up."""
        d, place = np.nonzero(counts > 0)
        key, value = d * num_words + words[d, place], counts[d, place].astype(np.float64)
        unique, back = np.unique(key, return_inverse=True)
        total = np.bincount(back, value, len(unique))
        rows = unique // num_words
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(counts)))])
        return cls(starts, unique % num_words, total, num_words, times)

    @classmethod
    def from_table(cls, counts: np.ndarray, times: np.ndarray | None = None) -> Documents:
        """From counts (D, V)."""
        d, v = np.nonzero(counts > 0)
        starts = np.concatenate([[0], np.cumsum(np.bincount(d, minlength=len(counts)))])
        return cls(starts, v, counts[d, v].astype(np.float64), counts.shape[1], times)

    @classmethod
    def of(cls, data: Any) -> Documents:
        """From `Documents`, a SciPy matrix, an object whose `counts` are one (a corpus), or a table (D, V)."""
        if isinstance(data, Documents):
            return data
        times = getattr(data, "times", None)
        counts = getattr(data, "counts", data)
        if hasattr(counts, "tocsr"):
            m = counts.tocsr()
            if is_mapped(m.data):
                return cls(m.indptr, m.indices, m.data, m.shape[1], times)
            return cls(m.indptr.astype(np.int64), m.indices.astype(np.int64), m.data.astype(float), m.shape[1], times)
        table = np.asarray(counts.detach().cpu() if isinstance(counts, Tensor) else counts)
        if table.ndim != 2 or table.dtype.kind not in "fiu":
            raise TypeError(
                f"documents must be a corpus, a sparse matrix or a table of counts (D, V), got {type(data)}"
            )
        return cls.from_table(table, times)

    def take(self, which: np.ndarray) -> Documents:
        """Some of the documents, in the order given."""
        still_there(self.starts, self.words, self.counts)
        if self.on_disk:
            check_starts(np.asarray(self.starts[which]), np.asarray(self.starts[which + 1]), len(self.words))
        spans = [np.arange(self.starts[d], self.starts[d + 1]) for d in which]
        index = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        starts = np.concatenate([[0], np.cumsum([len(s) for s in spans])]).astype(np.int64)
        times = None if self.times is None else self.times[which]
        words, counts = np.asarray(self.words[index], np.int64), np.asarray(self.counts[index], np.float64)
        if self.on_disk:
            check_entries(words, counts, self.num_words)
        return Documents(starts, words, counts, self.num_words, times)

    def tokens(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Word ids of each document in random order: the density of a document does not depend on it."""
        spans = (slice(a, b) for a, b in zip(self.starts, self.starts[1:]))
        return [rng.permutation(np.repeat(self.words[s], self.counts[s].astype(np.int64))) for s in spans]

    def halves(self, rng: np.random.Generator) -> tuple[Documents, Documents]:
        """Every document in two, its words dealt out at random."""
        parts: tuple[list, list] = ([], [])
        for ids in self.tokens(rng):
            for part, some in zip(parts, (ids[: len(ids) // 2], ids[len(ids) // 2 :])):
                part.append(np.unique(some, return_counts=True))
        made = []
        for part in parts:
            starts = np.concatenate([[0], np.cumsum([len(u) for u, _ in part])]).astype(np.int64)
            words, counts = (np.concatenate([p[i] for p in part]) for i in (0, 1))
            made.append(Documents(starts, words.astype(np.int64), counts.astype(float), self.num_words, self.times))
        return made[0], made[1]


@dataclass(frozen=True)
class Block:
    """Documents side by side: `rows` (B,) are their numbers, `words` and `counts` (B, L) are padded with count 0."""

    rows: Tensor
    words: Tensor
    counts: Tensor
    sums: cards.SortedSums | None = None

    @property
    def flat(self) -> Tensor:
        """Word of every place, (B L,)."""
        return self.words.reshape(-1)

    def add(self, table: Tensor, values: Tensor) -> None:
        """Add values of the places (B, L, K) to the rows of a table (V, K) that are their words'."""
        flat = values.reshape(-1, values.shape[-1])
        if self.sums is None:
            table.index_add_(0, self.flat, flat.to(table.dtype))
        else:
            self.sums.add(table, flat)

    def to(self, dtype: torch.dtype) -> Block:
        """The same with counts of another kind."""
        return replace(self, counts=self.counts.to(dtype))


def blocks(
    documents: Documents,
    dtype: torch.dtype = torch.float32,
    cells: int = CELLS,
    device: torch.device | str = "cpu",
) -> list[Block]:
    """Blocks of documents of similar width on a device, at most `cells` places each."""
    words = torch.from_numpy(np.require(documents.words, np.int64, ["C", "W"]))
    counts = torch.from_numpy(np.require(documents.counts, np.float64, ["C", "W"]))
    if cards.on_card(device):
        words = words.int()  # half the way there
    widths = np.diff(documents.starts)
    return side_by_side(widths, words.to(device), counts.to(dtype).to(device), documents.num_words, cells)


def side_by_side(widths: np.ndarray, words: Tensor, counts: Tensor, num_words: int, cells: int) -> list[Block]:
    """Blocks of documents with `widths` (D,) distinct words each, whose words and counts lie one after the other."""
    device, found = words.device, []
    begins = np.cumsum(widths) - widths
    for rows in plan(widths, cells, cards.on_card(device)):
        width, index = max(1, int(widths[rows[-1]])), torch.from_numpy(rows).to(device)
        first, many = (torch.from_numpy(v[rows]).to(device)[:, None] for v in (begins, widths))
        place = torch.arange(width, device=device)
        inside, at = place < many, (first + place).clamp_(max=max(0, len(words) - 1))
        if len(words):
            block = torch.where(inside, words[at], 0).long(), torch.where(inside, counts[at], 0)
        else:
            block = at, counts.new_zeros(at.shape)
        sums = cards.SortedSums(block[0].reshape(-1), num_words) if cards.on_card(device) else None
        found.append(Block(index, *block, sums))
    return found


def plan(widths: np.ndarray, cells: int, card: bool = False) -> Iterator[np.ndarray]:
    """Numbers of the documents of each block, short ones first; at most `cells` places, and on a card little padding."""
    order = np.argsort(widths, kind="stable")
    i, sorted_ = 0, np.asarray(widths)[order]

    def too_large(j: int) -> bool:
        """Whether documents i to j - 1 of the order are more than a block."""
        size, last = (j - i) * sorted_[j - 1], sorted_[j - 1]
        if not card:
            return bool(size > cells or j - i > MOST)
        padded = last > max(cards.SIMILAR * sorted_[i], sorted_[i] + cards.ALIKE)
        return bool(size > cells or (size > cards.LARGE * cells and padded))

    while i < len(order):
        j = i + max(1, bisect_left(range(i + 1, len(order) + 1), True, key=too_large))
        yield order[i:j]
        i = j


def in_parts(documents: Documents, size: int | None = None) -> Iterator[tuple[int, Documents]]:
    """Documents that lie on disk some at a time, others all at once, with the number of the first."""
    if not documents.on_disk:
        yield 0, documents
        return
    size = size or PART
    for a in range(0, len(documents), size):
        yield a, documents.cut(a, min(a + size, len(documents)))


def by_slice(documents: Documents, num_slices: int, dtype: torch.dtype) -> Iterator[tuple[int, list[Block]]]:
    """Slice of time and its blocks, slices without documents left out; `rows` are numbers among all documents."""
    assert documents.times is not None
    for t in range(num_slices):
        which = np.flatnonzero(documents.times == t)
        if len(which):
            whole = torch.from_numpy(which)
            part = blocks(documents.take(which), dtype)
            yield t, [Block(whole[b.rows], b.words, b.counts) for b in part]
