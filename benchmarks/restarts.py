"""Ten restarts of a Gaussian mixture in one batch, against scikit-learn's n_init=10.

Every start is each side's own default (scikit-learn: k-means; ours: k-means++ and Lloyd steps); both stop by
the same rule and have the same least variance.  The best log-likelihood of the ten, median over the seeds,
must not be worse.  Ours passes over restarts that collapsed onto a few rows, whose likelihood has no bound;
scikit-learn does not look.

    python benchmarks/restarts.py [--quick] [--only wine]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from _mixtures import RIDGE, standardised
from _peers import OURS, Report, arguments, interleaved, silent

RESTARTS, SEEDS, TOL, MOST = 10, 3, 1e-5, 1_000
#: What the stopping rule may leave undone, in log-likelihood a row.
SLACK = 1e-3


def sets() -> dict[str, tuple[np.ndarray, int]]:
    """Name -> standardised rows and number of components."""
    from sklearn.datasets import load_digits, load_iris, load_wine
    from sklearn.decomposition import PCA

    return {
        "iris": (standardised(load_iris().data), 3),
        "wine": (standardised(load_wine().data), 3),
        "digits PCA 16": (standardised(PCA(16, random_state=0).fit_transform(load_digits().data)), 10),
    }


def sklearn_best(x: np.ndarray, components: int) -> Callable[[int], Any]:
    """The best of scikit-learn's ten."""
    from sklearn.mixture import GaussianMixture

    def run(seed: int) -> Any:
        settings = {"n_init": RESTARTS, "tol": TOL, "reg_covar": RIDGE, "max_iter": MOST}
        with silent():
            return GaussianMixture(components, random_state=seed, **settings).fit(x)

    return run


def our_best(x: np.ndarray, components: int) -> Callable[[int], Any]:
    """The best of our ten."""
    from inference import EM, fit
    from zoo import GMM

    method = EM(restarts=RESTARTS, estimate="mle", tol=TOL, ridge=RIDGE, max_iter=MOST)

    def run(seed: int) -> Any:
        return fit(GMM(components), x, method, seed=seed, device="cpu", progress=False)

    return run


def narrowest(mixture: Any) -> float:
    """Least variance of any component in any direction: close to `RIDGE` where one has collapsed."""
    return float(np.linalg.eigvalsh(mixture.covariances_).min())


def every(run: Callable[[int], Any], seeds: int) -> None:
    """All seeds, one after another."""
    for seed in range(seeds):
        run(seed)


def one(report: Report, name: str, x: np.ndarray, components: int, seeds: int) -> None:
    """All seeds of one data set."""
    with report.case(
        f"{name}, full N={len(x)} D={x.shape[1]} K={components}", unit=f"{seeds} seed{'s' * (seeds > 1)}"
    ) as case:
        theirs, ours = sklearn_best(x, components), our_best(x, components)
        gaps = []
        for seed in range(seeds):
            posterior, peer = ours(seed), theirs(seed)
            gaps.append(posterior.diagnostics["log_likelihood"] / len(x) - peer.score(x))
            case.facts[f"seed {seed}, log-likelihood a row, ours less sklearn's"] = gaps[-1]
            case.facts[f"seed {seed}, narrowest direction of sklearn's answer"] = narrowest(peer)
        case.check("median over seeds of those differences", statistics.median(gaps), -SLACK, least=True)
        sides = {OURS: ours, "sklearn": theirs}
        case.times = interleaved({n: partial(every, run, seeds) for n, run in sides.items()}, report.options.repeats)
        case.faster("sklearn", 3.0)


def main() -> int:
    """Every data set."""
    options = arguments(__doc__, repeats=5)
    report = Report(__file__, options)
    for name, (x, components) in sets().items():
        if report.wants(name) and not (options.quick and len(x) > 1_000):
            one(report, name, x, components, 1 if options.quick else SEEDS)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
