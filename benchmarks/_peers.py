"""What the benchmarks share: times in turns, checks before a time counts, and a JSON beside each script.

A benchmark times two or more *sides* (ours and its peers) in one run, a round at a time and in rotating
order, so that whatever else the machine does falls on all of them.  Medians are compared and the quartiles
shown.  A side counts only after the checks of its case have passed: a fast wrong answer has no time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "pyro-ppl", "numpy", "scipy", "scikit-learn")
OURS = "ours"


# -- command line --------------------------------------------------------------------------------------------


def arguments(
    description: str | None,
    *,
    repeats: int,
    device: bool = False,
    data: str | None = None,
    minutes: float | None = None,
    budget: float | None = None,
    threads: int = 1,
) -> argparse.Namespace:
    """The command line of every benchmark: --quick, --repeats, --threads, --only and --json.

    One thread is the default: a BLAS whose threads wait for each other on a busy machine can take twenty
    times as long with two as with one, and a peer must not lose for that.

    Parameters
    ----------
    description
        The script's docstring; its first line is shown by --help.
    repeats
        Rounds of a full run; --quick makes two.
    device
        Whether to offer --device.
    data
        What --data is to hold, where there is such an option.
    minutes
        Default of --minutes, how long to train, where there is such an option.
    budget
        Default of --budget, seconds that the whole may take, where there is such an option.
    threads
        Default of --threads.
    """
    parser = argparse.ArgumentParser(description=(description or "").strip().split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small data, two rounds, no JSON: does it still run?")
    parser.add_argument("--repeats", type=int, help=f"rounds of every side (default {repeats}, 2 with --quick)")
    parser.add_argument("--threads", type=int, default=threads, help=f"threads of all sides (default {threads})")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write (default: beside the script; nowhere with --quick)")
    if device:
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    if data is not None:
        parser.add_argument("--data", type=Path, help=data)
    if minutes is not None:
        parser.add_argument("--minutes", type=float, default=minutes, help=f"of training (default {minutes:g})")
    if budget is not None:
        told = f"seconds that the whole may take (default {budget:g})"
        parser.add_argument("--budget", type=float, default=budget, help=told)
    options = parser.parse_args()
    for package in ("inference", "zoo", "threadpoolctl"):
        if find_spec(package) is None:
            parser.error(f"{package} cannot be imported; install the project: python -m pip install -e '.[bench]'")
    options.repeats = options.repeats or (2 if options.quick else repeats)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return options


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_threads(count: int) -> None:
    """Give PyTorch, BLAS and OpenMP the same number of threads, for the rest of the process."""
    import numpy  # noqa: F401  (its BLAS must be loaded before it can be limited)
    import scipy.linalg  # noqa: F401
    import sklearn.mixture  # noqa: F401  (and scikit-learn's OpenMP)
    import torch
    from threadpoolctl import threadpool_limits

    threadpool_limits(count)
    torch.set_num_threads(count)


# -- times ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds of every round of one side."""

    rounds: list[float]

    @property
    def median(self) -> float:
        """Middle of all rounds."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the rounds was faster than the first, a quarter slower than the second."""
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def as_json(self) -> dict[str, Any]:
        """Median, quartiles and all rounds."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "rounds": self.rounds}


def seconds(work: Callable[[], Any]) -> float:
    """Wall seconds of one call, with the garbage of the last one swept up before."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rotating(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) with every round beginning one name later than the last."""
    for r in range(rounds):
        for i in range(len(names)):
            yield r, names[(r + i) % len(names)]


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Seconds of every side, round by round in rotating order; warm the sides up before."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _, name in rotating(list(sides), rounds):
        found[name].append(seconds(sides[name]))
    return {name: Times(values) for name, values in found.items()}


def per_iteration(sides: Mapping[str, Callable[[int], Any]], rounds: int, short: int, long: int) -> dict[str, Times]:
    """Seconds that one more iteration takes: `long` iterations less `short` ones, by how many more they are.

    Set-up and the last E-step are the same in both runs and drop out.

    Parameters
    ----------
    sides
        Name -> function that runs the given number of iterations from the same start every time.
    rounds, short, long
        Rounds, and the two numbers of iterations.

    Raises
    ------
    ValueError
        `short` is not smaller than `long`.
    RuntimeError
        The iterations took no more time than the noise.
    """
    if not 0 < short < long:
        raise ValueError(f"per_iteration needs 0 < short < long, got {short} and {long}")
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _, name in rotating(list(sides), rounds):
        few, many = (seconds(partial(sides[name], n)) for n in (short, long))
        found[name].append((many - few) / (long - short))
    times = {name: Times(values) for name, values in found.items()}
    for name, side in times.items():
        if side.median <= 0:
            raise RuntimeError(f"{name}: {long - short} iterations are too little work to be seen among the noise")
    return times


# -- report --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One case: what was checked, how long the sides took, which goals were met.

    Attributes
    ----------
    name
        As printed, and what --only looks into.
    unit
        What the seconds are of: "iteration", "fit".
    """

    name: str
    unit: str = "fit"
    checks: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, Times] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def sound(self) -> bool:
        """Whether the times count."""
        return not self.failed and all(check["passed"] for check in self.checks)

    def check(self, what: str, found: float, limit: float, *, least: bool = False) -> None:
        """The sizes |found| must not pass `limit`; with `least`, found must not be below it."""
        passed = found >= limit if least else abs(found) <= limit
        self.checks.append(
            {"what": what, "found": float(found), "limit": limit, "least": least, "passed": bool(passed)}
        )

    def ratio(self, peer: str, side: str = OURS) -> float:
        """Median of `peer` over median of `side`: above 1 the side is faster."""
        return self.times[peer].median / self.times[side].median

    def goal(self, what: str, found: float, bound: float, *, most: bool = False) -> None:
        """A figure to be reached; only reported, and not counted while a check fails."""
        met = (found <= bound if most else found >= bound) if self.sound else None
        self.goals.append({"what": what, "found": float(found), "bound": bound, "most": most, "met": met})

    def faster(self, peer: str, bound: float | None = None, side: str = OURS) -> None:
        """The ratio of `peer` to `side`, with the bound that is hoped for."""
        ratio = self.ratio(peer, side)
        self.facts[f"{peer} / {side}"] = ratio
        if bound is not None:
            self.goal(f"{peer} / {side}", ratio, bound)

    def as_json(self) -> dict[str, Any]:
        """Everything about the case; no seconds unless it is sound."""
        return {
            "case": self.name,
            "unit": self.unit,
            "sound": self.sound,
            "failed": self.failed,
            "checks": self.checks,
            "seconds": {name: times.as_json() for name, times in self.times.items()} if self.sound else {},
            "goals": self.goals if self.sound else [],
            "facts": self.facts,
        }

    def lines(self) -> list[str]:
        """The case in words."""
        lines = [self.name]
        for check in self.checks:
            sign, word = (
                (">=" if check["least"] else "<="),
                "ok" if check["passed"] else "FAILED, times not counted",
            )
            lines.append(f"  check  {check['what']}: {check['found']:.3g} (must be {sign} {check['limit']:g}) {word}")
        if self.failed:
            return [*lines, f"  failed {self.failed}"]
        if self.sound:
            for name, times in self.times.items():
                low, high = times.quartiles
                spread = f"quartiles {low:.4g} to {high:.4g}"
                lines.append(f"  {name:<24} {times.median:10.4g} s per {self.unit}   ({spread})")
            for goal in self.goals:
                sign, word = ("<=" if goal["most"] else ">="), "met" if goal["met"] else "missed"
                lines.append(f"  goal   {goal['what']}: {goal['found']:.3g} ({sign} {goal['bound']:.3g}) {word}")
        told = {goal["what"] for goal in self.goals} if self.sound else set()
        for name, value in self.facts.items():
            if name not in told and not isinstance(value, list) and (self.sound or " / " not in name):
                lines.append(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
        return lines


class Report:
    """Prints the cases of one benchmark as they end, and keeps them in a JSON.

    Parameters
    ----------
    script
        `__file__` of the benchmark.
    options
        What `arguments` returned.
    """

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        self.script, self.options = Path(script), options
        self.path: Path | None = options.json
        if self.path is None and not options.quick and not options.only:
            self.path = self.script.with_suffix(".json")
        same_threads(options.threads)
        self.machine = machine(options.threads)
        self.cases: list[Case] = []
        shown = ", ".join(f"{name} {number}" for name, number in self.machine["versions"].items())
        print(
            f"{self.machine['cpu']}, {self.machine['cores']} cores, {options.threads} threads; {shown}",
            flush=True,
        )

    @contextmanager
    def case(self, name: str, unit: str = "fit") -> Iterator[Case]:
        """A case; whatever it raises is written down, and the next case goes on."""
        case = Case(name, unit)
        try:
            yield case
        except Exception as error:
            case.failed = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        gc.collect()
        self.cases.append(case)
        print("\n".join(case.lines()), flush=True)
        self.write()

    def wants(self, name: str) -> bool:
        """Whether --only lets this case through."""
        return self.options.only in name

    def write(self) -> None:
        """Write what there is so far."""
        if self.path is None:
            return
        content = {
            "benchmark": self.script.stem,
            "command": f"python benchmarks/{self.script.name} {' '.join(sys.argv[1:])}".strip(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": self.machine,
            "repeats": self.options.repeats,
            "cases": [case.as_json() for case in self.cases],
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def end(self) -> int:
        """Exit status: 1 where a case failed or its checks did."""
        bad = [case.name for case in self.cases if not case.sound]
        if not self.cases:
            print(f"no case contains {self.options.only!r}")
        if bad:
            print(f"not counted: {', '.join(bad)}")
        if self.path is not None and self.cases:
            print(f"written to {os.path.relpath(self.path)}")
        return int(bool(bad))


def machine(threads: int) -> dict[str, Any]:
    """What ran: processor, cores, threads and versions."""
    return {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, "") or platform.processor() or platform.machine()


@contextmanager
def silent() -> Iterator[None]:
    """Without warnings: a fixed number of iterations never "converges"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
