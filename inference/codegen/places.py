"""Operations that move elements: triangles, joins, indices, scatters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .elementwise import masked
from .memory import NotTranslated, Splat, Value, literal
from .pieces import at, copy_loop, loops, squeezed_name
from .program import Program

aten = torch.ops.aten


def triangle(sign: str) -> Callable[..., Any]:
    """Lower or upper triangle, zero elsewhere."""

    def run(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
        diagonal = args[1] if len(args) > 1 else kwargs.get("diagonal", 0)
        row, column = (squeezed_name(fact.shape, d) for d in (-2, -1))
        text = f"({column} - {row} {sign} {diagonal} ? ({{0}}) : 0)"
        return program.pointwise(text, args[:1], fact.shape, fact.dtype, indexed=True)

    return run


def arange(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """Numbers in even steps."""
    start, step = (0, 1) if len(args) < 2 else (args[0], args[2] if len(args) > 2 else 1)
    text = f"{literal(start)} + {squeezed_name(fact.shape, 0)} * {literal(step)}"
    return program.pointwise(text, [], fact.shape, fact.dtype, indexed=True)


def flip(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """Backwards along some dimensions."""
    value, dims = args[0], {d % len(fact.shape) for d in args[1]}
    if isinstance(value, Splat):
        return value
    names = [squeezed_name(fact.shape, d) for d in range(len(fact.shape))]
    names = [f"{n - 1} - {names[d]}" if d in dims and n != 1 else names[d] for d, n in enumerate(fact.shape)]
    return program.pointwise(at(value, names), [], fact.shape, fact.dtype, indexed=True, reads=[value.buffer])


def concatenate(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """Tensors one after the other along a dimension."""
    parts, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    parts = [p for p in parts if math.prod(p.shape)] or parts
    out, blocks, start = program.fresh(fact.shape, fact.dtype), [], 0
    for part in parts:
        length = part.shape[dim]
        blocks.append((Value(out.buffer, out.meta.narrow(dim, start, length)), part))
        start += length
    program.block(lambda: "\n".join(copy_loop(program, place, part) for place, part in blocks), parts, out)
    return out


def padded(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """A tensor inside a larger one of equal numbers; negative widths cut."""
    value, widths = args[0], args[1]
    number = args[2] if len(args) > 2 else kwargs.get("value", 0)
    base = Splat(literal(number or 0), fact.dtype, tuple(fact.shape))
    out = program.fresh(fact.shape, fact.dtype)
    place = out.meta
    for i in range(0, len(widths), 2):
        dim, before, after = -1 - i // 2, widths[i], widths[i + 1]
        if isinstance(value, Value):
            inner = value.meta.narrow(dim, max(0, -before), value.shape[dim] - max(0, -before) - max(0, -after))
            value = Value(value.buffer, inner)
        place = place.narrow(dim, max(0, before), place.shape[dim] - max(0, before) - max(0, after))
    target = Value(out.buffer, place)
    program.block(lambda: copy_loop(program, out, base) + "\n" + copy_loop(program, target, value), [value], out)
    return out


def places_of(shape: Sequence[int], indices: Sequence[Any]) -> tuple[list[int], list[int], int]:
    """Indexed dimensions, shape of the indices together, and where their dimensions stand in the result."""
    used = [d for d, i in enumerate(indices) if i is not None]
    together = list(torch.broadcast_shapes(*(indices[d].shape for d in used)))
    adjacent = used == list(range(used[0], used[-1] + 1))
    return used, together, used[0] if adjacent else 0


def indexed_text(value: Value | Splat, indices: Sequence[Any], names: Sequence[str]) -> str:
    """C text of x[indices] at the place `names` of the result."""
    used, together, first = places_of(value.shape, indices)
    own = names[first : first + len(together)]
    rest = iter([*names[:first], *names[first + len(together) :]])
    spots = []
    for d, size in enumerate(value.shape):
        if d in used:
            index = indices[d]
            spot = at(Value(index.buffer, index.meta.expand(together)), own) if isinstance(index, Value) else index.text
            spots.append(f"WRAP({spot}, {size})")
        else:
            spots.append(next(rest))
    return at(value, spots)


def truth_masks(indices: Sequence[Any]) -> None:
    """Masks select as many elements as they are true: that is no fixed shape."""
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        raise NotTranslated("a boolean mask as an index")


def gathered(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """x[i, j]."""
    value, indices = args[0], args[1]
    truth_masks(indices)
    if isinstance(value, Splat):
        return Splat(value.text, value.dtype, tuple(fact.shape))
    names = [squeezed_name(fact.shape, d) for d in range(len(fact.shape))]
    reads = [value.buffer, *(i.buffer for i in indices if isinstance(i, Value))]
    text = indexed_text(value, indices, names).replace("{", "{{").replace("}", "}}")
    return program.pointwise(text, [], fact.shape, fact.dtype, indexed=True, reads=reads)


def put(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """A copy of x in which x[i, j] = v, or += v."""
    base, indices, values = args[:3]
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    if len(indices) == 1 and indices[0].dtype == torch.bool and math.prod(values.shape) == 1 and not accumulate:
        return masked(program, base, indices[0], values, fact)
    truth_masks(indices)
    out = program.fresh(fact.shape, fact.dtype)
    padded_indices = [*indices, *[None] * (len(fact.shape) - len(indices))]
    used, together, first = places_of(fact.shape, padded_indices)
    rest = [n for d, n in enumerate(fact.shape) if d not in used]
    shape = [*rest[:first], *together, *rest[first:]]
    if isinstance(values, Value):
        values = Value(values.buffer, values.meta.expand(shape))
    sign = "+=" if accumulate else "="

    def emit() -> str:
        body = loops(shape, lambda names: f"{indexed_text(out, padded_indices, names)} {sign} {at(values, names)};")
        return copy_loop(program, out, base) + "\n" + body

    program.block(emit, [base, values, *(i for i in indices if i is not None)], out)
    return out


def gather(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """Elements along one dimension, chosen by a tensor of the result's shape."""
    value, dim, index = args[0], args[1], args[2]
    if isinstance(value, Splat) or isinstance(index, Splat):
        raise NotTranslated("gather of equal numbers")
    dim %= max(1, len(fact.shape))
    names = [squeezed_name(fact.shape, d) for d in range(len(fact.shape))]
    spots = [f"WRAP({at(index, names)}, {value.shape[d]})" if d == dim else n for d, n in enumerate(names)]
    return program.pointwise(
        at(value, spots), [], fact.shape, fact.dtype, indexed=True, reads=[value.buffer, index.buffer]
    )


def scatter(sign: str) -> Callable[..., Any]:
    """Elements along one dimension, set or added to."""

    def run(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
        base, dim, index, source = args[:4]
        out = program.fresh(fact.shape, fact.dtype)
        dim %= max(1, len(fact.shape))
        if not isinstance(source, (Value, Splat)):
            source = Splat(literal(source), fact.dtype, tuple(index.shape))

        def line(names: list[str]) -> str:
            spots = [f"WRAP({at(index, names)}, {fact.shape[d]})" if d == dim else n for d, n in enumerate(names)]
            return f"{at(out, spots)} {sign} {at(source, names)};"

        program.block(
            lambda: copy_loop(program, out, base) + "\n" + loops(index.shape, line), [base, index, source], out
        )
        return out

    return run


def scattered(program: Program, part: Any, base: Any, source: Any, args: Sequence[Any], kwargs: Any) -> Value:
    """`base` with `source` in the part that the view `part` shows."""
    if part is aten.as_strided.default and isinstance(base, Value) and not base.meta.is_contiguous():
        raise NotTranslated("as_strided_scatter: its meaning depends on the layout of memory")
    out = program.fresh(base.shape, base.dtype)
    place = Value(out.buffer, part(out.meta, *args, **kwargs))

    def emit() -> str:
        return copy_loop(program, out, base) + "\n" + copy_loop(program, place, source)

    program.block(emit, [base, source], out)
    return out


def index_select(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """x[..., i, ...]."""
    value, dim, index = args
    return gathered(program, (value, [None] * (dim % len(fact.shape)) + [index]), {}, fact)


def index_add(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """x[..., i, ...] += v."""
    base, dim, index, values = args[:4]
    if kwargs.get("alpha", 1) != 1:
        raise NotTranslated("index_add with a factor")
    return put(program, (base, [None] * (dim % len(fact.shape)) + [index], values, True), {}, fact)
