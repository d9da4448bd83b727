r"""Linear VAE: a variational autoencoder whose decoder and encoder are linear maps. Its best bound is PPCA's likelihood.

Story
-----
::

    for n = 1..N  "data"
        z_n  ~ Normal(0, I)                              (K,)   its code
        x_n  ~ Normal(W z_n + mu, sigma^2 I)             (D,)   what we see

    guide: z_n ~ Normal(V (x_n - m), diag(s^2)), with one s for all rows

W, mu, sigma and the guide's V, m, s are points without priors.  The posterior of z is normal, its mean linear in x and its
covariance :math:`\sigma^2 (W^\top W + \sigma^2 I)^{-1}` that of all rows: diagonal where the columns of W are orthogonal, a
rotation that the likelihood leaves free.  So the largest ELBO is the largest likelihood, that of probabilistic PCA, and
training adds no local maximum of its own; a code whose eigenvalue lies below sigma^2 is switched off by the likelihood
itself, not by the bound.

Lucas, Tucker, Grosse & Norouzi, *Don't blame the ELBO! A linear VAE perspective on posterior collapse* (NeurIPS 2019);
Tipping & Bishop, *Probabilistic principal component analysis* (JRSS B 61, 1999).
"""

from __future__ import annotations

from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..mixtures import count_setting
from . import seeded
from .vae import check_rows


class LinearDecoder(nn.Module):
    """z -> (W z + mu, sigma)."""

    def __init__(self, num_codes: int, num_features: int) -> None:
        super().__init__()
        self.map = nn.Linear(num_codes, num_features)
        self.log_sigma = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.map.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) -> (N, D) and a scale."""
        return self.map(z), self.log_sigma.exp()


class LinearEncoder(nn.Module):
    """x -> (V (x - m), s)."""

    def __init__(self, num_features: int, num_codes: int) -> None:
        super().__init__()
        self.map = nn.Linear(num_features, num_codes)
        self.log_scale = nn.Parameter(torch.zeros(num_codes))
        nn.init.zeros_(self.map.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> (N, K), and scales (K,)."""
        return self.map(x), self.log_scale.exp()


class LinearVAE(nn.Module):
    """Variational autoencoder with a linear decoder, one noise for all columns, and a linear encoder.

    Parameters
    ----------
    num_features, num_codes
        D and K.
    seed
        Of the weights that training starts from.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> LinearVAE(num_features=13, num_codes=2)
    LinearVAE(num_features=13, num_codes=2, seed=0)
    """

    origin: Tensor

    def __init__(self, num_features: int, num_codes: int, seed: int = 0) -> None:
        super().__init__()
        D, K = count_setting("num_features", num_features), count_setting("num_codes", num_codes)
        self.num_features, self.num_codes, self.seed = D, K, seed
        made = seeded(seed, lambda: nn.ModuleList([LinearDecoder(K, D), LinearEncoder(D, K)]))
        self.decoder, self.encoder = made[0], made[1]  # type: ignore[index]
        self.register_buffer("origin", torch.zeros(K), persistent=False)

    def model(self, x: Tensor | None = None, num_data: int = 100) -> Tensor:
        """Tell the story; `x` (N, D), or None to dream up `num_data` rows."""
        pyro.module("decoder", self.decoder)
        check_rows(x, self.num_features)
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(self.origin, 1.0).to_event(1))
            loc, sigma = self.decoder(z)
            return pyro.sample("x", dist.Normal(loc, sigma).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 100) -> None:
        """q(z | x), linear in x; without `x`, the prior."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", num_data if x is None else len(x)):
            loc, scale = (self.origin, torch.ones_like(self.origin)) if x is None else self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def __repr__(self) -> str:
        return f"LinearVAE(num_features={self.num_features}, num_codes={self.num_codes}, seed={self.seed})"

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Thirteen measurements of wines, standardised, and two numbers behind them."""
        from ..data import load

        x = load("wine").x
        return cls(num_features=13, num_codes=2), {"x": (x - x.mean(0)) / x.std(0)}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three rows of two columns and one code: everything is Gaussian."""
        return cls(num_features=2, num_codes=1), {"x": torch.tensor([[0.5, 0.3], [-0.9, -0.2], [0.4, -1.0]])}
