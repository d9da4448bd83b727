"""LDA on Associated Press articles: perplexity, coherence and processor time beside tomotopy and scikit-learn.

Settings of every side are chosen on validation documents with two seeds of their own; the test documents are looked at once,
at the end, for every other seed.  Times are processor times of whole fits.  scikit-learn's bound at the same settings is
compared in a case of its own.

    python -m pip install tomotopy
    python benchmarks/lda_ap.py --data FOLDER [--quick]     # FOLDER holds docs.ldac and vocab.txt
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from _peers import OURS, Report, Times, arguments
from _topics import corpus_at, cpu_seconds, judge, sklearn_lda, tomotopy_lda

ETAS = (0.01, 0.05, 0.1)
#: Seeds of the fits that settings are chosen by; others are tested.
TRIALS = (0, 100)


def our_lda(train: Any, topics: int, setting: tuple[float, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The story of the zoo on expected counts."""
    from inference import EM, fit
    from zoo import LDA

    eta, passes = setting
    em = EM(restarts=1, max_iter=passes, tol=0.0)
    posterior = fit(LDA(topics, 0.05, eta), train, em, seed=seed, device="cpu", progress=False)
    return posterior.draws["phi"][0].numpy(), np.full(topics, 0.05)


def perplexities(options: Any, report: Report, train: Any, validation: Any, test: Any, topics: int) -> None:
    """Every side at its best setting."""
    iterations = 50 if options.quick else 1000
    passes = (20,) if options.quick else (60, 100)
    sides: dict[str, tuple[Any, list[Any]]] = {
        OURS: (lambda s, seed: our_lda(train, topics, s, seed), [(e, p) for e in ETAS for p in passes])
    }
    if find_spec("tomotopy"):
        sides["tomotopy"] = (lambda s, seed: tomotopy_lda(train, topics, s, seed, iterations), list(ETAS))
    peer_passes = 5 if options.quick else 50
    sides["scikit-learn"] = (lambda s, seed: sklearn_lda(train, topics, s, seed, peer_passes), [0.1])
    with report.case(f"{len(train):,} documents, {topics} topics", unit="fit") as case:
        for name, (fit, settings) in sides.items():
            tried = {
                s: np.mean([judge(fit(s, seed), validation, train)["completion"] for seed in TRIALS])
                for s in (settings if len(settings) > 1 else ())
            }
            best = min(tried, key=lambda s: tried[s]) if tried else settings[0]
            case.facts[f"{name}, setting"] = str(best)
            rounds, scores = [], []
            for seed in range(options.repeats):
                topics_found, seconds = cpu_seconds(lambda fit=fit, best=best, seed=seed: fit(best, seed + 1))
                rounds.append(seconds)
                scores.append(judge(topics_found, test, train, particles=0 if options.quick else 10))
            case.times[name] = Times(rounds)
            for key in scores[0]:
                case.facts[f"{name}, {key}"] = float(np.median([s[key] for s in scores]))
        if "tomotopy" in case.times:
            case.faster("tomotopy", 10.0)
            ratio = case.facts[f"{OURS}, completion"] / case.facts["tomotopy, completion"]
            case.goal("perplexity as a share of tomotopy's", ratio, 0.98, most=True)
            case.goal("NPMI less tomotopy's", case.facts[f"{OURS}, NPMI"] - case.facts["tomotopy, NPMI"], 0.0)
        case.faster("scikit-learn", 5.0)


def bounds(options: Any, report: Report, train: Any, topics: int) -> None:
    """Variational Bayes: the bound after scikit-learn's sweeps, and after far fewer of ours."""
    from sklearn.decomposition import LatentDirichletAllocation

    from inference import SVI, fit
    from zoo import LDA

    theirs, ours = (10, 8) if options.quick else (40, 20)
    with report.case(f"variational Bayes, {theirs} sweeps of scikit-learn, {ours} of ours", unit="fit") as case:
        peer = LatentDirichletAllocation(
            topics, doc_topic_prior=0.1, topic_word_prior=0.1, max_iter=theirs, random_state=0, evaluate_every=-1
        )
        x = train.counts.astype(float)
        svi = SVI(starts=1, steps=ours, tol=0.0, draws=25)
        rounds: dict[str, list[float]] = {OURS: [], "scikit-learn": []}
        for _ in range(options.repeats):
            posterior, seconds = cpu_seconds(
                lambda: fit(LDA(topics, 0.1, 0.1), train, svi, seed=0, device="cpu", progress=False)
            )
            rounds[OURS].append(seconds)
            _, seconds = cpu_seconds(lambda: peer.fit(x))
            rounds["scikit-learn"].append(seconds)
        bound = peer._approx_bound(x, peer._unnormalized_transform(x), sub_sampling=False)
        case.times = {name: Times(r) for name, r in rounds.items()}
        case.facts["bound a word, ours"] = posterior.diagnostics["elbo"] / train.num_tokens
        case.facts["bound a word, scikit-learn"] = bound / train.num_tokens
        case.check(
            "how far our bound lies below, as a share", max(0.0, posterior.diagnostics["elbo"] / bound - 1), 0.001
        )
        case.faster("scikit-learn", 3.0)


def main() -> int:
    """Two cases."""
    options = arguments(__doc__, repeats=3, data="folder with docs.ldac and vocab.txt; without it, the embedded corpus")
    report = Report(__file__, options)
    corpus = corpus_at(options.data, "ap")
    topics = 10 if options.quick or options.data is None else 50
    train, validation, test = corpus.split(0.1, 0.1, seed=0)
    perplexities(options, report, train, validation, test, topics)
    bounds(options, report, train, topics)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
