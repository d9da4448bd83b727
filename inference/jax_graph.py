"""A captured graph in JAX, operation by operation: a second implementation to check the first against, and its devices.

Needs the optional packages `jax` and `numpyro`; nothing else in the package imports them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .compiled import NotCompiled, graph_of, simple

if TYPE_CHECKING:
    from .capture import ValueAndGrad


def value_and_grad_in_jax(potential: ValueAndGrad) -> Callable[[Any], tuple[Any, Any]]:
    """Value and gradient of a captured log density as a function of a JAX vector; call it where 64 bits are enabled.

    Raises
    ------
    NotCompiled
        There is no graph, JAX is not installed, or an operation has no translation.
    """
    try:
        import jax.numpy as jnp
    except ImportError:
        raise NotCompiled("JAX is not installed: pip install jax numpyro") from None
    recorded = graph_of(potential)
    constants = recorded.constants
    graph = simple(recorded.module, (potential.points[0], *constants))
    table = operations()
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem and name_of(node) not in table:
            raise NotCompiled(f"the operation {node.target} has no translation to JAX")
    held = [jnp.asarray(c.numpy()) for c in constants]
    inner = {n.target: jnp.asarray(getattr(graph, n.target).numpy()) for n in graph.graph.nodes if n.op == "get_attr"}

    def run(flat: Any) -> tuple[Any, Any]:
        known: dict[fx.Node, Any] = {}
        inputs = iter([flat, *held])
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(inputs)
            elif node.op == "get_attr":
                known[node] = inner[node.target]
            elif node.op == "output":
                return tuple(known[n] for n in node.args[0])
            else:
                args = map_arg(node.args, lambda n: known[n])
                kwargs = {k: v for k, v in map_arg(node.kwargs, lambda n: known[n]).items() if k not in IGNORED}
                call = operator.getitem if node.target is operator.getitem else table[name_of(node)]
                known[node] = call(*args, **kwargs)
        raise AssertionError("a graph has an output")

    return run


def sixty_four_bits() -> Any:
    """Context in which JAX computes in 64 bits; its setting is left as it was."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # before JAX 0.8

    return enable_x64()


#: Arguments that say where a tensor lies.
IGNORED = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "requires_grad")


def name_of(node: fx.Node) -> str:
    """Name of an operation without its overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else str(node.target)


def operations() -> dict[str, Callable[..., Any]]:
    """Operation -> its JAX function, with torch's arguments."""
    import jax
    import jax.numpy as jnp
    from jax.scipy import special
    from jax.scipy.linalg import cho_solve

    kinds = {
        torch.float64: jnp.float64,
        torch.float32: jnp.float32,
        torch.int64: jnp.int64,
        torch.int32: jnp.int32,
        torch.bool: jnp.bool_,
    }

    def kind(dtype: Any) -> Any:
        return kinds.get(dtype)

    def reduction(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
            axis = tuple(dim) or None if isinstance(dim, (list, tuple)) else dim
            return fn(x, axis=axis, keepdims=keepdim)

        return run

    def part(x: Any, dim: int, start: int | None, end: int | None, step: int) -> tuple[slice, ...]:
        stop = None if end is None or end > x.shape[dim] else end
        return (*[slice(None)] * (dim % x.ndim), slice(start, stop, step))

    def places(index: list[Any]) -> tuple[Any, ...]:
        return tuple(slice(None) if i is None else i for i in index)

    def expand(x: Any, size: Any, implicit: bool = False) -> Any:
        lead = len(size) - x.ndim
        return jnp.broadcast_to(x, [x.shape[i - lead] if s == -1 else s for i, s in enumerate(size)])

    def put(x: Any, index: Any, value: Any, accumulate: bool = False) -> Any:
        return x.at[places(index)].add(value) if accumulate else x.at[places(index)].set(value)

    def along(x: Any, dim: int, index: Any) -> tuple[Any, ...]:
        grid = list(jnp.indices(index.shape))
        grid[dim] = index
        return tuple(grid)

    def diagonal_scatter(x: Any, source: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
        moved = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
        rows = jnp.arange(source.shape[-1])
        at = moved.at[..., rows + max(0, -offset), rows + max(0, offset)].set(source)
        return jnp.moveaxis(at, (-2, -1), (dim1, dim2))

    def cholesky(x: Any, upper: bool = False, check_errors: bool = False) -> tuple[Any, Any]:
        factor = jnp.linalg.cholesky(x)
        return factor, jnp.isnan(factor).any((-1, -2)).astype(jnp.int32)

    def triangular(a: Any, b: Any, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
        lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = jnp.broadcast_to(a, (*lead, *a.shape[-2:])), jnp.broadcast_to(b, (*lead, *b.shape[-2:]))
        return jax.lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)

    def slogdet(x: Any) -> tuple[Any, Any, Any, Any]:
        sign, size = jnp.linalg.slogdet(x)
        return sign, size, x, None  # the factors stand for the matrix itself: what solves with them solves with it

    def lu_solve(lu: Any, rows: Any, b: Any, left: bool = True, adjoint: bool = False) -> Any:
        return jnp.linalg.solve(jnp.swapaxes(lu, -1, -2) if adjoint else lu, b)

    def filled(size: Any, value: Any, dtype: Any = None) -> Any:
        return jnp.full(size, value, kind(dtype))

    def flat_sum(x: Any, dtype: Any = None) -> Any:
        return jnp.sum(x)

    same: dict[str, Callable[..., Any]] = {
        name: getattr(jnp, name)
        for name in (
            "exp", "expm1", "log", "log1p", "sqrt", "sin", "cos", "tan", "tanh", "sinh", "cosh", "abs", "sign", "isnan",
            "isinf", "minimum", "maximum", "where", "floor", "ceil", "trunc", "logical_and", "logical_or", "logical_not",
            "flip", "square", "reciprocal",
        )
    }  # fmt: skip
    return {
        **same,
        "atan": jnp.arctan, "asin": jnp.arcsin, "acos": jnp.arccos, "erf": special.erf, "erfc": special.erfc,
        "lgamma": special.gammaln, "digamma": special.digamma, "polygamma": lambda n, x: special.polygamma(n, x),
        "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "rsqrt": lambda x: 1 / jnp.sqrt(x), "neg": operator.neg,
        "sgn": jnp.sign, "pow": lambda x, p: x * x if isinstance(p, (int, float)) and p == 2 else jnp.power(x, p),
        "add": lambda a, b, alpha=1: a + (b if alpha == 1 else alpha * b),
        "sub": lambda a, b, alpha=1: a - (b if alpha == 1 else alpha * b),
        "mul": operator.mul, "div": operator.truediv, "remainder": jnp.remainder,
        "ge": operator.ge, "le": operator.le, "gt": operator.gt, "lt": operator.lt, "eq": operator.eq, "ne": operator.ne,
        "bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_not": operator.invert,
        "clamp": lambda x, min=None, max=None: jnp.clip(x, min, max),
        "sum": reduction(jnp.sum), "amax": reduction(jnp.max), "amin": reduction(jnp.min), "prod": reduction(jnp.prod),
        "any": reduction(jnp.any), "all": reduction(jnp.all), "mean": reduction(jnp.mean),
        "max": lambda x, dim, keepdim=False: (jnp.max(x, dim, keepdims=keepdim), jnp.argmax(x, dim, keepdims=keepdim)),
        "min": lambda x, dim, keepdim=False: (jnp.min(x, dim, keepdims=keepdim), jnp.argmin(x, dim, keepdims=keepdim)),
        "cumsum": lambda x, dim, dtype=None: jnp.cumsum(x, dim), "cumprod": lambda x, dim, dtype=None: jnp.cumprod(x, dim),
        "view": jnp.reshape, "_unsafe_view": jnp.reshape, "reshape": jnp.reshape, "permute": jnp.transpose,
        "expand": expand, "unsqueeze": jnp.expand_dims,
        "squeeze": lambda x, dims: jnp.squeeze(x, tuple(d for d in _listed(dims) if x.ndim and x.shape[d] == 1)),
        "select": lambda x, dim, index: jnp.take(x, index, axis=dim),
        "slice": lambda x, dim=0, start=None, end=None, step=1: x[part(x, dim, start, end, step)],
        "slice_scatter": lambda x, s, dim=0, start=None, end=None, step=1: x.at[part(x, dim, start, end, step)].set(s),
        "select_scatter": lambda x, s, dim, index: x.at[(*[slice(None)] * (dim % x.ndim), index)].set(s),
        "diagonal": lambda x, offset=0, dim1=0, dim2=1: jnp.diagonal(x, offset, dim1, dim2),
        "diagonal_scatter": diagonal_scatter, "cat": lambda parts, dim=0: jnp.concatenate(parts, dim),
        "constant_pad_nd": lambda x, pad, value=0: jax.lax.pad(x, jnp.asarray(value, x.dtype), _pads(x.ndim, pad)),
        "index": lambda x, index: x[places(index)], "index_put": put, "_unsafe_index": lambda x, index: x[places(index)],
        "_unsafe_index_put": put, "gather": lambda x, dim, index, sparse_grad=False: jnp.take_along_axis(x, index, dim),
        "scatter": lambda x, dim, index, source: x.at[along(x, dim, index)].set(source),
        "scatter_add": lambda x, dim, index, source: x.at[along(x, dim, index)].add(source),
        "index_select": lambda x, dim, index: jnp.take(x, index, axis=dim),
        "tril": jnp.tril, "triu": jnp.triu, "arange": lambda a, b, step=1, dtype=None: jnp.arange(a, b, step, kind(dtype)),
        "full": filled, "full_like": lambda x, value, dtype=None: jnp.full_like(x, value, dtype=kind(dtype)),
        "scalar_tensor": lambda value, dtype=None: jnp.asarray(value, kind(dtype)),
        "clone": lambda x: x, "copy": lambda x, y, *_: jnp.broadcast_to(y, x.shape).astype(x.dtype),
        "lift_fresh_copy": lambda x: x, "_to_copy": lambda x, dtype=None: x.astype(kind(dtype) or x.dtype),
        "mm": jnp.matmul, "bmm": jnp.matmul, "mv": jnp.matmul, "dot": jnp.dot,
        "addmm": lambda c, a, b, beta=1, alpha=1: beta * c + alpha * (a @ b),
        "linalg_cholesky_ex": cholesky, "linalg_solve_triangular": triangular, "_linalg_slogdet": slogdet,
        "linalg_lu_solve": lu_solve,
        "cholesky_solve": lambda b, factor, upper=False: jnp.vectorize(
            lambda f, x: cho_solve((f, not upper), x), signature="(n,n),(n,k)->(n,k)")(factor, b),
    }  # fmt: skip


def _listed(dims: Any) -> list[int]:
    return list(dims) if isinstance(dims, (list, tuple)) else [dims]


def _pads(ndim: int, pad: list[int]) -> list[tuple[int, int, int]]:
    """torch counts paddings from the last dimension, in pairs; negative ones cut off."""
    pairs = [(pad[2 * i], pad[2 * i + 1], 0) for i in range(len(pad) // 2)]
    return [(0, 0, 0)] * (ndim - len(pairs)) + pairs[::-1]
