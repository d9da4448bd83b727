"""Baum-Welch iterations of a Gaussian hidden Markov model, against hmmlearn and pomegranate.

All sides start from the same parameters and maximise the likelihood; ours reads the story first, which drops out of the
difference of a long and a short run.  pomegranate works in single precision and has probabilities of ending, so that only
hmmlearn's log-likelihood is compared with ours.

    python -m pip install hmmlearn pomegranate
    python benchmarks/hmm.py [--quick]
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from _peers import OURS, Report, arguments, per_iteration, silent

STATES, SHORT, LONG = 3, 3, 23


def sequences(num: int, steps: int, seed: int = 0) -> np.ndarray:
    """Sequences that switch between three overlapping regimes, (N, T)."""
    rng = np.random.default_rng(seed)
    move = np.array([[0.9, 0.07, 0.03], [0.05, 0.9, 0.05], [0.1, 0.1, 0.8]]).cumsum(1)
    z = np.empty((num, steps), dtype=int)
    z[:, 0] = rng.integers(3, size=num)
    for t in range(1, steps):
        z[:, t] = (rng.random(num)[:, None] > move[z[:, t - 1]]).sum(1).clip(max=2)
    return np.array([-2.0, 0.0, 2.5])[z] + rng.standard_normal(z.shape) * np.array([1.0, 0.6, 1.2])[z]


def start() -> dict[str, np.ndarray]:
    """Where every side begins: first states, moves, means and precisions."""
    move = np.full((STATES, STATES), 0.1) + 0.7 * np.eye(STATES)
    return {"pi": np.full(STATES, 1 / 3), "A": move, "mu": np.array([-1.0, 0.3, 1.5]), "tau": np.ones(STATES)}


def our_fit(x: np.ndarray, iterations: int) -> Any:
    """The story of the zoo, by EM."""
    from inference import EM, fit
    from zoo import GaussianHMM

    em = EM(estimate="mle", start=start(), max_iter=iterations, tol=0.0, ridge=0.0)
    return fit(GaussianHMM(STATES, scale=3.0), x, em, seed=0, device="cpu", progress=False)


def hmmlearn_fit(x: np.ndarray, iterations: int) -> Any:
    """hmmlearn, scaled forward-backward in C++."""
    from hmmlearn.hmm import GaussianHMM

    model = GaussianHMM(
        STATES, "diag", n_iter=iterations, tol=-np.inf, init_params="", covars_prior=0.0, covars_weight=0.0,
        min_covar=0.0, implementation="scaling",
    )  # fmt: skip
    begin = start()
    model.startprob_, model.transmat_ = begin["pi"], begin["A"]
    model.means_, model.covars_ = begin["mu"][:, None], 1 / begin["tau"][:, None]
    with silent():
        return model.fit(x.reshape(-1, 1), lengths=[x.shape[1]] * len(x))


def pomegranate_fit(x: np.ndarray, iterations: int) -> Any:
    """pomegranate, batched in PyTorch."""
    import torch
    from pomegranate.distributions import Normal
    from pomegranate.hmm import DenseHMM

    begin, old = start(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        states = [Normal([float(m)], [float(1 / t)], covariance_type="diag") for m, t in zip(begin["mu"], begin["tau"])]
        model = DenseHMM(states, edges=begin["A"].tolist(), starts=begin["pi"].tolist(), max_iter=iterations, tol=0.0)
        return model.fit(torch.from_numpy(x[:, :, None]).float())
    finally:
        torch.set_default_dtype(old)


def main() -> int:
    """One case: 2,000 sequences of 50 steps."""
    options = arguments(__doc__, repeats=7)
    report = Report(__file__, options)
    num, steps = (200, 20) if options.quick else (2000, 50)
    x = sequences(num, steps)
    with report.case(f"{num} sequences x {steps} steps, {STATES} states", unit="iteration") as case:
        sides = {OURS: lambda n: our_fit(x, n)}
        if find_spec("hmmlearn"):
            ours, peer = our_fit(x, LONG), hmmlearn_fit(x, LONG)
            theirs = peer.monitor_.history
            gap = max(abs(a - b) for a, b in zip(ours.diagnostics["log_likelihoods"], theirs)) / num
            case.check("largest difference of any iteration's log-likelihood, a sequence", gap, 1e-8)
            sides["hmmlearn"] = lambda n: hmmlearn_fit(x, n)
        if find_spec("pomegranate"):
            sides["pomegranate"] = lambda n: pomegranate_fit(x, n)
        case.times = per_iteration(sides, options.repeats, SHORT, LONG)
        for name in sides:
            if name != OURS:
                case.faster(name, 1.0)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
