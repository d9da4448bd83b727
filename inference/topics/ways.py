"""How passes over the documents of a topic model are made on a device, and what is kept between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import cards, expected
from . import streamed as streaming
from .form import Admixture
from .variational import VariationalBayes
from .words import library

if TYPE_CHECKING:
    from ..methods.em import EM
    from ..problem import Problem

#: Entries of the documents that a device is timed on.
TRIED = 500_000


def way_of(device: torch.device | str) -> str:
    """How passes over documents are made on a device."""
    if cards.on_card(device):
        return (
            f"large blocks of documents at once on {device}, counts added up in a fixed order and in double precision"
        )
    return "word by word, in machine code" if library() else "blocks of documents at once (there is no C compiler)"


def way_of_streams(documents: Any, device: torch.device) -> str:
    """The same where nothing of a document is kept."""
    if not cards.on_card(device):
        return f"{way_of(device)}; documents are inferred anew at every visit"
    stay = "whose counts stay there" if cards.stay(documents, device) else "whose counts are read ahead and copied"
    return f"{way_of(device)}; documents, {stay}, are inferred anew at every visit"


def keeps_nothing(documents: Any, form: Admixture, em: EM, ranks: Any, where: torch.device) -> bool:
    """Whether documents are let go after a visit: on disk, held apart by ranks, or too many for the card, unless asked for.

    Raises
    ------
    ValueError
        `driver="incremental"`, which keeps the topics of every word, does not fit the card.
    """
    if em.driver not in ("auto", "incremental"):
        return True
    bytes_an_entry = cards.PLACE_BYTES + 4 * form.num_topics * (2 if em.restarts > 1 else 1)
    fits = not cards.on_card(where) or cards.keeps(documents, cards.SIMILAR * bytes_an_entry, where)
    if em.driver == "incremental":
        if not fits:
            raise ValueError(
                f"EM(driver='incremental') keeps the topics of every distinct word of every document: "
                f"{len(documents.words):,} entries x {form.num_topics} topics take more than half of what {where} has free; "
                f"use driver='stepwise', which keeps none, or restarts=1"
            )
        return False
    return documents.on_disk or ranks.shares_rows or not fits


def trial(problem: Problem, method: Any) -> Callable[[], Any]:
    """A pass over the first documents where the problem is, to be timed."""
    step = begun(problem, method)
    again = cards.processor_first(lambda problem, method: step())
    return lambda: again(problem, method)


@cards.processor_first
def begun(problem: Problem, method: Any) -> Callable[[], Any]:
    """That pass, everything that is done once behind it."""
    form, where = problem.admixture, problem.device
    whole = form.documents(problem.kwargs)
    last = int(np.searchsorted(np.asarray(whole.starts), TRIED, side="right")) - 1
    documents = whole.cut(0, min(len(whole), max(1, last)))
    alpha, eta = form.alpha.float().to(where), form.eta.float().to(where)
    if method.name == "svi":
        return VariationalBayes(documents, alpha, eta).sweep
    if keeps_nothing(whole, form, method, problem.ranks, where):
        N = documents.num_tokens / eta.numel() * (0.5 + torch.rand(eta.T.shape, generator=torch.Generator())).to(where)
        return streaming.StreamedCounts(
            documents, expected.Counts(N, N.sum(0), N[:0], alpha, eta.T.contiguous())
        ).full_pass
    run = expected.engine(where)(documents, alpha, eta.T.contiguous())
    run.begin()
    return run.sweep
