"""Divergences in a closed form, weighed, annealed and partly free: against algebra on normal stories."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from inference import SVI, fit
from inference.methods.paired import PairTarget
from inference.methods.weighted import Weights, weighted_elbo
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
    assert posterior.diagnostics["mode"] == "graph" and posterior.diagnostics["steps"] > 300
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
