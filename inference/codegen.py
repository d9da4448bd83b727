"""A pure graph of tensor operations as one C program: loops of equal shape are merged, nothing is allocated while it runs.

Every operation becomes a *statement*. Views cost nothing: they are strides on the memory of something else. Element-wise
operations and reductions over the same loops share one loop nest (a *group*) where their order allows it, and pass values
on in registers; only what another group needs is written to memory. All memory lies in one arena whose layout is
decided here. `codegen_ops.py` says what each operation computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

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
#: Numbers that a vector register holds.
LANES = 8
#: Largest tensor that may be part of the program text.
BAKED = 4096


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


def touched(statement: Statement) -> set[Buffer]:
    """Every buffer that a statement reads or writes."""
    loads = {o.buffer for o in statement.operands if isinstance(o, Load)}
    return loads | set(statement.reads) | {statement.target, *statement.extra}


def in_register(operand: Load, writer: Statement, loops: tuple[int, ...]) -> bool:
    """Whether the element that a loop needs is the one that the same loop has just computed."""
    return (
        writer.emit is None
        and not writer.reduce
        and writer.loops == loops
        and operand.offset == 0
        and operand.strides == contiguous(loops)
    )


def address(buffer: Buffer, places: dict[Buffer, int]) -> str:
    """C expression of a buffer's start."""
    return buffer.source or f"({buffer.ctype} *)(arena + {places[buffer]})"


#: Start and step of reductions; {0} is what there is, {1} what comes.
REDUCTIONS = {
    "sum": ("0", "{0} + {1}"),
    "prod": ("1", "{0} * {1}"),
    "max": ("-INFINITY", "LARGER({1}, {0})"),
    "min": ("INFINITY", "SMALLER({1}, {0})"),
    "any": ("0", "{0} | ({1} != 0)"),
    "all": ("1", "{0} & ({1} != 0)"),
}


def nest(group: list[Statement]) -> str:
    """Loops around the statements of one group."""
    loops = group[0].loops
    order = loop_order(group)
    inner = order[-1] if order else 0
    lines: list[str] = []
    for s in group:
        if s.reduce:
            start = REDUCTIONS[s.reduce][0]
            lines.append(f"  for (long i = 0; i < {max(1, s.target.size)}; i++) {s.target.name}[i] = {start};")
    for d in order[:-1]:
        lines.append(f"  for (long i{d} = 0; i{d} < {loops[d]}; i{d}++) {{")
    local = [s for s in group if s.reduce and loops and s.kept[inner] == 0]
    lines += [f"  {s.target.ctype} a{s.target.number} = {REDUCTIONS[s.reduce][0]};" for s in local]
    if loops:
        sums = [f"a{s.target.number}" for s in local if s.reduce == "sum"]
        clause = f" reduction(+ : {', '.join(sums)})" if sums else ""
        if len(sums) == len(local):
            lines.append(f"#pragma omp simd{clause}")
        lines.append(f"  for (long i{inner} = 0; i{inner} < {loops[inner]}; i{inner}++) {{")
    lines += [line for s in group for line in element(s, s in local)]
    if loops:
        lines.append("  }")
    for s in local:
        place = f"{s.target.name}[{index(0, s.kept)}]"
        lines.append(f"  {place} = {REDUCTIONS[s.reduce][1].format(place, f'a{s.target.number}')};")
    return "\n".join(lines + ["  }"] * max(0, len(loops) - 1))


def loop_order(group: list[Statement]) -> list[int]:
    """Loops from the outside in; innermost goes the one that fills vector registers with the fewest jumps in memory."""
    loops = group[0].loops
    if len(loops) < 2:
        return list(range(len(loops)))
    strides = [o.strides for s in group for o in s.operands if isinstance(o, Load) and not _local(o, s)]
    strides += [s.kept for s in group if s.reduce]
    strides += [contiguous(loops) for s in group if s.target.stored and not s.reduce]

    def cost(d: int) -> tuple[float, int]:
        jumps = sum(1 for places in strides if places[d] > 1)
        return (1.0 + 0.5 * jumps) * LANES / min(LANES, loops[d]), -d

    inner = min(range(len(loops)), key=cost)
    return [d for d in range(len(loops)) if d != inner] + [inner]


def _local(operand: Load, s: Statement) -> bool:
    """Whether an operand is a register of the same group."""
    writer = operand.buffer.writer
    return writer is not None and writer.group == s.group


def element(s: Statement, local: bool) -> list[str]:
    """What a statement does inside the innermost loop."""
    texts = [o if isinstance(o, str) else fetched(o, s) for o in s.operands]
    text = s.text.format(*texts)
    if s.reduce:
        place = f"a{s.target.number}" if local else f"{s.target.name}[{index(0, s.kept)}]"
        return [f"    {place} = {REDUCTIONS[s.reduce][1].format(place, f'({text})')};"]
    lines = [f"    const {s.target.ctype} r{s.target.number} = ({s.target.ctype})({text});"]
    if s.target.stored:
        lines.append(f"    {s.target.name}[{index(0, contiguous(s.loops))}] = r{s.target.number};")
    return lines


def fetched(operand: Load, s: Statement) -> str:
    """A register of the same loop, or memory."""
    if _local(operand, s):
        return f"r{operand.buffer.number}"
    return f"{operand.buffer.name}[{index(operand.offset, operand.strides)}]"


def index(offset: int, strides: Sequence[int]) -> str:
    """C text of a place."""
    parts = [str(offset)] if offset else []
    parts += [f"i{d}" if stride == 1 else f"i{d} * {stride}" for d, stride in enumerate(strides) if stride]
    return " + ".join(parts) or "0"


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


def translate(graph: fx.GraphModule, example: tuple[Tensor, ...], name: str = "potential") -> tuple[str, int]:
    """C of a graph (position, *constants) -> (value, gradient), and the size of its arena in bytes.

    Parameters
    ----------
    graph
        Made of aten operations on tensors of fixed shapes.
    example
        Inputs, of which shape, type and strides matter; the first is the position.
    name
        Of the C function.

    Raises
    ------
    NotTranslated
        An operation has no translation.
    """
    from .codegen_ops import translate_node

    program = Program()
    facts: dict[fx.Node, Any] = {}
    Facts(graph, facts).run(*example)
    known: dict[fx.Node, Any] = {}
    inputs = iter(range(len(example)))
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            i = next(inputs)
            known[node] = entry(program, example[i], i)
        elif node.op == "get_attr":
            known[node] = baked(program, getattr(graph, node.target))
        elif node.op == "output":
            value, gradient = (solid(program, known[n]) for n in node.args[0])
            return program.source((value, gradient), name)
        else:
            args = map_arg(node.args, lambda n: known[n])
            kwargs = map_arg(node.kwargs, lambda n: known[n])
            program.inputs = [f for n in node.all_input_nodes if isinstance(f := facts[n], Tensor)]
            known[node] = translate_node(program, node.target, args, kwargs, facts[node])
    raise AssertionError("a graph has an output")


class Facts(fx.Interpreter):
    """Runs a graph once and notes shape, type and layout of everything."""

    def __init__(self, graph: fx.GraphModule, facts: dict[fx.Node, Any]) -> None:
        super().__init__(graph)
        self._facts = facts

    def run_node(self, node: fx.Node) -> Any:
        """As the interpreter does, with a note."""
        with torch.no_grad():
            out = super().run_node(node)
        self._facts[node] = torch.utils._pytree.tree_map_only(Tensor, layout_of, out)
        return out


def layout_of(tensor: Tensor) -> Tensor:
    """The same tensor without its numbers."""
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def entry(program: Program, tensor: Tensor, number: int) -> Value:
    """An input: the position is float64 for the caller whatever the story's precision, others are as they are."""
    if number == 0:
        q = Value(program.buffer(torch.float64, tensor.numel(), "q"), layout_of(tensor.double()))
        if tensor.dtype == torch.float64:
            return q
        out = program.pointwise("{0}", [q], tensor.shape, tensor.dtype)
        assert isinstance(out, Value)
        return out
    source = f"(const {TYPES.get(tensor.dtype, 'void')} *)inputs[{number - 1}]"
    return Value(program.buffer(tensor.dtype, tensor.numel(), source), layout_of(tensor))


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
