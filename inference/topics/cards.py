"""What topic models need to work on a card: sums in an order of their own, blocks that fill it, and what fits its memory.

`index_add_` on a card adds as its threads arrive, so that two runs differ in their last digits, and with them the topics in the
end.  Here entries are brought into the order of their words once, and added up in chunks of a fixed length, chunk by chunk in
single precision and from there on in double: the same card gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .. import streaming

if TYPE_CHECKING:
    from ..problem import Problem
    from .documents import Documents

T = TypeVar("T")

#: Places times topics of a block on a card: a table of so many floats takes 128 MB.
NUMBERS = 2**25
#: Entries that one thread adds up.
CHUNK = 64
#: A block of more than this share of the most that it may hold has documents of similar width, up to this factor and this many
#: words: where there is much work, padding costs more than another block.
LARGE, SIMILAR, ALIKE = 1 / 8, 4 / 3, 16
#: Bytes of a place in a block, with the order of its sums.
PLACE_BYTES = 24


def on_card(device: torch.device | str) -> bool:
    """Whether work on a device is a card's: few large steps, sums in a fixed order."""
    return torch.device(device).type != "cpu"


def processor_first(run: Callable[[Problem, Any], T]) -> Callable[[Problem, Any], T]:
    """Inside, tensors that name no device are made on the processor, not on the card as a story's: what lies there says so."""

    @wraps(run)
    def inside(problem: Problem, method: Any) -> T:
        with torch.device("cpu") if on_card(problem.device) else nullcontext():
            return run(problem, method)

    return inside


def cells_of(device: torch.device, topics: int, least: int) -> int:
    """Word places of a block: what the cache holds on a processor, what the memory allows on a card."""
    return max(1, NUMBERS // max(1, topics)) if on_card(device) else least


def sum_dtype(like: Tensor) -> torch.dtype:
    """Kind of number that sums over documents are kept in: double on a card."""
    return torch.float64 if on_card(like.device) else like.dtype


def keeps(documents: Documents, bytes_an_entry: float, device: torch.device) -> bool:
    """Whether so much for each entry takes no more than half of the device's free memory."""
    return len(documents.words) * bytes_an_entry <= streaming.SHARE * streaming.free_bytes(device)


def stay(documents: Documents, device: torch.device) -> bool:
    """Whether the counts of all documents stay on a card, in blocks and as they came."""
    return on_card(device) and keeps(documents, 8 + PLACE_BYTES * SIMILAR, device)


class SortedSums:
    """Sums of rows by key, always in the same order.

    Parameters
    ----------
    keys
        (P,), from 0 to size - 1.
    size
        Number of keys.
    """

    def __init__(self, keys: Tensor, size: int) -> None:
        ordered, self.order = torch.sort(keys, stable=True)
        edges = torch.searchsorted(ordered, torch.arange(size + 1, device=keys.device))
        lengths = edges.diff()
        self.levels: list[Tensor] = []
        while len(keys) and int(lengths.max()) > CHUNK:
            parts = (lengths + CHUNK - 1) // CHUNK
            owner = torch.repeat_interleave(torch.arange(len(parts), device=keys.device), parts)
            place = torch.arange(len(owner), device=keys.device) - (parts.cumsum(0) - parts)[owner]
            self.levels.append((lengths[owner] - CHUNK * place).clamp_max(CHUNK))
            lengths = parts
        self.levels.append(lengths)

    def add(self, table: Tensor, values: Tensor) -> None:
        """Add values (P, K) to the rows of a table (size, K) that are their keys'."""
        part = values.index_select(0, self.order)
        for lengths in self.levels:
            part = torch.segment_reduce(part, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0).double()
        table.add_(part)
