"""EM and SVI on a table or a corpus that stays on disk, in a process that may not hold it: rate per row, and memory.

The table is a memory-mapped .npy file, the corpus a folder of them (compressed rows: words and counts).  The process under
test may allocate `--limit` MB and no more (RLIMIT_DATA: pages of the file are not counted, the kernel takes them back when it
needs them); before every pass over a table the file's pages are dropped, so that each pass reads the disk.  The in-memory
rate is that of the same fit on the first rows as an array (of a corpus: on its first documents), in a process without a limit.

    python benchmarks/beyond_memory.py [--gib 1] [--limit 1536] [--method em] [--warm]
    python benchmarks/beyond_memory.py --corpus lda [--gib 1] [--limit 1024]     # or: --corpus documents, --corpus dtm
    python benchmarks/beyond_memory.py --record      # two sizes of each, in beyond_memory.json: memory must not grow with them
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

COLUMNS, COMPONENTS = 16, 8
#: Rows of the fit in memory.
SOME = 1_000_000
PASSES = 6
#: Sizes in GiB at which --record measures each fit: the second is four or five times the first.
RECORD = {"em": (1.0, 4.0), "svi": (0.25, 1.0), "documents": (0.1, 0.5), "lda": (0.05, 0.25), "dtm": (0.02, 0.1)}
#: Words of the corpus's vocabulary, topics, tokens of a document, documents that are written at once.
WORDS, TOPICS, TOKENS, PART = 2000, 10, 100, 20_000
CORPORA = ("lda", "documents", "dtm")
#: Slices of time, one after the other.
SLICES = 5


def make_table(path: Path, gib: float) -> int:
    """Write clusters to a float32 .npy file, block by block; returns the rows."""
    rows = int(gib * 2**30 / 4 / COLUMNS)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, COLUMNS))
    random = np.random.default_rng(0)
    centres = 4 * random.standard_normal((COMPONENTS, COLUMNS))
    for a in range(0, rows, 1 << 18):
        b = min(a + (1 << 18), rows)
        z = random.integers(COMPONENTS, size=b - a)
        table[a:b] = centres[z] + random.standard_normal((b - a, COLUMNS))
    table.flush()
    return rows


def make_corpus(folder: Path, gib: float) -> int:
    """Write documents of two topics each, part by part; returns how many."""
    from zoo import Corpus, store_corpus

    random = np.random.default_rng(0)
    shares = random.dirichlet(np.full(WORDS, 0.05), TOPICS).cumsum(1)
    entries = gib * 2**30 / 8

    def parts() -> Any:
        written = 0
        while written < entries:
            topic = random.integers(TOPICS, size=(PART, 2))[:, :, None].repeat(TOKENS // 2, 2).reshape(PART, TOKENS)
            u, words = random.random((PART, TOKENS)), np.empty((PART, TOKENS), np.int64)
            for k in range(TOPICS):
                words[topic == k] = np.searchsorted(shares[k], u[topic == k]).clip(max=WORDS - 1)
            rows = np.repeat(np.arange(PART), TOKENS)
            part = sp.csr_matrix((np.ones(rows.size, np.int64), (rows, words.ravel())), shape=(PART, WORDS))
            part.sum_duplicates()
            times = np.full(PART, min(SLICES - 1, int(SLICES * written / entries)))
            written += part.nnz
            yield Corpus(part, times=times)

    return len(store_corpus(folder, parts(), name="made up"))


def measure_corpus(path: str, where: str, method: str, limit: int) -> dict[str, Any]:
    """Seconds a document and pass, and the most memory; in a process of its own."""
    import torch

    from inference import EM, fit
    from zoo import DTM, LDA, MultinomialMixture, open_corpus

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    corpus = open_corpus(path)
    some = corpus[:3000] if method != "dtm" else corpus[np.arange(0, len(corpus), len(corpus) // 3000)]
    stories: dict[str, tuple[Any, str]] = {
        "lda": (LDA(TOPICS), "stepwise"),
        "dtm": (DTM(TOPICS, drift=0.3), "batch"),
        "documents": (MultinomialMixture(TOPICS), "auto"),
    }
    story, driver = stories[method]
    fit(story, some, EM(restarts=1, max_iter=2, driver=driver), seed=0, progress=False)  # imports, first calls
    part = slice(0, 2 * PART) if method != "dtm" else np.arange(0, len(corpus), max(1, len(corpus) // (2 * PART)))
    given = corpus[part] if where == "memory" else corpus
    if where == "disk":
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))
    marks: list[float] = []
    chosen = EM(restarts=1, max_iter=3, tol=0.0, driver=driver, callback=lambda *_: marks.append(time.perf_counter()))
    with Anonymous() as memory:
        start = time.perf_counter()
        posterior = fit(story, given, chosen, seed=0, progress=False)
        total = time.perf_counter() - start
    seconds = (marks[-1] - marks[0]) / (len(marks) - 1) / len(given)
    found = {"rows": len(given), "seconds_a_row": seconds, "anonymous_mb": memory.peak, "total_s": total}
    return found | {n: posterior.history[i] / len(given) for n, i in (("first", 0), ("last", -1))}


class Anonymous:
    """Watches the memory that is the process's own: neither code nor pages of files."""

    def __init__(self) -> None:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Anonymous:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, int(line.split()[1]) / 1024)


def forget(table: np.memmap, path: str) -> None:
    """Drop the file's pages from this process and from the kernel's cache."""
    table._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(path: str, where: str, method: str, limit: int, warm: bool) -> dict[str, Any]:
    """Seconds a row and pass, and the most memory; in a process of its own."""
    import torch

    from inference import EM, SVI, fit
    from zoo import GMM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    table = np.load(path, mmap_mode="r")
    given = np.array(table[:SOME]) if where == "memory" else table
    fit(
        GMM(COMPONENTS, scale=4.0), np.array(table[:20_000]), EM(restarts=1, max_iter=2), seed=0
    )  # imports, first calls
    if where == "disk":
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))
    marks: list[float] = []

    def mark(*_: object) -> None:
        if where == "disk" and not warm:
            forget(table, path)
        marks.append(time.perf_counter())

    with Anonymous() as memory:
        start = time.perf_counter()
        if method == "em":
            chosen: Any = EM(restarts=1, max_iter=PASSES, tol=0.0, callback=mark)
            posterior = fit(GMM(COMPONENTS, scale=4.0), given, chosen, seed=0, progress=False)
            seconds = (marks[-1] - marks[0]) / (len(marks) - 1) / len(given)
        else:
            steps = 500
            chosen = SVI(guide="mean_field", steps=steps, starts=1, batch_size=4096, draws=100, particles=2)
            posterior = fit(GMM(COMPONENTS, scale=4.0), given, chosen, seed=0, progress=False)
            seconds = posterior.timings["run"] / (steps * 4096)
        total = time.perf_counter() - start
    rows = {"rows": len(given), "seconds_a_row": seconds, "anonymous_mb": memory.peak, "total_s": total}
    return {
        **rows,
        "first": float(posterior.history[0]) / len(given),
        "last": float(posterior.history[-1]) / len(given),
    }


def child(*words: str) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--child", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the process failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure on disk and in memory, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the table")
    parser.add_argument("--limit", type=int, default=1536, help="MB that the process may allocate")
    parser.add_argument("--method", choices=("em", "svi"), default="em")
    parser.add_argument("--warm", action="store_true", help="leave the file in the kernel's cache between passes")
    parser.add_argument("--folder", help="where the table is written")
    parser.add_argument("--corpus", choices=CORPORA, help="a corpus: LDA, a mixture of multinomials, a dynamic model")
    parser.add_argument("--record", action="store_true", help="two sizes of everything, written to beyond_memory.json")
    parser.add_argument(
        "--only", default="", help="of what --record measures, names that contain this; the rest is kept"
    )
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        path, where, method, limit, warm = args.child
        if method in CORPORA:
            print(json.dumps(measure_corpus(path, where, method, int(limit))))
        else:
            print(json.dumps(measure(path, where, method, int(limit), warm == "True")))
        return
    if args.record:
        record(args)
        return
    what = args.corpus or args.method
    rows, disk, memory = compared(what, args.gib, args.limit, args.warm, args.folder)
    rate = memory["seconds_a_row"] / disk["seconds_a_row"]
    name = f"documents over {WORDS:,} words" if args.corpus else f"rows x {COLUMNS} float32"
    print(f"{what} of {rows:,} {name} ({args.gib:g} GiB) on disk, limit {args.limit} MB")
    for name, found in (("disk", disk), ("memory", memory)):
        print(
            f"  {name:<7}{found['rows']:>12,} rows {1 / found['seconds_a_row'] / 1e6:8.2f} million rows/s "
            f"{found['anonymous_mb']:8.0f} MB of its own {found['total_s']:8.1f} s in all; "
            f"objective a row {found['first']:.4f} -> {found['last']:.4f}"
        )
    print(f"  rate per row, disk against memory: {rate:.2f}")


def compared(
    what: str, gib: float, limit: int, warm: bool, folder: str | None, memory: bool = True
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Rows, and what was measured on disk and (perhaps) in memory."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = str(Path(place) / ("corpus" if what in CORPORA else "table.npy"))
        rows = (make_corpus if what in CORPORA else make_table)(Path(path), gib)
        words = (what, str(limit), str(warm))
        return rows, child(path, "disk", *words), child(path, "memory", *words) if memory else {}


def record(args: argparse.Namespace) -> None:
    """Memory of its own at two sizes of every fit, and the rate per row against memory at the larger."""
    from _peers import machine

    path = Path(__file__).with_suffix(".json")
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    cases = {case["case"]: case for case in known}
    for what, sizes in RECORD.items():
        if args.only not in what:
            continue
        found: list[dict[str, Any]] = []
        for gib in sizes:
            last = gib == sizes[-1]
            rows, disk, memory = compared(what, gib, args.limit, args.warm, args.folder, memory=last)
            found.append({"gib": gib, "rows": rows, "anonymous_mb": disk["anonymous_mb"], "seconds": disk["total_s"]})
            found[-1]["rows_a_second"] = 1 / disk["seconds_a_row"]
            if last:
                found[-1]["rate_against_memory"] = memory["seconds_a_row"] / disk["seconds_a_row"]
                found[-1]["memory_anonymous_mb"] = memory["anonymous_mb"]
            print(what, found[-1], flush=True)
        growth = found[-1]["anonymous_mb"] / found[0]["anonymous_mb"]
        cases[what] = {"case": what, "limit_mb": args.limit, "growth_of_memory": growth, "sizes": found}
        content = {
            "benchmark": "beyond_memory",
            "command": f"python benchmarks/beyond_memory.py --record --limit {args.limit}" + " --warm" * args.warm,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(int(os.environ.get("OMP_NUM_THREADS", "1"))),
            "results": [cases[name] for name in RECORD if name in cases],
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
