"""Which translation an operation has."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .algebra import (
    cholesky,
    cholesky_inverse,
    cholesky_solve,
    dot,
    log_determinant,
    lu_solve,
    matmul,
    matmul_added,
    matvec,
    triangular,
)
from .elementwise import (
    ELEMENTWISE,
    FILLED,
    add,
    bitwise_not,
    clamp,
    copy,
    divide,
    polygamma,
    power,
    remainder,
    reverse_subtract,
)
from .memory import TYPES, NotTranslated, Splat, Value
from .pieces import view
from .places import (
    arange,
    concatenate,
    flip,
    gather,
    gathered,
    index_add,
    index_select,
    padded,
    put,
    scatter,
    scattered,
    triangle,
)
from .program import Program
from .sums import REDUCED, accumulated, extreme, reduced

aten = torch.ops.aten

#: Writes of one tensor into a part of another, by the view that is the part.
SCATTERED = {
    "slice_scatter": aten.slice.Tensor,
    "select_scatter": aten.select.int,
    "diagonal_scatter": aten.diagonal.default,
    "as_strided_scatter": aten.as_strided.default,
}
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
