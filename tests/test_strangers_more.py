"""More stories of strangers: what went wrong with kinds that people bring, held so that it stays mended."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference import EM, NUTS, fit


def rng(seed=0):
    return np.random.default_rng(seed)


def caught_animals(caught, visits=5):
    psi, p = pyro.sample("psi", dist.Beta(1.0, 1.0)), pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("animals", len(caught)):
        z = pyro.sample("z", dist.Bernoulli(psi))
        pyro.sample("caught", dist.Binomial(visits, z * p), obs=caught)


def test_trials_whose_probability_hangs_on_a_summed_out_latent():
    """Capture-recapture: EM ended in PyTorch's words, since the states of z spread the number of trials as well."""
    generator = rng(2)
    caught = np.r_[generator.binomial(5, 0.3, 90), np.zeros(60)]
    found = fit(caught_animals, caught, EM(restarts=2), seed=0)
    psi, p = (float(found.draws[n][0]) for n in ("psi", "p"))

    def density(psi, p):
        return np.log(psi * stats.binom.pmf(caught, 5, p) + (1 - psi) * (caught == 0)).sum()

    grid = max(density(a, b) for a in np.linspace(0.4, 0.8, 81) for b in np.linspace(0.2, 0.4, 81))
    assert density(psi, p) > grid - 1e-6
    exact = psi * 0.7**0 * stats.binom.pmf(0, 5, p) / (psi * stats.binom.pmf(0, 5, p) + 1 - psi)
    assert float(found.local("z")[-1, 1]) == pytest.approx(exact, abs=1e-9)


def answers(person, item, right=None):
    with pyro.plate("persons", int(person.max()) + 1):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("items", int(item.max()) + 1):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", len(person)):
        return pyro.sample("right", dist.Bernoulli(logits=theta[person] - b[item]), obs=right)


def test_rows_that_name_fewer_groups_are_answered():
    """Groups counted in the data: three rows know fewer persons, and every question about them was refused."""
    person, item = (v.ravel() for v in np.meshgrid(np.arange(12), np.arange(6), indexing="ij"))
    right = (rng(1).random(72) < 0.6).astype(float)
    found = fit(answers, (person, item, right), NUTS(chains=1, warmup=100, draws=100), seed=0)
    few = [3, 40, 17]
    torch.testing.assert_close(found.log_prob((person[few], item[few], right[few])), found.log_prob()[few])
    assert found.predict({"person": person[few], "item": item[few]})["right"].shape == (200, 3)
    assert found.sample(5)["right"].shape == (5,)
    for bad in (np.array([3, 12, 1]), np.array([3, -1, 1])):
        with pytest.raises(ValueError, match=r"'theta' has shape|out of"):
            found.log_prob((bad, item[few], right[few]))


def test_states_that_are_counted_in_the_rows_are_told():
    """A switch point has as many states as rows: of three rows nothing is known, in the story's words."""

    def change(y):
        n = len(y)
        s = pyro.sample("s", dist.Categorical(torch.ones(n) / n))
        early, late = pyro.sample("early", dist.Gamma(2.0, 0.5)), pyro.sample("late", dist.Gamma(2.0, 0.5))
        with pyro.plate("time", n):
            pyro.sample("y", dist.Poisson(torch.where(torch.arange(n) < s, early, late)), obs=y)

    y = torch.tensor([5.0, 4, 6, 5, 3, 1, 0, 2, 1, 1, 0, 1])
    found = fit(change, y, EM(restarts=1), seed=0)
    with pytest.raises(ValueError, match=r"'s' has 12 states .* gives it 3 for 3 rows"):
        found.log_prob(y[:3])
