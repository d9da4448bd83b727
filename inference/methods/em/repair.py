"""Runs that went wrong in known ways: components that collapsed onto a few rows, components that nobody belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from .engine import Enumeration
from .families import covariance, variance
from .mstep import Theta
from .terms import RUNS, parameters

#: Share of the data's variance below which a spread, less the ridge, is held up by the ridge alone.
HELD = 1e-6
#: Share of a row below which a component counts as empty.
EMPTY = 0.5


def collapsed(engine: Enumeration, theta: Theta, ridge: float) -> list[bool]:
    """Whether each run has a spread without a prior that only the ridge keeps from 0: its likelihood is unbounded.

    Day, *Estimating the components of a mixture of normal distributions*, Biometrika 1969, section 3.
    """
    runs = len(next(iter(theta.values()))) if theta else 1
    found = torch.zeros(runs, dtype=torch.bool, device="cpu")
    for name in (n for n in engine.plan.closed if n not in engine.plan.sticks):
        users = engine.plan.users(name)
        if users[0][1] != "spread" or engine.plan.priors[name].text not in ("no prior", "flat prior"):
            continue
        for term, slot in users:
            if term.floor is None or term.family is None:
                continue
            gather = term.gathers[slot]
            pushed = (gather.push(theta[gather.theta]), (RUNS, *term.slot_dims[slot]))
            role, spread = parameters(term, {slot: pushed})[slot]
            unit = term.floor.clamp_min(1e-300)
            if term.family.event_dims:
                root = unit.sqrt()
                least = torch.linalg.eigvalsh(covariance(role, spread) / root.unsqueeze(-1) / root).amin(-1)
            else:
                least = variance(role, spread) / unit
            found |= (least.reshape(runs, -1).amin(1) - ridge < HELD).cpu() & (not term.still)
    return found.tolist()


def empty_states(engine: Enumeration, counts: Tensor) -> Tensor:
    """Runs x states that hold less than half a row, (R, K)."""
    return counts < EMPTY


def reseed(engine: Enumeration, theta: Theta, counts: Tensor, seed: int) -> Theta:
    """Put every empty component of every run beside its largest one, with half of its weight.

    Parameters
    ----------
    theta
        (R, ...).
    counts
        Expected rows of every component, (R, K).
    """
    kernel = engine.mixture
    assert kernel is not None
    generator = torch.Generator().manual_seed(seed)
    new = {n: v.clone() for n, v in theta.items()}
    for r in range(len(counts)):
        left = counts[r].clone()
        for k in (left < EMPTY).nonzero().flatten().tolist():
            big = int(left.argmax())
            left[big] = left[k] = left[big] / 2
            for term in engine.plan.terms.values():
                for slot, gather in term.gathers.items():
                    block = new[gather.theta][r].reshape(-1, *gather.event)
                    if term.name == kernel.latent:
                        block[..., k] = block[..., big] = block[..., big] / 2
                        block /= block.sum(-1, keepdim=True)
                    elif kernel.latent in term.slot_dims[slot]:
                        here, there = gather.index[k].reshape(-1), gather.index[big].reshape(-1)
                        block[here] = nudge(block[there], slot, term.floor, generator)
                    new[gather.theta][r] = block.reshape(new[gather.theta][r].shape)
    return new


def nudge(value: Tensor, slot: str, floor: Tensor | None, generator: torch.Generator) -> Tensor:
    """A value close to the given one, inside the support."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value)
    if slot == "spread":
        return value
    if slot == "loc":
        size = floor.sqrt().reshape(-1)[: value.numel()].reshape(value.shape) if floor is not None else value.abs()
        return value + 0.5 * size * noise
    if slot == "probs":
        odds = value * (0.3 * noise).exp()
        return odds / odds.sum(-1, keepdim=True) if value.dim() > 1 else odds.clamp(1e-6, 1 - 1e-6)
    return value * (0.3 * noise).exp()
