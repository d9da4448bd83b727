"""Exact answers of tiny stories: right by a second route, hit by every admissible method, and deaf to no planted fault."""

import itertools
import math
import warnings
from contextlib import contextmanager
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracle_routes import ROUTES
from scipy import integrate

from inference import EM, HMC, NUTS, SVI, choose, fit, inspect, oracles
from inference.oracles.coordinates import Matrix
from inference.oracles.verdict import monte_carlo
from zoo.catalog import catalog, get

NAMES = [entry.name for entry in catalog()]
FLOWS = [entry.name for entry in catalog() if entry.chapter == "flows"]
#: Four-dimensional grids, or many Gaussian coordinates at every node.
DEAR = {"PPCA", "FactorAnalysis", "MixtureOfFactorAnalysers"}
#: Stories whose instance takes a second or more to solve, or whose mode does to find.
SLOW = DEAR | {"MixedMixture", "ConjugateGMM", "GMM", "GaussianHMM"}
#: What a variational family is allowed on stories whose posterior has several modes or long tails: sds as a factor, nats.
FAR = {
    "MixedMixture": (1.2, 1.0),
    "PPCA": (1.0, 2.0),
    "FactorAnalysis": (4.0, 2.0),
    "MixtureOfFactorAnalysers": (4.0, 2.0),
}
FAR |= {"GMM": (2.0, 1.0), "ConjugateGMM": (1.0, 1.0), "PoissonMixture": (1.5, 1.0), "GaussianHMM": (1.5, 1.0)}


@cache
def solved(name):
    story, data = get(name).tiny()
    return oracles.solve(story, data)


def stories(names, quick):
    """Parameters, those that are not quick marked as slow."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


def verdict_of(name, method, **allowed):
    story, data = get(name).tiny()
    with _quiet():
        return oracles.verify(fit(story, data, method, seed=0, progress=False), solved(name), **allowed)


@contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


#: Stories by the methods that admit them, in the order of the catalog (a test compares this with `choose`).
NETWORKS = {"VAE", "LinearVAE", "DeepLatentGaussian", "Autoencoder", *FLOWS}
CLIMBED = [n for n in NAMES if n not in {"Box", *NETWORKS}]
ADMITTED = {"exact": ["Box", "CellTable"], "em": CLIMBED, "nuts": CLIMBED, "hmc": CLIMBED}
ADMITTED |= {"gibbs": ["LDA", "TokenLDA"], "svi": [n for n in NAMES if n != "Box"]}


# -- the oracle is right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", stories(NAMES, set(NAMES) - SLOW))
def test_every_story_ships_an_instance_that_the_oracle_solves(name, untouched):
    """A `tiny()` that has grown beyond an exact answer, or an answer that depends on the grid."""
    oracle = solved(name)
    assert math.isfinite(oracle.evidence) and oracle.error < 1e-6
    for site in oracle.mean:
        assert oracle.mean[site].shape == oracle.sd[site].shape
    for p in oracle.probs.values():
        assert float((p.sum(-1) - 1).abs().max()) < 1e-12
    assert "log evidence" in repr(oracle)


@pytest.mark.parametrize("name", stories(ROUTES, set(ROUTES) - SLOW - {"DTM"}))
def test_evidence_by_a_second_route(name):
    """Conjugate formulas summed over all labels, scipy's quadrature, or algebra on paper: none of it runs the story."""
    story, data = get(name).tiny()
    assert solved(name).evidence == pytest.approx(ROUTES[name](story, data), abs=1e-6)


@pytest.mark.parametrize("name", stories(["VAE", "DeepLatentGaussian"], {"VAE"}))
def test_probabilities_of_all_rows_there_could_be_add_up_to_one(name):
    """An integral over the codes that misses a part of them."""
    story, _ = get(name).tiny()
    rows = [torch.tensor([row]) for row in itertools.product([0.0, 1.0], repeat=2)]
    total = sum(math.exp(oracles.solve(story, {"x": row}).evidence) for row in rows)
    assert total == pytest.approx(1, abs=1e-7)


def shaken(name):
    """A tiny flow away from the identity, where most of them start."""
    flow, data = get(name).tiny()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return flow.double(), data


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_has_the_density_that_its_whole_jacobian_gives(name):
    """A wrong log-determinant: compared with that of the Jacobian of the map to noise, entry by entry."""
    flow, data = shaken(name)
    x = data["x"].double()
    way = flow.flow if flow.direction == "to_noise" else flow.flow.inverse

    def to_noise(one):
        return way(one.reshape(1, *x.shape[1:]))[0].reshape(-1)

    total = 0.0
    for row in x:
        J = torch.autograd.functional.jacobian(to_noise, row.reshape(-1))
        noise = to_noise(row.reshape(-1)).detach().reshape(x.shape[1:])
        total += float(flow.noise().log_prob(noise) + torch.linalg.slogdet(J)[1])
    assert oracles.solve(flow, data).evidence == pytest.approx(total, abs=1e-8)


@pytest.mark.parametrize("name", [n for n in FLOWS if n != "Glow"])
def test_the_density_of_a_flow_integrates_to_one(name):
    """A map that is not onto, or counted twice."""
    total, error = oracles.mass(*shaken(name))
    assert abs(total - 1) < 1e-3 and error < 2e-3


def test_counting_words_and_telling_them_one_by_one_is_the_same_story():
    """LDA over counts (a nested quadrature) and over words (a sum over topics): evidence and topics agree."""
    lda, counts = get("LDA").tiny()
    words = get("TokenLDA").story(num_topics=2, concentration=1.5, word_concentration=1.5)
    w = torch.tensor([[0, 0, 0, 1], [0, 1, 1, -1]])
    a, b = oracles.solve(lda, counts), oracles.solve(words, {"w": w, "num_words": 2})
    assert a.evidence == pytest.approx(b.evidence, abs=1e-7)
    torch.testing.assert_close(a.sd["theta"], b.sd["theta"].squeeze(1), atol=1e-6, rtol=0)


def schools(y):
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def test_a_hierarchy_equals_scipy(untouched):
    """Gaussian algebra within a quadrature: moments of tau, and theta's by the law of total variance."""
    y = torch.tensor([1.0, -0.5, 2.5], dtype=torch.float64)
    oracle = oracles.solve(schools, y)

    def density(tau, power=0):
        cov = (1 + tau**2) * np.eye(3) + 9 * np.ones((3, 3))
        solution = np.linalg.solve(cov, y.numpy())
        log = -0.5 * (y.numpy() @ solution + np.linalg.slogdet(2 * np.pi * cov)[1])
        return tau**power * math.exp(log) * math.exp(-(tau**2) / 8) * math.sqrt(2 / math.pi) / 2

    z, first, second = (integrate.quad(density, 0, 40, args=(k,), epsabs=1e-13)[0] for k in range(3))
    assert oracle.evidence == pytest.approx(math.log(z), abs=2 * oracle.error + 1e-8)
    assert float(oracle.mean["tau"]) == pytest.approx(first / z, abs=1e-6)
    assert float(oracle.sd["tau"]) == pytest.approx(math.sqrt(second / z - (first / z) ** 2), abs=1e-6)
    assert "Gaussian algebra in 4 coordinates" in oracle.how


def test_a_support_that_another_latent_sets():
    """The Jacobian of a coordinate whose interval moves."""

    def story(x):
        a = pyro.sample("a", dist.Gamma(3.0, 1.0))
        b = pyro.sample("b", dist.Uniform(torch.zeros(()), a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    oracle = oracles.solve(story, torch.tensor(1.3).double())

    def joint(b, a):
        return a**2 * math.exp(-a) / 2 / a * math.exp(-0.5 * (1.3 - b) ** 2) / math.sqrt(2 * math.pi)

    z = integrate.dblquad(joint, 0, 60, 0, lambda a: a)[0]
    mean = integrate.dblquad(lambda b, a: b * joint(b, a), 0, 60, 0, lambda a: a)[0] / z
    assert oracle.evidence == pytest.approx(math.log(z), abs=1e-6)
    assert float(oracle.mean["b"]) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_jacobian_of_positive_definite_matrices(size):
    """A wrong power in the determinant shifts every precision's posterior."""
    free = torch.randn(size * (size + 1) // 2).double()
    rows, columns = torch.tril_indices(size, size)
    J = torch.autograd.functional.jacobian(lambda f: Matrix.matrix(f, size)[rows, columns], free)
    torch.testing.assert_close(Matrix.log_det(free, size), torch.linalg.slogdet(J)[1])


def counts(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


@pytest.mark.parametrize(("estimate", "rate"), [("map", 11 / 4.5), ("mle", 10 / 4)])
def test_modes_are_those_of_the_values_and_not_of_coordinates(estimate, rate):
    """A mode that keeps the Jacobian: gamma's (a - 1) / b would read a / b."""
    mode = oracles.solve(counts, torch.tensor([1.0, 4.0, 2.0, 3.0]), mode=estimate).mode
    assert float(mode.values["rate"]) == pytest.approx(rate, abs=1e-7)


# -- methods hit it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADMITTED["exact"])
def test_exact_hits(name):
    """Closed forms and their evidence, to 1e-6."""
    verdict = verdict_of(name, "exact")
    assert verdict.passed and any(c.what == "log evidence" for c in verdict.checks), verdict


@pytest.mark.parametrize(
    "name",
    stories(ADMITTED["em"], {"CellTable", "PoissonMixture", "KMeans", "MultinomialMixture", "CategoricalHMM", "LDA"}),
)
def test_em_climbs_to_the_highest_point(name):
    """A saddle, a wrong prior term, labels of rows that are the prior's: to 1e-4 nats, and 0.1 where EM climbs a bound."""
    verdict = verdict_of(name, EM(restarts=8, tol=1e-12, max_iter=5000), nats=0.1)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", stories(ADMITTED["nuts"], {"CellTable", "PoissonMixture", "BernoulliMixture", "LDA"}))
def test_nuts_hits(name):
    """Means and variances within five Monte Carlo errors; rows' probabilities at every draw to 1e-6."""
    verdict = verdict_of(name, NUTS(chains=4, warmup=1000, draws=4000))
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", ADMITTED["gibbs"])
def test_gibbs_hits(name):
    """Topics by collapsed sampling: means and variances within five Monte Carlo errors."""
    verdict = verdict_of(name, "gibbs")
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", stories(ADMITTED["svi"], {"LinearVAE", "MAF", "TokenLDA"}))
def test_svi_comes_as_near_as_its_family_can(name):
    """A bound above the evidence, a density of rows that is not the decoder's, a guide that has not learned."""
    story, _ = get(name).tiny()
    sds, nats = FAR.get(name, (0.6, 1.0))
    small = name in FLOWS or hasattr(story, "decoder")
    verdict = verdict_of(name, SVI(steps=300) if small else "svi", sds=sds, nats=nats)
    if name == "DTM":  # the walk's centre stays at its mode, and the answer says so
        failed = [c for c in verdict.failed if not c.what.startswith("sd of")]
        assert not failed, verdict
    else:
        assert verdict.passed, verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ADMITTED["hmc"])
def test_hmc_hits(name):
    """Many chains at once: means and variances within five Monte Carlo errors."""
    verdict = verdict_of(name, HMC(chains=64, warmup=1000, draws=1000))
    assert verdict.passed, verdict


@pytest.mark.slow
def test_no_method_that_is_admitted_is_forgotten():
    """A story or method that joins the zoo and passes in silence, since nothing holds it to its exact answer."""
    found = {method: [] for method in ADMITTED}
    for name in NAMES:
        with _quiet():
            verdicts = choose(inspect(*get(name).tiny())).verdicts
        assert any(v.applies for v in verdicts.values())
        for method, verdict in verdicts.items():
            if verdict.applies:
                found[method].append(name)
    assert found == ADMITTED


# -- it sees planted faults ------------------------------------------------------------------------------------------

X = torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64)


def right(n=4000):
    """Independent draws of the posterior of `counts`, a Gamma(12, 4.5)."""
    return torch.distributions.Gamma(torch.tensor(12.0).double(), 4.5).sample((n,))


SOME = torch.linspace(1, 4, 30)


FAULTS = {
    "prior draws": lambda: torch.distributions.Gamma(torch.tensor(2.0).double(), 0.5).sample((4000,)),
    "sd x 0.8": lambda: 12 / 4.5 + 0.8 * (right() - 12 / 4.5),
    "mean + 0.2 sd": lambda: right() + 0.2 * math.sqrt(12) / 4.5,
    "forgotten Jacobian": lambda: torch.distributions.Gamma(torch.tensor(11.0).double(), 4.5).sample((4000,)),
    "one row twice": lambda: torch.distributions.Gamma(torch.tensor(15.0).double(), 5.5).sample((4000,)),
}


def test_right_draws_pass():
    oracle = oracles.solve(counts, X)
    passed = [oracles.verify_draws({"rate": right()}, oracle, chains=0).passed for _ in range(20)]
    assert all(passed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_sampler_is_seen(fault):
    verdict = oracles.verify_draws({"rate": FAULTS[fault]()}, oracles.solve(counts, X), chains=0)
    assert not verdict and "FAILED" in repr(verdict)


def test_a_sampler_of_discrete_latents_is_judged_by_its_frequencies():
    """Labels from the prior: their frequencies, and who is with whom where labels have no names."""

    def story(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.7, 0.3])))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    oracle = oracles.solve(story, torch.tensor([0.1, 1.9, 1.0]))
    exact = torch.distributions.Categorical(oracle.probs["z"]).sample((3000,))
    prior = torch.distributions.Categorical(torch.tensor([0.7, 0.3])).sample((3000, 3))
    assert oracles.verify_draws({"z": exact}, oracle, chains=0).passed
    assert not oracles.verify_draws({"z": prior}, oracle, chains=0).passed


def test_a_point_beside_the_mode_and_a_wrong_posterior_of_rows_are_seen():
    """A point 0.02 off; rows' probabilities that are the prior's."""
    from dataclasses import replace

    story, data = get("PoissonMixture").tiny()
    fitted = fit(story, data, EM(tol=1e-12, max_iter=5000), seed=0)
    assert oracles.verify(fitted, solved("PoissonMixture")).passed
    moved = replace(fitted, draws={**fitted.draws, "lam": fitted.draws["lam"] + 0.1})
    assert [c.what for c in oracles.verify(moved, solved("PoissonMixture")).failed] == ["nats below the highest point"]

    class Prior(type(fitted)):
        def local(self, site, data=None, *, draws=200):
            return self.draws["pi"][0].expand(4, 2)

    lying = Prior(**{f: getattr(fitted, f) for f in fitted.__dataclass_fields__})
    assert [c.what for c in oracles.verify(lying, solved("PoissonMixture")).failed] == ["probabilities of z"]


def test_chains_that_disagree_count_as_few_draws():
    """One stuck chain would otherwise pass with an error bar that ignores it, or fail a right sampler."""
    series = torch.randn(2000, 1).double()
    _, size = monte_carlo(series, 4)
    assert 1200 < float(size) < 3500
    stuck = series.clone()
    stuck[:500] += 3
    assert float(monte_carlo(stuck, 4)[1]) < 60
    slow = torch.zeros(20_000, 1).double()
    for i in range(1, len(slow)):
        slow[i] = 0.9 * slow[i - 1] + torch.randn(1).double()
    assert float(monte_carlo(slow, 1)[1]) == pytest.approx(20_000 / 19, rel=0.25)


def test_components_without_names_and_signs_are_found():
    from inference.oracles.oracle import told_plainly
    from inference.oracles.symmetry import find_symmetries

    with told_plainly():
        found = find_symmetries(solved("CategoricalHMM").density)
    assert found.size == 2 and found.axes == {"pi": (0,), "A": (0, 1), "B": (0,)} and not found.signs
    with told_plainly():
        flips = find_symmetries(oracles.solve(schools, torch.tensor([1.0, 2.0])).density)
    assert flips.trivial


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_story_that_is_too_big_is_refused_with_its_size():
    story, _ = get("PoissonMixture").tiny()
    with pytest.raises(ValueError, match=r"2\^40 \('z'\) = 1.1e\+12 joint states, .* fewer rows"):
        oracles.solve(story, torch.ones(40))

    def wide(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(7), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((w**2).sum() + w.prod(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"7 coordinates have to be integrated together \(7 of 'w'\)"):
        oracles.solve(wide, torch.ones(3))


@pytest.mark.parametrize(
    ("case", "match"),
    [
        (lambda: oracles.solve(counts, torch.tensor([1.0, math.nan])), "1 missing cells"),
        (lambda: oracles.solve(counts, X, mode="best"), "mode must be 'map', 'mle' or None, got 'best'"),
        (
            lambda: oracles.solve(lambda: pyro.sample("n", dist.Poisson(2.0)), {}),
            "'n' .Poisson. has states without end",
        ),
        (lambda: oracles.verify_draws({"mu": SOME}, oracles.solve(counts, X)), r"no site 'mu'; it knows \['rate'\]"),
        (lambda: oracles.verify_draws({"rate": SOME[:5]}, oracles.solve(counts, X)), "20 draws or more"),
        (lambda: oracles.mass(counts, X), "latents .'rate'."),
        (lambda: oracles.solve(counts, X, at={"weight": X}), r"no learned parameter is called \['weight'\]"),
    ],
)
def test_refusals_name_what_was_found(case, match, untouched):
    with pytest.raises(ValueError, match=match):
        case()


def test_a_density_without_a_highest_point_is_refused():
    """A normal that shrinks onto its only row."""

    def story(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, sigma), obs=x)

    with pytest.raises(ValueError, match="no highest point"):
        oracles.solve(story, torch.tensor([0.7]), mode="mle")
