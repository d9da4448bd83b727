"""What several operations need: views, copies, elements by place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._pytree import tree_map

from .memory import NotTranslated, Splat, Value
from .program import Program


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


def squeezed_name(shape: Sequence[int], dim: int) -> str:
    """Name of the loop of a dimension in a nest without loops of size 1."""
    dim %= len(shape)
    return "0" if shape[dim] == 1 else f"i{sum(n != 1 for n in shape[:dim])}"
