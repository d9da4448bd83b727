r"""Latent Dirichlet allocation on expected counts: topics and shares integrated out, assignments averaged.

Every distinct word of every document carries the probabilities of its topics; counts are their sums.  A visit to a block of
documents takes its old contribution out, lets each word choose anew given all *other* words,
:math:`r_{dvk} \propto (n_{dk} - r_{dvk} + \alpha_k)\,\frac{N_{kv} - r_{dvk} + \eta_v}{N_k - r_{dvk} + \sum\eta}`, and puts
the new contribution in: collapsed variational Bayes of order zero (Asuncion, Welling, Smyth and Teh, *On smoothing and
inference for topic models*, UAI 2009), with blocks visited as in incremental EM (Neal and Hinton 1998).

The start comes from a few stochastic passes over the blocks with falling steps (Foulds et al., *Stochastic collapsed
variational Bayesian inference for latent Dirichlet allocation*, KDD 2013), which break the symmetry of the topics quickly.

Concentrations are learned by Minka's fixed point on expected counts, where the chance that a count is zero is taken into
account (Teh, Newman and Welling, NIPS 2006, equation 18): otherwise spread-out expectations look like many topics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import cards
from .documents import CELLS, Documents, blocks

if TYPE_CHECKING:
    from .words import WordByWord

#: Blocks that a corpus has at least, and passes of a restart before it is judged, where words are many and few.
STEPS, TRIAL, TRIAL_FEW, MANY = 20, 3, 25, 100_000
#: Stochastic passes before the first full one, their step (t + DELAY) ** -DECAY, and rounds within a document.
PASSES, DELAY, DECAY, ROUNDS = 6, 16.0, 0.5, 4
#: During these passes words smooth topics less: sharp topics part sooner.
SHARPER = 0.2
#: Full passes with fixed concentrations, and then every how many they are learned.
BURN, EVERY = 5, 3
#: Passes at most after the documents set aside have come back.
LAST = 20
#: Bounds of learned concentrations.
LEAST, MOST = 1e-4, 20.0


@dataclass
class Counts:
    """Where a climb stands.

    Attributes
    ----------
    N, Nk
        Expected counts of words in topics (V, K), and of topics (K,).
    n
        Expected counts of topics in documents (D, K).
    alpha, eta
        Concentrations (K,), and of words (V, 1), or (V, K) where topics differ.
    kept
        Probabilities of topics for every place of every block, times its count.
    """

    N: Tensor
    Nk: Tensor
    n: Tensor
    alpha: Tensor
    eta: Tensor
    kept: list[Tensor] = field(default_factory=list)

    @property
    def phi(self) -> Tensor:
        """Posterior means of the topics given the counts, (K, V)."""
        return ((self.N + self.eta) / (self.Nk + self.eta.sum(0))).T

    def to(self, device: torch.device) -> Counts:
        """The same on a device, without the probabilities of single places."""
        N, Nk, n, alpha, eta = (t.to(device) for t in (self.N, self.Nk, self.n, self.alpha, self.eta))
        return Counts(N, Nk, n, alpha, eta)

    def copy(self) -> Counts:
        """The same without the probabilities of single places."""
        return Counts(self.N.clone(), self.Nk.clone(), self.n.clone(), self.alpha.clone(), self.eta.clone())


class ExpectedCounts:
    """One corpus and its concentrations, ready to climb, in memory or on the card where alpha is.

    Parameters
    ----------
    documents
        Counts of words.
    alpha, eta
        Concentrations (K,), and (V, 1) or (V, K); they say on which device the work is done.
    learn_alpha, learn_eta
        Whether they are learned; eta is scaled as a whole.
    tied
        Whether all entries of a learned alpha are one number.
    seed
        Of the start and of the order of blocks.
    """

    def __init__(
        self,
        documents: Documents,
        alpha: Tensor,
        eta: Tensor,
        learn_alpha: bool = False,
        learn_eta: bool = False,
        seed: int = 0,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.documents, self.tied = documents, tied
        self.learn_alpha, self.learn_eta = learn_alpha, learn_eta
        K, V, total, where = len(alpha), documents.num_words, documents.num_tokens, alpha.device
        # a start needs some steps: blocks of a small corpus are smaller
        cells = min(cards.cells_of(where, K, CELLS), max(64, len(documents.words) // STEPS))
        self.blocks = blocks(documents, dtype, cells, where)
        self.random = torch.Generator().manual_seed(seed)
        noise = torch.rand(V, K, generator=self.random, dtype=torch.float64) + 1.0
        N = (noise * (total / (V * K) / 1.5)).to(where)  # double, as small changes are added up in it for long
        n = torch.full((len(documents), K), total / max(1, len(documents)) / K, dtype=dtype, device=where)
        self.state = Counts(N, N.sum(0), n, alpha.to(dtype).clone(), eta.to(dtype).clone())
        self.passes, self.window = 0, 1
        self.trial = TRIAL if total > MANY else TRIAL_FEW

    def calm(self) -> bool:
        """Take plain steps from now on; whether that is a change: it never is."""
        return False

    def resume(self, state: Counts) -> None:
        """Topics of another corpus's climb: places get their probabilities under them, and are counted anew, twice."""
        self.state.N, self.state.Nk = state.N.double(), state.Nk.double()
        for _ in range(2):
            self.spread(state.eta)

    def shuffled(self) -> list[int]:
        """Numbers of all blocks in random order."""
        return torch.randperm(len(self.blocks), generator=self.random).tolist()

    # -- the start ---------------------------------------------------------------------------------------------------

    def begin(self, passes: int = PASSES) -> None:
        """Stochastic passes, then probabilities for every place."""
        s, tokens = self.state, max(self.documents.num_tokens, 1.0)
        sharp, dtype = s.eta * SHARPER, s.n.dtype
        sizes = torch.stack([b.counts.sum() for b in self.blocks]).tolist() if self.blocks else []
        step, first = 0, True
        for _ in range(passes):
            for i in self.shuffled():
                block = self.blocks[i]
                table = ((s.N + sharp) / (s.Nk + sharp.sum(0))).to(dtype)
                W = table.index_select(0, block.flat).view(*block.words.shape, -1)
                n = (
                    s.n[block.rows]
                    if not first
                    else block.counts.sum(1, keepdim=True).expand(-1, len(s.alpha)) / len(s.alpha)
                )
                n, r = settle(W, block.counts, n, s.alpha, ROUNDS)
                s.n[block.rows] = n
                rho = (step + DELAY) ** -DECAY
                s.N.mul_(1 - rho)
                block.add(s.N, r * (rho / max(sizes[i] / tokens, 1e-12)))
                s.Nk = s.N.sum(0)
                step += 1
            first = False
        self.spread(sharp)

    def spread(self, eta: Tensor) -> None:
        """Give every place its probabilities under the present topics, and count anew."""
        s = self.state
        table = ((s.N + eta) / (s.Nk + eta.sum(0))).to(s.n.dtype)
        s.N = torch.zeros_like(s.N)
        s.kept = []
        for block in self.blocks:
            W = table.index_select(0, block.flat).view(*block.words.shape, -1)
            s.n[block.rows], r = settle(W, block.counts, s.n[block.rows], s.alpha, 1)
            s.kept.append(r)
            block.add(s.N, r)
        s.Nk = s.N.sum(0)

    # -- passes ------------------------------------------------------------------------------------------------------

    def sweep(self) -> float:
        """One pass over all blocks; the log-likelihood of every word given all others, summed."""
        s, dtype = self.state, self.state.n.dtype
        learn = self.learn_alpha and self.passes >= BURN and self.passes % EVERY == 0
        gain, weight = torch.zeros_like(s.alpha), torch.zeros((), device=s.alpha.device)
        total = torch.zeros((), dtype=torch.float64, device=s.alpha.device)
        for i in self.shuffled():
            block, old = self.blocks[i], s.kept[i]
            c = block.counts.unsqueeze(2)
            own = old / c.clamp_min(1.0)
            p = (s.N + s.eta).to(dtype).index_select(0, block.flat).view_as(old).sub_(own).clamp_min_(1e-7)
            p.div_((s.Nk + s.eta.sum(0)).to(dtype))
            p.mul_(torch.sub(s.n[block.rows].unsqueeze(1), own, out=own).add_(s.alpha).clamp_min_(1e-7))
            norm = p.sum(2, keepdim=True)
            length = block.counts.sum(1, keepdim=True) - 1 + s.alpha.sum()
            total += (block.counts * (norm.squeeze(2) / length.clamp_min(1e-7)).log()).sum(dtype=torch.float64)
            p.div_(norm)
            new = p.mul_(c)
            if learn:
                g, w = concentration_terms(new, block.counts, s.alpha)
                gain, weight = gain + g, weight + w
            s.kept[i], s.n[block.rows] = new, new.sum(1)
            block.add(s.N, torch.sub(new, old, out=own))
            s.Nk = s.N.sum(0)
        s.N.clamp_(min=0)
        s.Nk = s.N.sum(0)
        if learn:
            s.alpha = (s.alpha * gain / weight).clamp(LEAST, MOST)
            s.alpha = s.alpha.mean().expand_as(s.alpha).clone() if self.tied else s.alpha
        if self.learn_eta and self.passes >= BURN and self.passes % EVERY == 0:
            s.eta = s.eta * eta_factor(s.N, s.eta).to(s.eta)
        self.passes += 1
        return float(total)


def settle(W: Tensor, counts: Tensor, n: Tensor, alpha: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Expected counts of topics (B, K) given topics' shares W (B, L, K) of the words, and those of every place (B, L, K)."""
    tiny = torch.finfo(W.dtype).tiny * 1e4
    for _ in range(rounds):
        theta = n + alpha
        ratio = counts / ((W @ theta.unsqueeze(2)).squeeze(2) + tiny)
        n = theta * (ratio.unsqueeze(1) @ W).squeeze(1)
    theta = n + alpha
    ratio = counts / ((W @ theta.unsqueeze(2)).squeeze(2) + tiny)
    return n, ratio.unsqueeze(2) * theta.unsqueeze(1) * W


def concentration_terms(r: Tensor, counts: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator (K,) and denominator of Minka's fixed point, over a block: expected digamma differences of counts.

    `r` (B, L, K) are the counts of topics at every place, which sum to `counts` (B, L).
    """
    n, p = r.sum(1), r / counts.unsqueeze(2).clamp_min(1e-9)
    some = -torch.expm1((torch.log1p(-p.clamp_max(1 - 1e-6)) * counts.unsqueeze(2)).sum(1))
    if_any = n / some.clamp_min(1e-9)
    gain = (some * ((alpha + if_any).digamma() - alpha.digamma())).sum(0)
    lengths, total = counts.sum(1), alpha.sum()
    return gain, ((lengths + total).digamma() - total.digamma()).sum()


def eta_factor(N: Tensor, eta: Tensor) -> Tensor:
    """Factor by which Minka's fixed point scales eta; expected counts below one half are taken for zero."""
    seen = N * (N > 0.5)
    total = eta.sum(0)
    gain = (eta * ((seen + eta).digamma() - eta.digamma())).sum()
    weight = (total * ((seen.sum(0) + total).digamma() - total.digamma())).sum()
    return (gain / weight).clamp(0.5, 2.0)


@dataclass(frozen=True)
class Climbed:
    """The end of a climb: its state, the log-likelihood of every pass, whether it converged, why it stopped, and the trials."""

    state: Counts
    history: list[float]
    converged: bool
    stopped: str = ""
    validation: list[float] = field(default_factory=list)
    trials: list[list[float]] = field(default_factory=list)


def climb(
    documents: Documents,
    alpha: Tensor,
    eta: Tensor,
    *,
    learn_alpha: bool = False,
    learn_eta: bool = False,
    tied: bool = False,
    restarts: int = 1,
    max_iter: int = 100,
    tol: float = 1e-4,
    seed: int = 0,
    tick: Callable[[int, float], Any] = lambda i, value: None,
    over: Callable[[], bool] = lambda: False,
) -> Climbed:
    """Several short climbs, the best to its end.

    Parameters
    ----------
    alpha, eta
        Concentrations (K,), and (V, 1) or (V, K), on the device of the work: word by word in machine code on a processor,
        blocks of documents at once on a card.
    tol
        Stop when the log-likelihood of a word rises by less.
    tick, over
        Called after every pass with its number and log-likelihood a word; whether the time is over.

    Where concentrations are learned, some documents are set aside to tell when that stops helping; they come back for the
    last passes, with concentrations fixed.
    """
    kind = engine(alpha.device)
    learn = learn_alpha or learn_eta
    aside, rest = set_aside(documents, seed) if learn else (None, documents)
    best: ExpectedCounts | WordByWord | None = None
    highest, history = -np.inf, []
    trials: list[list[float]] = []
    for r in range(restarts):
        # far apart: the restarts of neighbouring seeds are not each other's
        run = kind(rest, alpha, eta, learn_alpha, learn_eta, 1000 * seed + r, tied)
        run.begin()
        value = [run.sweep() for _ in range(min(run.trial, max_iter) if restarts > 1 else 1)]
        trials.append(list(value))
        if best is None or value[-1] > highest:
            best, highest, history = run, value[-1], value
    assert best is not None
    watch = Watch(best, aside, seed)
    tokens, converged, stopped = max(rest.num_tokens, 1.0), False, ""
    while len(history) < max_iter:
        if len(history) >= max_iter - LAST:
            best.calm()
        history.append(best.sweep())
        tick(len(history), history[-1] / tokens)
        if watch.worse(len(history)):
            break
        if still(history, best.window, tol * tokens) and not best.calm():
            converged = True
            break
        if over():
            stopped = "the budget is used up: the best state so far is returned"
            break
    if aside is None:
        return Climbed(best.state, history, converged, stopped, trials=trials)
    best = watch.join(documents, seed)
    best.calm()
    for _ in range(LAST):
        history.append(best.sweep())
        if abs(history[-1] - history[-2]) < tol * tokens:
            break
    return Climbed(best.state, history, converged or watch.ended, stopped, watch.seen, trials)


def engine(device: torch.device) -> type[ExpectedCounts] | type[WordByWord]:
    """What climbs on a device: word by word on a processor with a C compiler, else blocks of documents at once."""
    from .words import WordByWord, library

    return ExpectedCounts if cards.on_card(device) or library() is None else WordByWord


def still(history: list[float], window: int, least: float) -> bool:
    """Whether a pass changed the log-likelihood by less than `least`, on average over the last ones."""
    return len(history) > BURN + window - 1 and abs(history[-1] - history[-1 - window]) < least * window


def set_aside(documents: Documents, seed: int) -> tuple[Documents | None, Documents]:
    """A twentieth of the documents, at most 200, and all others; none of fewer than 40."""
    count = min(200, len(documents) // 20)
    if count < 2:
        return None, documents
    order = np.random.default_rng(seed).permutation(len(documents))
    return documents.take(np.sort(order[:count])), documents.take(np.sort(order[count:]))


class Watch:
    """Perplexity of the documents set aside: learning ends when it rises."""

    def __init__(self, run: Any, aside: Documents | None, seed: int, every: int = 10) -> None:
        self.run, self.ended, self.every = run, False, every
        self.seen: list[float] = []
        self.halves = None if aside is None else aside.halves(np.random.default_rng(seed))
        self.best: Counts | None = None

    def worse(self, passes: int) -> bool:
        """Whether it has risen since it was looked at last; a look every so many passes."""
        if self.halves is None or passes % self.every:
            return False
        from .perplexity import complete

        state = self.run.state
        score = complete(state.phi.double().cpu(), state.alpha.double().cpu(), *self.halves)
        value = float(np.exp(-float(score.sum()) / max(self.halves[1].num_tokens, 1.0)))
        if self.seen and value > min(self.seen) * 1.0005:
            self.ended = True
            return True
        if not self.seen or value < min(self.seen):
            self.best = state.copy()
        self.seen.append(value)
        return False

    def join(self, documents: Documents, seed: int) -> ExpectedCounts | WordByWord:
        """All documents with the best concentrations seen, which stay fixed."""
        state = self.best or self.run.state
        whole = type(self.run)(documents, state.alpha, state.eta, seed=seed)
        whole.resume(state)
        return whole
