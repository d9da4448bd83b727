r"""Latent Dirichlet allocation, word by word: the story as it is taught, every topic assignment in the open.

Story
-----
::

    for k = 1..K  "topics"
        phi_k      ~ Dirichlet(b, ..., b)                   (V,)    the words of topic k
    for d = 1..D  "documents"
        theta_d    ~ Dirichlet(a, ..., a)                   (K,)    its shares of the topics
        for n = 1..N_d  "words"
            z_dn   ~ Categorical(theta_d)                   ()      the topic of this word
            w_dn   ~ Categorical(phi[z_dn])                 ()      the word

a is `concentration`, b is `word_concentration`.  Documents differ in length: what lies behind a document's end is -1.

Summing each z out, :math:`p(w_{dn} = v) = \sum_k \theta_{dk}\phi_{kv}`; the product over n depends on counts only, and
that is the story of `LDA`.  The mean of a document's z is another summary of it than theta: it is what the words
said, without the prior.

Blei, Ng & Jordan, *Latent Dirichlet Allocation* (JMLR 3, 2003); Griffiths & Steyvers, *Finding scientific topics*
(PNAS 101, 2004), whose bars are the example.
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..mixtures import count_setting, pseudo_count
from . import Word, check_ids, topic_counts, word_shares


@dataclass(frozen=True)
class TokenLDA:
    """Latent Dirichlet allocation with `num_topics` topics, told word by word.

    Parameters
    ----------
    num_topics
        K.
    concentration, word_concentration
        a and b: pseudo-counts of each topic in a document and of each word in a topic.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> TokenLDA(num_topics=3)
    TokenLDA(num_topics=3, concentration=0.1, word_concentration=0.05)
    """

    num_topics: int
    concentration: float = 0.1
    word_concentration: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_topics", count_setting("num_topics", self.num_topics))
        for name in ("concentration", "word_concentration"):
            object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))

    def model(self, w: Tensor | None = None, num_words: int = 12, num_documents: int = 100, length: int = 30) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        w
            (D, N), word ids in the order of the text, -1 behind its end; None dreams up `num_documents` documents.
        num_words
            V.
        num_documents, length
            D and N where there is no `w`.

        Returns
        -------
        w, (D, N).
        """
        K, V, D, N = self.num_topics, num_words, *self._sizes(w, num_words, num_documents, length)
        with pyro.plate("topics", K):
            phi = pyro.sample("phi", dist.Dirichlet(torch.full((V,), self.word_concentration)))
        with pyro.plate("documents", D, dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((K,), self.concentration)))
            with pyro.plate("words", N, dim=-1):
                z = pyro.sample("z", dist.Categorical(theta))
                return pyro.sample("w", Word(phi, z), obs=w)

    def guide(self, w: Tensor | None = None, num_words: int = 12, num_documents: int = 100, length: int = 30) -> None:
        """q(phi) as Dirichlets of their own, and for theta the Dirichlets that suit them best; z is summed out."""
        K, V, D, N = self.num_topics, num_words, *self._sizes(w, num_words, num_documents, length)
        phi = pyro.param(
            "phi.concentration",
            lambda: self.word_concentration + D * N / (K * V) * (0.5 + torch.rand(K, V)),
            constraint=constraints.positive,
        )
        with pyro.plate("topics", K):
            pyro.sample("phi", dist.Dirichlet(phi))
        theta = torch.full((D, K), self.concentration)
        if w is not None:
            theta = topic_counts(word_shares(phi, w.clamp_min(0)), (w >= 0).to(phi), theta[0])
        with pyro.plate("documents", D, dim=-2):
            pyro.sample("theta", dist.Dirichlet(theta.unsqueeze(-2)))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor | int]]:
        """Forty short documents over nine words, whose topics are the bars of a three by three grid."""
        from ..data import load

        counts = load("bars", num_data=40).x.long()
        w = torch.full((len(counts), int(counts.sum(1).max())), -1)
        for row, c in zip(w, counts):
            row[: int(c.sum())] = torch.arange(len(c)).repeat_interleave(c)
        return cls(num_topics=6, concentration=0.5, word_concentration=0.1), {"w": w, "num_words": counts.shape[1]}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor | int]]:
        """Two documents of two words, few enough for an exact answer."""
        story = cls(num_topics=2, concentration=1.5, word_concentration=1.5)
        return story, {"w": torch.tensor([[0, 0], [1, 0]]), "num_words": 2}

    def _sizes(self, w: Tensor | None, num_words: int, num_documents: int, length: int) -> tuple[int, int]:
        """D and N."""
        if w is None:
            return num_documents, length
        if w.ndim != 2 or w.is_floating_point():
            raise ValueError(f"w has shape {tuple(w.shape)} and dtype {w.dtype}; expected word ids (D, N), -1 for none")
        check_ids("w", w, -1, num_words)
        return len(w), w.shape[1]
