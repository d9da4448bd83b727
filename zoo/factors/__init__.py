"""Latent factor models: a few hidden numbers a row explain many seen ones.  Below is what the stories share."""

from importlib import import_module
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

_STORIES = {"PPCA": ".ppca", "FactorAnalysis": ".fa", "MixtureOfFactorAnalysers": ".mfa"}


def __getattr__(name: str) -> Any:
    if name in _STORIES:
        return getattr(import_module(_STORIES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def principal_axes(x: Tensor | None, D: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where factors start: loadings (D, K) and noise variances (D,) from the covariance of `x`, and its mean (D,).

    A missing cell counts as its column's mean. Tipping & Bishop, *Probabilistic Principal Component Analysis*
    (JRSS B 61, 1999), equations 7 and 8.
    """
    if x is None or len(x) < 2:
        return 0.1 * torch.randn(D, K), torch.ones(D), torch.zeros(D)
    dtype = torch.promote_types(x.dtype, torch.get_default_dtype())
    mean = x.nanmean(0).to(dtype)
    gap = torch.where(x.isnan(), torch.zeros_like(x), x - x.nanmean(0)).to(dtype)
    values, vectors = torch.linalg.eigh(gap.T @ gap / len(x))
    rest = values[: max(D - K, 1)].mean().clamp_min(1e-3 * values.mean() + 1e-12)
    width = min(K, D)
    axes = vectors[:, -width:].flip(1) * (values[-width:].flip(0) - rest).clamp_min(0.01 * rest).sqrt()
    W = torch.cat([axes, 0.1 * rest.sqrt() * torch.randn(D, K - width, dtype=dtype, device=x.device)], 1)
    noise = ((gap**2).mean(0) - (W**2).sum(1)).clamp_min(0.1 * rest)
    return W, noise, mean


def guess_globals(W: Tensor, noise: Tensor, mean: Tensor, rows: int) -> None:
    """q(W) q(mu) q(psi) as independent normals and log-normals, as wide as `rows` rows leave them."""
    width = (noise.mean() / max(rows, 1)).sqrt()
    for name, start in (("W", W), ("mu", mean)):
        loc = pyro.param(f"{name}.loc", start)
        scale = pyro.param(f"{name}.scale", width * torch.ones_like(start), constraint=constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale).to_event(start.dim()))
    loc = pyro.param("psi.loc", noise.log())
    scale = pyro.param("psi.scale", torch.full_like(noise, (2 / max(rows, 1)) ** 0.5), constraint=constraints.positive)
    pyro.sample("psi", dist.LogNormal(loc, scale).to_event(noise.dim()))


def encode(x: Tensor, W: Tensor, noise: Tensor, mean: Tensor) -> Any:
    """q(z | x): a normal whose mean is linear in x and whose covariance is that of all rows; starts at the exact one.

    Its mean and covariance can be those of the true posterior (Bishop 2006, equation 12.42).
    """
    K = W.shape[1]
    precision = torch.eye(K, dtype=W.dtype, device=W.device) + W.T @ (W / noise.unsqueeze(-1))
    B = torch.linalg.solve(precision, (W / noise.unsqueeze(-1)).T)
    weight = pyro.param("z.weight", B)
    bias = pyro.param("z.bias", -B @ mean)
    factor = pyro.param(
        "z.scale_tril", torch.linalg.cholesky(torch.linalg.inv(precision)), constraint=constraints.lower_cholesky
    )
    return dist.MultivariateNormal(x.to(W.dtype) @ weight.T + bias, scale_tril=factor)
