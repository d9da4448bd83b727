r"""Mixture over columns of different kinds: every row picks a component, which explains each kind in its own way.

Story
-----
::

    pi                ~ Dirichlet(a, ..., a)              (K,)      mixing weights
    for k = 1..K  "components"
        mu_k          ~ Normal(m, 5 s)                    (R,)      real columns: centre
        tau_k         ~ Gamma(2, 2 (s/3)^2)               (R,)      and precision
        lam_k         ~ Gamma(1, 1/r)                     (C,)      counts: rate
        p_k           ~ Beta(2, 2)                        (B,)      yes or no: share of yes
        phi_k         ~ Dirichlet(1.1, ..., 1.1)          (F, V)    categories: share of each level
    for n = 1..N  "data"
        z_n           ~ Categorical(pi)                   ()        its component
        real_n        ~ Normal(mu[z_n], 1/tau[z_n])       (R,)
        counts_n      ~ Poisson(lam[z_n])                 (C,)
        binary_n      ~ Bernoulli(p[z_n])                 (B,)
        categories_n  ~ Categorical(phi[z_n])             (F,)

Any of the four kinds may be left out.  m and s are `loc` and `scale`, r is `rate`, the counts expected beforehand.

Given z the columns are independent, so that log densities of all kinds simply add up: a mixture is the easiest way to
a joint density over things that have no common unit.

Everitt, *A finite mixture model for the clustering of mixed-mode data* (Statistics & Probability Letters 6, 1988).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from . import Setting, count_setting, filled, pseudo_count, setting, table_columns


@dataclass(frozen=True)
class MixedMixture:
    """Mixture of `num_components` over real, count, binary and categorical columns.

    Parameters
    ----------
    num_components, num_levels
        K, and V of the categorical columns.
    concentration
        a, the pseudo-count of each mixing weight.
    loc, scale
        m and s of the real columns: one number, or one a column (R,).
    rate
        r, the counts expected beforehand.

    Raises
    ------
    ValueError
        A value outside its range, or no columns at all.

    Examples
    --------
    >>> MixedMixture(num_components=2)
    MixedMixture(num_components=2, num_levels=2, concentration=1.0, loc=0.0, scale=1.0, rate=1.0)
    """

    num_components: int
    num_levels: int = 2
    concentration: float = 1.0
    loc: Setting = 0.0
    scale: Setting = 1.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_components", "num_levels"):
            object.__setattr__(self, name, count_setting(name, getattr(self, name)))
        for name in ("concentration", "rate"):
            object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))
        object.__setattr__(self, "loc", setting("loc", self.loc))
        object.__setattr__(self, "scale", setting("scale", self.scale, positive=True))

    def model(
        self,
        real: Tensor | None = None,
        counts: Tensor | None = None,
        binary: Tensor | None = None,
        categories: Tensor | None = None,
        num_data: int = 300,
    ) -> dict[str, Tensor]:
        """Tell the story.

        Parameters
        ----------
        real, counts, binary, categories
            (N, R), (N, C), (N, B) and (N, F), those that were seen; without any, one column of each kind is dreamt up.
        num_data
            N where nothing was seen.

        Returns
        -------
        Columns by kind.
        """
        given = {"real": real, "counts": counts, "binary": binary, "categories": categories}
        dreaming = all(v is None for v in given.values())
        D = {kind: 1 if dreaming else 0 if v is None else table_columns(v, 1) for kind, v in given.items()}
        N = next((len(v) for v in given.values() if v is not None), num_data)
        K, V = self.num_components, self.num_levels
        m, s = filled(self.loc, (D["real"],), real), filled(self.scale, (D["real"],), real)
        pi = pyro.sample("pi", dist.Dirichlet(filled(self.concentration, (K,), real)))
        seen = {}
        with pyro.plate("components", K):
            if D["real"]:
                mu = pyro.sample("mu", dist.Normal(m, 5.0 * s).to_event(1))
                tau = pyro.sample("tau", dist.Gamma(2.0, 2.0 * (s / 3) ** 2).to_event(1))
            if D["counts"]:
                lam = pyro.sample("lam", dist.Gamma(torch.ones(D["counts"]), 1.0 / self.rate).to_event(1))
            if D["binary"]:
                p = pyro.sample("p", dist.Beta(2.0 * torch.ones(D["binary"]), 2.0).to_event(1))
            if D["categories"]:
                phi = pyro.sample("phi", dist.Dirichlet(torch.full((D["categories"], V), 1.1)).to_event(1))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(pi))
            if D["real"]:
                seen["real"] = pyro.sample("real", dist.Normal(mu[z], tau[z].rsqrt()).to_event(1), obs=real)
            if D["counts"]:
                seen["counts"] = pyro.sample("counts", dist.Poisson(lam[z]).to_event(1), obs=counts)
            if D["binary"]:
                seen["binary"] = pyro.sample("binary", dist.Bernoulli(p[z]).to_event(1), obs=binary)
            if D["categories"]:
                fn = dist.Categorical(phi[z]).to_event(1)
                seen["categories"] = pyro.sample("categories", fn, obs=categories)
        return seen

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Patients of two kinds: two measurements, one count, one yes or no, one of three answers."""
        from ..data import load

        x = load("patients").x
        data = {"real": x[:, :2], "counts": x[:, 2:3], "binary": x[:, 3:4], "categories": x[:, 4:5].long()}
        return cls(num_components=2, num_levels=3, rate=4.0), data

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three rows with a column of each kind, few enough for an exact answer."""
        data = {
            "real": torch.tensor([[-0.6], [0.8], [1.0]]),
            "counts": torch.tensor([[0.0], [3.0], [2.0]]),
            "binary": torch.tensor([[0.0], [1.0], [1.0]]),
            "categories": torch.tensor([[0], [1], [0]]),
        }
        return cls(num_components=2, num_levels=2, rate=2.0), data
