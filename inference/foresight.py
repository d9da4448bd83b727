"""What a method would take, told before it runs: a comparison must end, and say why a row of its table is empty."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from .data import take_rows
from .errors import DivergenceError
from .lazy_rows import too_many
from .methods import resolve
from .sharing import fewer_rows

if TYPE_CHECKING:
    from .methods.base import Method
    from .problem import Problem

#: Seconds that a sampler may be expected to take in a comparison that names no budget.
LONGEST = 600.0
#: Rows of which a gradient is timed where there are more: what it costs grows with them.
TIMED_ROWS = 5_000
#: Excess of the first estimate up to which machine code is made and timed before a sampler is left out.
NEAR = 10.0


def part(problem: Problem, count: int = TIMED_ROWS) -> tuple[Problem, float]:
    """The problem with its first `count` rows, and how many times as many there are; itself where there are fewer."""
    structure = problem.structure
    rows, names = structure.num_rows or 0, structure.row_arguments
    if not names or rows <= count or any(s.local for s in structure.learned):
        return problem, 1.0
    cut = problem.over(take_rows(problem.kwargs, names, slice(0, count)))
    sites = tuple(fewer_rows(s, cut.structure, rows) for s in cut.structure.sites)
    return replace(cut, structure=replace(cut.structure, sites=sites, _by_name={})), rows / count


def too_long(problem: Problem, method: Method) -> str:
    """Why a comparison without a budget leaves a sampler out; empty where it does not, or where the user configured it.

    The gradient of the story is timed as it is, and where that decides too little, as the sampler will have it.
    """
    if getattr(method, "spreads", "") != "chains" or method != resolve(method.name) or too_many(problem.kwargs):
        return ""  # of tables that are read piece by piece the method itself says that it needs all rows at once
    if not method.check(problem.structure).applies:
        return ""
    from .fit import GRADIENTS, captured, pilot
    from .replica import CAPTURED

    try:
        seconds, each = pilot(problem)[0], 0.0
        if LONGEST < seconds <= NEAR * LONGEST:
            began = time.perf_counter()
            each = captured(problem)
            if time.perf_counter() - began < LONGEST:
                seconds = min(seconds, each * GRADIENTS * CAPTURED)
    except (ValueError, DivergenceError):
        return ""  # the method will say what is wrong
    if seconds <= LONGEST:
        return ""
    name = method.name.upper()
    return (
        f"{name} would take about {in_words(seconds)}, by a timed gradient, and a comparison waits {in_words(LONGEST)}; "
        f"compare(..., budget=seconds) runs it for so long, and a method that you configure yourself runs to its end"
    )


def in_words(seconds: float) -> str:
    """A duration."""
    for size, word in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {word}"
    return f"{seconds:.0f} s"
