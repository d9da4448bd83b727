"""Variational inference over ranks: each holds some of the rows, and all of them climb one objective in step.

A rank's estimate is G + (N / n) R: what belongs to no row, and its own n rows speaking for all N.  Averaged with the weights
n / N these are G + the sum over all rows, and so are their gradients: shards need not be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed import Ranks

if TYPE_CHECKING:
    from ..problem import Problem
    from .ascent import Leaves
    from .batches import Density
    from .paired import PairTarget


class SharedDensity:
    """The density of the rows of all ranks, each giving that of its own; see `Density` and `Ranks.mean`.

    Parameters
    ----------
    own
        Of this rank's rows, with a weight that lets them speak for all.
    """

    def __init__(self, own: Density, ranks: Ranks) -> None:
        self.own, self.ranks = own, ranks
        self.mode, self.reason = own.mode, own.reason

    def __call__(self, z: Tensor, points: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Density`."""
        values, by_z, by_points = self.ranks.mean(*self.own(z, points, *rows))
        return values, by_z, by_points

    def at(self, z: Tensor, points: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Density.at`."""
        value, by_z, by_points = self.ranks.mean(*self.own.at(z, points, *rows))
        return value, by_z, by_points

    def values(self, z: Tensor, points: Tensor, *rows: Tensor, chunk: int = 128) -> Tensor:
        """As `Density.values`, of this rank alone."""
        return self.own.values(z, points, *rows, chunk=chunk)


# -- a story's own guide -----------------------------------------------------------------------------------------------


def in_step(target: PairTarget, leaves: Leaves) -> Leaves:
    """The first rank's start on every rank, but for parameters that have a value a row.

    Rows have noise of their own, which no two ranks share; draws that all rows hang on are the same on every rank.
    """
    ranks, device = target.problem.ranks, target.problem.device
    if not ranks.shares_rows:
        return leaves
    told = ranks.first({n: v.cpu() for n, v in leaves.items() if not target.by_row(n)})
    own_noise(target.problem)
    return {n: told[n].to(device) if n in told else v for n, v in leaves.items()}


def own_noise(problem: Problem) -> None:
    """Random streams in step; apart where rows draw latents of their own."""
    ranks = problem.ranks
    torch.set_rng_state(ranks.first(torch.get_rng_state()))
    if problem.device.type == "cuda":
        torch.cuda.set_rng_state(ranks.first(torch.cuda.get_rng_state(problem.device)), problem.device)
    if problem.structure.continuous_locals:
        torch.manual_seed(int(torch.randint(2**31, ())) + ranks.rank)


def whole_norm(target: PairTarget, norm: Tensor, gradients: Leaves) -> Tensor:
    """Length of a gradient of which every rank holds what belongs to its rows."""
    own = [g for n, g in gradients.items() if target.by_row(n)]
    if not own or not target.problem.ranks.shares_rows:
        return norm
    here = torch.stack([(g * g).sum() for g in own]).sum()
    return (norm**2 - here + target.problem.ranks.add(here)[0]).clamp_min(0).sqrt()


def of_all_ranks(target: PairTarget, value: Tensor, gradients: Leaves) -> tuple[Tensor, Leaves]:
    """Value and gradient with the rows of all ranks: one message a step."""
    ranks = target.problem.ranks
    if not ranks.shares_rows:
        return value, gradients
    names = [n for n in gradients if not target.by_row(n)]
    value, *shared = ranks.mean(value, *(gradients[n] for n in names))
    found = dict(zip(names, shared, strict=True))
    return value, {n: found[n] if n in found else ranks.weight * g for n, g in gradients.items()}


def joint_draws(
    target: PairTarget, draw: Callable[[], tuple[Tensor, dict[str, Tensor]]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws of which every rank makes its rows' part, as many as the slowest rank has made, with the weights of the whole."""
    ranks = target.problem.ranks
    if not ranks.shares_rows:
        return draw()
    own_noise(target.problem)
    ratio, values = draw()
    count = min(ranks.gather(len(ratio)))
    return ranks.mean(ratio[:count])[0], {n: v[:count] for n, v in values.items()}


def whole_draws(problem: Problem, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws (S, ...) of latents in the rows, put together from the ranks that shared one table out."""
    ranks, structure = problem.ranks, problem.structure
    if not ranks.shares_rows or ranks.share != "split":
        return draws
    found = {}
    for name, value in draws.items():
        if name in structure and structure[name].local and value.dim() > 1:
            axis = 1 + structure[name].plates.index(structure.data_plate or "")
            value = torch.cat(ranks.gather(value), axis)
        found[name] = value
    return found


def whole_parameters(target: PairTarget, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of parameters, those of the rows put together as `whole_draws` does."""
    ranks = target.problem.ranks
    if not ranks.shares_rows or ranks.share != "split":
        return values
    return {n: torch.cat(ranks.gather(v)) if target.by_row(n) else v for n, v in values.items()}
