"""A network that reads the words of a document and guesses its topics: the amortised guide of LDA."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Normal, constraints
from torch.nn.functional import pad, softplus

from . import check_words

if TYPE_CHECKING:
    from .lda import LDA


class LogisticNormal(TorchDistribution):
    r"""Shares whose log ratios to the last one are normal: :math:`\log(\theta_k / \theta_K) \sim N(m_k, s_k^2)`.

    Aitchison and Shen, *Logistic-normal distributions* (Biometrika 1980). No intermediate is a difference of nearly equal
    numbers, so that shares of topics that a document lacks stay above zero in single precision.

    Parameters
    ----------
    loc, scale
        (..., K - 1).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real_vector, "scale": constraints.positive}
    support = constraints.simplex
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-1], Size([loc.shape[-1] + 1]), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Shares (..., K)."""
        ratios = Normal(self.loc, self.scale, validate_args=False).rsample(Size(sample_shape))
        return pad(ratios, (0, 1)).softmax(-1).clamp_min(torch.finfo(self.loc.dtype).tiny)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(theta) over the first K - 1 shares."""
        logs = value.log()
        ratios = logs[..., :-1] - logs[..., -1:]
        return Normal(self.loc, self.scale, validate_args=False).log_prob(ratios).sum(-1) - logs.sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogisticNormal:
        """The same over more batch dimensions."""
        shape = (*batch_shape, self.loc.shape[-1])
        return LogisticNormal(self.loc.expand(shape), self.scale.expand(shape))


class AmortisedTopics(nn.Module):
    """q(phi) as Dirichlets of their own, and a logistic normal for theta that a network reads off the document.

    Miao, Yu and Blunsom, *Neural variational inference for text processing* (ICML 2016) and Srivastava and Sutton,
    *Autoencoding variational inference for topic models* (ICLR 2017), with the story's own Dirichlet prior.

    Parameters
    ----------
    story
        The `LDA` that it guesses for.
    num_words
        V.
    encoder
        Widths of the network's hidden layers, or a module from (D, V) to (D, H); it reads log(1 + counts).

    Examples
    --------
    >>> fit(LDA(20), corpus, SVI(guide=Amortised((100,))))   # doctest: +SKIP
    """

    def __init__(self, story: LDA, num_words: int, encoder: Sequence[int] | nn.Module = (100,)) -> None:
        super().__init__()
        self.story = story
        if isinstance(encoder, nn.Module):
            with torch.no_grad():
                width = encoder(torch.zeros(2, num_words)).shape[-1]
            layers = [encoder]
        else:
            widths = [num_words, *encoder]
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Softplus())]
            width = widths[-1]
        head = nn.Linear(width, 2 * (story.num_topics - 1))
        with torch.no_grad():  # all documents start alike
            head.weight.mul_(0.1)
            head.bias.zero_()
        self.network = nn.Sequential(*layers, head)

    def forward(
        self,
        w: Tensor,
        words: Tensor | None = None,
        num_words: int = 12,
        num_documents: int = 200,
        length: int = 40,
    ) -> None:
        """Guess topics, then the shares of every document."""
        K, V = self.story.num_topics, check_words(words, w, num_words)
        counts = w if words is None else torch.zeros(len(w), V).to(w).scatter_add(1, words, w)
        prior = self.story._prior()[1].detach()
        concentration = pyro.param(
            "phi.concentration",
            lambda: prior + float(w.sum()) / (K * V) * (0.5 + torch.rand(K, V)),
            constraint=constraints.positive,
        )
        with pyro.plate("topics", K):
            pyro.sample("phi", dist.Dirichlet(concentration))
        some = next(self.network.parameters())
        loc, raw = self.network(counts.to(some).log1p()).to(concentration).chunk(2, -1)
        with pyro.plate("documents", len(w)):
            pyro.sample("theta", LogisticNormal(loc, softplus(raw) + 1e-3))
