"""Whole fits of Gaussian mixtures, set-up included, against scikit-learn's GaussianMixture.

own start    each side begins as it does by default (scikit-learn: k-means; ours: k-means++ and Lloyd steps, one start) and
             stops by the same rule.  The time that counts is the whole call; ours must end at a log-likelihood that is not
             lower.  "to sklearn's log-likelihood" is the time after which ours first had what scikit-learn ended with.
same start   thirty iterations from the same unknowns on small data, where set-up is most of the time; the
             log-likelihoods must agree.

    python benchmarks/gmm_fit.py [--quick] [--only iris]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _mixtures import RIDGE, clusters, our_iterations, our_score, sklearn_iterations, standardised
from _peers import OURS, Report, arguments, interleaved, silent

#: Rise of the log-likelihood a row below which both sides stop: scikit-learn's default, and a strict one.
TOLERANCES = (1e-3, 1e-5)
ITERATIONS = 30
MOST = 1_000


def own_start(report: Report, x: np.ndarray, components: int, tol: float, seed: int) -> None:
    """Both sides from their own starts to their own ends."""
    name = f"own start, full N={len(x):,} D={x.shape[1]} K={components} tol={tol:g} seed={seed}"
    if not report.wants(name):
        return
    with report.case(name) as case:
        theirs, ours = sklearn_fit(x, components, tol, seed), our_fit(x, components, tol, seed)
        reached = theirs().score(x)
        climbed: list[tuple[float, float]] = []
        begin = time.perf_counter()
        posterior = ours(lambda iteration, value, _: climbed.append((time.perf_counter() - begin, value / len(x))))
        score = posterior.diagnostics["log_likelihood"] / len(x)
        case.check("log-likelihood a row, ours less scikit-learn's", score - reached, -tol, least=True)
        case.times = interleaved({OURS: ours, "sklearn": theirs}, report.options.repeats)
        case.faster("sklearn", 6.0)
        when = next((seconds for seconds, value in climbed if value >= reached), None)
        case.facts["ours, log-likelihood a row"] = score
        case.facts["sklearn, log-likelihood a row"] = reached
        case.facts["ours, iterations"] = len(climbed)
        case.facts["ours, seconds to sklearn's log-likelihood"] = "not reached" if when is None else when


def sklearn_fit(x: np.ndarray, components: int, tol: float, seed: int) -> Callable[[], Any]:
    """scikit-learn from k-means."""
    from sklearn.mixture import GaussianMixture

    def run() -> Any:
        with silent():
            return GaussianMixture(components, tol=tol, reg_covar=RIDGE, max_iter=MOST, random_state=seed).fit(x)

    return run


def our_fit(x: np.ndarray, components: int, tol: float, seed: int) -> Callable[..., Any]:
    """EM from one k-means++ start."""
    from inference import EM, fit
    from zoo import GMM

    def run(callback: Any = None) -> Any:
        method = EM(restarts=1, estimate="mle", tol=tol, ridge=RIDGE, max_iter=MOST, callback=callback)
        return fit(GMM(components), x, method, seed=seed, progress=False)

    return run


def small_data() -> dict[str, tuple[np.ndarray, str, int]]:
    """Name -> rows, covariance and number of components of small sets that come with scikit-learn."""
    from sklearn.datasets import load_digits, load_iris, load_wine
    from sklearn.decomposition import PCA

    iris, wine = standardised(load_iris().data), standardised(load_wine().data)
    digits = standardised(PCA(16, random_state=0).fit_transform(load_digits().data))
    return {
        "iris": (iris, "full", 3),
        "iris diag": (iris, "diag", 3),
        "wine": (wine, "full", 3),
        "digits PCA 16": (digits, "full", 10),
    }


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
    x = clusters(4_000, 8, 5) if options.quick else clusters(100_000, 16, 16)
    for tol in TOLERANCES[:1] if options.quick else TOLERANCES:
        for seed in range(1 if options.quick else 3):
            own_start(report, x, 5 if options.quick else 16, tol, seed)
    for name, (rows, covariance, components) in small_data().items():
        same_starts(report, name, rows, covariance, components)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
