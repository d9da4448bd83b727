"""Guides with draws that have no gradient: score functions whose baseline is the other draws."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference import SVI, fit
from inference.methods.paired import PairTarget
from inference.problem import prepare

X = torch.tensor([3.0, 9.0, 1.0], dtype=torch.float64)


def story(x=None, num_data=3):
    """A count that nobody sees, and a noisy look at it; one count is shared by all rows."""
    base = pyro.sample("base", dist.Poisson(2.0))
    with pyro.plate("data", num_data if x is None else len(x)):
        n = pyro.sample("n", dist.Poisson(3.0))
        return pyro.sample("x", dist.Normal(n + base, 1.0), obs=x)


def guide(x=None, num_data=3):
    base = pyro.param("base_rate", torch.tensor(2.5), constraint=dist.constraints.positive)
    pyro.sample("base", dist.Poisson(base))
    with pyro.plate("data", len(x)):
        rates = pyro.param("rates", torch.tensor([2.0, 5.0, 1.5]), constraint=dist.constraints.positive)
        pyro.sample("n", dist.Poisson(rates))


def exact_gradient(base, rates):
    """Of the ELBO by enumeration up to 40, with respect to the unconstrained (log) rates."""
    n = np.arange(41)

    def elbo(base, rates):
        q = stats.poisson.pmf(n, base)
        total = (q * (stats.poisson.logpmf(n, 2.0) - stats.poisson.logpmf(n, base))).sum()
        for x, rate in zip(X.numpy(), rates, strict=True):
            own = stats.poisson.pmf(n, rate)
            total += (own * (stats.poisson.logpmf(n, 3.0) - stats.poisson.logpmf(n, rate))).sum()
            total += (own[:, None] * q[None] * stats.norm.logpdf(x, n[:, None] + n[None], 1.0)).sum()
        return total

    step, found = 1e-5, []
    for i in range(4):
        ends = []
        for sign in (1, -1):
            u = np.log([base, *rates])
            u[i] += sign * step
            ends.append(elbo(math.exp(u[0]), np.exp(u[1:])))
        found.append((ends[0] - ends[1]) / (2 * step))
    return np.array(found)


def gradients(count, plain=False):
    problem = prepare(story, X, guide=guide, seed=0)
    with problem.scope(0):
        target = PairTarget(problem, 8, None)
        if plain:
            target.call, target.lanes = target.by_score, False
        leaves = target.start()
        found = [target.objective(leaves)[1] for _ in range(count)]
    return np.array([[float(f["base_rate"]), *f["rates"].tolist()] for f in found])


def test_mean_is_the_exact_gradient():
    """Catches a baseline that depends on its own draw, and a cost that leaves out a term."""
    found = gradients(400)
    error = found.std(0) / math.sqrt(len(found))
    assert (np.abs(found.mean(0) - exact_gradient(2.5, [2.0, 5.0, 1.5])) < 4 * error).all()


def test_noise_is_below_that_without_a_baseline():
    """Catches a baseline that is not used, and rows that are held against the cost of all."""
    share = gradients(100).std(0) / gradients(100, plain=True).std(0)
    assert share.mean() < 0.85


@pytest.mark.parametrize("batch_size", [None, 2])
def test_fit_finds_the_best_counts(batch_size):
    """Catches a gradient that points elsewhere: the fitted rates' exact gradient is near zero."""
    method = SVI(steps=600, particles=4, starts=1, batch_size=batch_size, schedule="cosine")
    posterior = fit(story, X, method, guide=guide, seed=0)
    assert posterior.draws["n"].shape == (1000, 3) and posterior.local("n").shape == (1000, 3)
    assert "base" in repr(posterior) and posterior.sample(5)["x"].shape == (5,)
    with pytest.raises(ValueError, match="infinitely many states"):
        posterior.log_prob()
    found = {n: v.double().numpy() for n, v in posterior.extra["guide_params"].items()}
    slope = exact_gradient(float(found["base_rate"]), found["rates"])
    begin = exact_gradient(2.5, [2.0, 5.0, 1.5])
    assert np.abs(slope).max() < 0.1 * np.abs(begin).max()
