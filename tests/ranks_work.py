"""What several processes do together, and one alone for comparison: `torchrun ranks_work.py FOLDER NAME...`, or `work(name)`.

Every piece of work returns tensors by name; under torchrun each rank writes its own to FOLDER.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import stories

from inference import EM, HMC, NUTS, SVI, fit
from zoo import GMM, LDA, PPCA, FactorAnalysis, GaussianHMM, MixtureOfFactorAnalysers, load_corpus

#: Rows of every rank, by how many there are.
CUTS = {1: [2000], 2: [700, 1300], 3: [300, 700, 1000]}
DEVICE = os.environ.get("RANKS_DEVICE", "cpu")
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
    return result(fit(GMM(num_components=3), own(clusters()), EM(restarts=3), seed=1, ranks="own", device=DEVICE))


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


@piece
def topics() -> dict[str, Tensor]:
    """Expected counts of the documents of all ranks; concentrations learned on them."""
    data = {"w": torch.from_numpy(load_corpus().pruned(most=100).counts.toarray()).double()}
    found = {}
    for driver in ("batch", "stepwise"):
        posterior = fit(LDA(4, None, None), data, EM(restarts=1, max_iter=6, driver=driver), seed=1)
        found |= {f"{driver}/{n}": v for n, v in result(posterior).items()}
        found[f"{driver}/theta"] = posterior.local("theta").mean(0)
    return found


@piece
def topics_own() -> dict[str, Tensor]:
    """Variational Bayes of documents that each rank brought itself."""
    w = torch.from_numpy(load_corpus().pruned(most=100).counts.toarray()).double()
    cut = {1: [len(w)], 2: [180, len(w) - 180], 3: [80, 180, len(w) - 260]}[SIZE]
    posterior = fit(LDA(4), {"w": w.split(cut)[RANK]}, SVI(steps=15, starts=1, draws=30), seed=1, ranks="own")
    return {"elbo": torch.tensor(posterior.diagnostics["elbo"], dtype=torch.float64)}


# -- SVI -------------------------------------------------------------------------------------------------------------


@piece
def svi_derived() -> dict[str, Tensor]:
    """A derived guide over the globals, z summed out; starts by L-BFGS over all ranks."""
    method = SVI(steps=40, starts=1, particles=2, guide="mean_field", mode="eager", draws=50)
    posterior = fit(stories.normal_mixture, own(clusters(d=1)[:, 0]), method, seed=1, ranks="own")
    return result(posterior) | {"elbo": torch.tensor(posterior.diagnostics["elbo"], dtype=torch.float64)}


def line(X: Tensor, y: Tensor) -> None:
    """Regression with a learned noise."""
    w = pyro.sample("w", dist.Normal(X.new_zeros(X.shape[1]), 3.0).to_event(1))
    noise = pyro.param("noise", X.new_ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, noise), obs=y)


def line_guide(X: Tensor, y: Tensor) -> None:
    """A normal whose parameters are made where they are first asked for, and one that nothing uses."""
    loc = pyro.param("w.loc", lambda: X.new_zeros(X.shape[1]))
    scale = pyro.param("w.scale", lambda: 0.1 * X.new_ones(X.shape[1]), constraint=dist.constraints.positive)
    pyro.param("unused", X.new_zeros(2))
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def lines() -> dict[str, Tensor]:
    X = torch.randn(2000, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {"X": X, "y": X @ torch.arange(6.0, dtype=torch.float64) / 6 + 0.3 * X[:, 0].cos()}


@piece
def svi_params() -> dict[str, Tensor]:
    """Plain functions with `pyro.param`: gradients of unequal shards are averaged by their rows."""
    data = {n: own(v) for n, v in lines().items()}
    method = SVI(guide="story", steps=120, starts=1, draws=100)
    posterior = fit(line, data, method, guide=line_guide, seed=1, ranks="own", device=DEVICE)
    return result(posterior) | {"elbo": torch.tensor(posterior.diagnostics["elbo"], dtype=torch.float64)}


@piece
def svi_batches() -> dict[str, Tensor]:
    """Every rank draws its part of a batch; twice the same."""
    method = SVI(guide="story", steps=400, starts=1, draws=100, batch_size=200, lr=0.05, particles=1)
    first, again = (fit(line, lines(), method, guide=line_guide, seed=1) for _ in range(2))
    assert torch.equal(first.draws["w"], again.draws["w"])
    return result(first)


class Auto(torch.nn.Module):
    """A linear VAE: the exact posterior is within its reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.decoder, self.encoder = torch.nn.Linear(2, 6).double(), torch.nn.Linear(6, 2).double()

    def model(self, x: Tensor) -> None:
        """z ~ N(0, 1), x ~ N(decoder(z), 0.5)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """z ~ N(encoder(x), scale)."""
        pyro.module("encoder", self.encoder)
        scale = pyro.param("scale", x.new_full((2,), 0.3), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), scale).to_event(1))


@piece
def svi_network() -> dict[str, Tensor]:
    """Latents in the rows: each rank draws its own, the answer has those of all rows."""
    posterior = fit(Auto(), factors(), SVI(steps=200, starts=1, draws=50, lr=0.1, particles=2), seed=1)
    weights = {n: v.detach() for n, v in posterior.problem.story.state_dict().items()}
    return {
        "z": posterior.draws["z"],
        "elbo": torch.tensor(posterior.diagnostics["elbo"], dtype=torch.float64),
        **weights,
    }


def by_row(x: Tensor) -> None:
    """A normal mean for every row, and a common centre."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def by_row_guide(x: Tensor) -> None:
    """Points: no noise, so that every step can be repeated by one process."""
    pyro.sample("mu", dist.Delta(pyro.param("mu.loc", x.new_zeros(()))))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(pyro.param("z.loc", lambda: 0.0 * x)))


@piece
def svi_rows() -> dict[str, Tensor]:
    """A parameter for every row stays with the rank that has the row."""
    x = factors()[:, 0] * 3
    return result(fit(by_row, x, SVI(steps=150, starts=1), guide=by_row_guide, seed=1))


# -- death and resumption --------------------------------------------------------------------------------------------


@piece
def lasting() -> dict[str, Tensor]:
    """EM that takes its time: some seconds, a checkpoint on the way; each rank leaves its number where it is looked for."""
    folder = Path(os.environ["RANKS_FOLDER"])
    (folder / f"{RANK}.pid").write_text(str(os.getpid()))

    def wait(iteration: int, objective: float, values: object) -> None:
        (folder / "iteration").write_text(str(iteration))
        time.sleep(float(os.environ.get("RANKS_PAUSE", "0")))

    method = EM(restarts=2, max_iter=40, tol=0.0, checkpoint=folder / "state", callback=wait)
    return result(fit(GMM(num_components=3), clusters(), method, seed=1))


class Stop(Exception):
    """Stands for a machine that goes down."""


def svi_fits() -> dict[str, Callable[[Path | None], object]]:
    """Fits on full batches: shared latents with two starts, and a parameter for every row with its moments."""
    x, rows = clusters(d=1)[:, 0], factors()[:, 0] * 3

    def shared(path: Path | None) -> object:
        method = SVI(steps=60, starts=2, particles=2, guide="mean_field", mode="eager", draws=50, checkpoint=path)
        return fit(stories.normal_mixture, x, method, seed=1)

    def by_rows(path: Path | None) -> object:
        return fit(by_row, rows, SVI(steps=80, starts=1, mode="eager", checkpoint=path), guide=by_row_guide, seed=1)

    return {"shared": shared, "rows": by_rows}


def stopped_at(step: int, call: Callable[[], object]) -> None:
    """Run a fit until its checkpoint has been written for the `step`-th time, on every rank."""
    from inference.methods.climb_file import ClimbFile

    write, every, seen = ClimbFile.write, ClimbFile.every, []

    def once(self: object, *args: object, **kwargs: object) -> None:
        write(self, *args, **kwargs)
        seen.append(1)
        if len(seen) == step:
            raise Stop

    ClimbFile.every, ClimbFile.write = 0.0, once
    try:
        call()
    except Stop:
        pass
    finally:
        ClimbFile.every, ClimbFile.write = every, write


@piece
def svi_goes_on() -> dict[str, Tensor]:
    """From where one process stopped; afterwards these ranks stop by themselves, and leave their files."""
    folder, found = Path(os.environ["RANKS_FOLDER"]), {}
    for name, call in svi_fits().items():
        path = folder / f"{name}.{SIZE}"
        if SIZE == 1:
            stopped_at(33, lambda call=call, path=path: call(path))
            found |= {f"{name}/{k}": v for k, v in result(call(None)).items()}
            continue
        before = folder / f"{name}.1"
        if RANK == 0:
            path.write_bytes(before.read_bytes())
        time.sleep(0.5)
        found |= {f"{name}/{k}": v for k, v in result(call(path)).items()}
        assert not path.exists()
        time.sleep(0.5)
        stopped_at(41, lambda call=call, path=path: call(path))
        again = result(call(folder / f"{name}.{SIZE}"))  # as many ranks as before, from their own file
        stopped_at(41, lambda call=call, path=path: call(path))
        assert all(torch.allclose(again[k], found[f"{name}/{k}"], rtol=1e-8, atol=1e-8) for k in again), name
    return found


@piece
def lasting_svi() -> dict[str, Tensor]:
    """SVI that takes its time, with a checkpoint on the way."""
    from inference.methods import ascent, climb_file

    folder = Path(os.environ["RANKS_FOLDER"])
    (folder / f"{RANK}.pid").write_text(str(os.getpid()))
    climb_file.ClimbFile.every = 0.0
    step = ascent.Ascent.step

    def slow(self: object) -> None:
        step(self)
        time.sleep(float(os.environ.get("RANKS_PAUSE", "0")))
        (folder / "iteration").write_text(str(len(self.history)))

    ascent.Ascent.step = slow
    try:
        method = SVI(steps=60, starts=1, particles=2, guide="mean_field", mode="eager", checkpoint=folder / "state")
        return result(fit(stories.normal_mixture, clusters(d=1)[:, 0], method, seed=1))
    finally:
        ascent.Ascent.step = step


# -- chains ------------------------------------------------------------------------------------------------------


def chains_of(method: object) -> dict[str, Tensor]:
    data = {n: torch.tensor(v, dtype=torch.float64) for n, v in stories.SCHOOLS.items()}
    posterior = fit(stories.eight_schools, data, method, seed=1)
    return dict(posterior.draws) | {n: torch.from_numpy(v) for n, v in posterior.sample_stats.items()}


@piece
def nuts() -> dict[str, Tensor]:
    """Four chains: two and two, or one, one and two; machine code where there is a compiler."""
    return chains_of(NUTS(chains=4, warmup=150, draws=100))


@piece
def hmc() -> dict[str, Tensor]:
    """Chains that learn from each other, also across ranks."""
    return chains_of(HMC(chains=5, warmup=100, draws=50))


@piece
def hmc_goes_on() -> dict[str, Tensor]:
    """Chains that move together, from where one process stopped in the warm-up, and among the draws."""
    folder, found = Path(os.environ["RANKS_FOLDER"]), {}
    from inference.methods import hmc_file

    hmc_file.EVERY = 0.0
    for count in (60, 110):
        path = folder / f"hmc{count}.{SIZE}"
        method = HMC(chains=5, warmup=100, draws=50, backend="graph")
        kept = replace(method, checkpoint=path)
        if SIZE == 1:
            stopped_hmc(count, lambda kept=kept: chains_of(kept))
            found |= {f"{count}/{k}": v for k, v in chains_of(method).items()}
            continue
        if RANK == 0:
            path.write_bytes((folder / f"hmc{count}.1").read_bytes())
        time.sleep(0.5)
        found |= {f"{count}/{k}": v for k, v in chains_of(kept).items()}
        assert not path.exists()
    return found


def stopped_hmc(iteration: int, call: Callable[[], object]) -> None:
    """Until that iteration has been kept."""
    from inference.methods.hmc_file import MoveFile

    write = MoveFile.write

    def once(self: object, moves: object, now: bool = False) -> None:
        write(self, moves, now)
        if moves.done >= iteration:
            raise Stop

    MoveFile.write = once
    try:
        call()
    except Stop:
        pass
    finally:
        MoveFile.write = write


@piece
def lasting_chains() -> dict[str, Tensor]:
    """Chains that take some seconds, with a checkpoint several times a second."""
    from inference.methods import nuts

    nuts.EVERY = 0.2
    folder = Path(os.environ["RANKS_FOLDER"])
    (folder / f"{RANK}.pid").write_text(str(os.getpid()))
    method = NUTS(chains=4, warmup=60, draws=60, backend="eager", checkpoint=folder / "chains")
    return chains_of(method)


# -- the contract --------------------------------------------------------------------------------------------------


@piece
def alike() -> dict[str, Tensor]:
    """What ranks cannot share they all do: a latent for every row under a derived guide, and a chain of one sequence."""
    x = factors(60, 3)
    method = SVI(guide="mean_field", steps=20, starts=1, draws=30, mode="eager", particles=1)
    return result(fit(stories.ppca, x, method, seed=1))


def bad_rows(x: Tensor) -> None:
    """A story that fails where the rows are those of the last rank."""
    if bool((x > 1e6).any()):
        raise ValueError("rows beyond a million")
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@piece
def faults() -> dict[str, Tensor]:
    """Errors that every rank must hear of; afterwards all go on together."""
    x = factors()[:, 0]
    last = x + 1e7 if RANK == SIZE - 1 else x
    asked: dict[str, Callable[[], object]] = {
        "different": lambda: fit(bad_rows, x + RANK, "svi", seed=1),
        "columns": lambda: fit(GMM(num_components=2), factors(d=2 + RANK), "em", seed=1, ranks="own"),
        "latent": lambda: fit(stories.ppca, factors(), SVI(guide="mean_field"), seed=1, ranks="own"),
        "chains": lambda: fit(bad_rows, x, "nuts", seed=1, ranks="own"),
        "one rank": lambda: fit(bad_rows, last, "svi", seed=1, ranks="own"),
        "word": lambda: fit(bad_rows, x, "svi", seed=1, ranks="mine"),
    }
    found = {}
    for name, call in asked.items():
        try:
            call()
            text = "no error"
        except (ValueError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
        found[name] = torch.tensor(list(text.encode()))
    return found


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
