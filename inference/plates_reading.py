"""One story with its arguments: the watched run, and the numerical checks that complete it."""

import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .handlers import FlatStart
from .plates_algebra import Apply, Expr, Index, Number, Opaque, Ref, Watch, rebuilt, references, renamed
from .plates_record import ARGUMENT, Recorder, family_arguments
from .plates_replay import (
    aligned,
    another_param,
    another_value,
    buffers_kept,
    changes,
    entry_changed,
    networks_of,
    replay,
    row_changed,
    varies,
)
from .plates_symbols import subscripted
from .plates_time import TimeAxis, divided, tells_step, time_axis
from .session import isolated


@dataclass(frozen=True)
class Plate:
    """A plate around a site; `dim` is None where the plate is a loop, `part` is (plate, step) of a part of a plate."""

    name: str
    size: int
    dim: int | None
    part: tuple[str, int] | None = None

    def caption(self, size: str, math_text: bool) -> str:
        """Name and size, for example "documents  D_1 = 12": `size` is the letter of the size."""
        name, step = self.part or (self.name, None)
        told = f"{subscripted(size, [] if step is None else [str(step)], math_text)} = {self.size}"
        return f"{name}  ${told}$" if math_text else f"{name}  {told}"


@dataclass(frozen=True)
class Site:
    """One node of a story's graph.

    Attributes
    ----------
    kind
        "latent", "observed", "deterministic", "factor", "parameter" (`pyro.param`), "module" (all those
        of one network) or "input" (an array given to the story that some distribution depends on).
    parents
        Names that its distribution (or value) depends on directly, in program order.
    plates
        From the outermost in.
    family
        Name of the distribution, None without one.
    arguments
        Formula of each argument of the distribution: (("loc", Ref("mu")), ("scale", Number(1.0))).
    aligned
        Plates along which row n depends on row n of its parents alone, as a numerical check has shown.
    time
        The chain that its value is along one of its dimensions, where it is one.
    along
        (parent, plate): parents outside a plate whose entry n row n depends on alone.
    varying
        Plates along which its distribution differs from row to row, be it by constants of the story.
    """

    name: str
    kind: str
    parents: tuple[str, ...] = ()
    plates: tuple[Plate, ...] = ()
    family: str | None = None
    arguments: tuple[tuple[str, Expr], ...] = ()
    aligned: frozenset[str] = frozenset()
    time: TimeAxis | None = None
    along: frozenset[tuple[str, str]] = frozenset()
    varying: frozenset[str] = frozenset()

    @property
    def constants(self) -> dict[str, float]:
        """Arguments that are plain numbers."""
        return {name: expr.value for name, expr in self.arguments if isinstance(expr, Number)}


def program(story: Any) -> Callable[..., Any]:
    """The Pyro program of a story: its `model`, or itself."""
    if inspect.isclass(story):
        raise TypeError(
            f"story is the class {story.__name__}, which tells no story before it is made: pass an instance, "
            f"{story.__name__}(...)"
        )
    model = getattr(story, "model", None)
    if callable(model):
        return model
    if callable(story):
        return story
    raise TypeError(
        f"story is {type(story).__name__} and cannot be run: pass a Pyro program (a function that calls "
        "pyro.sample) or an object with a `model` method"
    )


class Reading:
    """A story ready to be run again and again, unchanged or with other values."""

    def __init__(self, story: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.model = program(story)
        self.networks = networks_of(story)
        self.store = pyro.get_param_store().get_state()
        self.positional, self.keywords = _by_name(self.model, args, kwargs)

    def run(self, handler: Messenger, given: dict[str, Any] | None = None, watch: Watch | None = None) -> None:
        """The story once, under `handler`, with fixed seeds and everything put back afterwards."""
        given = given or {}
        change = {k: given.get(k, v) for k, v in self.keywords.items()}
        args = [given.get(k, v) for k, v in self.positional]
        with isolated(seed=0), buffers_kept(self.networks), ExitStack() as stack:
            pyro.get_param_store().set_state(self.store)
            stack.enter_context(poutine.block())
            stack.enter_context(FlatStart())
            if watch is not None:
                stack.enter_context(watch)
                args = [_mark(watch, v, k) for (k, _), v in zip(self.positional, args, strict=True)]
                change = {k: _mark(watch, v, k) for k, v in change.items()}
            stack.enter_context(handler)
            self.model(*args, **change)

    def sites(self, align: bool) -> dict[str, Site]:
        """The graph; `align` adds the check of row against row for each plate."""
        with isolated(seed=0), warnings.catch_warnings(action="ignore"), pyro.validation_enabled(False):
            return self._sites(align)

    def _sites(self, align: bool) -> dict[str, Site]:
        given = self.positional, self.keywords
        read = self._watched()
        if read is None:  # data of another precision than the story's constants: of no account here
            self.positional = [(k, _in_default_dtype(v)) for k, v in self.positional]
            self.keywords = {k: _in_default_dtype(v) for k, v in self.keywords.items()}
            read = self._watched()
        if read is None:  # without the watch; an exception of the story's own comes again, and passes
            self.positional, self.keywords = given
            recorder = Recorder(Watch())
            self.run(recorder)
            read = recorder.found, set(recorder.found)
        found, doubtful = read
        tested = self._test(found, [n for n in found if n in doubtful][:60])
        sites = _assemble(found, tested)
        return self._align(found, sites) if align else sites

    def _watched(self) -> tuple[dict[str, dict], set[str]] | None:
        """What the watched run found, and whose children it may have missed; None where it fails."""
        watch = Watch()
        recorder = Recorder(watch)
        try:
            self.run(recorder, watch=watch)
        except Exception:
            return None
        return recorder.found, watch.escaped | _childless(recorder.found)

    def _held(self, found: dict[str, dict]) -> dict[str, Any]:
        return {n: s["value"] for n, s in found.items() if "value" in s and s["kind"] != "factor"}

    def _test(self, found: dict[str, dict], names: list[str]) -> dict[str, dict[str, set[str]]]:
        """By site and argument, those among `names` that it depends on when values are changed."""
        result: dict[str, dict[str, set[str]]] = {}
        values = self._held(found)
        before = replay(self.run, values) if names else None
        if before is None:
            return result
        for name in names:
            site = found[name]
            if "held" in site:
                after = self._with_params(values, site)
            else:
                value = values.get(name)
                other = another_value(site["fn"], value) if isinstance(value, Tensor) else None
                after = None if other is None else replay(self.run, {**values, name: other})
            for child, arguments in changes(before, after, family_arguments).items():
                if child != name:
                    for argument in arguments:
                        result.setdefault(child, {}).setdefault(argument, set()).add(name)
        return result

    def _with_params(self, values: dict[str, Any], site: dict) -> dict[str, dict] | None:
        others = {k: another_param(v, c) for k, (v, c) in site["held"].items()}
        changed = {k: v for k, v in others.items() if v is not None}
        if site["kind"] != "module":
            return replay(self.run, values, changed)
        kept = {k: v.detach().clone() for k, (v, _) in site["held"].items() if k in changed}
        try:
            for k, other in changed.items():
                site["held"][k][0].data.copy_(other)
            return replay(self.run, values)
        finally:
            for k, old in kept.items():
                site["held"][k][0].data.copy_(old)

    def _align(self, found: dict[str, dict], sites: dict[str, Site]) -> dict[str, Site]:
        values = self._held(found)
        plates = {f.name: f for s in found.values() for f in s["frames"] if f.dim is not None and f.size > 1}
        before = replay(self.run, values) if plates else None
        if before is None:
            return sites
        for frame in plates.values():
            inside = [n for n, s in found.items() if frame.name in (f.name for f in s["frames"])]

            def rows_of(r: int, inside: list[str] = inside, frame: Any = frame) -> dict[str, dict] | None:
                others = {n: v for n in inside if (v := row_changed(found[n], values.get(n), frame, r)) is not None}
                return replay(self.run, {**values, **others})

            following = [n for n in inside if set(sites[n].parents) & set(inside)]
            for name in aligned(before, rows_of, following, values, frame):
                sites[name] = replace(sites[name], aligned=sites[name].aligned | {frame.name})
            for name in inside:
                if varies(before[name], values.get(name), frame.dim, frame.size):
                    sites[name] = replace(sites[name], varying=sites[name].varying | {frame.name})
            self._align_inputs(before, sites, inside, values, frame)
            self._align_outside(before, found, sites, inside, values, frame)
        for name in (n for n, s in found.items() if s["kind"] in ("latent", "observed")):
            axis = time_axis(found[name]["fn"], values.get(name), sites[name])
            if axis is not None:
                for frame in plates.values():
                    rows = divided(axis, name, frame, sites, found, values, before, self.run)
                    axis = axis if rows is None else self._in_columns(axis, frame.name, rows, sites)
                sites[name] = replace(sites[name], time=axis)
        return sites

    def _in_columns(self, axis: TimeAxis, plate: str, rows: list[Tensor], sites: dict[str, Site]) -> TimeAxis:
        """The chain with a plate that falls into one part a step, and the arrays that say nothing more."""
        told = {
            n
            for key, value in (*self.positional, *self.keywords.items())
            for n in (key, f"{key} (argument)")
            if n in sites and sites[n].kind == "input" and tells_step(value, axis, rows)
            and plate in (p.name for p in sites[n].plates)
        }  # fmt: skip
        columns = (*axis.columns, (plate, tuple(int(r.sum()) for r in rows)))
        return replace(axis, columns=columns, told=axis.told | told)

    def _align_inputs(self, before: dict, sites: dict[str, Site], inside: list[str], values: dict, frame: Any) -> None:
        """Arguments whose row n is used for row n alone belong inside the plate."""
        plate = Plate(frame.name, frame.full_size or frame.size, frame.dim)
        for key, value in (*self.positional, *self.keywords.items()):
            name = next((n for n in (key, f"{key} (argument)") if n in sites and sites[n].kind == "input"), None)
            users = [n for n, s in sites.items() if name in s.parents]
            if name is None or not isinstance(value, Tensor) or not users or not set(users) <= set(inside):
                continue
            dim = next((d for d, size in enumerate(value.shape) if size == frame.size), None)
            if dim is None:
                continue

            def entry(r: int, k: str = key, value: Tensor = value, dim: int = dim) -> dict[str, dict] | None:
                changed = entry_changed(value, dim, r)
                return replay(lambda h: self.run(h, {k: changed}), values)

            if set(users) <= aligned(before, entry, users, values, frame):
                sites[name] = replace(sites[name], plates=(*sites[name].plates, plate))

    def _align_outside(
        self, before: dict, found: dict, sites: dict[str, Site], inside: list[str], values: dict, frame: Any
    ) -> None:
        """Vectors made outside the plate, or in another one, whose entry n is used for row n alone."""
        parents = {p for n in inside for p in sites[n].parents if p not in inside and p in found}
        for name in [n for n in found if n in parents][:20]:
            value = values.get(name)
            sizes = value.shape if isinstance(value, Tensor) else ()
            users = [n for n in inside if name in sites[n].parents]
            for dim in (d for d, size in enumerate(sizes) if size == frame.size):

                def entry(r: int, name: str = name, value: Any = value, dim: int = dim) -> dict[str, dict] | None:
                    other = another_value(found[name]["fn"], value, (dim, r))
                    return None if other is None else replay(self.run, {**values, name: other})

                for user in aligned(before, entry, users, values, frame):
                    sites[user] = replace(sites[user], along=sites[user].along | {(name, frame.name)})


def _childless(found: dict[str, dict]) -> set[str]:
    """Sites that nothing after them seems to use: the watch may have lost them."""
    used = set().union(*(s["names"] for s in found.values())) if found else set()
    names = list(found)
    return {n for n in names[:-1] if n not in used and found[n]["kind"] in ("latent", "parameter", "module")}


def _assemble(found: dict[str, dict], tested: dict[str, dict[str, set[str]]]) -> dict[str, Site]:
    order = {n: i for i, n in enumerate(found)}
    sources = {n: s["source"].expr for n, s in found.items() if s["kind"] == "observed" and s["source"]}
    observed_as = {e: n for n, e in sources.items() if isinstance(e, Ref | Index)}
    whole = {e.name for e in observed_as if isinstance(e, Ref)}
    sites: dict[str, Site] = {}
    inputs: dict[str, None] = {}
    for name, site in found.items():
        seen: set[str] = set()
        arguments: list[tuple[str, Expr]] = []
        for key, (expr, plain) in site["arguments"].items():
            expr = _as_sites(expr, {e: n for e, n in observed_as.items() if order[n] < order[name]}, whole)
            more = tested.get(name, {}).get(key, set())
            if more - references(expr):
                expr = Opaque(references(expr) | more)
            seen |= references(expr)
            if expr is None or not (references(expr) or isinstance(expr, Number)):
                expr = plain if plain is not None else Opaque(frozenset())
            arguments.append((key, plain if isinstance(expr, Number) and plain is not None else expr))
        in_arguments = frozenset().union(*(references(e) for e, _ in site["arguments"].values()))
        seen |= site["names"] - in_arguments - whole
        seen |= set().union(*tested.get(name, {}).values())
        inputs.update(dict.fromkeys(sorted(n for n in seen if n.startswith(ARGUMENT))))
        plates = tuple(Plate(f.name, f.full_size or f.size, f.dim) for f in site["frames"])
        parents = tuple(sorted(seen - {name}, key=lambda n: order.get(n, -1)))
        sites[name] = Site(name, site["kind"], parents, plates, site.get("family"), tuple(arguments))
    shown = {k: f"{k[1:]} (argument)" if k[1:] in sites else k[1:] for k in inputs}
    given = {label: Site(label, "input") for label in shown.values()}
    return given | {n: _rename(s, shown) for n, s in sites.items()}


def _as_sites(expr: Expr | None, observed_as: dict[Expr, str], whole: set[str]) -> Expr | None:
    """Data that earlier sites observe, read again from an argument, are the values of those sites."""
    if expr is None:
        return None
    if expr in observed_as:
        return Ref(observed_as[expr])
    if isinstance(expr, Index | Apply):
        given = (expr.base, *expr.items) if isinstance(expr, Index) else expr.args
        parts = tuple(_as_sites(a, observed_as, whole) for a in given)
        if any(isinstance(p, Opaque) and not p.names for p in parts):  # a constant that has no name
            return Opaque(frozenset().union(*(references(p) for p in parts)))
        return rebuilt(expr, parts)
    if isinstance(expr, Ref | Opaque) and references(expr) & whole:
        return Opaque(references(expr) - whole)
    return expr


def _rename(site: Site, names: dict[str, str]) -> Site:
    parents = tuple(names.get(n, n) for n in site.parents)
    arguments = tuple((k, renamed(e, lambda n: names.get(n, n))) for k, e in site.arguments)
    return replace(site, parents=parents, arguments=arguments)


def _by_name(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Arguments as the story names them; arrays and data frames become tensors."""
    names: list[str] = []
    try:
        called = model.forward if isinstance(model, torch.nn.Module) else model
        for name, p in inspect.signature(called).parameters.items():
            names += [name] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) else []
    except (TypeError, ValueError):
        pass
    names += [f"argument_{i}" for i in range(len(names), len(args))]
    return (
        [(n, _tensor(a)) for n, a in zip(names, args, strict=False)],
        {k: _tensor(v) for k, v in kwargs.items()},
    )


def _tensor(value: Any) -> Any:
    if hasattr(value, "to_numpy") and not isinstance(value, Tensor):
        value = value.to_numpy()
    if isinstance(value, list) and value and isinstance(value[0], int | float | list):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        tensor = torch.as_tensor(np.ascontiguousarray(value))
        return tensor.to(torch.get_default_dtype()) if value.dtype.kind == "f" else tensor
    return value


def _in_default_dtype(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.get_default_dtype()) if floating else value


def _mark(watch: Watch, value: Any, name: str) -> Any:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return watch.mark(value, ARGUMENT + name)
    if type(value) in (list, tuple):
        return type(value)(_mark(watch, v, name) for v in value)
    return {k: _mark(watch, v, name) for k, v in value.items()} if type(value) is dict else value
