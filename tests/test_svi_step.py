"""Every form of a training step computes the same loss and gradient, redraws its noise, and says why it was chosen."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from inference import SVI, fit
from inference.methods import svi_step
from inference.methods.ascent import Ascent, scheduled
from inference.methods.paired import PairTarget
from inference.problem import prepare
from inference.session import isolated

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class SmallVAE(nn.Module):
    """Encoder and decoder of one layer."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x=None, num_data=60):
        pyro.module("dec", self.dec)
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dec(z), 1.0).to_event(1), obs=x)

    def guide(self, x=None, num_data=60):
        pyro.module("enc", self.enc)
        with pyro.plate("data", len(x)):
            h = self.enc(x)
            pyro.sample("z", dist.Normal(h[:, :2], h[:, 2:].exp()).to_event(1))


def small_vae():
    with isolated(0, torch.float64):
        return SmallVAE()


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("size", [None, 20])
def test_the_graph_is_the_program(particles, size):
    """Loss and every gradient of the recorded step, averaged over seeds, against the program's; catches frozen noise."""
    story = small_vae()
    with isolated(0, torch.float64):
        graph = PairTarget(prepare(story, X, seed=0), particles, size, "graph")
        eager = PairTarget(prepare(story, X, seed=0), particles, size, "eager")
        assert graph.mode == "graph" and eager.mode == "eager" and "asked" in eager.reason
        leaves = graph.start()
        rows = () if size is None else (torch.arange(20),)
        if particles == 1:
            for seed in range(3):
                with isolated(seed, torch.float64):
                    a = graph.call(*leaves.values(), *rows)
                with isolated(seed, torch.float64):
                    b = eager.call(*leaves.values(), *rows)
                for one, other in zip(a, b, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        values = {float(graph.call(*leaves.values(), *rows)[0]) for _ in range(5)}
        assert len(values) == 5


def test_modes_agree_over_a_whole_fit():
    """The same seed walks the same path recorded or not."""
    runs = [
        fit(small_vae(), X, SVI(steps=30, particles=1, starts=1, batch_size=20, draws=50, mode=m), seed=1)
        for m in ("graph", "eager")
    ]
    assert [r.diagnostics["mode"] for r in runs] == ["graph", "eager"]
    assert max(abs(a - b) for a, b in zip(runs[0].history, runs[1].history, strict=True)) < 1e-6


def test_without_a_compiler_the_graph_serves(monkeypatch):
    """The reason names the compiler."""
    monkeypatch.setattr(svi_step, "has_compiler", lambda: False)
    p = fit(small_vae(), X, SVI(steps=10, starts=1, draws=50, mode="inductor"), seed=1)
    assert p.diagnostics["mode"] == "graph" and "C++ compiler" in p.diagnostics["reason"]


def test_control_flow_on_values_is_said():
    """A guide that looks at a draw cannot be recorded: it runs eagerly and says so."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        if float(loc.detach()) > 100:
            loc = loc * 2
        pyro.sample("mu", dist.Normal(loc, scale))

    p = fit(model, X[:, 0], SVI(steps=10, starts=1, draws=50), guide=guide, seed=1)
    assert p.diagnostics["mode"] == "eager" and p.diagnostics["reason"]


@pytest.mark.slow
@pytest.mark.skipif(not svi_step.has_compiler(), reason="no C++ compiler")
def test_inductor_is_the_graph():
    """A compiled step gives the graph's history under one seed."""
    runs = [
        fit(small_vae(), X, SVI(steps=20, particles=1, starts=1, draws=50, mode=m), seed=1)
        for m in ("graph", "inductor")
    ]
    assert runs[1].diagnostics["mode"] == "inductor", runs[1].diagnostics["reason"]
    assert max(abs(a - b) for a, b in zip(runs[0].history, runs[1].history, strict=True)) < 1e-6


def test_unknown_mode_is_refused():
    """The valid values are listed."""
    with pytest.raises(ValueError, match="'inductor'"):
        SVI(mode="jit")


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_every_schedule_takes_all_its_steps_to_the_posterior(schedule):
    """A conjugate normal mean: its posterior mean within 0.2 posterior standard deviations; no early end."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    precision = len(X) + 0.01
    p = fit(model, X[:, 0], SVI(steps=400, starts=1, schedule=schedule, clip=50.0), seed=0)
    assert len(p.history) == 400
    assert abs(float(p.draws["mu"].mean() - X[:, 0].sum() / precision)) < 0.2 / precision**0.5


def test_schedules_start_peak_and_end_where_they_say():
    """Cosine is half way down in the middle, one-cycle peaks at 30 %, both end at zero."""
    assert scheduled("cosine", 500, 1000) == pytest.approx(0.5)
    assert scheduled("one_cycle", 0, 1000) == pytest.approx(0.04)
    assert scheduled("one_cycle", 300, 1000) == pytest.approx(1.0)
    for schedule in ("cosine", "one_cycle"):
        assert scheduled(schedule, 1000, 1000) == pytest.approx(0.0)
    assert scheduled("constant", 999, 1000) == 1.0


def test_clip_bounds_what_reaches_the_optimiser():
    """The norm of the gradient that Adam sees is the clip's, where the raw one is longer."""
    with isolated(0, torch.float64):
        target = PairTarget(prepare(small_vae(), X, seed=0), 1, None, "graph")
        ascent = Ascent(target, target.start(), 0.01, 10, 1e-5, 2, clip=0.5)
        ascent.step()
        norm = sum(float((p.grad**2).sum()) for p in ascent.parameters) ** 0.5
    assert norm == pytest.approx(0.5, rel=1e-6)
