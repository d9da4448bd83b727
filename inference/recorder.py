"""Write down what a program does to tensors: one pure graph of operations, without mutation, aliases or constant parts."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .session import put_back, random_streams
from .side_by_side import SideBySide

aten = torch.ops.aten


#: Operations that leave a tensor as it is where its shape is already right.
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.alias.default)


class CaptureError(RuntimeError):
    """The function is no fixed sequence of tensor operations; the text is the reason."""


class _Written(Exception):
    """The program writes into a tensor that matters: it has to be made functional first."""


def pure_graph(
    fn: Callable[..., Any], example: tuple[Tensor, ...], *, random: bool = False, differentiable: bool = False
) -> PureGraph:
    """`fn` as a graph of aten operations; what does not depend on the inputs has been computed once.

    Parameters
    ----------
    fn
        Tensors to a tensor or nested tuples of tensors. It runs once here; tensors that it closes over are constants.
    example
        Inputs of the shapes and types that the graph will be called with.
    random
        Whether it may draw random numbers; they then come from torch's global generator at every call.
    differentiable
        Whether the graph will be differentiated. If not it runs without gradients, and `fn` may take gradients itself.

    Returns
    -------
    A callable of the same inputs. Where a matrix factorisation fails it returns NaN instead of raising.

    Raises
    ------
    CaptureError
        The function looks at values of its inputs, or draws random numbers although `random` is False.
    """
    example = tuple(e.detach().clone() for e in example)
    streams = random_streams()
    try:
        with pyro.validation_enabled(False), torch.set_grad_enabled(not differentiable):
            try:
                recorder, out = _record(fn, example)
            except _Written:
                put_back(streams)
                recorder, out = _record(torch.func.functionalize(fn), example)
    except _Written:
        raise CaptureError("the story writes into a tensor in a way that cannot be undone") from None
    finally:
        put_back(streams)
    return recorder.finish(out, random, differentiable)


def _record(fn: Callable[..., Any], example: tuple[Tensor, ...]) -> tuple[_Recorder, Any]:
    with _Recorder(example) as recorder:
        out = fn(*example)
        return recorder, out


class _Recorder(TorchDispatchMode):
    """Record operations that depend on the inputs; all others run here, once, and leave constants.

    Only tensors that do not depend on the inputs may be looked at (`if`, `.item()`).
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self._nodes: dict[int, fx.Node] = {}  # by identity of tensors that depend on the inputs
        self._inputs: dict[int, fx.Node] = {}  # the same for constants, which become further inputs
        self._states: dict[Any, Tensor] = {}  # the first of all tables that list the same states
        self._places: set[int] = set()  # memory of the constants
        self._users: defaultdict[int, list[Tensor]] = defaultdict(list)  # recorded tensors by memory
        self._alive: list[Tensor] = []  # holds every tensor, so that no identity is used twice
        self._siblings: dict[int, list[Tensor]] = {}
        self._rows: dict[int, tuple[Tensor, ...]] = {}  # numbers of the cells under a constant mask
        for i, tensor in enumerate(inputs):
            self._last = self.graph.placeholder(f"input_{i}")
            self._note(tensor, self._last)

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        if id(tensor) not in self._nodes:
            self._alive.append(tensor)
            self._users[_place(tensor)].append(tensor)
        self._nodes[id(tensor)] = node
        node.meta["shape"] = tuple(tensor.shape)

    def _name(self, leaf: Any) -> Any:
        """The node of a tensor; what is no tensor stands for itself."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self._nodes:
            return self._nodes[id(leaf)]
        states = getattr(leaf, "_listed_states", None)
        if (
            id(leaf) not in self._inputs and states is not None
        ):  # every site that is summed out brings a table of its own
            first = self._states.setdefault(states, leaf)
            if first is not leaf:
                self._places.add(_place(leaf))
                self._alive.append(leaf)
                self._inputs[id(leaf)] = self._name(first)
        if id(leaf) not in self._inputs:
            with self.graph.inserting_after(self._last):
                self._last = self._inputs[id(leaf)] = self.graph.placeholder(f"constant_{len(self.constants)}")
            self._last.meta["shape"] = tuple(leaf.shape)
            self.constants.append(leaf.detach())
            self._places.add(_place(leaf))
            self._alive.append(leaf)
        return self._inputs[id(leaf)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        depends = any(id(t) in self._nodes for t in given)
        if func._schema.is_mutable and (depends or any(_place(t) in self._places for t in given)):
            return self._write(func, args, kwargs)
        depends = depends and any(id(t) in self._nodes and t.numel() for t in given)  # nothing depends on no numbers
        if not depends and not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        if self._looks(func, args):
            raise CaptureError(
                "the story looks at the value of a latent (if, while, float(...), .item()): each value could take "
                "another path"
            )
        out = func(*args, **kwargs)
        if func is aten._linalg_check_errors.default:
            self._guard(args[0])
            return out
        if isinstance(out, Tensor) and func in _RESHAPES and isinstance(args[0], Tensor) and same_layout(out, args[0]):
            self._note(out, self._name(args[0]))
            return out
        node = self._called(func, args, kwargs)
        if isinstance(out, Tensor):
            self._note(out, node)
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                self._note_part(part, node, i)
            for part in tensors_in(out):
                self._siblings[id(part)] = tensors_in(out)
        return out

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An in-place operation on a whole tensor: the new value of every recorded tensor that is the same memory."""
        name = func._schema.name.removeprefix("aten::")
        pure = getattr(getattr(aten, name.rstrip("_"), None), func._overloadname, None)
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        target = args[0] if args else None
        if not isinstance(target, Tensor) or id(target) not in self._nodes:
            raise _Written
        users = self._users[_place(target)]
        whole = all(_geometry(user) == _geometry(target) for user in users)
        if pure is None or not name.endswith("_") or len(written) != 1 or not whole:
            raise _Written
        node = self._called(pure, args, kwargs)
        out = func(*args, **kwargs)
        for user in users:
            self._nodes[id(user)] = node
        return out

    def _looks(self, func: Any, args: Any) -> bool:
        """Whether an operation leaves the tensors: a number, or a shape that depends on values."""
        if func is aten.index.Tensor:
            masks = [t for t in tensors_in(args[1]) if t.dtype in (torch.bool, torch.uint8)]
            return any(id(t) in self._nodes for t in masks)
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags

    def _called(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        """The node of an operation."""
        made = stand_in(func, args)
        if made in (aten.index.Tensor, aten.index_put.default):
            args = (args[0], self._numbered(args[1]), *args[2:])
        return self.graph.call_function(made, tree_map(self._name, args), tree_map(self._name, kwargs))

    def _numbered(self, indices: Any) -> list[Any]:
        """Indices without masks: a mask has to be counted at every call, and on a card the processor waits for that."""
        found: list[Any] = []
        for index in indices:
            if (
                not isinstance(index, Tensor)
                or index.dtype not in (torch.bool, torch.uint8)
                or id(index) in self._nodes
            ):
                found.append(index)
                continue
            if id(index) not in self._rows:
                self._alive.append(index)
                self._rows[id(index)] = tuple(p.contiguous() for p in index.nonzero(as_tuple=True))
            found += self._rows[id(index)]
        return found

    def _note_part(self, part: Any, node: fx.Node, *path: int) -> None:
        for i in path:
            node = self.graph.call_function(_part, (node, i))
        if isinstance(part, Tensor):
            self._note(part, node)
        elif isinstance(part, (tuple, list)):
            for i, inner in enumerate(part):
                self._note_part(inner, node, i)

    def _guard(self, info: Tensor) -> None:
        """From here on what came with `info` is NaN where the factorisation failed."""
        if id(info) not in self._siblings:
            raise CaptureError("a factorisation reports failure in a way that is not known")
        for part in self._siblings[id(info)]:
            if part.is_floating_point():
                self._nodes[id(part)] = self.graph.call_function(nan_unless_ok, (self._name(part), self._name(info)))

    def _known(self) -> dict[fx.Node, Tensor]:
        """Constants by their placeholders."""
        return {n: self.constants[int(n.name.removeprefix("constant_"))] for n in set(self._inputs.values())}

    def finish(self, out: Any, random: bool, differentiable: bool) -> PureGraph:
        """The recorded graph as a function of the inputs."""
        self.graph.output(tree_map(self._name, out))
        if not differentiable:
            for node in list(self.graph.nodes):
                if node.target in (aten.detach.default, aten.alias.default):
                    node.replace_all_uses_with(node.args[0])
                elif node.target is aten.t.default and getattr(node.args[0], "target", None) is aten.t.default:
                    node.replace_all_uses_with(node.args[0].args[0])  # derivatives of matrix products turn twice
        merge_repeats(self.graph)
        if differentiable:
            SideBySide(self.graph, self._known(), self._name).rewrite()
            merge_repeats(self.graph)
        sum_slices(self.graph)

        def kept(node: fx.Node) -> bool:
            """Numbers that are drawn and not used (a start that is known by then) move the stream for those after them."""
            if node.op in ("placeholder", "output"):
                return True
            return random and node.op == "call_function" and _draws(node.target, node.args, node.kwargs)

        self.graph.eliminate_dead_code(kept)
        drawn = [n for n in self.graph.nodes if n.op == "call_function" and _draws(n.target, n.args, n.kwargs)]
        if drawn and not random:
            raise CaptureError(f"the story draws random numbers outside its sample sites ({drawn[0].target})")
        return PureGraph(fx.GraphModule({}, self.graph), self.constants, differentiable)


@dataclass(frozen=True, eq=False)
class PureGraph:
    """A recorded program: `module` takes the inputs and then the `constants`."""

    module: fx.GraphModule
    constants: list[Tensor]
    differentiable: bool = False

    def __call__(self, *args: Tensor) -> Any:
        # Every operation names its device already: what fills devices in (the context of a fit on a card) would only take time.
        plain = torch._C.DisableTorchFunction() if torch._C._is_torch_function_mode_enabled() else nullcontext()
        with plain, torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.module.forward(*args, *self.constants)

    def at_home(self) -> PureGraph:
        """The same program on the processor."""

        def home(leaf: Any) -> Any:
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        module = copy.deepcopy(self.module)
        for node in module.graph.nodes:
            node.args, node.kwargs = tree_map(home, node.args), tree_map(home, node.kwargs)
        module.recompile()
        return PureGraph(module, [c.cpu() for c in self.constants], self.differentiable)


def merge_repeats(graph: fx.Graph) -> None:
    """Let every operation on the same operands run once; draws stay as many as they are."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _draws(node.target, node.args, node.kwargs):
            continue
        leaves, shape = tree_flatten((node.args, node.kwargs))
        # 1, 1.0 and True are equal and no replacement for each other
        key = (node.target, str(shape), tuple((type(leaf), leaf) for leaf in leaves))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def sum_slices(graph: fx.Graph) -> None:
    """Let what is summed along a slice not be set among zeros first: the slope of one row of a table that repeats it."""
    for node in graph.nodes:
        padded: Any = node.args[0] if node.target is aten.sum.dim_IntList else None
        if not isinstance(padded, fx.Node) or padded.target is not aten.slice_backward.default:
            continue
        dims: Any = node.args[1] or ()
        part, sizes, dim, *_ = cast(Any, padded.args)
        if dim % len(sizes) in {d % len(sizes) for d in dims}:
            node.replace_input_with(padded, part)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold their numbers in the same order under the same shape."""
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _place(tensor: Tensor) -> int:
    """Identity of a tensor's memory, shared by its views."""
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    """Which cells of its memory a tensor shows, and as what."""
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws random numbers; dropout in evaluation and the like are tagged so, yet do not."""
    if func in (normal_like, uniform_like):
        return True
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    given = {**dict(zip((a.name for a in func._schema.arguments), args)), **kwargs}
    return not (given.get("train") is False or given.get("p") == 0 or given.get("dropout_p") == 0)


def _part(parts: Any, index: int) -> Any:
    return parts[index]


def chosen(old: Tensor, indices: Any, value: Tensor, accumulate: bool = False) -> Tensor:
    """`old[mask] = value` of one number: a choice, which many draws can make side by side."""
    return torch.where(indices[0], value, old)


def is_choice(old: Tensor, indices: Any, value: Tensor, accumulate: bool = False) -> bool:
    """Whether an assignment puts one number under a mask."""
    mask = indices[0]
    whole = mask is not None and mask.dtype == torch.bool and mask.shape == old.shape
    return whole and len(indices) == 1 and not accumulate and value.ndim == 0


def filled_with(old: Tensor, new: Tensor, non_blocking: bool = False) -> Tensor:
    """`new` in the shape and type of `old`; aten::copy itself has neither a derivative nor a batching rule."""
    return new.to(old.dtype).expand_as(old)


def normal_like(like: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
    """`like.normal_()` without writing into `like`, which a batch of calls would share."""
    return torch.randn_like(like) * std + mean


def uniform_like(like: Tensor, low: float = 0.0, high: float = 1.0, generator: Any = None) -> Tensor:
    """`like.uniform_()` without writing into `like`."""
    return torch.rand_like(like) * (high - low) + low


def logits_cross_entropy(
    logits: Tensor, target: Tensor, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Tensor:
    """Cross entropy without the writes into a temporary that a batched call makes."""
    if weight is not None or pos_weight is not None:
        return aten.binary_cross_entropy_with_logits.default(logits, target, weight, pos_weight, reduction)
    loss = (1 - target) * logits - torch.nn.functional.logsigmoid(logits)
    return (loss, loss.mean(), loss.sum())[reduction]


#: What stands in a graph for an operation that can be neither differentiated nor batched.
STAND_INS: dict[Any, Callable[..., Tensor]] = {
    aten.copy.default: filled_with,
    aten.binary_cross_entropy_with_logits.default: logits_cross_entropy,
    aten.normal_.default: normal_like,
    aten.uniform_.default: uniform_like,
}


def stand_in(func: Any, args: Any) -> Any:
    """What is recorded for an operation on these operands."""
    if func is aten.index_put.default and is_choice(*args):
        return chosen
    return STAND_INS.get(func, func)


def nan_unless_ok(value: Tensor, info: Tensor) -> Tensor:
    """`value` (..., D, D) or (..., D) where `info` (...) is 0, NaN elsewhere."""
    fine = info.eq(0)
    return torch.where(fine.reshape(fine.shape + (1,) * (value.ndim - fine.ndim)), value, float("nan"))
