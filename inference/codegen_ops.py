"""What each aten operation computes, in C: expressions by element, reductions, views, and blocks for the rest."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .codegen import TYPES, NotTranslated, Program, Splat, Value, baked, contiguous, literal

aten = torch.ops.aten

#: Element-wise operations by name; operands are {0}, {1}, ... in the order of the arguments.
ELEMENTWISE = {
    "exp": "exp({0})",
    "exp2": "exp2({0})",
    "expm1": "expm1({0})",
    "log": "log({0})",
    "log1p": "log1p({0})",
    "log2": "log2({0})",
    "log10": "log10({0})",
    "sqrt": "sqrt({0})",
    "rsqrt": "1.0 / sqrt({0})",
    "square": "({0}) * ({0})",
    "sin": "sin({0})",
    "cos": "cos({0})",
    "tan": "tan({0})",
    "asin": "asin({0})",
    "acos": "acos({0})",
    "atan": "atan({0})",
    "sinh": "sinh({0})",
    "cosh": "cosh({0})",
    "tanh": "tanh({0})",
    "asinh": "asinh({0})",
    "acosh": "acosh({0})",
    "atanh": "atanh({0})",
    "erf": "erf({0})",
    "erfc": "erfc({0})",
    "lgamma": "log_gamma({0})",
    "digamma": "digamma({0})",
    "special_digamma": "digamma({0})",
    "sigmoid": "sigmoid({0})",
    "floor": "floor({0})",
    "ceil": "ceil({0})",
    "trunc": "trunc({0})",
    "round": "nearbyint({0})",
    "reciprocal": "1.0 / ({0})",
    "neg": "-({0})",
    "abs": "(({0}) < 0 ? -({0}) : ({0}))",
    "relu": "(({0}) < 0 ? 0 : ({0}))",
    "isnan": "({0}) != ({0})",
    "isinf": "fabs({0}) == INFINITY",
    "sign": "(({0}) > 0) - (({0}) < 0)",
    "sgn": "(({0}) > 0) - (({0}) < 0)",
    "logical_not": "({0}) == 0",
    "maximum": "LARGER({0}, {1})",
    "minimum": "SMALLER({0}, {1})",
    "clone": "{0}",
    "clamp_min": "(({0}) < ({1}) ? ({1}) : ({0}))",
    "clamp_max": "(({0}) > ({1}) ? ({1}) : ({0}))",
    "_to_copy": "{0}",
    "mul": "({0}) * ({1})",
    "eq": "({0}) == ({1})",
    "ne": "({0}) != ({1})",
    "lt": "({0}) < ({1})",
    "le": "({0}) <= ({1})",
    "gt": "({0}) > ({1})",
    "ge": "({0}) >= ({1})",
    "logical_and": "(({0}) != 0) & (({1}) != 0)",
    "fmod": "fmod({0}, {1})",
    "logical_or": "(({0}) != 0) | (({1}) != 0)",
    "logical_xor": "(({0}) != 0) ^ (({1}) != 0)",
    "atan2": "atan2({0}, {1})",
    "bitwise_and": "({0}) & ({1})",
    "bitwise_or": "({0}) | ({1})",
    "bitwise_xor": "({0}) ^ ({1})",
    "hypot": "hypot({0}, {1})",
    "where": "(({0}) ? ({1}) : ({2}))",
    "copysign": "copysign({0}, {1})",
    "lift_fresh_copy": "{0}",
    "lift_fresh": "{0}",
    "masked_fill": "(({1}) ? ({2}) : ({0}))",
    "lerp": "({0}) + ({2}) * (({1}) - ({0}))",
    "contiguous": "{0}",
    "xlogy": "(({0}) == 0 && ({1}) == ({1}) ? 0.0 : ({0}) * log({1}))",
    "heaviside": "(({0}) == 0 ? ({1}) : ({0}) > 0)",
}
#: Tensors of one number: where it stands among the arguments, or the number.
FILLED = {
    "full": 1,
    "full_like": 1,
    "new_full": 2,
    "scalar_tensor": 0,
    "fill": 1,
    "zeros": "0",
    "zeros_like": "0",
    "new_zeros": "0",
    "ones": "1",
    "ones_like": "1",
    "new_ones": "1",
    "empty": "0",
    "empty_like": "0",
    "new_empty": "0",
    "empty_permuted": "0",
    "new_empty_strided": "0",
    "empty_strided": "0",
}
#: Reductions by name.
REDUCED = {"sum": "sum", "prod": "prod", "amax": "max", "amin": "min", "any": "any", "all": "all", "mean": "sum"}
#: Writes of one tensor into a part of another, by the view that is the part.
SCATTERED = {
    "slice_scatter": aten.slice.Tensor,
    "select_scatter": aten.select.int,
    "diagonal_scatter": aten.diagonal.default,
    "as_strided_scatter": aten.as_strided.default,
}


def translate_node(program: Program, target: Any, args: Any, kwargs: Any, fact: Any) -> Any:
    """Values of one call; `fact` is what it returned in a trial run, without the numbers."""
    if target is operator.getitem:
        return args[0][args[1]]
    schema = getattr(target, "_schema", None)
    if schema is None:
        raise NotTranslated(f"the operation {target}")
    name = schema.name.removeprefix("aten::")
    own = SPECIAL.get(name)
    if own is not None:
        return own(program, args, kwargs, fact)
    if name in FILLED:
        where = FILLED[name]
        text = where if isinstance(where, str) else program.operand(args[where], ())
        if not isinstance(text, str):
            raise NotTranslated(f"{name} with a number that is computed")
        return Splat(f"(({TYPES[fact.dtype]})({text}))", fact.dtype, tuple(fact.shape))
    if any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments):
        return view(program, target, args, kwargs, fact)
    if name in REDUCED and isinstance(fact, Tensor):
        return reduced(program, name, args, kwargs, fact)
    if name in SCATTERED:
        return scattered(program, SCATTERED[name], args[0], args[1], args[2:], kwargs)
    if name in ELEMENTWISE:
        text = ELEMENTWISE[name]
        operands = [a for a in args if isinstance(a, (Value, Splat, int, float, bool))]
        return program.pointwise(
            text, operands[: 1 + max(i for i in range(3) if f"{{{i}}}" in text)], fact.shape, fact.dtype
        )
    raise NotTranslated(f"the operation aten::{name}")


def view(program: Program, target: Any, args: Any, kwargs: Any, fact: Any) -> Any:
    """The same memory under other strides; a copy where strides cannot say it."""
    base = args[0]
    if isinstance(base, Splat):
        return tree_map(lambda t: Splat(base.text, base.dtype, tuple(t.shape)), fact)
    if not isinstance(base, Value):
        raise NotTranslated(f"{target} of a list")
    name = target._schema.name
    if name == "aten::as_strided":
        raise NotTranslated("as_strided: its meaning depends on the layout of memory")
    try:
        out = target(base.meta, *args[1:], **kwargs)
    except RuntimeError:
        base = copied(program, base)
        out = target(base.meta, *args[1:], **kwargs)
    return tree_map(lambda t: Value(base.buffer, t), out)


def copied(program: Program, value: Value | Splat) -> Value:
    """The same tensor row after row in memory of its own."""
    if isinstance(value, Splat):
        out = program.fresh(value.shape, value.dtype)

        def emit() -> str:
            return f"  for (long i = 0; i < {out.buffer.size}; i++) {out.buffer.name}[i] = {value.text};"

        program.block(emit, [], out)
        return out
    if value.meta.is_contiguous() and not value.meta.storage_offset():
        return value
    out_value = program.pointwise("{0}", [value], value.shape, value.dtype)
    assert isinstance(out_value, Value)
    return out_value


def reduced(program: Program, name: str, args: Any, kwargs: Any, fact: Tensor) -> Value | Splat:
    """Sums, extremes and the like along some dimensions."""
    value = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    rank = len(value.shape)
    dims = [d % rank for d in dims] if dims and rank else list(range(rank))
    out: Value | Splat = program.reduction(REDUCED[name], value, dims, fact.shape, fact.dtype)
    if name == "mean":
        out = program.pointwise(f"({{0}}) / {math.prod(value.shape[d] for d in dims)}", [out], fact.shape, fact.dtype)
    return out


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


def at(value: Value | Splat, names: Sequence[str]) -> str:
    """C text of an element; `names` are index expressions, one a dimension."""
    if isinstance(value, Splat):
        return value.text
    parts = [f"({n}) * {s}" for n, s in zip(names, value.meta.stride(), strict=True) if s and n != "0"]
    return f"{value.buffer.name}[{' + '.join([str(value.meta.storage_offset()), *parts])}]"


def loops(shape: Sequence[int], body: Callable[[list[str]], str]) -> str:
    """Loops over a shape around a body that is given the index names."""
    names = [f"j{d}" if n != 1 else "0" for d, n in enumerate(shape)]
    head = [f"  for (long j{d} = 0; j{d} < {n}; j{d}++)" for d, n in enumerate(shape) if n != 1]
    return "\n".join([*head, f"  {{ {body(names)} }}"])


def copy_loop(program: Program, target: Value, source: Value | Splat) -> str:
    """Copy, broadcasting."""
    if isinstance(source, Value):
        source = Value(source.buffer, source.meta.expand(target.shape))
    return loops(target.shape, lambda names: f"{at(target, names)} = {at(source, names)};")


# -- operations with a form of their own -------------------------------------------------------------------------------


def add(sign: str) -> Callable[..., Any]:
    """a + alpha b or a - alpha b."""

    def run(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        scale = "" if alpha == 1 else f"{literal(alpha)} * "
        return program.pointwise(f"({{0}}) {sign} {scale}({{1}})", args[:2], fact.shape, fact.dtype)

    return run


def reverse_subtract(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """b - a."""
    return program.pointwise("({1}) - ({0})", args[:2], fact.shape, fact.dtype)


def divide(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """a / b, perhaps rounded."""
    mode = kwargs.get("rounding_mode")
    text = "(double)({0}) / ({1})"
    if mode is not None:
        text = f"{mode}({text})"
    return program.pointwise(text, args[:2], fact.shape, fact.dtype)


def remainder(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """a - b floor(a / b)."""
    return program.pointwise("({0}) - ({1}) * floor((double)({0}) / ({1}))", args[:2], fact.shape, fact.dtype)


#: Powers that need no `pow`.
POWERS = {
    0: "1",
    1: "{0}",
    2: "({0}) * ({0})",
    3: "({0}) * ({0}) * ({0})",
    0.5: "sqrt({0})",
    -1: "1.0 / ({0})",
    -2: "1.0 / (({0}) * ({0}))",
    -0.5: "1.0 / sqrt({0})",
}


def power(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """a to the power b."""
    base, exponent = args[:2]
    if isinstance(exponent, (int, float)) and exponent in POWERS:
        return program.pointwise(POWERS[exponent], [base], fact.shape, fact.dtype)
    return program.pointwise("pow({0}, {1})", [base, exponent], fact.shape, fact.dtype)


def clamp(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """Into an interval, of which one end may be open."""
    low, high = ([*args[1:], None, None])[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    out = args[0]
    if low is not None:
        out = program.pointwise(ELEMENTWISE["clamp_min"], [out, low], fact.shape, fact.dtype)
    if high is not None:
        out = program.pointwise(ELEMENTWISE["clamp_max"], [out, high], fact.shape, fact.dtype)
    return out


def polygamma(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """Derivatives of digamma; the first is enough for the gradients of densities."""
    if args[0] not in (0, 1):
        raise NotTranslated(f"polygamma of order {args[0]}")
    return program.pointwise(("digamma({0})", "trigamma({0})")[args[0]], [args[1]], fact.shape, fact.dtype)


def bitwise_not(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """Not; of truth values it is not C's."""
    return program.pointwise("({0}) == 0" if fact.dtype == torch.bool else "~({0})", args, fact.shape, fact.dtype)


def copy(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """The second argument in shape and type of the first."""
    return program.pointwise("{0}", [args[1]], fact.shape, fact.dtype)


def squeezed_name(shape: Sequence[int], dim: int) -> str:
    """Name of the loop of a dimension in a nest without loops of size 1."""
    dim %= len(shape)
    return "0" if shape[dim] == 1 else f"i{sum(n != 1 for n in shape[:dim])}"


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


def masked(program: Program, base: Any, mask: Any, number: Any, fact: Tensor) -> Any:
    """x[mask] = number, where the mask covers leading dimensions."""
    missing = len(fact.shape) - len(mask.shape)
    if isinstance(mask, Value):
        mask = Value(mask.buffer, mask.meta[(..., *[None] * missing)])
    if isinstance(number, Value):
        number = Value(number.buffer, number.meta.reshape(()))
    return program.pointwise("(({1}) ? ({2}) : ({0}))", [base, mask, number], fact.shape, fact.dtype)


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


def accumulated(start: str, step: str) -> Callable[..., Any]:
    """Running sums or products along one dimension."""

    def run(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
        value, dim = args[0], args[1] % max(1, len(fact.shape))
        out = program.fresh(fact.shape, fact.dtype)
        rest = [n for d, n in enumerate(fact.shape) if d != dim]

        def emit() -> str:
            def body(names: list[str]) -> str:
                spots = [*names[:dim], "k", *names[dim:]] if fact.shape else []
                text = f"{at(out, spots)} = run = {step.format('run', at(value, spots))};"
                length = fact.shape[dim] if fact.shape else 1
                return f"{out.buffer.ctype} run = {start}; for (long k = 0; k < {length}; k++) {text}"

            return loops(rest, body)

        program.block(emit, [value], out)
        return out

    return run


def extreme(sign: str) -> Callable[..., Any]:
    """Largest or smallest along one dimension, and its first place; what is not a number wins."""

    def run(program: Program, args: Any, kwargs: Any, fact: Any) -> Any:
        if isinstance(fact, Tensor):
            kind = "max" if sign == ">" else "min"
            if len(args) > 1:
                return program.pointwise(ELEMENTWISE[f"{kind}imum"], args[:2], fact.shape, fact.dtype)
            return reduced(program, f"a{kind}", args, kwargs, fact)
        value, dim = args[0], args[1] % max(1, len(args[0].shape))
        if isinstance(value, Splat) or not value.shape:
            raise NotTranslated("max or min of equal numbers")
        best, place = (program.fresh(f.shape, f.dtype) for f in fact)
        rest = [n for d, n in enumerate(value.shape) if d != dim]
        kept = len(best.shape) == len(value.shape)

        def body(names: list[str]) -> str:
            spots = [*names[:dim], "k", *names[dim:]]
            target = [*names[:dim], "0", *names[dim:]] if kept else names
            x = at(value, spots)
            return (
                f"long top = 0; {best.buffer.ctype} high = {at(value, [*names[:dim], '0', *names[dim:]])}; "
                f"for (long k = 1; k < {value.shape[dim]}; k++) if (high == high && ({x} {sign} high || {x} != {x})) "
                f"{{ high = {x}; top = k; }} {at(best, target)} = high; {at(place, target)} = top;"
            )

        program.block(lambda: loops(rest, body), [value], best, [place])
        return best, place

    return run


# -- linear algebra ----------------------------------------------------------------------------------------------------


def suffix(dtype: torch.dtype) -> str:
    """Of the routine for this type."""
    if dtype not in (torch.float64, torch.float32):
        raise NotTranslated(f"linear algebra on {dtype}")
    return "d" if dtype == torch.float64 else "f"


def batched(shape: Sequence[int], body: Callable[[list[str]], str]) -> str:
    """Loops over the leading dimensions."""
    return loops(shape[:-2], body)


def start_of(value: Value, names: Sequence[str]) -> str:
    """C address of one matrix of a batch."""
    return "&" + at(value, [*names, "0", "0"])


def dense(program: Program, value: Value | Splat, shape: Sequence[int] | None = None) -> Value:
    """A value in memory, broadcast to `shape` by its strides."""
    made = copied(program, value) if isinstance(value, Splat) else value
    return made if shape is None else Value(made.buffer, made.meta.expand(tuple(shape)))


def matmul(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """Matrix products, of single matrices or of batches."""
    a, b = (dense(program, v) for v in args[:2])
    out = program.fresh(fact.shape, fact.dtype)
    (m, k), n, kind = a.shape[-2:], b.shape[-1], suffix(fact.dtype)

    def emit() -> str:
        def body(names: list[str]) -> str:
            ai, ak = a.meta.stride()[-2:]
            bk, bj = b.meta.stride()[-2:]
            return (
                f"matmul_{kind}({m}, {n}, {k}, {start_of(a, names)}, {ai}, {ak}, {start_of(b, names)}, {bk}, {bj}, "
                f"{start_of(out, names)});"
            )

        return batched(fact.shape, body)

    program.block(emit, [a, b], out)
    return out


def matmul_added(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """beta x + alpha a b."""
    product = matmul(program, args[1:3], {}, fact)
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    text = f"{literal(beta)} * ({{0}}) + {literal(alpha)} * ({{1}})"
    return program.pointwise(text, [args[0], product], fact.shape, fact.dtype)


def matvec(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """A matrix times a vector."""
    a, x = dense(program, args[0]), dense(program, args[1])
    column = Value(x.buffer, x.meta.unsqueeze(-1))
    out = matmul(program, (a, column), {}, torch.empty((*fact.shape, 1), dtype=fact.dtype, device="meta"))
    return Value(out.buffer, out.meta.squeeze(-1))


def dot(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Any:
    """Sum of products."""
    product = program.pointwise("({0}) * ({1})", args[:2], args[0].shape, fact.dtype)
    return program.reduction("sum", product, [0], fact.shape, fact.dtype)


def cholesky(program: Program, args: Any, kwargs: Any, fact: Any) -> Any:
    """Lower factors, and where each failed (0: nowhere)."""
    upper = kwargs.get("upper", args[1] if len(args) > 1 and isinstance(args[1], bool) else False)
    if upper:
        raise NotTranslated("an upper Cholesky factor")
    a = dense(program, args[0])
    factor, info = (program.fresh(f.shape, f.dtype) for f in fact[:2])
    kind, n = suffix(factor.dtype), factor.shape[-1]

    def body(names: list[str]) -> str:
        ai, aj = a.meta.stride()[-2:]
        return f"{at(info, names)} = cholesky_{kind}({n}, {start_of(a, names)}, {ai}, {aj}, {start_of(factor, names)});"

    program.block(lambda: batched(factor.shape, body), [a], factor, [info])
    return factor, info


def triangular(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """Solutions of a x = b, or of x a = b, for triangular a."""
    left, unit = kwargs.get("left", True), kwargs.get("unitriangular", False)
    batch, n = tuple(fact.shape[:-2]), args[0].shape[-1]
    a, b = dense(program, args[0], (*batch, n, n)), dense(program, args[1], fact.shape)
    out, kind = program.fresh(fact.shape, fact.dtype), suffix(fact.dtype)
    (ai, aj), (xi, xj) = a.meta.stride()[-2:], contiguous(fact.shape)[-2:]
    upper, right = kwargs["upper"], fact.shape[-1]
    if not left:  # transposed: a' x' = b'
        ai, aj, xi, xj, upper, right = aj, ai, xj, xi, not upper, fact.shape[-2]

    def body(names: list[str]) -> str:
        return (
            f"solve_{kind}({n}, {right}, {start_of(a, names)}, {ai}, {aj}, {int(upper)}, {int(unit)}, "
            f"{start_of(out, names)}, {xi}, {xj});"
        )

    program.block(lambda: copy_loop(program, out, b) + "\n" + batched(fact.shape, body), [a, b], out)
    return out


def cholesky_solve(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """Solutions of a x = b from the Cholesky factor of a."""
    upper = args[2] if len(args) > 2 else kwargs.get("upper", False)
    batch, n = tuple(fact.shape[:-2]), args[1].shape[-1]
    b, factor = dense(program, args[0], fact.shape), dense(program, args[1], (*batch, n, n))
    out, kind = program.fresh(fact.shape, fact.dtype), suffix(fact.dtype)
    li, lj = factor.meta.stride()[-2:]
    if upper:
        li, lj = lj, li

    def body(names: list[str]) -> str:
        x = f"{start_of(out, names)}, {fact.shape[-1]}, 1"
        first = f"solve_{kind}({n}, {fact.shape[-1]}, {start_of(factor, names)}, {li}, {lj}, 0, 0, {x});"
        return f"{first} solve_{kind}({n}, {fact.shape[-1]}, {start_of(factor, names)}, {lj}, {li}, 1, 0, {x});"

    program.block(lambda: copy_loop(program, out, b) + "\n" + batched(fact.shape, body), [b, factor], out)
    return out


def cholesky_inverse(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """The inverse of a from its Cholesky factor."""
    eye = torch.eye(fact.shape[-1], dtype=fact.dtype)
    upper = args[1] if len(args) > 1 else kwargs.get("upper", False)
    return cholesky_solve(program, (baked(program, eye), args[0], upper), {}, fact)


def log_determinant(program: Program, args: Any, kwargs: Any, fact: Any) -> Any:
    """Sign and log size of determinants, with the factors: torch's are of the transpose where rows lie in order."""
    a = dense(program, args[0])
    sign, size, lu, rows = (program.fresh(f.shape, f.dtype) for f in fact)
    kind, n = suffix(lu.dtype), lu.shape[-1]
    ai, aj = a.meta.stride()[-2:]
    if program.inputs[0].is_contiguous():
        ai, aj = aj, ai

    def body(names: list[str]) -> str:
        ends = f"&{at(rows, [*names, '0'])}, &{at(sign, names)}, &{at(size, names)}"
        return f"lu_{kind}({n}, {start_of(a, names)}, {ai}, {aj}, {start_of(lu, names)}, {ends});"

    program.block(lambda: batched(lu.shape, body), [a], sign, [size, lu, rows])
    return sign, size, lu, rows


def lu_solve(program: Program, args: Any, kwargs: Any, fact: Tensor) -> Value:
    """Solutions of a x = b from the factors of a."""
    if not kwargs.get("left", True):
        raise NotTranslated("linalg_lu_solve from the right")
    batch, n = tuple(fact.shape[:-2]), args[0].shape[-1]
    lu, rows = dense(program, args[0], (*batch, n, n)), dense(program, args[1], (*batch, n))
    b, out, kind = dense(program, args[2], fact.shape), program.fresh(fact.shape, fact.dtype), suffix(fact.dtype)
    li, lj = lu.meta.stride()[-2:]
    adjoint = int(kwargs.get("adjoint", False))

    def body(names: list[str]) -> str:
        return (
            f"lu_solve_{kind}({n}, {fact.shape[-1]}, {start_of(lu, names)}, {li}, {lj}, &{at(rows, [*names, '0'])}, {adjoint}, "
            f"{start_of(out, names)});"
        )

    program.block(lambda: copy_loop(program, out, b) + "\n" + batched(fact.shape, body), [lu, rows, b], out)
    return out


#: Operations that are more than an expression by element.
SPECIAL: dict[str, Callable[..., Any]] = {
    "add": add("+"),
    "sub": add("-"),
    "rsub": reverse_subtract,
    "div": divide,
    "remainder": remainder,
    "pow": power,
    "clamp": clamp,
    "polygamma": polygamma,
    "bitwise_not": bitwise_not,
    "copy": copy,
    "tril": triangle("<="),
    "triu": triangle(">="),
    "arange": arange,
    "flip": flip,
    "cat": concatenate,
    "constant_pad_nd": padded,
    "index": gathered,
    "index_put": put,
    "_unsafe_index_put": put,
    "_unsafe_index": gathered,
    "gather": gather,
    "scatter": scatter("="),
    "scatter_add": scatter("+="),
    "index_select": index_select,
    "index_add": index_add,
    "cumsum": accumulated("0", "{0} + {1}"),
    "cumprod": accumulated("1", "{0} * {1}"),
    "max": extreme(">"),
    "min": extreme("<"),
    "mm": matmul,
    "bmm": matmul,
    "addmm": matmul_added,
    "baddbmm": matmul_added,
    "mv": matvec,
    "dot": dot,
    "linalg_cholesky_ex": cholesky,
    "linalg_solve_triangular": triangular,
    "cholesky_solve": cholesky_solve,
    "cholesky_inverse": cholesky_inverse,
    "_linalg_slogdet": log_determinant,
    "linalg_lu_solve": lu_solve,
}
