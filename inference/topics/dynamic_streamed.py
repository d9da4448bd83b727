"""The dynamic topic model on documents that are not kept: slices have expected counts, documents are read and let go.

Every pass reads the documents in runs of neighbours, infers the shares of each from equal ones under the topics of its slice,
and adds what its words say to that slice's counts S (T, K, V): nothing grows with the number of documents but their times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .documents import Documents, blocks
from .dynamic import BURN, Climb
from .expected import LEAST, MOST, concentration_terms, settle
from .streamed import SETTLED, climb, some_documents
from .visits import pieces, runs_of
from .words import Places, improvement, padded
from .words import settle as settle_places

#: Documents from all over that the drift is chosen on, and full passes of topics that stand still.
SOME, STILL = 5000, 3


def some_of(documents: Documents, seed: int) -> Documents:
    """Documents from all over, in memory."""
    return some_documents(documents, SOME, seed)


@dataclass
class StreamedClimb(Climb):
    """Expectation and Newton steps in turn; of the documents nothing is kept between passes."""

    def static(self, eta: Tensor) -> Any:
        """Topics that stand still: a climb on some documents, stochastic passes over all, then full ones."""
        return climb(self.documents, self.alpha, eta, max_iter=STILL, tol=0.0, seed=self.seed)

    def hold(self) -> None:
        """Nothing but where runs begin."""
        self.n = torch.zeros(0, len(self.alpha))
        self.runs = runs_of(self.documents)

    def parts(self) -> Iterator[tuple[np.ndarray, Documents]]:
        """Runs of documents with the slice of each."""
        times = self.documents.times
        assert times is not None
        for (a, b), part in pieces(self.documents, self.runs):
            which = np.ascontiguousarray(times[a:b], np.int64)
            yield which, replace(part, times=which)

    def expectation(self) -> tuple[Tensor, float]:
        """Expected counts (T, K, V) at the present topics, and the log-likelihood of all words at the settled shares."""
        phi = self.walks.beta.softmax(2)
        T, K, V = phi.shape
        learn = self.form.alpha_param is not None and self.passes >= BURN
        visit = self.by_block if self.native is None else self.by_word
        table = phi.transpose(1, 2).contiguous() if self.native is None else padded(phi.transpose(1, 2))
        S, value = torch.zeros(T, V, K, dtype=torch.float64), 0.0
        gain, weight = torch.zeros(K, dtype=torch.float64), 0.0
        for which, part in self.parts():
            v, g, w = visit(table, which, part, S, learn)
            value, gain, weight = value + v, gain + g, weight + float(w)
        if learn:
            self.alpha = (self.alpha * (gain / weight).to(self.alpha)).clamp(LEAST, MOST)
        return S.transpose(1, 2).to(self.dtype).contiguous(), value

    def by_word(
        self, table: Tensor, which: np.ndarray, part: Documents, S: Tensor, learn: bool
    ) -> tuple[float, Any, Any]:
        """Add the counts of some documents to S (T, V, K), in machine code; their log-likelihood, and terms for alpha."""
        assert self.native is not None
        K, alpha = len(self.alpha), padded(self.alpha)
        lengths = torch.from_numpy(part.lengths).float()
        n = padded((lengths / K)[:, None].expand(-1, K))
        none = torch.empty_like(n) if learn else None
        first, last = int(which.min()), int(which.max()) + 1  # neighbours are often of one time
        found = torch.zeros_like(table[first:last])
        value = settle_places(
            self.native, Places(part), table[first:last], n, alpha, SETTLED, S=found, none=none,
            which=torch.from_numpy(which - first),
        )  # fmt: skip
        S[first:last] += found[:, :, :K]
        if none is None:
            return value, 0.0, 0.0
        return value, *improvement(self.alpha, n[:, :K], 1.0 - none[:, :K], lengths)

    def by_block(
        self, table: Tensor, which: np.ndarray, part: Documents, S: Tensor, learn: bool
    ) -> tuple[float, Any, Any]:
        """The same in blocks of documents of one slice."""
        value, gain, weight = 0.0, torch.zeros_like(self.alpha), torch.zeros(())
        for t in np.unique(which).tolist():
            for block in blocks(part.take(np.flatnonzero(which == t)), self.dtype):
                W = table[t][block.flat].view(*block.words.shape, -1)
                length = block.counts.sum(1, keepdim=True)
                start = length.expand(-1, len(self.alpha)) / len(self.alpha)
                n, r = settle(W, block.counts, start, self.alpha, SETTLED)
                S[t].index_add_(0, block.flat, r.view(-1, r.shape[-1]).double())
                p = (W @ ((n + self.alpha) / (length + self.alpha.sum())).unsqueeze(2)).squeeze(2)
                value += float(torch.xlogy(block.counts, p.clamp_min(1e-30)).sum(dtype=torch.float64))
                if learn:
                    g, w = concentration_terms(r, block.counts, self.alpha)
                    gain, weight = gain + g, weight + w
        return value, gain, weight
