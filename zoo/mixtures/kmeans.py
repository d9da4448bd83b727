r"""k-means as a story: clusters of equal size and equal, vanishing spread.

Story
-----
::

    for k = 1..K  "components"
        mu_k     ~ Normal(m, 100 s)              (D,)   centre
    for n = 1..N  "data"
        z_n      ~ Categorical(1/K, ..., 1/K)    ()     its cluster
        x_n      ~ Normal(mu[z_n], e s)          (D,)   what we see

m and s are `loc` and `scale`, e is `spread`, a small number that is not learned.

Responsibilities are :math:`p(z_n = k \mid x_n) \propto \exp(-\|x_n - \mu_k\|^2 / 2 e^2 s^2)`: as e falls to 0 they become 1 for
the nearest centre and 0 for all others, an M-step becomes the mean of the rows that belong to a centre, and EM becomes
Lloyd's algorithm.  What is lost on the way: shares, shapes, doubt, and a density.

Bishop, *Pattern Recognition and Machine Learning* (2006), section 9.3.2.
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from . import Setting, count_setting, filled, num_columns, pseudo_count, setting


@dataclass(frozen=True)
class KMeans:
    """k-means with `num_components` clusters, as the limit of a Gaussian mixture.

    Parameters
    ----------
    num_components
        K.
    loc, scale
        m and s, where the data lie and how widely: one number, or one a column (D,).
    spread
        e, the spread of a cluster as a share of s.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> KMeans(num_components=3)
    KMeans(num_components=3, loc=0.0, scale=1.0, spread=0.001)
    """

    num_components: int
    loc: Setting = 0.0
    scale: Setting = 1.0
    spread: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_components", count_setting("num_components", self.num_components))
        object.__setattr__(self, "loc", setting("loc", self.loc))
        object.__setattr__(self, "scale", setting("scale", self.scale, positive=True))
        object.__setattr__(self, "spread", pseudo_count("spread", self.spread))

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
        with pyro.plate("components", K):
            mu = pyro.sample("mu", dist.Normal(m, 100.0 * s).to_event(1))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(filled(1 / K, (K,), x)))
            return pyro.sample("x", dist.Normal(mu[z], self.spread * s).to_event(1), obs=x)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three overlapping clusters, cut by straight lines."""
        from ..data import load

        return cls(num_components=3), {"x": load("three_clusters").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four numbers in two clusters that overlap, few enough for an exact answer."""
        return cls(num_components=2, spread=0.2), {"x": torch.tensor([[-0.8], [-1.1], [0.9], [0.7]])}
