"""Bounds tighter than the ELBO: several draws a row, averaged inside the logarithm.

log mean_k w_k of K draws is the importance-weighted bound of Burda, Grosse and Salakhutdinov, *Importance weighted
autoencoders* (ICLR 2016); log mean_k w_k^(1 - alpha) / (1 - alpha) is the variational Renyi bound of Li and Turner, *Renyi
divergence variational inference* (NeurIPS 2016), which it contains as alpha = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from ..capture import Captured, check_agreement, reason_of
from ..recorder import pure_graph
from .batches import by_row, is_latent, quiet_vmap
from .svi_step import ASKED, faster

if TYPE_CHECKING:
    from .ascent import Leaves
    from .paired import PairTarget

OBJECTIVES = ("elbo", "iwae", "renyi")


def row_weights(target: PairTarget, leaves: Leaves, rows: Tensor | None) -> Tensor:
    """log p(x_n, u_n) - log q(u_n) of every row at one draw of the guide, (rows,)."""
    trace = target.scored_trace(leaves, rows)
    guessed = [s for s in trace.nodes.values() if is_latent(s)]
    log_q = sum(by_row(site["log_prob"], site, target.plate) for site in guessed)
    given = {**{s["name"]: s["value"] for s in guessed}, **target.constrained(leaves, rows)}
    log_p = target.networks.run(target.weights(leaves), lambda: target.joint.rows(given, target.arguments(rows)))
    return log_p - log_q


def bound(weights: Tensor, alpha: float) -> Tensor:
    """Sum over rows of the bound from log weights (draws, rows); alpha = 1 is the ELBO."""
    if alpha == 1.0:
        return weights.mean(0).sum()
    power = 1.0 - alpha
    return ((power * weights).logsumexp(0) - math.log(len(weights))).sum() / power


def doubly(table: Tensor, free: list[Tensor], guided: list[bool], scale: float) -> tuple[Tensor, ...]:
    """Gradient of the importance-weighted bound whose guide's part keeps its signal as draws are added.

    `table` (draws, rows) holds log weights without the slope of log q in its parameters. The guide's parameters weigh the
    path of a draw by its squared share, all others by its share (Tucker, Lawson, Gu and Maddison, *Doubly reparameterized
    gradient estimators*, ICLR 2019, equation 8).
    """
    share = table.softmax(0).detach()
    value, again = scale * (share * table).sum(), scale * (share.square() * table).sum()
    plain = torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True, retain_graph=True)
    squared = torch.autograd.grad(again, free, allow_unused=True, materialize_grads=True)
    return tuple(b if own else a for a, b, own in zip(plain, squared, guided, strict=True))


def tight_step(target: PairTarget, example: tuple[Tensor, ...], alpha: float, mode: str, steps: int) -> Captured:
    """(parameters..., rows) -> the bound and its gradient, as one graph where that is possible.

    Raises
    ------
    ValueError
        Rows share a latent that was guessed, so that the bound is no sum over rows.
    """
    names = [*target.parameters, *target.names]
    shared = target.shared
    if target.plate is None or shared or not target.sites:
        raise ValueError(
            f"objective='iwae' and 'renyi' average over draws row by row; this guide "
            f"{f'guesses {shared[0]!r}, which rows share' if shared else 'guesses nothing in the rows'}: use objective='elbo'"
        )
    count, scale = target.particles, target.batches.scale
    guided = [n in target.guide_leaves(target.start()) for n in names] if target.path else []

    def by_rows(*inputs: Tensor) -> Tensor:
        with pyro.validation_enabled(False):
            return row_weights(
                target, dict(zip(names, inputs)), inputs[len(names)] if len(inputs) > len(names) else None
            )

    def with_slopes(many: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                free = [t.detach().requires_grad_() for t in inputs[: len(names)]]
                table = many(*free, *inputs[len(names) :])
                value = scale * bound(table, alpha)
                if guided:
                    slopes = doubly(table, free, guided, scale)
                else:
                    slopes = torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True)
            return (value.detach(), *slopes)

        return step

    eager = with_slopes(lambda *inputs: torch.stack([by_rows(*inputs) for _ in range(count)]))
    if mode == "eager":
        return Captured(eager, "eager", ASKED)
    try:
        graph = pure_graph(by_rows, example, random=True, differentiable=True)
        check_agreement(graph, by_rows, example)
        lanes: Any = torch.vmap(
            lambda _, *inputs: graph(*inputs), in_dims=(0, *[None] * len(example)), randomness="different"
        )
        with quiet_vmap():
            call = pure_graph(with_slopes(lambda *inputs: lanes(torch.zeros(count), *inputs)), example, random=True)
    except Exception as error:  # any operation of anybody's program may refuse to be traced, in any way
        return Captured(eager, "eager", reason_of(error))
    return faster(call, example, [example], mode, steps)


def check_objective(objective: str, alpha: float, particles: int, plain: bool) -> None:
    """Refuse settings that contradict each other.

    Raises
    ------
    ValueError
        They do; the message says which.
    """
    if objective == "renyi" and not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"SVI(objective='renyi', alpha={alpha!r}): alpha must be a number >= 0")
    if objective != "elbo" and particles < 2:
        raise ValueError(f"SVI(objective={objective!r}, particles={particles}): average at least 2 draws")
    if objective != "elbo" and not plain:
        raise ValueError(f"SVI(objective={objective!r}) has no divergence to weigh: leave beta and free_bits out")


__all__ = ["OBJECTIVES", "bound", "check_objective", "row_weights", "tight_step"]
