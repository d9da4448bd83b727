"""Simulation-based calibration: over data from the prior, the truth's rank among posterior draws is uniform.

Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration* (2018). The log likelihood is one
of the quantities: ranks of parameters alone cannot tell a posterior from the prior (Modrak et al., 2023).
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

from inference import NUTS, fit

SIMULATIONS, DRAWS = 300, 99


def conjugate(x):
    """Normal with unknown mean and precision."""
    precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0 / precision.sqrt()))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0 / precision.sqrt()), obs=x)


def mixture(x):
    """Two ordered components, which are summed out."""
    share = pyro.sample("share", dist.Beta(3.0, 3.0))
    low = pyro.sample("low", dist.Normal(-1.0, 1.0))
    gap = pyro.sample("gap", dist.Gamma(4.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(low + gap * z, 0.6), obs=x)


def likelihood(story, x, names, values):
    """log p(x | values), finite latents summed out."""
    from inference.joint import LogJoint
    from inference.problem import prepare

    problem = prepare(story, x, seed=0)
    with problem.scope(0):
        joint = LogJoint(problem)
        return np.array(
            [float(joint.rows({n: values[n][i] for n in names}).sum()) for i in range(len(values[names[0]]))]
        )


def ranks(story, rows, names):
    """Rank of the truth among thinned posterior draws, for every latent and the log likelihood: (simulations, names + 1)."""
    found = []
    for s in range(SIMULATIONS):
        with torch.random.fork_rng():
            torch.manual_seed(1000 + s)
            trace = poutine.trace(poutine.uncondition(story)).get_trace(torch.zeros(rows))
        truth = {n: trace.nodes[n]["value"].double() for n in names}
        x = trace.nodes["x"]["value"].double()
        posterior = fit(story, x, NUTS(chains=2, warmup=400, draws=1000), seed=s)
        at = np.linspace(0, posterior.num_draws - 1, DRAWS).round().astype(int)
        draws = {n: posterior.draws[n][at] for n in names}
        one = likelihood(story, x, names, {n: v[None] for n, v in truth.items()})[0]
        many = likelihood(story, x, names, draws)
        found.append([*[float((draws[n] < truth[n]).sum()) for n in names], float((many < one).sum())])
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("story", "rows", "names"),
    [(conjugate, 8, ["precision", "mu"]), (mixture, 25, ["share", "low", "gap"])],
    ids=["conjugate", "mixture"],
)
def test_ranks_are_uniform(story, rows, names):
    table = ranks(story, rows, names)
    p = []
    for column in table.T:
        counts = np.histogram(column, bins=20, range=(-0.5, DRAWS + 0.5))[0]
        p.append(stats.chisquare(counts).pvalue)
    assert min(p) * len(p) > 1e-3, p
