"""One training step of a 784-400-20 VAE: the recorded story beside a hand-written PyTorch loop and Pyro's SVI.step.

The hand-written loop runs twice: with the fused Adam that ours uses, and with Adam as `torch.optim` gives it by default. Last
comes a whole `fit` of scikit-learn's digits beside the same number of bare recorded steps: what set-up and answer add.

All sides take the same batches, one draw of the guide and the same Adam settings. Before a time counts, the recorded
step's ELBO and gradient must equal the program's under one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _peers import OURS, Report, arguments, interleaved
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import zoo as stories
from inference import SVI, fit
from inference.methods.ascent import Ascent
from inference.methods.paired import PairTarget
from inference.problem import prepare
from zoo import load

PIXELS, HIDDEN, CODES = 784, 400, 20
RATE = 1e-3
BLOCK = 10


class VAE(nn.Module):
    """z ~ Normal(0, 1), x ~ Bernoulli(decoder(z)), and an encoder of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * CODES))
        self.decoder = nn.Sequential(nn.Linear(CODES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def model(self, x: Tensor | None = None, num_data: int = 100) -> Tensor:
        """The story."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(CODES), 1.0).to_event(1))
            return pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's guess."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))


def repeated(step: Callable[[], Any]) -> Callable[[], None]:
    """A block of steps: what one reading of the clock spans."""

    def run() -> None:
        for _ in range(BLOCK):
            step()

    return run


def by_hand(x: Tensor, batch: int, fused: bool | None) -> Callable[[], Any]:
    """A plain eager loop: no effect handlers, no validation."""
    vae = VAE()
    optimiser = torch.optim.Adam(vae.parameters(), lr=RATE, betas=(0.9, 0.99), fused=fused)

    def step() -> None:
        rows = x[torch.randint(len(x), (batch,))]
        loc, raw = vae.encoder(rows).chunk(2, -1)
        scale = softplus(raw)
        noise = torch.randn_like(loc)
        z = loc + scale * noise
        likelihood = -binary_cross_entropy_with_logits(vae.decoder(z), rows, reduction="sum")
        ratio = (-0.5 * z**2 + 0.5 * noise**2 + scale.log()).sum()
        loss = -(likelihood + ratio) * (len(x) / batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def by_pyro(x: Tensor, batch: int) -> Callable[[], Any]:
    """Pyro's SVI.step, validation off."""
    vae = VAE()
    pyro.clear_param_store()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": RATE}), pyro.infer.Trace_ELBO())

    def step() -> None:
        with pyro.validation_enabled(False):
            svi.step(x[torch.randint(len(x), (batch,))])

    return step


def ours(x: Tensor, batch: int, mode: str) -> tuple[PairTarget, Callable[[], Any]]:
    """The step that `fit(story, x, SVI(...))` makes."""
    target = PairTarget(prepare(VAE(), x, seed=0, device="cpu"), 1, batch, mode)
    options = SVI(lr=RATE)
    ascent = Ascent(target, target.start(), options.lr, 10**9, options.tol, options.patience)
    return target, ascent.step


def gap(target: PairTarget, batch: int) -> float:
    """Largest relative difference of the recorded step's value and gradient from the program's, under one seed."""
    eager = PairTarget(target.problem, 1, batch, "eager")
    leaves, rows = target.start(), torch.arange(batch)
    answers = []
    for side in (target, eager):
        torch.manual_seed(1)
        answers.append(side.call(*leaves.values(), rows))
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(*answers, strict=True))


def main() -> int:
    """Batches of 128 and 4,096 rows."""
    options = arguments(__doc__, repeats=15)
    report = Report(__file__, options)
    torch.manual_seed(0)
    for batch, goal in ((128, 1.25), (4096, 1.11)):
        if options.quick and batch > 128:
            continue
        x = (torch.rand(max(1000, 2 * batch), PIXELS) < 0.3).float()
        with report.case(f"VAE 784-400-20, batch {batch}", unit=f"{BLOCK} steps") as case:
            target, step = ours(x, batch, "graph")
            compiled, quick = ours(x, batch, "inductor")
            case.check(
                "largest relative difference of value and gradients, graph and program", gap(target, batch), 1e-4
            )
            case.check(
                "the same of the compiled step", gap(compiled, batch) if compiled.mode == "inductor" else math.inf, 1e-4
            )
            sides = {
                OURS: step,
                "ours, compiled by Inductor": quick,
                "PyTorch by hand": by_hand(x, batch, True),
                "PyTorch by hand, default Adam": by_hand(x, batch, None),
                "pyro SVI.step": by_pyro(x, batch),
            }
            blocks = {name: repeated(side) for name, side in sides.items()}
            for block in blocks.values():
                block()
            case.times = interleaved(blocks, options.repeats)
            case.faster("PyTorch by hand", goal)
            case.faster("pyro SVI.step", 2.0 if batch == 128 else 1.0)
            case.faster("pyro SVI.step", 2.0 if batch == 128 else 1.0, "ours, compiled by Inductor")
    steps = 300 if options.quick else 3000
    x = load("binary_digits").x.float()
    svi = SVI(steps=steps, batch_size=128, particles=1, starts=1, schedule="constant", lr=4 * RATE, mode="graph")
    with report.case(f"digits, {steps} steps of a VAE", unit="whole fit") as case:
        target = PairTarget(prepare(stories.VAE(64, 8), x, seed=0, device="cpu"), 1, 128, "graph")

        def bare() -> None:
            Ascent(target, target.start(), svi.lr, steps, svi.tol, svi.patience, schedule="constant").run(steps)

        sides = {
            OURS: lambda: fit(stories.VAE(64, 8), x, svi, seed=0, progress=False),
            "the recorded steps alone": bare,
        }
        case.times = interleaved(sides, min(options.repeats, 5))
        case.faster("the recorded steps alone", 1 / 1.3)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
