"""Flows: a recorded training step beside zuko's and Pyro's, two moons, and held-out densities of two tables.

Steps: RealNVP, MAF and coupling splines of the same layers, widths and bins on the same batches, Adam with the same settings.
Ours is the recorded graph, and that graph compiled (SVI's modes "graph" and "inductor"); zuko's side is its eager loop, and
Pyro's that of its own transforms with caches cleared.  Before a time counts, value and gradient must equal the program's.

Two moons: scikit-learn's `make_moons` with noise 0.07, standardised; 600 steps on 10,000 rows, scored on 20,000 others.

Tables: a column's grain is 10^-d with the fewest decimals d that 90 % of its cells have; uniform noise as wide as the grain is
added to every cell (dequantised), and columns are standardised by the training rows.  80 % of the rows train, 10 % choose
settings and the number of steps, and 10 % are scored once.  The split, the noise and the weights change with the seed.

    python benchmarks/flows.py [--data FOLDER] [--quick]    # FOLDER holds uci_power_plant.txt and uci_wine_red.txt
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from _peers import OURS, Report, Times, arguments, interleaved, seconds
from pyro.nn import DenseNN
from torch import Tensor, nn

from inference import SVI, fit
from inference.methods.ascent import Ascent
from inference.methods.paired import PairTarget
from inference.problem import prepare
from zoo import MAF, NeuralSplineFlow, RealNVP

COLUMNS, BATCH, RATE, BLOCK = 5, 512, 1e-3, 10
LAYERS, HIDDEN, BINS = 4, (64, 64), 8
TABLES = {"power plant": "uci_power_plant.txt", "red wine": "uci_wine_red.txt"}
SEEDS = 3


# -- steps -------------------------------------------------------------------------------------------------------------


def story(name: str) -> Any:
    """Ours."""
    make: dict[str, Callable[[], Any]] = {
        "RealNVP": lambda: RealNVP(COLUMNS, LAYERS, HIDDEN),
        "MAF": lambda: MAF(COLUMNS, LAYERS, HIDDEN),
        "spline": lambda: NeuralSplineFlow(COLUMNS, LAYERS, HIDDEN, num_bins=BINS),
    }
    return make[name]()


def by_zuko(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """zuko's flow and its log density."""
    import zuko

    common = {"transforms": LAYERS, "hidden_features": HIDDEN}
    make: dict[str, Callable[[], Any]] = {
        "RealNVP": lambda: zuko.flows.MAF(COLUMNS, passes=2, **common),
        "MAF": lambda: zuko.flows.MAF(COLUMNS, **common),
        "spline": lambda: zuko.flows.NSF(COLUMNS, bins=BINS, passes=2, **common),
    }
    flow = make[name]()
    return flow, lambda x: flow().log_prob(x)


def by_pyro(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Pyro's transforms and their log density; without clearing its cache it would be that of old weights."""
    half = COLUMNS // 2
    sizes = [(COLUMNS - half) * count for count in (BINS, BINS, BINS - 1)]
    make: dict[str, Callable[[], Any]] = {
        "RealNVP": lambda: pyro_transforms.affine_coupling(COLUMNS, list(HIDDEN), split_dim=half),
        "MAF": lambda: pyro_transforms.affine_autoregressive(COLUMNS, list(HIDDEN)),
        "spline": lambda: pyro_transforms.SplineCoupling(
            COLUMNS, half, DenseNN(half, list(HIDDEN), sizes), BINS, 5.0, order="quadratic", identity=True
        ),
    }
    flip = torch.arange(COLUMNS - 1, -1, -1)
    chain: list[Any] = []
    for i in range(LAYERS):
        chain += [make[name]()] + ([pyro_transforms.Permute(flip)] if i < LAYERS - 1 else [])
    base = dist.Normal(torch.zeros(COLUMNS), 1.0, validate_args=False).to_event(1)
    flow = dist.TransformedDistribution(base, chain, validate_args=False)

    def log_prob(x: Tensor) -> Tensor:
        flow.clear_cache()
        return flow.log_prob(x)

    return nn.ModuleList(t for t in chain if isinstance(t, nn.Module)), log_prob


def eager(flow: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A plain loop's step."""
    optimiser = torch.optim.Adam(flow.parameters(), lr=RATE, betas=(0.9, 0.99), fused=True)

    def step() -> None:
        optimiser.zero_grad()
        (-log_prob(x[torch.randint(len(x), (BATCH,))]).mean()).backward()
        optimiser.step()

    return step


def recorded(name: str, x: Tensor, mode: str) -> tuple[PairTarget, Callable[[], Any]]:
    """The step that `fit(story, x, SVI(mode=mode, ...))` makes."""
    target = PairTarget(prepare(story(name), x, seed=0, device="cpu"), 1, BATCH, mode)
    options = SVI(lr=RATE)
    return target, Ascent(target, target.start(), options.lr, 10**9, options.tol, options.patience).step


def gap(target: PairTarget) -> float:
    """Largest relative difference of the recorded step's value and gradient from the program's."""
    program = PairTarget(target.problem, 1, BATCH, "eager")
    leaves = {n: v + 0.05 * torch.randn_like(v) for n, v in target.start().items()}
    answers = [side.call(*leaves.values(), torch.arange(BATCH)) for side in (target, program)]
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(*answers, strict=True))


def repeated(step: Callable[[], Any]) -> Callable[[], None]:
    """A block of steps: what one reading of the clock spans."""

    def run() -> None:
        for _ in range(BLOCK):
            step()

    return run


def steps(report: Report, repeats: int) -> None:
    """One training step, three families."""
    x = torch.randn(20 * BATCH, COLUMNS)
    for name in ("RealNVP", "MAF", "spline"):
        if not report.wants(f"step, {name}"):
            continue
        with report.case(f"step, {name}", unit=f"{BLOCK} steps") as case:
            target, compiled = recorded(name, x, "inductor")
            plain, graph = recorded(name, x, "graph")
            case.check("difference of value and gradients, compiled graph and program", gap(target), 1e-4)
            case.check("difference of value and gradients, graph and program", gap(plain), 1e-4)
            case.facts["ours runs as"] = target.mode + (f" ({target.reason})" if target.reason else "")
            sides = {OURS: compiled, "ours, graph": graph, "Pyro": eager(*by_pyro(name), x)}
            if find_spec("zuko"):
                sides["zuko"] = eager(*by_zuko(name), x)
            blocks = {side: repeated(step) for side, step in sides.items()}
            for block in blocks.values():
                block()
            case.times = interleaved(blocks, repeats)
            for peer in [*sides][2:]:
                case.faster(peer, 1 / 0.75)
                case.faster(peer, side="ours, graph")


# -- held-out densities ------------------------------------------------------------------------------------------------


def moons(report: Report, quick: bool) -> None:
    """Nats of rows that were not fitted."""
    from sklearn.datasets import make_moons

    if not report.wants("two moons"):
        return
    with report.case("two moons", unit="fit") as case:
        train, test = (
            torch.from_numpy(make_moons(n, noise=0.07, random_state=s)[0]) for n, s in ((10_000, 0), (20_000, 1))
        )
        mean, scale = train.mean(0), train.std(0)
        train, test = (train - mean) / scale, (test - mean) / scale
        method = SVI(steps=60 if quick else 600, batch_size=BATCH)
        nats, times = [], []
        for seed in range(1 if quick else SEEDS):
            found: list[Any] = []
            run = lambda seed=seed, found=found: found.append(  # noqa: E731
                fit(NeuralSplineFlow(2, seed=seed), train, method, seed=seed, device="cpu", progress=False)
            )
            times.append(seconds(run))
            nats.append(-float(found[0].log_prob(test).mean()))
        case.times = {OURS: Times(times)}
        case.facts["nats, by seed"] = ", ".join(f"{n:.4f}" for n in nats)
        if not quick:
            case.goal("worst held-out nats", max(nats), 1.51, most=True)


def grain_of(column: np.ndarray) -> float:
    """10^-d with the fewest decimals d that 90 % of the cells have."""
    return next(10.0**-d for d in range(9) if d == 8 or np.isclose(column, column.round(d), atol=1e-9).mean() >= 0.9)


def split(path: Path, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows: dequantised, shuffled and standardised."""
    table = np.loadtxt(path)
    rng = np.random.default_rng(seed)
    grain = np.array([grain_of(column) for column in table.T])
    table = rng.permutation(table + grain * (rng.random(table.shape) - 0.5))
    first, second = int(0.8 * len(table)), int(0.9 * len(table))
    mean, scale = table[:first].mean(0), table[:first].std(0)
    rows = torch.from_numpy((table - mean) / scale)
    return rows[:first], rows[first:second], rows[second:]


def gaussian(train: Tensor, test: Tensor) -> float:
    """Mean log density under the normal distribution of greatest likelihood."""
    fitted = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0))
    return float(fitted.log_prob(test).mean())


def candidates(name: str, D: int, seed: int) -> list[tuple[str, Any]]:
    """Settings that the validation rows choose among: the same for both families, save for the splines' bins."""
    made: list[tuple[str, Any]] = []
    for hidden in ((32, 32), (64, 64)):
        if name == "RealNVP":
            made.append((f"8 layers of {hidden}", RealNVP(D, 8, hidden, seed=seed)))
        else:
            made += [
                (f"4 layers of {hidden}, {K} bins", NeuralSplineFlow(D, 4, hidden, num_bins=K, bound=6.0, seed=seed))
                for K in (4, 8)
            ]
    return made


def best_fit(name: str, train: Tensor, valid: Tensor, seed: int, lengths: tuple[int, ...]) -> tuple[str, Any]:
    """The fit of greatest validation density over settings and numbers of steps."""
    tried = []
    for what, flow in candidates(name, train.shape[1], seed):
        for count in lengths:
            method = SVI(steps=count, batch_size=min(BATCH, len(train)), schedule="cosine")
            posterior = fit(flow, train, method, seed=seed, device="cpu", progress=False)
            tried.append((float(posterior.log_prob(valid).mean()), f"{what}, {count} steps", posterior))
    _, what, posterior = max(tried, key=lambda t: t[0])
    return what, posterior


def tables(report: Report, folder: Path, quick: bool) -> None:
    """Spline flow, RealNVP and a full Gaussian on rows that neither training nor choices have seen."""
    for title, file in TABLES.items():
        if not report.wants(title):
            continue
        with report.case(f"held-out density, {title}", unit="fit") as case:
            found: dict[str, list[float]] = {"full Gaussian": [], "RealNVP": [], "spline": []}
            for seed in range(1 if quick else SEEDS):
                train, valid, test = split(folder / file, seed)
                found["full Gaussian"].append(gaussian(train, test))
                for name in ("RealNVP", "spline"):
                    lengths = (50,) if quick else (300, 1000, 3000)
                    what, posterior = best_fit(name, train, valid, seed, lengths)
                    found[name].append(float(posterior.log_prob(test).mean()))
                    case.facts[f"{name}, seed {seed}, chosen"] = what
            for name, values in found.items():
                case.facts[f"{name}, nats a row"] = ", ".join(f"{v:.3f}" for v in values)
            means = {name: math.fsum(values) / len(values) for name, values in found.items()}
            if not quick:
                case.goal("spline less RealNVP, nats a row", means["spline"] - means["RealNVP"], 0.0)
                case.goal("RealNVP less full Gaussian, nats a row", means["RealNVP"] - means["full Gaussian"], 0.0)


def main() -> int:
    """Steps, moons and, where there are data, tables."""
    options = arguments(__doc__, repeats=15, data="folder of uci_power_plant.txt and uci_wine_red.txt")
    report = Report(__file__, options)
    torch.manual_seed(0)
    steps(report, options.repeats)
    moons(report, options.quick)
    if options.data is not None:
        tables(report, options.data, options.quick)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
