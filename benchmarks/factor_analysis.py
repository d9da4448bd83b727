"""Factor analysis and probabilistic PCA, whole fits, against scikit-learn's FactorAnalysis and PCA.

Factor analysis must end at a log-likelihood that is not lower than that of either of scikit-learn's solvers,
each by its default rule.  PCA's time is the floor for probabilistic PCA, whose maximum has the same axes: the
log-likelihood (Tipping and Bishop 1999) must not be lower than `PCA.score`, and the subspaces must agree.

    python benchmarks/factor_analysis.py [--quick] [--only PPCA]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _peers import OURS, Report, arguments, interleaved, silent

FACTORS = 8
#: Rounding, in log-likelihood a row.
EQUAL = 1e-9


def factors(num_rows: int, num_columns: int, num_factors: int, seed: int = 0) -> np.ndarray:
    """Rows of a factor analysis whose columns have noise of very different sizes, (num_rows, num_columns)."""
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((num_columns, num_factors))
    noise = np.exp(rng.uniform(np.log(0.1), np.log(3.0), num_columns))
    hidden = rng.standard_normal((num_rows, num_factors))
    return (
        hidden @ loadings.T + rng.standard_normal((num_rows, num_columns)) * noise**0.5 + rng.normal(size=num_columns)
    )


def our_fit(story: Any, x: np.ndarray) -> Callable[[], Any]:
    """EM from one start to the maximum of the likelihood."""
    from inference import EM, fit

    return lambda: fit(story, x, EM(restarts=1, estimate="mle"), seed=0, device="cpu", progress=False)


def sklearn_fit(kind: Any, x: np.ndarray, **settings: Any) -> Callable[[], Any]:
    """One of scikit-learn's decompositions."""

    def run() -> Any:
        with silent():
            return kind(n_components=FACTORS, **settings).fit(x)

    return run


def factor_analysis(report: Report, x: np.ndarray) -> None:
    """Ours, and both solvers of scikit-learn."""
    from sklearn.decomposition import FactorAnalysis as Theirs

    from zoo import FactorAnalysis

    ours = our_fit(FactorAnalysis(num_factors=FACTORS), x)
    peers = {
        "sklearn randomized": sklearn_fit(Theirs, x, random_state=0),
        "sklearn lapack": sklearn_fit(Theirs, x, svd_method="lapack"),
    }
    name = f"FactorAnalysis N={len(x):,} D={x.shape[1]} q={FACTORS}"
    if not report.wants(name):
        return
    with report.case(name) as case:
        posterior = ours()
        score = posterior.diagnostics["log_likelihood"] / len(x)
        case.check(
            "log-likelihood a row, diagnostics less log_prob()",
            score - float(posterior.log_prob().mean()),
            1e-6,
        )
        for peer, run in peers.items():
            case.check(f"log-likelihood a row, ours less {peer}", score - run().score(x), -EQUAL, least=True)
        case.times = interleaved({OURS: ours, **peers}, report.options.repeats)
        case.faster("sklearn randomized", 30.0)
        case.faster("sklearn lapack", 15.0)
        case.facts["iterations of ours"] = posterior.diagnostics["iterations"]


def ppca(report: Report, x: np.ndarray) -> None:
    """Ours against PCA's decomposition alone."""
    from sklearn.decomposition import PCA

    from zoo import PPCA

    name = f"PPCA N={len(x):,} D={x.shape[1]} q={FACTORS}"
    if not report.wants(name):
        return
    ours, theirs = our_fit(PPCA(num_factors=FACTORS), x), sklearn_fit(PCA, x)
    with report.case(name) as case:
        posterior, peer = ours(), theirs()
        score = posterior.diagnostics["log_likelihood"] / len(x)
        case.check("log-likelihood a row, ours less sklearn's PCA", score - peer.score(x), -EQUAL, least=True)
        axes = np.linalg.qr(posterior.draws["W"][0].double().numpy())[0]
        cosines = np.linalg.svd(peer.components_ @ axes, compute_uv=False)
        case.check("1 - cosine of the largest angle between the subspaces", 1 - cosines.min(), 1e-6)
        case.times = interleaved({OURS: ours, "sklearn PCA": theirs}, 3 * report.options.repeats)
        case.faster("sklearn PCA")
        case.goal("ours / sklearn PCA", 1 / case.ratio("sklearn PCA"), 1.2, most=True)
        case.facts["iterations of ours"] = posterior.diagnostics["iterations"]
        case.facts["solver of sklearn"] = peer._fit_svd_solver


def main() -> int:
    """Both."""
    options = arguments(__doc__, repeats=5)
    report = Report(__file__, options)
    x = factors(5_000, 24, FACTORS) if options.quick else factors(100_000, 64, FACTORS)
    factor_analysis(report, x)
    ppca(report, x)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
