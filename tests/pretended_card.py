"""A card that is pretended: tensors live in the processor's memory, and everything that a real card would refuse is refused.

Inside `pretended()`, `device="cuda"` works as with a card. What is "on the card" is known by the memory a tensor lies in, so
that views, gradients and batches under `vmap` are there too; `.device` says `cuda:0`. Errors are those of a card: operands on
two devices, NumPy's look at a tensor on the card, a generator of the processor for draws on the card, a custom operation that
has no kernel there. `CUDAGraph` really records operations and repeats them, in the same memory: what a recording makes holds no
numbers before the first launch, what it reads must live as long as it, numbers of the processor are those of the recording, and
looks at numbers, copies between the devices and other threads' demands spoil it.

The processor's device has no number. Here `cpu:1` stands for the card and `cpu:2` for a processor that was asked for by name,
so that programs that record operations (`torch.fx`) carry both along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from pretended_graphs import DefaultGenerator, Graph, Idle, Recording, wait
from pretended_memory import CARD, HOST, NAME, Card, Kernels, tensors_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

GETTERS: dict[Any, Callable[[bool], Any]] = {
    torch.Tensor.device.__get__: lambda there: NAME if there else torch.device("cpu"),  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda there: there,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda there: not there,  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda there: 0 if there else -1,
}
HERE = {torch.Tensor.numpy, torch.Tensor.__array__}
MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.type_as}
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray}


def marked(device: Any) -> Any:
    """A device as it goes through recordings."""
    if device is None:
        return None
    device = torch.device(device)
    if device.type == "cuda":
        return CARD
    return HOST if device == torch.device("cpu") else device


def has_program(tensor: Tensor) -> bool:
    """Whether a kind of tensor answers functions by a program of its own."""
    program = getattr(type(tensor).__torch_function__, "__func__", None)
    return program not in (None, torch.Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]


class Names(TorchFunctionMode):
    """Above autograd: devices that programs ask for and are told."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, card = dict(kwargs or {}), self.card
        if func is torch.device:
            return func(*args, **kwargs)
        other = next((t for t in tensors_of(args, kwargs) if has_program(t)), None)
        if other is not None:
            if not torch._C._is_torch_function_enabled():
                return func(*args, **kwargs)  # its program asks for what the tensor itself says
            with self:  # its own program is watched, too
                return type(other).__torch_function__(func, types, args, kwargs)
        if func in GETTERS:
            if args[0].device.type == "meta":
                return func(*args)
            return GETTERS[func](card.holds(args[0]))
        if func in HERE and card.holds(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if func in MOVES:
            return self.move(func, *args, **kwargs)
        if func in FROM_NUMBERS:
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else self.move(torch.Tensor.to, made, device=device)
        if func is torch.Tensor.pin_memory:
            return args[0]
        given, handed_on = list(tensors_of(args, kwargs)), isinstance(func, torch._ops.OpOverload)
        if not handed_on:  # by a mode below, which has seen devices that C++ filled in
            if "device" in kwargs:
                kwargs["device"] = marked(kwargs["device"])
            args = tuple(marked(a) if isinstance(a, torch.device) else a for a in args)
        inherits = handed_on and not given
        card.ambient.append(card.ambient[-1] if inherits else any(map(card.holds, given)))
        try:
            out = func(*args, **kwargs)
        finally:
            card.ambient.pop()
        if kwargs.get("generator") is not None and isinstance(out, Tensor):
            wanted, found = (
                "cuda" if at else "cpu" for at in (card.holds(out), id(kwargs["generator"]) in card.generators)
            )
            if wanted != found:
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")
        return out

    def move(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """To a device, to a type, or both."""
        copy, device, dtype, layout = kwargs.pop("copy", False), None, None, kwargs.pop("memory_format", None)
        if func is torch.Tensor.cpu:
            device = "cpu"
        elif func is torch.Tensor.cuda:
            device = "cuda"
        elif (args and isinstance(args[0], Tensor)) or isinstance(kwargs.get("other"), Tensor):
            other = args[0] if args else kwargs["other"]
            device, dtype = ("cuda" if self.card.holds(other) else "cpu"), other.dtype
        else:
            for a in (*args, *(kwargs[k] for k in ("device", "dtype") if k in kwargs)):
                if isinstance(a, torch.dtype):
                    dtype = a
                elif isinstance(a, str | torch.device | int) and not isinstance(a, bool):
                    device = a
        more = {} if layout is None else {"memory_format": layout}
        if dtype is not None:
            more["dtype"] = dtype
        device = marked(device)
        if device is None or (device in (CARD, HOST) and (device == CARD) == self.card.holds(tensor)):
            return torch.Tensor.to(tensor, copy=copy, **more) if more or copy else tensor
        return torch.Tensor.to(tensor, device=device, **more)


def stand_ins(card: Card) -> dict[str, Any]:
    """What is asked of `torch.cuda`."""

    @contextmanager
    def recorded(graph: Graph, stream: Any = None, capture_error_mode: str = "global", **_: Any) -> Iterator[None]:
        before, card.stream = card.stream, stream or Idle(card)
        found = card.recording = Recording(card, graph, capture_error_mode)
        try:
            yield
        finally:
            card.recording = None
            found.end()
            if found.spoilt:  # PyTorch does not come as far as leaving the stream, or telling the generator
                card.stuck = True
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            card.stream = before

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        before, card.stream = card.stream, stream
        try:
            yield
        finally:
            card.stream = before

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def state(*_: Any) -> Tensor:
        return torch.get_rng_state() if card.random is None else card.random.get_state()

    def set_state(state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state) if card.random is None else card.random.set_state(state)

    def seeded(seed: int) -> None:
        if card.random is not None:
            card.random.manual_seed(~seed & 2**63 - 1)  # a card's numbers are not the processor's of the same seed

    free = 8 << 30 if card.limit == float("inf") else int(card.limit)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "pretended",
        "get_device_capability": lambda *_: (9, 0),
        "set_device": nothing,
        "synchronize": lambda *_: wait(card),
        "empty_cache": nothing,
        "manual_seed_all": seeded,
        "manual_seed": seeded,
        "memory_allocated": lambda *_: card.used(),
        "max_memory_allocated": lambda *_: card.used(),
        "reset_peak_memory_stats": nothing,
        "mem_get_info": lambda *_: (free - card.used(), free),
        "get_rng_state": state,
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [state()],
        "set_rng_state_all": lambda states: set_state(states[0]),
        "is_current_stream_capturing": lambda: card.own is not None,
        "current_stream": lambda *_: card.stream,
        "set_stream": lambda stream: setattr(card, "stream", stream),
        "Stream": lambda *_, **__: Idle(card),
        "Event": lambda *_, **__: Idle(card),
        "stream": on_stream,
        "device": lambda *_: nullcontext(),
        "default_generators": (DefaultGenerator(card),),
        "get_sync_debug_mode": lambda: card.told,
        "set_sync_debug_mode": lambda mode: setattr(card, "told", {"error": 2}.get(mode, mode)),
        "CUDAGraph": lambda: Graph(card),
        "graph": recorded,
    }


def generators(card: Card) -> type:
    """`torch.Generator` that may be the card's."""

    class Generator(torch._C.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            made = torch._C.Generator.__new__(torch._C.Generator)
            if torch.device(device).type == "cuda":
                card._kept.append(made)
                card.generators.add(id(made))
            return made

    return Generator


def grouped(card: Card) -> Callable[..., Any]:
    """What optimisers ask for: lists of tensors by device and type, told apart by where they are pretended to be."""
    real = torch._C._group_tensors_by_device_and_dtype

    def groups(lists: Any, with_indices: bool = False) -> Any:
        return {
            (NAME if card.holds(found[0][0]) else device, dtype): (found, numbers)
            for (device, dtype), (found, numbers) in real(lists, with_indices).items()
        }

    return groups


def parsed(card: Card) -> Callable[..., Any]:
    """What `Module.to` reads from its arguments, of which a tensor may be on the card."""
    real = torch._C._nn._parse_to

    def parse(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return (NAME, *found[1:]) if any(map(card.holds, tensors_of(args, kwargs))) else found

    return parse


def no_compiler(*_: Any, **__: Any) -> Any:
    """A pretended card runs no machine code."""
    raise RuntimeError("there is no compiler for a pretended card")


@contextmanager
def pretended(limit: float = float("inf"), own_stream: bool = False) -> Iterator[Card]:
    """Inside, there is a card.

    Parameters
    ----------
    limit
        Bytes that it holds; more is `torch.OutOfMemoryError`.
    own_stream
        Whether it has random numbers of its own, as real ones do; else it draws from the processor's, to the same answer.
    """
    card = Card(limit, torch.Generator() if own_stream else None)
    card.stream = Idle(card)
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with Names(card), Kernels(card):
            run(thread)

    backward = torch.autograd.graph._engine_run_backward

    def backward_there(*args: Any, **kwargs: Any) -> Any:
        # Programs in the backward pass are told devices, too, though autograd itself was called through `Names`.
        card.ambient.append(any(card.holds(t) for t in tensors_of(args[0])))
        try:
            with Names(card):
                return backward(*args, **kwargs)
        finally:
            card.ambient.pop()

    import_module(
        "torch._dynamo"
    )  # what the modes bring in, and with it filters of warnings, comes before a test looks

    with ExitStack() as stack:
        for name, value in stand_ins(card).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", generators(card)))
        stack.enter_context(mock.patch.object(torch, "compile", no_compiler))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        # Inference mode hides copies between devices from the modes.
        stack.enter_context(
            mock.patch.object(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
        )
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped(card)))
        stack.enter_context(mock.patch.object(torch._C._nn, "_parse_to", parsed(card)))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_there))
        for name in ("__enter__", "__exit__"):  # `with device:` goes below all other modes, where it would not be seen
            stack.enter_context(mock.patch.object(DeviceContext, name, getattr(TorchFunctionMode, name)))
        for module in (torch.autograd, torch.autograd.graph):
            stack.enter_context(mock.patch.object(module, "_engine_run_backward", backward_there))
        stack.enter_context(Names(card))
        stack.enter_context(Kernels(card))
        yield card


__all__ = ["Card", "pretended"]
