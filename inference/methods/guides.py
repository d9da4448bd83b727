"""Gaussian guides over the flat unconstrained vector: mean-field, low-rank and full-rank.

Parameters of the model (`pyro.param`) have no posterior: the guide carries them as points.
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor

FAMILIES = ("mean_field", "low_rank", "full_rank")


class GaussianGuide:
    """q(u) over the unconstrained latents, and points for the parameters.

    Parameters
    ----------
    family
        "mean_field": independent entries. "low_rank": diagonal plus a factor of rank sqrt(dim). "full_rank": any
        covariance, by its Cholesky factor.
    start
        (dim,), where the guide is centred at first.
    points
        (dim,), True where the entry is a parameter of the model.
    scale
        Standard deviation of every entry at first.
    """

    def __init__(self, family: str, start: Tensor, points: Tensor, scale: float = 0.1) -> None:
        self.family = family
        self.latent = (~points).nonzero().flatten()
        n = len(self.latent)
        self.loc = start.detach().clone().requires_grad_()
        self.log_scale = torch.full((n,), math.log(scale), dtype=start.dtype, device=start.device).requires_grad_()
        self.extra: list[Tensor] = []
        if family == "full_rank":
            self.extra = [torch.zeros(n, n, dtype=start.dtype, device=start.device).requires_grad_()]
        elif family == "low_rank":
            rank = max(1, math.ceil(math.sqrt(n)))
            self.extra = [(scale / 10 * torch.randn(n, rank, dtype=start.dtype, device=start.device)).requires_grad_()]

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""
        return [self.loc, self.log_scale, *self.extra]

    def names(self) -> list[str]:
        """Names of `parameters`, for error messages."""
        return ["guide.loc", "guide.log_scale", *(["guide.scale_tril"] if self.family == "full_rank" else ["guide.factor"])]

    def distribution(self) -> td.Distribution:
        """q over the latent entries."""
        loc, scale = self.loc[self.latent], self.log_scale.exp()
        if self.family == "full_rank":
            factor = self.extra[0].tril(-1) + torch.diag_embed(scale)
            return td.MultivariateNormal(loc, scale_tril=factor, validate_args=False)
        if self.family == "low_rank":
            return td.LowRankMultivariateNormal(loc, self.extra[0], scale**2, validate_args=False)
        return td.Independent(td.Normal(loc, scale, validate_args=False), 1)

    def sample(self, count: int) -> tuple[Tensor, td.Distribution]:
        """(count, dim) reparameterised draws, parameters at their points, and q itself."""
        q = self.distribution()
        draws = q.rsample((count,))
        if len(self.latent) == len(self.loc):
            return draws, q
        return self.loc.expand(count, -1).index_copy(1, self.latent, draws), q

    def state(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [p.detach().clone() for p in self.parameters]

    def restore(self, state: list[Tensor]) -> None:
        """Put a copy back."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state):
                parameter.copy_(value)
