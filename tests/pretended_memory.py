"""What lies on a pretended card, and what operations may do with it: see `pretended_card`."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

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
LENIENT = {
    *("masked_fill", "masked_fill_", "fill", "fill_"),
    *("index_put", "index_put_", "_index_put_impl_", "index_fill"),
}
#: Additions that a card makes in the order in which its threads arrive.
RACES = {
    *("index_add", "index_add_", "scatter_add", "scatter_add_"),
    *("scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_"),
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
#: Ways in which an operation of somebody else can have a kernel for a card.
KERNELS = ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
BUSY = "CUDA error: operation not permitted when stream is capturing"
#: What a card finds wrong while it works, after which it answers nothing in this process.
ASSERTED = re.compile(r"out of (range|bounds)|probability tensor contains|sum of prob|Expected p_in|invalid (Poisson|binomial)")
#: The operations that do; `multinomial` for one draw looks at its numbers first.
ASSERTING = {
    *("index", "index_put", "index_put_", "_index_put_impl_", "index_select", "index_add", "index_add_", "index_copy"),
    *("gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "take", "embedding", "nll_loss_forward"),
    *("multinomial", "bernoulli", "bernoulli_", "binomial", "poisson"),
}
DEAD = "CUDA error: device-side assert triggered"


def bare(tensor: Tensor) -> Tensor:
    """The tensor below the layers of `vmap` and `grad`."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def places(tensor: Tensor) -> list[Any]:
    """Memory of a tensor."""
    tensor = bare(tensor)
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return [tensor.values().untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._values().untyped_storage()]
    return []


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
    dead
        Whether an index was out of range, or a probability was none: it answers nothing any more.
    stream
        The one on which operations are put.
    random
        Its own stream of random numbers, or None where it draws from the processor's.
    """

    def __init__(self, limit: float = float("inf"), random: torch.Generator | None = None) -> None:
        self.limit, self.waits, self.random = limit, 0, random
        self.races: list[str] = []
        self.told, self.stuck, self.dead = 0, False, False
        self.stream: Any = None
        self._there: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}
        self._crowd = 4096
        self._lock = threading.Lock()
        self._local = threading.local()
        self.recording: Any = None
        self.generators: set[int] = set()
        self._kept: list[Any] = []

    @property
    def ambient(self) -> list[bool]:
        """Whether the functions under way work on the card, innermost last."""
        if not hasattr(self._local, "ambient"):
            self._local.ambient = [False]
        return self._local.ambient

    @property
    def own(self) -> Any:
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
        if tensor.layout is torch.strided and not functorch.is_functorch_wrapped_tensor(tensor):
            return not tensor.is_meta and tensor.untyped_storage()._cdata in self._there
        if tensor.is_meta:
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
    def drawing(self) -> Iterator[None]:
        """Inside, random numbers are the card's own."""
        assert self.random is not None
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


@dataclass(frozen=True)
class Facts:
    """What is known of an operation whatever its operands.

    Attributes
    ----------
    name
        Without its overload.
    crosses, indexes
        Whether operands may lie on both devices: any, or indices.
    takes_numbers
        Whether it takes a tensor without dimension from the processor's memory.
    looks
        Whether the processor must wait for what it finds: a number, or a shape that hangs on one.
    draws, mutable, writes_first
        Random numbers; whether it writes, and into its first operand.
    missing
        Whether a card has no kernel for it.
    """

    name: str
    crosses: bool
    indexes: bool
    takes_numbers: bool
    looks: bool
    draws: bool
    mutable: bool
    writes_first: bool
    missing: bool


@cache
def facts(func: Any) -> Facts:
    """Read once what an operation says of itself."""
    schema, tags = func._schema, func.tags
    name = schema.name.partition("::")[2]
    plain = getattr(getattr(aten, name.rstrip("_"), None), func._overloadname, func)
    pointwise = torch.Tag.pointwise in tags or torch.Tag.pointwise in plain.tags
    return Facts(
        name,
        crosses=func in CROSSING,
        indexes=func in INDEXED,
        takes_numbers=pointwise or name in LENIENT or name.startswith("_foreach"),
        looks=name in WAITS or (func not in INDEXED and any(tag in tags for tag in LOOKS)),
        draws=torch.Tag.nondeterministic_seeded in tags,
        mutable=schema.is_mutable,
        writes_first=schema.is_mutable and bool(schema.arguments) and schema.arguments[0].alias_info is not None,
        missing=func.namespace not in ("aten", "prims", "prim")
        and not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in KERNELS),
    )


def collides(known: Facts, args: Any) -> bool:
    """Whether fractions are added to one place by several threads in the order of their arrival."""
    if known.name not in RACES or torch.are_deterministic_algorithms_enabled() or not args[0].is_floating_point():
        return False
    axis, index = args[1] % max(1, args[0].ndim), args[2]
    if not index.numel():
        return False
    index = index.reshape(1, -1) if index.ndim < 2 else index.movedim(axis, -1).reshape(-1, index.shape[axis])
    index = index.sort(-1).values
    return bool((index[:, 1:] == index[:, :-1]).any())


def by_mask(args: Any) -> bool:
    """Whether places are chosen by a mask, whose entries the processor counts."""
    return any(t.dtype in (torch.bool, torch.uint8) for t in tensors_of(args[1]))


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
        card, known, on, off = self.card, facts(func), [], []
        nothing = True
        for tensor in tensors_of(args, kwargs):
            nothing = False
            if card.holds(tensor):
                on.append(tensor)
            elif not tensor.is_meta:
                off.append(tensor)
        there = bool(on) or (nothing and card.ambient[-1])
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cpu":
            kwargs["device"] = torch.device("cpu")
            there = asked == CARD if asked.index else there
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        recording = card.own
        if card.dead and (on or there):
            raise RuntimeError(DEAD)
        if on or recording is not None:
            self.before(func, known, args, kwargs, on, off, there)
        if card.stuck and recording is None and there and known.draws:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        try:
            with card.drawing() if there and known.draws and card.random is not None else nullcontext():
                out = func(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            one = known.name == "multinomial" and args[1] == 1
            if on and known.name in ASSERTING and not one and ASSERTED.search(str(error)):
                card.dead = True
                raise RuntimeError(DEAD) from None
            raise
        if there:
            new = [t for t in tensors_of(out) if not (t.is_meta or card.holds(t) or (known.crosses and t is args[0]))]
            if new:
                card.demand()
            for tensor in new:
                card.put(tensor)
        if recording is not None and (there or on):  # the processor's own work is done once, and not recorded
            recording.note(func, args, kwargs, out)
        return out

    def before(
        self, func: Any, known: Facts, args: Any, kwargs: Any, on: list[Tensor], off: list[Tensor], there: bool
    ) -> None:
        """Refuse what a card refuses, and count how often the processor waits."""
        card, recording = self.card, self.card.own
        if on:
            self.check(func, known, args, on, off)
        looks = bool(on) and (not there or known.looks or (known.indexes and by_mask(args)))
        card.waits += looks
        # A single number goes along with the operation that needs it; more has to travel.
        travels = bool(off) and (there if known.crosses else bool(on) and any(t.ndim for t in off))
        if recording is not None:
            if looks or travels:
                recording.spoilt = True
                raise RuntimeError(BUSY)
            recording.keep(func, args, kwargs)
        elif looks:
            card.demand()
        if recording is None and card.told == 2 and (looks or travels):
            raise RuntimeError("called a synchronizing CUDA operation")
        if there and on and collides(known, args):
            card.races.append(str(func))

    def check(self, func: Any, known: Facts, args: Any, on: list[Tensor], off: list[Tensor]) -> None:
        """Refuse operands on two devices, and operations that a card lacks."""
        if known.missing:
            raise NotImplementedError(f"Could not run '{func.name()}' with arguments from the 'CUDA' backend")
        if known.crosses or not off:
            return
        if known.indexes:
            if not self.card.holds(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            off = [t for t in off if not any(t is i for i in args[1])]
        if known.takes_numbers:
            off = [t for t in off if t.ndim]
        if known.writes_first and isinstance(args[0], Tensor) and not self.card.holds(args[0]):
            off = [args[0]]
        if off:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (when "
                f"checking {func}: shapes {[tuple(t.shape) for t in on]} on cuda:0, {[tuple(t.shape) for t in off]} on cpu)"
            )
