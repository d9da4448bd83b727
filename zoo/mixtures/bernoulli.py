r"""Bernoulli mixture: every row picks a component, then answers every question yes or no as it does.

Story
-----
::

    pi           ~ Dirichlet(a, ..., a)          (K,)    mixing weights
    for k = 1..K  "components"
        p_k      ~ Beta(b, b)                    (D,)    how often it says yes
    for n = 1..N  "data"
        z_n      ~ Categorical(pi)               ()      its component
        x_n      ~ Bernoulli(p[z_n])             (D,)    its answers, 0 or 1

a is `concentration`, b is `pseudo_count`.  Given the component, answers are independent; over all rows they are not:
:math:`\operatorname{cov}(x) = \sum_k \pi_k\,(\Sigma_k + p_k p_k^\top) - \bar p\,\bar p^\top`, which is how a mixture of
independent pixels can draw a digit.

Bishop, *Pattern Recognition and Machine Learning* (2006), section 9.3.3.
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
class BernoulliMixture:
    """Mixture of `num_components` rows of independent yes-or-no answers.

    Parameters
    ----------
    num_components
        K.
    concentration
        a, the pseudo-count of each mixing weight.
    pseudo_count
        b, yes and no answers seen beforehand in every component; above 1 no answer becomes impossible.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> BernoulliMixture(num_components=3)
    BernoulliMixture(num_components=3, concentration=1.0, pseudo_count=2.0)
    """

    num_components: int
    concentration: float = 1.0
    pseudo_count: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_components", count_setting("num_components", self.num_components))
        object.__setattr__(self, "concentration", pseudo_count("concentration", self.concentration))
        object.__setattr__(self, "pseudo_count", pseudo_count("pseudo_count", self.pseudo_count))

    def model(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 8) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, D) of 0 and 1, what was seen; None dreams up `num_data` rows.
        num_data, num_features
            N and D where there is no `x`.

        Returns
        -------
        x, (N, D).
        """
        K, D, N = self.num_components, table_columns(x, num_features), num_data if x is None else len(x)
        pi = pyro.sample("pi", dist.Dirichlet(filled(self.concentration, (K,), x)))
        b = filled(self.pseudo_count, (D,), x)
        with pyro.plate("components", K):
            p = pyro.sample("p", dist.Beta(b, b).to_event(1))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(pi))
            return pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 8) -> None:
        """q(pi) q(p), as Dirichlet and Betas; components start at shares that differ."""
        K, D, N = self.num_components, table_columns(x, num_features), num_data if x is None else len(x)
        share = torch.full((D,), 0.5) if x is None else x.nanmean(0)
        odds = (share * (0.5 + torch.rand(K, D))).clamp(0.02, 0.98)
        pi = pyro.param(
            "pi.concentration", self.concentration + torch.full((K,), N / K), constraint=constraints.positive
        )
        yes = pyro.param("p.yes", self.pseudo_count + N / K * odds, constraint=constraints.positive)
        no = pyro.param("p.no", self.pseudo_count + N / K * (1 - odds), constraint=constraints.positive)
        pyro.sample("pi", dist.Dirichlet(pi))
        with pyro.plate("components", K):
            pyro.sample("p", dist.Beta(yes, no).to_event(1))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Eight questions that two kinds of people answer."""
        from ..data import load

        return cls(num_components=2), {"x": load("answers").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four rows of two answers, few enough for an exact answer."""
        return cls(num_components=2, pseudo_count=2.0), {
            "x": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        }
