"""Simulation-based calibration: right samplers pass, planted errors are seen, and the test itself is calibrated."""

import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from stories import hidden_markov

from inference import EM, NUTS, check, fit
from inference.calibration import evenness, holm
from inference.posterior import Posterior
from zoo import PPCA


def conjugate(x=None, num_data=8):
    """Normal with unknown mean and precision."""
    precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0 / precision.sqrt()))
    with pyro.plate("rows", num_data if x is None else len(x)):
        return pyro.sample("x", dist.Normal(mu, 1.0 / precision.sqrt()), obs=x)


def ordered(x):
    """Two ordered components, which are summed out."""
    share = pyro.sample("share", dist.Beta(3.0, 3.0))
    low = pyro.sample("low", dist.Normal(-1.0, 1.0))
    gap = pyro.sample("gap", dist.Gamma(4.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(low + gap * z, 0.6), obs=x)


QUICK = NUTS(chains=2, warmup=300, draws=400)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("story", "data"),
    [
        (conjugate, torch.zeros(8)),
        (ordered, torch.zeros(25)),
        (PPCA(1), torch.randn(20, 3, generator=torch.Generator().manual_seed(0))),
        (hidden_markov, torch.randn(6, 8, generator=torch.Generator().manual_seed(0))),
    ],
    ids=["conjugate", "ordered mixture", "ppca", "hmm"],
)
def test_nuts_is_calibrated(story, data):
    """Every latent (components in order, W as W W^T), the likelihood, and who shares a state with whom."""
    simulations = 200 if story is hidden_markov else 500  # a second each
    found = check(story, data, NUTS(chains=2, warmup=400, draws=1000), simulations=simulations)
    assert found.passed and "log likelihood" in found.ranks, str(found)


def test_a_right_sampler_passes():
    found = check(conjugate, torch.zeros(8), QUICK, simulations=60)
    assert found.passed and set(found.ranks) == {"precision", "mu", "log likelihood"}
    assert "60 simulations" in repr(found) and "passed" in repr(found)
    assert len(found.plot().axes) == 3


def test_the_size_may_be_told_instead_of_data():
    assert check(conjugate, method=QUICK, simulations=3, num_data=5).simulations == 3


def planted(monkeypatch, change):
    """`change` every posterior before it is judged."""
    monkeypatch.setattr(sys.modules["inference.fit"], "fit", lambda *a, **k: change(fit(*a, **k)))


def squeezed(posterior: Posterior) -> Posterior:
    mu = posterior.draws["mu"]
    posterior.draws["mu"] = mu.mean() + 0.5 * (mu - mu.mean())
    return posterior


def prior_instead(posterior: Posterior) -> Posterior:
    generator = torch.Generator().manual_seed(posterior.seed)
    n = len(posterior.draws["mu"])
    torch.manual_seed(posterior.seed)
    precision = torch.distributions.Gamma(3.0, 2.0).sample((n,)).double()
    posterior.draws["precision"] = precision
    posterior.draws["mu"] = torch.randn(n, generator=generator, dtype=torch.float64) / precision.sqrt()
    return posterior


@pytest.mark.parametrize(
    ("change", "seen", "words"),
    [(squeezed, "mu", "too little"), (prior_instead, "log likelihood", "")],
    ids=["sd x 0.5", "the prior"],
)
def test_planted_errors_are_seen(monkeypatch, change, seen, words):
    """Spreads that are too small show in the ranks of mu; draws from the prior only in those of the likelihood."""
    planted(monkeypatch, change)
    with torch.random.fork_rng():
        found = check(conjugate, torch.zeros(8), QUICK, simulations=120)
    assert seen in found.wrong and words in found.shape(seen) and "FAILED" in repr(found)
    if change is prior_instead:
        assert "mu" not in found.wrong and "precision" not in found.wrong


def test_a_dropped_jacobian_is_seen(monkeypatch):
    monkeypatch.setattr("inference.joint.log_jacobian", lambda transform, free, value: torch.zeros(()))
    found = check(conjugate, torch.zeros(8), QUICK, simulations=200)
    assert "precision" in found.wrong


def test_even_ranks_are_rarely_called_uneven():
    """Under uniform ranks the p-value is uniform: its own false-alarm rate is right."""
    rng = np.random.default_rng(1)
    null = evenness(rng.integers(0, 100, (4000, 150)), 99)
    p = np.array([(null <= v).mean() for v in evenness(rng.integers(0, 100, (600, 150)), 99)])
    for level in (0.01, 0.05, 0.2):
        assert abs((p <= level).mean() - level) < 4 * math.sqrt(level / 600)
    assert stats.kstest(p, "uniform").pvalue > 1e-4


def test_holm_against_its_paper():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_refusals():
    with pytest.raises(ValueError, match="points"):
        check(conjugate, torch.zeros(8), EM())
    with pytest.raises(ValueError, match="simulations"):
        check(conjugate, torch.zeros(8), simulations=0)

    def flat(x):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.raises(ValueError, match="improper"):
        check(flat, torch.zeros(8), NUTS(), simulations=2)
    assert fit(conjugate, torch.zeros(8), QUICK, seed=0).converged
