"""Enumeration EM derived from the GMM story against scikit-learn's hand-written GaussianMixture.

Both start from the same values and run the same number of iterations in one interleaved run; the log-likelihoods must
agree.  Prints the median seconds of both, and their ratio (above 1: ours is faster).

    python benchmarks/em_vs_sklearn.py [--repeats 5] [--json results.json]
"""

import argparse
import json
import platform
import statistics
import time
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits, load_iris, load_wine, make_blobs
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from inference import EM, fit
from zoo import GMM

CASES = [
    ("iris", "full", 3),
    ("iris", "diag", 3),
    ("wine", "full", 3),
    ("digits-pca16", "full", 10),
    ("blobs-2e4x8", "full", 8),
    ("blobs-2e4x8", "diag", 8),
]
ITERATIONS = 30


def data(name: str) -> np.ndarray:
    """Standardised rows."""
    if name == "iris":
        x = load_iris().data
    elif name == "wine":
        x = load_wine().data
    elif name == "digits-pca16":
        x = PCA(16, random_state=0).fit_transform(load_digits().data)
    else:
        x = make_blobs(20_000, 8, centers=8, cluster_std=2.0, random_state=0)[0]
    return (x - x.mean(0)) / x.std(0)


def start(x: np.ndarray, covariance: str, k: int) -> tuple[dict, dict]:
    """The same start for both: random rows, the data's variances."""
    rng = np.random.RandomState(0)
    means, d = x[rng.choice(len(x), k, replace=False)], x.shape[1]
    spread = np.stack([np.eye(d)] * k) if covariance == "full" else np.ones((k, d))
    site = "Lambda" if covariance == "full" else "tau"
    weights = np.full(k, 1 / k)
    theirs = {"weights_init": weights, "means_init": means, "precisions_init": spread}
    return theirs, {"pi": weights, "mu": means, site: spread}


def run(name: str, covariance: str, k: int, repeats: int) -> dict:
    """Median seconds of both for one case."""
    x = data(name)
    theirs, ours = start(x, covariance, k)
    times: dict[str, list[float]] = {"sklearn": [], "em": []}
    for _ in range(repeats):
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = GaussianMixture(
                k, covariance_type=covariance, tol=0.0, reg_covar=1e-6, max_iter=ITERATIONS, **theirs
            ).fit(x)
        times["sklearn"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        posterior = fit(
            GMM(k, covariance=covariance),
            x,
            EM(estimate="mle", start=ours, tol=0.0, ridge=1e-6, max_iter=ITERATIONS + 1),
            seed=0,
            progress=False,
        )
        times["em"].append(time.perf_counter() - begin)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "case": f"{name} {covariance} K={k}",
        "rows": len(x),
        **medians,
        "ratio": medians["sklearn"] / medians["em"],
        "log_likelihood_gap": posterior.diagnostics["log_likelihood"] / len(x) - model.score(x),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'case':<28}{'rows':>8}{'sklearn s':>12}{'EM s':>12}{'ratio':>8}{'log-lik gap':>14}")
    results = []
    for case in CASES:
        r = run(*case, options.repeats)
        results.append(r)
        print(
            f"{r['case']:<28}{r['rows']:>8}{r['sklearn']:>12.4f}{r['em']:>12.4f}{r['ratio']:>8.2f}"
            f"{r['log_likelihood_gap']:>14.2e}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
