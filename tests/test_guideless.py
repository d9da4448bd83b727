"""Stories that learn networks and leave nothing to guess: maximum likelihood through SVI, without a guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import recorded_mode
from torch import nn

from inference import SVI, fit, inspect
from inference.choose import NoMethodError


class Curve(nn.Module):
    """y_n ~ Normal(network(x_n), 0.1): no latent."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 1, dtype=torch.float64)
        self.seen = 0

    def model(self, x, y):
        pyro.module("network", self.network)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(self.network(x).squeeze(-1), 0.1), obs=y)

    def initialise(self, x, y):
        """Called once, with all rows."""
        self.seen += 1
        assert x.shape == (200, 2) and y.shape == (200,) and not torch.is_grad_enabled()
        self.network.bias.fill_(3.0)


class Switch(nn.Module):
    """One of two networks, which one is not seen: a finite latent."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Linear(1, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.slopes.weight.copy_(torch.tensor([[-0.5], [0.5]]))

    def model(self, x, y):
        pyro.module("slopes", self.slopes)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64)))
            loc = torch.where(z == 0, self.slopes(x)[:, 0], self.slopes(x)[:, 1])
            return pyro.sample("y", dist.Normal(loc, 0.2), obs=y)


class Hidden(Curve):
    """A continuous latent that somebody has to guess."""

    def model(self, x, y):
        pyro.module("network", self.network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            return pyro.sample("y", dist.Normal(self.network(z).squeeze(-1), 0.1), obs=y)


def line():
    x = torch.randn(200, 2, dtype=torch.float64)
    return x, x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5 + 0.1 * torch.randn(200, dtype=torch.float64)


def test_regression_is_least_squares(untouched):
    """A gradient that misses a weight, or a kind that promises a posterior: the maximum is known in closed form."""
    with torch.random.fork_rng():
        x, y = line()
        story = Curve()
        posterior = fit(story, (x, y), SVI(steps=2000, lr=0.2), seed=0, progress=False)
        design = torch.cat((x, torch.ones(200, 1, dtype=torch.float64)), 1)
        best = torch.linalg.lstsq(design, y).solution
        torch.testing.assert_close(
            posterior.problem.story.network.weight[0].detach(), best[:2], rtol=0, atol=1e-3, check_dtype=False
        )
        density = dist.Normal(design @ best, 0.1).log_prob(y)
        assert posterior.kind == "point" and posterior.diagnostics["mode"] == recorded_mode(posterior)
        assert posterior.diagnostics["elbo"] == pytest.approx(float(density.sum()), abs=1e-3)
        torch.testing.assert_close(posterior.log_prob(), density, rtol=0, atol=0.05)
        assert "no latent to guess" in posterior.why()
        text = f"{posterior}\n{posterior.summary()}"
        assert "network is a network of 3 weights" in text and "log-likelihood" in text and "$$$" not in text


def test_a_story_is_initialised_once_and_only_its_copy():
    """A start from weights that the data did not set; the user's own story set by a fit."""
    x, y = line()
    story = Curve()
    posterior = fit(story, (x, y), SVI(steps=1, lr=1e-6), seed=0, progress=False)
    assert posterior.problem.story.seen == 1 and story.seen == 0
    assert posterior.problem.story.network.bias.item() == pytest.approx(3.0, abs=1e-3)
    assert story.network.bias.item() != pytest.approx(3.0, abs=1e-3)


def test_finite_latents_are_summed_out():
    """log sum_z p(y, z) by hand; the labels of the rows come back."""
    x = torch.randn(300, 1, dtype=torch.float64)
    z = torch.randint(2, (300,))
    slopes = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    y = x[:, 0] * slopes[z] + 0.2 * torch.randn(300, dtype=torch.float64)
    posterior = fit(Switch(), (x, y), SVI(steps=800, lr=0.2), seed=0, progress=False)
    assert "z summed out" in posterior.why()
    found = posterior.problem.story.slopes.weight[:, 0].detach()
    torch.testing.assert_close(found, slopes, rtol=0, atol=0.06)
    each = dist.Normal(x * found, 0.2).log_prob(y[:, None]) + torch.tensor(0.5).log()
    torch.testing.assert_close(posterior.log_prob(), each.logsumexp(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.local("z"), each.softmax(1), rtol=1e-6, atol=1e-6)


def test_continuous_latents_still_need_a_guide():
    """An empty guide where there is something to guess would be no ELBO."""
    x, y = line()
    assert not inspect(Hidden(), (x, y)).guideless
    with pytest.raises(NoMethodError, match="has no guide; give it a `guide`"):
        fit(Hidden(), (x, y), SVI(), seed=0, progress=False)
