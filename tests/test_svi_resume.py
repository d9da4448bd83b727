"""SVI that is interrupted, stopped early or averaged."""

from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from inference import SVI, Amortised, fit
from inference.distributed import ALONE
from inference.methods.ascent import Ascent
from inference.methods.climb_file import ClimbFile


def story(x=None, num_data=100):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", num_data if x is None else len(x)):
        return pyro.sample("x", dist.Normal(mu, sd).to_event(1), obs=x)


def rows(x=None, num_data=100):
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(torch.stack([z, z.sin()], -1), 0.3).to_event(1), obs=x)


def table(n=60):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Stop(Exception):
    """Stands for a machine that goes down."""


def stopped_after(monkeypatch, count):
    """Make the fit fail right after the checkpoint of its `count`-th step."""
    write, seen = ClimbFile.write, []

    def once(self, *args, **kwargs):
        write(self, *args, **kwargs)
        seen.append(1)
        if len(seen) == count:
            raise Stop

    monkeypatch.setattr(ClimbFile, "every", 0.0)
    monkeypatch.setattr(ClimbFile, "write", once)


METHODS = {
    "derived, several starts": (story, SVI(steps=120, starts=3)),
    "batches": (story, SVI(steps=120, starts=2, guide="mean_field", batch_size=16)),
    "encoder, validation, average": (
        rows,
        SVI(guide=Amortised((8,)), steps=120, starts=2, batch_size=16, validation=0.2, average=0.9, schedule="cosine"),
    ),
    "moving beta": (rows, SVI(guide=Amortised((8,)), steps=120, starts=1, beta=(0.0, 1.0, 60))),
}


@pytest.mark.parametrize("count", [3, 25, 70])
@pytest.mark.parametrize("name", METHODS)
def test_goes_on_to_the_same_bits(name, count, monkeypatch, tmp_path):
    """Catches an optimiser that starts cold, a lost random stream, and a best start that is chosen anew."""
    program, method = METHODS[name]
    x = table()
    whole = fit(program, x, method, seed=5)
    path = tmp_path / "climb.state"
    kept = replace(method, checkpoint=path)
    with monkeypatch.context() as patched:
        stopped_after(patched, count)
        with pytest.raises(Stop):
            fit(program, x, kept, seed=5)
    assert path.exists()
    again = fit(program, x, kept, seed=5)
    assert again.history == whole.history
    for site, value in whole.draws.items():
        assert torch.equal(again.draws[site], value)
    assert not path.exists()


def test_checkpoint_of_another_fit_is_refused(monkeypatch, tmp_path):
    """Catches a run that goes on from other data, another seed or other options."""
    path = tmp_path / "climb.state"
    method = SVI(steps=60, starts=1, checkpoint=path)
    with monkeypatch.context() as patched:
        stopped_after(patched, 5)
        with pytest.raises(Stop):
            fit(story, table(), method, seed=5)
    for data, seed, steps in ((table(61), 5, 60), (table(), 6, 60), (table(), 5, 61)):
        with pytest.raises(ValueError, match="belongs to another fit"):
            fit(story, data, SVI(steps=steps, starts=1, checkpoint=path), seed=seed)
    with pytest.raises(ValueError, match="does not exist"):
        fit(story, table(), SVI(checkpoint=tmp_path / "no" / "file"), seed=5)


class Free(nn.Module):
    """A mean and a spread for every row by a network of the row's covariate: it can learn the noise by heart."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def model(self, t, x=None):
        pyro.module("net", self.net)
        with pyro.plate("data", len(t)):
            loc, raw = self.net(t.unsqueeze(-1)).unbind(-1)
            return pyro.sample("x", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3), obs=x)


def test_validation_stops_before_the_noise_is_learned_by_heart():
    """Catches a best state that is the last one, and held-out rows that are climbed on."""
    torch.manual_seed(0)
    t = torch.linspace(-2, 2, 60)
    x = torch.sin(2 * t) + 0.3 * torch.randn(60)
    fresh = torch.linspace(-1.97, 1.97, 400)
    data, new = {"t": t, "x": x}, {"t": fresh, "x": torch.sin(2 * fresh) + 0.3 * torch.randn(400)}
    settings = {"steps": 3000, "starts": 1, "lr": 0.02, "schedule": "constant"}
    late = fit(Free(), data, SVI(**settings), seed=0)
    early = fit(Free(), data, SVI(**settings, validation=0.25), seed=0)
    looks = early.diagnostics["validation"]
    assert early.converged and len(early.history) < 3000
    assert max(v for _, v in looks) > looks[-1][1]
    assert float(early.log_prob(new).mean()) > float(late.log_prob(new).mean()) + 0.2


class Hill:
    """-(x - 1)^2 / 2, whose slope is seen through noise."""

    problem = SimpleNamespace(ranks=ALONE)

    def whole_norm(self, norm, gradients):
        return norm

    def rate(self, name):
        return 1.0

    def values(self, leaves):
        return leaves

    def objective(self, leaves):
        gap = leaves["x"] - 1.0
        return -(gap**2).sum() / 2, {"x": -gap + torch.randn(200)}


def test_average_has_less_noise_than_the_last_step():
    """Catches an average that is not returned, or that remembers the start."""
    torch.manual_seed(0)
    ascent = Ascent(Hill(), {"x": torch.full((200,), 5.0)}, 0.1, 2000, 1e-5, 2, schedule="constant", decay=0.99)
    ascent.run(2000)
    ascent.conclude()
    last, mean = (v["x"] - 1.0 for v in (ascent.leaves, ascent.best()))
    assert float(mean.square().mean()) < 0.3 * float(last.square().mean())
    assert abs(float(mean.mean())) < 0.03


@pytest.mark.parametrize(
    ("option", "value"), [("average", 1.0), ("average", 2), ("validation", 0.0), ("validation", True)]
)
def test_shares_are_checked(option, value):
    with pytest.raises(ValueError, match=option):
        SVI(**{option: value})


def test_validation_needs_a_guide_that_reads_rows():
    with pytest.raises(ValueError, match="guide that reads rows"):
        fit(story, table(), SVI(validation=0.2), seed=0)
