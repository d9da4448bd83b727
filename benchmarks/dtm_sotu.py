"""Dynamic topic models of State of the Union addresses: perplexity and processor time beside gensim, tomotopy and static LDA.

Held-out passages of every slice are completed from half of their words; a last slice that was never seen is foretold.  gensim's
`LdaSeqModel` takes hours on the whole corpus: it is timed on a part of it, and so is ours for that ratio.

    python -m pip install tomotopy gensim
    python benchmarks/dtm_sotu.py --data FOLDER [--quick]   # FOLDER holds docs.ldac, vocab.txt and meta.tsv with years
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from _peers import OURS, Report, Times, arguments, silent
from _topics import corpus_at, cpu_seconds, whole


def our_dtm(train: Any, topics: int, drift: float | None, seed: int) -> Any:
    """The story of the zoo; without a drift it is chosen on documents set aside, which is part of the time."""
    from inference import EM, fit
    from zoo import DTM

    return fit(DTM(topics, drift=drift, concentration=None), train, EM(), seed=seed, device="cpu", progress=False)


def static_lda(train: Any, topics: int, seed: int) -> Any:
    """LDA on all slices together."""
    from inference import EM, fit
    from zoo import LDA

    return fit(LDA(topics), train, EM(restarts=1), seed=seed, device="cpu", progress=False)


def tomotopy_dtm(train: Any, topics: int, slices: int, seed: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Gibbs sampling with Langevin steps in C++ (Bhadury et al. 2016): topics (K, T, V) and alpha (T, K)."""
    import tomotopy

    model = tomotopy.DTModel(k=topics, t=slices, alpha_var=0.1, eta_var=0.1, phi_var=0.1, seed=seed)
    for ids, t in zip(train.tokens(), train.times):
        if len(ids):
            model.add_doc([str(v) for v in ids], timepoint=int(t))
    with silent():
        model.train(iterations, workers=1, show_progress=False)
    ids = [int(v) for v in model.used_vocabs]
    floor = np.full(topics, 1e-7)
    phi = [
        whole([model.get_topic_word_dist(k, timepoint=t) for k in range(topics)], ids, train.num_words, floor)
        for t in range(slices)
    ]
    alpha = np.exp(np.asarray(model.alpha))
    return np.stack(phi, 1), np.clip(alpha / alpha.sum(-1, keepdims=True) * topics * 0.1, 1e-3, None)


def gensim_dtm(train: Any, topics: int, slices: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The variational Kalman filter of the paper, in Python and Cython: topics (K, T, V) and alpha (T, K)."""
    from gensim.models import LdaSeqModel

    order = np.argsort(train.times, kind="stable")
    c = train.counts[order]
    documents = [list(zip(c.indices[a:b].tolist(), c.data[a:b].tolist())) for a, b in zip(c.indptr, c.indptr[1:])]
    sizes = np.bincount(train.times, minlength=slices).tolist()
    with silent():
        model = LdaSeqModel(
            documents, time_slice=sizes, num_topics=topics, passes=1, em_min_iter=3, em_max_iter=6, random_state=seed,
            id2word={v: str(v) for v in range(train.num_words)},
        )  # fmt: skip
    phi = np.stack([np.exp(chain.e_log_prob).T for chain in model.topic_chains])
    return phi / phi.sum(-1, keepdims=True), np.tile(model.alphas, (slices, 1))


def complete(phi: np.ndarray, alpha: np.ndarray, heldout: Any) -> float:
    """Perplexity by completion, slice by slice."""
    from inference.topics import perplexity

    total = tokens = 0.0
    for t in np.unique(heldout.times):
        found = perplexity((phi[:, t], alpha[t]), heldout[heldout.times == t])
        total, tokens = total + found.rows.sum(), tokens + found.num_tokens
    return float(np.exp(-total / tokens))


def heldout_case(options: Any, report: Report, corpus: Any, width: int, topics: int) -> None:
    """One width of slices: ours, tomotopy's and static LDA."""
    from inference.topics import perplexity

    sliced = corpus.sliced(width)
    train, _, test = sliced.split(0.1, 0.1, seed=0)
    slices, iterations = int(sliced.times.max()) + 1, 20 if options.quick else 300
    with report.case(f"slices of {width} years, {slices} slices, {topics} topics") as case:
        rounds: dict[str, list[float]] = {}
        scores: dict[str, list[float]] = {}
        for seed in range(options.repeats):
            posterior, seconds = cpu_seconds(lambda seed=seed: our_dtm(train, topics, None, seed))
            rounds.setdefault(OURS, []).append(seconds)
            scores.setdefault(OURS, []).append(perplexity(posterior, test).value)
            case.facts["drift chosen"] = float(posterior.diagnostics["drift"])
            posterior, seconds = cpu_seconds(lambda seed=seed: static_lda(train, topics, seed))
            rounds.setdefault("static LDA", []).append(seconds)
            scores.setdefault("static LDA", []).append(perplexity(posterior, test).value)
            if find_spec("tomotopy"):
                found, seconds = cpu_seconds(
                    lambda seed=seed: tomotopy_dtm(train, topics, slices, seed + 1, iterations)
                )
                rounds.setdefault("tomotopy", []).append(seconds)
                scores.setdefault("tomotopy", []).append(complete(*found, test))
        case.times = {name: Times(r) for name, r in rounds.items()}
        for name, values in scores.items():
            case.facts[f"{name}, completion"] = float(np.median(values))
        share = case.facts[f"{OURS}, completion"] / case.facts["static LDA, completion"]
        case.goal("perplexity as a share of static LDA's", share, 0.95, most=True)
        if "tomotopy" in case.times:
            case.faster("tomotopy", 10.0)


def forecast_case(report: Report, corpus: Any, width: int, topics: int) -> None:
    """The last slice but one, foretold by what came before."""
    from inference.topics import forecast, forecast_concentration, perplexity

    sliced = corpus.sliced(width)
    last = int(sliced.times.max()) - 1
    train, unseen = sliced[sliced.times < last], sliced[sliced.times == last]
    with report.case(f"a slice of {width} years never seen", unit="fit") as case:
        dynamic, seconds = cpu_seconds(lambda: our_dtm(train, topics, None, 0))
        case.times[OURS] = Times([seconds])
        alpha = forecast_concentration(dynamic).numpy()
        static = static_lda(train, topics, 0)
        case.facts["forecast, completion"] = perplexity((forecast(dynamic), alpha), unseen).value
        case.facts["static LDA, completion"] = perplexity(static, unseen).value
        share = case.facts["forecast, completion"] / case.facts["static LDA, completion"]
        case.goal("perplexity as a share of static LDA's", share, 0.92, most=True)


def gensim_case(report: Report, corpus: Any, topics: int, part: float) -> None:
    """gensim and ours on a part of the corpus."""
    if not find_spec("gensim"):
        return
    rng = np.random.default_rng(0)
    some = corpus.sliced(20)[rng.random(len(corpus)) < part].pruned(min_documents=5, min_length=5)
    train, _, test = some.split(0.1, 0.1, seed=0)
    slices = int(some.times.max()) + 1
    with report.case(f"gensim on {len(train)} passages, {train.num_words} words, {slices} slices") as case:
        found, seconds = cpu_seconds(lambda: gensim_dtm(train, topics, slices, 0))
        case.times["gensim"] = Times([seconds])
        case.facts["gensim, completion"] = complete(*found, test)
        from inference.topics import perplexity

        posterior, seconds = cpu_seconds(lambda: our_dtm(train, topics, None, 0))
        case.times[OURS] = Times([seconds])
        case.facts[f"{OURS}, completion"] = perplexity(posterior, test).value
        case.check(
            "ours as a share of gensim's perplexity",
            case.facts[f"{OURS}, completion"] / case.facts["gensim, completion"],
            1.0,
        )
        case.faster("gensim", 100.0)


def main() -> int:
    """Two widths, a forecast, and gensim on a part."""
    options = arguments(__doc__, repeats=3, data="folder with docs.ldac, vocab.txt and meta.tsv with years")
    report = Report(__file__, options)
    corpus = corpus_at(options.data, "sotu")
    if (
        corpus.times is None
    ):  # the embedded corpus has no years: pages of the manual in the order of the alphabet stand in
        corpus = replace(corpus, times=1800 + 40 * np.arange(len(corpus)) // len(corpus))
    topics = 5 if options.quick or options.data is None else 20
    for width in (20,) if options.quick else (20, 10):
        heldout_case(options, report, corpus, width, topics)
    forecast_case(report, corpus, 10, topics)
    gensim_case(report, corpus, 5, 0.1 if options.data is None or options.quick else 0.05)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
