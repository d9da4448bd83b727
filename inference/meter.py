"""What a run costs: seconds of every phase, and the peak of the process's memory."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

#: Seconds between two looks at the memory.
INTERVAL = 0.02
_STATM = Path("/proc/self/statm")


class Meter:
    """Context manager that times phases and watches memory.

    Examples
    --------
    >>> with Meter() as meter:
    ...     meter.mark("setup")
    ...     meter.mark("run")
    >>> sorted(meter.timings)
    ['peak_memory', 'run', 'setup']
    """

    def __enter__(self) -> Self:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()
        self._peak = resident_megabytes()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="memory watcher", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._watcher.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, resident_megabytes())

    def mark(self, phase: str) -> None:
        """The time since the last mark (or the start) belongs to `phase`; phases of one name add up."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now
        self._look()

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of every phase, and "peak_memory": the largest resident set of the process inside, in MB."""
        return {**self._seconds, "peak_memory": self._peak}


def resident_megabytes() -> float:
    """Resident memory of this process in MB: now where /proc tells, else its maximum so far; NaN where nothing tells."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize() / 1e6
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
