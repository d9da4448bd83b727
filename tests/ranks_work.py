"""What several processes do together, and one alone for comparison: `torchrun ranks_work.py FOLDER NAME...`, or `work(name)`.

Every piece of work returns tensors by name; under torchrun each rank writes its own to FOLDER.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import stories

from inference import EM, fit
from zoo import GMM, PPCA, FactorAnalysis, GaussianHMM, MixtureOfFactorAnalysers

#: Rows of every rank, by how many there are.
CUTS = {1: [2000], 2: [700, 1300], 3: [300, 700, 1000]}
RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

WORK: dict[str, Callable[[], dict[str, Tensor]]] = {}


def piece(call: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Register a piece of work by its name."""
    WORK[call.__name__] = call
    return call


def own(x: Tensor) -> Tensor:
    """This rank's rows of 2,000."""
    return x.split(CUTS[SIZE])[RANK]


def clusters(n: int = 2000, d: int = 3) -> Tensor:
    """Three clusters."""
    g = torch.Generator().manual_seed(0)
    z = torch.randint(0, 3, (n,), generator=g)
    mu = 4.0 * torch.randn(3, d, generator=g, dtype=torch.float64)
    return mu[z] + torch.randn(n, d, generator=g, dtype=torch.float64)


def factors(n: int = 2000, d: int = 6, q: int = 2) -> Tensor:
    """Rows with two factors in common."""
    g = torch.Generator().manual_seed(1)
    W, z = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((q, d), (n, q)))
    return z @ W + 0.5 * torch.randn(n, d, generator=g, dtype=torch.float64) + torch.arange(d)


def result(posterior) -> dict[str, Tensor]:
    """Draws and history of an answer."""
    return dict(posterior.draws) | {"history": torch.tensor(posterior.history, dtype=torch.float64)}


# -- EM --------------------------------------------------------------------------------------------------------------


@piece
def gmm() -> dict[str, Tensor]:
    """Mixture kernel, default starts: k-means++ on the rows of all ranks."""
    return result(fit(GMM(num_components=3), own(clusters()), EM(restarts=3), seed=1, ranks="own"))


@piece
def gmm_split() -> dict[str, Tensor]:
    """The same script as for one process: every rank is given the whole table."""
    posterior = fit(GMM(num_components=3), clusters(), "em", seed=1)
    return result(posterior) | {"z": posterior.local("z"), "rows": posterior.log_prob()}


@piece
def gmm_incremental() -> dict[str, Tensor]:
    """One M-step a block, every rank with a share of every block."""
    return result(fit(GMM(num_components=3), own(clusters()), EM(driver="incremental", tol=1e-12), seed=1, ranks="own"))


@piece
def contraction() -> dict[str, Tensor]:
    """No kernel: sums by contraction, a scale without a closed form by L-BFGS on the statistics."""
    x = clusters(d=1)[:, 0]
    start = {"pi": torch.tensor([0.5, 0.5]), "mu": torch.tensor([-1.0, 1.0]), "sigma": torch.tensor([1.0, 1.0])}
    method = EM(start=start, max_iter=15, kernels=False)
    return result(fit(stories.normal_mixture, own(x), method, seed=1, ranks="own"))


def switching(X: Tensor, y: Tensor) -> None:
    """Two lines; the noise is Student's, so that the M-step has to look at the rows again."""
    w = pyro.sample("w", dist.Normal(0.0, 3.0).expand([2, X.shape[1]]).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(X)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.StudentT(4.0, (w[z] * X).sum(-1), sigma), obs=y)


@piece
def on_rows() -> dict[str, Tensor]:
    """L-BFGS on the rows themselves: values and gradients of all ranks are summed in every evaluation."""
    X = clusters()
    y = X @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + 0.1 * X[:, 0].sin()
    start = {"w": torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]), "sigma": torch.tensor(1.0)}
    data = {"X": own(X), "y": own(y)}
    return result(fit(switching, data, EM(start=start, max_iter=4), seed=1, ranks="own"))


@piece
def mixed() -> dict[str, Tensor]:
    """Bernoulli, Poisson and categorical columns of one class."""
    torch.manual_seed(0)
    data = stories.mixed_columns_data(2000)
    return result(fit(stories.mixed_columns, {n: own(v) for n, v in data.items()}, EM(), seed=1, ranks="own"))


@piece
def hmm() -> dict[str, Tensor]:
    """Chains: forward-backward on each rank, counts of moves summed."""
    x = clusters(d=1)[:, 0].reshape(200, 10)
    rows = [n // 10 for n in CUTS[SIZE]]
    method = EM(restarts=2, max_iter=40)
    return result(fit(GaussianHMM(num_states=3, scale=3.0), x.split(rows)[RANK], method, seed=1, ranks="own"))


@piece
def ppca() -> dict[str, Tensor]:
    """Everything from the scatter of all ranks."""
    return result(fit(PPCA(num_factors=2), own(factors()), EM(restarts=1), seed=1, ranks="own"))


@piece
def ppca_mle() -> dict[str, Tensor]:
    """By eigendecomposition of the scatter of all ranks."""
    return result(fit(PPCA(num_factors=2), own(factors()), EM(estimate="mle"), seed=1, ranks="own"))


@piece
def fa_missing() -> dict[str, Tensor]:
    """Holes on the last rank only: all ranks go row by row."""
    x = factors()
    x[1900:1990, 2] = torch.nan
    return result(fit(FactorAnalysis(num_factors=2), own(x), EM(restarts=1, max_iter=30), seed=1, ranks="own"))


@piece
def mfa() -> dict[str, Tensor]:
    """Components with factors of their own, clusters from the rows of all ranks."""
    story = MixtureOfFactorAnalysers(num_components=2, num_factors=1, scale=3.0)
    return result(fit(story, own(clusters(d=4)), EM(restarts=2, max_iter=40), seed=1, ranks="own"))


def work(names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Results of some pieces."""
    torch.set_num_threads(1)
    return {name: WORK[name]() for name in names}


if __name__ == "__main__":
    done = work(sys.argv[2:])
    np.savez(
        Path(sys.argv[1]) / f"{SIZE}-{RANK}.npz",
        **{f"{name}/{key}": np.asarray(value) for name, found in done.items() for key, value in found.items()},
    )
