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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
CARD, HOST = torch.device("cpu", 1), torch.device("cpu", 2)
NAME = torch.device("cuda", 0)
#: Operations whose operands may lie on both devices.
CROSSING = {aten.copy_.default, aten._to_copy.default, aten.copy.default, aten.set_.source_Tensor}
#: Operations that wait for the card: the processor wants to see a number, or a shape that hangs on one.
LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
#: The same, though PyTorch does not say so: they check their operands, or leave part of their work to the processor.
WAITS = (
    *("multinomial", "histc", "_linalg_eigh", "_linalg_svd", "_linalg_eig", "linalg_eig", "linalg_lstsq"),
    *("linalg_householder_product", "linalg_matrix_exp", "_linalg_check_errors"),
)
#: Operations beside those element by element that take a number from the processor's memory.
LENIENT = (
    "masked_fill",
    "masked_fill_",
    "fill",
    "fill_",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "index_fill",
    "index_fill_",
)
#: Additions that a card makes in the order in which its threads arrive.
RACES = (
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "scatter_reduce_",
    "index_reduce",
    "put",
)
BUSY = "CUDA error: operation not permitted when stream is capturing"


def bare(tensor: Tensor) -> Tensor:
    """The tensor below the layers of `vmap` and `grad`."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def places(tensor: Tensor) -> list[Any]:
    """Memory of a tensor."""
    tensor = bare(tensor)
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return [tensor.values().untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._values().untyped_storage()]
    return [tensor.untyped_storage()] if tensor.layout is torch.strided else []


def tensors_of(*values: Any) -> Iterator[Tensor]:
    """Tensors in arguments, and in lists and mappings of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(*value)
        elif isinstance(value, dict):
            yield from tensors_of(*value.values())


class Card:
    """What lies on the pretended card, and what is being recorded.

    Parameters
    ----------
    limit
        Bytes that it holds.

    Attributes
    ----------
    waits
        How often the processor has waited for it.
    races
        Additions of fractions to one place by several threads: their last digits differ from run to run.
    told
        What `set_sync_debug_mode` was asked for: at 2 waits are errors.
    stuck
        Whether a recording was spoilt, after which the card's generator draws no more.
    stream
        The one on which operations are put.
    random
        Its own stream of random numbers, or None where it draws from the processor's.
    """

    def __init__(self, limit: float = float("inf"), random: torch.Generator | None = None) -> None:
        self.limit, self.waits, self.random = limit, 0, random
        self.races: list[str] = []
        self.told, self.stuck = 0, False
        self.stream: Any = Idle(self)
        self._there: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}
        self._crowd = 4096
        self._lock = threading.Lock()
        self._local = threading.local()
        self.recording: Recording | None = None
        self.generators: set[int] = set()
        self._kept: list[Any] = []

    @property
    def ambient(self) -> list[bool]:
        """Whether the functions under way work on the card, innermost last."""
        if not hasattr(self._local, "ambient"):
            self._local.ambient = [False]
        return self._local.ambient

    @property
    def own(self) -> Recording | None:
        """What this thread is recording."""
        found = self.recording
        return found if found is not None and found.thread == threading.get_ident() else None

    def demand(self) -> None:
        """Somebody asks for memory, or waits.

        Raises
        ------
        RuntimeError
            Another thread is recording and has not allowed it; the recording is spoilt.
        """
        found = self.recording
        if found is not None and found is not self.own and found.mode == "global":
            found.spoilt = True
            raise RuntimeError(BUSY)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the card."""
        if tensor.device.type == "meta":
            return False
        return any(place._cdata in self._there for place in places(tensor))

    def put(self, tensor: Tensor) -> None:
        """Count a tensor's memory as the card's."""
        for place in places(tensor):
            with self._lock:
                if place._cdata not in self._there:
                    self._there[place._cdata] = StorageWeakRef(place)
                    self._sizes[place._cdata] = place.nbytes()
                    if len(self._there) > self._crowd or self.limit < float("inf"):
                        self._tidy()
                    held = sum(self._sizes.values()) if self.limit < float("inf") else 0
                    if held > self.limit:
                        asked, free = place.nbytes() / 2**20, max(0.0, self.limit - held + place.nbytes()) / 2**20
                        raise torch.OutOfMemoryError(
                            f"CUDA out of memory. Tried to allocate {asked:.2f} MiB. GPU 0 has a total capacity of "
                            f"{self.limit / 2**20:.2f} MiB of which {free:.2f} MiB is free."
                        )

    @contextmanager
    def drawing(self, there: bool) -> Iterator[None]:
        """Inside, random numbers are the card's own, where it has some and the operation is there."""
        if not there or self.random is None:
            yield
            return
        here = torch.get_rng_state()
        torch.set_rng_state(self.random.get_state())
        try:
            yield
        finally:
            self.random.set_state(torch.get_rng_state())
            torch.set_rng_state(here)

    def _tidy(self) -> None:
        for key in [key for key, ref in self._there.items() if ref.expired()]:
            del self._there[key], self._sizes[key]
        self._crowd = 2 * len(self._there) + 4096

    def used(self) -> int:
        """Bytes on the card."""
        with self._lock:
            self._tidy()
            return sum(self._sizes.values())


@cache
def takes_numbers(func: Any) -> bool:
    """Whether an operation on the card takes a tensor without dimension from the processor's memory."""
    name = base(func)
    plain = getattr(getattr(aten, name.rstrip("_"), None), func._overloadname, func)
    if name in LENIENT or name.startswith("_foreach"):
        return True
    return torch.Tag.pointwise in func.tags or torch.Tag.pointwise in plain.tags


def base(func: Any) -> str:
    """Name of an operation, whatever its overload."""
    return func._schema.name.partition("::")[2]


def collides(func: Any, args: Any) -> bool:
    """Whether fractions are added to one place by several threads in the order of their arrival."""
    if base(func) not in RACES or torch.are_deterministic_algorithms_enabled() or not args[0].is_floating_point():
        return False
    axis, index = args[1] % max(1, args[0].ndim), args[2]
    if not index.numel():
        return False
    index = index.reshape(1, -1) if index.ndim < 2 else index.movedim(axis, -1).reshape(-1, index.shape[axis])
    index = index.sort(-1).values
    return bool((index[:, 1:] == index[:, :-1]).any())


def looks_at_numbers(func: Any, args: Any) -> bool:
    """Whether the processor must wait for what an operation finds: a number, or a shape that hangs on one."""
    if base(func) in WAITS:
        return True
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors_of(args[1]))
    return any(tag in func.tags for tag in LOOKS)


class Kernels(TorchDispatchMode):
    """Below autograd: every operation happens on one device, and its result lies there."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.run(func, args, dict(kwargs or {}))

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation on the processor, its result where a card would have put it."""
        card = self.card
        given, on, off = list(tensors_of(args, kwargs)), [], []
        for tensor in given:
            if tensor.device.type != "meta":
                (on if card.holds(tensor) else off).append(tensor)
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cpu":
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if asked is not None and asked.type == "cpu" and asked.index:
            there = asked == CARD
        else:
            there = bool(on) or (not given and card.ambient[-1])
        self.check(func, args, on, off)
        looks = bool(on) and (not there or looks_at_numbers(func, args))
        card.waits += looks
        recording = card.own
        if recording is not None:
            if looks or self.crosses(func, on, off, there):
                recording.spoilt = True
                raise RuntimeError(BUSY)
            recording.keep(func, args, kwargs)
        elif looks:
            card.demand()
        if (
            card.told == 2
            and recording is None
            and (looks or (func in CROSSING and self.crosses(func, on, off, there)))
        ):
            raise RuntimeError("called a synchronizing CUDA operation")
        if there and collides(func, args):
            card.races.append(str(func))
        draws = there and torch.Tag.nondeterministic_seeded in func.tags
        if draws and card.stuck and recording is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        with card.drawing(draws):
            out = func(*args, **kwargs)
        if there and not all(card.holds(t) for t in tensors_of(out)):
            card.demand()
        if there:
            for tensor in tensors_of(out):
                if tensor.device.type != "meta" and not card.holds(tensor):
                    if func in CROSSING and tensor is args[0]:
                        continue  # a copy onto the processor
                    card.put(tensor)
        if recording is not None and (there or on):  # the processor's own work is done once, and not recorded
            recording.note(func, args, kwargs, out)
        return out

    def crosses(self, func: Any, on: list[Tensor], off: list[Tensor], there: bool) -> bool:
        """Whether numbers travel between the devices; a single one goes along with the operation that needs it."""
        if func in CROSSING:
            return bool(off) and (there or bool(on))
        return bool(on) and any(t.ndim for t in off)

    def check(self, func: Any, args: Any, on: list[Tensor], off: list[Tensor]) -> None:
        """Refuse what a card refuses."""
        if not on:
            return
        if func.namespace not in ("aten", "prims", "prim") and not any(
            torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
            for key in ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
        ):
            raise NotImplementedError(f"Could not run '{func.name()}' with arguments from the 'CUDA' backend")
        if func in CROSSING:
            return
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default):
            if not self.card.holds(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            off = [t for t in off if not any(t is i for i in args[1])]
        if takes_numbers(func):
            off = [t for t in off if t.ndim]
        first = args[0] if args and isinstance(args[0], Tensor) else None
        writes = bool(func._schema.arguments) and func._schema.arguments[0].alias_info is not None
        if writes and first is not None and func._schema.is_mutable and not self.card.holds(first):
            off = [first]
        if off:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (when "
                f"checking {func}: shapes {[tuple(t.shape) for t in on]} on cuda:0, {[tuple(t.shape) for t in off]} on cpu)"
            )


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


class Graph:
    """Operations that were recorded, and are repeated in the memory where they were."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.tape: list[tuple[Any, ...]] = []
        self.read: dict[int, int] = {}  # memory that others must keep, and by how many tensors it is held here
        self.registered: list[Any] = []

    def register_generator_state(self, generator: Any) -> None:
        """Draws from a generator other than the card's own may be recorded."""
        self.registered.append(generator)

    def replay(self) -> None:
        """Run every operation again.

        Raises
        ------
        RuntimeError
            Memory that they read has been given back: a card would read whatever lies there now.
        """
        if any(
            torch._C._storage_Use_Count(place) <= held + 1 for place, held in self.read.items()
        ):  # and by its name in Python
            raise RuntimeError("the graph reads memory that was given back after the recording")
        card = self.card
        with _disable_current_modes(), torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, old in self.tape:
                with card.drawing(torch.Tag.nondeterministic_seeded in func.tags):
                    new = func(*args, **kwargs)
                for a, b in zip(tensors_of(old), tensors_of(new), strict=True):
                    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
                        a.copy_(b)


class Recording:
    """What one thread records.

    Parameters
    ----------
    card
        Where.
    graph
        What is filled.
    mode
        "global" spoils the recording where another thread asks for memory or waits; "thread_local" does not.
    """

    def __init__(self, card: Card, graph: Graph, mode: str) -> None:
        self.card, self.graph, self.mode, self.thread = card, graph, mode, threading.get_ident()
        self.spoilt = False
        self.before: dict[int, tuple[Any, Any]] = {}
        self.made: dict[int, Tensor] = {}
        self.all: list[Tensor] = []

    def keep(self, func: Any, args: Any, kwargs: Any) -> None:
        """What an operation is about to write over, once a recording: recording does not run anything."""
        generator = kwargs.get("generator")
        if generator is not None and generator not in self.graph.registered:
            self.spoilt = True
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        if not func._schema.is_mutable:
            return
        named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tensors_of(*(named.get(name) for name in written)):
            place = tensor.untyped_storage()
            if place._cdata not in self.before and place._cdata not in self.made:
                self.before[place._cdata] = (place, place.clone())

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Write an operation down, by tensors that lie where the given ones do and keep none of them alive."""
        read = {place._cdata for t in tensors_of(args, kwargs) if self.card.holds(t) for place in places(t)}
        for tensor in tensors_of(out):
            for place in places(tensor):
                if self.card.holds(tensor) and place._cdata not in read:
                    self.made.setdefault(place._cdata, self.alias(tensor))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):  # no view
            self.graph.tape.append((func, *(self.aliases(v) for v in (args, kwargs, out))))

    def aliases(self, value: Any) -> Any:
        """The same with other tensors in place of tensors."""
        if isinstance(value, Tensor):
            return self.alias(value)
        if isinstance(value, list | tuple):
            return type(value)(self.aliases(v) for v in value)
        return {k: self.aliases(v) for k, v in value.items()} if isinstance(value, dict) else value

    def alias(self, tensor: Tensor) -> Tensor:
        """Another tensor on the same memory; of a number of the processor, what it is now."""
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return tensor
        if not self.card.holds(tensor):
            return tensor.clone()
        self.all.append(tensor.detach())
        return self.all[-1]

    def end(self) -> None:
        """Nothing has run: what was written over is back, and what was made holds no numbers yet."""
        for place, old in self.before.values():
            place.copy_(old)
        with _disable_current_modes(), torch.no_grad(), torch._C.DisableTorchFunction():
            for tensor in self.made.values():
                if tensor.is_floating_point():
                    torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).fill_(torch.nan)
        held = Counter(t.untyped_storage()._cdata for t in self.all)
        self.graph.read = {place: n for place, n in held.items() if place not in self.made}
        self.before, self.made, self.all = {}, {}, []


class Idle:
    """A stream or an event: there is one queue, and it is always done."""

    def __init__(self, card: Card, *_: Any, **__: Any) -> None:
        self.card = card

    def synchronize(self) -> None:
        """Wait, which spoils a recording."""
        wait(self.card)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class DefaultGenerator:
    """The card's random numbers: after a recording that was spoilt there are none until its state is put back."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def clone_state(self) -> bool:
        """Whether it is stuck."""
        return self.card.stuck

    def graphsafe_set_state(self, state: bool) -> None:
        """As it was."""
        self.card.stuck = state


def wait(card: Card) -> None:
    """The processor waits for all that the card does."""
    if card.own is not None:
        card.own.spoilt = True
        raise RuntimeError(BUSY)
    card.demand()
    card.waits += 1


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
            card.random.manual_seed(seed)

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
