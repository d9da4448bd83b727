"""Many chains that move together: exact posteriors, machine code against tensors, modes that must stay visible."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import SCHOOLS, beta_bernoulli, eight_schools, normal_mixture
from test_capture import joint_of

from inference import HMC, NUTS, SVI, fit
from inference.capture import value_and_grad
from inference.compiled import NotCompiled, build
from inference.diagnostics import rhat_ess
from inference.methods.hmc import Climb, Scale, Within, van_der_corput
from inference.methods.movers import BatchMover, MachineMover
from inference.session import isolated
from zoo import FactorAnalysis, load


def correlated(x):
    """A posterior with correlation 0.95 and scales 1 and 100."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(95.0 * a, 100.0 * math.sqrt(1 - 0.95**2)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
    return b


def sd_error(posterior, name):
    """Relative Monte Carlo error of a standard deviation: squares mix more slowly than chains that swing."""
    draws = posterior.draws[name].reshape(posterior.chains, -1).numpy()
    return 1 / math.sqrt(2 * rhat_ess({"square": (draws - draws.mean()) ** 2})["ess_bulk"])


def location(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 2.0), obs=x)


@pytest.mark.parametrize("backend", ["auto", "graph"])
def test_correlated_normals(backend):
    """Means, standard deviations and the correlation within 4 Monte Carlo errors: catches a wrong mass or acceptance."""
    posterior = fit(correlated, torch.zeros(3), HMC(backend=backend, draws=400), seed=0)
    ess = posterior.diagnostics["ess_bulk"]
    assert posterior.diagnostics["rhat"] < 1.01 and ess > 1000 and posterior.diagnostics["dense_mass"]
    for name, sd in (("a", 1.0), ("b", 100.0)):
        draws = posterior.draws[name]
        assert abs(draws.mean()) < 4 * sd / math.sqrt(ess)
        assert abs(draws.std() / sd - 1) < 4 * sd_error(posterior, name)
    found = torch.corrcoef(torch.stack([posterior.draws["a"], posterior.draws["b"]]))[0, 1]
    assert abs(found - 0.95) < 4 * (1 - 0.95**2) / math.sqrt(ess)


def test_the_conjugate_posterior():
    x = torch.tensor([1.0, 2.5, 0.3, 4.0, 1.7])
    posterior = fit(location, x, HMC(), seed=0)
    precision = 1 / 9 + 5 / 4
    mean, sd = float(x.sum()) / 4 / precision, precision**-0.5
    ess = posterior.diagnostics["ess_bulk"]
    assert abs(posterior.draws["mu"].mean() - mean) < 4 * sd / math.sqrt(ess)
    assert abs(posterior.draws["mu"].std() / sd - 1) < 4 * sd_error(posterior, "mu")
    assert posterior.sample_stats["acceptance_rate"].shape == (16, 1000)


def test_enumerated_mixture_against_nuts():
    torch.manual_seed(1)
    x = torch.cat([torch.randn(40) - 2, 0.7 * torch.randn(60) + 2]).double()
    hmc, nuts = fit(normal_mixture, x, HMC(), seed=0), fit(normal_mixture, x, NUTS(), seed=0)
    assert hmc.diagnostics["rhat"] < 1.01
    for name in ("pi", "mu", "sigma"):
        a, b = hmc.draws[name].sort(-1).values, nuts.draws[name].sort(-1).values
        error = 4 * b.std(0) * math.sqrt(1 / hmc.diagnostics["ess_bulk"] + 1 / nuts.diagnostics["ess_bulk"])
        assert ((a.mean(0) - b.mean(0)).abs() < error).all()


def test_two_modes_are_reported_not_pooled():
    """Chains that end in different modes stay there, and the answer says so."""

    def two(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu.abs(), 0.1), obs=x)

    posterior = fit(two, torch.full((20,), 5.0), HMC(chains=8, warmup=200, draws=100), seed=0)
    assert posterior.diagnostics["rhat"] > 1.1 and any("do not agree" in w for w in posterior.warnings)
    assert {bool(m > 0) for m in posterior.draws["mu"].reshape(8, -1).mean(1)} == {True, False}


@pytest.mark.parametrize("dense", [False, True])
def test_machine_code_moves_like_tensors(dense):
    """The same steps from the same place, and back again with the momentum turned round."""
    joint = joint_of(eight_schools, SCHOOLS)
    with isolated(0, torch.float64):
        potential = value_and_grad(joint)
        try:
            code = build(potential)
        except NotCompiled:
            pytest.skip("no C compiler here")
        rng = np.random.default_rng(0)
        root = np.eye(joint.dim) + 0.1 * rng.standard_normal((joint.dim, joint.dim))
        scale = Scale(root @ root.T if dense else rng.random(joint.dim) + 0.5)
        start = MachineMover(code).at(rng.standard_normal((5, joint.dim)))
        momentum = scale.momentum(rng.standard_normal((5, joint.dim)))
        (a, p), (b, r) = (
            m.move(start, momentum, 7, 0.05, scale.inverse) for m in (MachineMover(code), BatchMover(potential))
        )
        for one, other in ((a.position, b.position), (a.value, b.value), (a.gradient, b.gradient), (p, r)):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)
        back, _ = MachineMover(code).move(a, -p, 7, 0.05, scale.inverse)
        np.testing.assert_allclose(back.position, start.position, rtol=1e-9, atol=1e-10)
        assert not np.allclose(a.position, start.position)


@pytest.mark.parametrize("dense", [False, True])
def test_scales(dense):
    """Momenta have the inverse of the inverse mass as covariance; in their units velocities have variance 1."""
    rng = np.random.default_rng(0)
    inverse = np.array([[4.0, 1.0], [1.0, 0.5]]) if dense else np.array([4.0, 0.5])
    scale = Scale(inverse)
    p = scale.momentum(rng.standard_normal((200_000, 2)))
    np.testing.assert_allclose(np.cov(p.T), np.linalg.inv(inverse if dense else np.diag(inverse)), atol=0.05)
    np.testing.assert_allclose(np.cov(scale.velocity(p).T), np.eye(2), atol=0.02)
    q = rng.standard_normal((200_000, 2)) @ np.linalg.cholesky(inverse if dense else np.diag(inverse)).T
    np.testing.assert_allclose(np.cov(scale.unit(q).T), np.eye(2), atol=0.02)


def test_variances_are_those_within_chains():
    """Two chains in modes a hundred apart have the spread of one."""
    within, rng = Within(2, 1), np.random.default_rng(0)
    for _ in range(4000):
        within.see(np.array([[-50.0], [50.0]]) + 2.0 * rng.standard_normal((2, 1)))
    assert abs(float(within.inverse().ravel()[0]) / 4.0 - 1) < 0.1


def test_lengths_climb_to_the_best_of_a_normal():
    """For independent normals sin^2 t per gradient is largest near t = 1.2 for steps of 0.4: found from either side."""
    for first in (0.1, 1.9):
        climb, rng = Climb(first), np.random.default_rng(0)
        for i in range(3000):
            t = 2 * van_der_corput(i + 1) * climb.length
            x, v = rng.standard_normal((2, 64, 10))
            after, speed = x * np.cos(t) + v * np.sin(t), v * np.cos(t) - x * np.sin(t)
            change = (after**2).sum(1) - (x**2).sum(1)
            climb.learn(float((change**2).mean()), float((change * (after * speed).sum(1)).mean()), t, 0.4, 2.0)
        grid = np.linspace(0.3, 2.0, 400)
        h = (np.arange(400) + 0.5) / 200
        value = [(np.sin(h * T) ** 2).mean() / (h * T + 0.4).mean() for T in grid]
        assert abs(climb.mean - grid[int(np.argmax(value))]) < 0.2


def test_mirrored_digits():
    assert [van_der_corput(n) for n in range(1, 6)] == [0.5, 0.25, 0.75, 0.125, 0.625]


def test_same_seed_same_bits_other_seeds_differ():
    x = torch.randn(10, dtype=torch.float64)
    a, b, c = (fit(location, x, HMC(chains=4, warmup=80, draws=40), seed=s) for s in (1, 1, 2))
    assert torch.equal(a.draws["mu"], b.draws["mu"]) and not torch.equal(a.draws["mu"], c.draws["mu"])


def test_stopped_runs_return_what_there_is(monkeypatch):
    from inference.methods.hmc import Watch

    look, left = Watch.__call__, [120]

    def interrupted(self):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return look(self)

    monkeypatch.setattr(Watch, "__call__", interrupted)
    posterior = fit(location, torch.randn(10), HMC(chains=4, warmup=100, draws=1000), seed=0)
    assert not posterior.converged and any("interrupted after" in w for w in posterior.warnings)
    assert 0 < len(posterior.draws["mu"]) // 4 < 1000
    left[0] = 10
    early = fit(location, torch.randn(10), HMC(chains=4, warmup=100, draws=1000), seed=0)
    assert any("of the warm-up" in w for w in early.warnings) and len(early.draws["mu"]) == 4
    monkeypatch.setattr(Watch, "__call__", look)
    short = fit(location, torch.randn(10), HMC(warmup=50_000, draws=50_000), seed=0, budget=1.0)
    assert not short.converged and any("budget" in w for w in short.warnings)


def test_starts_from_another_answer_and_discrete_stories():
    x = torch.randn(10)
    svi = fit(location, x, SVI(steps=200), seed=0)
    assert fit(location, x, HMC(chains=4, init=svi), seed=0).diagnostics["rhat"] < 1.02
    data = torch.tensor([1.0, 0, 1, 1, 0, 1])
    assert abs(fit(beta_bernoulli, data, HMC(), seed=0).draws["p"].mean() - 6 / 11) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("chains", [16, 64])
def test_factor_models_from_independent_starts(chains):
    """Every chain finds the bulk by itself, near-singular corners included; none is moved to another's place."""
    posterior = fit(FactorAnalysis(2), load("two_factors").x, HMC(chains=chains), seed=0)
    assert posterior.diagnostics["rhat"] < 1.01 and posterior.diagnostics["divergences"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chains": 1}, "at least 2"),
        ({"chains": 0}, "chains"),
        ({"target_accept": 1.0}, "between 0 and 1"),
        ({"draws": 0}, "draws"),
        ({"max_steps": 0}, "max_steps"),
        ({"backend": "jax"}, "backend"),
        ({"init": "best"}, "init"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        HMC(**options)
