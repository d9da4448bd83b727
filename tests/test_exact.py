"""Closed posteriors, the box, and the table of cells, against quadrature, scipy and the lectures' numbers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from stories import gaussian_mixture, normal_mixture

from inference import EM, NUTS, Exact, choose, fit, inspect
from inference.choose import NoMethodError
from zoo import Box, CellTable, load


def coin(x):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def counts(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def waits(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(rate), obs=x)


def levels(x):
    mu = pyro.sample("mu", dist.Normal(1.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 2.0), obs=x)


def spreads(x):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.5, tau.rsqrt()), obs=x)


def variances(x):
    v = pyro.sample("v", dist.InverseGamma(3.0, 1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.5, v.sqrt()), obs=x)


def normal_gamma(x):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.5))
    mu = pyro.sample("mu", dist.Normal(1.0, (0.5 * tau).rsqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)


REALS = torch.tensor([0.3, -1.2, 2.5, 0.9, 1.7], dtype=torch.float64)
WHOLE = torch.tensor([3.0, 0.0, 5.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("story", "x", "likelihood", "prior", "bounds"),
    [
        (coin, torch.tensor([1.0, 0.0, 1.0, 1.0]), lambda t, x: stats.bernoulli.logpmf(x, t), stats.beta(2, 3), (0, 1)),
        (counts, WHOLE, lambda t, x: stats.poisson.logpmf(x, t), stats.gamma(2, scale=2), (0, 60)),
        (waits, WHOLE + 0.5, lambda t, x: stats.expon.logpdf(x, scale=1 / t), stats.gamma(2, scale=2), (1e-9, 60)),
        (levels, REALS, lambda t, x: stats.norm.logpdf(x, t, 2), stats.norm(1, 3), (-30, 30)),
        (spreads, REALS, lambda t, x: stats.norm.logpdf(x, 0.5, t**-0.5), stats.gamma(2, scale=1 / 1.5), (1e-9, 60)),
        (variances, REALS, lambda t, x: stats.norm.logpdf(x, 0.5, t**0.5), stats.invgamma(3, scale=1.5), (1e-3, 400)),
    ],
)
def test_posterior_and_evidence_equal_quadrature(story, x, likelihood, prior, bounds):
    """Mean and log evidence of every pair by numerical integration; draws within 5 Monte Carlo errors."""

    def joint(t):
        return math.exp(likelihood(t, x.numpy()).sum()) * prior.pdf(t)

    evidence = integrate.quad(joint, *bounds, limit=400)[0]
    mean = integrate.quad(lambda t: t * joint(t), *bounds, limit=400)[0] / evidence
    second = integrate.quad(lambda t: t * t * joint(t), *bounds, limit=400)[0] / evidence
    posterior = fit(story, x, seed=0)
    assert posterior.method.name == "exact" and posterior.kind == "exact"
    name = next(iter(posterior.draws))
    assert math.isclose(posterior.diagnostics["log_evidence"], math.log(evidence), rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(float(posterior.diagnostics["mean"][name]), mean, rel_tol=1e-5)
    sd = math.sqrt(second - mean**2)
    assert abs(float(posterior.draws[name].mean()) - mean) < 5 * sd / 1000**0.5


def test_normal_gamma_equals_quadrature_in_two_dimensions():
    """Mean and spread unknown together: evidence, and the mean of the precision with the mean integrated out."""
    x = REALS.numpy()

    def joint(mu, tau):
        prior = stats.gamma.pdf(tau, 2, scale=1 / 1.5) * stats.norm.pdf(mu, 1.0, (0.5 * tau) ** -0.5)
        return np.exp(stats.norm.logpdf(x, mu, tau**-0.5).sum()) * prior

    evidence = integrate.dblquad(joint, 1e-6, 12, -8, 10)[0]
    tau = integrate.dblquad(lambda m, t: t * joint(m, t), 1e-6, 12, -8, 10)[0] / evidence
    posterior = fit(normal_gamma, REALS, Exact(draws=4000), seed=0)
    assert math.isclose(posterior.diagnostics["log_evidence"], math.log(evidence), abs_tol=1e-4)
    assert math.isclose(float(posterior.diagnostics["mean"]["tau"]), tau, rel_tol=1e-3)
    mean = (0.5 * 1.0 + x.sum()) / (0.5 + 5)
    assert abs(float(posterior.draws["mu"].mean()) - mean) < 5 * float(posterior.draws["mu"].std()) / 4000**0.5


def test_normal_wishart_equals_its_textbook_parameters():
    """Degrees of freedom, scale and mean of Murphy 2012, equation 4.209, and NUTS within Monte Carlo error."""

    def story(x):
        D = x.shape[1]
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(D + 2.0), precision_matrix=torch.eye(D)))
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(D), precision_matrix=0.5 * precision))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, precision_matrix=precision), obs=x)

    x = load("iris").x[:20, :2] - 4.0
    posterior = fit(story, x, Exact(draws=4000), seed=0)
    n, mean = len(x), x.mean(0)
    scatter = (x - mean).T @ (x - mean) + torch.eye(2) + (0.5 * n / (0.5 + n)) * mean[:, None] * mean
    expected = (n + 4) * torch.linalg.inv(scatter)
    torch.testing.assert_close(posterior.diagnostics["mean"]["precision"], expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(posterior.draws["precision"].mean(0), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(posterior.draws["mu"].mean(0), n * mean / (n + 0.5), atol=0.02, rtol=0)


def test_classes_that_are_seen_have_a_posterior_each():
    """Rates gathered by an observed index: every class its own gamma."""

    def story(x, y):
        with pyro.plate("classes", 3):
            rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate[y]), obs=x)

    x, y = torch.tensor([1.0, 4.0, 2.0, 9.0, 7.0]), torch.tensor([0, 1, 0, 2, 2])
    posterior = fit(story, {"x": x, "y": y}, "exact", seed=0)
    wanted = torch.tensor([(1 + 3) / 3, (1 + 4) / 2, (1 + 16) / 3], dtype=torch.float64)
    torch.testing.assert_close(posterior.diagnostics["mean"]["rate"], wanted)


def test_nuts_draws_from_the_same_posterior():
    exact, nuts = fit(counts, WHOLE, "exact", seed=0), fit(counts, WHOLE, NUTS(chains=2, warmup=200, draws=400), seed=0)
    a, b = exact.draws["rate"], nuts.draws["rate"]
    assert abs(float(a.mean() - b.mean())) < 5 * float(a.std()) * (1 / 1000 + 1 / 200) ** 0.5


@pytest.mark.parametrize("story", [gaussian_mixture, normal_mixture])
def test_stories_with_latent_rows_are_refused(story):
    x = load("iris").x if story is gaussian_mixture else load("iris").x[:, 0]
    with pytest.raises(NoMethodError, match="'z' is latent"):
        fit(story, x, "exact")


def test_pairs_that_are_not_conjugate_are_refused():
    def story(x):
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, sigma), obs=x)

    with pytest.raises(NoMethodError, match="known closed forms"):
        fit(story, REALS, "exact")
    assert choose(inspect(story, REALS)).method.name == "nuts"
    with pytest.raises(ValueError, match="draws"):
        Exact(draws=0)


# The box


def test_box_posterior_equals_quadrature():
    """Corners given five rows: means and evidence by integration over both corners, column by column."""
    x = load("rectangle").x[:5]
    posterior = fit(Box(), x, Exact(draws=20_000), seed=0)
    log_evidence = 0.0
    for d in range(2):
        low, high = float(x[:, d].min()), float(x[:, d].max())

        def joint(size, a, low=low, high=high):
            return size**-5.0 * (a <= low) * (a + size >= high) / 400

        def moment(a, power, high=high):
            return a**power * ((high - a) ** -4 - 20.0**-4) / 4 / 400

        z = [integrate.quad(moment, max(-10, high - 20), low, args=(power,), limit=300)[0] for power in (0, 1)]
        e = z[1] / z[0]
        log_evidence += math.log(z[0])
        draws = posterior.draws["low"][:, d]
        assert joint(high - low, low) > 0 and abs(float(draws.mean()) - e) < 5 * float(draws.std()) / 20_000**0.5
        assert (draws <= low).all() and (draws + posterior.draws["size"][:, d] >= high).all()
    assert math.isclose(posterior.diagnostics["log_evidence"], log_evidence, abs_tol=1e-6)


def test_smallest_box_is_the_most_likely():
    x = load("rectangle").x
    posterior = fit(Box(), x, seed=0)
    assert posterior.method.name == "exact"
    best = posterior.diagnostics["maximum_likelihood"]
    torch.testing.assert_close(best["low"], x.amin(0))
    torch.testing.assert_close(best["low"] + best["size"], x.amax(0))
    truth = load("rectangle").truth
    assert ((posterior.draws["low"].mean(0) - truth["low"]).abs() < 0.2).all()


@pytest.mark.parametrize("method", ["svi", "nuts", "em"])
def test_gradient_methods_do_not_see_the_edge_of_a_box(method):
    with pytest.raises(NoMethodError, match=r"support of observed site 'x' depends on a latent.*admissible: exact"):
        fit(Box(), load("rectangle").x, method)


def test_corners_with_flat_priors_of_their_own():
    """Two corners, improper priors: P(low < t) = ((M - m) / (M - t))^(N - 2) in closed form."""

    def story(x):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(a, b, validate_args=False), obs=x)

    x = load("rectangle").x[:8, 0]
    try:
        posterior = fit(story, x, Exact(draws=8000), seed=1)
    except NoMethodError:
        pytest.skip("draws of the improper corners cross")
    low, high = float(x.min()), float(x.max())
    t = low - 0.3
    share = float((posterior.draws["a"] < t).double().mean())
    expected = ((high - low) / (high - t)) ** 6
    assert abs(share - expected) < 5 * (expected * (1 - expected) / 8000) ** 0.5


# Cells


def test_the_lectures_numbers_of_cells():
    """4,032 cells; 2/50 by counting; 3/4082 and 1/4082 with one pseudo-count a cell."""
    story, data = CellTable.example()
    assert story.num_cells == 4032 and len(data["x"]) == 50
    times = torch.bincount(data["x"], minlength=4032)
    twice, unseen = int((times == 2).nonzero()[0]), int((times == 0).nonzero()[0])
    assert int((times == 2).sum()) == 1 and times.max() == 2
    mle = fit(story, data, EM(estimate="mle"), seed=0).draws["theta"][0]
    assert math.isclose(float(mle[twice]), 2 / 50, rel_tol=1e-12) and float(mle[unseen]) == 0.0
    exact = fit(story, data, seed=0)
    mean = exact.diagnostics["mean"]["theta"]
    assert exact.method.name == "exact"
    assert math.isclose(float(mean[twice]), 3 / 4082, rel_tol=1e-12)
    assert math.isclose(float(mean[unseen]), 1 / 4082, rel_tol=1e-12)
    mode = fit(CellTable(story.sizes, concentration=2.0), data, EM(), seed=0).draws["theta"][0]
    torch.testing.assert_close(mode, mean, rtol=1e-12, atol=0)


def test_cells_and_combinations_undo_each_other():
    story = CellTable((2, 3, 2))
    table = torch.tensor([[0, 0, 0], [1, 2, 1], [0, 2, 1]])
    assert story.cells(table).tolist() == [0, 11, 5]
    assert torch.equal(story.combinations(story.cells(table)), table)
    with pytest.raises(ValueError, match="row 1, column 0 holds level 2"):
        story.cells(torch.tensor([[0, 0, 0], [2, 0, 0]]))
    with pytest.raises(ValueError, match="3 columns"):
        story.cells(torch.zeros(2, 2))


def test_faces_have_the_published_shares():
    faces = load("faces")
    from zoo.data.faces import LEVELS

    shares = {}
    for j, (feature, names) in enumerate(LEVELS.items()):
        for k, name in enumerate(names):
            shares[feature, name] = float((faces.x[:, j] == k).double().mean())
    wanted = {
        ("top", "LongHairStraight"): 0.46,
        ("hair colour", "Red"): 0.16,
        ("accessories", "Round"): 0.44,
        ("clothing", "ShirtScoopNeck"): 0.38,
        ("clothing colour", "White"): 0.44,
    }
    assert {k: shares[k] for k in wanted} == wanted
    assert "not public" in faces.source
