"""Leapfrog steps of many chains at once: in machine code, thread by thread, or as one batch of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..compiled import Compiled, sampler
from .cuda_graphs import graphed
from .native import cores

if TYPE_CHECKING:
    from ..capture import ValueAndGrad
    from .backends import Backend


@dataclass(frozen=True)
class Ensemble:
    """Positions (chains, dim) with log density (chains,) and gradient (chains, dim)."""

    position: NDArray
    value: NDArray
    gradient: NDArray


class Mover(Protocol):
    """What moves all chains."""

    def at(self, position: NDArray) -> Ensemble:
        """The ensemble at these positions."""

    def move(
        self, start: Ensemble, momentum: NDArray, steps: int, step: float, inverse: NDArray
    ) -> tuple[Ensemble, NDArray]:
        """Where `steps` leapfrog steps lead, and the momentum there; `inverse` is the inverse mass."""

    def chosen(self, taken: NDArray, new: Ensemble, old: Ensemble) -> Ensemble:
        """The new state of the chains that were taken, the old one of the others."""


class _Chosen:
    def chosen(self, taken: NDArray, new: Ensemble, old: Ensemble) -> Ensemble:
        """The new state of the chains that were taken, the old one of the others."""
        wide = taken[:, None]
        return Ensemble(
            np.where(wide, new.position, old.position),
            np.where(taken, new.value, old.value),
            np.where(wide, new.gradient, old.gradient),
        )


@dataclass
class MachineMover(_Chosen):
    """The compiled density, a share of the chains on every core."""

    code: Compiled
    _pool: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._threads = cores()
        self._arenas = [self.code.arena() for _ in range(self._threads)]
        self._works = [np.zeros(self.code.dim) for _ in range(self._threads)]
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="chain")
        self._move = sampler("hmc").hmc_move

    def at(self, position: NDArray) -> Ensemble:
        """The ensemble at these positions."""
        value, gradient = self.code.many(position)
        return Ensemble(position, value, gradient)

    def move(
        self, start: Ensemble, momentum: NDArray, steps: int, step: float, inverse: NDArray
    ) -> tuple[Ensemble, NDArray]:
        """Where `steps` leapfrog steps lead, and the momentum there; `inverse` is the inverse mass."""
        arrays = [start.position.copy(), momentum.copy(), start.gradient.copy(), start.value.copy()]
        inverse = np.ascontiguousarray(inverse)
        chains, dim = start.position.shape
        edges = np.linspace(0, chains, self._threads + 1).astype(int)
        pointer, number = ctypes.c_void_p, ctypes.c_int64

        def part(k: int) -> None:
            self._move(
                pointer(self.code.address),
                pointer(ctypes.addressof(self.code.inputs)),
                pointer(self._arenas[k].ctypes.data),
                pointer(self._works[k].ctypes.data),
                number(dim),
                number(inverse.ndim - 1),
                number(int(edges[k])),
                number(int(edges[k + 1])),
                number(steps),
                ctypes.c_double(step),
                *(pointer(a.ctypes.data) for a in (inverse, *arrays)),
            )

        if self._threads == 1:
            part(0)
        else:
            list(self._pool.map(part, range(self._threads)))
        q, p, g, value = arrays
        return Ensemble(q, value, g), p


@dataclass
class BatchMover(_Chosen):
    """The captured density of all chains as one batch, on the device of the data.

    On a card a leapfrog step is recorded, where that is possible: one launch in place of one for every operation.

    Attributes
    ----------
    mode
        What runs a step: "graph" or "eager" as the density, or "cudagraph".
    reason
        Why it is not recorded on a card; empty otherwise.
    """

    potential: ValueAndGrad
    mode: str = field(init=False)
    reason: str = field(init=False, default="")
    _recorded: dict[Any, Callable[..., Any]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.mode = self.potential.mode

    def at(self, position: NDArray) -> Ensemble:
        """The ensemble at these positions."""
        return Ensemble(position, *self.potential.numpy(position))

    def move(
        self, start: Ensemble, momentum: NDArray, steps: int, step: float, inverse: NDArray
    ) -> tuple[Ensemble, NDArray]:
        """Where `steps` leapfrog steps lead, and the momentum there; `inverse` is the inverse mass."""
        like: Any = self.potential.points[0]
        q, p, g, wide = (
            torch.from_numpy(a).to(like) for a in (start.position, momentum, start.gradient, step * inverse)
        )
        value = torch.zeros(0)
        p = p + 0.5 * step * g
        whole, half = (torch.full((), s, dtype=q.dtype, device=q.device) for s in (step, 0.5 * step))
        leap = self.recorded(q, p, wide, whole)
        for s in range(steps):
            q, p, g, value = leap(q, p, wide, whole if s + 1 < steps else half)
        q_, p_, g_, v_ = (t.double().cpu().numpy() for t in (q, p, g, value))
        return Ensemble(q_, v_, g_), p_

    def leap(self, q: Tensor, p: Tensor, wide: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """New positions, momenta `step` times the gradient on, that gradient, and the log density."""
        q = q + (p @ wide if wide.ndim == 2 else wide * p)
        with torch.inference_mode(self.potential.mode == "graph"):
            value, g = self.potential(q)
        return q, p + step * g, g, value

    def recorded(self, *example: Tensor) -> Callable[..., Any]:
        """`leap` for tensors of these shapes; what it returns on a card is written over by the next call."""
        if not example[0].is_cuda or self.potential.mode != "graph":
            return self.leap
        key = tuple(t.shape for t in example)
        if key not in self._recorded:
            found = graphed(self.leap, example, [])
            self.mode, self.reason = found.mode, found.reason
            self._recorded[key] = getattr(found.call, "once", found.call)
        return self._recorded[key]


def mover_for(potential: ValueAndGrad, backend: Backend) -> Mover:
    """The mover of a back end."""
    return MachineMover(backend.code) if backend.code is not None else BatchMover(potential)
