"""A story's own guide under SVI: against EM, Pyro's ELBO and closed forms, and guides that do not fit their story."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from stories import recorded_mode
from test_svi import CLUSTERS, Clusters, local_story, two_clusters
from torch.distributions import constraints

from inference import EM, SVI, fit
from inference.methods.paired import PairTarget
from inference.problem import prepare
from inference.session import isolated


def amortised(x):
    slope = pyro.param("slope", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def test_story_guide_finds_separated_clusters():
    """z is summed out beside the guide; the answer is EM's."""
    p = fit(Clusters(), CLUSTERS, SVI(), seed=0)
    em = fit(Clusters(), CLUSTERS, EM(), seed=0)
    assert p.diagnostics["guide"] == "story" and p.diagnostics["mode"] == recorded_mode(p)
    assert (p.draws["mu"].mean(0) - em.draws["mu"][0]).abs().max() < 0.1
    assert (p.draws["mu"].std(0) * math.sqrt(40) - 1).abs().max() < 0.25
    assert p.local("z").argmax(1).reshape(2, 40).double().mean(1).sort().values.tolist() == [0.0, 1.0]


@pytest.mark.processor
@pytest.mark.parametrize("size", [None, 20])
def test_the_elbo_is_pyros(size):
    """Mean over many draws of our ELBO and of TraceEnum_ELBO at the same parameters, on all rows and on a batch."""
    with isolated(0, torch.float64):
        problem = prepare(Clusters(), CLUSTERS, seed=0)
        target = PairTarget(problem, 1, size)
        leaves = target.start() | {"mu.loc": torch.tensor([-4.0, 4.0])}
        rows = None if size is None else torch.arange(30, 50)
        ours = torch.stack([target.log_ratio(leaves, rows)[0] for _ in range(300)]).detach()
        values = target.constrained(leaves)
        x, weight = (CLUSTERS, 1.0) if rows is None else (CLUSTERS[rows], 4.0)

        def model(x):
            values_pi = pyro.sample("pi", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("components", 2):
                mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Categorical(values_pi), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

        def guide(x):
            pyro.sample("pi", dist.Dirichlet(values["pi.concentration"]))
            with pyro.plate("components", 2):
                pyro.sample("mu", dist.Normal(values["mu.loc"], values["mu.scale"]))

        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        pyros = torch.tensor([-elbo.loss(model, guide, x) for _ in range(300)])
    error = math.sqrt((ours.var() + pyros.var()) / 300)
    assert abs(ours.mean() - pyros.mean()) < 4 * error


def test_amortised_guide_of_local_latents():
    """slope -> 1/2 and scale -> sqrt(1/2); rows are judged one by one, so that k-hat does not grow with N."""
    x = 2 * torch.randn(200, generator=torch.Generator().manual_seed(4)).double()
    p = fit(local_story, x, SVI(batch_size=50), guide=amortised, seed=0)
    learned = p.extra["guide_params"]
    assert abs(learned["slope"] - 0.5) < 0.05 and abs(learned["scale"] - math.sqrt(0.5)) < 0.05
    assert p.draws["z"].shape == (1000, 200) and not p.warnings
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum()
    assert evidence - 1.0 < p.diagnostics["elbo"] < evidence + 4 * p.diagnostics["elbo_error"] + 1e-6


def test_guide_that_enumerates_a_finite_latent():
    """q(z | x) by a table of logits: TraceEnum_ELBO serves, and the responsibilities come out."""

    def story(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x), 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits))

    x = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)
    p = fit(story, x, SVI(guide="story", starts=1, steps=600, lr=0.05), guide=guide, seed=0)
    likelihood = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(x[:, None]) + torch.tensor([0.3, 0.7]).log()
    torch.testing.assert_close(
        p.extra["guide_params"]["logits"].softmax(-1), likelihood.softmax(-1).double(), atol=0.02, rtol=0
    )


def lacking(x):
    a = pyro.param("a", torch.ones(2), constraint=constraints.positive)
    pyro.sample("pi", dist.Dirichlet(a))


def foreign(x):
    Clusters().guide(x)
    pyro.sample("nu", dist.Normal(pyro.param("nu.loc", torch.tensor(0.0)), 1.0))


def misshapen(x):
    pyro.sample("pi", dist.Dirichlet(pyro.param("a", torch.ones(2), constraint=constraints.positive)))
    pyro.sample("mu", dist.Normal(pyro.param("m", torch.zeros(3)), 1.0).to_event(1))


def observing(x):
    Clusters().guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (lacking, "lacks the latent 'mu'"),
        (foreign, "samples 'nu'"),
        (misshapen, "'mu' the shape"),
        (observing, "observes"),
    ],
)
def test_guides_that_do_not_fit_are_refused(guide, words, untouched):
    """Pyro warns at most, and its loss is then no ELBO."""
    with pytest.raises(ValueError, match=words):
        fit(two_clusters, CLUSTERS, SVI(), guide=guide, seed=0)
