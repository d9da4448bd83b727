"""Expected counts word by word, in machine code: every place of every document chooses anew given all other words.

The equations are those of `expected.py`, where blocks of documents choose at once; here what a word has chosen is known to the
next one.  Every choice goes beyond the step that the equations ask for, which leaves their fixed points where they are, takes
fewer passes and finds better topics (overrelaxed bound optimisation: Salakhutdinov and Roweis, ICML 2003); the last passes are
calm, so that they settle.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compiled import NotCompiled, sampler
from .documents import Documents
from .expected import BURN, EVERY, LEAST, MOST, Counts, eta_factor

#: Topics that the machine code handles at once: rows of its tables are padded to multiples of it.
LANES = 8
#: What its tables hold, whatever the default is.
FLOAT = torch.float32
#: How far a choice goes beyond its step, while topics form and at the end; below 1 the end is stable.
BEYOND, CALM = 2.0, 0.9


def address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's numbers lie, for C."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def padded(table: Tensor) -> Tensor:
    """float32 with the last axis, topics, filled up with zeros to whole vectors."""
    return torch.nn.functional.pad(table.float(), (0, -table.shape[-1] % LANES)).contiguous()


class Places:
    """Documents as the machine code reads them."""

    def __init__(self, documents: Documents) -> None:
        self.num_documents, self.num_words = len(documents), documents.num_words
        self.starts = torch.from_numpy(np.ascontiguousarray(documents.starts, np.int64))
        self.words = torch.from_numpy(np.ascontiguousarray(documents.words, np.int32))
        self.counts = torch.from_numpy(np.ascontiguousarray(documents.counts, np.float32))

    @property
    def addresses(self) -> tuple[Any, ...]:
        """starts, words and counts."""
        return address(self.starts), address(self.words), address(self.counts)


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The passes in machine code; None where there is no C compiler."""
    try:
        built = sampler("topics")
    except NotCompiled:
        return None
    built.expected_pass.restype = built.settle_pass.restype = ctypes.c_double
    return built


class WordByWord:
    """One corpus and its concentrations, ready to climb; as `ExpectedCounts`, which says what the parameters are."""

    #: Passes of a restart before it is judged, and those over which a rise is measured.
    trial, window = 10, 5

    def __init__(
        self,
        documents: Documents,
        alpha: Tensor,
        eta: Tensor,
        learn_alpha: bool = False,
        learn_eta: bool = False,
        seed: int = 0,
        tied: bool = False,
    ) -> None:
        built = library()
        assert built is not None, "ask `library` first"
        self.built, self.places = built, Places(documents)
        self.learn_alpha, self.learn_eta, self.tied = learn_alpha, learn_eta, tied
        self.random = torch.Generator().manual_seed(seed)
        self.K, self.lengths = len(alpha), torch.from_numpy(documents.lengths).float()
        D, V, wide = len(documents), documents.num_words, len(padded(alpha))
        self.N, self.n = torch.zeros(V, wide, dtype=FLOAT), torch.zeros(D, wide, dtype=FLOAT)
        self.r = torch.zeros(len(documents.words), wide, dtype=FLOAT)
        self.work = torch.zeros(3, wide, dtype=FLOAT)
        self.state = Counts(
            self.N[:, : self.K], self.N[:, : self.K].sum(0), self.n[:, : self.K], alpha.float(), eta.float()
        )
        self.passes, self.relax = 0, BEYOND

    def calm(self) -> bool:
        """Take plain steps from now on; whether that is a change."""
        changed, self.relax = self.relax != CALM, CALM
        return changed

    def priors(self, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, eta and its sum a topic, as the machine code reads them."""
        alpha, K = padded(self.state.alpha), self.K
        table = eta.reshape(-1).contiguous() if eta.shape[1] == 1 else padded(eta)
        # never zero where there is no topic: the code divides by it
        total = torch.nn.functional.pad(eta.sum(0).expand(K), (0, len(alpha) - K), value=1.0).contiguous()
        return alpha, table, total

    def begin(self) -> None:
        """A topic drawn for every place given those before it, document after document."""
        alpha, eta, total = self.priors(self.state.eta)
        Nk, seeds = torch.zeros_like(alpha), torch.randint(1, 2**62, (4,), generator=self.random)
        order = torch.randperm(len(self.n), generator=self.random)
        self.built.first_pass(
            ctypes.c_int64(len(order)), address(order), ctypes.c_int64(len(alpha) // LANES), *self.places.addresses,
            address(self.r), address(self.N), address(Nk), address(self.n), address(alpha), address(eta),
            ctypes.c_int64(self.state.eta.shape[1] > 1), address(total), address(seeds), address(self.work),
        )  # fmt: skip
        self.state.Nk = self.state.N.sum(0)

    def resume(self, state: Counts) -> None:
        """Topics of another corpus's climb: places get their probabilities under them, and are counted anew, twice."""
        alpha, N = padded(state.alpha), state.N
        self.n[:, : self.K] = (self.lengths / self.K)[:, None]
        for _ in range(2):
            table = padded((N + state.eta) / (N + state.eta).sum(0))
            settle(self.built, self.places, table, self.n, alpha, rounds=1, S=self.N.zero_(), r=self.r)
            N = self.state.N
        self.state.Nk = self.state.N.sum(0)

    def sweep(self) -> float:
        """One pass over all words; the log-likelihood of every word given all others, summed."""
        s, due = self.state, self.passes >= BURN and self.passes % EVERY == 0
        alpha, eta, total = self.priors(s.eta)
        Nk = padded(s.Nk)
        none = torch.empty_like(self.n) if self.learn_alpha and due else None
        order = torch.randperm(len(self.n), generator=self.random)
        relax = self.relax if none is None else 0.0  # concentrations are learned from plain steps
        found = self.built.expected_pass(
            ctypes.c_int64(len(order)), address(order), ctypes.c_int64(len(alpha) // LANES), *self.places.addresses,
            address(self.r), address(self.N), address(Nk), address(self.n), address(alpha), address(eta),
            ctypes.c_int64(s.eta.shape[1] > 1), address(total), ctypes.c_float(relax), address(none), address(self.work),
        )  # fmt: skip
        self.N.clamp_(min=0.0)
        s.Nk = s.N.sum(0)  # anew: rounding adds up over passes
        if none is not None:
            alpha = improved(s.alpha, s.n, 1.0 - none[:, : self.K], self.lengths)
            s.alpha = alpha.mean().expand_as(alpha).clone() if self.tied else alpha
        if self.learn_eta and due:
            s.eta = s.eta * eta_factor(s.N, s.eta)
        self.passes += 1
        return found


def improved(alpha: Tensor, n: Tensor, some: Tensor, lengths: Tensor) -> Tensor:
    """Minka's fixed point for alpha (K,) on expected counts n (D, K) of documents with `lengths` (D,) words.

    `some` (D, K) is the probability that a document has a word of the topic.
    """
    gain, weight = improvement(alpha, n, some, lengths)
    return (alpha * gain / weight).clamp(LEAST, MOST)


def improvement(alpha: Tensor, n: Tensor, some: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator (K,) and denominator of that step, which are sums over documents."""
    if_any = n / some.clamp_min(1e-9)
    gain = (some * ((alpha + if_any).digamma() - alpha.digamma())).sum(0)
    return gain, ((lengths + alpha.sum()).digamma() - alpha.sum().digamma()).sum()


def settle(
    built: ctypes.CDLL,
    places: Places,
    tables: Tensor,
    n: Tensor,
    alpha: Tensor,
    rounds: int,
    S: Tensor | None = None,
    r: Tensor | None = None,
    none: Tensor | None = None,
    which: Tensor | None = None,
) -> float:
    """Expected counts of topics in documents at given topics; the log-likelihood of all words at the shares in the end.

    Parameters
    ----------
    tables
        Shares of words in topics, ([T,] V, K padded).
    n
        (D, K padded), changed in place: in the end the sums of the places of every document.
    alpha
        (K padded,).
    rounds
        Steps of EM within a document.
    S, r
        Where counts of words in topics are added, as `tables`, and those of every place are written.
    none
        (D, K padded): the probability that a document has no word of a topic, written.
    which
        (D,) tables of the documents; all have the first by default.
    """
    which = torch.zeros(len(n), dtype=torch.int64) if which is None else which
    work = torch.empty(2, len(alpha), dtype=FLOAT)
    return built.settle_pass(
        ctypes.c_int64(len(n)), address(which), ctypes.c_int64(places.num_words), ctypes.c_int64(rounds),
        ctypes.c_int64(len(alpha) // LANES), *places.addresses, address(tables), address(S), address(r), address(n),
        address(alpha), address(none), address(work),
    )  # fmt: skip


__all__ = ["LANES", "Places", "WordByWord", "address", "library", "padded", "settle"]
