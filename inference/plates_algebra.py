"""What a tensor was computed from: torch operations watched, names and a short formula kept for each result.

Values stay ordinary tensors, so any operation of torch works while it is watched: indexing, linear algebra,
writing in place. Where a value leaves torch (`.item()`, `.numpy()`, `if z > 0`), its names are kept in
`Watch.escaped`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Ref:
    """The value of a site, a parameter or an argument."""

    name: str


@dataclass(frozen=True)
class Number:
    """A constant whose elements are all equal."""

    value: float


@dataclass(frozen=True)
class Index:
    """`base[items]`; None among the items stands for a whole dimension."""

    base: "Expr"
    items: "tuple[Expr | None, ...]"


@dataclass(frozen=True)
class Apply:
    """A known operation on known operands."""

    op: str
    args: "tuple[Expr, ...]"


@dataclass(frozen=True)
class Opaque:
    """Some function of these values."""

    names: frozenset[str]


@dataclass(frozen=True)
class Listing:
    """A constant array: all its elements, or the first and the last of more."""

    shown: tuple[float, ...]
    more: bool = False
    bare: bool = False


Expr: TypeAlias = Ref | Number | Index | Apply | Opaque | Listing


@dataclass(frozen=True)
class Trail:
    """Where one tensor came from.

    Attributes
    ----------
    names
        Everything that it was computed from, directly.
    expr
        The formula, `Opaque` where it is too long or not known.
    moved
        Whether dimensions were added or rearranged on the way: equal formulas need not be equal entries then.
    """

    names: frozenset[str]
    expr: Expr
    moved: bool = False


#: Longer formulas are shown as f(...): a picture is no place for them.
MAX_TERMS = 9
_SAME = {
    "alias", "clone", "contiguous", "cpu", "cuda", "data", "detach", "double", "float", "int", "long",
    "requires_grad_", "to", "type", "type_as",
}  # fmt: skip
_MOVE = {
    "broadcast_to",
    "expand",
    "expand_as",
    "flatten",
    "reshape",
    "squeeze",
    "unsqueeze",
    "view",
    "view_as",
}
_TRANSPOSE = {"T", "mT", "t", "transpose", "swapaxes", "permute"}
_SHAPE_ONLY = {
    "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "randint_like", "full_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
}  # fmt: skip
_ESCAPES = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__complex__",
    "__contains__", "__format__", "equal", "allclose", "is_nonzero",
}  # fmt: skip
_BINARY = {
    "add": "add", "__radd__": "add", "sub": "sub", "subtract": "sub", "mul": "mul", "multiply": "mul",
    "__rmul__": "mul", "div": "div", "divide": "div", "true_divide": "div", "pow": "pow", "matmul": "matmul",
    "mm": "matmul", "mv": "matmul", "bmm": "matmul",
}  # fmt: skip
_REFLECTED = {
    "__rsub__": "sub", "rsub": "sub", "__rdiv__": "div", "__rtruediv__": "div", "__rpow__": "pow",
    "__rmatmul__": "matmul",
}  # fmt: skip
_UNARY = {
    "exp", "log", "sqrt", "rsqrt", "reciprocal", "neg", "sigmoid", "softplus", "softmax", "tanh", "abs",
    "square", "log1p", "relu", "sin", "cos", "cumsum",
}  # fmt: skip
_REDUCE = {"sum", "logsumexp"}
_NORMS = {"norm", "vector_norm", "linalg_vector_norm"}
_LAST_SUMS: tuple[tuple[tuple, dict], ...] = (((-1,), {}), ((), {"dim": -1}), ((), {"axis": -1}))


def terms(expr: Expr | None) -> int:
    """How many symbols a formula shows."""
    if isinstance(expr, Index):
        return terms(expr.base) + sum(terms(i) for i in expr.items)
    if isinstance(expr, Apply):
        return 1 + sum(terms(a) for a in expr.args)
    return len(expr.names) if isinstance(expr, Opaque) else int(expr is not None)


def references(expr: Expr | None) -> frozenset[str]:
    """Names that occur in a formula."""
    if isinstance(expr, Ref):
        return frozenset({expr.name})
    if isinstance(expr, Opaque):
        return expr.names
    parts: Iterable[Expr | None] = ()
    if isinstance(expr, Index):
        parts = (expr.base, *expr.items)
    elif isinstance(expr, Apply):
        parts = expr.args
    return frozenset().union(*(references(p) for p in parts))


def rebuilt(expr: Index | Apply, parts: Sequence[Expr | None]) -> Expr:
    """The same operation on other operands; of an index the base comes first."""
    if isinstance(expr, Index):
        assert parts[0] is not None
        return Index(parts[0], tuple(parts[1:]))
    return Apply(expr.op, tuple(p for p in parts if p is not None))


def renamed(expr: Expr, rename: Callable[[str], str]) -> Expr:
    """A formula with other names."""
    if isinstance(expr, Ref):
        return Ref(rename(expr.name))
    if isinstance(expr, Opaque):
        return Opaque(frozenset(rename(n) for n in expr.names))
    if isinstance(expr, Index | Apply):
        parts = (expr.base, *expr.items) if isinstance(expr, Index) else expr.args
        return rebuilt(expr, [None if p is None else renamed(p, rename) for p in parts])
    return expr


def constant(value: Any, largest: int = 100_000) -> Number | None:
    """A Python number, or a tensor whose elements are all equal, as a number; None otherwise."""
    if isinstance(value, bool | int | float):
        return Number(float(value))
    if not isinstance(value, Tensor) or value.is_complex() or not 0 < value.numel() <= largest:
        return None
    first = value.detach().flatten()[0]
    return Number(float(first)) if bool((value.detach() == first).all()) else None


def tensors_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dictionaries and slices."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part, depth - 1)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step), depth)


class Watch(TorchFunctionMode):
    """While it is entered, remembers for each tensor computed from a marked one what it came from."""

    def __init__(self) -> None:
        super().__init__()
        self._trails = WeakIdKeyDictionary()
        self._written: dict[int, tuple[Any, frozenset[str]]] = {}
        self.escaped: set[str] = set()

    def mark(self, value: Tensor, name: str, *, in_place: bool = False) -> Tensor:
        """A view of `value` (or itself) that counts as the value of `name` from here on."""
        with torch._C.DisableTorchFunction():
            marked = value if in_place else torch.ops.aten.alias(value)
        self._trails[marked] = Trail(frozenset({name}), Ref(name))
        return marked

    def trail(self, value: Any) -> Trail | None:
        """Where a tensor came from; None for a constant."""
        if not isinstance(value, Tensor):
            return None
        found = self._trails.get(value)
        if self._written:
            written = self._written.get(_storage(value), (None, frozenset()))[1]
            if written and not (found and written <= found.names):
                names = written | (found.names if found else frozenset())
                return Trail(names, Opaque(names))
        return found

    def names(self, value: Any) -> frozenset[str]:
        """Everything that the tensors in a nested value came from."""
        trails = (self.trail(t) for t in tensors_in(value))
        return frozenset().union(*(t.names for t in trails if t is not None))

    def expr(self, value: Any) -> Expr | None:
        """The formula of a tensor, a number for a uniform constant, None for any other constant."""
        trail = self.trail(value)
        return trail.expr if trail is not None else constant(value)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = _op(func)
        if op in _SHAPE_ONLY:
            args = args[1:]
        names = self.names((args, kwargs))
        if not names:
            return out
        if op in _ESCAPES:
            self.escaped |= names
        elif op == "__setitem__" or kwargs.get("out") is not None or (_in_place(op) and op not in _SAME):
            self._write(kwargs["out"] if kwargs.get("out") is not None else args[0], names)
        elif op == "broadcast_tensors":
            many = args[0] if isinstance(args[0], tuple | list) else args
            for given, result in zip(many, out, strict=False):
                if (trail := self.trail(given)) is not None:
                    self._keep(result, Trail(trail.names, trail.expr, True))
        elif op in ("__iter__", "unbind", "__reversed__"):
            return self._unbind(op, out, args, names)
        else:
            results = list(tensors_in(out))
            inputs = {id(t) for t in tensors_in((args, kwargs))}
            try:
                trail = self._formula(op, out, args, kwargs, names) if len(results) == 1 else None
            except (
                IndexError,
                TypeError,
                RuntimeError,
            ):  # an unforeseen call: the names are known all the same
                trail = None
            for result in results:
                if id(result) not in inputs:
                    self._keep(result, trail or Trail(names, Opaque(names)))
        return out

    def _keep(self, result: Tensor, trail: Trail) -> None:
        if terms(trail.expr) > MAX_TERMS:
            trail = Trail(trail.names, Opaque(trail.names), trail.moved)
        self._trails[result] = trail

    def _write(self, target: Any, names: frozenset[str]) -> None:
        for tensor in tensors_in(target):
            names = names | self.names(tensor)
            self._trails[tensor] = Trail(names, Opaque(names))
            storage = tensor.untyped_storage()  # kept, so that its address is not used again
            self._written[storage.data_ptr()] = (storage, names)

    def _unbind(self, op: str, out: Any, args: tuple, names: frozenset[str]) -> Any:
        parts = list(out)
        dim = args[1] if len(args) > 1 else 0
        known = self.trail(args[0]) if op != "__reversed__" and dim == 0 else None
        for i, part in enumerate(parts):
            expr = Index(known.expr, (Number(float(i)),)) if known else Opaque(names)
            self._keep(part, Trail(names, expr))
        return iter(parts) if op != "unbind" else out

    def _formula(self, op: str, out: Any, args: tuple, kwargs: dict, names: frozenset[str]) -> Trail | None:
        first = self.trail(args[0]) if args else None
        if op in ("stack", "cat"):
            parts = [self.expr(a) for a in args[0]]
            known = [p for p in parts if p is not None]
            stacked = op == "stack" and len(known) == len(parts) <= 3
            return Trail(names, Apply("stack", tuple(known))) if stacked else None
        if op in _BINARY or op in _REFLECTED:
            return self._binary(op, out, args, names) if len(args) > 1 and not kwargs else None
        if first is None:
            return None
        if op in _SAME or op in _MOVE:
            return Trail(names, first.expr, first.moved or op in _MOVE)
        if op in _TRANSPOSE:
            swapped = op in ("T", "mT", "t") or (op != "permute" and {*args[1:]} in ({-1, -2}, {0, 1}))
            return Trail(names, Apply("T", (first.expr,)), True) if swapped and args[0].dim() == 2 else None
        if op == "__getitem__":
            return self._index(first, args, names)
        if op == "sum" and first.expr is not None and (args[1:], kwargs) in _LAST_SUMS:
            product = isinstance(first.expr, Apply) and first.expr.op == "mul" and args[0].shape[-1] > 1
            return Trail(names, Apply("dot", first.expr.args)) if product else None  # type: ignore[union-attr]
        if op in _NORMS and _is_length(args, kwargs):
            return Trail(names, Apply("norm", (first.expr,)), True)
        if op in ("diag", "diag_embed") and len(args) == 1 and not kwargs:
            return Trail(names, Apply("diag", (first.expr,)), True)
        if op in _REDUCE and (kwargs.get("keepdim") or True in args[1:]):
            return Trail(names, Apply(op, (first.expr,)), True)
        return Trail(names, Apply(op, (first.expr,)), first.moved) if op in _UNARY else None

    def _binary(self, op: str, out: Tensor, args: tuple, names: frozenset[str]) -> Trail | None:
        left, right = args[:2] if op in _BINARY else (args[1], args[0])
        op = _BINARY.get(op) or _REFLECTED[op]
        a, b = self.expr(left), self.expr(right)
        if a is None or b is None:
            return None
        if (op, b) in (("div", Apply("sum", (a,))), ("sub", Apply("logsumexp", (a,)))):
            return Trail(names, a)  # a distribution normalising its own weights: the same distribution
        trails = [t for t in (self.trail(left), self.trail(right)) if t is not None]
        moved = any(t.moved for t in trails)
        if len(trails) == 2 and trails[0].names & trails[1].names and (moved or a == b):
            return None
        return Trail(names, Apply(op, (a, b)), moved)

    def _index(self, base: Trail, args: tuple, names: frozenset[str]) -> Trail | None:
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not any(isinstance(i, Tensor | int) or (isinstance(i, slice) and i != slice(None)) for i in items):
            return Trail(names, base.expr, True)
        if isinstance(base.expr, Apply) and base.expr.op == "stack" and items[0] is Ellipsis and len(items) == 2:
            chosen = base.expr.args[items[1]] if isinstance(items[1], int) else None
            return Trail(names, chosen, True) if chosen is not None else None
        found: list[Expr | None] = []
        for item in items:
            if isinstance(item, slice) and item == slice(None):
                found.append(None)
            elif isinstance(item, Tensor) and item.dtype not in (torch.bool, torch.uint8):
                expr = self.expr(item) if self.trail(item) is not None else constant(item, largest=1)
                if expr is None:
                    return None
                found.append(expr)
            elif isinstance(item, int) and not isinstance(item, bool) and item >= 0:
                found.append(Number(float(item)))
            else:
                return None
        while found and found[-1] is None:
            found.pop()
        return Trail(names, Index(base.expr, tuple(found)))


def _is_length(args: tuple, kwargs: dict) -> bool:
    """Whether a norm is the Euclidean one of the last dimension."""
    order = kwargs.get("p", kwargs.get("ord", args[1] if len(args) > 1 else None))
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    return order in (None, 2, "fro") and dim == -1 and not kwargs.get("keepdim")


def _op(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _in_place(op: str) -> bool:
    return op.endswith("_") and not op.endswith("__")


def _storage(value: Tensor) -> int:
    try:
        return value.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and wrapped tensors have none
        return -1
