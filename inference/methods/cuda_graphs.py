"""A training step as CUDA graphs: recorded on the card once, and launched with one call instead of one for every operation.

What a graph reads and writes lies where it lay when it was recorded.  So a step has buffers for its inputs, filled before every
launch, and answers in buffers that the next launch writes over.  Before the recording the work runs a few times on a stream
beside the main one (libraries set themselves up in the first calls, which a recording must not see).  Random numbers come from
the card's default generator, which PyTorch registers with every recording: a launch draws what the program would have drawn
next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..capture import Captured, check_agreement, reason_of
from ..session import isolated

#: Runs before a recording.
WARM = 3
#: Makes work that is repeated by the call that is returned; it may run the work any number of times itself.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def refuse(mode: str, device: torch.device) -> None:
    """CUDA graphs were asked for where there is no card.

    Raises
    ------
    ValueError
        With what to do instead.
    """
    if mode != "cudagraph" or device.type == "cuda":
        return
    there = "one is there" if torch.cuda.is_available() else "no CUDA device was found"
    raise ValueError(
        f"SVI(mode='cudagraph'): the data are on {str(device)!r}, and CUDA graphs run on a card ({there}); use "
        f"fit(device='cuda'), or mode='graph', which records the step on any device"
    )


class OnCard:
    """Records work on a card.

    Parameters
    ----------
    device
        The card.
    cuda
        `torch.cuda`, or what stands for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        self.device, self.cuda = device, torch.cuda if cuda is None else cuda

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Warm up beside the main stream, record, and hand out what launches it.

        Raises
        ------
        RuntimeError
            The work waits for the card or asks for memory in a way that cannot be recorded.
        """
        cuda = self.cuda
        with cuda.device(self.device):
            side = cuda.Stream(self.device)
            side.wait_stream(cuda.current_stream(self.device))
            with cuda.stream(side):
                for _ in range(WARM - 1):
                    work()
                with waits_told(cuda):
                    work()
            cuda.current_stream(self.device).wait_stream(side)
            cuda.synchronize(self.device)
            return recorded(work, self.device, cuda, stream=side)  # libraries have made their handles there


def recorded(work: Callable[[], None], device: torch.device, cuda: Any, **options: Any) -> Callable[[], None]:
    """Record work, and hand out what launches it.

    Other threads may go on using the card: one that reads ahead takes memory and waits for copies, which would spoil a
    recording of the default kind.  One that fails does not leave its stream, which is done here.
    """
    before, graph = cuda.current_stream(device), cuda.CUDAGraph()
    try:
        with unharmed(cuda), cuda.graph(graph, capture_error_mode="thread_local", **options):
            work()
    finally:
        cuda.set_stream(before)
    return graph.replay


@contextmanager
def waits_told(cuda: Any) -> Iterator[None]:
    """Work that waits for the card ends in an error here, and not in the recording: the allocator survives that badly."""
    before = cuda.get_sync_debug_mode()
    cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        cuda.set_sync_debug_mode(before)


@contextmanager
def unharmed(cuda: Any) -> Iterator[None]:
    """A recording that breaks off leaves the card's generator as it was: versions of PyTorch let it draw no more."""
    generator = cuda.default_generators[cuda.current_device()]
    kept = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(kept)
        raise


class GraphedStep:
    """A function of tensors, recorded.

    Parameters
    ----------
    fn
        Of tensors of always the same shapes; it leaves them as they are.
    example
        Some inputs.
    record
        Where it is recorded; a card's `OnCard`.

    Notes
    -----
    A graph reads its constants where they lay when it was recorded, and keeps nothing alive: `fn`, which holds them, lives as
    long as the recording.
    """

    def __init__(self, fn: Callable[..., Sequence[Tensor]], example: Sequence[Tensor], record: Recorder) -> None:
        self.fn = fn
        self.inputs = tuple(t.detach().clone() for t in example)
        self.outputs: tuple[Tensor, ...] = ()

        def work() -> None:
            with torch.no_grad():
                self.outputs = tuple(fn(*self.inputs))

        with isolated():  # recording draws random numbers
            self._launch = record(work)

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The answers for these inputs."""
        return tuple(t.clone() for t in self.once(*given))

    def once(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The same in buffers that the next call writes over, for who is done with them by then."""
        moved = [(b, g) for b, g in zip(self.inputs, given, strict=True) if b.data_ptr() != g.data_ptr()]
        with torch.no_grad():
            floats = [(b, g) for b, g in moved if b.is_floating_point() and b.dtype == g.dtype]
            if floats:
                torch._foreach_copy_([b for b, _ in floats], [g.detach() for _, g in floats])
            for buffer, value in moved:
                if not (buffer.is_floating_point() and buffer.dtype == value.dtype):
                    buffer.copy_(value)
        self._launch()
        return self.outputs


def graphed(
    step: Callable[..., Any],
    example: tuple[Tensor, ...],
    points: Sequence[tuple[Tensor, ...]],
    record: Recorder | None = None,
) -> Captured:
    """A recorded step on the card, trusted after it agrees with the step under one seed; else the step, and the reason.

    Parameters
    ----------
    step
        From inputs to value and gradient.
    example, points
        Inputs at which both must agree.
    record
        `OnCard` of the inputs' device where None.
    """
    try:
        call = GraphedStep(step, example, record or OnCard(example[0].device))
        for seed, point in enumerate((example, *points)):
            check_agreement(call, step, point, seed)
    except Exception as error:  # whatever cannot be recorded says so in its own way
        while isinstance(error.__context__, Exception):  # what came first; the rest is that the recording is spoilt
            error = error.__context__
        return Captured(step, "graph", f"CUDA graph: {reason_of(error)}")
    return Captured(call, "cudagraph")


class GraphedAdam(torch.optim.Adam):
    """Fused Adam whose step is recorded, too: the first steps run as they are, and are the warm-up of the recording.

    Parameters
    ----------
    groups
        Parameter groups; their "lr" become tensors, which `set_rate` fills.
    record
        `OnCard` of the parameters' device where None.
    **options
        Of `torch.optim.Adam`.
    """

    def __init__(self, groups: list[dict[str, Any]], record: Recorder | None = None, **options: Any) -> None:
        first = groups[0]["params"][0]
        # The fused kernel of a card reads its step size as float32.
        groups = [{**g, "lr": torch.tensor(g["lr"], dtype=torch.float32, device=first.device)} for g in groups]
        super().__init__(groups, fused=True, capturable=first.is_cuda, **options)
        self._record: Recorder = record or once_on(first.device)
        self._launch: Callable[[], None] | None = None
        self._made = 0
        self._gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients that the parameters hold."""
        assert closure is None
        parameters = [p for g in self.param_groups for p in g["params"]]
        if self._made < WARM:
            super().step()
            self._made += 1
            return
        given = [p.grad for p in parameters]
        if self._launch is None:
            self._gradients = [g.clone() for g in given]
            self._place(parameters)
            self._launch = self._record(super().step)
        else:
            moved = [(b, g) for b, g in zip(self._gradients, given, strict=True) if b.data_ptr() != g.data_ptr()]
            if moved:
                torch._foreach_copy_([b for b, _ in moved], [g for _, g in moved])
            self._place(parameters)
        self._launch()

    def _place(self, parameters: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient


def once_on(device: torch.device) -> Recorder:
    """Records work that must not run more often than it is launched: its warm-up has been."""

    def record(work: Callable[[], None]) -> Callable[[], None]:
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            return recorded(work, device, torch.cuda)

    return record


def set_rate(group: dict[str, Any], rate: float) -> None:
    """The step size of a parameter group, where a recording may read it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


__all__ = ["GraphedAdam", "GraphedStep", "OnCard", "graphed", "refuse", "set_rate"]
