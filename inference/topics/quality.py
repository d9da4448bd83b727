"""Topics as people read them: their words, how well these go together, how they share out over time, and who is who."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .answers import form_of, shares, topics_of
from .documents import Documents, in_parts

if TYPE_CHECKING:
    import pandas as pd

    from ..posterior import Posterior

RANKS = ("probability", "lift", "frex")


def as_topics(model: Any, time: int | None = None) -> np.ndarray:
    """Topics (K, V) of a posterior (of one slice of a dynamic one, its last by default), or of an array."""
    phi = (
        np.asarray(topics_of(model))
        if hasattr(model, "draws")
        else torch.as_tensor(np.ascontiguousarray(model) if isinstance(model, np.ndarray) else model).double().numpy()
    )
    if phi.ndim == 3:
        phi = phi[:, -1 if time is None else time]
    if phi.ndim != 2:
        raise ValueError(f"topics have shape {phi.shape}, expected (K, V)")
    return phi


def words_of(vocabulary: Any, num_words: int) -> tuple[str, ...]:
    """The words: of a corpus, a list, or made up."""
    words = tuple(getattr(vocabulary, "vocabulary", vocabulary) or (f"word {v}" for v in range(num_words)))
    if len(words) != num_words:
        raise ValueError(f"vocabulary has {len(words)} words and the topics {num_words}")
    return words


def top_words(
    model: Posterior | Any, vocabulary: Any = None, num: int = 10, rank: str = "probability", time: int | None = None
) -> pd.DataFrame:
    """The words that stand for each topic, a row each: topic, rank, word, probability, lift.

    Parameters
    ----------
    model
        A posterior of a topic story, or topics (K, V).
    vocabulary
        A corpus or V words.
    rank
        "probability": the most frequent.  "lift": the most typical, probability over its mean over topics, among words of at
        least the mean probability 1 / V in the topic.  "frex": the harmonic mean of a word's ranks in both (Bischof and
        Airoldi, ICML 2012, with equal weights).
    time
        The slice of a dynamic model; None: its last.

    Raises
    ------
    ValueError
        Another rank, or a vocabulary of another length.
    """
    import pandas as pd

    if rank not in RANKS:
        raise ValueError(f"rank must be one of {list(RANKS)}, got {rank!r}")
    phi = as_topics(model, time)
    words, lift = words_of(vocabulary, phi.shape[1]), phi / phi.mean(0)
    if rank == "probability":
        key = phi
    elif rank == "lift":
        key = np.where(phi >= 1 / phi.shape[1], lift, -1 / (1 + phi))
    else:
        from scipy.stats import rankdata

        order = [rankdata(x, axis=1) / phi.shape[1] for x in (phi, lift)]
        key = 2 / (1 / order[0] + 1 / order[1])
    rows = [
        {"topic": k, "rank": r + 1, "word": words[v], "probability": phi[k, v], "lift": lift[k, v]}
        for k in range(len(phi))
        for r, v in enumerate(np.argsort(-key[k], kind="stable")[:num])
    ]
    return pd.DataFrame(rows)


def coherence(model: Posterior | Any, data: Any, num: int = 10, time: int | None = None) -> np.ndarray:
    r"""Mean normalised pointwise mutual information of each topic's top words over documents, (K,), from -1 to 1.

    :math:`\log\frac{p(i, j)}{p(i)p(j)} / -\log p(i, j)` with p the shares of documents that hold the words; -1 for words that
    never meet (Bouma 2009; Lau, Newman and Baldwin, EACL 2014).

    Parameters
    ----------
    model
        A posterior of a topic story, or topics (K, V).
    data
        Documents in which words meet: a corpus, a sparse matrix or a table of counts.
    num
        Top words of each topic.
    """
    import scipy.sparse as sp

    phi, documents = as_topics(model, time), Documents.of(data)
    D = max(len(documents), 1)
    table = sp.csr_matrix(
        (np.ones(len(documents.words)), documents.words, documents.starts), shape=(len(documents), phi.shape[1])
    ).tocsc()
    found = np.zeros(len(phi))
    for k, row in enumerate(phi):
        m = table[:, np.argsort(-row, kind="stable")[:num]].toarray()
        both = m.T @ m / D
        p = np.diag(both)
        i, j = np.triu_indices(len(p), 1)
        joint = both[i, j]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.log(joint / (p[i] * p[j])) / -np.log(joint)
        found[k] = np.where(joint == 0, -1.0, np.where(joint >= 1, 1.0, value)).mean()
    return found


def diversity(model: Posterior | Any, num: int = 25, time: int | None = None) -> float:
    """Share of different words among the top words of all topics: 1 where no topic repeats another's."""
    phi = as_topics(model, time)
    top = np.argsort(-phi, 1, kind="stable")[:, :num]
    return len(np.unique(top)) / top.size


def match_topics(first: Posterior | Any, second: Posterior | Any) -> tuple[np.ndarray, np.ndarray]:
    """Which topic of `second` is which of `first`: (its number for each topic of `first`, and their similarity).

    One to one, by the assignment that has the most similarity in all; similarity is 1 less the Hellinger distance.

    Raises
    ------
    ValueError
        Topics over different numbers of words, or more topics in `first` than in `second`.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = as_topics(first), as_topics(second)
    if a.shape[1] != b.shape[1] or len(a) > len(b):
        raise ValueError(f"topics of shapes {a.shape} and {b.shape} cannot be matched one to one over the same words")
    similarity = 1 - np.sqrt(np.clip(1 - np.sqrt(a) @ np.sqrt(b).T, 0, None))
    rows, columns = linear_sum_assignment(-similarity)
    return columns, similarity[rows, columns]


def topic_share(
    posterior: Posterior, times: Sequence[float] | np.ndarray | None = None, data: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """How much of the words each topic takes at each time: the times (S,), and shares (S, K) that sum to one.

    Parameters
    ----------
    times
        (D,), one a document; None takes the corpus's or the story's.
    data
        New documents; None for the fitted ones.
    """
    from .answers import documents_of

    documents = documents_of(posterior, data)
    given = documents.times if times is None else times
    if given is None:
        raise ValueError("the documents have no times; pass times, one a document")
    given = np.asarray(given)
    if len(given) != len(documents):
        raise ValueError(f"times has {len(given)} entries and there are {len(documents)} documents")
    steps, which = np.unique(given, return_inverse=True)
    total = np.zeros((len(steps), form_of(posterior).num_topics))
    for a, part in in_parts(documents):
        own = shares(posterior, data if part is documents else part).numpy()
        np.add.at(total, which[a : a + len(part)], own * part.lengths[:, None])
    return steps, total / np.maximum(total.sum(1, keepdims=True), 1e-300)


def word_paths(posterior: Posterior, topic: int, words: Sequence[int]) -> Tensor:
    """Probabilities of words of one topic through time, draw by draw: (draws, T, words)."""
    form = form_of(posterior)
    if form.walk is None:
        raise ValueError("the story has no slices of time: its topics stand still")
    return posterior.draws[form.topics][:, topic].softmax(-1)[..., list(words)]
