"""Which device a fit runs on: those that are there, timed on a few steps of the fit itself.

With one device nothing is timed.  With several, the choice depends on clocks and is therefore told: `device="cuda"` repeats it.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .methods.base import Method
    from .problem import Problem

#: Steps before any is timed (kernels are compiled and memory is taken in these), steps that are timed, and seconds after which
#: no further one is.
WARM, STEPS, LONG = 2, 5, 5.0
#: Share of the first device's time that another one may take, at most, to be preferred: data have to travel there.
PAYS = 0.9

#: Makes a step on a device: everything that is done once is done before it is returned.
Factory = Callable[[str], Callable[[], Any]]


@dataclass(frozen=True)
class Trial:
    """One device: median seconds of a step, or why there are none."""

    device: str
    seconds: float = math.nan
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.device} {self.reason}" if self.reason else f"{self.device} {1e3 * self.seconds:.3g} ms a step"


@dataclass(frozen=True)
class DeviceChoice:
    """The device that was taken, and every trial; none where there was nothing to choose."""

    device: str
    trials: tuple[Trial, ...] = ()
    reason: str = ""
    asked: str = "auto"

    def __str__(self) -> str:
        return f'{self.device} ("{self.asked}": {self.reason or "; ".join(map(str, self.trials))})'

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of a step by device."""
        return {f"step_{t.device}": t.seconds for t in self.trials if not t.reason}


def available() -> list[str]:
    """Devices that a fit can run on, the processor first."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def wait_for(device: str) -> None:
    """Until a device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def fastest(
    devices: Sequence[str],
    factory: Factory,
    *,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[str], None] = wait_for,
) -> DeviceChoice:
    """The device on which a step takes least time.

    Parameters
    ----------
    devices
        Candidates; the first is taken unless another one needs less than nine tenths of its time.
    factory
        Makes a step on a device.  Where it, or the step, fails (operations that a device lacks, too little memory), the
        device is passed over with the reason; the first one must serve.
    clock, wait
        Seconds, and what waits for a device; others in tests.

    Returns
    -------
    The choice.  Of one candidate no step is made.
    """
    if len(devices) == 1:
        return DeviceChoice(devices[0], (), "no CUDA device was found" if devices[0] == "cpu" else "the only device")
    trials = [timed(device, factory, clock, wait) for device in devices]
    best = trials[0]
    for trial in trials[1:]:
        limit = math.inf if best.reason else best.seconds * (PAYS if best is trials[0] else 1.0)
        if not trial.reason and trial.seconds < limit:
            best = trial
    return DeviceChoice(best.device, tuple(trials))


def release() -> None:
    """Give back what a card holds for tensors that are gone."""
    if torch.cuda.is_initialized():
        gc.collect()
        getattr(torch._C, "_cuda_clearCublasWorkspaces", int)()  # one for every stream that multiplied matrices
        torch.cuda.empty_cache()


def timed(device: str, factory: Factory, clock: Callable[[], float], wait: Callable[[str], None]) -> Trial:
    """Median seconds of a step on one device."""
    times: list[float] = []
    try:
        step, began = factory(device), clock()
        for i in range(WARM + STEPS):
            wait(device)
            start = clock()
            step()
            wait(device)
            times.append(clock() - start)
            if i >= WARM and clock() - began > LONG:
                break
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        line = str(error).strip().split("\n")[0][:120]
        error.__traceback__ = None  # it holds on to every tensor of the trial
        release()
        return Trial(device, math.nan, f"cannot run it ({line or type(error).__name__})")
    return Trial(device, statistics.median(times[WARM:] or times))


# -- a fit on each device ---------------------------------------------------------------------------------------------------


def settled(problem: Problem, method: Method, elsewhere: Callable[[str], Problem]) -> tuple[Problem, DeviceChoice]:
    """The problem on the device where a few steps of its method take least time.

    Parameters
    ----------
    problem
        On the processor.
    elsewhere
        The same on another device.
    """
    devices = available()
    if len(devices) > 1 and (alone := only_here(problem, method)):
        return problem, DeviceChoice("cpu", (), alone)
    made = {"cpu": problem}

    def factory(device: str) -> Callable[[], Any]:
        made[device] = made.get(device) or elsewhere(device)
        return step_of(made[device], method)

    choice = fastest(devices, factory)
    return replace(made[choice.device], asked="auto"), choice


def only_here(problem: Problem, method: Method) -> str:
    """Why a method runs on the processor whatever the device that was asked for, or nothing."""
    if problem.admixture is not None:
        if problem.admixture.walk is not None:
            return "dynamic topic models are fitted on the processor"
    if method.name in ("exact", "gibbs"):
        return f"{method.name} runs on the processor"
    if method.name == "nuts":
        return "the chains of nuts run in machine code, on the processor; hmc moves many at once on a card"
    return ""


def step_of(problem: Problem, method: Method) -> Callable[[], Any]:
    """One step of the method: an E-step, a gradient of the ELBO, or one of the log joint."""
    with problem.scope(problem.seed):
        step = getattr(method, "trial", gradient_step)(problem)

    def run() -> Any:
        with problem.scope(problem.seed):
            return step()

    return run


def gradient_step(problem: Problem) -> Callable[[], Any]:
    """One gradient of the log joint, latents in free space."""
    from .joint import LogJoint

    joint = LogJoint(problem)
    flat = joint.flatten(joint.prior_draw()).to(problem.device).requires_grad_()
    return lambda: torch.autograd.grad(joint.unconstrained(flat), flat)


# -- precision --------------------------------------------------------------------------------------------------------------


def _parts() -> list[Any]:
    """What newer versions of PyTorch are told apart; older ones have none of them."""
    matmul, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    return [matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul] if hasattr(matmul, "fp32_precision") else []  # type: ignore[attr-defined]


def _asked(ask: Callable[[], Any]) -> Any:
    """An answer, or None where PyTorch refuses one: it has been told in the newer way something else than in the older."""
    try:
        return ask()
    except RuntimeError:
        return None


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, cards multiply float32 as float32: TF32 keeps ten bits, which shows in every sum of squares.

    There are two ways to tell PyTorch so, and some of its kernels refuse to run where the two disagree: the older one, which
    tells both, is used as long as the user has not parted them.
    """
    cudnn, parts = torch.backends.cudnn, _parts()
    before = [part.fp32_precision for part in parts]
    products, convolutions = _asked(torch.get_float32_matmul_precision), _asked(lambda: cudnn.allow_tf32)
    try:
        if products is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            cudnn.allow_tf32 = False
        for part in parts:
            if part.fp32_precision not in ("none", "ieee"):
                part.fp32_precision = "ieee"
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


# -- order ------------------------------------------------------------------------------------------------------------------


@contextmanager
def in_order(device: torch.device | None) -> Iterator[None]:
    """Inside, a card adds in one order, so that the same seed gives the same bits; the processor does so anyway.

    Sums into places that are named (`index_add_`, `scatter_add_`, the gradients of `gather` and `index_select`, cuDNN's
    convolutions) are otherwise made as a card's threads arrive.
    """
    if device is None or device.type != "cuda":
        yield
        return
    memory: Any = torch.utils.deterministic
    mode, filled = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    try:
        if mode == 0:  # operations that have one order only stay as they are: a story may need them
            torch.set_deterministic_debug_mode("warn")
        memory.fill_uninitialized_memory = False  # filling what is written over takes a launch each
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = filled
