"""A card, and stories, data and methods that are fitted on it and on the processor."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import torch
from pretended_card import pretended
from torch import nn

from inference import EM, HMC, SVI
from zoo import GMM, PPCA, GaussianHMM

CUDA = torch.cuda.is_available()


class RealCard:
    """The first card that is here, asked as a pretended one is."""

    races = ()  # PyTorch is asked for one order of every sum, and tells of none

    def __init__(self) -> None:
        self.before = torch.cuda.memory_allocated()

    def used(self) -> int:
        """Bytes that have been taken."""
        torch.cuda.synchronize()
        return max(0, torch.cuda.memory_allocated() - self.before)


@contextmanager
def a_card() -> Iterator[object]:
    """Inside, there is a card: the one that is here, or a pretended one."""
    if CUDA:
        yield RealCard()
        return
    with pretended() as card:
        yield card


def clusters(n=300, d=3):
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(3, d, generator=generator, dtype=torch.float64)
    z = torch.randint(3, (n,), generator=generator)
    return centres[z] + torch.randn(n, d, generator=generator, dtype=torch.float64)


def bare(x):
    """Knows nothing of devices: every tensor it makes must be made where the data are."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0 * torch.ones(2)).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mu[z], torch.tensor([1.0, 1.0])).to_event(1), obs=x)


def regression(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 3.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, noise), obs=y)


def lines(t, y):
    """Half of the starts of EM are planes through the covariates."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0), 3.0))
    with pyro.plate("data", len(t)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(slope[z] * t, 0.5), obs=y)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.encoder = nn.Linear(3, 4).double()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), torch.tensor(0.5)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


X = clusters()
PAIR = {"X": X[:, :2].contiguous(), "y": X[:, 2].contiguous()}
HOLES = torch.rand(600, 3, generator=torch.Generator().manual_seed(4)) < 0.1
WALK = torch.randn(20, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
QUICK = {"steps": 40, "starts": 1, "draws": 20}
CASES = {
    "em": (GMM(3), X, EM(restarts=2)),
    "em of a bare story": (bare, X[:, :2].contiguous(), EM(restarts=2)),
    "incremental em": (GMM(3), X, EM(restarts=1, driver="incremental", batch_size=100)),
    "em of rows with gaps": (GMM(2), X.masked_fill(torch.rand(X.shape) < 0.1, torch.nan), EM(restarts=1, max_iter=5)),
    "em of many rows with gaps": (GMM(1), clusters(600).masked_fill(HOLES, torch.nan), EM(estimate="mle")),
    "em of PPCA": (PPCA(1), X, EM()),
    "em of a chain": (GaussianHMM(2), WALK, EM(restarts=1, max_iter=5)),
    "em from planes": (lines, {"t": X[:, 0].contiguous(), "y": X[:, 1].contiguous()}, EM(restarts=2, max_iter=5)),
    "em by gradient": (regression, PAIR, EM(restarts=1)),
    "svi": (regression, PAIR, SVI(guide="full_rank", **QUICK)),
    "svi in batches": (regression, PAIR, SVI(guide="mean_field", batch_size=50, **QUICK)),
    "svi, latents summed out": (bare, X[:, :2].contiguous(), SVI(guide="mean_field", **QUICK)),
    "svi of networks": (Autoencoder, X, SVI(guide="story", batch_size=50, **QUICK)),
    "svi, eager": (regression, PAIR, SVI(guide="mean_field", mode="eager", **QUICK)),
    "svi, recorded": (regression, PAIR, SVI(guide="mean_field", mode="cudagraph", batch_size=50, **QUICK)),
    "svi of networks, recorded": (Autoencoder, X, SVI(guide="story", mode="cudagraph", **QUICK)),
    "hmc": (regression, PAIR, HMC(chains=4, warmup=60, draws=30, backend="graph")),
}

#: Cases without random numbers on the card.
SAME = {
    "em",
    "em of a bare story",
    "incremental em",
    "em of many rows with gaps",
    "em of PPCA",
    "em of a chain",
    "em from planes",
}
