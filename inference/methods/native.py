"""Chains in machine code, one thread each: `native/nuts.c` from Python."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compiled import Compiled, sampler
from .adaptation import windows
from .hamiltonian import Failed, Record
from .snapshots import Snapshot

#: What the sampler returns, as in nuts.c.
FINISHED, STOPPED, FLAT, STEEP, PAUSED = range(5)
FAILURES = {
    FLAT: "the log density hardly changes over any distance: the posterior is improper",
    STEEP: "the log density has no finite value or gradient next to the start",
}
#: Iterations between two looks at whether a snapshot is due.
STRETCH = 10
#: Trajectories that the sampler has room for.
DEEPEST = 30

_pointer, _long, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Chain(ctypes.Structure):
    """`chain` in nuts.c, field by field."""

    _fields_ = [
        ("density", _pointer),
        ("inputs", _pointer),
        ("arena", _pointer),
        ("uniform", _pointer),
        ("generator", _pointer),
        ("dim", _long),
        ("warmup", _long),
        ("draws", _long),
        ("max_depth", _long),
        ("dense", _long),
        ("window_begin", _long),
        ("window_count", _long),
        ("limit", _long),
        ("windows", _pointer),
        ("target", _double),
        ("work", _pointer),
        ("stop", _pointer),
        ("position", _pointer),
        ("gradient", _pointer),
        ("inverse", _pointer),
        ("factor", _pointer),
        ("mean", _pointer),
        ("spread", _pointer),
        ("adaptation", _pointer),
        ("seen", _long),
        ("value", _double),
        ("step", _double),
        ("warm_seconds", _double),
        ("seconds", _double),
        ("done", _long),
        ("divergences", _long),
        ("gradients", _long),
        ("positions", _pointer),
        ("energy", _pointer),
        ("acceptance", _pointer),
        ("step_size", _pointer),
        ("lp", _pointer),
        ("tree_depth", _pointer),
        ("n_steps", _pointer),
        ("diverging", _pointer),
    ]


class Runner:
    """One chain with all its memory; what it leaves goes to its record."""

    def __init__(
        self, code: Compiled, record: Record, gradient: NDArray, rng: np.random.Generator, stop: NDArray[np.int32]
    ) -> None:
        settings, dim = record.settings, code.dim
        begin, ends = windows(settings.warmup)
        library = sampler()
        library.nuts_work.restype = _long
        dense = int(settings.dense_mass)
        room = library.nuts_work(_long(dim), _long(settings.max_depth), _long(dense))
        generator = rng.bit_generator.ctypes
        self.record, self._rng, self._library = record, rng, library
        start = np.eye(dim).ravel() if dense else np.ones(dim)
        shot = record.camera.latest
        given = shot.arrays if shot else {"inverse": start, "factor": start, "mean": np.zeros(dim), "spread": 0 * start}
        self._state = {n: np.array(given[n], np.float64).ravel() for n in ("inverse", "factor", "mean", "spread")}
        self._state["adaptation"] = np.array(shot.arrays["adaptation"]) if shot else np.zeros(6)
        self._state["position"] = np.array(record.position, np.float64)
        self._state["gradient"] = np.array(gradient, np.float64)
        work, arena, marks = np.zeros(room), code.arena(), np.array(ends, np.int64)
        self._kept = (code, work, arena, marks, generator, stop)
        self._shape = (dim, dim) if dense else (dim,)
        stats: dict[str, Any] = {n: v.ctypes.data for n, v in record.stats.items()}
        self.chain = Chain(
            density=code.address,
            inputs=ctypes.addressof(code.inputs),
            arena=arena.ctypes.data,
            uniform=ctypes.cast(generator.next_double, _pointer),
            generator=generator.state_address,
            dim=dim,
            warmup=settings.warmup,
            draws=settings.draws,
            max_depth=settings.max_depth,
            dense=dense,
            window_begin=begin,
            window_count=len(ends),
            limit=settings.warmup + settings.draws,
            windows=marks.ctypes.data,
            target=settings.target_accept,
            work=work.ctypes.data,
            stop=stop.ctypes.data,
            seen=shot.numbers["seen"] if shot else 0,
            value=record.value,
            step=record.step,
            done=record.done,
            divergences=record.divergences,
            positions=record.positions.ctypes.data,
            energy=stats["energy"],
            acceptance=stats["acceptance_rate"],
            step_size=stats["step_size"],
            lp=stats["lp"],
            tree_depth=stats["tree_depth"],
            n_steps=stats["n_steps"],
            diverging=stats["diverging"],
            **{name: value.ctypes.data for name, value in self._state.items()},
        )

    def __call__(self) -> int:
        """Run to the end, or until it is told to stop; the interpreter is free meanwhile."""
        if self.record.camera.off:
            return int(self._library.nuts_run(ctypes.byref(self.chain)))
        while True:
            self.chain.limit = self.chain.done + STRETCH
            status = int(self._library.nuts_run(ctypes.byref(self.chain)))
            if status != PAUSED:
                return status
            self.report()
            if self.record.camera.due:
                self.record.camera.keep(self.record, self._rng, self._taken())

    def _taken(self) -> Snapshot:
        """The chain between two iterations."""
        arrays = {name: value.copy() for name, value in self._state.items()}
        for name in ("inverse", "factor", "spread"):
            arrays[name] = arrays[name].reshape(self._shape)
        chain = self.chain
        return Snapshot(arrays, {"value": chain.value, "done": chain.done, "seen": chain.seen, "step": chain.step})

    def report(self, ended: bool = False) -> None:
        """Bring the record up to date; the place only when the chain no longer moves."""
        self.record.done, self.record.step = self.chain.done, self.chain.step
        self.record.divergences = self.chain.divergences
        if ended:
            self.record.position, self.record.value = self._state["position"].copy(), self.chain.value
            self.record.seconds = (self.chain.warm_seconds, self.chain.seconds)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def drive(
    code: Compiled,
    records: list[Record],
    gradients: list[NDArray],
    generators: list[np.random.Generator],
    watch: Callable[[], bool],
) -> None:
    """Run all chains until they have ended, or `watch()` says so; a chain's path does not depend on the others.

    Raises
    ------
    Failed
        No step size suits a chain.
    KeyboardInterrupt
        From outside; the chains have stopped, and their records hold what they reached.
    """
    stop = np.zeros(1, np.int32)
    runners = [Runner(code, *parts, stop) for parts in zip(records, gradients, generators, strict=True)]
    pool = ThreadPoolExecutor(min(len(runners), cores()), thread_name_prefix="chain")
    pending: set[Future[int]] = set()
    try:
        futures = [pool.submit(runner) for runner in runners]
        pending, pause = set(futures), 0.002
        while pending:
            done, pending = wait(pending, pause, FIRST_EXCEPTION)
            for runner in runners:
                runner.report()
            if watch() or any(f.result() in FAILURES for f in done):
                break
            pause = min(0.05, 1.3 * pause)
    finally:
        stop[0] = 1
        pool.shutdown(wait=True, cancel_futures=True)
        for runner in runners:
            runner.report(ended=True)
    for future in futures:
        if not future.cancelled() and future.result() in FAILURES:
            raise Failed(FAILURES[future.result()])
