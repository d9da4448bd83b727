"""Draws of a fitted guide and what they weigh, recorded once and made many at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pyro
import torch
from torch import Tensor

from ..capture import capture
from ..products import quick_products
from ..recorder import pure_graph
from .ascent import Leaves
from .batches import side_by_side
from .tightened import row_weights

if TYPE_CHECKING:
    from .paired import PairTarget

#: Bytes of data that one recorded call reads for all of its draws together: more would leave the cache.
WIDE = 4e6


def own_draws(target: PairTarget, leaves: Leaves, count: int, seconds: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`PairTarget.draws` with the rows of this rank."""
    with target.judging():
        return repeated_draws(target, leaves, count, seconds)


def repeated_draws(target: PairTarget, leaves: Leaves, count: int, seconds: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, once the rows are taken."""
    least = 100 if target.shared or target.batches.size is None else 5
    # Rows that are not all here answer when they are asked: their guide reads them.
    answered = [n for n in target.latents if n in target.shared] if target.look is not None else target.latents
    inputs = tuple(leaves.values())

    def one(*free: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), pyro.validation_enabled(False):
            ratio, values = target.log_ratio(dict(zip(leaves, free)))
        return (ratio, *(values[n].clone() for n in answered))

    if not target.sites:
        return repeated(lambda: one(*inputs), 1, seconds, names=answered)
    structure, problem = target.problem.structure, target.problem
    # Of all ranks' data: how many are drawn at once decides which random numbers each gets.
    own = problem.ranks.share == "own"
    size = structure.data_bytes * (problem.all_rows / max(1, structure.num_rows or 1) if own else 1.0)
    if target.judged is not None:
        size *= len(target.judged[0]) / max(1, structure.num_rows or 1)
    width = max(1, min(100, count, int(WIDE / max(1.0, size))))
    if width == 1 and least < 100:  # a recording would cost more runs over all rows than it saves
        return repeated(lambda: one(*inputs), count, seconds, least, answered)
    found = capture(one, inputs, random=True)
    if found.mode == "graph" and width > 1:
        try:
            many = quick_products(pure_graph(side_by_side(found.call, width, len(inputs)), inputs, random=True), inputs)
            parts = repeated(lambda: many(*inputs), -(-count // width), seconds, least, answered)
            return parts[0].flatten(0, 1)[:count], {n: v.flatten(0, 1)[:count] for n, v in parts[1].items()}
        except (RuntimeError, NotImplementedError):
            pass  # an operation without a batching rule
    return repeated(lambda: found.call(*inputs), count, seconds, least, answered)


def repeated(
    call: Callable[[], tuple[Tensor, ...]], count: int, seconds: float, least: int = 100, names: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Results of `count` calls stacked, of `least` where time is over: the first, and the others by name."""
    rows, began = [], time.perf_counter()
    for i in range(count):
        rows.append(call())
        if i + 1 >= least and time.perf_counter() - began > seconds:
            break
    parts = list(zip(*rows))
    return torch.stack(parts[0]), {n: torch.stack(p) for n, p in zip(names, parts[1:])}


def row_ratios(target: PairTarget, leaves: Leaves, count: int, seconds: float, most: int = 100) -> Tensor | None:
    """`PairTarget.row_ratios`: of at most `most` rows, spread over all."""
    if target.plate is None or target.shared or not target.sites or not target.batches.names:
        return None
    chosen = torch.linspace(0, target.batches.rows - 1, min(most, target.batches.rows)).round().long()
    rows, inputs = target.batches.among(chosen.to(target.problem.device)), tuple(leaves.values())

    def one(*free: Tensor) -> tuple[Tensor]:
        with torch.no_grad(), pyro.validation_enabled(False):
            return (row_weights(target, dict(zip(leaves, free)), rows),)

    found = capture(one, inputs, random=True)
    return repeated(lambda: found.call(*inputs), count, seconds)[0]
