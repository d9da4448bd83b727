"""Gaussian guides over the unconstrained latents: mean-field, low-rank and full-rank, with path gradients by hand.

Only the path of a draw through log p - log q is followed, not the score of q, whose mean is zero: where q is the posterior
every draw has gradient zero (Roeder, Wu and Duvenaud, *Sticking the landing*, NeurIPS 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Draws:
    """Draws from a guide.

    Attributes
    ----------
    z
        (P, L), in unconstrained space.
    log_q
        (P, L) or (P,): log density of every draw, by entry where entries are independent.
    pull
        -d log q / d z, (P, L).
    noise
        What they were made of, (P, width of the family).
    graph
        What the family's gradients go back through, if anything.
    """

    z: Tensor
    log_q: Tensor
    pull: Tensor
    noise: Tensor
    graph: Any = None


@dataclass(frozen=True)
class Family:
    """One shape of covariance.

    Attributes
    ----------
    start
        (loc (L,), scale (L,), lower Cholesky factor (L, L) or None) -> the guide's parameters.
    width
        Normal numbers that one draw takes, from L.
    place
        (parameters, noise (P, width)) -> draws.
    gradients
        (parameters, draws, d objective / d z (P, L)) -> gradient of the mean objective by parameter.
    """

    start: Callable[[Tensor, Tensor, Tensor | None], Leaves]
    width: Callable[[int], int]
    place: Callable[[Leaves, Tensor], Draws]
    gradients: Callable[[Leaves, Draws, Tensor], Leaves]


def normal_log(noise: Tensor) -> Tensor:
    """log N(noise | 0, 1)."""
    return -0.5 * (noise**2 + math.log(2 * math.pi))


# -- independent entries -----------------------------------------------------------------------------------------------


def start_mean_field(loc: Tensor, scale: Tensor, factor: Tensor | None) -> Leaves:
    """Leaves of a diagonal normal: loc (n,) and log scale (n,)."""
    return {"loc": loc.clone(), "log_scale": scale.log()}


def place_mean_field(q: Leaves, noise: Tensor) -> Draws:
    """z = loc + scale * noise."""
    scale = q["log_scale"].exp()
    return Draws(q["loc"] + scale * noise, normal_log(noise) - q["log_scale"], noise / scale, noise)


def mean_field_gradients(q: Leaves, draws: Draws, path: Tensor) -> Leaves:
    """Gradients of the ELBO by the path through the draws, with the entropy's in closed form."""
    scale = q["log_scale"].exp()
    return {"loc": path.mean(0), "log_scale": (path * draws.noise).mean(0) * scale}


# -- any covariance: z = loc + scale * (I + A) noise, A strictly lower triangular ---------------------------------------


def start_full_rank(loc: Tensor, scale: Tensor, factor: Tensor | None) -> Leaves:
    """Leaves of a normal with a Cholesky factor: loc (n,), log diagonal (n,), strict lower triangle (n, n)."""
    if factor is None:
        return {"loc": loc.clone(), "log_scale": scale.log(), "lower": torch.zeros(len(loc), len(loc)).to(loc)}
    diagonal = factor.diagonal()
    return {"loc": loc.clone(), "log_scale": diagonal.log(), "lower": (factor / diagonal.unsqueeze(-1)).tril(-1)}


def place_full_rank(q: Leaves, noise: Tensor) -> Draws:
    """Draws (S, n) of a full-rank normal from standard noise."""
    scale, lower = q["log_scale"].exp(), q["lower"].tril(-1)
    z = q["loc"] + scale * (noise + noise @ lower.mT)
    unit = lower + torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    pull = torch.linalg.solve_triangular(unit.mT, noise.mT, upper=True, unitriangular=True).mT / scale
    return Draws(z, normal_log(noise).sum(-1) - q["log_scale"].sum(), pull, noise)


def full_rank_gradients(q: Leaves, draws: Draws, path: Tensor) -> Leaves:
    """Gradients of the ELBO by the path through the draws, with the entropy's in closed form."""
    scaled = path * q["log_scale"].exp()
    lower = (scaled.mT @ draws.noise / len(path)).tril(-1)
    return {"loc": path.mean(0), "log_scale": (path * (draws.z - q["loc"])).mean(0), "lower": lower}


# -- diagonal plus few directions: z = loc + scale * (noise + W more noise) --------------------------------------------


def rank_of(size: int) -> int:
    """Directions of a low-rank guide."""
    return max(1, math.ceil(math.sqrt(size)))


def start_low_rank(loc: Tensor, scale: Tensor, factor: Tensor | None) -> Leaves:
    """Leaves of a diagonal-plus-factor normal: loc (n,), log scale (n,), factor (n, rank)."""
    # Not zero, where the gradient with respect to W vanishes.
    directions = 0.01 * torch.randn(len(loc), rank_of(len(loc)), dtype=loc.dtype, device=loc.device)
    return {"loc": loc.clone(), "log_scale": scale.log(), "directions": directions}


def place_low_rank(q: Leaves, noise: Tensor) -> Draws:
    """Draws (S, n) of a low-rank normal from standard noise."""
    scale, W = q["log_scale"].exp(), q["directions"]
    own, shared = noise[:, : len(scale)], noise[:, len(scale) :]
    y = own + shared @ W.mT
    inner = torch.eye(W.shape[1], dtype=W.dtype, device=W.device) + W.mT @ W
    root = torch.linalg.cholesky_ex(inner).L
    u = y - torch.cholesky_solve((y @ W).mT, root).mT @ W.mT  # (I + W W^T)^(-1) y, by Woodbury's identity
    size = len(scale)
    log_q = -0.5 * ((u * y).sum(-1) + size * math.log(2 * math.pi)) - root.diagonal().log().sum() - q["log_scale"].sum()
    return Draws(q["loc"] + scale * y, log_q, u / scale, noise)


def low_rank_gradients(q: Leaves, draws: Draws, path: Tensor) -> Leaves:
    """Gradients of the ELBO by the path through the draws, with the entropy's in closed form."""
    scaled = path * q["log_scale"].exp()
    shared = draws.noise[:, path.shape[1] :]
    return {
        "loc": path.mean(0),
        "log_scale": (path * (draws.z - q["loc"])).mean(0),
        "directions": scaled.mT @ shared / len(path),
    }


FAMILIES: dict[str, Family] = {
    "mean_field": Family(start_mean_field, lambda size: size, place_mean_field, mean_field_gradients),
    "low_rank": Family(start_low_rank, lambda size: size + rank_of(size), place_low_rank, low_rank_gradients),
    "full_rank": Family(start_full_rank, lambda size: size, place_full_rank, full_rank_gradients),
}


def noise_for(family: Family, count: int, size: int, like: Tensor, antithetic: bool = True) -> Tensor:
    """(count, width) standard normal numbers, in pairs of opposite sign where `count` is even."""
    width = family.width(size)
    if antithetic and count % 2 == 0:
        half = torch.randn(count // 2, width, dtype=like.dtype, device=like.device)
        return torch.cat([half, -half])
    return torch.randn(count, width, dtype=like.dtype, device=like.device)
