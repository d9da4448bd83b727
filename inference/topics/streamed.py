r"""Latent Dirichlet allocation in one pass after another over documents that are not kept: topics alone are remembered.

Documents are read in runs of neighbours, the next run while the present one is worked on; what belongs to a document is
inferred anew at every visit and let go, so that memory does not grow with their number.

EM: every word of a document chooses its topic with probability
:math:`r_{dvk} \propto (n_{dk} + \alpha_k)\,\frac{N_{kv} + \eta_v}{N_k + \sum\eta}`.  *Stochastic* passes average the counts of
a run of documents into those of all with falling weights (Foulds et al., *Stochastic collapsed variational Bayesian inference
for latent Dirichlet allocation*, KDD 2013: the own count of a word is not taken out); *full* passes replace N by the counts of
all documents.  The start is a climb in memory on documents drawn from all over.

SVI: natural gradients of a run of documents (Hoffman et al., JMLR 2013), then full steps; see `variational`.

Several ranks hold documents apart: sums over documents are all-reduced, K V numbers a pass, and in a stochastic pass every rank
visits a run of its own under the same topics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from ..distributed import ALONE, Ranks
from . import cards
from .documents import Block, Documents
from .expected import DELAY, LEAST, MOST, Climbed, Counts, Watch, concentration_terms, eta_factor, settle
from .expected import climb as climb_in_memory
from .full_passes import BURN, LAST, FullPasses, kept_counts
from .pass_file import PassFile
from .variational import FEW_ROUNDS, ROUNDS, VariationalBayes, local_step, mean_log
from .visits import Piece, Visits
from .words import Places, improvement, library, padded
from .words import settle as settle_places

#: Documents from all over that the start is made from.
SAMPLE = 2000
#: Stochastic passes, the power with which their weights fall, and rounds within a document.
PASSES, DECAY, SETTLED = 2, 0.7, 12
#: Documents that are set aside, and full passes between looks at them.
ASIDE, LOOKS = 200, 5


def some_numbers(n: int, count: int, seed: int) -> np.ndarray:
    """Numbers of documents from all over, one of every stretch of equal length."""
    if n <= count:
        return np.arange(n)
    edges = np.linspace(0, n, count + 1).astype(np.int64)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def some_documents(documents: Documents, count: int, seed: int, ranks: Ranks = ALONE) -> Documents:
    """Documents from all over; of all ranks, on every rank."""
    chosen = some_numbers(ranks.total(len(documents)), count, seed)
    if not ranks.shares_rows:
        return documents.take(chosen)
    own = chosen[(chosen >= ranks.offset) & (chosen < ranks.offset + len(documents))] - ranks.offset
    parts = ranks.gather(documents.take(own))
    starts = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(p.starts) for p in parts]))])
    words, counts = (np.concatenate([getattr(p, name) for p in parts]) for name in ("words", "counts"))
    return Documents(starts, words, counts, documents.num_words)


class StreamedCounts:
    """Expected counts of words in topics, and nothing of any document.

    Parameters
    ----------
    documents
        Counts of words, perhaps on disk.
    start
        The end of a climb on some of them, on the device of the work.
    learn_alpha, learn_eta, tied
        As for `ExpectedCounts`.
    """

    def __init__(
        self,
        documents: Documents,
        start: Counts,
        learn_alpha: bool = False,
        learn_eta: bool = False,
        tied: bool = False,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.documents, self.ranks, self.where = documents, ranks, start.alpha.device
        self.visits = Visits(documents, len(start.alpha), self.where)
        self.tokens = max(total(ranks, documents.num_tokens), 1.0)
        self.learn_alpha, self.learn_eta, self.tied = learn_alpha, learn_eta, tied
        self.random = torch.Generator().manual_seed(seed)
        N = start.N.double() * (self.tokens / max(float(start.Nk.sum()), 1.0))
        self.state = Counts(N, N.sum(0), N.new_zeros(0, N.shape[1]), start.alpha.clone(), start.eta.clone())
        self.steps = self.passes = self.rounds = 0
        self.native = library()

    def leave_out(self, aside: np.ndarray) -> None:
        """Documents, by their sorted numbers among those of all ranks, that are not counted."""
        own = aside[(aside >= self.ranks.offset) & (aside < self.ranks.offset + len(self.documents))]
        self.visits.aside = own - self.ranks.offset

    def card(self, history: list[float]) -> dict[str, Any]:
        """How far it has come."""
        return {"steps": self.steps, "passes": self.passes, "rounds": self.rounds, "history": history}

    def go_on(self, state: Counts, card: dict[str, Any]) -> list[float]:
        """Stand where another run stood; what it drew for its rounds is drawn again. Returns its history."""
        self.state = state
        self.steps, self.passes, self.rounds = card["steps"], card["passes"], card["rounds"]
        for _ in range(self.rounds):
            torch.randperm(len(self.visits.runs), generator=self.random)
        return list(card["history"])

    def table(self) -> Tensor:
        """Topics as shares of the words, (V, K)."""
        s = self.state
        return ((s.N + s.eta) / (s.Nk + s.eta.sum(0))).float()

    def visit(
        self, table: Tensor, piece: Piece, S: Tensor, learn: bool = False
    ) -> tuple[Tensor | float, Tensor, Tensor]:
        """Add the expected counts of some documents to S (V, K); their log-likelihood, and terms for alpha."""
        if isinstance(piece, Documents) and self.native is not None:
            return self.by_word(table, piece, S, learn)
        return self.by_block(table, self.visits.blocks(piece, torch.float32), S, learn)

    def by_word(self, table: Tensor, part: Documents, S: Tensor, learn: bool) -> tuple[float, Tensor, Tensor]:
        """In machine code, word by word."""
        assert self.native is not None
        alpha, lengths = self.state.alpha, torch.from_numpy(part.lengths).float()
        K, tables = len(alpha), padded(table)
        n, found = padded((lengths / K)[:, None].expand(-1, K)), torch.zeros_like(tables)
        none = torch.empty_like(n) if learn else None
        value = settle_places(self.native, Places(part), tables, n, padded(alpha), SETTLED, S=found, none=none)
        S += found[:, :K]
        if none is None:
            return value, torch.zeros_like(alpha), torch.zeros(())
        return value, *improvement(alpha, n[:, :K], 1.0 - none[:, :K], lengths)

    def by_block(self, table: Tensor, some: list[Block], S: Tensor, learn: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The same in blocks of documents, on the device of the work."""
        alpha, value = self.state.alpha, torch.zeros((), dtype=torch.float64, device=self.where)
        gain, weight = torch.zeros_like(alpha), torch.zeros((), device=self.where)
        for block in some:
            W = table.index_select(0, block.flat).view(*block.words.shape, -1)
            length = block.counts.sum(1, keepdim=True)
            n, r = settle(W, block.counts, length.expand(-1, len(alpha)) / len(alpha), alpha, SETTLED)
            block.add(S, r)
            shares = (n + alpha) / (length + alpha.sum())
            value += torch.xlogy(block.counts, (W @ shares.unsqueeze(2)).squeeze(2)).sum(dtype=torch.float64)
            if learn:
                g, w = concentration_terms(r, block.counts, alpha)
                gain, weight = gain + g, weight + w
        return value, gain, weight

    def stochastic_pass(self) -> None:
        """All runs in random order, each moving the counts towards what it would make of all documents."""
        s = self.state
        for piece, tokens in self.visits.shuffled(self.random, self.ranks):
            S = torch.zeros_like(s.N, dtype=cards.sum_dtype(s.alpha))
            self.visit(self.table(), piece, S)
            S, seen = self.ranks.add(S, torch.tensor(tokens, device=self.where))
            rho = (self.steps + DELAY) ** -DECAY
            s.N.mul_(1 - rho).add_(S, alpha=rho * self.tokens / max(float(seen), 1.0))
            s.Nk = s.N.sum(0)
            self.steps += 1
        self.rounds += 1

    def full_pass(self) -> float:
        """The counts of all documents under the present topics; returns the log-likelihood under these."""
        s, new = self.state, torch.zeros_like(self.state.N)
        learn = self.learn_alpha and self.passes >= BURN
        table, value = self.table(), torch.zeros((), dtype=torch.float64, device=self.where)
        gain, weight = torch.zeros_like(s.alpha), torch.zeros((), device=self.where)
        for piece in self.visits.all():
            v, g, w = self.visit(table, piece, new, learn)
            value, gain, weight = value + v, gain + g, weight + w
        new, value, gain, weight = self.ranks.add(new, value, gain, weight)
        s.N, s.Nk = new, new.sum(0)
        if learn:
            s.alpha = (s.alpha * gain / weight).clamp(LEAST, MOST)
            s.alpha = s.alpha.mean().expand_as(s.alpha).clone() if self.tied else s.alpha
        if self.learn_eta and self.passes >= BURN:
            s.eta = s.eta * eta_factor(s.N, s.eta).to(s.eta)
        self.passes += 1
        return float(value)


def total(ranks: Ranks, own: float) -> float:
    """Of the documents of all ranks."""
    return float(ranks.add(torch.tensor(own, dtype=torch.float64))[0])


def climb(
    documents: Documents,
    alpha: Tensor,
    eta: Tensor,
    *,
    driver: str = "stepwise",
    learn_alpha: bool = False,
    learn_eta: bool = False,
    tied: bool = False,
    restarts: int = 1,
    max_iter: int = 100,
    tol: float = 1e-4,
    seed: int = 0,
    tick: Callable[[int, float], Any] = lambda i, value: None,
    over: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    file: PassFile | None = None,
) -> Climbed:
    """A start in memory, stochastic passes ("stepwise", not "batch"), then full passes until they help no more.

    Parameters are those of `expected.climb`; restarts are judged on the documents of the start, which are worked on by the
    processor whatever the device, so that the same topics are refined everywhere.  Where concentrations are learned, some
    documents from all over are set aside to tell when that stops helping; they come back for the last passes.  `file` is kept
    up to date between passes, and gone on from.
    """
    late = (lambda: ranks.first(over())) if ranks.shares_rows else over
    found = file.read() if file is not None else None
    if found is None:
        some = some_documents(documents, SAMPLE, seed, ranks)
        first = climb_in_memory(
            some, alpha.cpu(), eta.cpu(), restarts=restarts, max_iter=min(30, max_iter), tol=tol, seed=seed, over=over
        )
        state = ranks.first(first.state) if ranks.shares_rows else first.state
    else:
        state = kept_counts(found[0])
    run = StreamedCounts(documents, state.to(alpha.device), learn_alpha, learn_eta, tied, seed, ranks)
    count = min(ASIDE, ranks.total(len(documents)) // 20) if learn_alpha or learn_eta else 0
    held = some_documents(documents, count, seed + 1, ranks) if count > 1 else None
    if held is not None:
        run.leave_out(some_numbers(ranks.total(len(documents)), count, seed + 1))
    way = FullPasses(run, Watch(run, held, seed, LOOKS), file)
    if found is not None:
        way.go_on(state.to(alpha.device), *found)
    while run.rounds < (PASSES if driver == "stepwise" else 0) and not late():
        run.stochastic_pass()
        way.keep()
    way.climb(max_iter - (LAST if held is not None and max_iter > LAST else 0), tol * run.tokens, tick, late)
    if held is not None:
        way.join(tol * run.tokens, late)
    way.keep(finished=not way.stopped)
    return Climbed(run.state, way.history, way.converged or way.watch.ended, way.stopped, way.watch.seen)


@dataclass
class StreamedBayes(VariationalBayes):
    """q(phi) of a corpus whose documents are inferred at every visit and let go.

    As in `VariationalBayes`, first sweeps infer documents in few rounds; later ones until they stand still.
    """

    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.lam = self.first_lam() if self.lam is None else self.lam
        self.blocks = []
        self.gamma = self.alpha.new_zeros(0, len(self.alpha))
        self.visits = Visits(self.documents, len(self.alpha), self.alpha.device)
        self.tokens = max(total(self.ranks, self.documents.num_tokens), 1.0)
        self.steps = 0
        if self.ranks.shares_rows:
            self.lam = self.ranks.first(self.lam.cpu()).to(self.alpha)
        self._mean_logs = torch.zeros_like(self.alpha)

    @property
    def mean_logs(self) -> Tensor:
        """Mean of E[log theta] over the documents of the last sweep."""
        return self._mean_logs

    def visit(self, table: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """As of the parent, always from equal shares."""
        W = table.index_select(0, block.flat).view(*block.words.shape, -1)
        start = self.alpha + block.counts.sum(1, keepdim=True) / len(self.alpha)
        rounds = FEW_ROUNDS if self.fresh else ROUNDS
        gamma, theta, ratio, norm = local_step(W, block.counts, start, self.alpha, self.still, rounds)
        self._seen += mean_log(gamma).sum(0)
        return ratio.unsqueeze(2) * theta.unsqueeze(1), W, self.part_of_bound(block, gamma, norm)

    def sweep(self) -> float:
        """One full step; returns the bound before it."""
        assert self.lam is not None
        table = mean_log(self.lam).exp().T.contiguous()
        S = torch.zeros_like(table, dtype=torch.float64)
        own = torch.zeros((), dtype=torch.float64, device=table.device)
        self._seen = torch.zeros_like(self.alpha)
        for piece in self.visits.all():
            for block in self.visits.blocks(piece, self.alpha.dtype):
                r, _, value = self.visit(table, block)
                block.add(S, r)
                own += value
        S, sums, seen = self.ranks.add(S, own, self._seen)
        bound = float(sums) - float(kl_divergence(Dirichlet(self.lam), Dirichlet(self.eta)).sum())
        self.lam = self.eta + (S.to(table) * table).T
        self._mean_logs = seen / max(1, self.ranks.total(len(self.documents)))
        return bound

    def stochastic_pass(self) -> None:
        """Steps along the natural gradients of one run of documents each."""
        assert self.lam is not None
        self._seen = torch.zeros_like(self.alpha)
        for piece, tokens in self.visits.shuffled(self.random, self.ranks):
            table = mean_log(self.lam).exp().T.contiguous()
            S = torch.zeros_like(table, dtype=cards.sum_dtype(table))
            for block in self.visits.blocks(piece, self.alpha.dtype):
                r, _, _ = self.visit(table, block)
                block.add(S, r)
            S, seen = self.ranks.add(S, torch.tensor(tokens, device=table.device))
            rho, share = (self.steps + DELAY) ** -DECAY, float(seen) / self.tokens
            target = self.eta + ((S.to(table) * table).T / share if share else 0.0)
            self.lam = (1 - rho) * self.lam + rho * target
            self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """As of the parent."""
        return super().tensors() | {"_mean_logs": self._mean_logs}

    def widen(self) -> None:
        """Go on in double precision."""
        assert self.lam is not None
        self.alpha, self.eta, self.lam, self.gamma = (x.double() for x in (self.alpha, self.eta, self.lam, self.gamma))
