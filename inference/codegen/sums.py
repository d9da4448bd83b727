"""Operations along dimensions: reductions, running sums, extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .elementwise import ELEMENTWISE
from .memory import NotTranslated, Splat, Value
from .pieces import at, loops
from .program import Program

#: Reductions by name.
REDUCED = {"sum": "sum", "prod": "prod", "amax": "max", "amin": "min", "any": "any", "all": "all", "mean": "sum"}


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
