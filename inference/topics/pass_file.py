"""Checkpoints of topic models: what is remembered between two passes over the documents, kept in one file.

Topics and concentrations are all that passes over documents which are let go remember, so that any number of ranks goes on
from the file of any other; what they drew at random they draw again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..saved_state import SavedState, particulars
from .documents import Documents

if TYPE_CHECKING:
    from ..problem import Problem

#: Seconds between two writes.
EVERY = 5.0
#: Documents that tell one corpus from another.
PRINT_DOCUMENTS = 1000


class PassFile:
    """The checkpoint of one fit, written by the first rank at the end of a pass; nothing without a path.

    Parameters
    ----------
    method
        "EM" or "SVI", for messages.
    path, problem, documents
        The file, and what is fitted.
    parts
        What else must be the same for a run to go on.

    Raises
    ------
    ValueError
        The folder does not exist.
    """

    def __init__(
        self, method: str, path: str | Path | None, problem: Problem, documents: Documents, *parts: Any
    ) -> None:
        self.ranks, self.state = problem.ranks, None
        self._written = time.perf_counter()
        if path is not None:
            told = fingerprint(problem, documents, *parts)
            self.state = SavedState(Path(path), method, told, particulars(problem, *parts))

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What the first rank finds, on every rank; None where there is no file.

        Raises
        ------
        ValueError
            The file belongs to another fit, or is no checkpoint.
        """
        return None if self.state is None else self.state.of_first(self.ranks)

    def write(self, tensors: Mapping[str, Tensor], card: dict[str, Any], now: bool = False) -> None:
        """Keep where the run stands, if it is time or `now`."""
        if self.state is None or not self.ranks.leads:
            return
        if now or time.perf_counter() - self._written >= EVERY:
            self.state.write({n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}, card)
            self._written = time.perf_counter()

    def leave(self, finished: bool, tensors: Mapping[str, Tensor], card: dict[str, Any]) -> None:
        """Remove the file of a run that has come to its end; write that of another once more."""
        if not finished:
            self.write(tensors, card, now=True)
        elif self.state is not None and self.ranks.leads:
            self.state.remove()

    @property
    def lost(self) -> list[str]:
        """Why the state could not be written, if it could not."""
        return [] if self.state is None else self.state.lost[:1]


def fingerprint(problem: Problem, documents: Documents, *parts: Any) -> str:
    """Hash of documents from all over, story, seed and options; the same on any number of ranks."""
    from .streamed import some_documents, total

    some = some_documents(documents, PRINT_DOCUMENTS, 0, problem.ranks)
    counted = (problem.ranks.total(len(documents)), total(problem.ranks, documents.num_tokens), documents.num_words)
    digest = hashlib.sha256(repr((parts, problem.seed, type(problem.story).__name__, counted)).encode())
    for part in (some.starts, some.words, some.counts):
        digest.update(torch.as_tensor(part).double().numpy().tobytes())
    return digest.hexdigest()
