r"""Mixture components have no names: find out which sites share exchangeable components, and match them across draws.

Whether components are exchangeable is a fact about the log joint: permuting their axis in every site leaves it as it
was.  Chains are matched by their means, then single draws by assigning components to a reference whose mean and variance
are re-estimated (Stephens, *Dealing with label switching in mixture models*, JRSS B 2000, with a normal loss).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .joint import LogJoint

if TYPE_CHECKING:
    from .posterior import Posterior

Axes = dict[str, tuple[int, ...]]

#: Nats that renumbering one draw must gain: overlapping components are not told apart by chance.
SWAP = 10.0


def exchangeable_axes(joint: LogJoint) -> Axes:
    """Axes of the global sites that run over exchangeable states of a finite latent; {} where there are none.

    Axes count from the left of one value. The claim is tested: the log joint at a random point is the same after a
    random permutation of these axes.
    """
    structure = joint.structure
    sizes = sorted({s.states for s in structure.finite if s.states and 1 < s.states <= 64}, reverse=True)
    globals_ = [b for b in joint.blocks if not b.local]
    for size in sizes:
        options = []
        for block in globals_:
            axes = [i for i, n in enumerate(block.shape) if n == size]
            sets = [s for r in range(len(axes), -1, -1) for s in itertools.combinations(axes, r)]
            options.append(sets)
        if not any(len(o) > 1 for o in options):
            continue
        # All sites with one axis each come first: a square matrix rarely runs over components twice.
        combinations = sorted(
            itertools.islice(itertools.product(*options), 4096), key=lambda c: (-sum(map(bool, c)), sum(map(len, c)))
        )
        with joint.problem.scope(12345), torch.no_grad():
            point = joint.prior_draw()
            before = density_or_nan(joint, point)
            order = torch.roll(torch.arange(size), 1)
            swap = torch.arange(size)
            swap[:2] = torch.tensor([1, 0])
            for combination in combinations[:256]:
                found = {b.name: c for b, c in zip(globals_, combination) if c}
                if found and all(_same(before, density_or_nan(joint, permute(point, found, o))) for o in (order, swap)):
                    return found
    return {}


def density_or_nan(joint: LogJoint, values: Mapping[str, Tensor]) -> float:
    """Log joint density; NaN where the values make no sense (a permuted matrix need not be positive definite)."""
    try:
        return float(joint.density(values, joint.problem.sketch))
    except (RuntimeError, ValueError):
        return float("nan")


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-8 * (1 + abs(a))


def permute(values: Mapping[str, Tensor], axes: Axes, order: Tensor, lead: int = 0) -> dict[str, Tensor]:
    """Reorder the components of every site; `lead` batch dimensions stand before the value."""
    result = dict(values)
    for name, where in axes.items():
        for axis in where:
            result[name] = result[name].index_select(axis + lead, order.to(result[name].device))
    return result


def features(draws: Mapping[str, Tensor], axes: Axes) -> np.ndarray:
    """What tells components apart: (draws, components, features)."""
    parts = []
    for name, where in axes.items():
        value = draws[name].double().cpu()
        if len(where) > 1:  # transition matrices: the diagonal entry moves with its state
            value = value.diagonal(dim1=where[0] + 1, dim2=where[1] + 1)
            parts.append(value.reshape(len(value), -1, value.shape[-1]).transpose(1, 2).numpy())
        else:
            value = value.movedim(where[0] + 1, 1)
            parts.append(value.reshape(*value.shape[:2], -1).numpy())
    return np.concatenate(parts, -1)


def costs(found: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Negative normal log density of component j in the place of component k: (draws, places, components)."""
    spread = np.maximum(spread, 1e-9 * (1 + np.abs(centre)))
    gap = (found[:, None, :, :] - centre[None, :, None, :]) / spread[None, :, None, :]
    return 0.5 * (gap**2).sum(-1) + np.log(spread).sum(-1)[None, :, None]


def assign(found: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Permutation of components of every draw that suits the reference best: (draws, components)."""
    return np.stack([linear_sum_assignment(c)[1] for c in costs(found, centre, spread)])


def match_to(
    draws: Mapping[str, Tensor], axes: Axes, centre: np.ndarray, spread: np.ndarray, gain: float = 0.0
) -> dict[str, Tensor]:
    """Draws with their components in the order of the reference, where that gains more than `gain` nats."""
    result = {name: value.clone() for name, value in draws.items()}
    for s, cost in enumerate(costs(features(draws, axes), centre, spread)):
        order = linear_sum_assignment(cost)[1]
        if np.trace(cost) - cost[np.arange(len(order)), order].sum() > gain:
            one = permute({n: draws[n][s] for n in axes}, axes, torch.from_numpy(order))
            for name in axes:
                result[name][s] = one[name]
    return result


def match_chains(draws: Mapping[str, Tensor], axes: Axes, chains: int) -> dict[str, Tensor]:
    """One permutation for each chain, so that its means suit those of the first: chains rarely swap labels on the way."""
    parts = [{n: v.reshape(chains, -1, *v.shape[1:])[c] for n, v in draws.items()} for c in range(chains)]
    first = features(parts[0], axes)
    centre, spread = first.mean(0), first.std(0)
    for c in range(1, chains):
        order = assign(features(parts[c], axes).mean(0, keepdims=True), centre, spread)[0]
        parts[c] = permute(parts[c], axes, torch.from_numpy(order), lead=1)
    return {n: torch.cat([p[n] for p in parts]) for n in draws}


def match_labels(posterior: Posterior) -> tuple[dict[str, Tensor], Axes]:
    """Draws with components matched and ordered by their weight or first feature, and the axes that were matched."""
    if not posterior.draws or not posterior.structure.finite:
        return posterior.draws, {}
    axes = exchangeable_axes(posterior.joint)
    if not axes:
        return posterior.draws, {}
    draws = dict(posterior.draws)
    if posterior.kind == "samples" and posterior.num_draws > 1:  # a guide has one numbering throughout
        draws = match_chains(draws, axes, posterior.chains)
        for _ in range(3):
            found = features(draws, axes)
            draws = match_to(draws, axes, found.mean(0), found.std(0), gain=SWAP)
    if posterior.extra.get("keep_labels"):
        return draws, axes
    order = torch.from_numpy(np.argsort(ordering_key(draws, axes), kind="stable"))
    return permute(draws, axes, order, lead=1), axes


def ordering_key(draws: Mapping[str, Tensor], axes: Axes) -> np.ndarray:
    """First entry of the first site with more than weights to tell: components are listed by it."""
    means = features(draws, axes).mean(0)
    first = 1 if means.shape[-1] > 1 and next(iter(axes.values())) == (0,) else 0
    return means[:, first]
