"""Loops that were written out, taken together again: the same operation on many small tensors is one on a long one.

A Python loop of T steps is recorded as T times the operations of one step.  Where their results are laid side by side in the
end (`torch.stack`), the operations can be done side by side as well: `stack(f(a_1, b), f(a_2, b), ...)` is
`f(stack(a_1, a_2, ...), b)` for every f that works entry by entry or only rearranges dimensions.  Steps may differ in their
shapes: then each kind is one operation, and the results are put in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten

#: Results side by side from which it pays, kinds of steps up to which it does, and numbers of constants that may be copied.
FEWEST, KINDS, COPIED = 8, 4, 5_000_000

_ENTRYWISE = frozenset(
    getattr(getattr(aten, name), overload)
    for name, overload in [
        *((n, "Tensor") for n in ("add", "sub", "mul", "div", "xlogy", "eq", "ne", "ge", "gt", "le", "lt")),
        *((n, "Scalar") for n in ("add", "sub", "mul", "div", "eq", "ne", "ge", "gt", "le", "lt")),
        *((n, "default") for n in ("neg", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "abs")),
        *((n, "default") for n in ("lgamma", "sigmoid", "tanh", "erf", "clamp", "clamp_min", "clamp_max", "isfinite")),
        *((n, "default") for n in ("logical_and", "logical_not", "detach", "alias", "softplus", "maximum", "minimum")),
        ("pow", "Tensor_Scalar"),
        ("pow", "Tensor_Tensor"),
        ("where", "self"),
    ]
)
#: What leaves the numbers in their order.
_RESHAPED = frozenset(
    (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim)
)


class SideBySide:
    """Rewrites one graph.

    Parameters
    ----------
    graph
        Of aten operations; nodes tell the shape of their tensor as `meta["shape"]`.
    values
        Placeholder -> tensor, for constants.
    constant
        Makes a tensor a constant of the graph: its placeholder.
    """

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Tensor], constant: Callable[[Tensor], fx.Node]) -> None:
        self.graph, self.values, self.constant = graph, values, constant
        self.made: dict[tuple[fx.Node, ...], fx.Node | None] = {}

    def rewrite(self) -> None:
        """Take every stack of many tensors apart that can be."""
        for node in list(self.graph.nodes):
            args: Any = node.args
            if node.target is not aten.stack.default or len(args) != 1 or len(args[0]) < FEWEST:
                continue
            with self.graph.inserting_before(node):
                together = self.together(tuple(args[0]))
            if together is not None:
                node.replace_all_uses_with(together)
                self.graph.erase_node(node)

    def call(self, target: Any, *args: Any, shape: Any, **kwargs: Any) -> fx.Node:
        """A new operation."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["shape"] = shape
        return node

    def together(self, nodes: tuple[fx.Node, ...]) -> fx.Node | None:
        """One node with the tensors of these along a new first dimension; None where that would not pay."""
        if nodes not in self.made:
            self.made[nodes] = self.make(nodes)
        return self.made[nodes]

    def make(self, nodes: tuple[fx.Node, ...]) -> fx.Node | None:
        """See `together`."""
        if any(not isinstance(n, fx.Node) or "shape" not in n.meta for n in nodes):
            return None
        shapes = {n.meta["shape"] for n in nodes}
        if len(shapes) != 1:
            return None
        (shape,) = shapes
        whole = (len(nodes), *shape)
        if len(set(nodes)) == 1:
            first = self.call(aten.unsqueeze.default, nodes[0], 0, shape=(1, *shape))
            return self.call(aten.expand.default, first, list(whole), shape=whole)
        if all(n in self.values for n in nodes):
            tensors = [self.values[n] for n in nodes]
            if len({(t.dtype, t.device) for t in tensors}) != 1 or sum(t.numel() for t in tensors) > COPIED:
                return None
            return self.known(torch.stack(tensors))
        kinds: dict[Any, list[int]] = {}
        for i, node in enumerate(nodes):
            kinds.setdefault(kind_of(node), []).append(i)
        if len(kinds) > KINDS or len(nodes) < FEWEST:
            return None
        parts = []
        for where in kinds.values():
            part = self.of_one_kind(tuple(nodes[i] for i in where))
            if part is None:
                return None
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([i for where in kinds.values() for i in where]).argsort()
        joined = self.call(aten.cat.default, parts, shape=whole)
        return self.call(aten.index.Tensor, joined, [self.known(order)], shape=whole)

    def known(self, value: Tensor) -> fx.Node:
        """A constant."""
        node = self.constant(value)
        node.meta["shape"] = tuple(value.shape)
        self.values[node] = value
        return node

    def of_one_kind(self, nodes: tuple[fx.Node, ...]) -> fx.Node | None:
        """The same for results of one operation with the same numbers and shapes among its operands."""
        first, count = nodes[0], len(nodes)
        shape = first.meta["shape"]
        whole = (count, *shape)
        if len(set(nodes)) == 1 or all(n in self.values for n in nodes):
            return self.together(nodes)
        if first.op != "call_function":
            return None
        if first.target in _ENTRYWISE:
            operands: list[Any] = []
            for i, operand in enumerate(first.args):
                if not isinstance(operand, fx.Node):
                    operands.append(operand)
                    continue
                long = self.together(tuple(n.args[i] for n in nodes))  # type: ignore[misc]
                if long is None:
                    return None
                operands.append(self.padded(long, len(shape)))
            return self.call(first.target, *operands, shape=whole, **first.kwargs)
        moved = moved_by_one(first, count)
        long = None if moved is None else self.together(tuple(n.args[0] for n in nodes))  # type: ignore[misc]
        return None if long is None or moved is None else self.call(moved[0], long, *moved[1], shape=whole)

    def padded(self, long: fx.Node, dims: int) -> fx.Node:
        """Ones after the first dimension, so that what is broadcast meets the right dimensions."""
        count, *shape = long.meta["shape"]
        if len(shape) == dims:
            return long
        wide = (count, *[1] * (dims - len(shape)), *shape)
        return self.call(aten.reshape.default, long, list(wide), shape=wide)


def kind_of(node: fx.Node) -> Any:
    """What must be equal for two results to be made side by side."""
    if node.op != "call_function":
        return node.op
    leaves, spec = tree_flatten((node.args, node.kwargs))
    told = tuple(leaf.meta.get("shape") if isinstance(leaf, fx.Node) else (type(leaf), leaf) for leaf in leaves)
    return node.target, str(spec), told


def moved_by_one(node: fx.Node, count: int) -> tuple[Any, tuple[Any, ...]] | None:
    """A rearrangement of dimensions, and its arguments where there is one dimension more in front; None for others."""
    target, args = node.target, list[Any](node.args[1:])
    if not node.args or not isinstance(node.args[0], fx.Node) or "shape" not in node.args[0].meta or node.kwargs:
        return None
    dims = len(node.args[0].meta["shape"])

    def later(d: Any, many: int = dims) -> int:
        return (d % many) + 1

    if target is aten.permute.default:
        return target, ([0, *(later(d) for d in args[0])],)
    if target is aten.unsqueeze.default:
        return target, (later(args[0], dims + 1),)
    if target is aten.transpose.int:
        return target, (later(args[0]), later(args[1]))
    if target in _RESHAPED:
        return aten.reshape.default, ([count, *node.meta["shape"]],)
    if target is aten.expand.default:
        more = len(node.meta["shape"]) - dims
        return None if more else (target, ([count, *node.meta["shape"]],))
    return None
