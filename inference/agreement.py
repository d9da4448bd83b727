"""How far two answers to one question lie apart, in units of posterior sd and whatever the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .labels import Axes, assign, features, permute
from .rotations import invariants
from .summary import entries, label

if TYPE_CHECKING:
    from .posterior import Posterior


@dataclass(frozen=True)
class Agreement:
    """One answer against the reference.

    Attributes
    ----------
    gaps
        Entry -> |mean - reference mean| / reference sd.
    ratios
        Entry -> sd / reference sd; empty for a point.
    draws
        The answer's draws of the globals, components in the reference's order.
    """

    gaps: dict[str, float]
    ratios: dict[str, float]
    draws: dict[str, Tensor]

    @property
    def worst(self) -> float:
        """Largest gap, NaN where nothing can be compared."""
        return max(self.gaps.values(), default=math.nan)

    @property
    def ratio(self) -> float:
        """Median ratio of standard deviations, NaN for a point."""
        values = sorted(self.ratios.values())
        return values[len(values) // 2] if values else math.nan


def shared(posterior: Posterior) -> dict[str, Tensor]:
    """Draws of the latents shared by all rows."""
    local = {b.name for b in posterior.joint.blocks if b.local}
    return {n: v.double().cpu() for n, v in posterior.draws.items() if n not in local}


def still(draws: dict[str, Tensor], posterior: Posterior) -> dict[str, Tensor]:
    """The same with loadings W as W W^T, where the story leaves their rotation open."""
    return invariants(draws, posterior.diagnostics.get("rotating", {}), set())


def component_axes(posterior: Posterior) -> Axes:
    """Axes over exchangeable components that the fit found."""
    return {n: tuple(a) for n, a in posterior.diagnostics.get("exchangeable", {}).items()}


def agree(posterior: Posterior, reference: Posterior) -> Agreement:
    """Match the components of `posterior` to those of `reference`, then compare means and spreads entry by entry."""
    ours, theirs, axes = shared(posterior), shared(reference), component_axes(reference)
    if axes and all(n in ours for n in axes):
        ours = matched(ours, theirs, axes)
    free, theirs = still(ours, reference), still(theirs, reference)
    gaps, ratios = {}, {}
    for name, value in theirs.items():
        if name not in free or free[name].shape[1:] != value.shape[1:]:
            continue
        sd = value.std(0) if len(value) > 1 else torch.full_like(value[0], math.nan)
        gap = (free[name].mean(0) - value.mean(0)).abs() / sd
        spread = free[name].std(0) / sd if len(free[name]) > 1 else None
        for index in entries(tuple(value.shape[1:])):
            if sd[index] > 0:
                gaps[label(name, index)] = float(gap[index])
                if spread is not None:
                    ratios[label(name, index)] = float(spread[index])
    return Agreement(gaps, ratios, ours)


def matched(ours: dict[str, Tensor], theirs: dict[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """All draws under the one permutation of components that suits the reference best."""
    found = features(theirs, axes)
    centre = found.mean(0)
    spread = found.std(0) if len(found) > 1 else found.reshape(-1, found.shape[-1]).std(0) + 0 * centre
    middle = {n: ours[n].mean(0, keepdim=True) for n in axes}
    order = torch.as_tensor(assign(features(middle, axes), centre, spread)[0])
    return permute(ours, axes, order, lead=1)
