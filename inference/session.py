"""Run other people's programs without leaving a trace: parameter store, random state, default dtype and handlers."""

from __future__ import annotations

import random
import secrets
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from .devices import full_precision, in_order

# Pyro's handler stack and torch's default dtype belong to the process, not to a thread.
_LOCK = threading.RLock()
#: Where plates that ask for a part of their members are noted down; None while nobody wants to know.
_PARTS: ContextVar[dict[str, Part] | None] = ContextVar("parts of plates", default=None)


@dataclass(frozen=True)
class Part:
    """A plate that asks for a part of its members.

    Attributes
    ----------
    size, wanted
        Members, and how many of them it asks for.
    given
        Whether the story says which (`subsample`), rather than how many (`subsample_size`).
    """

    size: int
    wanted: int
    given: bool


def fresh_seed() -> int:
    """A seed from the operating system: recorded with the answer, and the user's generators stay untouched."""
    return secrets.randbelow(2**31)


def seed_everything(seed: int) -> None:
    """torch, NumPy and `random`; CUDA only where it is in use: asking for it costs more than a run of a small story."""
    if torch.cuda.is_initialized():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_streams() -> tuple[Tensor, list[Tensor] | None]:
    """Where torch's streams of random numbers stand: the processor's, and those of cards that are in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def put_back(streams: tuple[Tensor, list[Tensor] | None]) -> None:
    """Let torch's streams of random numbers go on from where they stood."""
    torch.set_rng_state(streams[0])
    if streams[1] is not None:
        torch.cuda.set_rng_state_all(streams[1])


@contextmanager
def streams_kept() -> Iterator[None]:
    """Afterwards torch's streams of random numbers, also those of cards, go on as if nothing had been drawn inside."""
    streams = random_streams()
    try:
        yield
    finally:
        put_back(streams)


@contextmanager
def isolated(
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Everything a story may change is put back afterwards, also after an exception.

    Parameters
    ----------
    seed
        Seed of torch, NumPy and `random` inside; None keeps the current streams (still restored afterwards).
    dtype
        Default floating dtype inside.
    threads
        Threads of one tensor operation inside; None leaves them.
    device
        Where tensors are made inside that name no device, since stories know nothing of devices; None and the processor
        leave that as it is.

    Raises
    ------
    RuntimeError
        Another thread is inside: Pyro keeps one handler stack for the whole process.
    """
    if not _LOCK.acquire(blocking=False):
        raise RuntimeError(
            "another thread is running a story: Pyro keeps one handler stack and one parameter store per process. "
            "Run fits one after another, or in processes of their own (concurrent.futures.ProcessPoolExecutor)"
        )
    if device is not None and device.type == "cuda" and not torch.cuda.is_initialized():
        torch.cuda.init()  # its random numbers follow the seed from the first draw on
    streams, numpy_state, python_state = random_streams(), np.random.get_state(), random.getstate()
    old_threads = torch.get_num_threads()
    old_dtype, depth = torch.get_default_dtype(), len(_PYRO_STACK)
    try:
        with (
            pyro.get_param_store().scope(),
            warnings.catch_warnings(),
            full_precision(),
            in_order(device),
            at_home(device),
            all_members(),
        ):
            # torch's Wishart takes rounding in large draws for singularity and resamples: nothing to act on.
            warnings.filterwarnings("ignore", message="Singular sample detected")
            if device is not None and device.type == "cuda":
                # PyTorch tells of every operation that has no fixed order, and that of products hangs on the environment.
                warnings.filterwarnings(
                    "ignore", message=".*(does not have a deterministic impl|Deterministic behavior was)"
                )
            if dtype is not None:
                torch.set_default_dtype(dtype)
            if threads is not None:
                torch.set_num_threads(threads)
            if seed is not None:
                seed_everything(seed)
            yield
    finally:
        del _PYRO_STACK[depth:]
        torch.set_default_dtype(old_dtype)
        if torch.get_num_threads() != old_threads:
            torch.set_num_threads(old_threads)
        put_back(streams)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        _LOCK.release()


@contextmanager
def all_members() -> Iterator[None]:
    """Plates show all their members, also those that ask for a random part of them (`subsample_size`).

    Every method looks at all rows, or takes batches of its own; a part that changes from run to run has no posterior.
    """
    kept = SubsampleMessenger.__dict__["_subsample"]

    def whole(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any, **more: Any
    ) -> Any:
        found = _PARTS.get()
        if found is not None and isinstance(size, int):
            wanted = subsample_size if subsample is None else len(subsample)
            if isinstance(wanted, int) and (
                name not in found or found[name].size < size
            ):  # few rows may be tried first
                found[name] = Part(size, wanted, subsample is not None)
        if subsample is None and size is not None:
            subsample_size = None
        return kept.__func__(name, size, subsample_size, subsample, *rest, **more)

    SubsampleMessenger._subsample = staticmethod(whole)  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = kept  # type: ignore[method-assign]


@contextmanager
def parts_of_plates() -> Iterator[dict[str, Part]]:
    """Plates that runs of a story make inside, and the part of their members that each asked for, by name."""
    found: dict[str, Part] = {}
    token = _PARTS.set(found)
    try:
        yield found
    finally:
        _PARTS.reset(token)


def at_home(device: torch.device | None) -> AbstractContextManager[Any]:
    """Inside, tensors that name no device are made on this one; the processor, which is the default, costs nothing."""
    return nullcontext() if device is None or device.type == "cpu" else device
