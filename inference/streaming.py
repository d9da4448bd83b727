"""Data that do not stay on the device: the next rows are read, and copied there, while the present ones are worked on.

On the processor a thread reads ahead from the memory map.  For a card the same thread copies what it has read into one of two
page-locked buffers, and from there to the card on a stream of its own; the stream of the work waits for that copy only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

K = TypeVar("K")
Pieces = tuple[Tensor, ...]

#: Share of a card's free memory that data may take to stay there.
SHARE = 0.5
#: Page-locked buffers of one stream.
BUFFERS = 2


class Lane(Protocol):
    """The way from the processor's memory to a device."""

    def copy(self, pieces: Pieces) -> tuple[Pieces, Any]:
        """Start the copy, on the thread that reads; returns what will be there, and a token to wait for."""
        ...

    def arrive(self, pieces: Pieces, token: Any) -> None:
        """On the thread that works: nothing enqueued from now on runs before the copy is complete."""
        ...


class Here:
    """To the processor: nothing is to be done."""

    def copy(self, pieces: Pieces) -> tuple[Pieces, Any]:
        """The pieces themselves."""
        return pieces, None

    def arrive(self, pieces: Pieces, token: Any) -> None:
        """They are there already."""


class ToCard:
    """To a card, by way of page-locked buffers and a stream beside that of the work.

    Parameters
    ----------
    device
        The card.
    cuda
        `torch.cuda`, or what stands for it in a test.
    pinned
        Makes a page-locked buffer of so many bytes.
    """

    def __init__(self, device: torch.device, cuda: Any = None, pinned: Callable[[int], Tensor] | None = None) -> None:
        self.device, self.cuda = device, torch.cuda if cuda is None else cuda
        self._pinned = pinned or (lambda n: torch.empty(n, dtype=torch.uint8, pin_memory=True, device="cpu"))
        self._side = self.cuda.Stream(device)
        self._buffers: list[Tensor | None] = [None] * BUFFERS
        self._events: list[Any] = [None] * BUFFERS
        self._next = 0

    def copy(self, pieces: Pieces) -> tuple[Pieces, Any]:
        """By the buffer that was used longest ago, once what it held has left."""
        at, self._next = self._next, (self._next + 1) % BUFFERS
        if self._events[at] is not None:
            self._events[at].synchronize()
        sizes = [-(-p.numel() * p.element_size() // 64) * 64 for p in pieces]  # aligned for any kind of number
        buffer = self._buffers[at]
        if buffer is None or len(buffer) < sum(sizes):
            buffer = self._buffers[at] = self._pinned(sum(sizes))
        found, start = [], 0
        with self.cuda.device(self.device), self.cuda.stream(self._side):
            for piece, size in zip(pieces, sizes, strict=True):
                used = piece.numel() * piece.element_size()
                room = buffer[start : start + used].view(piece.dtype).view(piece.shape)
                room.copy_(piece)
                found.append(room.to(self.device, non_blocking=True))
                start += size
            event = self.cuda.Event()
            event.record(self._side)
        self._events[at] = event
        return tuple(found), event

    def arrive(self, pieces: Pieces, token: Any) -> None:
        """The work's stream waits; its allocator is told that the memory is in use there."""
        stream = self.cuda.current_stream(self.device)
        stream.wait_event(token)
        for piece in pieces:
            piece.record_stream(stream)


class Stream:
    """Pieces by key, of which the next may be asked for ahead.

    Every piece is read by a thread of its own that ends with it, so that there is nothing to shut down; an error in reading is
    raised where the piece is taken.

    Parameters
    ----------
    read
        Makes the pieces of a key, in the processor's memory.
    device
        Where they are wanted.
    lane
        The way there; None goes by the device.
    """

    def __init__(
        self, read: Callable[[Any], Pieces], device: torch.device | str = "cpu", lane: Lane | None = None
    ) -> None:
        device = torch.device(device)
        self._read = read
        self._lane: Lane = lane or (Here() if device.type == "cpu" else ToCard(device))
        self._pending: Pending | None = None

    def expect(self, key: Any) -> None:
        """Begin to read the pieces of a key, unless others are under way."""
        if self._pending is None:
            self._pending = Pending(key, self._make)

    def take(self, key: Any) -> Pieces:
        """The pieces of a key: those that were expected, or read now.

        Raises
        ------
        Exception
            What `read` raised.
        """
        pending, self._pending = self._pending, None
        ready = pending.result(key) if pending is not None else None
        pieces, token = self._make(key) if ready is None else ready
        self._lane.arrive(pieces, token)
        return pieces

    def each(self, keys: Iterable[K]) -> Iterator[tuple[K, Pieces]]:
        """Keys and their pieces in order, each next one read while the present one is used."""
        ahead = iter(keys)
        key = next(ahead, None)
        try:
            while key is not None:
                pieces = self.take(key)
                following = next(ahead, None)
                if following is not None:
                    self.expect(following)
                yield key, pieces
                key = following
        finally:
            self.close()

    def close(self) -> None:
        """Wait for what is under way, and forget it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def _make(self, key: Any) -> tuple[Pieces, Any]:
        return self._lane.copy(self._read(key))


class Pending:
    """Pieces that a thread is making."""

    def __init__(self, key: Any, make: Callable[[Any], tuple[Pieces, Any]]) -> None:
        self.key, self._make = key, make
        self._found: tuple[Pieces, Any] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="reads ahead", daemon=True)
        self._thread.start()
        UNDER_WAY.add(self)

    def _run(self) -> None:
        try:
            self._found = self._make(self.key)
        except BaseException as error:  # handed to the thread that wants the pieces
            self._error = error

    def wait(self) -> None:
        """Until the thread has ended."""
        self._thread.join()

    def result(self, key: Any) -> tuple[Pieces, Any] | None:
        """What it has made, or None where that is of another key."""
        self.wait()
        if not same_key(key, self.key):
            return None
        if self._error is not None:
            raise self._error
        return self._found


#: What threads are making now, or have made for somebody who has not taken it yet.
UNDER_WAY: weakref.WeakSet[Pending] = weakref.WeakSet()


def finish_reading() -> None:
    """Wait for threads that read ahead: what they hold on a card is let go with the work that it was read for."""
    for pending in list(UNDER_WAY):
        pending.wait()


def same_key(a: Any, b: Any) -> bool:
    """Whether two keys (slices, numbers, arrays or tensors of numbers) are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor | np.ndarray) and a == b


def free_bytes(device: torch.device) -> float:
    """Memory that a device has left, with what PyTorch holds there and does not use; of the processor, as much as you like."""
    if device.type != "cuda":
        return float("inf")
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of fits before: it will be used again
    return torch.cuda.mem_get_info(device)[0] + held


def stays(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Whether data may lie on the device beside the work: they take no more than half of its free memory."""
    need = sum(t.numel() * t.element_size() for t in tensors if t.device != device)
    return need <= SHARE * free_bytes(device)
