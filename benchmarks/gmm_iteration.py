"""One EM iteration of a Gaussian mixture: derived from the story, against scikit-learn's hand-written one.

Both sides begin at the same unknowns, maximise the same likelihood with the same least variance, and must
have the same log-likelihood after the same iterations before a time counts.  Set-up drops out: the time of an
iteration is the difference of a long and a short run, divided by the iterations between them.

    python benchmarks/gmm_iteration.py [--quick] [--only full]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from _memory import extra_memory
from _mixtures import clusters, our_iterations, our_score, sklearn_iterations
from _peers import OURS, Report, arguments, per_iteration

SHORT, LONG = 2, 12


@dataclass(frozen=True)
class Setup:
    """One case: the mixture, the rows, and what is hoped for."""

    covariance: str
    rows: int
    columns: int
    components: int
    goal: float
    dtype: str = "float64"
    memory: float | None = None
    long: int = LONG

    @property
    def name(self) -> str:
        """As printed."""
        size = f"N={self.rows:,} D={self.columns} K={self.components}"
        return f"{self.covariance} {size}" + ("" if self.dtype == "float64" else f" {self.dtype}")


FULL = (
    Setup("full", 100_000, 16, 16, goal=10),
    Setup("diag", 100_000, 16, 16, goal=6),
    Setup("tied", 100_000, 16, 16, goal=20),
    Setup("spherical", 100_000, 16, 16, goal=6),
    Setup("full", 1_000_000, 8, 8, goal=12, memory=150, long=7),
    Setup("full", 100_000, 16, 16, goal=12, dtype="float32"),
)
QUICK = (
    Setup("full", 12_000, 8, 8, goal=10, memory=150, long=20),
    Setup("diag", 12_000, 8, 8, goal=6, long=20),
    Setup("tied", 12_000, 8, 8, goal=20, long=20),
    Setup("spherical", 12_000, 8, 8, goal=6, long=20),
    Setup("full", 12_000, 8, 8, goal=12, dtype="float32", long=20),
)


def prepared(side: str, setup: Setup) -> Callable[[], Any]:
    """For the watched process: data, a small run that imports everything, then the run that counts."""
    make = our_iterations if side == OURS else sklearn_iterations
    x = clusters(setup.rows, setup.columns, setup.components).astype(setup.dtype)
    make(x[:2_000].copy(), setup.covariance, setup.components)(1)
    run = make(x, setup.covariance, setup.components)
    return lambda: run(SHORT)


def one(report: Report, setup: Setup) -> None:
    """Check, time and weigh one case."""
    with report.case(setup.name, unit="iteration") as case:
        x = clusters(setup.rows, setup.columns, setup.components).astype(setup.dtype)
        ours = our_iterations(x, setup.covariance, setup.components)
        theirs = sklearn_iterations(x, setup.covariance, setup.components)
        sides = {OURS: ours, "sklearn": theirs}
        score = our_score(ours(setup.long), setup.long, len(x))
        if setup.dtype == "float64":
            gap = score - theirs(setup.long).score(x)
            case.check("log-likelihood a row, ours less scikit-learn's", gap, 1e-6)
        else:
            wide = x.astype(np.float64)
            exact = our_score(our_iterations(wide, setup.covariance, setup.components)(setup.long), setup.long, len(x))
            case.check("log-likelihood a row, float32 less float64", score - exact, 1e-5)
            gap = exact - sklearn_iterations(wide, setup.covariance, setup.components)(setup.long).score(wide)
            case.check("log-likelihood a row in float64, ours less scikit-learn's", gap, 1e-6)
            sides["sklearn, float64"] = sklearn_iterations(wide, setup.covariance, setup.components)
            theirs(1)
        case.times = per_iteration(sides, report.options.repeats, SHORT, setup.long)
        case.faster("sklearn", setup.goal)
        if "sklearn, float64" in sides:
            case.faster("sklearn, float64")
        if setup.memory is not None:
            taken = {side: extra_memory(prepared, side, setup, threads=report.options.threads) for side in sides}
            case.facts.update({f"{side}, extra memory in MB": value for side, value in taken.items()})
            case.goal("extra memory in MB", taken[OURS], setup.memory, most=True)


def main() -> int:
    """Every case."""
    options = arguments(__doc__, repeats=5)
    report = Report(__file__, options)
    for setup in QUICK if options.quick else FULL:
        if report.wants(setup.name):
            one(report, setup)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
