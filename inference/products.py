"""Matrix products of a recorded graph by oneDNN where the linear algebra of this build leaves half of the processor idle.

PyTorch hands single-precision products on x86 to Intel's MKL, which runs its AVX2 kernels on processors of other makers even
where they have AVX-512: oneDNN, which comes with PyTorch too, was measured at twice the speed there. The choice depends on the
machine and on shapes alone, never on a clock, so that the same seed gives the same numbers.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .recorder import PureGraph

aten = torch.ops.aten

#: Multiplications of a product from which oneDNN's call, some 10 microseconds, pays.
LEAST = 2_000_000
#: Columns of the result from which it pays to copy a left factor that is stored by columns.
COLUMNS = 64


@cache
def onednn_is_faster() -> bool:
    """Whether this machine has AVX-512 that MKL leaves alone: a processor of another maker than Intel."""
    try:
        maker = Path("/proc/cpuinfo").read_text().split("vendor_id", 1)[1].split("\n", 1)[0]
    except (OSError, IndexError):  # no Linux, or no x86
        return False
    return (
        "Intel" not in maker
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def product() -> Any:
    """The operation (M, K), (K, N), bias (N,) or None -> (M, N); one that Inductor leaves whole."""
    # Inductor has a lowering of its own for oneDNN's operation, which only takes weights that never change.
    library = torch.library.Library("model_zoo", "DEF")
    library.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    library.impl("product", _by_onednn, "CPU")
    torch.library.register_fake("model_zoo::product", lambda a, b, bias: a.new_empty(len(a), b.shape[1]), lib=library)
    _KEPT.append(library)  # the operation goes with it
    return torch.ops.model_zoo.product.default


_KEPT: list[torch.library.Library] = []


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")


def pays(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN multiplies (M, K) by (K, N) faster."""
    (rows, inner), columns = a.shape, b.shape[1]
    single = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"
    return single and rows * inner * columns >= LEAST and (a.stride(1) == 1 or columns >= COLUMNS)


class _Products(fx.Interpreter):
    """One run of a graph, which notes the products that pay."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: set[str] = set()

    def run_node(self, node: fx.Node) -> Any:
        if node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs:
            *bias, a, b = self.fetch_args_kwargs_from_env(node)[0]
            if pays(a, b) and all(t.shape == b.shape[1:] and t.dtype == a.dtype for t in bias):
                self.found.add(node.name)
        return super().run_node(node)


def quick_products(graph: PureGraph, example: tuple[Tensor, ...]) -> PureGraph:
    """The graph with its large products by oneDNN; the same graph where none of them gains.

    Parameters
    ----------
    graph
        A recorded program that nobody will differentiate or batch any more.
    example
        Inputs of the shapes that it will be called with.
    """
    if not onednn_is_faster():
        return graph
    look = _Products(graph.module)
    with torch.no_grad():
        look.run(*example, *graph.constants)
    if not look.found:
        return graph
    nodes = copy.deepcopy(graph.module.graph)
    for node in list(nodes.nodes):
        if node.name in look.found:
            *bias, a, b = node.args
            with nodes.inserting_before(node):
                quick = nodes.call_function(product(), (a, b, bias[0] if bias else None))
            node.replace_all_uses_with(quick)
            nodes.erase_node(node)
    return PureGraph(fx.GraphModule({}, nodes), graph.constants)


__all__ = ["onednn_is_faster", "quick_products"]
