r"""Gaussian mixture model: every row picks a component, then a place around its centre.

Story
-----
::

    pi            ~ Dirichlet(a, ..., a)                      (K,)    mixing weights
    for k = 1..K  "components"
        mu_k      ~ Normal(m, 5 s)                            (D,)    centre
        Lambda_k  ~ Wishart(D + 2, (2 (s/3)^2 I)^(-1))        (D, D)  precision
    for n = 1..N  "data"
        z_n       ~ Categorical(pi)                           ()      its component
        x_n       ~ Normal(mu[z_n], Lambda[z_n]^(-1))         (D,)    what we see

with other precisions where `covariance` says so::

    "full"        Lambda_k, as above                          (D, D)  any ellipsoid
    "tied"        Lambda ~ Wishart(as above), one for all     (D, D)  the same ellipsoid
    "diag"        tau_k ~ Gamma(2, 2 (s/3)^2)                 (D,)    ellipsoids along the axes
    "spherical"   tau_k ~ Gamma(2, 2 (s/3)^2)                 ()      balls

a is `concentration`, m and s are `loc` and `scale`: clusters are expected within a few s of m and about a
third of s wide.

Summing z out, :math:`p(x_n) = \sum_k \pi_k\, \mathcal N(x_n \mid \mu_k, \Lambda_k^{-1})`, and
:math:`p(z_n = k \mid x_n) \propto \pi_k\, \mathcal N(x_n \mid \mu_k, \Lambda_k^{-1})` is the soft clustering.
With one shared :math:`\tau \to \infty` it hardens, and EM becomes k-means.

Bishop, *Pattern Recognition and Machine Learning* (2006), sections 9.2 and 10.2.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from . import Setting, Wishart, count_setting, filled, num_columns, setting, cluster_means

Covariance = Literal["full", "diag", "tied", "spherical"]


@dataclass(frozen=True)
class GMM:
    """Mixture of `num_components` Gaussians.

    Parameters
    ----------
    num_components
        K.
    covariance
        Which ellipsoids: "full", "diag", "tied" or "spherical".
    concentration
        a, the pseudo-count of each mixing weight; below 1 components may stay empty.
    loc, scale
        m and s, where the data lie and how widely: one number, or one a column (D,).

    Raises
    ------
    ValueError
        A value outside its range; the message lists what would have worked.

    Examples
    --------
    >>> GMM(num_components=3, covariance="diag", scale=2.0)
    GMM(num_components=3, covariance='diag', concentration=1.0, loc=0.0, scale=2.0)
    """

    num_components: int
    covariance: Covariance = "full"
    concentration: float = 1.0
    loc: Setting = 0.0
    scale: Setting = 1.0

    def __post_init__(self) -> None:
        if self.covariance not in get_args(Covariance):
            names = list(get_args(Covariance))
            raise ValueError(f"covariance must be one of {names}, got {self.covariance!r}")
        plain = {
            "num_components": count_setting("num_components", self.num_components),
            "concentration": setting("concentration", self.concentration, positive=True),
            "loc": setting("loc", self.loc),
            "scale": setting("scale", self.scale, positive=True),
        }
        if isinstance(plain["concentration"], tuple):
            raise ValueError(f"concentration must be one number, got {len(plain['concentration'])}")
        for name, value in plain.items():
            object.__setattr__(self, name, value)

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
        a, m, s = self._prior(x, num_features)
        K, N, tied = len(a), num_data if x is None else len(x), self.covariance == "tied"
        pi = pyro.sample("pi", dist.Dirichlet(a))
        if tied:
            precision = self._precision(s)
        with pyro.plate("components", K):
            mu = pyro.sample("mu", dist.Normal(m, 5.0 * s).to_event(1))
            if not tied:
                precision = self._precision(s)
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(pi))
            return pyro.sample("x", self._around(mu[z], precision if tied else precision[z]), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 2) -> None:
        """q(pi) q(mu) q(Lambda) or q(tau), each in its prior's family; z is summed out, not guessed.

        Centres start at means of clusters of `x` (k-means), everything else as though each component had
        been seen N/K times, s/3 wide.
        """
        a, m, s = self._prior(x, num_features)
        K, N, tied = len(a), num_data if x is None else len(x), self.covariance == "tied"
        rows = N / K
        pi = pyro.param("pi.concentration", lambda: a + rows, constraint=constraints.positive)
        loc = pyro.param("mu.loc", lambda: torch.normal(m.expand(K, -1), s) if x is None else cluster_means(x, K).to(m))
        scale = pyro.param("mu.scale", lambda: (s / 3 / rows**0.5).repeat(K, 1), constraint=constraints.positive)
        name, q = self._guess(s, N if tied else rows, () if tied else (K,))
        pyro.sample("pi", dist.Dirichlet(pi))
        if tied:
            pyro.sample(name, q)
        with pyro.plate("components", K):
            pyro.sample("mu", dist.Normal(loc, scale).to_event(1))
            if not tied:
                pyro.sample(name, q)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three overlapping clusters, and the story that should find them."""
        from ..data import load

        return cls(num_components=3, scale=2.0), {"x": load("three_clusters").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four numbers in two clusters, few enough for an exact answer."""
        return cls(num_components=2), {"x": torch.tensor([[-0.8], [-1.1], [0.9], [0.7]])}

    def _prior(self, x: Tensor | None, num_features: int) -> tuple[Tensor, Tensor, Tensor]:
        """a (K,), m (D,) and s (D,)."""
        D = num_columns(x, num_features, loc=self.loc, scale=self.scale)
        K = self.num_components
        return filled(self.concentration, (K,), x), filled(self.loc, (D,), x), filled(self.scale, (D,), x)

    def _precision(self, s: Tensor) -> Tensor:
        """Lambda or tau from its prior."""
        variance = 2.0 * (s / 3) ** 2
        if self.covariance == "diag":
            return pyro.sample("tau", dist.Gamma(2.0, variance).to_event(1))
        if self.covariance == "spherical":
            return pyro.sample("tau", dist.Gamma(2.0, variance.mean()))
        return pyro.sample("Lambda", Wishart(len(s) + 2, precision_matrix=variance.diag()))

    def _around(self, mu: Tensor, precision: Tensor) -> Any:
        """p(x | z): a normal around `mu` (..., D)."""
        if self.covariance == "diag":
            return dist.Normal(mu, precision.rsqrt()).to_event(1)
        if self.covariance == "spherical":
            return dist.Normal(mu, precision.rsqrt().unsqueeze(-1)).to_event(1)
        return dist.MultivariateNormal(mu, precision_matrix=precision)

    def _guess(self, s: Tensor, rows: float, shape: tuple[int, ...]) -> tuple[str, Any]:
        """The precision's name and its q: the prior's after `rows` rows with standard deviation s/3."""
        D, variance = len(s), (s / 3) ** 2
        if self.covariance in ("full", "tied"):
            df = pyro.param(
                "Lambda.df",
                lambda: s.new_full(shape, D + 2 + rows),
                constraint=constraints.greater_than(D - 1.0),
            )
            scale_tril = pyro.param(
                "Lambda.scale_tril",
                lambda: ((2 + rows) * variance).rsqrt().diag().repeat(*shape, 1, 1),
                constraint=constraints.lower_cholesky,
            )
            return "Lambda", Wishart(df, scale_tril=scale_tril)
        if self.covariance == "spherical":
            variance, rows = variance.mean(), rows * D
        start = s.new_full((*shape, *variance.shape), 2 + rows / 2)
        concentration = pyro.param("tau.concentration", start, constraint=constraints.positive)
        rate = pyro.param("tau.rate", start * variance, constraint=constraints.positive)
        return "tau", dist.Gamma(concentration, rate).to_event(variance.ndim)
