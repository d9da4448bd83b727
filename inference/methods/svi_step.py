"""How a training step runs: as its program, as a recorded graph, as that graph compiled by Inductor, or on a card as a CUDA
graph.

A faster form is trusted only after its loss and gradients agree with the slower one under the same seed, and every form
that was passed over leaves its reason.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture import Captured, check_agreement, reason_of
from ..products import quick_products
from ..recorder import PureGraph
from ..session import isolated
from .cuda_graphs import graphed

#: Reason of a step that was asked to run as its program.
ASKED = "mode='eager' was asked for"
#: Seconds that all steps of a graph must take before "auto" tries Inductor, which compiles for 10 to 40 s.
WORTH = 120.0
#: Time of a compiled step, relative to the graph's, above which the graph stays.
PAYS = 0.9
#: Calls of either side in the pilot.
PILOT = 7


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler: $CXX, else g++, clang++ or c++."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++", "c++"))


def pilot(call: Callable[..., Any], example: Sequence[Tensor]) -> float:
    """Median seconds of one call."""
    times = []
    for _ in range(PILOT):
        began = time.perf_counter()
        call(*example)
        if example[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def with_quick_products(
    graph: Callable[..., Any], example: tuple[Tensor, ...], points: Sequence[tuple[Tensor, ...]]
) -> Callable[..., Any]:
    """The graph with other kernels for its matrix products, where they gain and agree."""
    if not isinstance(graph, PureGraph):
        return graph
    with isolated(0, torch.get_default_dtype()):
        quick = quick_products(graph, example)
    try:
        for seed, point in enumerate((example, *points) if quick is not graph else ()):
            check_agreement(quick, graph, point, seed)
    except (RuntimeError, NotImplementedError):  # a build of PyTorch whose kernel is another one: nothing is lost
        return graph
    return quick


def faster(
    graph: Callable[..., Any], example: tuple[Tensor, ...], points: Sequence[tuple[Tensor, ...]], mode: str, steps: int
) -> Captured:
    """The recorded step, compiled where that is asked for ("inductor") or pays ("auto").

    Parameters
    ----------
    graph
        A recorded step.
    example, points
        Inputs at which graph and compiled step must agree under one seed.
    mode
        As in `SVI`; "eager" and "graph" leave the graph as it is.
    steps
        Calls that are to come.

    Returns
    -------
    The step, its mode ("graph", "inductor" or "cudagraph") and why a faster form was passed over.
    """
    if mode == "cudagraph" or (mode == "auto" and example[0].is_cuda):
        # One launch in place of hundreds is not held against a clock, so that the same seed gives the same bits.
        on_card = graphed(graph, example, points)
        return on_card if on_card.mode == "cudagraph" else Captured(graph, "graph", on_card.reason)
    graph = with_quick_products(graph, example, points)
    if mode not in ("auto", "inductor"):
        return Captured(graph, "graph")
    if not isinstance(graph, PureGraph):
        return Captured(graph, "graph", "Inductor: this step is no single graph")
    with isolated(0, torch.get_default_dtype()):
        before = pilot(graph, example)
    if mode == "auto" and before * steps < WORTH:
        return Captured(graph, "graph")
    if not has_compiler():
        return Captured(graph, "graph", "Inductor: no C++ compiler is installed (g++, clang++ or $CXX)")
    try:
        # With Inductor's own random numbers the same seed would give another answer than the graph.
        built: Any = torch.compile(graph.module, dynamic=False, options={"fallback_random": True})

        def call(*inputs: Tensor) -> Any:
            with torch.no_grad():
                return built(*inputs, *graph.constants)

        for seed, point in enumerate((example, *points)):
            check_agreement(call, graph, point, seed)
        with isolated(0, torch.get_default_dtype()):
            share = pilot(call, example) / before
    except Exception as error:  # compilers of other people's graphs fail in any way
        return Captured(graph, "graph", f"Inductor: {reason_of(error)}")
    if mode == "auto" and share > PAYS:
        return Captured(graph, "graph", f"Inductor: a compiled step takes {share:.2f} of the graph's time")
    return Captured(call, "inductor")


__all__ = ["ASKED", "faster", "has_compiler"]
