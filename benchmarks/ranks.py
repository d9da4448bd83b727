"""How far two and three processes end from one, what they send, and how long they take.

    python benchmarks/ranks.py [--json FILE] [piece ...]       pieces of tests/ranks_work.py; a dozen by default

For every piece of work: the largest deviation from one process, relative to the largest number of a site; the seconds of one
and of two processes; the exchanges of the first rank and the bytes of the commonest, against the formula of docs/scale.md.
On one machine, whose cores the processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
#: Largest deviation that is allowed, and numbers of the commonest exchange by docs/scale.md (None where there is no formula).
PIECES: dict[str, tuple[float, int | None]] = {
    "gmm": (1e-10, 3 * (3 * 10 + 1)),  # R (K F + 1), F = 1 + 3 + 6
    "contraction": (1e-10, None),
    "mixed": (1e-10, None),
    "hmm": (1e-10, 2 * (3 * 3 + 3 + 9 + 1)),  # R (K F + K + K^2 + 1), F = 1 + 2
    "ppca": (1e-10, 6 + 36),  # D + D^2, once
    "fa_missing": (1e-10, 6 * (3 + 2 * 2 + 4) + 2),  # K D (3 + 2 q + q^2) + K + 1
    "mfa": (1e-10, None),
    "on_rows": (1e-10, 8),  # unknowns + 1
    "svi_derived": (1e-8, 2 * (5 + 1)),  # S (L + 1)
    "svi_params": (1e-8, 6 + 6 + 1 + 2 + 1),  # parameters + 1
    "svi_rows": (1e-8, 1 + 1),
    "nuts": (1e-9, None),
    "hmc": (1e-9, 5 * (3 * 10 + 1)),  # chains (3 L + 1)
}


def child(folder: Path, names: list[str]) -> None:
    """The work of one rank, its seconds, and what it sent."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import ranks_work
    import torch
    import torch.distributed as dist

    from inference.distributed import start

    torch.set_num_threads(1)
    start("split")
    sent: Counter[int] = Counter()
    reduce = dist.all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent[tensor.numel()] += 1
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    arrays, facts = {}, {}
    for name in names:
        sent.clear()
        began = time.perf_counter()
        found = ranks_work.WORK[name]()
        facts[name] = {"seconds": time.perf_counter() - began, "sent": sorted(sent.items(), key=lambda s: -s[1])}
        arrays |= {f"{name}/{key}": np.asarray(value) for key, value in found.items()}
    np.savez(folder / f"{ranks_work.SIZE}-{ranks_work.RANK}.npz", **arrays)
    (folder / f"{ranks_work.SIZE}-{ranks_work.RANK}.json").write_text(json.dumps(facts))


def results(size: int, folder: Path, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Numbers and facts of the first of `size` ranks."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    command = [sys.executable, *launch, __file__, "--child", str(folder), *names]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, check=True, cwd=ROOT)
    return dict(np.load(folder / f"{size}-0.npz")), json.loads((folder / f"{size}-0.json").read_text())


def deviation(name: str, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Of a piece from one process."""
    worst = 0.0
    for key, value in wanted.items():
        if key.startswith(f"{name}/") and value.size:
            value, other = value.astype(float), found[key].astype(float)
            worst = max(worst, float(np.abs(other - value).max() / max(1.0, np.abs(value).max())))
    return worst


def main() -> int:
    """Print the table; 1 where a deviation is too large."""
    parser = argparse.ArgumentParser(description="Two and three processes against one.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path)
    parser.add_argument("pieces", nargs="*")
    asked = parser.parse_args()
    names = asked.pieces or list(PIECES)
    if asked.child:
        child(asked.child, names)
        return 0
    if unknown := [n for n in names if n not in PIECES]:
        parser.error(f"{unknown[0]!r} is no piece; there are {', '.join(PIECES)}")
    with tempfile.TemporaryDirectory() as place:
        found = {size: results(size, Path(place), names) for size in (1, 2, 3)}
    rows = []
    print(
        f"{'piece':<13}{'P=2':>9}{'P=3':>9}{'bar':>8}{'s, P=1':>9}{'s, P=2':>9}{'sent':>7}{'numbers':>9}{'formula':>9}"
    )
    for name in names:
        bar, formula = PIECES[name]
        off = {size: deviation(name, found[size][0], found[1][0]) for size in (2, 3)}
        seconds = {size: found[size][1][name]["seconds"] for size in (1, 2, 3)}
        common = next(iter(found[2][1][name]["sent"]), [0, 0])
        rows.append(
            {"piece": name, "deviation": off, "bar": bar, "seconds": seconds}
            | {"exchanges": common[1], "numbers": common[0], "formula": formula}
        )
        told = "–" if formula is None else str(formula)
        print(
            f"{name:<13}{off[2]:>9.0e}{off[3]:>9.0e}{bar:>8.0e}{seconds[1]:>9.2f}{seconds[2]:>9.2f}{common[1]:>7}{common[0]:>9}"
            f"{told:>9}"
        )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(max(row["deviation"].values()) > row["bar"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
