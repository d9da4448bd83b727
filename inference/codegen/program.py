"""Statements in groups that share their loops, and the memory that they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import (
    ALIGNMENT,
    TYPES,
    Buffer,
    Load,
    NotTranslated,
    Operand,
    Splat,
    Statement,
    Value,
    contiguous,
    literal,
    squeezed,
)
from .nests import address, in_register, nest, touched

#: Largest tensor that may be part of the program text.
BAKED = 4096


class Program:
    """Statements of one graph, in groups that run one after the other."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.groups: list[list[Statement]] = []
        self.baked: list[str] = []
        self.inputs: list[Tensor] = []  # shapes and layouts of the operands of the node at hand

    # -- building ----------------------------------------------------------------------------------------------------

    def buffer(self, dtype: torch.dtype, size: int, source: str = "") -> Buffer:
        """New memory for `size` numbers."""
        if dtype not in TYPES:
            raise NotTranslated(f"numbers of type {dtype}")
        self.buffers.append(Buffer(len(self.buffers), dtype, size, source))
        return self.buffers[-1]

    def fresh(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """A new tensor, row after row."""
        return Value(self.buffer(dtype, math.prod(shape)), torch.empty(tuple(shape), dtype=dtype, device="meta"))

    def operand(self, value: Value | Splat | float | int | bool, shape: Sequence[int]) -> Operand:
        """A value broadcast to the loops of `shape`."""
        if isinstance(value, Splat):
            return value.text
        if not isinstance(value, Value):
            return literal(value)
        meta = value.meta.expand(tuple(shape))
        strides = tuple(s for s, n in zip(meta.stride(), shape, strict=True) if n != 1)
        return Load(value.buffer, int(meta.storage_offset()), strides, TYPES[value.dtype])

    def pointwise(
        self,
        text: str,
        values: Sequence[Any],
        shape: Sequence[int],
        dtype: torch.dtype,
        indexed: bool = False,
        reads: Sequence[Buffer] = (),
    ) -> Value | Splat:
        """`text` for every element of `shape`."""
        operands = [self.operand(v, shape) for v in values]
        if all(isinstance(o, str) for o in operands) and not indexed and not reads:
            return Splat(f"(({TYPES[dtype]})({text.format(*operands)}))", dtype, tuple(shape))
        out = self.fresh(shape, dtype)
        self.place(Statement(squeezed(shape), out.buffer, operands, text, reads=list(reads), indexed=indexed))
        return out

    def reduction(
        self, kind: str, value: Value | Splat, dims: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> Value:
        """Combine the elements along `dims`; `shape` is that of the result."""
        full = tuple(value.shape)
        out = self.fresh(shape, dtype)
        places = iter(contiguous([n for d, n in enumerate(full) if d not in dims and n != 1]))
        kept = tuple(0 if d in dims else next(places) for d, n in enumerate(full) if n != 1)
        statement = Statement(squeezed(full), out.buffer, [self.operand(value, full)], "{0}", reduce=kind, kept=kept)
        self.place(statement)
        return out

    def block(
        self, emit: Callable[[], str], reads: Sequence[Value | Splat], target: Value, extra: Sequence[Value] = ()
    ) -> None:
        """A block of C of its own."""
        buffers = [v.buffer for v in reads if isinstance(v, Value)]
        statement = Statement((), target.buffer, reads=buffers, emit=emit, extra=[v.buffer for v in extra])
        for buffer in (target.buffer, *statement.extra):
            buffer.writer, buffer.stored = statement, True
        for read in buffers:
            read.stored = True
        statement.group = len(self.groups)
        self.groups.append([statement])

    def place(self, statement: Statement) -> None:
        """Put a statement into the first group of its loops that comes after everything it needs."""
        least, loops = 0, statement.loops
        for operand in statement.operands:
            if isinstance(operand, Load) and operand.buffer.writer is not None:
                writer = operand.buffer.writer
                least = max(least, writer.group + (0 if in_register(operand, writer, loops) else 1))
        for read in statement.reads:
            read.stored = True
            least = max(least, read.writer.group + 1 if read.writer is not None else 0)
        for number in range(least, len(self.groups)):
            first = self.groups[number][0]
            if first.emit is None and first.loops == loops and self._compatible(number, statement):
                break
        else:
            number = len(self.groups)
            self.groups.append([])
        statement.group = number
        self.groups[number].append(statement)
        statement.target.writer = statement
        statement.target.stored |= bool(statement.reduce)
        for operand in statement.operands:
            if isinstance(operand, Load) and (w := operand.buffer.writer) is not None and w.group != number:
                operand.buffer.stored = True

    def _compatible(self, number: int, statement: Statement) -> bool:
        """Sums along the innermost loop are vectorised; no other reduction along it may share their loop."""
        kinds = {s.reduce for s in (*self.groups[number], statement) if s.reduce and s.loops and s.kept[-1] == 0}
        return len(kinds) <= 1

    # -- writing -----------------------------------------------------------------------------------------------------

    def layout(self, outputs: Sequence[Value]) -> tuple[dict[Buffer, int], int]:
        """Place of every stored buffer in the arena, and the arena's size; memory is used again when it is done with."""
        for value in outputs:
            value.buffer.stored = True
        last: dict[Buffer, int] = {}
        for number, group in enumerate(self.groups):
            for statement in group:
                for buffer in touched(statement):
                    last[buffer] = number
        for value in outputs:
            last[value.buffer] = len(self.groups)
        places: dict[Buffer, int] = {}
        free: dict[int, list[int]] = {}
        end = 0
        for number, group in enumerate(self.groups):
            born = {b for s in group for b in (s.target, *s.extra) if b.stored}
            for buffer in sorted(born, key=lambda b: b.number):
                size = -(-buffer.size * buffer.dtype.itemsize // ALIGNMENT) * ALIGNMENT or ALIGNMENT
                if free.get(size):
                    places[buffer] = free[size].pop()
                else:
                    places[buffer], end = end, end + size
            for buffer in [b for b, n in last.items() if n == number and b in places]:
                size = -(-buffer.size * buffer.dtype.itemsize // ALIGNMENT) * ALIGNMENT or ALIGNMENT
                free.setdefault(size, []).append(places[buffer])
        return places, end

    def source(self, outputs: Sequence[Value], name: str) -> tuple[str, int]:
        """The program text and the bytes of its arena.

        The function takes a position, the inputs' addresses and an arena, and writes value and gradient.
        """
        places, arena = self.layout(outputs)
        functions, calls = [], []
        for number, group in enumerate(self.groups):
            written = {b for s in group for b in (s.target, *s.extra) if b.stored}
            read = {b for s in group for b in touched(s)} - written
            read = {b for b in read if b.source or b in places}
            order = sorted(written | read, key=lambda b: b.number)
            parameters = ", ".join(f"{'' if b in written else 'const '}{b.ctype} *restrict {b.name}" for b in order)
            body = group[0].emit() if group[0].emit is not None else nest(group)
            functions.append(f"static void g{number}({parameters}) {{\n{body}\n}}")
            calls.append(f"  g{number}({', '.join(address(b, places) for b in order)});")
        value, gradient = outputs
        first, slopes = (f"((const {v.buffer.ctype} *){address(v.buffer, places)})" for v in outputs)
        place = f"{int(gradient.meta.storage_offset())} + i * {gradient.meta.stride(0)}"
        text = "\n".join(
            [
                '#include "support.h"',
                *self.baked,
                *functions,
                f"void {name}(const double *restrict q, void *const *restrict inputs, char *restrict arena,",
                "    double *restrict value, double *restrict gradient) {",
                *calls,
                f"  *value = (double){first}[{int(value.meta.storage_offset())}];",
                f"  for (long i = 0; i < {gradient.meta.numel()}; i++) gradient[i] = (double){slopes}[{place}];",
                "}",
                "",
            ]
        )
        return text, arena


def baked(program: Program, tensor: Tensor) -> Value | Splat:
    """A tensor that the tracer made itself, as text."""
    if tensor.numel() == 1:
        return Splat(literal(tensor.item()), tensor.dtype, tuple(tensor.shape))
    if tensor.numel() > BAKED or tensor.dtype not in TYPES:
        raise NotTranslated(f"a constant of {tensor.numel()} numbers of type {tensor.dtype}")
    name = f"baked{len(program.baked)}"
    numbers = ", ".join(literal(v) for v in tensor.flatten().tolist())
    program.baked.append(f"static const {TYPES[tensor.dtype]} {name}[] = {{{numbers}}};")
    meta = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    return Value(program.buffer(tensor.dtype, tensor.numel(), name), meta)


def solid(program: Program, value: Value | Splat) -> Value:
    """A value with memory of its own."""
    if isinstance(value, Value) and (value.buffer.writer is not None):
        return value
    out = program.fresh(value.shape, value.dtype)
    operand = program.operand(value, value.shape)
    program.place(Statement(squeezed(value.shape), out.buffer, [operand], "{0}"))
    return out
