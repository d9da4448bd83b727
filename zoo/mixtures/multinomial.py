r"""Multinomial mixture: every document has one topic and draws all of its words from it.

Story
-----
::

    pi           ~ Dirichlet(a, ..., a)          (K,)    mixing weights
    for k = 1..K  "components"
        phi_k    ~ Dirichlet(b, ..., b)          (V,)    the words of topic k
    for n = 1..N  "data"
        z_n      ~ Categorical(pi)               ()      its topic
        x_n      ~ Multinomial(phi[z_n])         (V,)    how often each word occurs

a is `concentration`, b is `word_concentration`.  The length of a document is given, not modelled.

One topic a document is too strict: a text about sport and money has to choose.  Latent Dirichlet allocation lets every
word choose instead.

Nigam, McCallum, Thrun & Mitchell, *Text Classification from Labeled and Unlabeled Documents using EM* (Machine
Learning 39, 2000).
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
class MultinomialMixture:
    """Mixture of `num_components` topics, one a document.

    Parameters
    ----------
    num_components
        K.
    concentration, word_concentration
        a and b, the pseudo-counts of each topic and of each word in a topic; b above 1 keeps every word possible.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> MultinomialMixture(num_components=3)
    MultinomialMixture(num_components=3, concentration=1.0, word_concentration=1.1)
    """

    num_components: int
    concentration: float = 1.0
    word_concentration: float = 1.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_components", count_setting("num_components", self.num_components))
        for name in ("concentration", "word_concentration"):
            object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))

    def model(self, x: Tensor | None = None, num_data: int = 200, num_features: int = 12, length: int = 40) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, V) counts, what was seen; None dreams up `num_data` documents.
        num_data, num_features, length
            N, V and the words of a document where there is no `x`.

        Returns
        -------
        x, (N, V).
        """
        K, V, N = self.num_components, table_columns(x, num_features), num_data if x is None else len(x)
        pi = pyro.sample("pi", dist.Dirichlet(filled(self.concentration, (K,), x)))
        with pyro.plate("components", K):
            phi = pyro.sample("phi", dist.Dirichlet(filled(self.word_concentration, (V,), x)))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Categorical(pi))
            # Documents that were seen have lengths of their own; the density asks only how the words of each are shared out.
            return pyro.sample("x", dist.Multinomial(length, probs=phi[z], validate_args=False), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 200, num_features: int = 12, length: int = 40) -> None:
        """q(pi) q(phi) as Dirichlets; topics start at words that differ."""
        K, V, N = self.num_components, table_columns(x, num_features), num_data if x is None else len(x)
        words = torch.full((V,), N * length / V) if x is None else x.sum(0).to(torch.get_default_dtype())
        pi = pyro.param(
            "pi.concentration", self.concentration + torch.full((K,), N / K), constraint=constraints.positive
        )
        start = self.word_concentration + words / K * (0.5 + torch.rand(K, V))
        phi = pyro.param("phi.concentration", start, constraint=constraints.positive)
        pyro.sample("pi", dist.Dirichlet(pi))
        with pyro.plate("components", K):
            pyro.sample("phi", dist.Dirichlet(phi))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Short documents of three topics over twelve words."""
        from ..data import load

        return cls(num_components=3), {"x": load("bags_of_words").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four documents over two words, few enough for an exact answer."""
        x = torch.tensor([[4.0, 1.0], [3.0, 0.0], [1.0, 3.0], [0.0, 2.0]])
        return cls(num_components=2, word_concentration=2.0), {"x": x}
