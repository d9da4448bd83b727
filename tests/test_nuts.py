"""NUTS against exact moments and Stan's reference posteriors; convergence is judged before accuracy."""

import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import references
import torch
from stories import SCHOOLS, beta_bernoulli, box, normal_mixture, poisson_latent

from inference import EM, NUTS, SVI, NoMethodError, fit
from inference.diagnostics import pareto_khat, rhat_ess, rhat_warnings
from zoo import GMM, load

SHORT = NUTS(chains=2, warmup=200, draws=300)


def correlated(x):
    """Posterior of w is its prior, up to nothing: a correlated normal in two dimensions."""
    w = pyro.sample("w", dist.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.9], [0.9, 2.0]])))
    pyro.sample("x", dist.Normal(0 * w.sum(), 1.0), obs=x)


def test_moments_of_a_correlated_normal():
    """Means, variances and covariance within Monte Carlo error; catches a wrong trajectory or metric."""
    posterior = fit(correlated, torch.tensor(0.0), NUTS(chains=4, warmup=400, draws=1000), seed=1)
    w = posterior.draws["w"].numpy()
    assert posterior.diagnostics["rhat"] < 1.01 and posterior.diagnostics["ess_bulk"] > 800
    np.testing.assert_allclose(w.mean(0), [1.0, -2.0], atol=0.12)
    np.testing.assert_allclose(np.cov(w.T), [[1.0, 0.9], [0.9, 2.0]], atol=0.25)


def test_a_coin_equals_its_beta_posterior():
    """The Jacobian of the unit interval is in the density: without it the mean is off by more than the tolerance."""
    x = torch.tensor([1.0] * 3 + [0.0])
    p = fit(beta_bernoulli, x, NUTS(chains=4, warmup=300, draws=1000), seed=0).draws["p"].numpy()
    a, b = 2 + 3, 3 + 1
    assert abs(p.mean() - a / (a + b)) < 0.015
    assert abs(p.std() - math.sqrt(a * b / (a + b) ** 2 / (a + b + 1))) < 0.012


REFERENCES = {
    "eight schools": references.schools,
    "arK": references.autoregression,
    "mixture": references.mixture,
    "kidiq": references.kidiq,
}
SLOW = ("mixture", "kidiq")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in REFERENCES])
def test_reference_posteriors(name):
    """First R-hat and ESS, then means within 0.1 sd + 4 MCSE and sds within 15 % + 4 MCSE."""
    story, data, named, params = REFERENCES[name]()
    posterior = fit(story, data, NUTS(chains=4, warmup=700, draws=1000), seed=0)
    found = {n: v.numpy() for n, v in named(posterior.draws).items()}
    for parameter, draws in found.items():
        judged = rhat_ess({parameter: draws.reshape(4, -1)})
        assert judged["rhat"] <= 1.01 and judged["ess_bulk"] >= 400, parameter
        mean, sd = params[parameter]["mean"], params[parameter]["sd"]
        error = draws.std() / math.sqrt(judged["ess_bulk"])
        assert abs(draws.mean() - mean) <= 0.1 * sd + 4 * error, parameter
        assert abs(draws.std() / sd - 1) <= 0.15 + 4 / math.sqrt(2 * judged["ess_bulk"]), parameter


def test_the_centred_funnel_warns():
    posterior = fit(references.eight_schools_centred, SCHOOLS, NUTS(chains=4, warmup=300, draws=300), seed=0)
    assert posterior.diagnostics["divergences"] > 0
    assert any("diverg" in w for w in posterior.warnings) and str(posterior.summary()).startswith("warning")


@pytest.mark.parametrize("covariance", ["diag", pytest.param("full", marks=pytest.mark.slow)])
def test_three_methods_agree_on_the_irises(covariance):
    """Matched component means within 2 posterior sd of NUTS, and z certain for setosa under every method."""
    from inference.agreement import agree

    x, story = load("iris").x, GMM(3, covariance=covariance, concentration=10.0)
    draws = NUTS(warmup=400, draws=400) if covariance == "diag" else NUTS(warmup=700, draws=700)
    nuts, svi, em = (fit(story, x, m, seed=0) for m in (draws, SVI(), EM()))
    assert nuts.diagnostics["rhat"] < 1.05
    for other in (svi, em):
        gaps = agree(other, nuts).gaps
        assert max(g for n, g in gaps.items() if n.startswith("mu")) < 2
    for posterior in (nuts, svi, em):
        for rows in (None, x[:50] + 0.01):
            assert posterior.local("z", rows)[:50].max(-1).values.min() > 0.99


def test_same_seed_same_bits_other_seeds_differ(tmp_path, monkeypatch):
    """Also where somebody has built machine code for the story in the meantime, which moves other chains."""
    monkeypatch.setenv("PYRO_MODEL_ZOO_CACHE", str(tmp_path))
    x = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few = NUTS(chains=2, warmup=50, draws=20)
    a = fit(normal_mixture, x, few, seed=1)
    with suppress(ValueError):  # where there is no C compiler nobody can have built any
        fit(normal_mixture, x, replace(few, backend="compiled"), seed=1)
    b, c = (fit(normal_mixture, x, few, seed=s) for s in (1, 2))
    assert all(torch.equal(a.draws[n], b.draws[n]) for n in a.draws) and not torch.equal(a.draws["mu"], c.draws["mu"])
    assert a.sample_stats["energy"].shape == (2, 20)


def test_two_modes_are_reported_not_pooled():
    """Chains that sit in different modes: R-hat is in the warnings, with the mean of every chain."""

    def story(x):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(a.abs(), 0.1), obs=x)

    posterior = fit(story, torch.tensor(8.0), NUTS(chains=4, warmup=200, draws=100, tries=1), seed=3)
    means = posterior.draws["a"].reshape(4, -1).mean(1)
    assert (means > 0).any() and (means < 0).any()
    assert posterior.diagnostics["rhat"] > 1.01 and any("by chain" in w for w in posterior.warnings)


def test_budget_ends_the_run_with_what_there_is():
    posterior = fit(GMM(3), load("iris").x, NUTS(warmup=50_000, draws=50_000), seed=0, budget=3.0)
    assert not posterior.converged and any("budget" in w for w in posterior.warnings)
    assert posterior.timings["total"] < 30


def test_impossible_observations_and_invalid_stories_are_named(untouched):
    def impossible(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(0 * rate), obs=x)

    with pytest.raises(ValueError, match="'x'"):
        fit(impossible, torch.tensor([3.0, 0.0]), SHORT, seed=0)
    with pytest.raises(NoMethodError, match="support"):
        fit(box, torch.linspace(0, 1, 5), "nuts")
    with pytest.raises(NoMethodError, match="infinitely many"):
        fit(poisson_latent, torch.linspace(0, 1, 5), "nuts")

    def learned(x):
        w = pyro.param("w", torch.tensor(0.0))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + w, 1.0), obs=x)

    with pytest.raises(NoMethodError, match="learns w as a point"):
        fit(learned, torch.tensor(0.0), "nuts")


def location_scale(x):
    """Flat priors on a location and a scale."""
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, sigma), obs=x)


@pytest.mark.parametrize("dense_mass", [False, True])
def test_flat_priors_give_students_t(dense_mass):
    """Location and scale under flat priors: mu | x is Student's t with n - 2 degrees of freedom, in closed form."""
    from scipy import stats

    x = torch.tensor([1.2, 0.3, 2.2, -0.5, 1.9, 0.8, 1.1, 0.1, 2.5, 1.4, 0.6, -0.2], dtype=torch.float64)
    posterior = fit(location_scale, x, NUTS(warmup=400, draws=1500, dense_mass=dense_mass), seed=2)
    mu, n = posterior.draws["mu"].numpy(), len(x)
    scale = math.sqrt(((x - x.mean()) ** 2).sum().item() / (n * (n - 2)))
    exact = stats.t(n - 2, x.mean().item(), scale)
    assert posterior.diagnostics["rhat"] < 1.01
    error = 4 * exact.std() / math.sqrt(posterior.diagnostics["ess_bulk"])
    assert abs(mu.mean() - exact.mean()) < error
    for q in (0.05, 0.25, 0.75, 0.95):
        assert (
            abs((mu <= exact.ppf(q)).mean() - q)
            < 4 * math.sqrt(q * (1 - q) / posterior.diagnostics["ess_tail"]) + 0.005
        )


@pytest.mark.parametrize(("calls", "draws"), [(20, 1), (200, 1), (1500, None)])
def test_ctrl_c_returns_what_there_is(monkeypatch, untouched, calls, draws):
    """Interrupted at the start, in the warm-up or in the draws: what there is comes back, flagged."""
    from inference.capture import ValueAndGrad

    left, evaluate = [calls], ValueAndGrad.numpy

    def interrupted(self, flat):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return evaluate(self, flat)

    monkeypatch.setattr(ValueAndGrad, "numpy", interrupted)
    posterior = fit(
        location_scale, torch.linspace(-1, 1, 20), NUTS(chains=2, warmup=200, draws=400, backend="graph"), seed=0
    )
    assert not posterior.converged and any("interrupted" in w for w in posterior.warnings)
    kept = len(posterior.draws["mu"]) // 2
    assert kept == draws if draws else 1 < kept < 400
    assert posterior.sample_stats["lp"].shape == (2, kept)


def test_a_gradient_that_is_no_number_names_its_latent(untouched):
    def story(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(b + (0 * a).sqrt(), 1.0), obs=x)

    with pytest.raises(ValueError, match="with respect to 'a' is not a number"):
        fit(story, torch.tensor(1.0), SHORT, seed=0)


def test_a_density_that_is_random_is_refused(untouched):
    def story(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m + torch.randn(()), 1.0), obs=x)

    with pytest.raises(ValueError, match="differs from call to call"):
        fit(story, torch.tensor(1.0), SHORT, seed=0)


def test_one_chain_is_judged_by_its_halves():
    drift = np.linspace(0.0, 3.0, 200)[None] + np.random.default_rng(0).normal(size=(1, 200))
    still = np.random.default_rng(0).normal(size=(1, 200))
    assert rhat_ess({"a": drift})["rhat"] > 1.2 > 1.05 > rhat_ess({"a": still})["rhat"]
    assert "one chain" in rhat_warnings({"a": still}, rhat_ess({"a": still}))[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"chains": 0}, "chains"),
        ({"draws": 0}, "draws"),
        ({"warmup": -1}, "warmup"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"target_accept": math.nan}, "target_accept"),
        ({"max_depth": 0}, "max_depth"),
    ],
)
def test_options_are_checked(options, word):
    with pytest.raises(ValueError, match=word):
        NUTS(**options)


def test_khat_of_equal_and_of_heavy_weights():
    """Equal weights are a perfect guide, not infinity; a Pareto tail of shape 1 reads about 1."""
    assert pareto_khat(np.zeros(1000)) <= 0
    u = np.random.default_rng(0).uniform(size=20_000)
    assert abs(pareto_khat(-np.log(u)) - 1.0) < 0.2


@pytest.mark.parametrize("backend", ["graph", "auto"])
@pytest.mark.parametrize("calls", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bits(monkeypatch, tmp_path, backend, calls):
    """Stopped in the warm-up or later, then asked for again: the draws of a run that nobody stopped; the file is gone."""
    from inference.methods.nuts import Watch

    monkeypatch.setattr("inference.methods.nuts.EVERY", 0.002)
    x, path = torch.linspace(-1, 1, 20), tmp_path / "chains.state"
    options = {"chains": 2, "warmup": 150, "draws": 300_000 if backend == "auto" else 150, "backend": backend}
    if backend == "auto":
        monkeypatch.setattr("inference.methods.backends.work", lambda *_: (1.0, 0.0))
    whole = fit(location_scale, x, NUTS(**options), seed=3)
    left, look = [calls * (40 if backend == "graph" else 1)], Watch.__call__

    def interrupted(self):
        left[0] -= path.exists()
        if left[0] == 0:
            raise KeyboardInterrupt
        return look(self)

    monkeypatch.setattr(Watch, "__call__", interrupted)
    first = fit(location_scale, x, NUTS(**options, checkpoint=path), seed=3)
    monkeypatch.setattr(Watch, "__call__", look)
    assert not first.converged and path.exists()
    with pytest.raises(ValueError, match="belongs to another fit"):
        fit(location_scale, x, NUTS(**options, checkpoint=path), seed=4)
    again = fit(location_scale, x, NUTS(**options, checkpoint=path), seed=3)
    assert again.converged and not path.exists()
    for name in whole.draws:
        assert torch.equal(whole.draws[name], again.draws[name])
    np.testing.assert_array_equal(whole.sample_stats["energy"], again.sample_stats["energy"])


def test_checkpoints_are_checked(tmp_path):
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no checkpoint of NUTS"):
        fit(location_scale, torch.randn(5), NUTS(checkpoint=tmp_path / "x"), seed=0)
    with pytest.raises(ValueError, match="does not exist"):
        fit(location_scale, torch.randn(5), NUTS(checkpoint=tmp_path / "no" / "x"), seed=0)
