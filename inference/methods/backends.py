"""What evaluates the gradient and moves the chains: machine code, the captured graph, or the story itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..compiled import Compiled, NotCompiled, build, find, graph_of, sampler

if TYPE_CHECKING:
    from ..capture import ValueAndGrad

#: Gradients of an iteration where nothing is known yet.
GRADIENTS = 10
#: Seconds that building takes: at all, and for every operation of the captured graph.
BUILDING, EACH = 0.3, 1.5e-3
#: Seconds that the graph takes for every operation, and for every number that one makes.
OPERATION, NUMBER = 2.7e-6, 0.7e-9


@dataclass(frozen=True)
class Backend:
    """The back end that was chosen.

    Attributes
    ----------
    name
        "compiled", "graph" or "eager".
    reason
        Why it is this one.
    code
        The machine code; None without.
    notice
        What the user might do about it: a warning of the answer; empty where nothing is amiss.
    """

    name: str
    reason: str
    code: Compiled | None = None
    notice: str = ""

    @property
    def text(self) -> str:
        """For the diagnostics."""
        return f"{self.name}: {self.reason}" if self.reason else self.name


def choose_backend(
    potential: ValueAndGrad, wanted: str, iterations: int, budget: float | None = None, deepest: int = 0
) -> Backend:
    """The fastest way that there is, or the one that is wanted.

    Parameters
    ----------
    potential
        The captured log density.
    wanted
        One of "auto", "compiled", "graph", "eager".
    iterations
        Of one chain: very few do not pay for building machine code.
    budget
        Seconds that the whole run may take.
    deepest
        Doublings of a trajectory that are allowed.

    Raises
    ------
    ValueError
        The wanted back end is impossible here; the reason is named.
    """
    from .native import DEEPEST

    if wanted == "eager":
        return Backend("eager", "as wanted")
    if wanted == "graph":
        if potential.mode != "graph":
            raise ValueError(f"NUTS(backend='graph') is impossible: {potential.reason}. Use backend='auto'")
        return Backend("graph", "as wanted")
    try:
        if deepest > DEEPEST:
            raise NotCompiled(f"max_depth is beyond {DEEPEST}")
        if wanted == "auto":
            # By counting, not by a clock or by what the cache holds: the same seed is to give the same bits.
            seconds, building = work(potential, iterations)
            if budget is not None:
                seconds, building = min(seconds, budget), 2.0 * building
            if seconds < building:
                return Backend("graph", f"about {seconds:.1g} s of work do not pay for building machine code")
        code = find(potential) or build(potential)
        sampler()
    except NotCompiled as error:
        if wanted == "compiled":
            raise ValueError(f"NUTS(backend='compiled') is impossible: {error}. Use backend='auto'") from None
        notice = f"NUTS runs slowly: {error}" if "C compiler" in str(error) else ""
        return Backend(potential.mode, str(error), notice=notice)
    return Backend("compiled", "built now" if code.fresh else "from the cache", code)


class Counted(torch.fx.Interpreter):
    """Runs a graph and counts the numbers that its operations make."""

    numbers = 0

    def run_node(self, n: torch.fx.Node) -> Any:
        """As of the parent."""
        found = super().run_node(n)
        self.numbers += sum(t.numel() for t in tree_leaves(found) if isinstance(t, Tensor))
        return found


def numbers_of(potential: ValueAndGrad) -> int:
    """Numbers that the operations of one gradient make."""
    graph = graph_of(potential)
    run = Counted(graph.module)
    with torch.no_grad():
        run.run(potential.points[0], *graph.constants)
    return run.numbers


def work(potential: ValueAndGrad, iterations: int) -> tuple[float, float]:
    """Seconds that the graph would need for all iterations, and that building would take, by a count of what is done."""
    operations = len(graph_of(potential).module.graph.nodes)
    gradient = OPERATION * operations + NUMBER * numbers_of(potential)
    return 1.3 * GRADIENTS * iterations * gradient, BUILDING + EACH * operations
