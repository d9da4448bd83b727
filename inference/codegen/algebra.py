"""Linear algebra on small dense matrices; the routines are in `native/support.h`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import NotTranslated, Splat, Value, contiguous, literal
from .pieces import at, copied, copy_loop, loops
from .program import Program, baked


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
