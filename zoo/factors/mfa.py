r"""Mixture of factor analysers: clusters, each with a few factors of its own.

Story
-----
::

    pi          ~ Dirichlet(a, ..., a)                      (C,)       mixing weights
    psi         ~ InverseGamma(2, (s/2)^2)                  (D,)       noise variances, one a column
    for c = 1..C  "components"
        mu_c    ~ Normal(m, 5 s)                            (D,)       centre
        W_c     ~ Normal(0, s)                              (D, K)     loadings
    for n = 1..N  "data"
        c_n     ~ Categorical(pi)                           ()         its component
        z_n     ~ Normal(0, I)                              (K,)       its factors
        x_n     ~ Normal(W[c_n] z_n + mu[c_n], diag(psi))   (D,)       what we see

a is `concentration`, m and s are `loc` and `scale`.

Summing c and z out, :math:`p(x_n) = \sum_c \pi_c\, \mathcal N(x_n \mid \mu_c, W_cW_c^\top + \Psi)`: a Gaussian mixture whose
covariances take C K D numbers instead of C D (D + 1) / 2, so that it serves where D is large; locally it is factor
analysis.

Ghahramani & Hinton, *The EM Algorithm for Mixtures of Factor Analyzers* (Toronto, CRG-TR-96-1, 1996).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..mixtures import Setting, count_setting, filled, num_columns, setting


@dataclass(frozen=True)
class MixtureOfFactorAnalysers:
    """Mixture of `num_components` factor analysers with `num_factors` factors each.

    Parameters
    ----------
    num_components, num_factors
        C and K.
    concentration
        a, the pseudo-count of each mixing weight.
    loc, scale
        m and s, where the data lie and how widely: one number, or one a column (D,).

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> MixtureOfFactorAnalysers(num_components=3, num_factors=1)
    MixtureOfFactorAnalysers(num_components=3, num_factors=1, concentration=1.0, loc=0.0, scale=1.0)
    """

    num_components: int
    num_factors: int
    concentration: float = 1.0
    loc: Setting = 0.0
    scale: Setting = 1.0

    def __post_init__(self) -> None:
        for name in ("num_components", "num_factors"):
            object.__setattr__(self, name, count_setting(name, getattr(self, name)))
        concentration = setting("concentration", self.concentration, positive=True)
        if isinstance(concentration, tuple):
            raise ValueError(f"concentration must be one number, got {len(concentration)}")
        object.__setattr__(self, "concentration", concentration)
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
        C, K, N = self.num_components, self.num_factors, num_data if x is None else len(x)
        m, s = filled(self.loc, (D,), x), filled(self.scale, (D,), x)
        pi = pyro.sample("pi", dist.Dirichlet(filled(self.concentration, (C,), x)))
        psi = pyro.sample("psi", dist.InverseGamma(2.0, (s / 2) ** 2).to_event(1))
        with pyro.plate("components", C):
            mu = pyro.sample("mu", dist.Normal(m, 5.0 * s).to_event(1))
            W = pyro.sample("W", dist.Normal(0.0, s.unsqueeze(-1).expand(D, K)).to_event(2))
        with pyro.plate("data", N):
            c = pyro.sample("c", dist.Categorical(pi))
            z = pyro.sample("z", dist.Normal(torch.zeros_like(W[0, 0]), 1.0).to_event(1))
            loc = (W[c] @ z.unsqueeze(-1)).squeeze(-1) + mu[c]
            return pyro.sample("x", dist.Normal(loc, psi.sqrt()).to_event(1), obs=x)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two flat clusters in space, each long in directions of its own."""
        from ..data import load

        return cls(num_components=2, num_factors=1, scale=2.0), {"x": load("two_rods").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two rows of one column, few enough for an exact answer."""
        return cls(num_components=2, num_factors=1), {"x": torch.tensor([[0.5], [-0.9]])}
