"""What the benchmarks on a card share: how fast the card is at all, a budget of seconds, and documents in great number."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peers import Case, Times

#: Associated Press: documents, words of the vocabulary, words in all, and distinct words of a document on average.
AP_SIZE = (2246, 10_473, 435_838, 134)


def wait(device: str) -> None:
    """Until the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], Any], device: str, rounds: int = 10) -> float:
    """Median seconds of a short piece of work, after two calls to warm up."""
    return Times(rounds_of(work, device, rounds)).median


def rounds_of(
    work: Callable[[], Any], device: str, rounds: int, warm: int = 2, until: float = float("inf")
) -> list[float]:
    """Seconds of every round of a piece of work, those to warm up left out; none but the first begins after `until`."""
    found: list[float] = []
    for r in range(rounds + warm):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if r >= warm:
            found.append(time.perf_counter() - start)
            if time.perf_counter() > until:
                break
    return found


@dataclass
class Bench:
    """A device, how much time there is, and what the device can do at all.

    Attributes
    ----------
    device
        "cuda", or "cpu" to try the script out.
    quick
        Small data.
    repeats
        Rounds of a timed piece of work.
    until
        When to end, on the clock of `time.perf_counter`.
    jobs
        Jobs that are still to come, the present one included: they share the time that is left.
    data
        Folder with docs.ldac, or None.
    """

    device: str
    quick: bool
    repeats: int
    until: float
    jobs: int = 1
    data: Path | None = None
    _ceilings: dict[Any, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """When the present job should end."""
        now = time.perf_counter()
        return now + max(0.0, self.until - now) / max(1, self.jobs)

    def copy(self, device: str | None = None) -> float:
        """Bytes a second that a copy on the device reads and writes."""
        device = device or self.device
        if ("copy", device) not in self._ceilings:
            size = 2**20 if self.quick else 2**28 if device == "cuda" else 2**25
            source = torch.ones(size, device=device)
            target = torch.empty_like(source)
            spent = median_seconds(lambda: target.copy_(source), device)
            self._ceilings["copy", device] = 2 * source.numel() * 4 / spent
        return self._ceilings["copy", device]

    def square(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large square product on the device, float32 multiplied as float32."""
        from inference.devices import full_precision

        if ("square", dtype) not in self._ceilings:
            side = 512 if self.quick else 8192 if self.device == "cuda" else 2048
            a = torch.randn(side, side, dtype=dtype, device=self.device)
            target = torch.empty_like(a)
            with full_precision():
                spent = median_seconds(lambda: torch.mm(a, a, out=target), self.device, 5)
            self._ceilings["square", dtype] = 2 * side**3 / spent
        return self._ceilings["square", dtype]


def note(case: Case, what: str, value: float | str) -> None:
    """A figure of a case, printed at once: the run may be cut off."""
    case.facts[what] = value
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"  ... {case.name}: {what}: {shown}", flush=True)


def timed(case: Case, side: str, rounds: list[float]) -> float:
    """The rounds of a side, printed at once; their median."""
    case.times[side] = Times(rounds)
    print(f"  ... {case.name}: {side}: {statistics.median(rounds):.4g} s per {case.unit}", flush=True)
    return case.times[side].median


def card_in_words() -> str:
    """Name, memory, CUDA and driver of the card."""
    properties = torch.cuda.get_device_properties(0)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    memory = f"{properties.total_memory / 1e9:.0f} GB"
    return f"{properties.name}, {memory}, CUDA {torch.version.cuda}, driver {driver}"


# -- documents ----------------------------------------------------------------------------------------------------------


def ap_like(data: Path | None, quick: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """starts, words, counts and V of Associated Press, or of a made-up corpus of its size.

    The made-up one draws the words of a document from three of a hundred topics, in which words are as frequent as Zipf's law
    says.
    """
    if data is not None:
        from _topics import corpus_at

        m = corpus_at(data, "ap").counts.tocsr()
        return m.indptr.astype(np.int64), m.indices.astype(np.int64), m.data.astype(np.float64), m.shape[1]
    D, V, N, _ = AP_SIZE if not quick else (150, 800, 15_000, 0)
    rng = np.random.default_rng(0)
    zipf = 1.0 / (np.arange(V) + 3.0)
    topics = [rng.permutation(V) for _ in range(100 if not quick else 5)]
    chances = zipf / zipf.sum()
    starts, words, counts = [0], [], []
    lengths = np.maximum(5, rng.gamma(3.0, N / D / 3.0, D)).astype(int)
    for length in lengths:
        chosen, shares = rng.choice(len(topics), 3), rng.dirichlet([0.5, 0.5, 0.5])
        common = rng.choice(V, length // 3, p=chances)
        rest = length - length // 3
        own = [
            topics[t][rng.choice(V, n, p=chances)] for t, n in zip(chosen, rng.multinomial(rest, shares), strict=True)
        ]
        ids, often = np.unique(np.concatenate([common, *own]), return_counts=True)
        words.append(ids)
        counts.append(often)
        starts.append(starts[-1] + len(ids))
    return np.array(starts), np.concatenate(words), np.concatenate(counts).astype(np.float64), V


def replicated(corpus: tuple[np.ndarray, np.ndarray, np.ndarray, int], tokens: float) -> Any:
    """The corpus over and over until it has so many words, as `Documents`."""
    from inference.topics.documents import Documents

    starts, words, counts, V = corpus
    times = max(1, round(tokens / counts.sum()))
    widths = np.tile(np.diff(starts), times)
    return Documents(np.concatenate([[0], np.cumsum(widths)]), np.tile(words, times), np.tile(counts, times), V)
