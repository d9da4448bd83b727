r"""Latent Dirichlet allocation: every document mixes topics in shares of its own, every word picks a topic.

Story
-----
::

    for k = 1..K  "topics"
        phi_k      ~ Dirichlet(b, ..., b)                   (V,)    the words of topic k
    for d = 1..D  "documents"
        theta_d    ~ Dirichlet(a, ..., a)                   (K,)    its shares of the topics
        w_d        ~ BagOfWords(theta_d phi)                (V,)    how often each word occurs

a is `concentration`, b is `word_concentration`.  Where they are None, they are learned as points: `alpha` (K,), one a
topic, and `eta`.  The length of a document is given, not modelled.

Every word has a topic z of its own, as `TokenLDA` tells it; here it is summed out,
:math:`p(w_d \mid \theta_d, \phi) = \prod_v \big(\sum_k \theta_{dk}\phi_{kv}\big)^{c_{dv}}`, so that only counts matter: the
two stories give the same density.  Given the lengths, LDA is also a factorisation of the table of counts into
non-negative factors, :math:`E[C] = \mathrm{diag}(N)\,\Theta\Phi`.

A mixture (`MultinomialMixture`) allows a document one topic only.

Blei, Ng & Jordan, *Latent Dirichlet Allocation* (JMLR 3, 2003).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..mixtures import count_setting, pseudo_count
from . import BagOfWords, check_words, topic_counts, word_shares

if TYPE_CHECKING:
    from .amortised import AmortisedTopics


@dataclass(frozen=True)
class LDA:
    """Latent Dirichlet allocation with `num_topics` topics.

    Parameters
    ----------
    num_topics
        K.
    concentration, word_concentration
        a and b: pseudo-counts of each topic in a document and of each word in a topic; below 1 documents have few topics
        and topics few words.  None: learned.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> LDA(num_topics=20)
    LDA(num_topics=20, concentration=0.1, word_concentration=0.05)
    """

    num_topics: int
    concentration: float | None = 0.1
    word_concentration: float | None = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_topics", count_setting("num_topics", self.num_topics))
        for name in ("concentration", "word_concentration"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))

    def model(
        self,
        w: Tensor | None = None,
        words: Tensor | None = None,
        num_words: int = 12,
        num_documents: int = 200,
        length: int = 40,
    ) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        w
            Counts: (D, V) of all words, or (D, L) of those in `words`; None dreams up `num_documents` documents.
        words
            (D, L) ids of the words that w counts; what is not there did not occur.  Padding counts 0.
        num_words
            V, where w does not tell it.
        num_documents, length
            D and the words of a document where there is no `w`.

        Returns
        -------
        w.
        """
        K, V, D = self.num_topics, check_words(words, w, num_words), num_documents if w is None else len(w)
        alpha, eta = self._prior()
        with pyro.plate("topics", K):
            phi = pyro.sample("phi", dist.Dirichlet(eta.expand(V)))
        with pyro.plate("documents", D):
            theta = pyro.sample("theta", dist.Dirichlet(alpha))
            return pyro.sample("w", BagOfWords(theta, phi, words, length=length), obs=w)

    def guide(
        self,
        w: Tensor | None = None,
        words: Tensor | None = None,
        num_words: int = 12,
        num_documents: int = 200,
        length: int = 40,
    ) -> None:
        """q(phi) as Dirichlets of their own, and for theta the Dirichlets that suit them best: nothing else to learn."""
        K, V, D = self.num_topics, check_words(words, w, num_words), num_documents if w is None else len(w)
        alpha, eta = self._prior()
        total = float(D * length if w is None else w.sum())
        phi = pyro.param(
            "phi.concentration",
            lambda: eta.detach() + total / (K * V) * (0.5 + torch.rand(K, V)),
            constraint=constraints.positive,
        )
        with pyro.plate("topics", K):
            pyro.sample("phi", dist.Dirichlet(phi))
        if w is None:
            theta = alpha.expand(D, K)
        else:
            which = torch.arange(V).expand(D, V) if words is None else words
            theta = topic_counts(word_shares(phi, which), w.to(phi), alpha)
        with pyro.plate("documents", D):
            pyro.sample("theta", dist.Dirichlet(theta))

    def amortised(
        self, encoder: Any, w: Tensor, words: Tensor | None = None, num_words: int = 12, **_: Any
    ) -> "AmortisedTopics":
        """The guide that `Amortised(encoder)` stands for: a network reads a document and guesses its topics."""
        from .amortised import AmortisedTopics

        return AmortisedTopics(self, check_words(words, w, num_words), encoder)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Documents over nine words whose topics are the bars of a three by three grid."""
        from ..data import load

        return cls(num_topics=6, concentration=0.5, word_concentration=0.1), {"w": load("bars").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two documents over two words, few enough for an exact answer."""
        return cls(num_topics=2, concentration=1.5, word_concentration=1.5), {
            "w": torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        }

    def _prior(self) -> tuple[Tensor, Tensor]:
        """alpha (K,) and eta (): settings, or parameters to learn."""
        positive = constraints.positive
        if self.concentration is None:
            alpha = pyro.param("alpha", lambda: torch.full((self.num_topics,), 0.1), constraint=positive)
        else:
            alpha = torch.full((self.num_topics,), self.concentration)
        if self.word_concentration is None:
            return alpha, pyro.param("eta", lambda: torch.tensor(0.05), constraint=positive)
        return alpha, torch.tensor(self.word_concentration)
