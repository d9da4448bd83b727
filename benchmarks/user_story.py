"""A Gaussian mixture as a user would write it: a bare Pyro function with names of its own.

Three sides run the same iterations from the same unknowns: the matrix-product kernel that the story's
structure is recognised for, the generic contraction (`EM(kernels=False)`) that any enumerable story gets, and
scikit-learn.  Set-up drops out, as in gmm_iteration.py.

    python benchmarks/user_story.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _memory import extra_memory
from _mixtures import clusters, our_iterations, our_score, same_start, sklearn_iterations
from _peers import Report, arguments, per_iteration

GROUPS = 8
SHORT = 1


def story(measurements: torch.Tensor) -> None:
    """Eight groups of any shape."""
    size = measurements.shape[1]
    share = pyro.sample("share", dist.Dirichlet(torch.ones(GROUPS)))
    with pyro.plate("groups", GROUPS):
        centre = pyro.sample("centre", dist.Normal(torch.zeros(size), 10.0).to_event(1))
        inverse = pyro.sample("inverse", dist.Wishart(torch.tensor(size + 2.0), torch.eye(size)))
    with pyro.plate("people", len(measurements)):
        group = pyro.sample("group", dist.Categorical(share))
        pyro.sample(
            "measurements",
            dist.MultivariateNormal(centre[group], precision_matrix=inverse[group]),
            obs=measurements,
        )


def our_side(x: np.ndarray, kernels: bool) -> Callable[[int], Any]:
    """EM on the user's story, through the kernel or through the contraction."""
    start = same_start(x, "full", GROUPS)[1]
    names = {"share": start["pi"], "centre": start["mu"], "inverse": start["Lambda"]}
    return our_iterations(x, "full", GROUPS, story=story, start=names, kernels=kernels)


def prepared(rows: int, columns: int, kernels: bool) -> Callable[[], Any]:
    """For the watched process: see `extra_memory`."""
    x = clusters(rows, columns, GROUPS)
    our_side(x[:2_000].copy(), kernels)(1)
    run = our_side(x, kernels)
    return lambda: run(SHORT)


def main() -> int:
    """One case, three sides."""
    options = arguments(__doc__, repeats=3)
    report = Report(__file__, options)
    rows, columns, long = (20_000, 4, 11) if options.quick else (1_000_000, 8, 4)
    with report.case(f"user's mixture, full N={rows:,} D={columns} K={GROUPS}", unit="iteration") as case:
        x = clusters(rows, columns, GROUPS)
        kernel, contraction = our_side(x, True), our_side(x, False)
        peer = sklearn_iterations(x, "full", GROUPS)
        reached = peer(long).score(x)
        for name, run in (("kernel", kernel), ("contraction", contraction)):
            gap = our_score(run(long), long, rows) - reached
            case.check(f"log-likelihood a row, {name} less sklearn", gap, 1e-6)
        sides = {"kernel": kernel, "contraction": contraction, "sklearn": peer}
        case.times = per_iteration(sides, options.repeats, SHORT, long)
        case.faster("sklearn", side="kernel")
        case.goal("contraction / kernel", case.ratio("contraction", "kernel"), 5.0, most=True)
        case.goal("sklearn / contraction", case.ratio("sklearn", "contraction"), 2.0)
        for name, kernels in (("kernel", True), ("contraction", False)):
            taken = extra_memory(prepared, rows, columns, kernels, threads=options.threads)
            case.facts[f"{name}, extra memory in MB"] = taken
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
