"""From a graph to a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .memory import TYPES, Value
from .operations import translate_node
from .program import Program, baked, solid


def translate(graph: fx.GraphModule, example: tuple[Tensor, ...], name: str = "potential") -> tuple[str, int]:
    """C of a graph (position, *constants) -> (value, gradient), and the size of its arena in bytes.

    Parameters
    ----------
    graph
        Made of aten operations on tensors of fixed shapes.
    example
        Inputs, of which shape, type and strides matter; the first is the position.
    name
        Of the C function.

    Raises
    ------
    NotTranslated
        An operation has no translation.
    """
    program = Program()
    facts: dict[fx.Node, Any] = {}
    Facts(graph, facts).run(*example)
    known: dict[fx.Node, Any] = {}
    inputs = iter(range(len(example)))
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            i = next(inputs)
            known[node] = entry(program, example[i], i)
        elif node.op == "get_attr":
            known[node] = baked(program, getattr(graph, node.target))
        elif node.op == "output":
            value, gradient = (solid(program, known[n]) for n in node.args[0])
            return program.source((value, gradient), name)
        else:
            args = map_arg(node.args, lambda n: known[n])
            kwargs = map_arg(node.kwargs, lambda n: known[n])
            program.inputs = [f for n in node.all_input_nodes if isinstance(f := facts[n], Tensor)]
            known[node] = translate_node(program, node.target, args, kwargs, facts[node])
    raise AssertionError("a graph has an output")


class Facts(fx.Interpreter):
    """Runs a graph once and notes shape, type and layout of everything."""

    def __init__(self, graph: fx.GraphModule, facts: dict[fx.Node, Any]) -> None:
        super().__init__(graph)
        self._facts = facts

    def run_node(self, node: fx.Node) -> Any:
        """As the interpreter does, with a note."""
        with torch.no_grad():
            out = super().run_node(node)
        self._facts[node] = torch.utils._pytree.tree_map_only(Tensor, layout_of, out)
        return out


def layout_of(tensor: Tensor) -> Tensor:
    """The same tensor without its numbers."""
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def entry(program: Program, tensor: Tensor, number: int) -> Value:
    """An input: the position is float64 for the caller whatever the story's precision, others are as they are."""
    if number == 0:
        q = Value(program.buffer(torch.float64, tensor.numel(), "q"), layout_of(tensor.double()))
        if tensor.dtype == torch.float64:
            return q
        out = program.pointwise("{0}", [q], tensor.shape, tensor.dtype)
        assert isinstance(out, Value)
        return out
    source = f"(const {TYPES.get(tensor.dtype, 'void')} *)inputs[{number - 1}]"
    return Value(program.buffer(tensor.dtype, tensor.numel(), source), layout_of(tensor))
