r"""Categorical mixture, or latent class analysis: every row picks a class, then a level of every feature.

Story
-----
::

    pi           ~ Dirichlet(a, ..., a)          (K,)      mixing weights
    for k = 1..K  "components"
        phi_k    ~ Dirichlet(b, ..., b)          (D, V)    levels of every feature in class k
    for n = 1..N  "data"
        z_n      ~ Categorical(pi)               ()        its class
        x_n      ~ Categorical(phi[z_n])         (D,)      the levels that we see, 0..V-1

a is `concentration`, b is `level_concentration`.  All features have V levels; where they differ, `NaiveBayes` tells
the same story feature by feature.

Goodman, *Exploratory latent structure analysis using both identifiable and unidentifiable models* (Biometrika 61, 1974).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from . import count_setting, filled, pseudo_count, table_columns


@dataclass(frozen=True)
class CategoricalMixture:
    """Mixture of `num_components` classes of rows of `num_levels`-valued features.

    Parameters
    ----------
    num_components, num_levels
        K and V.
    concentration, level_concentration
        a and b, the pseudo-counts of each class and of each level in a class.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> CategoricalMixture(num_components=2, num_levels=3)
    CategoricalMixture(num_components=2, num_levels=3, concentration=1.0, level_concentration=1.1)
    """

    num_components: int
    num_levels: int
    concentration: float = 1.0
    level_concentration: float = 1.1

    def __post_init__(self) -> None:
        for name in ("num_components", "num_levels"):
            object.__setattr__(self, name, count_setting(name, getattr(self, name)))
        for name in ("concentration", "level_concentration"):
            object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))

    def model(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 5) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, D) levels 0..V-1, what was seen; None dreams up `num_data` rows.
        num_data, num_features
            N and D where there is no `x`.

        Returns
        -------
        x, (N, D).
        """
        K, V, D = self.num_components, self.num_levels, table_columns(x, num_features)
        pi = pyro.sample("pi", dist.Dirichlet(filled(self.concentration, (K,), None)))
        with pyro.plate("components", K):
            phi = pyro.sample("phi", dist.Dirichlet(filled(self.level_concentration, (D, V), None)).to_event(1))
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Categorical(pi))
            return pyro.sample("x", dist.Categorical(phi[z]).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 5) -> None:
        """q(pi) q(phi) as Dirichlets; classes start at levels that differ."""
        K, V, D = self.num_components, self.num_levels, table_columns(x, num_features)
        N = num_data if x is None else len(x)
        pi = pyro.param(
            "pi.concentration", self.concentration + torch.full((K,), N / K), constraint=constraints.positive
        )
        start = self.level_concentration + N / (K * V) * (0.5 + torch.rand(K, D, V))
        phi = pyro.param("phi.concentration", start, constraint=constraints.positive)
        pyro.sample("pi", dist.Dirichlet(pi))
        with pyro.plate("components", K):
            pyro.sample("phi", dist.Dirichlet(phi).to_event(1))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Five questions with three answers each, and the two camps behind them."""
        from ..data import load

        return cls(num_components=2, num_levels=3), {"x": load("survey").x.long()}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four rows of two features with two levels, few enough for an exact answer."""
        x = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 1]])
        return cls(num_components=2, num_levels=2, level_concentration=2.0), {"x": x}
