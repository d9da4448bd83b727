"""SVI(guide="flow"): log densities against autograd's Jacobian, and bent posteriors against quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference import SVI, fit
from inference.methods.flow_guide import FLOW, push, start_flow


def bent(size, seed=0):
    """Leaves away from their start."""
    torch.manual_seed(seed)
    scale = torch.rand(size, dtype=torch.float64) + 0.5
    q = start_flow(torch.randn(size, dtype=torch.float64), scale, None)
    return {n: v + 0.3 * torch.randn_like(v) for n, v in q.items()}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_log_density_is_that_of_the_jacobian(size):
    """Catches a wrong log-determinant, and an entry that reads itself or a later one."""
    q = bent(size)
    noise = torch.randn(4, size, dtype=torch.float64)
    _, log_q = push(q, noise)
    for row, value in zip(noise, log_q, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda e: push(q, e[None])[0][0], row)
        exact = stats.norm.logpdf(row.numpy()).sum() - float(torch.linalg.slogdet(jacobian)[1])
        assert float(value) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("factor", [None, torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)])
def test_starts_as_the_full_rank_normal(factor):
    """Catches layers that bend before the first step."""
    loc, scale = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    found = FLOW.place(start_flow(loc, scale, factor), torch.randn(50, 2, dtype=torch.float64))
    tril = torch.diag(scale) if factor is None else factor
    normal = torch.distributions.MultivariateNormal(loc, scale_tril=tril)
    torch.testing.assert_close(found.log_q, normal.log_prob(found.z))


def test_gradient_is_that_of_the_elbo():
    """Catches a sign, or a path that is followed twice: against autograd of the whole estimate."""
    q, noise = bent(3), torch.randn(6, 3, dtype=torch.float64)
    log_p = lambda z: -(z**4).sum(-1) / 4 + z[:, 0] * z[:, 1]  # noqa: E731
    draws = FLOW.place(q, noise)
    z = draws.z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_p(z).sum(), z)
    found = FLOW.gradients(q, draws, slope)
    free = {n: v.clone().requires_grad_() for n, v in q.items()}
    z, log_q = push(free, noise)
    exact = torch.autograd.grad(
        (log_p(z) - log_q).mean(), list(free.values()), allow_unused=True, materialize_grads=True
    )
    for (name, value), expected in zip(found.items(), exact, strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def banana(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    return pyro.sample("x", dist.Normal(b + a**2, 0.2), obs=x)


def skewed(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("x", dist.Exponential(pyro.sample("rate", dist.LogNormal(0.0, 2.0))), obs=x)


def evidence_of_banana(x):
    g = np.linspace(-5, 5, 2001)
    a, b = np.meshgrid(g, g, indexing="ij")
    joint = stats.norm.pdf(a) * stats.norm.pdf(b) * stats.norm.pdf(x, b + a**2, 0.2)
    total = joint.sum() * (g[1] - g[0]) ** 2
    return math.log(total), math.sqrt((joint * a**2).sum() / joint.sum())


def test_a_bent_posterior_is_followed():
    """The best Gaussian loses a good part of a nat; catches a flow that never bends."""
    x = torch.tensor(1.0)
    evidence, sd = evidence_of_banana(1.0)
    plain = fit(banana, x, SVI(guide="full_rank", steps=2000), seed=0)
    flow = fit(banana, x, SVI(guide="flow", steps=3000, starts=1), seed=0)
    assert plain.diagnostics["elbo"] < evidence - 0.3
    assert evidence - 0.08 < flow.diagnostics["elbo"] < evidence + 4 * flow.diagnostics["elbo_error"]
    assert abs(float(flow.draws["a"].std()) / sd - 1) < 0.1
    assert flow.diagnostics["khat"] < 0.7


def test_one_skewed_unknown():
    """With one unknown there is nothing to read before it: the entry itself has to bend."""
    x = torch.tensor([0.7])
    u = np.linspace(-12, 8, 20001)
    joint = stats.norm.pdf(u, 0, 2) * stats.expon.pdf(0.7, scale=np.exp(-u))
    evidence = math.log(joint.sum() * (u[1] - u[0]))
    flow = fit(skewed, x, SVI(guide="flow", steps=1500, starts=1), seed=0)
    plain = fit(skewed, x, SVI(guide="full_rank", steps=1500, starts=1), seed=0)
    assert evidence - flow.diagnostics["elbo"] < 0.3 * (evidence - plain.diagnostics["elbo"])
