"""Full passes over documents that are let go: until they help no more, some set aside meanwhile, a file kept between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .expected import Counts, Watch
from .pass_file import PassFile

if TYPE_CHECKING:
    from .streamed import StreamedCounts

#: Full passes before concentrations are learned, and at most after documents set aside have come back.
BURN, LAST = 2, 5
#: What a file keeps of counts, and what is said of a climb that ran out of time.
KEPT = ("N", "Nk", "alpha", "eta")
OVER = "the budget is used up: the best state so far is returned"


def kept_counts(tensors: dict[str, Tensor], prefix: str = "") -> Counts:
    """What a file keeps of counts: nothing of documents."""
    N, Nk, alpha, eta = (tensors[f"{prefix}{name}"] for name in KEPT)
    return Counts(N, Nk, N.new_zeros(0, N.shape[1]), alpha, eta)


@dataclass
class FullPasses:
    """Full passes over documents, some of them perhaps set aside, and the file that is kept up to date between them.

    Attributes
    ----------
    joined
        Passes since the documents set aside have come back; -1 before.
    """

    run: StreamedCounts
    watch: Watch
    file: PassFile | None
    history: list[float] = field(default_factory=list)
    converged: bool = False
    stopped: str = ""
    joined: int = -1

    def go_on(self, state: Counts, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
        """Stand where a file stood."""
        self.history = self.run.go_on(state, card)
        self.converged, self.joined, self.watch.seen = card["converged"], card["joined"], list(card["seen"])
        self.watch.ended = card["ended"]
        if "best.N" in tensors:
            self.watch.best = kept_counts(tensors, "best.").to(state.alpha.device)

    def keep(self, finished: bool | None = None) -> None:
        """Write the file, if it is time; remove it at the end."""
        if self.file is None:
            return
        best = self.watch.best
        tensors = {name: getattr(self.run.state, name) for name in KEPT}
        tensors |= {f"best.{name}": getattr(best, name) for name in KEPT} if best is not None else {}
        card = self.run.card(self.history) | {
            "converged": self.converged,
            "joined": self.joined,
            "seen": self.watch.seen,
            "ended": self.watch.ended,
        }
        if finished is None:
            self.file.write(tensors, card)
        else:
            self.file.leave(finished, tensors, card)

    def climb(self, most: int, least: float, tick: Callable[[int, float], Any], late: Callable[[], bool]) -> None:
        """Full passes, `most` of them, until they help no more."""
        run, history = self.run, self.history
        while self.joined < 0 and not self.converged and not self.watch.ended and len(history) < most:
            history.append(run.full_pass())
            tick(len(history), history[-1] / run.tokens)
            if self.watch.worse(len(history)):
                break
            if len(history) > BURN and abs(history[-1] - history[-2]) < least:
                self.converged = True
                break
            self.keep()
            if late():
                self.stopped = OVER
                break

    def join(self, least: float, late: Callable[[], bool]) -> None:
        """The documents set aside come back for some last passes under the best concentrations seen, which stay."""
        run, history = self.run, self.history
        if self.stopped:
            self.keep(finished=False)  # from here a later run goes on
            self.file = None
        if self.joined < 0:
            run.state, self.joined = self.watch.best or run.state, 0
        run.leave_out(np.zeros(0, np.int64))
        run.learn_alpha = run.learn_eta = False
        while self.joined < LAST:
            if late() and history:
                self.stopped = OVER
                break
            history.append(run.full_pass())
            self.joined += 1
            if abs(history[-1] - history[-2]) < least:
                break
            self.keep()
