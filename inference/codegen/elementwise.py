"""Operations by element, and numbers that fill tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import NotTranslated, Value, literal
from .program import Program

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


def masked(program: Program, base: Any, mask: Any, number: Any, fact: Tensor) -> Any:
    """x[mask] = number, where the mask covers leading dimensions."""
    missing = len(fact.shape) - len(mask.shape)
    if isinstance(mask, Value):
        mask = Value(mask.buffer, mask.meta[(..., *[None] * missing)])
    if isinstance(number, Value):
        number = Value(number.buffer, number.meta.reshape(()))
    return program.pointwise("(({1}) ? ({2}) : ({0}))", [base, mask, number], fact.shape, fact.dtype)
