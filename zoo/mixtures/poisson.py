r"""Poisson mixture: every row picks a component, then a count around its rate.

Story
-----
::

    pi           ~ Dirichlet(a, ..., a)          (K,)   mixing weights
    for k = 1..K  "components"
        lam_k    ~ Gamma(shape, rate)            ()     events expected
    for n = 1..N  "data"
        z_n      ~ Categorical(pi)               ()     its component
        x_n      ~ Poisson(lam[z_n])             ()     how many were counted

Rows of D counts, x (N, D), have D rates a component, lam (K, D), and are independent given z.

Summing z out, :math:`p(x_n) = \sum_k \pi_k\, \lambda_k^{x_n} e^{-\lambda_k} / x_n!`, whose variance exceeds
its mean by the variance of :math:`\lambda_z`: overdispersed counts ask for a mixture.

Karlis & Xekalaki, *Mixed Poisson Distributions* (International Statistical Review 73, 2005).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from . import Setting, count_setting, filled, num_columns, setting, cluster_means


@dataclass(frozen=True)
class PoissonMixture:
    """Mixture of `num_components` Poisson distributions, over single counts (N,) or rows of counts (N, D).

    Parameters
    ----------
    num_components
        K.
    concentration
        a, the pseudo-count of each mixing weight; below 1 components may stay empty.
    shape, rate
        Of the rates' gamma prior: counts near shape / rate are expected, as surely as if `shape` events had
        been counted in `rate` rows.  One number, or one a column (D,).

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> PoissonMixture(num_components=2)
    PoissonMixture(num_components=2, concentration=1.0, shape=2.0, rate=0.2)
    """

    num_components: int
    concentration: float = 1.0
    shape: Setting = 2.0
    rate: Setting = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_components", count_setting("num_components", self.num_components))
        for name in ("concentration", "shape", "rate"):
            object.__setattr__(self, name, setting(name, getattr(self, name), positive=True))
        if isinstance(self.concentration, tuple):
            raise ValueError(f"concentration must be one number, got {len(self.concentration)}")

    def model(self, x: Tensor | None = None, num_data: int = 300, num_features: int | None = None) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            Counts that were seen, (N,) or (N, D); None dreams up `num_data` of them.
        num_data, num_features
            N and D where there is no `x`; without D there is one count a row, (N,), unless `shape` or `rate`
            has columns.

        Returns
        -------
        x.
        """
        a, shape, rate = self._prior(x, num_features)
        K, N, event = len(a), num_data if x is None else len(x), shape.ndim
        pi = pyro.sample("pi", dist.Dirichlet(a))
        with pyro.plate("components", K):
            lam = pyro.sample("lam", dist.Gamma(shape, rate).to_event(event))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(pi))
            return pyro.sample("x", dist.Poisson(lam[z]).to_event(event), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 300, num_features: int | None = None) -> None:
        """q(pi) q(lam), each in its prior's family; z is summed out, not guessed.

        Rates start at means of clusters (k-means on square roots, which have equal variances), as
        though each had been seen N/K times.
        """
        a, shape, rate = self._prior(x, num_features)
        K, N = len(a), num_data if x is None else len(x)
        rows = N / K

        def expected() -> Tensor:
            if x is None:
                return dist.Gamma(shape, rate).sample((K,))
            roots = cluster_means(x.reshape(N, -1).to(a).clamp_min(0).sqrt(), K)
            return roots.to(a).square().reshape(K, *shape.shape)

        pi = pyro.param("pi.concentration", lambda: a + rows, constraint=constraints.positive)
        concentration = pyro.param(
            "lam.concentration", lambda: shape + rows * expected(), constraint=constraints.positive
        )
        rates = pyro.param(
            "lam.rate", lambda: (rate + rows).expand(K, *shape.shape).clone(), constraint=constraints.positive
        )
        pyro.sample("pi", dist.Dirichlet(pi))
        with pyro.plate("components", K):
            pyro.sample("lam", dist.Gamma(concentration, rates).to_event(shape.ndim))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Counts of three rates, and the story that should find them."""
        from ..data import load

        return cls(num_components=3), {"x": load("poisson_counts").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four counts of two rates, few enough for an exact answer."""
        return cls(num_components=2), {"x": torch.tensor([1.0, 2.0, 9.0, 12.0])}

    def _prior(self, x: Tensor | None, num_features: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """a (K,), and shape and rate of the gamma prior: () for single counts, (D,) for rows of counts."""
        vectors = isinstance(self.shape, tuple) or isinstance(self.rate, tuple)
        single = x.ndim == 1 if x is not None else num_features is None
        columns: tuple[int, ...] = ()
        if vectors or not single:
            wanted = 1 if num_features is None else num_features
            columns = (num_columns(x, wanted, shape=self.shape, rate=self.rate),)
        a = filled(self.concentration, (self.num_components,), x)
        return a, filled(self.shape, columns, x), filled(self.rate, columns, x)
