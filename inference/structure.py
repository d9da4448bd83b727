"""What a story says about itself: sites, plates, what is local, what can be summed out, what has a density at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .enumeration import elimination_size
from .handlers import Forward
from .shapes import Record
from .transforms import unconstrain_to

#: Bytes that summing out finite latents may take before it is refused.
ENUMERATION_LIMIT = 4 * 2**30
#: Steps of one series that are all listed.
MOST_STEPS = 8


@dataclass(frozen=True)
class Site:
    """One statement of a story.

    Attributes
    ----------
    kind
        "latent", "observed", "deterministic", "factor" (an unnormalised term) or "param" (learned as a point).
    family, shape, event_shape, plates
        Distribution, shape of the value, of one event, and plates from the outermost in.
    discrete, states
        Whether the support is discrete and how many joint states one event has (None: infinitely many).
    enumerable
        Whether Pyro can list these states, so that they can be summed out.
    local
        Inside the data plate.
    argument, missing
        Argument of the story that is observed here, and how many of its cells are NaN.
    parents, direct_parents
        Sites that its distribution depends on: with deterministic ones seen through, and as the story wrote it.
    moving_support
        The support depends on a latent (the corner of a box): no gradient method is valid.
    improper
        A flat prior without a normaliser.
    has_density
        Whether log p(value) can be computed.
    """

    name: str
    kind: str
    family: str
    shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    discrete: bool = False
    states: int | None = None
    enumerable: bool = False
    local: bool = False
    argument: str | None = None
    missing: int = 0
    parents: tuple[str, ...] = ()
    direct_parents: tuple[str, ...] = ()
    support: str = ""
    moving_support: bool = False
    improper: bool = False
    has_density: bool = True
    reparameterised: bool = True
    reachable: bool = True

    @property
    def continuous(self) -> bool:
        """A latent with a density over the reals."""
        return self.kind == "latent" and not self.discrete


@dataclass(frozen=True)
class Structure:
    """Everything that choosing a method needs, and nothing that depends on a method.

    `linear_gaussian`: given the globals and the finite locals, the log joint of a row is quadratic in its continuous locals.
    `conjugate`: the posterior of all unknowns is known in closed form.
    `admixture`: "static" or "dynamic" where the story is a topic model with Dirichlet or drifting topics, else "".
    """

    sites: tuple[Site, ...]
    plates: dict[str, int]
    data_plate: str | None
    max_plate_nesting: int
    row_arguments: tuple[str, ...] = ()
    data_bytes: int = 0
    notes: tuple[str, ...] = ()
    has_guide: bool = False
    has_modules: bool = False
    itemsize: int = 8
    linear_gaussian: bool = False
    conjugate: bool = False
    admixture: str = ""
    _by_name: dict[str, Site] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._by_name.update({site.name: site for site in self.sites})

    def __getitem__(self, name: str) -> Site:
        if name not in self._by_name:
            raise KeyError(f"no site {name!r}; the story has {list(self._by_name)}")
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def num_rows(self) -> int | None:
        """N, the size of the data plate."""
        return self.plates.get(self.data_plate) if self.data_plate else None

    def _select(self, keep: Callable[[Site], bool]) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if keep(site))

    @property
    def latents(self) -> tuple[Site, ...]:
        return self._select(lambda s: s.kind == "latent")

    @property
    def observed(self) -> tuple[Site, ...]:
        return self._select(lambda s: s.kind == "observed")

    @property
    def learned(self) -> tuple[Site, ...]:
        """Parameters (`pyro.param`, networks): learned as points by every method that accepts them."""
        return self._select(lambda s: s.kind == "param")

    @property
    def finite(self) -> tuple[Site, ...]:
        """Latents that can be summed out."""
        return self._select(lambda s: s.kind == "latent" and s.enumerable)

    @property
    def uncountable(self) -> tuple[Site, ...]:
        """Discrete latents that cannot be summed out: infinitely many states or too many to list."""
        return self._select(lambda s: s.kind == "latent" and s.discrete and not s.enumerable)

    @property
    def globals(self) -> tuple[Site, ...]:
        """Latents shared by all rows."""
        return self._select(lambda s: s.kind == "latent" and not s.local)

    @property
    def continuous_locals(self) -> tuple[Site, ...]:
        return self._select(lambda s: s.continuous and s.local)

    @property
    def guideless(self) -> bool:
        """The story learns networks and leaves nothing to guess: its latents, if it has any, can be summed out."""
        return self.has_modules and all(s.enumerable for s in self.latents)

    @property
    def unnormalised(self) -> tuple[Site, ...]:
        return self._select(lambda s: s.kind == "factor")

    @property
    def implicit(self) -> bool:
        """The story makes data but has no density to compare them with."""
        seen = self.observed
        if any(not s.has_density for s in seen):
            return True
        return not seen and not self.unnormalised and any(s.kind == "deterministic" for s in self.sites)

    @property
    def moving_support(self) -> tuple[Site, ...]:
        return self._select(lambda s: s.kind == "observed" and s.moving_support)

    def enumeration_elements(self) -> float:
        """Elements of the largest table that summing out the finite latents builds."""
        latents = {s.name for s in self.finite}
        sizes = {**self.plates, **{s.name: s.states or 1 for s in self.finite}}
        scopes = []
        for site in self.sites:
            if site.kind in ("param", "deterministic"):
                continue
            own = [site.name] if site.name in latents else []
            scopes.append((*own, *(p for p in site.parents if p in latents), *site.plates))
        return elimination_size([tuple(dict.fromkeys(s)) for s in scopes], latents, sizes) if latents else 0.0

    def enumeration_bytes(self) -> float:
        """Bytes of that table."""
        return self.enumeration_elements() * self.itemsize

    def __str__(self) -> str:
        rows = [("site", "kind", "distribution", "shape", "plates", "where", "states", "depends on")]
        networks: dict[str, int] = {}
        for s in self.sites:
            network, divider, _ = s.name.partition("$$$")
            if divider:
                networks[network] = networks.get(network, 0) + math.prod(s.shape)
        rows += [(n, "param", "network", f"{count:,} weights", "", "", "", "") for n, count in networks.items()]
        hidden, told = middle_steps([s.name for s in self.sites]), False
        for s in self.sites:
            if "$$$" in s.name:
                continue
            if s.name in hidden:
                rows += [] if told else [("...", f"{len(hidden)} more steps", "", "", "", "", "", "")]
                told = True
                continue
            where = {"latent": "local" if s.local else "global"}.get(s.kind, "local" if s.local else "")
            kind = s.kind + (f", {s.missing} cells missing" if s.missing else "")
            states = "" if not s.discrete or s.kind != "latent" else (str(s.states) if s.states else "infinite")
            shape = "(" + ", ".join(map(str, s.shape)) + ")"
            rows.append((s.name, kind, s.family, shape, " > ".join(s.plates), where, states, ", ".join(s.parents)))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        plates = ", ".join(
            f"{n} = {size}" + (" (rows)" if n == self.data_plate else "") for n, size in self.plates.items()
        )
        lines.append(f"plates: {plates or 'none'}")
        if self.finite:
            lines.append(
                f"summing out {shortened([s.name for s in self.finite])}: tables of "
                f"{self.enumeration_elements():,.0f} elements, {format_bytes(self.enumeration_bytes())}"
            )
        if self.unnormalised:
            lines.append(f"unnormalised: {', '.join(s.name for s in self.unnormalised)} (pyro.factor)")
        if self.implicit:
            lines.append("implicit: the story generates data without a density")
        return "\n".join(lines + [f"note: {n}" for n in self.notes])


def middle_steps(names: Sequence[str]) -> set[str]:
    """Steps of long series (h_0, h_1, ..., h_99) that a table leaves out: all but the first two and the last."""
    series: dict[str, list[str]] = {}
    for name in names:
        stem, divider, number = name.rpartition("_")
        if divider and number.isdigit():
            series.setdefault(stem, []).append(name)
    return {name for steps in series.values() if len(steps) > MOST_STEPS for name in steps[2:-1]}


def shortened(names: Sequence[str], most: int = 4) -> str:
    """a, b, c, d, ... (80 in all)"""
    return ", ".join(names) if len(names) <= 2 * most else f"{', '.join(names[:most])}, ... ({len(names)} in all)"


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return ""


def pair(story: Any) -> tuple[Callable, Callable | None]:
    """Model and guide of a story, which may be a bare Pyro program.

    Raises
    ------
    TypeError
        `story` is neither callable nor has a `model` method.
    """
    if isinstance(story, type):
        raise TypeError(f"fit needs a story, got the class {story.__name__}; make one first: {story.__name__}(...)")
    model = getattr(story, "model", story)
    if not callable(model):
        raise TypeError(
            f"fit needs a Pyro program: a callable, or an object with a `model` method; got {type(story).__name__}"
        )
    guide = getattr(story, "guide", None)
    return Forward(model) if isinstance(model, torch.nn.Module) else model, guide if callable(guide) else None


def find_data_plate(records: dict[str, Record], kwargs: dict[str, Any]) -> str | None:
    """The plate whose members are the rows: named "data", or else the outermost that every observed site lies in.

    Without one, the outermost plate of the first observed site that is as long as an argument.
    """
    seen = [r for r in records.values() if r.kind == "observed"]
    seen = seen or [r for r in records.values() if r.kind == "factor" and r.plates]  # a likelihood told by pyro.factor
    if not seen:
        return None
    loops = frozenset().union(*(r.loops for r in seen))  # their members are sites of their own
    names = {name for r in seen for name in r.plates if name not in loops}
    if "data" in names:
        return "data"
    sizes = {p: n for r in seen for p, n in zip(r.plates, r.plate_sizes)}
    lengths = {len(v) for v in kwargs.values() if isinstance(v, Tensor) and v.ndim}
    common = [p for p in seen[0].plates if p in names and all(p in r.plates for r in seen)]
    by_length = [p for p in seen[0].plates if p in names and sizes[p] in lengths]
    return next(iter(common + by_length), None)


def row_arguments(records: dict[str, Record], kwargs: dict[str, Any], data_plate: str | None) -> tuple[str, ...]:
    """Arguments with one entry a row on their first axis."""
    sizes = {n for r in records.values() for p, n in zip(r.plates, r.plate_sizes) if p == data_plate}
    return tuple(n for n, v in kwargs.items() if isinstance(v, Tensor) and v.ndim and len(v) in sizes)


def inspect(story: Any, data: Any = None) -> Structure:
    """Read a story's structure off its own runs, with every shape checked for every method.

    Parameters
    ----------
    story
        A Pyro program, or an object with `model` (and `guide`).
    data
        As for `fit`: one array, a tuple or a mapping of the story's arguments.

    Returns
    -------
    Structure

    Raises
    ------
    ValueError
        A site whose dimensions no plate explains, values outside a support, two sites of one name, a set of sites that
        changes between runs; each names the site, the plate and the line that mends it.
    """
    from .problem import prepare

    return prepare(story, data).structure


def build(
    records: dict[str, Record],
    moving: frozenset[str],
    kwargs: dict[str, Any],
    parents: dict[str, tuple[str, ...]],
    direct: dict[str, tuple[str, ...]],
    *,
    has_guide: bool = False,
    notes: tuple[str, ...] = (),
) -> Structure:
    """Assemble the `Structure` from the runs of the story."""
    data_plate = find_data_plate(records, kwargs)
    plates: dict[str, int] = {}
    for r in records.values():
        plates.update(zip(r.plates, r.plate_sizes))
    rows = row_arguments(records, kwargs, data_plate)
    sites = []
    for name, r in records.items():
        sites.append(
            Site(
                name,
                r.kind,
                r.family,
                r.shape,
                r.event_shape,
                r.plates,
                discrete=r.discrete,
                states=r.states,
                enumerable=r.discrete and r.listable and r.states is not None and r.states <= 10**7,
                local=data_plate is not None and data_plate in r.plates,
                argument=r.argument,
                missing=r.missing,
                parents=parents.get(name, ()),
                direct_parents=tuple(n for n in direct.get(name, ()) if n in records),
                support=r.support,
                moving_support=name in moving,
                improper=r.improper,
                has_density=r.has_density,
                reparameterised=r.reparameterised,
                reachable=r.kind != "latent" or r.discrete or _reachable(r),
            )
        )
    tensors = [v for v in kwargs.values() if isinstance(v, Tensor)]
    return Structure(
        tuple(sites),
        plates,
        data_plate,
        max_plate_nesting=max((-r.leftmost for r in records.values()), default=0),
        row_arguments=rows,
        data_bytes=sum(t.numel() * t.element_size() for t in tensors),
        notes=notes,
        has_guide=has_guide,
        has_modules=any("$$$" in name for name in records),
    )


def _reachable(r: Record) -> bool:
    try:
        unconstrain_to(r.constraint)
    except ValueError:
        return False
    return True


def states_of(fn: torch.distributions.Distribution) -> tuple[int | None, bool]:
    """(joint states of one event, whether they can be listed in parallel)."""
    inner, repeats = fn, 1
    while isinstance(inner, torch.distributions.Independent):
        event = inner.event_shape[: inner.reinterpreted_batch_ndims]
        repeats *= math.prod(event)
        inner = inner.base_dist
    inner = getattr(inner, "base_dist", inner) if type(inner).__name__ == "MaskedDistribution" else inner
    if not getattr(inner, "has_enumerate_support", False):
        return None, False
    try:
        count = len(inner.enumerate_support(expand=False))
    except NotImplementedError:
        return None, False
    return count**repeats, repeats == 1
