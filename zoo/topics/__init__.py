"""Topic models: every document mixes topics, and a topic is a distribution over words.  Below is what the stories share."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.indexing import Vindex
from pyro.poutine.util import is_validation_enabled
from torch import Size, Tensor
from torch.distributions import Categorical, Multinomial, Normal, constraints

_STORIES = {"DTM": ".dtm", "LDA": ".lda", "TokenLDA": ".tokens"}


def __getattr__(name: str) -> Any:
    if name in _STORIES:
        return getattr(import_module(_STORIES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class BagOfWords(TorchDistribution):
    r"""Words drawn one by one from a mixture of topics, seen as counts: :math:`p = \prod_v (\theta\phi)_v^{c_v}`.

    This is the probability of the words in the order in which they stood, whatever that was: no multinomial coefficient,
    so that perplexities and bounds are those of the words, and equal whether words are told one by one or counted.

    Parameters
    ----------
    theta
        (..., D, K) shares of topics.
    phi
        (..., K, V) topics; or (..., K, T, V), a version for every slice of time.
    words
        (D, L) which words the counts belong to; None for all V.
    times
        (D,) the slice of each document, where there are slices.
    length
        Words of a document that is dreamt up.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"theta": constraints.simplex, "phi": constraints.simplex}
    has_enumerate_support = False

    def __init__(
        self,
        theta: Tensor,
        phi: Tensor,
        words: Tensor | None = None,
        times: Tensor | None = None,
        length: int = 40,
    ) -> None:
        self.theta, self.phi, self.words, self.times, self.length = theta, phi, words, times, length
        event = phi.shape[-1] if words is None else words.shape[-1]
        super().__init__(theta.shape[:-1], Size([event]), validate_args=False)
        del self._validate_args  # parameters need no look at every step, observed counts do

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Counts."""
        return constraints.independent(constraints.nonnegative_integer, 1)

    def shares(self) -> Tensor:
        """Probability of every word (..., D, V), or of those in `words` (..., D, L)."""
        if self.times is None:
            probs = self.theta @ self.phi
            return probs if self.words is None else probs.gather(-1, self.words.expand(*probs.shape[:-1], -1))
        if self.words is None:
            return (self.theta.unsqueeze(-1) * self.phi[..., self.times, :].movedim(-2, -3)).sum(-2)
        return (self.theta.movedim(-1, -2).unsqueeze(-1) * self.phi[..., self.times[:, None], self.words]).sum(-3)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of the words that were counted, (..., D)."""
        return torch.xlogy(value, self.shares()).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts of `length` words a document."""
        whole = BagOfWords(self.theta, self.phi, None, self.times)
        counts = Multinomial(self.length, whole.shares()).sample(Size(sample_shape))
        return counts if self.words is None else counts.gather(-1, self.words.expand(*counts.shape[:-1], -1))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "BagOfWords":
        """The same over more batch dimensions."""
        theta = self.theta.expand(*batch_shape, self.theta.shape[-1])
        return BagOfWords(theta, self.phi, self.words, self.times, self.length)


class Word(TorchDistribution):
    """A word of topic z: Categorical(phi[z]) whose density gathers phi[z, w] and builds no table of z by w.

    Parameters
    ----------
    phi
        (..., K, V) topics.
    z
        The topic of each place; -1 as a value is no word, with density 1.
    """

    has_enumerate_support = False

    def __init__(self, phi: Tensor, z: Tensor) -> None:
        self.phi, self.z = phi, z
        super().__init__(torch.broadcast_shapes(z.shape, phi.shape[:-2]), Size([]), validate_args=False)
        del self._validate_args

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """Word ids, and -1."""
        return constraints.integer_interval(-1, self.phi.shape[-1] - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log phi[z, w], and 0 where there is no word."""
        log_phi = Vindex(self.phi)[..., self.z, value.clamp_min(0)].log()
        return torch.where(value < 0, torch.zeros_like(log_phi), log_phi)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Word ids."""
        return Categorical(Vindex(self.phi)[..., self.z, :]).sample(Size(sample_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Word":
        """The same over more batch dimensions."""
        return Word(self.phi, self.z.expand(batch_shape))


class RandomWalk(TorchDistribution):
    r"""A vector that drifts: :math:`b_1 \sim \mathcal N(m, s^2 I)`, :math:`b_t \sim \mathcal N(b_{t-1}, \sigma^2 I)`.

    Parameters
    ----------
    loc
        (..., V), m.
    first, step
        s and sigma, standard deviations, one number each.
    num_steps
        T.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real_vector,
        "first": constraints.positive,
        "step": constraints.positive,
    }
    has_rsample = True
    support = constraints.independent(constraints.real, 2)
    # For diagrams: the dimension of the event along which it is a chain, and what shapes its first step alone.
    time_dim: ClassVar[int] = -2
    first_arguments: ClassVar[tuple[str, ...]] = ("loc", "first")

    def __init__(self, loc: Tensor, first: Tensor, step: Tensor, num_steps: int, batch_shape: Any = ()) -> None:
        self.loc, self.first, self.step, self.num_steps = loc, first, step, num_steps
        super().__init__(Size(batch_shape), Size([num_steps, loc.shape[-1]]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Over the last two dimensions (T, V)."""
        start = Normal(self.loc, self.first, validate_args=False).log_prob(value[..., 0, :]).sum(-1)
        walk = Normal(value[..., :-1, :], self.step, validate_args=False).log_prob(value[..., 1:, :])
        return start + walk.sum((-1, -2))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, *batch_shape, T, V)."""
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        moves = torch.cat([self.loc + self.first * noise[..., :1, :], self.step * noise[..., 1:, :]], -2)
        return moves.cumsum(-2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RandomWalk":
        """The same over more batch dimensions."""
        return RandomWalk(self.loc, self.first, self.step, self.num_steps, batch_shape)


def check_words(words: Tensor | None, w: Tensor | None, num_words: int) -> int:
    """V, after a look at the documents: counts (D, V), or counts (D, L) of `words` (D, L).

    Raises
    ------
    ValueError
        Shapes that do not fit, or a word id outside 0 .. V - 1; the document is named.
    """
    if w is None or words is None:
        if words is not None:
            raise ValueError("words tells which words w counts: pass w, too")
        if w is None:
            return num_words
        if w.ndim != 2:
            raise ValueError(f"w has shape {tuple(w.shape)}, expected counts of words in documents (D, V)")
        return w.shape[1]
    if words.shape != w.shape or words.ndim != 2:
        raise ValueError(f"words has shape {tuple(words.shape)} and w {tuple(w.shape)}; both must be (D, L)")
    check_ids("words", words, 0, num_words)
    return num_words


def check_ids(name: str, ids: Tensor, least: int, num_words: int) -> None:
    """Refuse ids outside least .. V - 1, naming the first document with one; where validation is off, there is no look."""
    if not ids.numel() or not is_validation_enabled():
        return
    if int(ids.min()) < least or int(ids.max()) >= num_words:
        d, n = (int(i) for i in ((ids < least) | (ids >= num_words)).nonzero()[0])
        raise ValueError(
            f"{name}: document {d} has word id {int(ids[d, n])} at place {n}; with num_words={num_words} ids are 0 to "
            f"{num_words - 1}"
        )


def check_times(times: Tensor | None, D: int, T: int) -> None:
    """One slice from 0 to T - 1 for every document.

    Raises
    ------
    ValueError
        Another number of times than documents, or a slice outside 0 .. T - 1.
    """
    if times is None:
        return
    if tuple(times.shape) != (D,):
        raise ValueError(f"times has shape {tuple(times.shape)}, expected one slice a document: ({D},)")
    if times.is_floating_point() or int(times.min()) < 0 or int(times.max()) >= T:
        raise ValueError(
            f"times must be whole numbers from 0 to {T - 1} (num_slices={T}); they run from {times.min().item():g} to "
            f"{times.max().item():g} ({str(times.dtype).removeprefix('torch.')})"
        )


def topic_counts(shares: Tensor, weights: Tensor, prior: Tensor, rounds: int = 20) -> Tensor:
    r"""Concentrations of q(theta_d) that suit q(phi), by coordinate ascent: (D, K).

    :math:`\gamma_{dk} = \alpha_k + \sum_l c_{dl}\, r_{dlk}` with
    :math:`r_{dlk} \propto \exp(E[\log\theta_{dk}])\, b_{dlk}` (Blei, Ng & Jordan 2003, equations 6 and 7).

    Parameters
    ----------
    shares
        (D, L, K), :math:`b_{dlk} = \exp(E[\log \phi_{k, w_{dl}}])` of the words of each document.
    weights
        (D, L), how often each occurs; 0 for padding.
    prior
        (K,), alpha.
    """
    gamma = prior + weights.sum(-1, keepdim=True) / len(prior)
    for _ in range(rounds):
        theta = (gamma.digamma() - gamma.sum(-1, keepdim=True).digamma()).exp()
        ratio = weights / ((shares @ theta.unsqueeze(-1)).squeeze(-1) + torch.finfo(theta.dtype).tiny)
        gamma = prior + theta * (ratio.unsqueeze(-2) @ shares).squeeze(-2)
    return gamma


def word_shares(phi: Tensor, words: Sequence[int] | Tensor) -> Tensor:
    r""":math:`\exp(E[\log \phi_{k, w}])` under Dirichlets with concentrations `phi` (K, V), for words (D, L): (D, L, K)."""
    table = (phi.digamma() - phi.sum(-1, keepdim=True).digamma()).exp()
    return table.mT[words]
