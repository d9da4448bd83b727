"""Whole fits of Gaussian mixtures, set-up included, against scikit-learn's GaussianMixture.

own start    each side begins once, as it does by default (scikit-learn: k-means; ours: k-means++ and Lloyd
own start    each side begins once, in its default way (scikit-learn: k-means; ours: k-means++ and Lloyd
             lower, median over the seeds.  The time that counts is the whole call.  "seconds to sklearn's
             log-likelihood" is the time after which ours first had what scikit-learn ended with.
same start   thirty iterations from the same unknowns on small data, where set-up is most of the time; the
             log-likelihoods must agree.

    python benchmarks/gmm_fit.py [--quick] [--only iris]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from _mixtures import RIDGE, clusters, our_iterations, our_score, sklearn_iterations, standardised
from _peers import OURS, Case, Report, arguments, interleaved, silent

#: Rise of the log-likelihood a row below which scikit-learn stops by default, and the rules that ours tries.
TOL, OUR_TOLS = 1e-3, (1e-3, 1e-4, 1e-5, 1e-6)
#: Below this, log-likelihoods a row count as equal.
EQUAL = 1e-5
ITERATIONS, MOST = 30, 1_000


def own_start(report: Report, x: np.ndarray, components: int, seeds: int) -> None:
    """Both sides from their own starts to their own ends."""
    name = f"own start, full N={len(x):,} D={x.shape[1]} K={components}"
    if not report.wants(name):
        return
    with report.case(name, unit=f"{seeds} seed{'s' * (seeds > 1)}") as case:
        theirs = partial(sklearn_fit, x, components)
        reached = [theirs(seed).score(x) for seed in range(seeds)]
        tol = loosest(case, x, components, reached)
        sides = {OURS: partial(our_fit, x, components, tol), "sklearn": theirs}
        if case.sound:
            rounds = report.options.repeats
            case.times = interleaved({n: partial(every, run, seeds) for n, run in sides.items()}, rounds)
            case.faster("sklearn", 6.0)


def loosest(case: Case, x: np.ndarray, components: int, reached: Sequence[float]) -> float:
    """The loosest rule with which ours does not end below `reached` (by seed); adds the check and facts."""
    for tol in OUR_TOLS:
        gaps, facts = [], {}
        for seed, target in enumerate(reached):
            climbed: list[tuple[float, float]] = []
            begin = time.perf_counter()

            def note(iteration: int, value: float, _: Any, begin: float = begin, climbed: list = climbed) -> None:
                climbed.append((time.perf_counter() - begin, value / len(x)))

            posterior = our_fit(x, components, tol, seed, note)
            gaps.append(posterior.diagnostics["log_likelihood"] / len(x) - target)
            when = next((seconds for seconds, value in climbed if value >= target), None)
            facts[f"seed {seed}, log-likelihood a row, ours less sklearn's"] = gaps[-1]
            facts[f"seed {seed}, iterations of ours"] = len(climbed)
            facts[f"seed {seed}, seconds to sklearn's log-likelihood"] = "not reached" if when is None else when
        if statistics.median(gaps) >= -EQUAL:
            break
    case.facts.update({"stopping rule of ours": tol, **facts})
    case.check("median over seeds of ours less sklearn's", statistics.median(gaps), -EQUAL, least=True)
    return tol


def every(run: Callable[[int], Any], seeds: int) -> None:
    """All seeds, one after another."""
    for seed in range(seeds):
        run(seed)


def sklearn_fit(x: np.ndarray, components: int, seed: int) -> Any:
    """scikit-learn from k-means."""
    from sklearn.mixture import GaussianMixture

    with silent():
        return GaussianMixture(components, tol=TOL, reg_covar=RIDGE, max_iter=MOST, random_state=seed).fit(x)


def our_fit(x: np.ndarray, components: int, tol: float, seed: int, callback: Any = None) -> Any:
    """EM from one k-means++ start."""
    from inference import EM, fit
    from zoo import GMM

    method = EM(restarts=1, estimate="mle", tol=tol, ridge=RIDGE, max_iter=MOST, callback=callback)
    return fit(GMM(components), x, method, seed=seed, device="cpu", progress=False)


def small_data() -> list[tuple[str, np.ndarray, str, int]]:
    """(name, rows, covariance, number of components) of small sets that come with scikit-learn."""
    from sklearn.datasets import load_digits, load_iris, load_wine
    from sklearn.decomposition import PCA

    iris, wine = standardised(load_iris().data), standardised(load_wine().data)
    digits = standardised(PCA(16, random_state=0).fit_transform(load_digits().data))
    return [
        ("iris", iris, "full", 3),
        ("iris", iris, "diag", 3),
        ("wine", wine, "full", 3),
        ("digits PCA 16", digits, "full", 10),
    ]


def same_starts(report: Report, name: str, x: np.ndarray, covariance: str, components: int) -> None:
    """A fixed number of iterations from the same unknowns."""
    name = f"same start, {name} {covariance} K={components}, {ITERATIONS} iterations"
    if not report.wants(name):
        return
    with report.case(name) as case:
        ours = our_iterations(x, covariance, components)
        theirs = sklearn_iterations(x, covariance, components)
        gap = our_score(ours(ITERATIONS), ITERATIONS, len(x)) - theirs(ITERATIONS).score(x)
        case.check("log-likelihood a row, ours less scikit-learn's", gap, 1e-5)
        sides = {OURS: lambda: ours(ITERATIONS), "sklearn": lambda: theirs(ITERATIONS)}
        case.times = interleaved(sides, 2 * report.options.repeats)
        case.faster("sklearn")


def main() -> int:
    """Every case."""
    options = arguments(__doc__, repeats=3)
    report = Report(__file__, options)
    size = (20_000, 8, 5) if options.quick else (100_000, 16, 16)
    own_start(report, clusters(*size), size[-1], 1 if options.quick else 3)
    for name, x, covariance, components in small_data():
        same_starts(report, name, x, covariance, components)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
