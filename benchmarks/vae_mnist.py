"""VAE with one layer of codes on static binarised MNIST: learning curve and importance-sampled test figure.

One `fit` on the training rows: the step size falls along a cosine, weights are averaged, and 2 % of the rows, which are not
climbed on, choose the step whose weights answer. The test rows are scored once, by importance sampling with k draws of the
encoder a row: an estimate of log p(x) that is low on average. `--iwae` climbs the importance-weighted bound of five draws.

    python benchmarks/vae_mnist.py --data FOLDER [--iwae] [--quick]   # FOLDER holds binarized_mnist_static_packed.npz

The split and the fixed binarisation are those of Larochelle & Murray (AISTATS 2011).
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from _peers import Report, arguments
from torch import Tensor

from inference import SVI, fit
from zoo import VAE

FILE, PIXELS = "binarized_mnist_static_packed.npz", 784
CODES, HIDDEN = 40, (200, 200)
#: Steps of 100 rows: 400 epochs for the ELBO, 180 for the bound of five draws.
STEPS = {"elbo": 200_000, "iwae": 90_000}


def images(folder: Path, quick: bool) -> dict[str, Tensor]:
    """Rows of 784 bits as floats, by part."""
    with np.load(folder / FILE) as packed:
        parts = {name: np.unpackbits(packed[name], axis=1)[:, :PIXELS] for name in packed.files}
    rows = {name: torch.from_numpy(x.astype(np.float32)) for name, x in parts.items()}
    return {name: x[: 2000 if name == "train" else 200] for name, x in rows.items()} if quick else rows


def main() -> int:
    """One case."""
    objective = "iwae" if "--iwae" in sys.argv else "elbo"
    sys.argv = [a for a in sys.argv if a != "--iwae"]
    options = arguments(__doc__, repeats=1, data=f"a folder with {FILE}")
    if options.data is None:
        print(f"vae_mnist needs --data FOLDER, a folder with {FILE}")
        return 2
    report = Report(__file__, options)
    rows = images(options.data, options.quick)
    steps, k = (300, 50) if options.quick else (STEPS[objective], 1000)
    svi = SVI(
        steps=steps,
        batch_size=100,
        particles=1 if objective == "elbo" else 5,
        starts=1,
        lr=0.004,
        schedule="cosine",
        average=0.9995,
        validation=0.02,
        objective=objective,
        mode="graph",
        draws=1,
    )
    with report.case(f"static binarised MNIST, {objective}, {steps} steps") as case:
        began = time.process_time()
        posterior = fit(VAE(PIXELS, CODES, hidden=HIDDEN, activation="tanh"), rows["train"], svi, seed=0, device="cpu")
        case.facts |= {"CPU minutes of training": (time.process_time() - began) / 60}
        case.facts["bound on rows held out, by step"] = posterior.diagnostics["validation"][
            :: 1 if options.quick else 5
        ]
        for part in ("valid", "test"):
            found = posterior.ladder(rows[part][:2000] if part == "valid" else rows[part], draws=k, k=min(50, k))
            case.facts |= {
                f"{part} log p(x), importance sampling, k = {k}": float(found.evidence.mean()),
                f"{part} standard error over rows": float(found.evidence.std() / math.sqrt(len(found.evidence))),
                f"{part} ELBO": float(found.elbo.mean()),
                f"{part} IWAE(50)": float(found.iwae.mean()),
                f"{part} share of rows with k-hat > 0.7": float((found.khat > 0.7).double().mean()),
            }
        ordered = found.elbo.mean() <= found.iwae.mean() <= found.evidence.mean()
        case.check("ELBO <= IWAE <= importance sampling", float(ordered), 1.0, least=True)
        if not options.quick:
            case.goal("test negative log-likelihood, nats", -float(found.evidence.mean()), 92.0, most=True)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
