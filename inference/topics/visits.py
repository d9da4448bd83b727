"""Documents brought to where they are worked on, run after run, in blocks.

In the processor's memory a run of neighbours is cut out, worked on and let go, the next one read meanwhile.  On a card the
counts stay where they take no more than half of what is free, laid out once for passes over all; otherwise runs are read and
copied while the present one is worked on, larger ones for passes over all, as a card needs more to be busy with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..distributed import Ranks
from ..mapped_files import still_there
from ..sparse_rows import check_entries, check_starts
from ..streaming import Stream
from . import cards
from .documents import CELLS, Block, Documents, blocks, side_by_side

#: Documents of a run at least and at most, and entries at most; a pass has a hundred runs where it can.
FEWEST, READ, ENTRIES, RUNS = 64, 4096, 1_000_000, 100
#: Documents and entries, at most, of a run on a card in a pass over all.
WIDE, WIDE_ENTRIES = 65_536, 8_000_000

Run = tuple[int, int]
#: Some documents: as they are on a processor, in blocks on a card.
Piece = Documents | list[Block]


def runs_of(documents: Documents, read: int = READ, entries: int = ENTRIES, runs: int = RUNS) -> list[Run]:
    """First and last (excluded) document of every run."""
    size = min(read, max(FEWEST, -(-len(documents) // runs)))
    found, a, n = [], 0, len(documents)
    while a < n:
        b = min(a + size, n)
        starts = np.asarray(documents.starts[a : b + 1])
        b = a + max(1, int(np.searchsorted(starts, starts[0] + entries, side="right")) - 1) if b > a + 1 else b
        found.append((a, min(b, n)))
        a = found[-1][1]
    return found


def pieces(documents: Documents, order: list[Run]) -> Iterator[tuple[Run, Documents]]:
    """Runs of documents in the order given, in memory, the next one read meanwhile."""

    def read(run: Run) -> tuple[Tensor, ...]:
        part = documents.cut(*run)
        kinds = ((part.starts, np.int64), (part.words, np.int64), (part.counts, np.float64))
        return tuple(torch.from_numpy(np.array(v, dtype=k)) for v, k in kinds)

    for run, (starts, words, counts) in Stream(read).each(order):
        yield run, Documents(starts.numpy(), words.numpy(), counts.numpy(), documents.num_words)


class Visits:
    """The documents of a corpus in blocks on a device.

    Parameters
    ----------
    documents
        Counts of words, perhaps on disk.
    topics
        K, by which the size of blocks on a card is chosen.
    device
        Where the work is done.

    Attributes
    ----------
    stays
        Whether the counts lie on the card.
    aside
        Sorted numbers of documents that are left out.
    """

    def __init__(self, documents: Documents, topics: int, device: torch.device) -> None:
        self.documents, self.device = documents, device
        self.card = cards.on_card(device)
        self.runs = runs_of(documents)
        self.cells = cards.cells_of(device, topics, CELLS)
        self.stays = cards.stay(documents, device)
        self.aside = np.zeros(0, np.int64)
        self._held: tuple[Tensor, Tensor] | None = None
        self._laid: list[Block] = []

    def all(self) -> Iterator[Piece]:
        """All documents once."""
        if self.stays:
            if not self._laid:
                widths = np.diff(np.asarray(self.documents.starts))
                self._laid = side_by_side(widths, *self.held(), self.documents.num_words, self.cells)
            yield self.counted(self._laid, 0)
            return
        runs = self.runs if not self.card else runs_of(self.documents, WIDE, WIDE_ENTRIES, 1)
        for found, _ in self.each(runs):
            yield found

    def shuffled(self, random: torch.Generator, ranks: Ranks) -> Iterator[tuple[Piece, float]]:
        """Runs in random order, each with its number of words; where other ranks have more runs, none at the end."""
        order = [self.runs[i] for i in torch.randperm(len(self.runs), generator=random).tolist()]
        most = max(ranks.gather(len(self.runs)))
        yield from self.each(order)
        for _ in range(most - len(self.runs)):
            yield [], 0.0

    def each(self, order: list[Run]) -> Iterator[tuple[Piece, float]]:
        """Runs in the order given, each with its number of words."""
        if not self.card:
            for (a, b), part in pieces(self.documents, order):
                out = self.aside[np.searchsorted(self.aside, a) : np.searchsorted(self.aside, b)] - a
                part = part.take(np.delete(np.arange(len(part)), out)) if len(out) else part
                yield part, part.num_tokens
            return
        for (a, b), (words, counts) in self.arriving(order):
            widths = np.diff(np.asarray(self.documents.starts[a : b + 1], dtype=np.int64))
            found = side_by_side(widths, words, counts.float(), self.documents.num_words, self.cells)
            found = self.counted(found, a)
            yield found, float(torch.stack([block.counts.sum(dtype=torch.float64) for block in found]).sum())

    def counted(self, found: list[Block], first: int) -> list[Block]:
        """Blocks in which documents that are left out count nothing; `first` is the number of the first document."""
        if not len(self.aside):
            return found
        aside = torch.from_numpy(self.aside - first).to(self.device)
        kept = [~torch.isin(block.rows, aside)[:, None] for block in found]
        return [replace(b, counts=b.counts * k) for b, k in zip(found, kept, strict=True)]

    def blocks(self, piece: Piece, dtype: torch.dtype) -> list[Block]:
        """Some documents in blocks, with counts of this kind."""
        return blocks(piece, dtype) if isinstance(piece, Documents) else [block.to(dtype) for block in piece]

    def arriving(self, order: list[Run]) -> Iterator[tuple[Run, tuple[Tensor, Tensor]]]:
        """Words and counts of runs on the card."""
        if self.stays:
            words, counts = self.held()
            for a, b in order:
                part = slice(int(self.documents.starts[a]), int(self.documents.starts[b]))
                yield (a, b), (words[part], counts[part])
            return
        for run, (words, counts) in Stream(self.compact, self.device).each(order):
            yield run, (words, counts)

    def held(self) -> tuple[Tensor, Tensor]:
        """Words and counts of all documents on the card, copied there once."""
        if self._held is None:
            words, counts = self.compact((0, len(self.documents)))
            self._held = words.to(self.device, torch.int32), counts.to(self.device).float()
        return self._held

    def compact(self, run: Run) -> tuple[Tensor, Tensor]:
        """Words and counts of a run in four bytes each, as they travel to a card."""
        words, counts = self.narrow
        part = slice(int(self.documents.starts[run[0]]), int(self.documents.starts[run[1]]))
        if self.documents.on_disk:
            still_there(self.documents.starts, words, counts)
            starts = np.asarray(self.documents.starts[run[0] : run[1] + 1], dtype=np.int64)
            check_starts(starts[:-1], starts[1:], len(words))
            words, counts = (
                np.array(words[part]),
                np.array(counts[part]),
            )  # copies: what is mapped may not be written to
            check_entries(words, counts, self.documents.num_words)
            return torch.from_numpy(words), torch.from_numpy(counts)
        return torch.from_numpy(words[part]), torch.from_numpy(counts[part])

    @cached_property
    def narrow(self) -> tuple[np.ndarray, np.ndarray]:
        """Words and counts of all documents, in memory narrowed once: otherwise every pass would do so again."""
        words, counts = self.documents.words, self.documents.counts
        if self.documents.on_disk:
            return words, counts
        return np.require(words, np.int32, ["C", "W"]), np.require(counts, np.float32, ["C", "W"])
