"""One EM iteration of a large Gaussian mixture on a GPU, beside what the GPU can do at all.

An iteration takes two matrix products of a feature table (1, x, and the products of its columns) with K
columns, and must read the rows once.  The script measures on the same device how fast these products are on
their own, on tables that already lie there, and how fast memory is copied; the shares say how much of either
an iteration reaches.  Before a time counts, the GPU's log-likelihood must be that of the CPU on a part of the
rows.

    python benchmarks/gpu_gmm.py [--quick] [--device cpu]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _mixtures import clusters, our_iterations, our_score, same_start
from _peers import OURS, Report, arguments, per_iteration

SHORT, LONG = 2, 12
#: Rows of the part on which GPU and CPU are compared, and its iterations.
PART, PART_ITERATIONS = 50_000, 5


def synchronised(run: Callable[[int], Any], device: str) -> Callable[[int], Any]:
    """The same, back only when the device has finished."""

    def work(iterations: int) -> Any:
        answer = run(iterations)
        if device == "cuda":
            torch.cuda.synchronize()
        return answer

    return work


def fastest(work: Callable[[], Any], device: str, rounds: int = 10) -> float:
    """Median seconds of a short piece of work, after two calls to warm up."""
    found = []
    for r in range(rounds + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if r >= 2:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def ceilings(device: str, dtype: torch.dtype, features: int, components: int, block: int) -> dict[str, float]:
    """Measured on this device: both products of an iteration, a large square product, and a copy.

    Returns
    -------
    FLOP/s of the products at the shapes of an iteration and of a large square product, and bytes/s read and
    written.
    """
    table = torch.randn(features, block, dtype=dtype, device=device)
    weights = torch.randn(components, features, dtype=dtype, device=device)
    logits, sums = weights @ table, weights.clone()

    def products() -> None:
        torch.mm(weights, table, out=logits)
        torch.mm(logits, table.T, out=sums)

    side = 4096 if device == "cuda" else 1024
    square = torch.randn(side, side, dtype=dtype, device=device)
    target = torch.empty_like(square)
    copy = torch.empty_like(table)
    return {
        "products": 4 * components * features * block / fastest(products, device),
        "square": 2 * side**3 / fastest(lambda: torch.mm(square, square, out=target), device),
        "copy": 2 * table.numel() * table.element_size() / fastest(lambda: copy.copy_(table), device),
    }


def checked(case: Any, x: np.ndarray, components: int, device: str) -> None:
    """The device's log-likelihood against the CPU's, on the first rows from the same start."""
    part = x[:PART].copy()
    scores = []
    for where in ("cpu", device):
        posterior = our_iterations(part, "full", components, device=where)(PART_ITERATIONS)
        scores.append(our_score(posterior, PART_ITERATIONS, len(part)))
    limit = 1e-9 if x.dtype == np.float64 else 1e-5
    case.check(f"log-likelihood a row of {len(part):,} rows, {device} less cpu", scores[1] - scores[0], limit)


def one(report: Report, rows: int, columns: int, components: int, dtype: str, long: int) -> None:
    """Time one kind of numbers and set it beside the ceilings."""
    device, options = report.options.device, report.options
    name = f"full N={rows:,} D={columns} K={components} {dtype} on {device}"
    if not report.wants(name):
        return
    with report.case(name, unit="iteration") as case:
        few = clusters(min(rows, 1_000_000), columns, components).astype(dtype)
        checked(case, few, components, device)
        kind = torch.from_numpy(few).dtype
        where = torch.from_numpy(few).to(device)
        x = where.repeat(-(-rows // len(few)), 1)[:rows].clone()
        x += 0.05 * torch.randn(x.shape, dtype=kind, device=device, generator=torch.Generator(device).manual_seed(0))
        del where
        start = same_start(few, "full", components)[1]
        run = synchronised(our_iterations(x, "full", components, start=start, device=device), device)
        run(1)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        run(SHORT)
        if device == "cuda":
            case.facts["extra memory on the GPU in MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        case.times = per_iteration({OURS: run}, options.repeats, SHORT, long)
        spent = case.times[OURS].median
        features = 1 + columns + columns * (columns + 1) // 2
        limits = ceilings(device, kind, features, components, min(rows, 1_000_000))
        work, traffic = 4.0 * components * features * rows, float(rows * columns * x.element_size())
        case.facts.update(
            {
                "GFLOP in the products of an iteration": work / 1e9,
                "measured TFLOP/s of these products alone": limits["products"] / 1e12,
                "measured TFLOP/s of a large square product": limits["square"] / 1e12,
                "measured GB/s of a copy": limits["copy"] / 1e9,
                "share of the products' own speed": work / spent / limits["products"],
                "share of a square product's speed": work / spent / limits["square"],
                "share of the bandwidth, if the rows were read once": traffic / spent / limits["copy"],
                "rows a second": rows / spent,
            }
        )


def main() -> int:
    """float64 and float32."""
    options = arguments(__doc__, repeats=5, device=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured (--device cpu tries the script out)")
        return 0
    report = Report(__file__, options)
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report.machine["gpu"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        print(report.machine["gpu"])
    sizes = (20_000, 8, 8) if options.quick else (10_000_000, 16, 16)
    for dtype in ("float64", "float32"):
        one(report, *sizes, dtype, long=LONG if not options.quick else 8)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
