"""Gaussian mixtures for the benchmarks: rows, one start for both sides, and both sides themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _peers import silent

#: The least variance of both sides, on standardised rows: `reg_covar` there, `ridge` here.
RIDGE = 1e-6


def standardised(x: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1, on which a share of a variance and a variance are the same."""
    return (x - x.mean(0)) / x.std(0)


def clusters(num_rows: int, num_columns: int, num_components: int, seed: int = 0) -> np.ndarray:
    """Standardised rows from overlapping Gaussians of any shape, (num_rows, num_columns) float64."""
    rng = np.random.default_rng(seed)
    shape = (num_components, num_columns, num_columns)
    roots = np.eye(num_columns) + 0.5 * rng.standard_normal(shape) / num_columns**0.5
    centres = 1.2 * rng.standard_normal((num_components, num_columns))
    which = rng.choice(num_components, num_rows, p=rng.dirichlet(np.full(num_components, 10.0)))
    x = rng.standard_normal((num_rows, num_columns))
    for k in range(num_components):
        rows = which == k
        x[rows] = centres[k] + x[rows] @ roots[k].T
    return standardised(x)


def same_start(x: np.ndarray, covariance: str, num_components: int) -> tuple[dict, dict]:
    """Equal weights, random rows as centres, the columns' own variances.

    Returns
    -------
    scikit-learn's arguments, and the values of our sites.
    """
    K, D = num_components, x.shape[1]
    rng = np.random.default_rng(1)
    means = x[rng.choice(len(x), K, replace=False)].astype(np.float64)
    precision = {
        "full": np.stack([np.eye(D)] * K),
        "tied": np.eye(D),
        "diag": np.ones((K, D)),
        "spherical": np.ones(K),
    }[covariance]
    weights = np.full(K, 1 / K)
    theirs = {"weights_init": weights, "means_init": means, "precisions_init": precision}
    site = "Lambda" if covariance in ("full", "tied") else "tau"
    return theirs, {"pi": weights, "mu": means, site: precision}


def sklearn_iterations(x: np.ndarray, covariance: str, num_components: int) -> Callable[[int], Any]:
    """Function that runs scikit-learn's EM for a number of iterations from `same_start`."""
    from sklearn.mixture import GaussianMixture

    start, _ = same_start(x, covariance, num_components)

    def run(iterations: int) -> Any:
        settings = {"covariance_type": covariance, "tol": 0.0, "reg_covar": RIDGE, "max_iter": iterations}
        with silent():
            return GaussianMixture(num_components, **settings, **start).fit(x)

    return run


def our_iterations(
    x: Any,
    covariance: str,
    num_components: int,
    story: Any = None,
    start: dict | None = None,
    **settings: Any,
) -> Callable[[int], Any]:
    """Function that runs EM on the GMM story (or `story`) for a number of M-steps from `same_start` (or
    `start`).

    The likelihood is maximised, as scikit-learn does: the priors of the globals are left out.  One more
    E-step than M-steps is made on both sides, which gives the log-likelihood of the last unknowns.
    """
    from inference import EM, fit
    from zoo import GMM

    story = GMM(num_components, covariance=covariance) if story is None else story
    start = same_start(np.asarray(x), covariance, num_components)[1] if start is None else start
    device = settings.pop("device", "cpu")

    def run(iterations: int) -> Any:
        method = EM(
            estimate="mle",
            start=start,
            tol=0.0,
            ridge=RIDGE,
            max_iter=iterations + 1,
            driver="batch",
            **settings,
        )
        return fit(story, x, method, seed=0, device=device, progress=False)

    return run


def our_score(posterior: Any, iterations: int, num_rows: int) -> float:
    """Log-likelihood a row after that many M-steps.

    Raises
    ------
    RuntimeError
        EM made another number of iterations than it was asked for: the times would not compare.
    """
    made = posterior.diagnostics["iterations"] - 1
    if made != iterations:
        raise RuntimeError(f"EM made {made} M-steps where {iterations} were asked for: {posterior.warnings}")
    return posterior.diagnostics["log_likelihood"] / num_rows
