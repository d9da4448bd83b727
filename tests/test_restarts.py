"""Several starts of one fit: the same keys and words whatever the method, and modes counted whatever the labels."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import normal_mixture

from inference import EM, HMC, NUTS, SVI, Gibbs, fit, load
from inference.restarts import levels, of_chains, of_trials, restarts_line
from zoo import TokenLDA

KEYS = {"what", "objective", "count", "best", "median", "spread", "modes", "values"}
GENERATOR = torch.Generator().manual_seed(0)
TWO = torch.cat([torch.randn(30, generator=GENERATOR) - 2, torch.randn(30, generator=GENERATOR) + 2]).double()
#: Five groups for three components: which of them share one is another mode each.
FIVE = torch.cat([0.3 * torch.randn(15, generator=GENERATOR) + c for c in (-8.0, -4.0, 0.0, 4.0, 8.0)]).double()
CROWDED = {"x": FIVE, "num_components": 3}


def square(x):
    """The sign of mu is unknown: two modes of one height."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu**2, 1.0), obs=x)


def test_levels_by_hand():
    assert levels([1.0, 1.05, 3.0, float("-inf")], 0.1) == 2 and levels([1.0, 1.05, 3.0], 0.01) == 3
    assert levels([1.0, 1.05], [0.0, 0.1]) == 1 and levels([float("nan")], 1.0) == 0


def test_trials_that_still_rise_are_no_modes():
    """Two climbs of one hill, one behind the other, against two hills."""
    hill = -100 * np.exp(-np.arange(100) / 30)
    assert of_trials("starts", "ELBO", [hill, hill - 0.5], 100)["modes"] == 1
    assert of_trials("starts", "ELBO", [hill, hill - 50], 100)["modes"] == 2


def test_em_says_what_each_restart_alone_would():
    """Best, median and spread are those of single fits from the same starts; different ends are different modes."""
    posterior = fit(normal_mixture, CROWDED, EM(restarts=8), seed=0)
    found = posterior.diagnostics["restarts"]
    alone = [fit(normal_mixture, CROWDED, EM(restarts=1), seed=s).diagnostics for s in range(8)]
    ends = sorted(d["objective"] for d in alone)
    assert KEYS <= found.keys() and found["what"] == "restarts" and found["count"] == 8 and "restarts" not in alone[0]
    np.testing.assert_allclose(sorted(found["values"]), ends, atol=1e-3)
    assert found["best"] == posterior.diagnostics["objective"] and found["modes"] == 1 + sum(np.diff(ends) > 0.01) > 1
    assert abs(found["spread"] - (ends[-1] - ends[0])) < 1e-3 and abs(found["median"] - np.median(ends)) < 1e-3
    assert restarts_line(found) in posterior.summary().heading


@pytest.mark.parametrize("sampler", [NUTS(chains=4, warmup=150, draws=100), HMC(chains=4, warmup=150, draws=100)])
def test_chains_in_two_places_of_one_height(sampler):
    """Chains that begin on either side stay there: two places, though the log density is the same."""
    start = {"mu": torch.tensor([2.0, -2.0, 2.0, -2.0])}
    posterior = fit(square, 4 + torch.zeros(30), type(sampler)(chains=4, warmup=150, draws=100, init=start), seed=0)
    found = posterior.diagnostics["restarts"]
    assert KEYS <= found.keys() and found["modes"] == 2 and found["count"] == 4 and found["spread"] < 2
    assert "4 chains: 2 distinct places" in str(posterior.summary())


def test_labels_make_no_places(tmp_path):
    """Chains begun with the components in either order are one place after matching; the file keeps what was said."""
    order = torch.tensor([[-2.0, 2.0], [2.0, -2.0]])
    init = {"mu": order, "sigma": torch.ones(2, 2), "pi": torch.full((2, 2), 0.5)}
    posterior = fit(normal_mixture, TWO, NUTS(chains=2, warmup=200, draws=200, init=init), seed=0)
    assert posterior.diagnostics["restarts"]["modes"] == 1
    again = load(posterior.save(tmp_path / "kept"), normal_mixture)
    assert again.diagnostics["restarts"] == posterior.diagnostics["restarts"]
    raw = np.stack([np.full((50, 2), v) + np.random.default_rng(0).normal(size=(50, 2)) for v in ([-9, 9], [9, -9])])
    assert of_chains({"mu": raw}, None)["modes"] == 2


def test_svi_and_topic_models_speak_the_same():
    posterior = fit(normal_mixture, TWO, SVI(steps=300, starts=3), seed=0)
    found = posterior.diagnostics["restarts"]
    assert KEYS <= found.keys() and found["count"] == 3 and found["what"] == "starts" and found["objective"] == "ELBO"
    assert "restarts" not in fit(normal_mixture, TWO, SVI(steps=20, starts=1), seed=0).diagnostics
    story, data = TokenLDA.example()
    for method, what in ((EM(max_iter=40), "restarts"), (SVI(steps=40), "starts"), (Gibbs(2, 30, 30), "chains")):
        found = fit(story, data, method, seed=0).diagnostics["restarts"]
        assert KEYS <= found.keys() and found["what"] == what and found["spread"] >= 0 and 1 <= found["modes"]
