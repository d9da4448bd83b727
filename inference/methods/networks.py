"""Find the networks of a story, and run it with other weights without touching them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _Holder(nn.Module):
    """All networks of a story as one module whose forward pass is any function."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class Networks:
    """The networks that a story and its programs can reach.

    Attributes
    ----------
    weights
        Name -> parameter, for those that are trained.
    """

    def __init__(self, *owners: Any) -> None:
        found: list[nn.Module] = []
        for owner in owners:
            found += [m for m in modules_of(owner) if not any(m is f for f in found)]
        self.holder = _Holder(found)
        self.weights = {n: p for n, p in self.holder.named_parameters() if p.requires_grad}

    def run(self, weights: Mapping[str, Tensor], call: Callable[[], Any]) -> Any:
        """What `call()` returns with these weights in place of the networks' own."""
        if not weights:
            return call()
        # Pyro passes over weights without gradients, and says so.
        trained = {n: v if v.requires_grad else v.detach().requires_grad_() for n, v in weights.items()}
        return functional_call(self.holder, trained, (call,))

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Make these the networks' own."""
        with torch.no_grad():
            for name, value in weights.items():
                self.weights[name].copy_(value)


def modules_of(owner: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Networks that an object is, holds, or (a function) refers to."""
    if isinstance(owner, nn.Module):
        yield owner
    elif depth == 0 or isinstance(owner, (str, bytes, Tensor, type)):
        return
    elif inspect.ismethod(owner):
        yield from modules_of(owner.__self__, depth)
        yield from modules_of(owner.__func__, depth)
    elif inspect.isfunction(owner):
        names = inspect.getclosurevars(owner)
        for value in (*names.nonlocals.values(), *names.globals.values(), *(owner.__defaults__ or ())):
            if isinstance(value, nn.Module) or not inspect.isroutine(value):
                yield from modules_of(value, depth - 1)
    elif isinstance(owner, Mapping):
        for value in owner.values():
            yield from modules_of(value, depth - 1)
    elif isinstance(owner, (list, tuple)):
        for value in owner:
            yield from modules_of(value, depth - 1)
    elif not inspect.ismodule(owner):
        for value in getattr(owner, "__dict__", {}).values():
            yield from modules_of(value, depth - 1)
