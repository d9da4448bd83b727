"""Limits of a run: on memory, where a watcher interrupts it as Ctrl-C would, and on time, asked between two passes."""

from __future__ import annotations

import _thread
import functools
import inspect as signatures
import math
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from .errors import DivergenceError
from .meter import INTERVAL, resident_megabytes

F = TypeVar("F", bound=Callable)


def frees_memory(function: F) -> F:
    """A device that runs out of memory is told with the batch size, after its memory has been released.

    Raises
    ------
    MemoryError
        In place of PyTorch's error, naming the rows of a step and a smaller number to try.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            text = out_of_memory(error)
            if text is None:
                if isinstance(error, DivergenceError) and on_a_card():
                    traceback.clear_frames(error.__traceback__)  # of what was there; the error itself says what matters
                raise
            trouble: BaseException | None = error
            while trouble is not None:  # tracebacks hold on to every tensor of the run
                traceback.clear_frames(trouble.__traceback__)
                trouble = trouble.__cause__ or trouble.__context__
            bound = signatures.signature(function).bind(*args, **kwargs).arguments
        import gc

        from .devices import release

        gc.collect()
        release()
        advice = smaller(bound.get("method"), bound.get("data"), room(text))
        raise MemoryError(f"{text}; {advice}. What the fit held is released")

    return wrapped  # type: ignore[return-value]


def on_a_card() -> bool:
    """Whether a card is in use."""
    import torch

    return torch.cuda.is_initialized()


def out_of_memory(error: BaseException | None) -> str | None:
    """The first line of an error that tells of too little memory, wherever in the chain of causes."""
    import torch

    while error is not None:
        text = str(error).strip().split("\n")[0]
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and any(w in text for w in words)
        ):
            return text.rstrip(".")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def room(text: str) -> float:
    """Share of a step that has a chance: a quarter, or half of what was free beside what was asked for."""
    units = {"B": 1.0, "bytes": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
    number = r"([\d.]+) (KiB|MiB|GiB|bytes|B)"
    asked, free = re.search(f"allocate {number}", text), re.search(f"{number} is free", text)
    if asked is None or free is None:
        return 0.25
    want, left = (float(m[1]) * units[m[2]] for m in (asked, free))
    return min(0.25, 0.5 * left / max(want, 1.0))


def smaller(method: Any, data: Any, share: float = 0.25) -> str:
    """What to try with less memory: a batch of this share of the rows."""
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple) else (data,)
    tables = [v for v in values if hasattr(v, "__len__") and not isinstance(v, str)]
    rows = max(
        (v.shape[0] if getattr(v, "shape", ()) else len(v) for v in tables), default=1
    )  # sparse ones have no len
    size = getattr(method, "batch_size", None)
    batch = min(size, rows) if isinstance(size, int) else rows
    name = method if isinstance(method, str) else getattr(method, "name", "the method")
    less = max(1, int(share * batch))
    advice = (
        f"SVI(batch_size={less})" if name in ("auto", "svi") else f"fewer chains or rows, or SVI(batch_size={less})"
    )
    return f"a step of {name} saw {batch} of {rows} rows: try {advice}, or device='cpu'"


class MemoryGuard:
    """Context manager inside which the process must not hold more than `limit` megabytes.

    Parameters
    ----------
    limit
        Megabytes of resident memory; None watches nothing.

    Attributes
    ----------
    reached
        Megabytes at which the run was interrupted, or None.

    Raises
    ------
    ValueError
        The process holds more already, or this is not the main thread, which alone can be interrupted.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.reached: float | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._ignored = False

    def __enter__(self) -> Self:
        if self.limit is None:
            return self
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                f"memory={self.limit:g}: only the main thread can be interrupted; fit there, or without memory"
            )
        held = resident_megabytes()
        if held >= self.limit:
            raise ValueError(
                f"memory={self.limit:g}: the process already holds {held:.0f} MB; allow more, or free some before the fit"
            )
        if (
            signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        ):  # as in the background of a shell: nothing could be interrupted
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._ignored = True
        threading.Thread(target=self._watch, name="memory guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.limit is None:
            return
        try:
            with self._lock:
                self._over.set()
            threading.Event().wait(1e-4)  # an interrupt that is on its way arrives here
        except KeyboardInterrupt:
            self._over.set()
        if self._ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if isinstance(error, KeyboardInterrupt) and self.reached is not None:
            raise MemoryError(
                f"the memory budget of {self.limit:g} MB was used up ({self.reached:.0f} MB) before there was a first state; "
                f"allow more, or use smaller batches"
            ) from None

    def _watch(self) -> None:
        assert self.limit is not None
        while not self._over.wait(INTERVAL):
            held = resident_megabytes()
            if held > self.limit:
                with self._lock:
                    if not self._over.is_set():
                        self.reached = held
                        _thread.interrupt_main()
                return


class Deadline:
    """Whether a loop of passes should end: the budget is used up, or Ctrl-C was pressed.

    Inside its context Ctrl-C waits for the end of a pass, so that no state is left half changed; a second one does not wait.

    Parameters
    ----------
    budget
        Seconds from now, or None.

    Attributes
    ----------
    reason
        Why the loop should end; empty as long as it need not.
    """

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self.reason = ""
        self._end = time.perf_counter() + (budget or math.inf)
        self._pressed = False
        self._handler: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if handler is signal.default_int_handler:  # a handler of the user's stays in charge
                self._handler = handler
                signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _press(self, number: int, frame: Any) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    def __call__(self) -> bool:
        if self._pressed:
            self.reason = "interrupted: the best state so far is returned"
        elif time.perf_counter() > self._end:
            self.reason = f"the budget of {self.budget:g} s is used up: the best state so far is returned"
        return bool(self.reason)
