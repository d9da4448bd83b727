"""Variational inference against exact posteriors and evidences, and what it says when it cannot be trusted."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import betaln
from scipy.stats import multivariate_normal
from stories import beta_bernoulli, normal_mixture, ppca

from inference import SVI, DivergenceError, NoMethodError, fit
from zoo import GMM, PoissonMixture, load


def normal_normal(x):
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.5), obs=x)


def linear(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)


def coin():
    x = torch.tensor([1.0] * 7 + [0.0] * 3)
    return beta_bernoulli, x, "p", [9 / 15], [math.sqrt(9 * 6 / (225 * 16))], betaln(9, 6) - betaln(2, 3)


def normal():
    x = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    precision = 0.25 + 20 / 2.25
    cov = 2.25 * np.eye(20) + 4.0
    return (
        normal_normal, x, "mu", [float((0.25 + x.sum() / 2.25) / precision)], [precision**-0.5],
        multivariate_normal.logpdf(x.numpy(), np.ones(20), cov),
    )


def regression():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(50, 3, dtype=torch.float64, generator=g)
    X[:, 1] += X[:, 0]
    y = X @ torch.tensor([1.0, -1.0, 2.0]).double() + 0.5 * torch.randn(50, dtype=torch.float64, generator=g)
    covariance = torch.linalg.inv(X.T @ X / 0.25 + torch.eye(3))
    mean = covariance @ (X.T @ y) / 0.25
    evidence = multivariate_normal.logpdf(y.numpy(), np.zeros(50), (0.25 * torch.eye(50) + X @ X.T).numpy())
    return linear, {"X": X, "y": y}, "w", mean.tolist(), covariance.diagonal().sqrt().tolist(), evidence


@pytest.mark.parametrize("case", [coin, normal, regression])
def test_full_rank_equals_the_conjugate_posterior(case):
    """Means within 0.1 sd, sds within 15 %, ELBO never above the evidence and close below it."""
    story, data, site, means, sds, evidence = case()
    posterior = fit(story, data, SVI(guide="full_rank", draws=4000), seed=0)
    draws = posterior.draws[site].reshape(4000, -1).numpy()
    d = posterior.diagnostics
    assert posterior.converged and posterior.kind == "variational"
    assert (np.abs(draws.mean(0) - means) < 0.1 * np.array(sds)).all()
    assert (np.abs(draws.std(0) / sds - 1) < 0.15).all()
    assert d["elbo"] - 4 * d["elbo_error"] < evidence and evidence - d["elbo"] < 0.1


def test_elbo_is_below_the_evidence_at_every_stage():
    """Smoothed over windows, the ELBO of the whole run stays under the exact evidence."""
    story, data, *_, evidence = regression()
    history = np.array(fit(story, data, SVI(guide="mean_field", steps=600), seed=0).history)
    windows = history[: len(history) // 100 * 100].reshape(-1, 100)
    assert (windows.mean(1) - 4 * windows.std(1) / 10 < evidence).all()


def test_mean_field_on_a_correlated_posterior_is_not_trusted():
    """rho = 0.99: the spreads are far too small, and k-hat says so."""

    def story(x):
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.99], [0.99, 1.0]])))
        pyro.sample("x", dist.Normal(w.sum(), 100.0), obs=x)

    posterior = fit(story, torch.tensor(0.0), SVI(guide="mean_field"), seed=0)
    assert posterior.draws["w"].std(0).max() < 0.3
    assert posterior.diagnostics["khat"] > 0.7 and any("k-hat" in w for w in posterior.warnings)


def test_batches_reach_the_full_answer():
    story, data, site, means, sds, _ = normal()
    posterior = fit(story, data, SVI(batch_size=5, guide="full_rank", steps=1500, particles=4, starts=1), seed=0)
    assert abs(float(posterior.draws[site].mean()) - means[0]) < 0.3 * sds[0]


def test_the_storys_guide_finds_the_clusters():
    """Finite latents enumerated, guide learned: local posteriors are certain where clusters are apart."""
    x = load("iris").x
    posterior = fit(GMM(2, covariance="diag"), x, SVI(steps=600, starts=1), seed=0)
    assert posterior.diagnostics["guide"] == "story"
    z = posterior.local("z")
    assert z[:50].max(-1).values.min() > 0.99 and len(set(z[:50].argmax(-1).tolist())) == 1


def test_guides_with_missing_or_foreign_sites_are_refused(untouched):
    """Pyro warns and optimises a loss that is no ELBO."""

    def lacks(x, **_):
        pyro.sample("pi", dist.Dirichlet(pyro.param("a", torch.ones(2), constraint=dist.constraints.positive)))

    def foreign(x):
        pyro.sample("pi", dist.Dirichlet(pyro.param("a", torch.ones(2), constraint=dist.constraints.positive)))
        with pyro.plate("components", 2):
            pyro.sample("lam", dist.Gamma(2.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    x = load("poisson_counts").x[:20]
    with pytest.raises(ValueError, match=r"lacks.*'lam'"):
        fit(PoissonMixture(2).model, x, SVI(starts=1), guide=lacks, seed=0)
    with pytest.raises(ValueError, match="'other'"):
        fit(PoissonMixture(2).model, x, SVI(starts=1), guide=foreign, seed=0)
    with pytest.raises(NoMethodError, match="needs a guide"):
        fit(normal_mixture, x, SVI(guide="story"))


def test_a_huge_step_ends_in_an_error_with_the_last_finite_state(untouched):
    x = torch.linspace(-2, 2, 20)
    with pytest.raises(DivergenceError, match="step") as error:
        fit(normal_mixture, x, SVI(lr=1e6, starts=1), seed=0)
    assert error.value.state and all(bool(torch.isfinite(v).all()) for v in error.value.state.values())


def test_missing_cells_train_and_locals_answer():
    x = load("iris").x[::3].clone()
    x[3, 1] = math.nan
    posterior = fit(ppca, x - x.nanmean(0), SVI(steps=400, starts=1), seed=0)
    assert posterior.draws["z"].shape[1:] == (50, 2) and all(v.isfinite().all() for v in posterior.draws.values())


def test_same_seed_same_bits():
    story, data, site, *_ = normal()
    options = SVI(steps=200, starts=2)
    a, b, c = (fit(story, data, options, seed=s).draws[site] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_parameters_of_the_model_are_points():
    """`pyro.param` is maximised, the latent beside it keeps its spread."""

    def story(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, scale), obs=x)

    x = 3 * torch.randn(200, dtype=torch.float64)
    posterior = fit(story, x, SVI(), seed=0)
    assert posterior.draws["scale"].std() < 1e-12 and abs(float(posterior.draws["scale"][0]) / float(x.std()) - 1) < 0.05
    assert abs(float(posterior.draws["mu"].std()) / (float(x.std()) / math.sqrt(200)) - 1) < 0.15


@pytest.mark.parametrize(
    ("options", "word"),
    [({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"lr": math.nan}, "lr"), ({"batch_size": 0}, "batch_size"),
     ({"guide": "best"}, "'mean_field'"), ({"draws": 0}, "draws"), ({"particles": 0}, "particles")],
)
def test_options_are_checked(options, word):
    with pytest.raises(ValueError, match=word):
        SVI(**options)


def test_batch_larger_than_the_data_is_all_rows_with_a_warning():
    story, data, *_ = normal()
    posterior = fit(story, data, SVI(steps=100, starts=1, batch_size=10**6), seed=0)
    assert any("exceeds the 20 rows" in w for w in posterior.warnings)
