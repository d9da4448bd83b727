"""Gradients of guides whose draws have none: the score function, with other draws as the baseline.

Each of several draws is compared with the mean of the others, which leaves the mean of the gradient as it is and takes most of
its noise (Mnih and Rezende, *Variational inference for Monte Carlo objectives*, ICML 2016; Kool, van Hoof and Welling, *Buy 4
REINFORCE samples, get a baseline for free!*, 2019). A latent of the rows is held against the cost of its own row alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from .batches import by_row, is_latent

if TYPE_CHECKING:
    from .ascent import Leaves
    from .paired import PairTarget

#: Fewest draws that can be compared with each other.
LEAST = 2


def compares(target: PairTarget, trace: Any) -> bool:
    """Whether every draw without a gradient has infinitely many states: the others are summed out by enumeration."""
    structure = target.problem.structure
    stiff = [n for n in target.sites if not trace.nodes[n]["fn"].has_rsample]
    shared = any(not s.local for s in structure.finite)
    return not shared and all(n in structure and not structure[n].enumerable for n in stiff)


def score_step(target: PairTarget, *inputs: Tensor) -> tuple[Tensor, ...]:
    """An estimate of the ELBO from several draws of the guide, and its gradient by parameter."""
    names = [*target.parameters, *target.names]
    rows = inputs[len(names)] if len(inputs) > len(names) else None
    free = [t.detach().requires_grad_() for t in inputs[: len(names)]]
    leaves = dict(zip(names, free))
    scale = 1.0 if rows is None else target.batches.scale
    with torch.enable_grad(), pyro.validation_enabled(False):
        found = [one_draw(target, leaves, rows, scale) for _ in range(max(LEAST, target.particles))]
        totals, by_rows = torch.stack([f[0] for f in found]), [f[1] for f in found]
        value = totals.mean()
        surrogate = value
        for s, (_, _, shared, own) in enumerate(found):
            if shared is not None:
                surrogate = surrogate + advantage(totals.detach(), s) * shared / len(found)
            if own is not None:
                costs = torch.stack([r for r in by_rows if r is not None])
                surrogate = surrogate + scale * (advantage(costs.detach(), s) * own).sum() / len(found)
        slopes = torch.autograd.grad(surrogate, free, allow_unused=True, materialize_grads=True)
    return (value.detach(), *slopes)


def advantage(costs: Tensor, index: int) -> Tensor:
    """One draw's cost beyond the mean of the others."""
    return (costs[index] - costs.mean(0)) * (len(costs) / (len(costs) - 1))


def one_draw(
    target: PairTarget, leaves: Leaves, rows: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """log p - log q in total and row by row, and log q of draws without a gradient: those shared, and those of each row."""
    trace = target.guide_trace(leaves, rows)
    trace.compute_log_prob()
    guessed = [s for s in trace.nodes.values() if is_latent(s)]
    inside = [s for s in guessed if any(f.name == target.plate for f in s["cond_indep_stack"])]
    given = {**{s["name"]: s["value"] for s in guessed}, **target.constrained(leaves, rows)}
    arguments = target.arguments(rows)
    local = {s["name"] for s in inside}
    log_q: Any = sum((scale if s["name"] in local else 1.0) * s["log_prob"].sum() for s in guessed)

    def model() -> tuple[Tensor, Tensor | None]:
        stiff = any(not s["fn"].has_rsample for s in inside)
        return target.joint.density(given, arguments, scale), target.joint.rows(given, arguments) if stiff else None

    log_p, costs = target.networks.run(target.weights(leaves), model)
    outside = [s["log_prob"].sum() for s in guessed if s["name"] not in local and not s["fn"].has_rsample]
    shared = torch.stack(outside).sum() if outside else None
    if costs is None:
        return log_p - log_q, None, shared, None
    own = [by_row(s["log_prob"], s, target.plate) for s in inside]
    stiff = [q for q, s in zip(own, inside, strict=True) if not s["fn"].has_rsample]
    return log_p - log_q, costs - torch.stack(own).sum(0), shared, torch.stack(stiff).sum(0)
