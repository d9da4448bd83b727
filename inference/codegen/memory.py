"""What generated programs are made of: memory, tensors on it, and statements that fill it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: C types by torch's.
TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
}
#: Bytes that every piece of memory is aligned to.
ALIGNMENT = 64


class NotTranslated(RuntimeError):
    """The graph has an operation for which there is no C; the text names it."""


@dataclass(eq=False)
class Buffer:
    """Memory: an input (`source` is its C expression) or what a statement writes, row after row."""

    number: int
    dtype: torch.dtype
    size: int
    source: str = ""
    writer: Statement | None = None
    stored: bool = False

    @property
    def name(self) -> str:
        return f"b{self.number}"

    @property
    def ctype(self) -> str:
        return TYPES[self.dtype]


@dataclass
class Value:
    """A tensor: `meta`, which has no memory, says with shape, strides and offset where in `buffer` its numbers are."""

    buffer: Buffer
    meta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype


@dataclass
class Splat:
    """A tensor of one and the same number, as C text."""

    text: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class Load:
    """An operand inside a loop nest: strides belong to the loops."""

    buffer: Buffer
    offset: int
    strides: tuple[int, ...]
    ctype: str


#: What an operand may be: memory, or C text.
Operand = Load | str


@dataclass(eq=False)
class Statement:
    """One operation: `text` of its C expression (with {0}, {1}, ... for operands), or `emit` for a whole block.

    Attributes
    ----------
    loops
        Sizes of the loops around it, without those of size 1.
    target
        What it writes.
    operands
        What it reads; everything in `reads` is read from memory at places of its own choice.
    reduce
        Kind of reduction ("sum", "max", ...), with `kept` strides of the target by loop (0 where the loop is summed over).
    """

    loops: tuple[int, ...]
    target: Buffer
    operands: list[Operand] = field(default_factory=list)
    text: str = ""
    reads: list[Buffer] = field(default_factory=list)
    reduce: str = ""
    kept: tuple[int, ...] = ()
    emit: Callable[[], str] | None = None
    extra: list[Buffer] = field(default_factory=list)  # further targets of a block
    indexed: bool = False  # the text names loop variables
    group: int = -1


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its ones."""
    return tuple(s for s in shape if s != 1)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of numbers that lie row after row."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def literal(value: float | int | bool) -> str:
    """A number as C text, exactly."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, int):
        return f"{value}LL" if abs(value) > 2**31 - 1 else (f"({value})" if value < 0 else str(value))
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"({value.hex()})" if value < 0 else value.hex()
