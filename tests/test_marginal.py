"""Continuous locals integrated out: the density over the globals against textbook normals, and the locals drawn back."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import SCHOOLS, eight_schools

from inference import NUTS, fit
from inference.joint import LogJoint
from inference.marginal import MarginalJoint, density_of_globals
from inference.problem import prepare
from zoo import PPCA, FactorAnalysis, MixtureOfFactorAnalysers, load


def marginal_of(story, data):
    problem = prepare(story, data, seed=0)
    with problem.scope(0):
        return MarginalJoint(problem)


def normal(d, k=None):
    """The rows' normal distribution at one draw of the factor stories, of component k where there are several."""
    W, mu = (d["W"], d["mu"]) if k is None else (d["W"][k], d["mu"][k])
    noise = d["psi"].expand(len(mu))
    return torch.distributions.MultivariateNormal(mu, W @ W.T + torch.diag(noise))


@pytest.mark.parametrize("story", [FactorAnalysis(2), PPCA(2)], ids=["fa", "ppca"])
@pytest.mark.parametrize("holes", [False, True], ids=["complete", "holes"])
def test_factors_give_the_textbook_normal(story, holes):
    """log p(x | W, mu, psi) is that of Normal(mu, W W' + psi), from the scatter or from rows with missing cells."""
    x = load("two_factors").x[:40].double().clone()
    if holes:
        x[3, 1] = x[7, 0] = math.nan
    joint = marginal_of(story, x)
    assert ("scatter" in joint.how) != holes
    for seed in range(3):
        torch.manual_seed(seed)
        d = joint.prior_draw()
        expected = torch.zeros((), dtype=torch.float64)
        for row in x:
            seen = ~row.isnan()
            full = normal(d)
            part = torch.distributions.MultivariateNormal(full.loc[seen], full.covariance_matrix[seen][:, seen])
            expected = expected + part.log_prob(row[seen])
        torch.testing.assert_close(joint.likelihood(d), expected, rtol=1e-8, atol=1e-8)


def test_a_mixture_of_factors_sums_over_components_too():
    x = load("two_rods").x
    joint = marginal_of(MixtureOfFactorAnalysers(2, 1), x)
    d = joint.prior_draw()
    rows = torch.stack([normal(d, k).log_prob(x.double()) + d["pi"][k].log() for k in range(2)]).logsumexp(0)
    torch.testing.assert_close(joint.likelihood(d), rows.sum(), rtol=1e-9, atol=1e-8)


def test_prior_and_jacobian_are_those_of_the_full_density():
    """Full density at z, less log p(x, z | globals), is what the globals alone contribute."""
    problem = prepare(eight_schools, SCHOOLS, seed=0)
    with problem.scope(0):
        full, marginal = LogJoint(problem), MarginalJoint(problem)
        d = full.prior_draw()
        flat = marginal.flatten({n: d[n] for n in ("mu", "tau")})
        y, sigma = (torch.tensor(SCHOOLS[n], dtype=torch.float64) for n in ("y", "sigma"))
        rows = torch.distributions.Normal(d["mu"], (d["tau"] ** 2 + sigma**2).sqrt()).log_prob(y).sum()
        beside = torch.distributions.Normal(d["mu"] + d["tau"] * d["raw"], sigma).log_prob(y).sum()
        beside = beside + torch.distributions.Normal(0.0, 1.0).log_prob(d["raw"]).sum()
        torch.testing.assert_close(
            marginal.unconstrained(flat) - rows, full.unconstrained(full.flatten(d)) - beside, rtol=1e-9, atol=1e-9
        )


def test_locals_drawn_back_are_their_posterior():
    """Draws of z given one draw of the globals, repeated, have the regression's mean and covariance."""
    x = load("two_factors").x[:5]
    joint = marginal_of(FactorAnalysis(2), x)
    with joint.problem.scope(0):
        d = joint.prior_draw()
        flat = joint.flatten(d).expand(20_000, -1)
        z = joint.local_draws(flat)["z"]
    weighted = d["W"] / d["psi"].unsqueeze(-1)
    covariance = torch.linalg.inv(torch.eye(2) + d["W"].T @ weighted)
    mean = (x.double() - d["mu"]) @ weighted @ covariance
    error = 5 * (covariance.diagonal() / len(z)).sqrt()
    assert ((z.mean(0) - mean).abs() < error).all()
    found = torch.cov(z[:, 2].T)
    torch.testing.assert_close(found, covariance, rtol=0.06, atol=0.02 * float(covariance.max()))


@pytest.mark.parametrize("name", ["fa", "mfa"])
def test_regression_and_rows_tell_the_same_locals(name):
    """The closed form of the locals' posterior equals what is read off the rows of the story."""
    story = FactorAnalysis(2) if name == "fa" else MixtureOfFactorAnalysers(2, 1)
    joint = marginal_of(story, load("two_factors" if name == "fa" else "two_rods").x[:30])
    with joint.problem.scope(0):
        flat = joint.flatten(joint.prior_draw())
        quick = joint._moments(flat)
        joint.form = None
        slow = joint._moments(flat)
    for a, b in zip(quick[:2], slow[:2], strict=True):
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(quick[2].softmax(-1), slow[2].softmax(-1), rtol=1e-7, atol=1e-9)


def test_sampling_without_the_locals_gives_the_same_posterior(monkeypatch):
    """A regression with a random effect a row: the same means and sds whether effects are sampled or integrated out."""

    def effects(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu + s * z, 0.5), obs=x)

    monkeypatch.setattr("inference.marginal.FEW_LOCALS", 0)
    x = torch.tensor([0.2, 1.4, -0.6, 2.2, 0.9, 1.1, -0.3, 0.4, 1.9, 0.1, 0.6, 1.3, -1.0, 0.8])
    method = NUTS(chains=4, warmup=500, draws=1500)
    integrated = fit(effects, x, method, seed=0)
    assert "integrated out exactly" in integrated.diagnostics["locals"]
    monkeypatch.setattr("inference.marginal.density_of_globals", LogJoint)
    sampled = fit(effects, x, method, seed=1)
    assert "locals" not in sampled.diagnostics
    for name in ("mu", "s", "z"):
        a, b = integrated.draws[name], sampled.draws[name]
        error = 5 * b.std(0) / math.sqrt(1000)
        assert ((a.mean(0) - b.mean(0)).abs() < error).all(), name
        torch.testing.assert_close(a.std(0), b.std(0), rtol=0.12, atol=0.0)


def test_a_few_locals_are_sampled():
    problem = prepare(eight_schools, SCHOOLS, seed=0)
    with problem.scope(0):
        assert density_of_globals(problem).dim == 10


def test_effects_of_unknown_spread_are_integrated_whatever_it_is():
    """Measurement error in closed form, (w, y) bivariate normal: a spread of 1e-7 or a noise of 1e-6 must leave digits."""

    def measured(w, y):
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(w)):
            x = pyro.sample("x", dist.Normal(1.0, spread))
            pyro.sample("w", dist.Normal(x, 0.5), obs=w)
            pyro.sample("y", dist.Normal(slope * x, noise), obs=y)

    torch.manual_seed(0)
    w, y = torch.randn(80, dtype=torch.float64), torch.randn(80, dtype=torch.float64)
    problem = prepare(measured, {"w": w, "y": y}, seed=0)
    with problem.scope(0):
        joint = density_of_globals(problem)
        assert isinstance(joint, MarginalJoint)
        for spread, noise in ((2.0, 0.2), (0.1, 0.2), (1e-4, 0.2), (1e-7, 0.2), (1.0, 1e-4), (1.0, 1e-6)):
            values = {"spread": spread, "noise": noise, "slope": -1.3}
            theta = {n: torch.tensor(v, requires_grad=True) for n, v in values.items()}
            found = joint.likelihood(theta)
            load = torch.stack([torch.ones(()), theta["slope"]])
            cov = theta["spread"] ** 2 * load[:, None] * load + torch.diag(
                torch.stack([torch.tensor(0.25), theta["noise"] ** 2])
            )
            exact = dist.MultivariateNormal(load, cov).log_prob(torch.stack([w, y], -1)).sum()
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-7)
            slopes = [torch.autograd.grad(v, list(theta.values())) for v in (found, exact)]
            for n, a, b in zip(theta, *slopes, strict=True):
                torch.testing.assert_close(a * theta[n], b * theta[n], rtol=1e-4, atol=1e-3)
