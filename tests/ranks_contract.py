"""What ranks are asked and answer beyond the numbers of `ranks_work.py`: `torchrun ranks_contract.py FOLDER NAME...`."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import ranks_work
import stories
import torch
from ranks_work import RANK, SIZE, clusters, factors, line, line_guide, lines, own, stopped_at
from torch import Tensor

from inference import EM, NUTS, SVI, compare, fit
from zoo import GMM, FactorAnalysis

WORK: dict[str, Callable[[], dict[str, object]]] = {}


def piece(call: Callable[[], dict[str, object]]) -> Callable[[], dict[str, object]]:
    """Register a piece of work by its name."""
    WORK[call.__name__] = call
    return call


def told(call: Callable[[], object]) -> str:
    """The error that it ends with."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def tables(X: Tensor, y: Tensor, group: Tensor, scale: Tensor) -> None:
    """Three tables with an entry a row, and one that all rows share."""
    w = pyro.sample("w", dist.Normal(0.0, scale).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w + b[group], 0.5), obs=y)


def four_tables() -> dict[str, Tensor]:
    """Own rows of three, and the scale of the prior."""
    data = {**lines(), "group": torch.arange(2000) % 3}
    return {n: own(v) for n, v in data.items()} | {"scale": torch.arange(1.0, 7.0).double()}


@piece
def calls() -> dict[str, object]:
    """Ranks that are not asked alike, or bring what does not fit."""
    x, rank = own(clusters()), RANK
    svi = {"guide": "story", "starts": 1, "draws": 25}
    mixed = four_tables() | {"scale": torch.arange(1.0, 7.0).double() * (1 + rank)}
    renamed = {"X": own(lines()["X"]), ("y", "target")[rank > 0]: own(lines()["y"])}
    asked = {
        "seed": lambda: fit(GMM(3), x, "em", seed=1 + rank, ranks="own"),
        "option": lambda: fit(line, lines(), SVI(steps=20 + rank, **svi), guide=line_guide, seed=1),
        "method": lambda: fit(GMM(3), x, ("em", "svi")[rank > 0], seed=1, ranks="own"),
        "share": lambda: fit(GMM(3), x, "em", seed=1, ranks=("split", "own")[rank > 0]),
        "story": lambda: fit(GMM(3, scale=1.0 + rank), x, "em", seed=1, ranks="own"),
        "function": lambda: fit(GMM(3), x, "em", seed=1) if rank else compare(GMM(3), x, ["em"], seed=1),
        "methods": lambda: compare(GMM(3), x, ["em", "svi"][: 1 + rank], seed=1),
        "shared table": lambda: fit(tables, mixed, SVI(steps=20, guide="mean_field"), seed=1, ranks="own"),
        "no rows": lambda: fit(GMM(3), x if not rank else x[:0], "em", seed=1, ranks="own"),
        "names": lambda: fit(line, renamed, SVI(steps=20, **svi), guide=line_guide, seed=1, ranks="own"),
    }
    return {name: told(call) for name, call in asked.items()} if SIZE > 1 else {}


@piece
def few_rows() -> dict[str, object]:
    """Fewer rows than ranks, and one row on the first rank."""
    x = clusters()[:3]
    mine = x.split({1: [3], 2: [1, 2]}[SIZE])[RANK]
    one = fit(GMM(1), x[:1], EM(restarts=1), seed=1)
    some = fit(GMM(1), mine, EM(restarts=1), seed=1, ranks="own")
    single = fit(GMM(1), mine.float() if RANK else mine, EM(restarts=1), seed=1, ranks="own")  # one precision for all
    return {"split": one.draws["mu"], "own": some.draws["mu"], "precision": single.draws["mu"]}


@piece
def frames() -> dict[str, object]:
    """Data frames, and dictionaries of tables; holes on every rank."""
    frame = pd.DataFrame(own(clusters()).numpy(), columns=list("abc"))
    mixture = fit(GMM(3), frame, EM(restarts=1, max_iter=20), seed=1, ranks="own")
    method = SVI(steps=40, guide="mean_field", starts=1, draws=50, mode="eager")
    regression = fit(tables, four_tables(), method, seed=1, ranks="own")
    found = {f"frame/{n}": v for n, v in mixture.draws.items()} | {
        f"tables/{n}": v for n, v in regression.draws.items()
    }
    return found | {"history": torch.tensor(regression.history, dtype=torch.float64)}


@piece
def questions() -> dict[str, object]:
    """What a posterior answers for its own rows ("own/..."), and for rows that all ranks ask about."""
    x, new = own(clusters()), clusters()[:5]
    posterior = fit(GMM(3), x, EM(restarts=1), seed=1, ranks="own")
    holes = clusters()
    holes[::50, 1] = torch.nan
    filled = fit(FactorAnalysis(1), own(holes), EM(restarts=1, max_iter=5), seed=1, ranks="own").impute()
    group = posterior.to_arviz()["posterior"]
    return {
        "own/log_prob": posterior.log_prob(),
        "own/z": posterior.local("z"),
        "own/imputed": filled.values,
        "log_prob": posterior.log_prob(new),
        "local": posterior.local("z", new),
        "sample": posterior.sample(4, seed=2)["x"],
        "predict": posterior.predict(new, seed=3)["x"],
        "arviz": torch.as_tensor(group["mu"].values),
        "summary": str(posterior.summary()).splitlines()[0],
    }


def networks() -> tuple[Callable, Callable]:
    """Functions whose networks are made, and find their sizes, where they are first called; one parameter is never used."""
    made: dict[str, torch.nn.Module] = {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            decoder = made.setdefault("decoder", torch.nn.Linear(2, x.shape[1]).double())
            pyro.module("decoder", decoder)
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        lazy = [torch.nn.LazyLinear(4), torch.nn.Tanh(), torch.nn.LazyLinear(4)]
        encoder = made.setdefault("encoder", torch.nn.Sequential(*lazy).double())
        encoder(x)
        pyro.module("encoder", encoder)
        pyro.param("unused", torch.zeros(3))
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide


@piece
def lazy_networks() -> dict[str, object]:
    """Networks start apart on every rank and are told of inside the plate."""
    torch.manual_seed(5 + RANK)
    model, guide = networks()
    method = SVI(steps=150, starts=1, draws=30, lr=0.05, batch_size=200)
    posterior = fit(model, own(factors()), method, guide=guide, seed=1, ranks="own")
    weights = {**posterior.extra["networks"], **posterior.extra["guide_params"]}
    return weights | {"history": torch.tensor(posterior.history, dtype=torch.float64)}


@piece
def compared() -> dict[str, object]:
    """Two methods over ranks."""
    svi = SVI(guide="mean_field", steps=60, starts=1, draws=100, mode="eager")
    found = compare(stories.normal_mixture, clusters()[:300, 0], ["em", svi], seed=3, progress=False)
    numbers = found.table[["held-out log p", "± se", "k-hat"]].astype(float).to_numpy()
    trained = found.posteriors["em"].log_prob()
    return {
        "numbers": torch.tensor(numbers),
        "table": found.table.to_csv(),
        "verdict": found.verdict,
        "held": torch.stack(list(found.heldout.values())),
        "trained": trained,
    }


def warning_story(x: Tensor) -> None:
    """A normal mean, told with a warning."""
    warnings.warn(f"told by rank {RANK}", UserWarning, stacklevel=1)
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@piece
def warned() -> dict[str, object]:
    """A story that warns, under every kind of method, with bars that are asked for."""
    x = own(clusters())[:50, 0]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as said:
        warnings.simplefilter("always")
        for method in (SVI(guide="mean_field", steps=20, starts=1, draws=25, mode="eager"), EM(restarts=1, max_iter=5)):
            fit(warning_story, x, method, seed=1, ranks="own", progress=True)
        chains = NUTS(chains=2, warmup=5, draws=5, backend="eager")
        fit(warning_story, clusters()[:50, 0], chains, seed=1, progress=True)
    return {"said": said.getvalue()}


def batches(path: Path | None, seed: int = 1) -> object:
    """Regression in batches, with a step size that falls to zero along the whole run."""
    options = {"steps": 400, "starts": 1, "draws": 200, "batch_size": 200, "lr": 0.05, "particles": 1}
    method = SVI(guide="story", schedule="cosine", mode="eager", checkpoint=path, **options)
    return fit(line, lines(), method, guide=line_guide, seed=seed)


@piece
def batches_go_on() -> dict[str, object]:
    """One process stops after 150 steps; these ranks go on from its file."""
    path = Path(os.environ["RANKS_FOLDER"]) / "batches"
    if SIZE == 1:
        stopped_at(150, lambda: batches(path))
        return {}
    from inference.methods.climb_file import ClimbFile

    read, counts = ClimbFile.read, []

    def looked(self: object, fresh: object) -> object:
        found = read(self, fresh)
        counts.extend(int(s["step"]) for s in found[0][0].optimiser.state.values())
        return found

    ClimbFile.read = looked
    try:
        posterior = batches(path)
    finally:
        ClimbFile.read = read
    moved = torch.tensor(posterior.history, dtype=torch.float64)
    return {"history": moved, "w": posterior.draws["w"].mean(0), "noise": posterior.draws["noise"][0], "steps": counts}


def work(names: list[str]) -> dict[str, dict[str, object]]:
    """Results of some pieces."""
    torch.set_num_threads(1)
    return {name: WORK[name]() for name in names}


def plain(value: object) -> np.ndarray:
    """An array of it; words as bytes."""
    return np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else np.asarray(value)


if __name__ == "__main__":
    done = work(sys.argv[2:])
    np.savez(
        Path(sys.argv[1]) / f"{SIZE}-{RANK}.npz",
        **{f"{name}/{key}": plain(value) for name, found in done.items() for key, value in found.items()},
    )
    assert ranks_work.SIZE == SIZE
