"""The memory that a piece of work takes: the peak in a fresh process, less what was there before."""

from __future__ import annotations

import gc
import math
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _peers import same_threads


def extra_memory(work: Callable[..., Any], *args: Any, threads: int = 1) -> float:
    """Megabytes that `work()` takes beyond what is there when it begins: the peak in a fresh process.

    A fresh process, because memory that an earlier run has handed back to the allocator would hide what this
    one takes.

    Parameters
    ----------
    work
        Function at the top of a module; `work(*args)` prepares (imports, data, a small warm-up) and returns
        the callable to be measured.
    threads
        As in `same_threads`.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_watched, args=(send, work, args, threads))
    child.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        raise RuntimeError("the process whose memory was watched has died, perhaps of too little memory") from None
    finally:
        child.join()
    if isinstance(found, str):
        raise RuntimeError(f"the process whose memory was watched failed: {found}")
    return found


def _watched(send: Any, work: Callable[..., Callable[[], Any]], args: tuple[Any, ...], threads: int) -> None:
    try:
        same_threads(threads)
        run = work(*args)
        gc.collect()
        with Memory() as memory:
            run()
        send.send(memory.extra)
    except Exception as error:
        send.send(f"{type(error).__name__}: {error}")


class Memory:
    """Context manager; `extra` is the largest resident memory inside, less that at the start, in MB.

    The kernel's own high-water mark is used where it can be set back (Linux), and a thread looks often in any
    case.
    """

    interval = 0.002

    def __enter__(self) -> Memory:
        self._exact = _forget_peak()
        self.start = self.peak = _status("VmRSS")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _status("VmHWM" if self._exact else "VmRSS"))

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, _status("VmRSS"))

    @property
    def extra(self) -> float:
        """Peak less start, MB."""
        return self.peak - self.start


def _status(key: str) -> float:
    """A line of /proc/self/status in MB, or NaN where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return math.nan
    line = next((line for line in text.splitlines() if line.startswith(key + ":")), None)
    return math.nan if line is None else int(line.split()[1]) * 1024 / 1e6


def _forget_peak() -> bool:
    """Set the kernel's high-water mark back to what is resident now; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return abs(_status("VmHWM") - _status("VmRSS")) < 5.0
