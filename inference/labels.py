r"""Mixture components have no names: find out which sites share exchangeable components, and match them across draws.

Whether components are exchangeable is a fact about the log joint: permuting their axis in every site leaves it as it
was.  Draws are matched by assigning components to a reference, mean and variance of which are re-estimated from the
matched draws (Stephens, *Dealing with label switching in mixture models*, JRSS B 2000, algorithm 2 with a normal loss).
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


def assign(found: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Permutation of components of every draw that suits the reference best: (draws, components)."""
    spread = np.maximum(spread, 1e-9 * (1 + np.abs(centre)))
    gap = (found[:, None, :, :] - centre[None, :, None, :]) / spread[None, :, None, :]
    cost = 0.5 * (gap**2).sum(-1) + np.log(spread).sum(-1)[None, :, None]
    return np.stack([linear_sum_assignment(c)[1] for c in cost])


def match_to(draws: Mapping[str, Tensor], axes: Axes, centre: np.ndarray, spread: np.ndarray) -> dict[str, Tensor]:
    """Draws with their components in the order of the reference."""
    orders = assign(features(draws, axes), centre, spread)
    result = {name: value.clone() for name, value in draws.items()}
    for s, order in enumerate(orders):
        if (order != np.arange(len(order))).any():
            one = permute({n: draws[n][s] for n in axes}, axes, torch.from_numpy(order))
            for name in axes:
                result[name][s] = one[name]
    return result


def match_labels(posterior: Posterior) -> tuple[dict[str, Tensor], Axes]:
    """Draws with components matched and ordered by their weight or first feature, and the axes that were matched."""
    if not posterior.draws or not posterior.structure.finite:
        return posterior.draws, {}
    axes = exchangeable_axes(posterior.joint)
    if not axes:
        return posterior.draws, {}
    draws = {n: v for n, v in posterior.draws.items()}
    found = features(draws, axes)
    if len(found) > 1 and posterior.kind != "variational":  # a guide has one numbering throughout
        reference = found[len(found) // 2]
        pooled = found.reshape(-1, found.shape[-1]).std(0) + 1e-9
        centre, spread = reference, np.broadcast_to(pooled, reference.shape)
        for _ in range(5):
            matched = match_to(draws, axes, centre, spread)
            again = features(matched, axes)
            centre, spread = again.mean(0), again.std(0)
            stable = all(torch.equal(matched[n], draws[n]) for n in axes)
            draws = matched
            if stable:
                break
    if posterior.extra.get("keep_labels"):
        return draws, axes
    order = torch.from_numpy(np.argsort(ordering_key(draws, axes), kind="stable"))
    return permute(draws, axes, order, lead=1), axes


def ordering_key(draws: Mapping[str, Tensor], axes: Axes) -> np.ndarray:
    """First entry of the first site with more than weights to tell: components are listed by it."""
    means = features(draws, axes).mean(0)
    first = 1 if means.shape[-1] > 1 and next(iter(axes.values())) == (0,) else 0
    return means[:, first]
