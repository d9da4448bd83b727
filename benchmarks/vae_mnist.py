"""VAE with one layer of codes on static binarised MNIST: learning curve and importance-sampled test figure.

A third of the time goes to a race of settings; the one whose bound on validation rows is best goes on, its step size falling
from leg to leg.  The weights with the best validation bound answer for the test rows, by importance sampling with k draws of
the encoder a row: an estimate of log p(x) that is a lower bound in expectation.

    python benchmarks/vae_mnist.py --data FOLDER [--minutes 60] [--quick]   # FOLDER holds binarized_mnist_static_packed.npz

The split and the fixed binarisation are those of Larochelle & Murray (AISTATS 2011).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peers import Report, arguments
from torch import Tensor

from inference import SVI, Posterior, fit
from inference.amortised import bounds
from zoo import VAE

FILE, PIXELS, ROWS = "binarized_mnist_static_packed.npz", 784, 256
#: Settings that race: widths, codes, activation and the step size of the networks (a quarter of SVI's).
SETTINGS: tuple[dict[str, Any], ...] = (
    {"hidden": (200, 200), "num_codes": 40, "activation": "tanh", "lr": 0.008},
    {"hidden": (300, 300), "num_codes": 40, "activation": "relu", "lr": 0.004},
    {"hidden": (400,), "num_codes": 20, "activation": "relu", "lr": 0.004},
)
#: Legs that the winner runs, and the share of the time that goes to the race.
LEGS, RACE = 6, 1 / 3


def images(folder: Path, quick: bool) -> dict[str, Tensor]:
    """Rows of 784 bits as floats, by part."""
    with np.load(folder / FILE) as packed:
        parts = {name: np.unpackbits(packed[name], axis=1)[:, :PIXELS] for name in packed.files}
    rows = {name: torch.from_numpy(x.astype(np.float32)) for name, x in parts.items()}
    return {name: x[: 2000 if name == "train" else 200] for name, x in rows.items()} if quick else rows


def leg(story: VAE, rows: Tensor, lr: float, minutes: float, seed: int) -> Posterior:
    """Train from the story's weights on; its step size stays what it is."""
    svi = SVI(steps=10**7, lr=lr, batch_size=ROWS, starts=1, particles=1, schedule="constant", draws=1)
    return fit(story, rows, svi, seed=seed, budget=60 * minutes, device="cpu", progress=False)


class Curve:
    """Validation bounds as training goes on."""

    def __init__(self, valid: Tensor) -> None:
        self.valid, self.began = valid, time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.steps: dict[str, int] = {}

    def add(self, name: str, posterior: Posterior, lr: float) -> float:
        """One more row; returns the importance-weighted bound of 50 draws on validation rows."""
        found = bounds(posterior, self.valid, draws=50, k=50)
        self.steps[name] = self.steps.get(name, 0) + len(posterior.history)
        row = {
            "setting": name,
            "steps": self.steps[name],
            "seconds": round(time.perf_counter() - self.began, 1),
            "step size": lr,
            "training ELBO of the last steps": round(float(np.mean(posterior.history[-200:])) / num_rows(posterior), 3),
            "validation ELBO": round(float(found.elbo.mean()), 3),
            "validation IWAE(50)": round(float(found.iwae.mean()), 3),
        }
        self.rows.append(row)
        print("  ", row, flush=True)
        return float(found.iwae.mean())


def num_rows(posterior: Posterior) -> int:
    """Rows that were fitted."""
    return int(posterior.structure.num_rows or 1)


def named(setting: dict[str, Any]) -> str:
    """784-200-200-40 tanh, step size 0.008."""
    widths = "-".join(map(str, (PIXELS, *setting["hidden"], setting["num_codes"])))
    return f"{widths} {setting['activation']}, step size {setting['lr']:g}"


def story_of(setting: dict[str, Any]) -> VAE:
    """The story with these settings, untrained."""
    return VAE(PIXELS, setting["num_codes"], hidden=setting["hidden"], activation=setting["activation"])


def trained(rows: dict[str, Tensor], minutes: float, curve: Curve) -> tuple[str, Posterior]:
    """The winner of the race after its legs: its name, and the answer with the best validation bound."""
    share = RACE * minutes / len(SETTINGS)
    raced = []
    for setting in SETTINGS:
        posterior = leg(story_of(setting), rows["train"], setting["lr"], share, seed=0)
        raced.append((curve.add(named(setting), posterior, setting["lr"]), named(setting), setting, posterior))
    best, name, setting, posterior = max(raced, key=lambda found: found[0])
    kept = posterior
    for i in range(LEGS):
        lr = setting["lr"] * 0.5 * (1 + math.cos(math.pi * (i + 0.5) / LEGS))
        posterior = leg(posterior.problem.story, rows["train"], lr, (1 - RACE) * minutes / LEGS, seed=i + 1)
        found = curve.add(name, posterior, lr)
        if found > best:
            best, kept = found, posterior
    return name, kept


def main() -> int:
    """One case."""
    options = arguments(__doc__, repeats=1, data=f"a folder with {FILE}", minutes=60.0)
    if options.data is None:
        print(f"vae_mnist needs --data FOLDER, a folder with {FILE}")
        return 2
    report = Report(__file__, options)
    rows = images(options.data, options.quick)
    minutes, k = (0.5, 50) if options.quick else (options.minutes, 1000)
    with report.case(f"static binarised MNIST, {minutes:g} minutes of training") as case:
        curve = Curve(rows["valid"][:2000])
        name, posterior = trained(rows, minutes, curve)
        case.facts |= {"setting": name, "curve": curve.rows, "seconds": time.perf_counter() - curve.began}
        case.facts["parameters"] = sum(p.numel() for p in posterior.problem.story.parameters())
        found = bounds(posterior, rows["test"], draws=k, k=50)
        error = float(found.evidence.std() / math.sqrt(len(found.evidence)))
        case.facts |= {
            f"test log p(x), importance sampling, k = {k}": float(found.evidence.mean()),
            "standard error over test rows": error,
            "test ELBO": float(found.elbo.mean()),
            "test IWAE(50)": float(found.iwae.mean()),
            "share of test rows with k-hat > 0.7": float((found.khat > 0.7).double().mean()),
        }
        ordered = found.elbo.mean() <= found.iwae.mean() <= found.evidence.mean()
        case.check("ELBO <= IWAE <= importance sampling", float(ordered), 1.0, least=True)
        if not options.quick:
            case.goal("test negative log-likelihood, nats", -float(found.evidence.mean()), 92.0, most=True)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
