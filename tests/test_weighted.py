"""Divergences in a closed form, weighed, annealed and partly free: against algebra on normal stories."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import recorded_mode
from torch.distributions import constraints

from inference import SVI, fit
from inference.methods.paired import PairTarget
from inference.methods.tightened import bound, row_weights
from inference.methods.weighted import PLAIN, Weights, weighted_elbo
from inference.problem import prepare

X = torch.tensor([0.4, 1.9, -0.7, 1.2, 0.6, 2.2], dtype=torch.float64)
NOISE = 0.7


class Effects:
    """z_n ~ Normal(0, 1), x_n ~ Normal(z_n, 0.7), with a guide that has a mean and a spread a row."""

    def model(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(self, x):
        with pyro.plate("rows", len(x)):
            m = pyro.param("m", torch.zeros(len(x)))
            s = pyro.param("s", torch.full((len(x),), 0.5), constraint=constraints.positive)
            pyro.sample("z", dist.Normal(m, s))


class Idle:
    """The second of two units explains nothing."""

    def model(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], NOISE), obs=x)

    def guide(self, x):
        a = pyro.param("a", torch.tensor([0.5, 0.3]))
        s = pyro.param("s", torch.tensor([0.5, 0.5]), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.unsqueeze(-1) * a, s).to_event(1))


def target_of(story, **weights):
    problem = prepare(story, X, seed=0)
    with problem.scope(0):
        return PairTarget(problem, 1, None, "eager", 1, Weights(**weights)), problem


def test_the_formula_is_the_mean_of_the_draws():
    """At beta 1 the objective has the same mean as log p - log q; at the posterior the latter has no noise at all."""
    target, problem = target_of(Effects())
    with problem.scope(0):
        leaves = {n: v + 0.3 for n, v in target.start().items()}
        exact = torch.stack([weighted_elbo(target, leaves, None, 1.0)[0] for _ in range(3000)])
        drawn = torch.stack([target.log_ratio(leaves)[0] for _ in range(3000)])
        precision = 1 + 1 / NOISE**2
        best = {"m": X / NOISE**2 / precision, "s": torch.full_like(X, precision**-0.5).log()}
        at_best = torch.stack([target.log_ratio(best)[0] for _ in range(10)])
    error = 4 * math.sqrt(float(exact.var() + drawn.var()) / 3000)
    assert abs(float(exact.mean() - drawn.mean())) < error
    assert at_best.std() < 1e-9 < drawn.std()


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_beta_tempers_the_posterior(beta):
    """log p(x | z) - beta KL is largest at the posterior of a likelihood to the power 1 / beta."""
    posterior = fit(Effects(), X, SVI(beta=beta, steps=3000, particles=16), seed=0)
    precision = 1 + 1 / (beta * NOISE**2)
    mean = X / (beta * NOISE**2) / precision
    torch.testing.assert_close(posterior.local("z").mean(0), mean, atol=0.12, rtol=0.0)
    m, s = (posterior.extra["guide_params"][n] for n in ("m", "s"))
    torch.testing.assert_close(m, mean, atol=0.03, rtol=0.0)
    torch.testing.assert_close(s, torch.full_like(s, precision**-0.5), atol=0.03, rtol=0.0)


def test_annealing_reaches_its_end():
    """The weight moves without another capture, and the fit ends where beta 1 ends."""
    posterior = fit(Effects(), X, SVI(beta=(0.0, 1.0, 300), steps=3000, particles=16), seed=0)
    precision = 1 + 1 / NOISE**2
    m = posterior.extra["guide_params"]["m"]
    torch.testing.assert_close(m, X / NOISE**2 / precision, atol=0.03, rtol=0.0)
    assert posterior.diagnostics["mode"] == recorded_mode(posterior) and posterior.diagnostics["steps"] > 300
    weights = Weights((0.0, 1.0, 300))
    assert (weights.at(0), weights.at(150), weights.at(300), weights.at(900)) == (0.0, 0.5, 1.0, 1.0)
    assert not weights.settled(299) and weights.settled(300)


def test_free_bits_keep_a_unit_alive():
    """A unit that explains nothing falls to the prior, unless a quarter of a nat costs nothing: then it does not."""
    free, plain = (fit(Idle(), X, SVI(free_bits=b, steps=1500), seed=0) for b in (0.25, 0.0))

    def idle(posterior):
        p = posterior.extra["guide_params"]
        mean, s = p["a"][1] * X, p["s"][1]
        return float((0.5 * (mean**2 + s**2 - 1) - s.log()).mean())

    assert idle(plain) < 0.01 and 0.05 < idle(free) <= 0.3


def test_batches_speak_for_all_rows():
    """The weight of the rows multiplies likelihood and divergence alike."""
    problem = prepare(Effects(), X, seed=0)
    with problem.scope(0):
        part = PairTarget(problem, 1, 2, "eager", 1, Weights(2.0))
        leaves = part.start()
        torch.manual_seed(0)
        batches = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])]
        values = [torch.stack([weighted_elbo(part, leaves, b, 2.0)[0] for _ in range(500)]).mean() for b in batches]
        whole = torch.stack([weighted_elbo(part, leaves, None, 2.0)[0] for _ in range(1500)])
    assert abs(float(torch.stack(values).mean() - whole.mean())) < 6 * float(whole.std()) / math.sqrt(500)


# -- several draws inside the logarithm --------------------------------------------------------------------------------


def test_the_bound_rises_with_its_draws_to_the_evidence():
    """ELBO <= IWAE(2) <= IWAE(20) <= IWAE(400) <= log p(x), which is known: catches a mean outside the logarithm."""
    target, problem = target_of(Effects())
    evidence = float(torch.distributions.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X).sum())
    with problem.scope(0), torch.no_grad():
        leaves = {n: v + 0.2 for n, v in target.start().items()}
        weights = torch.stack([row_weights(target, leaves, None) for _ in range(8000)])
        means = [float(torch.stack([bound(w, 0.0) for w in weights.split(k)]).mean()) for k in (1, 2, 20, 400)]
        assert means[0] < means[1] < means[2] < means[3] < evidence + 0.05
        assert abs(means[0] - float(weights.mean(0).sum())) < 1e-9
        between = float(torch.stack([bound(w, 0.5) for w in weights.split(20)]).mean())
    assert means[0] < between < means[2]
    assert abs(means[3] - evidence) < 0.3


@pytest.mark.parametrize("objective", ["iwae", "renyi"])
def test_tighter_bounds_find_the_same_posterior(objective):
    """Where the guide can be the posterior, every bound reaches the evidence; and it runs as a graph.

    The importance-weighted bound says little about the guide (Rainforth et al., *Tighter variational bounds are not necessarily
    better*, ICML 2018): only the other is held against the posterior.
    """
    posterior = fit(Effects(), X, SVI(objective=objective, particles=8, steps=2000), seed=0)
    assert posterior.diagnostics["mode"] == recorded_mode(posterior), posterior.diagnostics["reason"]
    evidence = float(torch.distributions.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(X).sum())
    assert abs(sum(posterior.history[-200:]) / 200 - evidence) < 0.3
    if objective == "renyi":
        m = posterior.extra["guide_params"]["m"]
        torch.testing.assert_close(m, X / NOISE**2 / (1 + 1 / NOISE**2), atol=0.03, rtol=0.0)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_gradients_of_the_bound_follow_its_draws(mode):
    """Under one seed the bound is a smooth function of the parameters: its gradient equals differences."""
    problem = prepare(Effects(), X, seed=0)
    with problem.scope(0):
        target = PairTarget(problem, 5, None, mode, 1, PLAIN, 0.0)
        leaves = {"m": torch.linspace(-1, 1, 6), "s": torch.linspace(-1.0, 0.2, 6)}
        assert target.mode == mode

        def value(shift, name):
            torch.manual_seed(5)
            moved = {n: v + shift if n == name else v for n, v in leaves.items()}
            return target.objective(moved)

        for name in leaves:
            _, slopes = value(torch.zeros(6), name)
            for i in range(6):
                step = 1e-5 * torch.eye(6)[i]
                expected = float(value(step, name)[0] - value(-step, name)[0]) / 2e-5
                assert math.isclose(float(slopes[name][i]), expected, rel_tol=1e-6, abs_tol=1e-7)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_a_step_averages_inside_the_logarithm(mode):
    """Far from the posterior the step's value is that of the bound, well above the ELBO; in batches it speaks for all rows."""
    problem = prepare(Effects(), X, seed=0)
    with problem.scope(0):
        target = PairTarget(problem, 20, 3, mode, 1, PLAIN, 0.0)
        leaves = target.start()
        steps = torch.stack([target.objective(leaves)[0] for _ in range(400 if mode == "graph" else 60)])
        with torch.no_grad():
            weights = torch.stack([row_weights(target, leaves, None) for _ in range(4000)])
        expected = torch.stack([bound(w, 0.0) for w in weights.split(20)])
        elbo = float(weights.mean(0).sum())
    error = 4 * math.sqrt(float(steps.var()) / len(steps) + float(expected.var()) / len(expected))
    assert target.mode == mode and abs(float(steps.mean() - expected.mean())) < error
    assert float(expected.mean()) > elbo + 1.0 and float(steps.mean()) > elbo + 0.5


def test_shared_latents_have_no_bound_by_row():
    class Shared(Effects):
        def model(self, x):
            m = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(m, 1.0), obs=x)

        def guide(self, x):
            m = pyro.param("m", torch.tensor(0.0))
            pyro.sample("mu", dist.Normal(m, 1.0))

    with pytest.raises(ValueError, match="'mu', which rows share"):
        fit(Shared(), X, SVI(objective="iwae"), seed=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"beta": True}, "beta"),
        ({"beta": (0.0, 1.0)}, "steps"),
        ({"beta": (0.0, 0.0, 10)}, "positive"),
        ({"beta": (0.0, 1.0, 2.5)}, "steps"),
        ({"free_bits": -0.1}, "free_bits"),
        ({"objective": "elbow"}, "objective"),
        ({"objective": "iwae", "particles": 1}, "at least 2"),
        ({"objective": "renyi", "alpha": -1.0}, "alpha"),
        ({"objective": "iwae", "beta": 2.0}, "beta"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        SVI(**options)


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(ValueError, match="own guide"):
        fit(Effects(), X, SVI(guide="mean_field", beta=2.0), seed=0)

    class Heavy(Effects):
        def model(self, x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))
                pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    with pytest.raises(ValueError, match="closed form"):
        fit(Heavy(), X, SVI(free_bits=0.1, mode="eager", steps=20), seed=0)
