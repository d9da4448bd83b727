"""SVI against posteriors and evidences in closed form, batches against the whole, and what happens when it goes wrong."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import betaln
from stories import beta_bernoulli, normal_mixture, ppca, recorded_mode
from torch.distributions import constraints

from inference import SVI, DivergenceError, fit, inspect
from inference.methods.derived import DerivedTarget
from inference.methods.gaussian import FAMILIES
from inference.problem import prepare
from inference.session import isolated

# torch's own Generator: data do not depend on the order of the tests
SEEDED = torch.Generator().manual_seed(5)
X = torch.randn(50, 3, generator=SEEDED, dtype=torch.float64)
X[:, 1] += X[:, 0]
Y = X @ torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64) + 0.5 * torch.randn(
    50, generator=SEEDED, dtype=torch.float64
)
CLUSTERS = torch.cat([torch.randn(40, generator=SEEDED) - 4, torch.randn(40, generator=SEEDED) + 4]).double()


def line(X, y):
    """Linear regression with known noise: the posterior is Gaussian."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)


def exact_line():
    precision = X.mT @ X / 0.25 + torch.eye(3)
    covariance = torch.linalg.inv(precision)
    evidence = dist.MultivariateNormal(torch.zeros(50).double(), 0.25 * torch.eye(50) + X @ X.mT).log_prob(Y)
    return covariance @ (X.mT @ Y) / 0.25, covariance, float(evidence)


def two_clusters(x):
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


class Clusters:
    """The same story with a guide for the globals; z is summed out."""

    def model(self, x):
        two_clusters(x)

    def guide(self, x):
        a = pyro.param("pi.concentration", torch.full((2,), 5.0), constraint=constraints.positive)
        loc = pyro.param("mu.loc", lambda: torch.randn(2))
        scale = pyro.param("mu.scale", torch.full((2,), 0.3), constraint=constraints.positive)
        pyro.sample("pi", dist.Dirichlet(a))
        with pyro.plate("components", 2):
            pyro.sample("mu", dist.Normal(loc, scale))


def local_story(x):
    """A latent a row: z_n | x_n ~ Normal(x_n / 2, 1/2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["full_rank", "low_rank"])
def test_gaussian_posterior_and_evidence_are_met(guide):
    """A Gaussian guide of a Gaussian posterior has its moments, and its ELBO is the evidence; catches a wrong entropy."""
    mean, covariance, evidence = exact_line()
    p = fit(line, {"X": X, "y": Y}, SVI(guide=guide), seed=0)
    d = p.diagnostics
    sd = covariance.diagonal().sqrt()
    assert ((p.draws["w"].mean(0) - mean) / sd).abs().max() < 0.1
    assert (p.draws["w"].std(0) / sd - 1).abs().max() < 0.1
    assert evidence - 0.05 < d["elbo"] <= evidence + 4 * d["elbo_error"] + 1e-9
    assert p.converged and p.kind == "variational" and not p.warnings


def test_mean_field_has_the_spread_that_theory_predicts():
    """The best independent Gaussian has variances 1 / diag(precision) (Bishop 2006, equation 10.15)."""
    _, covariance, evidence = exact_line()
    p = fit(line, {"X": X, "y": Y}, SVI(guide="mean_field", draws=4000), seed=0)
    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert (p.draws["w"].std(0) / expected - 1).abs().max() < 0.1
    assert p.diagnostics["elbo"] < evidence - 0.1


def test_coin_with_a_conjugate_prior():
    """Beta posterior through the logit: moments, and a bound that stays below the evidence."""
    x = torch.tensor([1.0] * 7 + [0.0] * 3)
    p = fit(beta_bernoulli, x, SVI(draws=4000), seed=0)
    exact = torch.distributions.Beta(torch.tensor(9.0), torch.tensor(6.0))
    assert abs(p.draws["p"].mean() - exact.mean) < 0.1 * exact.stddev
    assert abs(p.draws["p"].std() / exact.stddev - 1) < 0.15
    evidence = betaln(9, 6) - betaln(2, 3)
    assert evidence - 0.1 < p.diagnostics["elbo"] <= evidence + 4 * p.diagnostics["elbo_error"]


def test_mean_field_on_a_ridge_is_distrusted():
    """Correlation 0.99: independent entries are far too narrow, and k-hat says so."""

    def ridge(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    x = torch.randn(100, generator=torch.Generator().manual_seed(2))
    p = fit(ridge, x, SVI(guide="mean_field"), seed=0)
    assert p.diagnostics["khat"] > 0.7 and any("k-hat" in w for w in p.warnings)
    assert not any("k-hat" in w for w in fit(ridge, x, SVI(guide="full_rank"), seed=0).warnings)


def test_parameters_are_learned_as_points():
    """No latent at all: maximum likelihood, whose answer is the sample mean."""

    def story(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.randn(30, generator=torch.Generator().manual_seed(1)).double() + 3
    p = fit(story, x, SVI(), seed=0)
    assert p.kind == "point" and abs(p.draws["loc"].item() - x.mean()) < 1e-3


# -- gradients and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_by_hand_are_autograds(family):
    """d/dq of f(z(q)) - log q(z) along the path; catches a wrong pull or a wrong Woodbury identity."""
    family = FAMILIES[family]
    leaves = {n: 0.3 * torch.randn_like(v) for n, v in family.start(torch.zeros(4), torch.ones(4), None).items()}
    leaves = {n: v.double().requires_grad_() for n, v in leaves.items()}
    noise = torch.randn(5, family.width(4), dtype=torch.float64)
    draws = family.place(leaves, noise)
    z = draws.z.detach().requires_grad_()

    def log_q(z):
        """From the covariance of the draws, which are linear in the noise."""
        fixed = {n: v.detach() for n, v in leaves.items()}
        linear = family.place(fixed, torch.eye(family.width(4), dtype=torch.float64)).z - fixed["loc"]
        return dist.MultivariateNormal(fixed["loc"], linear.mT @ linear).log_prob(z)

    total = draws.log_q.sum(-1) if draws.log_q.ndim == 2 else draws.log_q
    torch.testing.assert_close(total, log_q(z))
    slope = torch.autograd.grad(z.sin().sum() - log_q(z).sum(), z)[0]
    torch.testing.assert_close(slope, z.detach().cos() + draws.pull.detach())
    found = family.gradients(leaves, draws, slope)
    wanted = torch.autograd.grad((draws.z * slope).sum() / 5, list(leaves.values()))
    for name, value in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(found[name].detach(), value.tril(-1) if name == "lower" else value)


@pytest.mark.parametrize(("story", "data", "family"), [(normal_mixture, X[:, 0], "full_rank"), (ppca, X, "mean_field")])
def test_batches_average_to_the_whole(story, data, family):
    """Over a partition of the rows, with the same noise; catches a scale on the wrong factor, entropy or Jacobian."""
    with isolated(0, torch.float64):
        whole = DerivedTarget(prepare(story, data, seed=0), family, 2, None)
        part = DerivedTarget(prepare(story, data, seed=0), family, 2, 10)
        z, _ = whole.near_origin()
        leaves = whole.family.start(z, torch.full_like(z, 0.3), None)
        noise = torch.randn(2, whole.size)
        value, gradients = whole.estimate(leaves, None, noise)
        found = []
        for rows in torch.randperm(50).split(10):
            found.append(part.estimate(leaves, rows, noise[:, part.gathered(rows)[0]]))
    assert math.isclose(sum(float(v) for v, _ in found) / 5, value, rel_tol=1e-9)
    for name in leaves:
        torch.testing.assert_close(sum(g[name] for _, g in found) / 5, gradients[name])


def test_batches_reach_the_same_posterior():
    mean, covariance, _ = exact_line()
    p = fit(line, {"X": X, "y": Y}, SVI(guide="full_rank", batch_size=10), seed=0)
    sd = covariance.diagonal().sqrt()
    assert ((p.draws["w"].mean(0) - mean) / sd).abs().max() < 0.15
    assert (p.draws["w"].std(0) / sd - 1).abs().max() < 0.15
    assert p.diagnostics["mode"] == recorded_mode(p)


def test_batches_of_rows_with_a_latent_each():
    """z_n | x_n ~ Normal(x_n / 2, 1/2), by mean field on 10 rows a time; catches rows gathered or scattered wrongly."""
    x = 2 * torch.randn(50, generator=torch.Generator().manual_seed(4)).double()
    p = fit(local_story, x, SVI(batch_size=10, steps=4000), seed=0)
    assert (p.draws["z"].mean(0) - x / 2).abs().max() < 0.25
    assert abs(p.draws["z"].std(0).mean() - math.sqrt(0.5)) < 0.07


# -- data and runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 20])
@pytest.mark.parametrize("guide", ["story", "full_rank"])
def test_missing_cells_are_integrated_out(guide, batch_size):
    """A row that was not seen changes nothing: the answer is that without it."""
    x = torch.cat([CLUSTERS, torch.tensor([math.nan] * 20).double()])
    p = fit(Clusters(), x, SVI(guide=guide, batch_size=batch_size, steps=1500), seed=0)
    expected = torch.stack([CLUSTERS[:40].mean(), CLUSTERS[40:].mean()])
    assert (p.draws["mu"].mean(0).sort().values - expected).abs().max() < 0.15
    assert p.diagnostics["mode"] == recorded_mode(p)


@pytest.mark.parametrize(
    ("story", "guide"), [(beta_bernoulli, "full_rank"), (Clusters(), "story"), (two_clusters, "low_rank")]
)
def test_a_huge_step_diverges_with_its_last_finite_state(story, guide, untouched):
    x = (CLUSTERS > 0).double() if story is beta_bernoulli else CLUSTERS
    with pytest.raises(DivergenceError, match="lower lr") as caught:
        fit(story, x, SVI(guide=guide, lr=1e6), seed=0)
    error = caught.value
    assert error.step is not None and error.site and error.state
    assert all(v.isfinite().all() for v in error.state.values())


def test_nan_gradient_of_a_finite_loss_names_the_site():
    """sqrt at 0: the value is finite and the slope is not."""

    def story(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((0.0 * mu).sqrt(), 1.0), obs=x)

    def guide(x):
        v = pyro.param("v", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(v.sqrt(), 1.0))

    with pytest.raises(
        ValueError, match=r"in 12 tries: .*gradient with respect to 'mu' is not a number, first at site 'x'"
    ):
        fit(story, CLUSTERS, SVI(guide="full_rank"), seed=0)
    with pytest.raises(DivergenceError, match="gradient is not finite; first at parameter 'v'") as caught:
        fit(story, CLUSTERS, SVI(), guide=guide, seed=0)
    assert caught.value.step == 0 and caught.value.state["v"] == 0


def test_impossible_data_are_told_before_the_first_step():
    def story(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(0.0 * rate), obs=x)

    with pytest.raises(ValueError, match="'x'"):
        fit(story, torch.ones(4), SVI(), seed=0)


@pytest.mark.parametrize("guide", ["story", "mean_field"])
def test_same_seed_same_bits(guide):
    method = SVI(guide=guide, steps=60, draws=20)
    first, second = (fit(Clusters(), CLUSTERS, method, seed=3) for _ in range(2))
    other = fit(Clusters(), CLUSTERS, method, seed=4)
    assert first.history == second.history
    assert all(torch.equal(first.draws[n], second.draws[n]) for n in first.draws)
    assert first.history != other.history


def test_nothing_is_left_behind(untouched):
    """Neither by a story's guide nor by batches: the parameter store stays as it was, beside what the fixture checks."""
    pyro.param("mine", torch.ones(1))
    fit(Clusters(), CLUSTERS, SVI(steps=30, draws=5), seed=0)
    fit(two_clusters, CLUSTERS, SVI(steps=30, draws=5, batch_size=20), seed=0)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    pyro.clear_param_store()


def test_too_few_steps_are_no_convergence():
    p = fit(two_clusters, CLUSTERS, SVI(guide="story", steps=10, starts=1), guide=Clusters().guide, seed=0)
    assert not p.converged and any("did not converge" in w for w in p.warnings)


def test_a_spent_budget_returns_the_state_so_far():
    p = fit(Clusters(), CLUSTERS, SVI(steps=100_000), seed=0, budget=0.5)
    assert not p.converged and any("budget" in w for w in p.warnings) and len(p.history) < 100_000


@pytest.mark.processor  # whether the default climb is over by then hangs on what is drawn
@pytest.mark.parametrize("options", [{}, {"mode": "eager", "patience": 10_000}], ids=["default", "every step calls"])
def test_ctrl_c_returns_the_state_so_far(options, monkeypatch, untouched):
    calls, objective = [0], DerivedTarget.objective

    def interrupted(self, leaves):
        calls[0] += 1
        if calls[0] == 700:
            raise KeyboardInterrupt
        return objective(self, leaves)

    monkeypatch.setattr(DerivedTarget, "objective", interrupted)
    p = fit(two_clusters, CLUSTERS, SVI(**options), seed=0)
    assert not p.converged and any("interrupted" in w for w in p.warnings) and p.history


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"lr": math.nan}, "lr"), ({"batch_size": 0}, "batch_size"),
        ({"guide": "fullrank"}, "full_rank"), ({"draws": 0}, "draws"), ({"particles": 1.5}, "particles"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        SVI(**options)


def test_a_batch_larger_than_the_data_is_all_of_them():
    p = fit(two_clusters, CLUSTERS, SVI(batch_size=1000, steps=100), seed=0)
    assert any("exceeds the 80 rows" in w for w in p.warnings)


def test_batches_need_independent_rows():
    def coin(x):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(0.5 * fair + p * (1 - fair)), obs=x)

    with pytest.raises(ValueError, match="fair"):
        fit(coin, torch.ones(10), SVI(batch_size=5), seed=0)
    with pytest.raises(ValueError, match="mean_field"):
        fit(local_story, CLUSTERS, SVI(guide="full_rank", batch_size=5), seed=0)


def test_verdict_states_its_premise():
    """Which guide, what is summed out; a flat prior leaves the evidence undefined."""

    def flat(x):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    verdict = SVI().check(inspect(two_clusters, CLUSTERS))
    assert verdict.applies and "full-rank" in verdict.reason and "z summed out" in verdict.reason
    p = fit(flat, CLUSTERS, SVI(), seed=0)
    assert abs(p.draws["mu"].mean() - CLUSTERS.mean()) < 0.03 and any("improper" in w for w in p.warnings)
    assert not SVI(guide="story").check(inspect(two_clusters, CLUSTERS)).applies
