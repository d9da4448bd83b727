"""What the benchmarks of topic models share: fits of peers as topics and concentrations, and one way to judge them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _peers import silent


def corpus_at(path: Path | None, name: str) -> Any:
    """The LDA-C corpus in a folder (docs.ldac, vocab.txt, perhaps meta.tsv with years), or the embedded one."""
    from dataclasses import replace

    from zoo import load_corpus, read_corpus

    if path is None:
        return load_corpus()
    corpus = replace(read_corpus(path / "docs.ldac"), name=name)
    meta = path / "meta.tsv"
    head = meta.read_text(encoding="utf-8").splitlines() if meta.exists() else [""]
    if head[0].split("\t")[0] == "year":
        corpus = replace(corpus, times=np.array([int(line.split("\t")[0]) for line in head[1:]]))
    return corpus


def cpu_seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the processor time of this process that it took."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def whole(phi: Any, ids: Any, num_words: int, floor: np.ndarray) -> np.ndarray:
    """Topics over the corpus's own words, where a peer has left out those that it never saw."""
    full = np.repeat(np.asarray(floor, float).reshape(-1, 1), num_words, 1)
    full[:, ids] = phi
    return full / full.sum(1, keepdims=True)


def tomotopy_lda(train: Any, topics: int, eta: float, seed: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Collapsed Gibbs sampling in C++, alpha learned: topics and alpha."""
    import tomotopy

    model = tomotopy.LDAModel(k=topics, alpha=0.1, eta=eta, seed=seed)
    for ids in train.tokens():
        if len(ids):
            model.add_doc([str(v) for v in ids])
    with silent():
        model.train(iterations, workers=1, show_progress=False)
    phi = np.stack([model.get_topic_word_dist(k) for k in range(topics)])
    ids = [int(v) for v in model.used_vocabs]
    floor = eta / (np.asarray(model.get_count_by_topics()) + train.num_words * eta)
    return whole(phi, ids, train.num_words, floor), np.asarray(model.alpha)


def sklearn_lda(train: Any, topics: int, eta: float, seed: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch variational Bayes in Cython: topics and alpha."""
    from sklearn.decomposition import LatentDirichletAllocation

    model = LatentDirichletAllocation(
        topics, doc_topic_prior=0.1, topic_word_prior=eta, max_iter=iterations, random_state=seed
    )
    with silent():
        model.fit(train.counts)
    phi = model.components_ / model.components_.sum(1, keepdims=True)
    return phi, np.full(topics, 0.1)


def judge(topics: tuple[Any, Any], heldout: Any, train: Any, particles: int = 0, most: int = 20) -> dict[str, float]:
    """Perplexity by completion (and from left to right of the first documents), coherence and diversity."""
    from inference.topics import coherence, diversity, perplexity

    found = {"completion": perplexity(topics, heldout).value}
    if particles:
        some = heldout[heldout.lengths > 0][:most]
        found["left-to-right"] = perplexity(topics, some, "left-to-right", particles=particles).value
    found["NPMI"] = float(coherence(topics[0], train).mean())
    found["diversity"] = diversity(topics[0])
    return found
