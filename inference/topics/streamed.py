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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from ..distributed import ALONE, Ranks
from ..streaming import Stream
from .documents import Block, Documents, blocks
from .expected import DELAY, LEAST, MOST, Climbed, Counts, concentration_terms, eta_factor, settle
from .expected import climb as climb_in_memory
from .pass_file import PassFile
from .variational import FEW_ROUNDS, ROUNDS, VariationalBayes, local_step, mean_log

#: Documents of a run at least and at most, and entries at most; a pass has a hundred runs where it can.
FEWEST, READ, ENTRIES, RUNS = 64, 4096, 1_000_000, 100
#: Documents from all over that the start is made from.
SAMPLE = 2000
#: Stochastic passes, the power with which their weights fall, and rounds within a document.
PASSES, DECAY, SETTLED = 2, 0.7, 12
#: Full passes before concentrations are learned.
BURN = 2


def runs_of(documents: Documents) -> list[tuple[int, int]]:
    """First and last (excluded) document of every run."""
    size = min(READ, max(FEWEST, -(-len(documents) // RUNS)))
    found, a, n = [], 0, len(documents)
    while a < n:
        b = min(a + size, n)
        starts = np.asarray(documents.starts[a : b + 1])
        b = a + max(1, int(np.searchsorted(starts, starts[0] + ENTRIES, side="right")) - 1) if b > a + 1 else b
        found.append((a, min(b, n)))
        a = found[-1][1]
    return found


def reader(documents: Documents) -> Stream:
    """Reads runs of documents ahead."""

    def read(run: tuple[int, int]) -> tuple[Tensor, ...]:
        part = documents.cut(*run)
        kinds = ((part.starts, np.int64), (part.words, np.int64), (part.counts, np.float64))
        return tuple(torch.from_numpy(np.array(v, dtype=k)) for v, k in kinds)

    return Stream(read)


def pieces(documents: Documents, order: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Documents]]:
    """Runs of documents in the order given, in memory."""
    for run, (starts, words, counts) in reader(documents).each(order):
        yield run, Documents(starts.numpy(), words.numpy(), counts.numpy(), documents.num_words)


def shuffled(
    documents: Documents, runs: list[tuple[int, int]], random: torch.Generator, ranks: Ranks
) -> Iterator[Documents]:
    """Runs in random order; where other ranks have more of them, none at the end."""
    order = [runs[i] for i in torch.randperm(len(runs), generator=random).tolist()]
    most = max(ranks.gather(len(runs)))
    for _, part in pieces(documents, order):
        yield part
    empty = np.zeros(0, np.int64)
    for _ in range(most - len(runs)):
        yield Documents(np.zeros(1, np.int64), empty, np.zeros(0), documents.num_words)


def some_documents(documents: Documents, count: int, seed: int, ranks: Ranks = ALONE) -> Documents:
    """Documents from all over, one of every stretch of equal length; of all ranks, on every rank."""
    n = ranks.total(len(documents))
    chosen = np.arange(n)
    if n > count:
        edges = np.linspace(0, n, count + 1).astype(np.int64)
        chosen = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
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
        The end of a climb on some of them.
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
        self.documents, self.runs, self.ranks = documents, runs_of(documents), ranks
        self.tokens = max(total(ranks, documents.num_tokens), 1.0)
        self.learn_alpha, self.learn_eta, self.tied = learn_alpha, learn_eta, tied
        self.random = torch.Generator().manual_seed(seed)
        N = start.N.double() * (self.tokens / max(float(start.Nk.sum()), 1.0))
        self.state = Counts(N, N.sum(0), N.new_zeros(0, N.shape[1]), start.alpha.clone(), start.eta.clone())
        self.steps = self.passes = self.rounds = 0

    def card(self, history: list[float]) -> dict[str, Any]:
        """How far it has come."""
        return {"steps": self.steps, "passes": self.passes, "rounds": self.rounds, "history": history}

    def go_on(self, state: Counts, card: dict[str, Any]) -> list[float]:
        """Stand where another run stood; what it drew for its rounds is drawn again. Returns its history."""
        self.state = state
        self.steps, self.passes, self.rounds = card["steps"], card["passes"], card["rounds"]
        for _ in range(self.rounds):
            torch.randperm(len(self.runs), generator=self.random)
        return list(card["history"])

    def table(self) -> Tensor:
        """Topics as shares of the words, (V, K)."""
        s = self.state
        return ((s.N + s.eta) / (s.Nk + s.eta.sum(0))).float()

    def visit(self, table: Tensor, part: Documents, S: Tensor, learn: bool = False) -> tuple[float, Tensor, Tensor]:
        """Add the expected counts of some documents to S (V, K); their log-likelihood, and terms for alpha."""
        alpha, value = self.state.alpha, 0.0
        gain, weight = torch.zeros_like(alpha), torch.zeros(())
        for block in blocks(part):
            W = table[block.flat].view(*block.words.shape, -1)
            length = block.counts.sum(1, keepdim=True)
            n, r = settle(W, block.counts, length.expand(-1, len(alpha)) / len(alpha), alpha, SETTLED)
            S.index_add_(0, block.flat, r.view(-1, r.shape[-1]).to(S.dtype))
            shares = (n + alpha) / (length + alpha.sum())
            value += float(torch.xlogy(block.counts, (W @ shares.unsqueeze(2)).squeeze(2)).sum(dtype=torch.float64))
            if learn:
                g, w = concentration_terms(r / block.counts.unsqueeze(2).clamp_min(1.0), block.counts, alpha)
                gain, weight = gain + g, weight + w
        return value, gain, weight

    def stochastic_pass(self) -> None:
        """All runs in random order, each moving the counts towards what it would make of all documents."""
        s = self.state
        for part in shuffled(self.documents, self.runs, self.random, self.ranks):
            S = torch.zeros_like(s.N, dtype=torch.float32)
            self.visit(self.table(), part, S)
            S, seen = self.ranks.add(S, torch.tensor(part.num_tokens))
            rho = (self.steps + DELAY) ** -DECAY
            s.N.mul_(1 - rho).add_(S, alpha=rho * self.tokens / max(float(seen), 1.0))
            s.Nk = s.N.sum(0)
            self.steps += 1
        self.rounds += 1

    def full_pass(self) -> float:
        """The counts of all documents under the present topics; returns the log-likelihood under these."""
        s, value = self.state, 0.0
        learn = self.learn_alpha and self.passes >= BURN
        table, new = self.table(), torch.zeros_like(s.N)
        gain, weight = torch.zeros_like(s.alpha), torch.zeros(())
        for _, part in pieces(self.documents, self.runs):
            v, g, w = self.visit(table, part, new, learn)
            value, gain, weight = value + v, gain + g, weight + w
        new, sums, gain, weight = self.ranks.add(new, torch.tensor(value, dtype=torch.float64), gain, weight)
        s.N, s.Nk = new, new.sum(0)
        if learn:
            s.alpha = (s.alpha * gain / weight).clamp(LEAST, MOST)
            s.alpha = s.alpha.mean().expand_as(s.alpha).clone() if self.tied else s.alpha
        if self.learn_eta and self.passes >= BURN:
            s.eta = s.eta * eta_factor(s.N, s.eta).to(s.eta)
        self.passes += 1
        return float(sums)


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

    Parameters are those of `expected.climb`; restarts are judged on the documents of the start.  `file` is kept up to date
    between passes, and gone on from.
    """
    late = (lambda: ranks.first(over())) if ranks.shares_rows else over
    found = file.read() if file is not None else None
    if found is None:
        some = some_documents(documents, SAMPLE, seed, ranks)
        first = climb_in_memory(
            some, alpha, eta, restarts=restarts, max_iter=min(30, max_iter), tol=tol, seed=seed, over=over
        )
        state = ranks.first(first.state) if ranks.shares_rows else first.state
    else:
        kept = found[0]
        state = Counts(kept["N"], kept["Nk"], alpha.new_zeros(0, len(alpha)), kept["alpha"], kept["eta"])
    run = StreamedCounts(documents, state, learn_alpha, learn_eta, tied, seed, ranks)
    history: list[float] = []
    if found is not None:
        history = run.go_on(state, found[1])
    converged, stopped = False, ""

    def keep(finished: bool | None = None) -> None:
        if file is not None:
            kept = ({n: getattr(run.state, n) for n in ("N", "Nk", "alpha", "eta")}, run.card(history))
            file.write(*kept) if finished is None else file.leave(finished, *kept)

    while run.rounds < (PASSES if driver == "stepwise" else 0) and not late():
        run.stochastic_pass()
        keep()
    while len(history) < max_iter:
        history.append(run.full_pass())
        tick(len(history), history[-1] / run.tokens)
        if len(history) > BURN and abs(history[-1] - history[-2]) < tol * run.tokens:
            converged = True
            break
        keep()
        if late():
            stopped = "the budget is used up: the best state so far is returned"
            break
    keep(finished=not stopped)
    return Climbed(run.state, history, converged, stopped)


@dataclass
class StreamedBayes(VariationalBayes):
    """q(phi) of a corpus whose documents are inferred at every visit and let go.

    As in `VariationalBayes`, first sweeps infer documents in few rounds; later ones until they stand still.
    """

    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        if self.lam is None:
            shape = torch.full(self.eta.shape, 100.0, dtype=self.eta.dtype)
            self.lam = torch._standard_gamma(shape, generator=self.random) / 100.0
        self.blocks = []
        self.gamma = torch.zeros(0, len(self.alpha), dtype=self.alpha.dtype)
        self.runs, self.tokens = runs_of(self.documents), max(total(self.ranks, self.documents.num_tokens), 1.0)
        self.steps = 0
        if self.ranks.shares_rows:
            self.lam = self.ranks.first(self.lam)
        self._mean_logs = torch.zeros_like(self.alpha)

    @property
    def mean_logs(self) -> Tensor:
        """Mean of E[log theta] over the documents of the last sweep."""
        return self._mean_logs

    def visit(self, table: Tensor, block: Block) -> tuple[Tensor, Tensor, float]:
        """As of the parent, always from equal shares."""
        W = table[block.flat].view(*block.words.shape, -1)
        start = self.alpha + block.counts.sum(1, keepdim=True) / len(self.alpha)
        rounds = FEW_ROUNDS if self.fresh else ROUNDS
        gamma, theta, ratio, norm = local_step(W, block.counts, start, self.alpha, self.still, rounds)
        self._seen += mean_log(gamma).sum(0)
        bound = torch.xlogy(block.counts, norm).sum()
        bound = bound - kl_divergence(Dirichlet(gamma), Dirichlet(self.alpha.expand_as(gamma))).sum()
        return ratio.unsqueeze(2) * theta.unsqueeze(1), W, float(bound)

    def sweep(self) -> float:
        """One full step; returns the bound before it."""
        assert self.lam is not None
        table = mean_log(self.lam).exp().T.contiguous()
        S, own = torch.zeros_like(table, dtype=torch.float64), 0.0
        self._seen = torch.zeros_like(self.alpha)
        for _, part in pieces(self.documents, self.runs):
            for block in blocks(part, self.alpha.dtype):
                r, _, value = self.visit(table, block)
                S.index_add_(0, block.flat, r.view(-1, r.shape[-1]).double())
                own += value
        S, sums, seen = self.ranks.add(S, torch.tensor(own, dtype=torch.float64), self._seen)
        bound = float(sums) - float(kl_divergence(Dirichlet(self.lam), Dirichlet(self.eta)).sum())
        self.lam = self.eta + (S.to(table) * table).T
        self._mean_logs = seen / max(1, self.ranks.total(len(self.documents)))
        return bound

    def stochastic_pass(self) -> None:
        """Steps along the natural gradients of one run of documents each."""
        assert self.lam is not None
        self._seen = torch.zeros_like(self.alpha)
        for part in shuffled(self.documents, self.runs, self.random, self.ranks):
            table = mean_log(self.lam).exp().T.contiguous()
            S = torch.zeros_like(table)
            for block in blocks(part, self.alpha.dtype):
                r, _, _ = self.visit(table, block)
                S.index_add_(0, block.flat, r.view(-1, r.shape[-1]))
            S, some = self.ranks.add(S, torch.tensor(part.num_tokens))
            rho, share = (self.steps + DELAY) ** -DECAY, float(some) / self.tokens
            target = self.eta + ((S * table).T / share if share else 0.0)
            self.lam = (1 - rho) * self.lam + rho * target
            self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """As of the parent."""
        return super().tensors() | {"_mean_logs": self._mean_logs}

    def widen(self) -> None:
        """Go on in double precision."""
        assert self.lam is not None
        self.alpha, self.eta, self.lam, self.gamma = (x.double() for x in (self.alpha, self.eta, self.lam, self.gamma))
