"""The log joint density of a tiny story at many points at once, told by plain traces and nothing else.

Nothing of what the methods are made of is used here: every latent is given its value by a handler, the story is told, and the
log densities of its sites are added up.  An oracle that shared code with the methods would share their faults.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from ..data import DataNotice, bind
from ..structure import pair
from .coordinates import Place, constrain, contrasts, free_shape, unconstrain

#: Joint states of the discrete latents that are listed.
MOST_STATES = 4096
#: Numbers of one batch of evaluations, about.
BATCH = 2**21


class Started(Messenger):
    """Standard normal coordinates where a flat prior cannot be drawn from."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and improper(msg["fn"]):
            fn = msg["fn"]
            way, shape = biject_to(fn.support), (*fn.batch_shape, *fn.event_shape)
            msg["value"] = way(torch.randn(way.inverse_shape(torch.Size(shape))))


def improper(fn: Any) -> bool:
    """Whether a distribution is flat and without a normaliser."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return "Improper" in type(fn).__name__


class Held(Messenger):
    """Put held values into networks, which read their own weights, and note which parameters there are."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.seen = values, set[str]()

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        self.seen.add(name)
        if "$$$" in name and name in self.values:
            with torch.no_grad():
                msg["args"][1].copy_(self.values[name])


class Counts:
    """Multinomial log density without the in-place step that keeps PyTorch's from being evaluated in batches."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fn, name)

    def log_prob(self, value: Tensor) -> Tensor:
        """log of the multinomial coefficient, and of the product of probabilities."""
        words = torch.xlogy(value, self.fn.probs).sum(-1)
        return (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1) + words


class Told(Messenger):
    """Give every latent its value: discrete ones theirs, continuous ones by way of unconstrained coordinates."""

    def __init__(self, places: Mapping[str, Place], u: Tensor, states: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.places, self.u, self.states = places, u, states
        self.values: list[Tensor] = []
        self.log_dets: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if isinstance(msg["fn"], torch.distributions.Multinomial):
            msg["fn"] = Counts(msg["fn"])
        if name in self.places:
            place = self.places[name]
            free = self.u[place.start : place.start + math.prod(place.free_shape)].reshape(place.free_shape)
            if place.turned:
                free = free @ contrasts(place.shape[-1])
            value, self.log_dets[name] = constrain(free, msg["fn"].support, place.shape)
            self.values.append(value.reshape(-1))
        elif name in self.states:
            value = self.states[name]
        else:
            return
        msg["value"], msg["is_observed"] = value, True


class Density:
    """log p(data, discrete latents, continuous latents) of a story, as a function of states and of real coordinates.

    Parameters
    ----------
    story, data
        As for `fit`.
    held
        Values of learned parameters by name; those of the story as it is where None.

    Raises
    ------
    ValueError
        A latent with infinitely many states, too many joint states, missing cells, or no density.
    """

    def __init__(self, story: Any, data: Any, held: Mapping[str, Tensor] | None = None) -> None:
        pair(story)
        self.given_story, self.given_data = story, data
        modules = [m for m in (story, *getattr(story, "__dict__", {}).values()) if isinstance(m, nn.Module)]
        if modules:
            story = deepcopy(story)
            for m in (story, *getattr(story, "__dict__", {}).values()):
                if isinstance(m, nn.Module):
                    m.double().eval()
        self.story, self.held = story, dict(held or {})
        self.model: Callable = pair(story)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataNotice)
            self.kwargs = bind(self.model, data, torch.float64)
        for name, value in self.kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                raise ValueError(
                    f"{name} has {int(value.isnan().sum())} missing cells (NaN): give the oracle complete rows"
                )
        self.learned: dict[str, Tensor] = {}
        self.batched: bool | None = None
        self.improper = False
        self._read()
        self.anchor = self._find_anchor()
        self.known_steps: dict[tuple[int, ...], Tensor] = {}
        self.sharpness, self.blurred = 1.0, False  # of Gaussian algebra near singularity: see `ranges.gaussian_batch`

    # -- what the story holds ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Sites of one run."""
        trace = self._first_run()
        self.places: dict[str, Place] = {}
        self.levels: dict[str, Tensor] = {}
        self.finite_shape: dict[str, tuple[int, ...]] = {}
        self.plates: dict[str, tuple[str, ...]] = {}
        start = first = 0
        for name, node in trace.nodes.items():
            if node["type"] == "param":
                self.learned[name] = node["value"].detach()
            if node["type"] != "sample" or type(node["fn"]).__name__ == "_Subsample":
                continue
            self.plates[name] = tuple(frame.name for frame in node["cond_indep_stack"] if frame.vectorized)
            if node["is_observed"]:
                continue
            fn, value = node["fn"], node["value"]
            if fn.support.is_discrete:
                self._add_finite(name, fn, value)
                continue
            shape, free = tuple(value.shape), free_shape(fn, value)
            self.improper = self.improper or improper(fn)
            self.places[name] = Place(name, shape, free, start, first)
            start, first = start + math.prod(free), first + math.prod(shape)
        self.dim, self.num_entries = start, first
        self.states = self._list_states()

    def _first_run(self) -> Any:
        """A trace with held parameters in place."""
        if not self.held:
            return poutine.trace(Started()(self.model)).get_trace(**self.kwargs)
        handler = Held(self.held)
        poutine.block(handler(Started()(self.model)))(**self.kwargs)
        if unknown := sorted(set(self.held) - handler.seen):
            raise ValueError(f"no learned parameter is called {unknown}; the story has {sorted(handler.seen)}")
        store = pyro.get_param_store()
        store.clear()
        trace = poutine.trace(Started()(self.model)).get_trace(**self.kwargs)
        for name, value in self.held.items():
            if "$$$" not in name:
                store[name] = value.double()
        return poutine.trace(Started()(self.model)).get_trace(**self.kwargs) if store.keys() else trace

    def _add_finite(self, name: str, fn: Any, value: Tensor) -> None:
        inner = fn
        while isinstance(inner, torch.distributions.Independent):
            inner = inner.base_dist
        try:
            levels = inner.enumerate_support(expand=False)
        except NotImplementedError:
            raise ValueError(
                f"site {name!r} ({type(inner).__name__}) has states without end: an oracle lists all of them. Replace it by "
                f"a Categorical over the states that matter"
            ) from None
        levels = levels.reshape(len(levels), *levels.shape[1 + len(inner.batch_shape) :])
        self.levels[name] = levels
        event = levels.ndim - 1
        self.finite_shape[name] = tuple(value.shape[: value.ndim - event])

    def _list_states(self) -> dict[str, Tensor]:
        """Every joint state of the discrete latents: (S, *shape) each, as indices of their levels."""
        sizes = [(n, len(v), math.prod(self.finite_shape[n])) for n, v in self.levels.items()]
        self.num_states = math.prod(k**n for _, k, n in sizes)
        if self.num_states > MOST_STATES:
            told = " x ".join(f"{k}^{n} ({name!r})" for name, k, n in sizes)
            digits = sum(n * math.log10(k) for _, k, n in sizes)
            many = f"{self.num_states:.3g}" if digits < 15 else f"10^{digits:.0f}"  # which no float may hold
            raise ValueError(
                f"the discrete latents have {told} = {many} joint states, and an oracle lists at most "
                f"{MOST_STATES}: give it fewer rows, or fewer states a row"
            )
        axes = [range(k) for _, k, n in sizes for _ in range(n)]
        table = torch.tensor(list(itertools.product(*axes)), dtype=torch.long).reshape(self.num_states, -1)
        found, at = {}, 0
        for name, _, n in sizes:
            found[name] = table[:, at : at + n].reshape(self.num_states, *self.finite_shape[name])
            at += n
        return found

    def turn(self, names: set[str]) -> None:
        """Take levels and contrasts along the last axis of these sites for coordinates, and no others'."""
        self.places = {n: replace(p, turned=n in names) for n, p in self.places.items()}
        self.anchor = self._find_anchor()
        self.known_steps = {}

    def draw(self, seed: int) -> Tensor | None:
        """Unconstrained coordinates of one draw of the prior; None where it lies at an edge of the numbers."""
        torch.manual_seed(seed)
        trace: Any = poutine.trace(Started()(self.model)).get_trace(**self.kwargs)
        u = self._coordinates({p.name: trace.nodes[p.name]["value"] for p in self.places.values()}, trace)
        return u if bool(u.isfinite().all()) else None

    def _coordinates(self, values: Mapping[str, Tensor], trace: Any) -> Tensor:
        parts = []
        for p in self.places.values():
            free = unconstrain(trace.nodes[p.name]["fn"], values[p.name])
            parts.append((free @ contrasts(p.shape[-1]).T if p.turned else free).reshape(-1))
        return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)

    def free_vector(self, values: Mapping[str, Tensor]) -> Tensor:
        """Coordinates of given values; of sites that are not given, those of the anchor."""
        at = self.values(self.anchor[None])[0] if self.dim else torch.zeros(0, dtype=torch.float64)
        full = {p.name: values.get(p.name, at[p.entries].reshape(p.shape)) for p in self.places.values()}
        full = {n: v.double().reshape(self.places[n].shape) for n, v in full.items()}
        chosen = {n: self.levels[n][i[0]] for n, i in self.states.items()}
        trace: Any = poutine.trace(poutine.condition(self.model, {**full, **chosen})).get_trace(**self.kwargs)
        return self._coordinates(full, trace)

    def _find_anchor(self) -> Tensor:
        """A point of the prior at which the data are possible; the likeliest of a few."""
        best, where = -math.inf, None
        for seed in range(64):
            u = self.draw(seed)
            if u is None:
                continue
            value = self.log_joint(u[None]).logsumexp(0).item()
            if value > best:
                best, where = value, u
            if best > -math.inf and seed >= 15:
                break
        if where is None:
            raise ValueError(
                "the story gives the data the density 0 at all 64 draws from its prior: is it their story?"
            )
        return where

    # -- evaluation --------------------------------------------------------------------------------------------------

    def tell(self, u: Tensor, state: Mapping[str, Tensor], flat: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
        """log p at one point and one state, and the values of all continuous latents in one vector.

        Sites in `flat` count with a flat prior and without the Jacobian: likelihood, or density of values.
        """
        chosen = {n: self.levels[n][i] for n, i in state.items()}
        told = Told(self.places, u, chosen)
        trace: Any = poutine.trace(told(self.model)).get_trace(**self.kwargs)
        trace.compute_log_prob()
        terms = [
            node["log_prob_sum"]
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample" and name not in flat
        ]
        terms += [v for n, v in told.log_dets.items() if n not in flat]
        total = sum(terms, u.new_zeros(()))
        values = torch.cat(told.values) if told.values else u.new_zeros(0)
        return total, values

    def log_dets(self, u: Tensor, state: Mapping[str, Tensor], sites: tuple[str, ...]) -> Tensor:
        """log-determinants of the maps from coordinates to some sites' values, at one point."""
        told = Told(self.places, u, {n: self.levels[n][i] for n, i in state.items()})
        poutine.block(told(self.model))(**self.kwargs)
        return sum((told.log_dets[n] for n in sites), u.new_zeros(()))

    def height(self, values: Mapping[str, Tensor]) -> float:
        """log p(data, values) of all continuous latents, as a density of the values, states summed."""
        u = self.free_vector(values)
        names = tuple(self.places)
        total = self.batch(lambda a, s: self.tell(a, s)[0] - self.log_dets(a, s, names), u[None])
        return float(total.logsumexp(0))

    def log_joint(self, u: Tensor, states: Mapping[str, Tensor] | None = None) -> Tensor:
        """log p of all states (S) at all points (B, dim): (S, B)."""
        return self.batch(lambda a, s: self.tell(a, s)[0], u, states)

    def values(self, u: Tensor) -> Tensor:
        """Values of all continuous latents at points (B, dim): (B, entries)."""
        one = {n: v[:1] for n, v in self.states.items()}
        return self.batch(lambda a, s: self.tell(a, s)[1], u, one)[0]

    def batch(self, function: Callable, u: Tensor, states: Mapping[str, Tensor] | None = None, width: int = 1) -> Any:
        """`function(point, state)` of all states and points: (S, B, ...); by `vmap` where the story allows, else one by one."""
        states = self.states if states is None else states
        S = len(next(iter(states.values()))) if states else 1
        size = max(1, BATCH // (S * width * (16 + self._cells())))
        pieces = [self._some(function, part, states, S) for part in u.split(size)] if len(u) else []
        return _glue(pieces)

    def _cells(self) -> int:
        return self.dim + sum(v.numel() for v in self.kwargs.values() if isinstance(v, Tensor))

    def _some(self, function: Callable, u: Tensor, states: Mapping[str, Tensor], S: int) -> Any:
        table = dict(states) if states else {"": torch.zeros(S)}

        def one(a: Tensor, s: dict[str, Tensor]) -> Any:
            return function(a, {} if "" in s else s)

        if self.batched is not False:
            try:
                found = torch.func.vmap(torch.func.vmap(one, (0, None)), (None, 0))(u, table)
                if self.batched is None:
                    self.batched = True
                return found
            except RuntimeError:
                if self.batched:
                    raise
                self.batched = False
        rows = [_stack([one(a, {n: v[i] for n, v in table.items()}) for a in u]) for i in range(S)]
        return _stack(rows)


def _stack(parts: list[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(torch.stack(p) for p in zip(*parts))
    return torch.stack(parts)


def _glue(parts: list[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(p, 1) for p in zip(*parts))
    return torch.cat(parts, 1)
