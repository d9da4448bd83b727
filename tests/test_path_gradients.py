"""SVI(gradient="path"): the same mean as the total gradient, and no noise where the guide is the posterior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import recorded_mode

from inference import SVI, Amortised, fit
from inference.methods.paired import PairTarget
from inference.problem import prepare


def story(x=None, num_data=4):
    """z ~ N(0, 1), x ~ N(z, 1), whose posterior is N(x / 2, 1 / 2)."""
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shift = pyro.param("shift", torch.tensor(0.0))
        return pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)


def guide(x=None, num_data=4):
    slope = pyro.param("slope", torch.tensor(0.5))
    offset = pyro.param("offset", torch.tensor(0.0))
    raw = pyro.param("raw", torch.tensor(0.5).log() / 2)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + offset, raw.exp()))


X = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def gradients(path, alpha=None, particles=1, count=4000, mode="auto", **moved):
    """Draws of the gradient of every parameter, (count,) each."""
    problem = prepare(story, X, guide=guide, seed=0)
    with problem.scope(0):
        target = PairTarget(problem, particles, None, mode, 1, alpha=alpha, path=path)
        leaves = target.start()
        leaves |= {n: leaves[n] + v for n, v in moved.items()}
        found = [target.objective(leaves)[1] for _ in range(count)]
    return {n: torch.stack([f[n] for f in found]) for n in leaves}


def test_no_noise_at_the_posterior():
    """Catches log q whose parameters are still followed: the total gradient keeps its noise there."""
    total, path = gradients(False, count=50), gradients(True, count=50)
    for name in ("slope", "raw"):
        assert float(path[name].abs().max()) < 1e-12
        assert float(total[name].std()) > 0.3


@pytest.mark.parametrize(("alpha", "particles"), [(None, 1), (0.0, 5)])
def test_same_mean_as_the_total_gradient(alpha, particles):
    """Catches a part of the gradient that is lost, and shares that are not squared for the guide alone."""
    moved = {"slope": -0.2, "raw": 0.3, "shift": 0.4}
    total, path = (gradients(p, alpha, particles, **moved) for p in (False, True))
    for name in total:
        error = ((total[name].var() + path[name].var()) / len(total[name])).sqrt()
        assert abs(float(total[name].mean() - path[name].mean())) < 4 * float(error)


def test_doubly_reparameterised_gradient_keeps_its_signal():
    """Catches plain shares: with 50 draws the total gradient of the guide is nearly all noise."""
    moved = {"slope": -0.2, "raw": 0.3}
    total, path = (gradients(p, 0.0, 50, 300, **moved)["raw"] for p in (False, True))
    assert float(path.std() / path.mean().abs()) < 0.5 * float(total.std() / total.mean().abs())


def test_graph_and_program_agree():
    """Catches a graph in which stopped parameters run again."""
    for alpha, particles in ((None, 1), (0.0, 4)):
        graph, eager = (
            gradients(True, alpha, particles, 3, mode, slope=-0.2, shift=0.4) for mode in ("graph", "eager")
        )
        if alpha is None:
            for name in graph:
                torch.testing.assert_close(graph[name], eager[name])
        else:
            assert all(bool(g.isfinite().all()) for g in graph.values())


def test_through_fit_and_its_mistakes():
    posterior = fit(story, X, SVI(gradient="path", steps=800, starts=1), guide=guide, seed=0)
    exact = torch.distributions.Normal(X.mean(), 2**0.5)
    assert posterior.diagnostics["elbo"] == pytest.approx(float(exact.log_prob(X).sum()), abs=1e-3)
    with pytest.raises(ValueError, match="gradient='path'"):
        SVI(gradient="path", free_bits=0.1)
    with pytest.raises(ValueError, match="gradient='path'"):
        SVI(gradient="path", objective="renyi", particles=4)
    with pytest.raises(ValueError, match="story's own"):
        fit(story, X, SVI(gradient="path", guide="mean_field"), seed=0)
    found = fit(story, X, SVI(guide=Amortised((8,)), gradient="path", objective="iwae", steps=60, starts=1), seed=0)
    assert found.diagnostics["mode"] == recorded_mode(found)
