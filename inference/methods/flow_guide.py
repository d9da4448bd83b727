"""A normalizing flow as a guide over the unconstrained latents of any story.

Standard noise is bent entry by entry (sinh-arcsinh: Jones and Pewsey, *Biometrika* 2009), then moved and scaled by masked
networks of the entries before (inverse autoregressive flow: Kingma et al., NeurIPS 2016), in both orders in turn, and last
carried to the place and the covariance of a full-rank normal, which the flow is before its first step. Drawing and the
density of what was drawn take one pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gaussian import Draws, Family, Leaves, normal_log, start_full_rank

#: Autoregressive layers, and the largest |log scale| that one may set.
LAYERS, BOUND = 4, 2.0


def width_of(size: int) -> int:
    """Hidden units of a layer."""
    return max(16, min(256, 4 * size))


def masks(size: int, hidden: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries a hidden unit may read, and which hidden units an entry: only those before it.

    Germain et al., *MADE* (ICML 2015), section 4.
    """
    entries = torch.arange(size, device=like.device)
    units = torch.arange(hidden, device=like.device) % max(1, size - 1)
    return (units[:, None] >= entries[None]).to(like), (entries[:, None] > units[None]).to(like)


def start_flow(loc: Tensor, scale: Tensor, factor: Tensor | None) -> Leaves:
    """The full-rank normal, with layers that change nothing yet."""
    size, hidden = len(loc), width_of(len(loc))
    leaves = start_full_rank(loc, scale, factor)
    for layer in range(LAYERS):
        leaves[f"skew_{layer}"] = torch.zeros_like(loc)
        leaves[f"tail_{layer}"] = torch.zeros_like(loc)
        if size > 1:
            leaves[f"into_{layer}"] = torch.randn(hidden, size).to(loc) / math.sqrt(size)
            leaves[f"bias_{layer}"] = torch.zeros(hidden).to(loc)
            leaves[f"out_{layer}"] = torch.zeros(2 * size, hidden).to(loc)
            leaves[f"shift_{layer}"] = torch.zeros(2 * size).to(loc)
    return leaves


def push(q: Leaves, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draws (S, n) from noise, and the log density of each (S,)."""
    y, size = noise, noise.shape[-1]
    log_q = normal_log(noise).sum(-1)
    for layer in range(LAYERS):
        delta = q[f"tail_{layer}"].exp()
        inner = delta * (torch.asinh(y) + q[f"skew_{layer}"])
        log_q = log_q - (q[f"tail_{layer}"] + log_cosh(inner) - 0.5 * torch.log1p(y.square())).sum(-1)
        y = torch.sinh(inner)
        if size > 1:
            inputs, outputs = masks(size, len(q[f"bias_{layer}"]), y)
            h = torch.tanh(y @ (q[f"into_{layer}"] * inputs).mT + q[f"bias_{layer}"])
            found = h @ (q[f"out_{layer}"] * outputs.repeat(2, 1)).mT + q[f"shift_{layer}"]
            shift, log_scale = found[..., :size], BOUND * torch.tanh(found[..., size:] / BOUND)
            y = shift + log_scale.exp() * y
            log_q = log_q - log_scale.sum(-1)
            y = y.flip(-1)
    if LAYERS % 2:
        y = y.flip(-1)
    scale, lower = q["log_scale"].exp(), q["lower"].tril(-1)
    return q["loc"] + scale * (y + y @ lower.mT), log_q - q["log_scale"].sum()


def log_cosh(x: Tensor) -> Tensor:
    """log cosh x without overflow."""
    return x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2)


def place_flow(q: Leaves, noise: Tensor) -> Draws:
    """Draws with the graph that `flow_gradients` goes back through; their own pull is part of that graph."""
    with torch.enable_grad():
        free = {n: v.detach().requires_grad_() for n, v in q.items() if n != "points"}
        z, log_q = push(free, noise)
    return Draws(z.detach(), log_q.detach(), torch.zeros_like(noise), noise, (free, z, log_q))


def flow_gradients(q: Leaves, draws: Draws, path: Tensor) -> Leaves:
    """Gradients of the ELBO: of log p by the path through the draws, of log q by the log-determinants."""
    free, z, log_q = draws.graph
    value = ((z * path).sum(-1) - log_q).mean()
    found = torch.autograd.grad(value, list(free.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(free, found, strict=True))


FLOW = Family(start_flow, lambda size: size, place_flow, flow_gradients)
