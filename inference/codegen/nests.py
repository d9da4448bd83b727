"""Loop nests as C text."""

from __future__ import annotations

from collections.abc import Sequence

from .memory import Buffer, Load, Statement, contiguous

#: Numbers that a vector register holds.
LANES = 8
#: Start and step of reductions; {0} is what there is, {1} what comes.
REDUCTIONS = {
    "sum": ("0", "{0} + {1}"),
    "prod": ("1", "{0} * {1}"),
    "max": ("-INFINITY", "LARGER({1}, {0})"),
    "min": ("INFINITY", "SMALLER({1}, {0})"),
    "any": ("0", "{0} | ({1} != 0)"),
    "all": ("1", "{0} & ({1} != 0)"),
}


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
