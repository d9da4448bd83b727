r"""Gaussian mixture with conjugate priors: the doubt about a centre has the shape of its component.

Story
-----
::

    pi            ~ Dirichlet(a, ..., a)                         (K,)    mixing weights
    for k = 1..K  "components"
        Lambda_k  ~ Wishart(D + 2, (2 (s/3)^2 I)^(-1))           (D, D)  precision
        mu_k      ~ Normal(m, (kappa Lambda_k)^(-1))             (D,)    centre
    for n = 1..N  "data"
        z_n       ~ Categorical(pi)                              ()      its component
        x_n       ~ Normal(mu[z_n], Lambda[z_n]^(-1))            (D,)    what we see

a is `concentration`, m and s are `loc` and `scale`; kappa is `strength`, the number of rows that the prior of a centre
is worth.

The prior of (mu_k, Sigma_k) is normal-inverse-Wishart, conjugate to the rows of a component: given z the posterior is of
the same family, with kappa + N_k and D + 2 + N_k for kappa and D + 2.  In `GMM` the prior of mu_k does not know Lambda_k.

Murphy, *Machine Learning: A Probabilistic Perspective* (2012), section 11.4.2.8.
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from . import Setting, Wishart, count_setting, filled, num_columns, pseudo_count, setting


@dataclass(frozen=True)
class ConjugateGMM:
    """Mixture of `num_components` Gaussians with normal-inverse-Wishart priors.

    Parameters
    ----------
    num_components
        K.
    concentration
        a, the pseudo-count of each mixing weight.
    loc, scale
        m and s, where the data lie and how widely: one number, or one a column (D,).
    strength
        kappa, rows that the prior of a centre is worth.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> ConjugateGMM(num_components=3)
    ConjugateGMM(num_components=3, concentration=1.0, loc=0.0, scale=1.0, strength=0.01)
    """

    num_components: int
    concentration: float = 1.0
    loc: Setting = 0.0
    scale: Setting = 1.0
    strength: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_components", count_setting("num_components", self.num_components))
        object.__setattr__(self, "loc", setting("loc", self.loc))
        object.__setattr__(self, "scale", setting("scale", self.scale, positive=True))
        for name in ("concentration", "strength"):
            object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))

    def model(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 2) -> Tensor:
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
        K, N = self.num_components, num_data if x is None else len(x)
        m, s = filled(self.loc, (D,), x), filled(self.scale, (D,), x)
        pi = pyro.sample("pi", dist.Dirichlet(filled(self.concentration, (K,), x)))
        with pyro.plate("components", K):
            precision = pyro.sample("Lambda", Wishart(D + 2, precision_matrix=(2.0 * (s / 3) ** 2).diag()))
            mu = pyro.sample("mu", dist.MultivariateNormal(m, precision_matrix=self.strength * precision))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(pi))
            return pyro.sample("x", dist.MultivariateNormal(mu[z], precision_matrix=precision[z]), obs=x)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three overlapping clusters, and the story that should find them."""
        from ..data import load

        return cls(num_components=3, scale=2.0), {"x": load("three_clusters").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four numbers in two clusters, few enough for an exact answer."""
        return cls(num_components=2, strength=0.5), {"x": torch.tensor([[-0.8], [-1.1], [0.9], [0.7]])}
