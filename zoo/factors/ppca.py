r"""Probabilistic PCA: a few factors a row explain what its columns share, and all columns have equal noise.

Story
-----
::

    W          ~ Normal(0, s)                              (D, K)  loadings
    mu         ~ Normal(m, 5 s)                            (D,)    mean
    psi        ~ InverseGamma(2, s^2)                      ()      noise variance, that of all columns
    for n = 1..N  "data"
        z_n    ~ Normal(0, I)                              (K,)    its factors
        x_n    ~ Normal(W z_n + mu, psi I)                 (D,)    what we see

m and s are `loc` and `scale`: where the data lie and how widely.

At the maximum of the likelihood :math:`W = U_K(\Lambda_K - \psi I)^{1/2}R` with the K leading eigenvectors and eigenvalues of
the data's covariance, any rotation R, and :math:`\psi` the mean of the eigenvalues left over: W spans the principal
subspace, and as :math:`\psi \to 0` the posterior of z becomes PCA's projection.

Tipping & Bishop, *Probabilistic Principal Component Analysis* (JRSS B 61, 1999).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..mixtures import Setting, count_setting, filled, num_columns, setting
from . import encode, guess_globals, principal_axes


@dataclass(frozen=True)
class PPCA:
    """Probabilistic principal component analysis with `num_factors` components.

    Parameters
    ----------
    num_factors
        K, fewer than there are columns.
    loc, scale
        m and s, where the data lie and how widely: one number, or one a column (D,).

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> PPCA(num_factors=2)
    PPCA(num_factors=2, loc=0.0, scale=1.0)
    """

    num_factors: int
    loc: Setting = 0.0
    scale: Setting = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_factors", count_setting("num_factors", self.num_factors))
        object.__setattr__(self, "loc", setting("loc", self.loc))
        object.__setattr__(self, "scale", setting("scale", self.scale, positive=True))

    def model(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 5) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, D), what was seen; None dreams up `num_data` rows.
        num_data, num_features
            N where there is no `x`, and D where neither `x` nor `loc` nor `scale` has columns.

        Returns
        -------
        x, (N, D).
        """
        D = num_columns(x, num_features, loc=self.loc, scale=self.scale)
        K, N = self.num_factors, num_data if x is None else len(x)
        m, s = filled(self.loc, (D,), x), filled(self.scale, (D,), x)
        W = pyro.sample("W", dist.Normal(0.0, s.unsqueeze(-1).expand(D, K)).to_event(2))
        mu = pyro.sample("mu", dist.Normal(m, 5.0 * s).to_event(1))
        psi = pyro.sample("psi", dist.InverseGamma(2.0, s.square().mean()))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(W[0]), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z @ W.mT + mu, psi.sqrt()).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 5) -> None:
        """q(W) q(mu) q(psi) and a linear encoder q(z | x), from the principal axes of `x` on."""
        D = num_columns(x, num_features, loc=self.loc, scale=self.scale)
        N = num_data if x is None else len(x)
        W, noise, mean = principal_axes(x, D, self.num_factors)
        guess_globals(W, noise.mean(), mean, N)
        with pyro.plate("data", N):
            pyro.sample("z", encode(mean.expand(N, D) if x is None else x, W, noise, mean))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Six test scores that two abilities explain."""
        from ..data import load

        return cls(num_factors=2), {"x": load("two_factors").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two rows of two columns, few enough for an exact answer."""
        return cls(num_factors=1), {"x": torch.tensor([[0.5, 0.3], [-0.9, -0.2]])}
