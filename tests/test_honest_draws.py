"""Draws are what they claim to be: the exact posterior's mean and spread, chains that move, components with one number."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import EM, HMC, NUTS, SVI, Exact, fit

X = torch.randn(12, generator=torch.Generator().manual_seed(1)).double() + 1
MEAN, SD = float(X.sum()) / (12 + 1 / 4), (12 + 1 / 4) ** -0.5
METHODS = {
    "nuts": NUTS(chains=4, warmup=200, draws=500, backend="graph"),
    "hmc": HMC(chains=8, warmup=200, draws=250, backend="graph"),
    "svi": SVI(steps=1000, starts=1, draws=2000),
    "exact": Exact(draws=2000),
}


def location(x):
    """Normal numbers around an unknown mean."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize("method", METHODS)
def test_mean_and_spread_are_those_of_algebra(method):
    """Prior draws for the posterior, a spread that is 20 % too small: five standard errors of a thousand draws."""
    draws = fit(location, X, METHODS[method], seed=0).draws["loc"]
    assert abs(float(draws.mean()) - MEAN) < 5 * SD / math.sqrt(800)
    assert abs(float(draws.std()) / SD - 1) < 5 / math.sqrt(2 * 800)


@pytest.mark.parametrize("method", ["nuts", "hmc"])
def test_every_chain_moves_and_they_agree(method):
    """A chain that stands still, hidden among others."""
    posterior = fit(location, X, METHODS[method], seed=0)
    chains = posterior.draws["loc"].reshape(posterior.chains, -1)
    assert posterior.diagnostics["rhat"] < 1.02 and not any("R-hat" in w for w in posterior.warnings)
    assert all(len(np.unique(c)) > 0.5 * len(c) for c in chains.numpy())
    assert float((chains.std(1) / SD).min()) > 0.6


def test_components_keep_one_number_in_every_site():
    """Weights, means and probabilities of rows belong together: 10 rows at -5, 30 at 5."""

    def story(x):
        pi = pyro.sample("pi", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    noise = torch.randn(40, generator=torch.Generator().manual_seed(2)).double()
    x = noise + torch.tensor([-5.0] * 10 + [5.0] * 30)
    for seed in range(4):
        posterior = fit(story, x, EM(restarts=2), seed=seed)
        pi, mu, z = posterior.draws["pi"][0], posterior.draws["mu"][0], posterior.local("z")
        assert torch.allclose(mu, torch.tensor([-5.0, 5.0]).double(), atol=1.0)
        assert torch.allclose(pi, torch.tensor([11 / 42, 31 / 42]).double(), atol=0.03)
        assert float(z[:10, 0].min()) > 0.99 and float(z[10:, 1].min()) > 0.99
