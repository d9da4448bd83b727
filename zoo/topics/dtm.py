r"""Dynamic topic model: topics whose words drift from one slice of time to the next.

Story
-----
::

    m               ~ Normal(0, 5 I)                        (V,)    how common each word is on the whole
    for k = 1..K  "topics"
        beta_k^1    ~ Normal(m, s^2 I)                      (V,)    topic k in the first slice
        beta_k^t    ~ Normal(beta_k^(t-1), sigma^2 I)       (V,)    and a little later, t = 2..T
    for d = 1..D  "documents"
        theta_d     ~ Dirichlet(a, ..., a)                  (K,)    its shares of the topics
        w_d         ~ BagOfWords(theta_d softmax(beta^t))   (V,)    how often each word occurs, t = times[d]

a is `concentration`, s is `spread` and sigma is `drift`; where a or sigma is None it is learned as a point.  The whole walk
of a topic is one site, beta (K, T, V).  Slices may hold any number of documents, and none: there the walk just goes on.

With sigma = 0 the topics stand still, and this is LDA with logistic-normal topics.  The walk carries words that a slice
never saw, which is how a topic is told ahead: :math:`\beta^{T+1} \mid \beta^T \sim \mathcal N(\beta^T, \sigma^2 I)`.

Blei & Lafferty, *Dynamic Topic Models* (ICML 2006).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..mixtures import count_setting, pseudo_count
from . import BagOfWords, RandomWalk, check_times, check_words, topic_counts


@dataclass(frozen=True)
class DTM:
    """Dynamic topic model with `num_topics` topics.

    Parameters
    ----------
    num_topics
        K.
    drift
        sigma, how far a word's weight (a logarithm) moves from slice to slice; None: learned.
    spread
        s, how far topics lie from the common words.
    concentration
        a, the pseudo-count of each topic in a document; None: learned, one a topic.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> DTM(num_topics=10, drift=0.2)
    DTM(num_topics=10, drift=0.2, spread=1.0, concentration=0.1)
    """

    num_topics: int
    drift: float | None = None
    spread: float = 1.0
    concentration: float | None = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_topics", count_setting("num_topics", self.num_topics))
        for name in ("drift", "spread", "concentration"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))
        if self.spread is None:
            raise ValueError("spread must be a positive number, got None")

    def model(
        self,
        w: Tensor | None = None,
        words: Tensor | None = None,
        times: Tensor | None = None,
        num_words: int = 12,
        num_slices: int | None = None,
        num_documents: int = 200,
        length: int = 40,
    ) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        w, words
            Counts, as for `LDA`; None dreams up `num_documents` documents.
        times
            (D,) the slice of each document, from 0; None deals out evenly those that are dreamt up.
        num_words, num_slices
            V, and T: to be told wherever there are `times`, since some documents do not show how many slices there are.
        num_documents, length
            D and the words of a document where there is no `w`.

        Returns
        -------
        w.
        """
        K, V, D = self.num_topics, check_words(words, w, num_words), num_documents if w is None else len(w)
        times, T = self._slices(times, num_slices, D, seen=w is not None)
        alpha, sigma = self._learned()
        m = pyro.sample("m", dist.Normal(torch.zeros(V), 5.0).to_event(1))
        with pyro.plate("topics", K):
            beta = pyro.sample("beta", RandomWalk(m, torch.tensor(self.spread), sigma, T))
        with pyro.plate("documents", D):
            theta = pyro.sample("theta", dist.Dirichlet(alpha))
            return pyro.sample("w", BagOfWords(theta, beta.softmax(-1), words, times, length), obs=w)

    def guide(
        self,
        w: Tensor | None = None,
        words: Tensor | None = None,
        times: Tensor | None = None,
        num_words: int = 12,
        num_slices: int | None = None,
        num_documents: int = 200,
        length: int = 40,
    ) -> None:
        """q(beta) as a Gaussian Markov chain over time for every topic and word: a walk bent towards what was seen.

        The walk's own steps, shrunk by `beta.scale`, are put around `beta.loc`, so that neighbouring slices stay close;
        q(theta) are the Dirichlets that suit the mean topics best.
        """
        K, V, D = self.num_topics, check_words(words, w, num_words), num_documents if w is None else len(w)
        times, T = self._slices(times, num_slices, D, seen=w is not None)
        alpha, sigma = self._learned()
        seen = torch.ones(V) if w is None else self._totals(w, words, V)
        common = (seen + 0.5).log() - (seen + 0.5).log().mean()
        loc = pyro.param("m.loc", lambda: common.clone())
        pyro.sample("m", dist.Normal(loc, 0.1).to_event(1))
        beta_loc = pyro.param("beta.loc", lambda: (common + self.spread * torch.randn(K, 1, V)).repeat(1, T, 1))
        scale = pyro.param("beta.scale", lambda: torch.full((K, 1, 1), 0.3), constraint=constraints.unit_interval)
        walk = RandomWalk(torch.zeros(V), torch.tensor(self.spread), sigma, T)
        with pyro.plate("topics", K):
            shrunk = torch.distributions.AffineTransform(beta_loc, scale, event_dim=2)
            beta = pyro.sample("beta", dist.TransformedDistribution(walk.expand([K]), [shrunk]))
        theta = alpha.expand(D, K)
        if w is not None:
            which = torch.arange(V).expand(D, V) if words is None else words
            shares = beta.softmax(-1)[:, times[:, None], which].movedim(0, -1)
            theta = topic_counts(shares.detach(), w.to(shares), alpha)
        with pyro.plate("documents", D):
            pyro.sample("theta", dist.Dirichlet(theta))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor | int]]:
        """Two topics over ten words that trade places within six slices."""
        from ..data import load

        drifting = load("drifting_words")
        assert drifting.labels is not None
        return cls(num_topics=2, drift=0.4, concentration=0.5), {
            "w": drifting.x,
            "times": drifting.labels,
            "num_slices": 6,
        }

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor | int]]:
        """Two documents over two words in two slices, few enough for an exact answer."""
        w, times = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([0, 1])
        return cls(num_topics=1, drift=0.5), {"w": w, "times": times, "num_slices": 2}

    def _learned(self) -> tuple[Tensor, Tensor]:
        """alpha (K,) and sigma (): settings, or parameters to learn."""
        positive = constraints.positive
        if self.concentration is None:
            alpha = pyro.param("alpha", lambda: torch.full((self.num_topics,), 0.1), constraint=positive)
        else:
            alpha = torch.full((self.num_topics,), self.concentration)
        if self.drift is None:
            return alpha, pyro.param("sigma", lambda: torch.tensor(0.2), constraint=positive)
        return alpha, torch.tensor(self.drift)

    @staticmethod
    def _slices(times: Tensor | None, num_slices: int | None, D: int, seen: bool) -> tuple[Tensor, int]:
        """The slice of each document, and T."""
        if seen and times is None:
            raise ValueError(
                "the documents have no times: give the slice of each, times (D,) from 0, and their number, num_slices"
            )
        if times is not None and num_slices is None:
            raise ValueError("times tells the slice of each document; tell num_slices, the number of slices, too")
        T = count_setting("num_slices", num_slices) if num_slices is not None else 5
        if times is None:
            return torch.arange(D) * T // D, T
        check_times(times, D, T)
        return times, T

    @staticmethod
    def _totals(w: Tensor, words: Tensor | None, V: int) -> Tensor:
        """How often each word occurs at all, (V,)."""
        if words is None:
            return w.sum(0).to(torch.get_default_dtype())
        total = torch.zeros(V)
        return total.index_add_(0, words.reshape(-1), w.reshape(-1).to(total))
