"""Ten tables of yes and no: mixtures of Bernoullis and VAEs, picked on validation rows, scored on test rows.

A mixture's log density is exact; a VAE's is importance-sampled with k draws of its encoder, a lower bound in expectation, so
that the comparison favours the mixture.  The story with the best validation figure is the one that counts.

    python benchmarks/binary_tables.py --data FOLDER [--only nltcs] [--quick]   # FOLDER holds debd_binary10.npz

Tables: Lowd & Davis (2010) and Van Haaren & Davis (2012), in their usual split.
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

from inference import EM, SVI, fit
from inference.amortised import bounds
from zoo import VAE, BernoulliMixture

FILE = "debd_binary10.npz"
TABLES = ("nltcs", "plants", "baudio", "bnetflix", "jester", "accidents", "dna", "mushrooms", "nips", "pumsb_star")
COMPONENTS = (5, 10, 20, 50, 100, 200)
#: Codes and widths.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_codes": 4, "hidden": (32,)},
    {"num_codes": 16, "hidden": (100,)},
    {"num_codes": 32, "hidden": (200, 200)},
)
#: Draws of the encoder for validation and for test rows.
DRAWS, K = 200, 1000
#: SVI runs in legs, of which the best one counts: rows that a leg sees, in tables, within the least and most steps.
LEGS, TABLES_A_LEG, STEPS, ROWS = 4, 40, (200, 1500), 256
#: A setting is given up when its validation figure has fallen by so many nats.
FALLEN = 0.2


def table(folder: Path, name: str, quick: bool) -> dict[str, Tensor]:
    """Rows of bits as floats, by part."""
    with np.load(folder / FILE) as packed:
        width = int(packed[f"{name}_dim"])
        parts = {
            part: np.unpackbits(packed[f"{name}_{part}"], axis=1)[:, :width] for part in ("train", "valid", "test")
        }
    rows = {part: torch.from_numpy(x.astype(np.float32)) for part, x in parts.items()}
    return {part: x[:200] for part, x in rows.items()} if quick else rows


def mixtures(rows: dict[str, Tensor], counts: tuple[int, ...]) -> tuple[float, Any, str]:
    """The best number of components: its validation figure, its answer, its name."""
    found = []
    for K_ in counts:
        if K_ < len(rows["train"]) / 2:
            posterior = fit(BernoulliMixture(K_), rows["train"], EM(restarts=3), seed=0, device="cpu", progress=False)
            found.append((float(posterior.log_prob(rows["valid"]).mean()), posterior, f"{K_} Bernoulli components"))
    return max(found, key=lambda f: f[0])


def autoencoders(rows: dict[str, Tensor], most: int, draws: int) -> tuple[float, Any, str]:
    """The best network and the best moment to stop: validation figure, answer, name."""
    found = []
    batch = min(ROWS, len(rows["train"]))
    steps = min(most, max(STEPS[0], TABLES_A_LEG * len(rows["train"]) // batch))
    for setting in SETTINGS:
        best = -math.inf
        story: Any = VAE(rows["train"].shape[1], **setting)
        for i in range(LEGS):
            lr = 0.008 * 0.5 * (1 + math.cos(math.pi * i / LEGS))
            beta = (0.0, 1.0, max(1, steps // 2)) if i == 0 else 1.0
            svi = SVI(
                steps=steps, lr=lr, batch_size=batch, starts=1, particles=1, schedule="constant", beta=beta, draws=1
            )
            posterior = fit(story, rows["train"], svi, seed=i, device="cpu", progress=False)
            story = posterior.problem.story
            figure = float(bounds(posterior, rows["valid"], draws=draws, k=draws).evidence.mean())
            name = f"VAE {setting['hidden']}, {setting['num_codes']} codes, {(i + 1) * steps} steps"
            found.append((figure, posterior, name))
            best = max(best, figure)
            if figure < best - FALLEN:
                break  # it has begun to learn the training rows by heart
    return max(found, key=lambda f: f[0])


def main() -> int:
    """A case a table."""
    options = arguments(__doc__, repeats=1, data=f"a folder with {FILE}")
    if options.data is None:
        print(f"binary_tables needs --data FOLDER, a folder with {FILE}")
        return 2
    report = Report(__file__, options)
    counts, most, draws, k = ((2, 5), 50, 20, 50) if options.quick else (COMPONENTS, STEPS[1], DRAWS, K)
    for name in TABLES:
        if not report.wants(name):
            continue
        rows = table(options.data, name, options.quick)
        with report.case(f"{name}, {rows['train'].shape[1]} columns, {len(rows['train'])} rows") as case:
            began = time.perf_counter()
            mixed, mixture, mixture_name = mixtures(rows, counts)
            between = time.perf_counter()
            deep, network, network_name = autoencoders(rows, most, draws)
            case.facts |= {
                "seconds of the mixtures": between - began,
                "seconds of the VAEs": time.perf_counter() - between,
            }
            of_mixture = mixture.log_prob(rows["test"])
            ladder = bounds(network, rows["test"], draws=k, k=50)
            case.facts |= {
                mixture_name: float(of_mixture.mean()),
                network_name: float(ladder.evidence.mean()),
                "validation, mixture": mixed,
                "validation, VAE": deep,
                "picked on validation": network_name if deep > mixed else mixture_name,
                "VAE: largest error of a row": float(ladder.error.max()),
                "VAE: share of rows with k-hat > 0.7": float((ladder.khat > 0.7).double().mean()),
            }
            picked = ladder.evidence if deep > mixed else of_mixture.double()
            case.facts["test log p of the story picked"] = float(picked.mean())
            case.facts["standard error over test rows"] = float(picked.std() / math.sqrt(len(picked)))
            case.goal("story picked less mixture, nats a row", float((picked - of_mixture).mean()), 0.0)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
