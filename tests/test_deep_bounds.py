"""Bounds of deep stories against exact numbers: a linear VAE is PPCA; which remedies keep codes from collapsing."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from inference import SVI, fit
from inference.score import active_units, kl_per_unit
from zoo import VAE, LinearVAE
from zoo import load as data_set


def standardised(name):
    x = data_set(name).x
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0)


def ppca_maximum(x, K):
    """Largest log-likelihood of probabilistic PCA, summed over rows (Tipping & Bishop 1999, equations 7 and 8)."""
    N, D = x.shape
    values = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    noise = values[K:].mean()
    return float(-N / 2 * (D * math.log(2 * math.pi) + values[:K].log().sum() + (D - K) * noise.log() + D))


@pytest.fixture(autouse=True)
def own_world():
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def linear_fit():
    x = standardised("wine")
    return fit(LinearVAE(13, 2).double(), x[:150], SVI(steps=1500, starts=1, lr=0.08), seed=0)


def marginal(story, x):
    """Exact log p(x_n) of a linear VAE: a normal with covariance W W^T + sigma^2 I."""
    with torch.no_grad():
        W, mu, sigma = story.decoder.map.weight, story.decoder.map.bias, story.decoder.log_sigma.exp()
        return torch.distributions.MultivariateNormal(
            mu, W @ W.T + sigma**2 * torch.eye(len(mu), dtype=W.dtype)
        ).log_prob(x)


@pytest.mark.parametrize(("name", "K"), [("wine", 2), ("iris", 1), ("wine", 5)])
def test_a_linear_vae_reaches_ppcas_maximum_from_below(name, K):
    """An ELBO above the evidence, or a bound that stays loose: within 0.01 nat a dimension and row."""
    x = standardised(name)
    p = fit(LinearVAE(x.shape[1], K).double(), x, SVI(steps=2000, starts=1, lr=0.08, particles=4), seed=0)
    best = ppca_maximum(x, K)
    assert best - 0.01 * x.numel() < p.diagnostics["elbo"] < best + 3 * p.diagnostics["elbo_error"]
    exact = float(marginal(p.problem.story, x).sum())
    assert best - 0.01 * x.numel() < exact < best + 1e-6 * abs(best)


def test_bounds_of_a_linear_vae_bracket_its_exact_density(linear_fit):
    """ELBO <= IWAE <= log p(x) row by row but for noise, for rows that were not fitted; importance sampling equals it."""
    new = standardised("wine")[150:]
    exact = marginal(linear_fit.problem.story, new)
    ladder = linear_fit.ladder(new, draws=2000, k=20)
    assert (ladder.elbo <= exact + 0.02).all() and ladder.elbo.mean() <= ladder.iwae.mean() <= exact.mean() + 1e-3
    assert ((ladder.evidence - exact).abs() < 5 * ladder.error + 1e-6).all()
    torch.testing.assert_close(linear_fit.log_prob(new), exact, rtol=0, atol=0.01)


def test_a_loose_guide_has_room_for_the_ladder():
    """IWAE that is the ELBO, or importance sampling above the exact density: with an encoder that was hardly trained."""
    x = standardised("wine")
    p = fit(LinearVAE(13, 2).double(), x, SVI(steps=10, starts=1, lr=0.04), seed=0)
    exact = marginal(p.problem.story, x)
    ladder = p.ladder(x, draws=4000, k=50)
    gaps = [float((exact - part).mean()) for part in (ladder.elbo, ladder.iwae, ladder.evidence)]
    assert gaps[0] > 10 * gaps[1] > 0 and abs(gaps[2]) < 0.2 * gaps[1]


class Painter(VAE):
    """A strong decoder: pixel by pixel, it sees the ones before as well as the code."""

    def __init__(self, **settings):
        super().__init__(64, 6, hidden=(64, 64, 64), activation="tanh", **settings)
        past = nn.Linear(64, 64)
        nn.init.zeros_(past.weight)
        self.decoder = nn.ModuleDict({"codes": self.decoder, "past": past})

    def model(self, x):
        pyro.module("decoder", self.decoder)
        past = self.decoder["past"]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.origin, 1.0).to_event(1))
            logits = self.decoder["codes"](z) + linear(x, past.weight.tril(-1), past.bias)
            return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def divergence(story, **options):
    """KL(q(z | x) || p(z)) a row after training on digits, and the units that are active."""
    x = data_set("binary_digits").x
    options = {
        "steps": 800,
        "batch_size": 200,
        "starts": 1,
        "lr": 0.01,
        "particles": 1,
        "schedule": "constant",
        **options,
    }
    p = fit(story, x, SVI(**options), seed=0)
    with torch.no_grad():
        loc, scale = p.problem.story.encode(x.float())
    return float(kl_per_unit(loc, scale).sum()), int(active_units(loc).sum())


@pytest.mark.slow
def test_remedies_keep_codes_alive_where_the_plain_guide_collapses():
    """A remedy that does nothing: under a strong decoder the plain VAE's codes say nothing, with any remedy they do."""
    plain, none = divergence(Painter())
    assert plain < 0.05 and none == 0
    for remedy in (
        divergence(Painter(skip=True)),
        divergence(Painter(), free_bits=0.2),
        divergence(Painter(), beta=(0.0, 1.0, 500)),
    ):
        assert remedy[0] > 1.0 and remedy[1] > 0
    scale = 0.9
    least = 6 * 0.5 * (scale**2 - 1 - math.log(scale**2))
    assert divergence(Painter(guide_scale=scale))[0] > least > 0.06
