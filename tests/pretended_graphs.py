"""CUDA graphs, streams and events of a pretended card: see `pretended_card`."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from pretended_memory import BUSY, Card, facts, places, tensors_of
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

#: Whether newer versions count the name of a tensor's memory in Python as one that holds it.
NAMED = int(torch.__version__ >= (2, 9))


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
        if any(torch._C._storage_Use_Count(place) <= held + NAMED for place, held in self.read.items()):
            raise RuntimeError("the graph reads memory that was given back after the recording")
        card = self.card
        with _disable_current_modes(), torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, old in self.tape:
                draws = card.random is not None and facts(func).draws
                with card.drawing() if draws else nullcontext():
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
