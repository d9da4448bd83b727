"""Rows as columns of features: a one, and the sufficient statistics of all sites, block by block.

Values stay as they lie, in memory or on disk, or are laid out column by column where they fit; counts of which most are zero
stay compressed rows, and are no features but multiplied as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...distributed import ALONE, Ranks
from ...handlers import unwrap
from ...joint import LogJoint
from ...lazy_rows import CELLS, LazyRows
from ...mapped_files import still_there
from .counted import Counted, suits
from .estep import Part, few_rows
from .families import Statistics
from .plan import Plan
from .terms import Term, ground, mask_of

#: Entries of a block's features, and of its table of components x rows: they should stay in the cache.
FEATURES, TABLE = 640_000, 200_000
#: Entries of data that are kept column by column, so that blocks of features are copied along the memory.
TURN = 16_000_000
#: Rows on which a kernel is held against the contraction before it is used.
TRIAL = 64


@dataclass
class Layout:
    """Where a statistic of a term lies among the features: rows start:stop; `shape` is its own.

    `triangle`: the upper triangle of an outer product. `pooled`: summed over the entries of an event. `shared`: its
    coefficient is that of all components, so that it is no feature and only its total over the rows matters.
    """

    term: str
    key: str
    start: int
    stop: int
    shape: tuple[int, ...]
    triangle: bool = False
    pooled: bool = False
    shared: bool = False


@dataclass
class Column:
    """Values of one site, (rows, ...event), and what its statistics need.

    `turned`: less the shift, (entries, rows). `counted`: as compressed rows, which are multiplied as they are.
    """

    value: Tensor
    fn: Any
    mask: Tensor | None = None
    turned: Tensor | None = None
    counted: Counted | None = None


@dataclass
class RowFeatures:
    """Features of the rows of a story whose only finite latent is one per row.

    Parameters
    ----------
    joint, plan
        The story and its plan.
    latent, states
        Name of the finite latent and its number of states, K.
    skip
        Sites that are no observations.
    ranks
        Whose rows are added up.
    counts
        Sites whose values are taken as compressed rows; those that are stored so are added.
    """

    joint: LogJoint
    plan: Plan
    latent: str
    states: int
    dtype: torch.dtype = torch.float64
    rows: int = 0
    layout: list[Layout] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)
    totals: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    base: float = 0.0
    kept: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    skip: set[str] = field(default_factory=set)
    ranks: Ranks = ALONE
    all_rows: int = 0
    dense: int = 1
    counts: frozenset[str] = frozenset()

    def sparse(self, term: Term) -> bool:
        """Whether the values of a site are worked on as compressed rows."""
        value = self.joint.problem.kwargs.get(self.joint.structure[term.name].argument or "")
        return term.family is not None and not term.masked and term.shift is None and suits(value, term.family)

    def observed(self) -> list[Term]:
        """All terms but the latent's own."""
        return [t for t in self.plan.terms.values() if t.name != self.latent and t.name not in self.skip]

    def collect(self, theta: dict[str, Tensor], parts: list[Part]) -> None:
        """Find the values of every site: the data as they lie, or what the story makes of them."""
        self.rows = sum(self.rows_of(p) for p in parts)
        self.all_rows = self.ranks.total(self.rows)
        with torch.no_grad():
            few = few_rows(self.joint, parts[0].kwargs, TRIAL)
            trace, _ = self.joint.trace(theta, few)
            plain = [t.name for t in self.observed() if self.is_argument(t, trace.nodes[t.name], few)]
            whole = parts if len(plain) < len(self.observed()) else []
            nodes = [self.joint.trace(theta, p.kwargs)[0].nodes for p in whole]
            for term in self.observed():
                node = trace.nodes[term.name]
                if term.name in plain:
                    argument = self.joint.structure[term.name].argument or ""
                    values = [p.kwargs[argument] for p in parts]
                    masks: list[Tensor | None] = [None]
                    whole_value = self.joint.problem.kwargs[argument]
                    value = whole_value if len(whole_value) == self.rows else torch.cat(values)
                else:
                    value = torch.cat([self.by_row(n[term.name]["value"], p) for n, p in zip(nodes, parts)])
                    masks = [self.mask_by_row(term, n[term.name], p) for n, p in zip(nodes, parts)]
                mask = None if any(m is None for m in masks) else torch.cat(masks)  # type: ignore[arg-type]
                self.columns[term.name] = Column(value, unwrap(node["fn"]), mask)
            floats = [c.value.dtype for c in self.columns.values() if c.value.is_floating_point()]
            single = bool(floats) and all(kind == torch.float32 for kind in floats)
            self.dtype = torch.float32 if single else self.joint.problem.dtype
            for term in (t for t in self.observed() if t.name in plain and t.name in self.counts):
                column = self.columns[term.name]
                column.counted = Counted.of(column.value, self.dtype)
            self.place()
            self.turn()
            self.add_up()

    def is_argument(self, term: Term, node: dict, kwargs: dict[str, Any]) -> bool:
        """Whether the site observes an argument as it is, row by row, so that the story need not hand it over."""
        given = kwargs.get(self.joint.structure[term.name].argument or "")
        value = node["value"]
        same = isinstance(given, Tensor) and given.shape == value.shape and given.data_ptr() == value.data_ptr()
        return same and not term.masked and bool(self.joint.structure.row_arguments)

    def rows_of(self, part: Part) -> int:
        """Rows of one chunk."""
        name = self.joint.structure.row_arguments[0] if self.joint.structure.row_arguments else None
        return len(part.kwargs[name]) if name else int(self.joint.structure.num_rows or 1)

    def by_row(self, value: Tensor, part: Part) -> Tensor:
        """A value with one entry a row (Pyro's batch dimensions of size 1 dropped)."""
        return value.reshape(self.rows_of(part), *value.shape[value.dim() - self.event(value, part) :])

    def event(self, value: Tensor, part: Part) -> int:
        """Dimensions after that of the rows."""
        return value.dim() - 1 - next(i for i, n in enumerate(value.shape) if n == self.rows_of(part))

    def mask_by_row(self, term: Term, node: dict, part: Part) -> Tensor | None:
        """Which entries count, in the shape of the value without the family's own dimensions."""
        assert term.family is not None
        if not term.masked:
            return None
        shape = self.by_row(node["value"], part).shape
        shape = shape[: len(shape) - term.family.event_dims]
        mask = mask_of(node, term.family.event_dims)
        if mask is None:
            return torch.ones(shape, dtype=torch.bool)
        while mask.dim() > len(shape):  # Pyro repeats it for every state of the latent
            mask = mask[0]
        return mask.expand(shape)

    # -- features ----------------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Reserve feature rows for the statistics of every term."""
        start = self.dense = 1
        for term in sorted(self.observed(), key=self.is_counted):
            family = term.family
            assert family is not None
            for key, value in self.statistics(term, slice(0, 1)).items():
                shape = tuple(value.shape[1:])
                triangle = key == "xx" and family.event_dims == 1
                shared = key == "xx" and not term.slot_dims["spread"] and not term.masked
                pooled = key == "xx" and not triangle and not shared and self.one_variance(term)
                size = 1 if pooled else math.prod(shape)
                if triangle:
                    size = size * (shape[-1] + 1) // 2
                size = 0 if shared else size
                self.layout.append(Layout(term.name, key, start, start + size, shape, triangle, pooled, shared))
                start += size
            self.dense = self.dense if self.is_counted(term) else start

    def is_counted(self, term: Term) -> bool:
        """Whether the site's values are multiplied as compressed rows; their features come last."""
        return self.columns[term.name].counted is not None

    def one_variance(self, term: Term) -> bool:
        """Whether all entries of an event have the same unknown variance, and all of them always count."""
        gather = term.gathers.get("spread")
        if gather is None or not term.extra or term.masked:
            return False
        return gather.index.shape[gather.index.dim() - term.extra :].numel() == 1

    def statistics(self, term: Term, rows: slice | Tensor) -> Statistics:
        """Sufficient statistics of some rows; the count only where some values do not count."""
        assert term.family is not None
        column = self.columns[term.name]
        still_there(column.value)
        value = column.value[rows]
        if term.shift is not None:
            value = value.to(self.dtype) - term.shift.to(self.dtype)
        stats = term.family.statistics(value, column.fn)
        if column.mask is None:
            stats.pop("n", None)
            return stats
        mask = column.mask[rows]
        return {k: s * mask.reshape([*mask.shape, *[1] * (s.dim() - mask.dim())]).to(s) for k, s in stats.items()}

    def add_up(self) -> None:
        """Totals that no iteration changes: of shared statistics, and of log h(x)."""
        shared = {p.term for p in self.layout if p.shared}
        for term in self.observed():
            column, family = self.columns[term.name], term.family
            assert family is not None
            if term.name not in shared and family.base is None:
                continue
            if column.counted is not None:
                self.base += column.counted.base(family, self.blocks(1))
                continue
            for rows in self.blocks(1):
                if family.base is not None:
                    base = family.base(column.value[rows].to(torch.get_default_dtype()))
                    self.base += float((base if column.mask is None else base * column.mask[rows]).sum())
                if term.name in shared:
                    xx = self.statistics(term, rows)["xx"].double()
                    total = torch.einsum("n...i,n...j->...ij", xx, xx) if family.event_dims else xx.sum(0)
                    self.totals[term.name, "xx"] = self.totals.get((term.name, "xx"), 0.0) + total
        if self.ranks.shares_rows:
            names = sorted(self.totals)
            base, *totals = self.ranks.add(torch.tensor(self.base).double(), *(self.totals[n] for n in names))
            self.base, self.totals = float(base), dict(zip(names, totals, strict=True))

    def blocks(self, runs: int, first: int = 0, last: int | None = None) -> list[slice]:
        """Rows whose features are made and used at once, of all rows or of those from `first` to `last`."""
        step = min(FEATURES // self.dense, TABLE // (runs * self.states))
        step = max(256, step)
        wide = [c.value.width for c in self.columns.values() if isinstance(c.value, LazyRows) and c.counted is None]
        step = max(1, min([step, *(CELLS // width for width in wide)]))  # more would stay where they are
        last = self.rows if last is None else min(last, self.rows)
        found = [slice(a, min(a + step, last)) for a in range(first, last, step)]
        for counted, _ in self.counted:
            found = [part for rows in found for part in counted.fitting(rows)]
        return found

    @property
    def counted(self) -> list[tuple[Counted, slice]]:
        """Compressed rows of the sites that have them, and their features."""
        found = ((self.columns[p.term].counted, slice(p.start, p.stop)) for p in self.layout)
        return [(c, place) for c, place in found if c is not None]

    def features(self, rows: slice | Tensor) -> Tensor:
        """(features, rows): ones, then every statistic, but for those of compressed rows."""
        n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        out = self.spare("features", self.dense, n)
        out[0] = 1.0
        for term in self.observed():
            if self.is_counted(term) or self.copied(term, rows, out):
                continue
            stats = self.statistics(term, rows)
            for place in (p for p in self.layout if p.term == term.name and not p.shared):
                value = stats[place.key].reshape(n, -1).T
                if place.pooled:
                    torch.sum(value, 0, dtype=out.dtype, out=out[place.start])
                elif not place.triangle:
                    out[place.start : place.stop] = value
                else:
                    self.triangle(out, place)
        return out

    def copied(self, term: Term, rows: slice | Tensor, out: Tensor) -> bool:
        """Features of a normal from its turned values: x as it lies, squares and products from there."""
        turned = self.columns[term.name].turned
        if turned is None or not isinstance(rows, slice):
            return False
        x = turned[:, rows]
        for place in (p for p in self.layout if p.term == term.name and not p.shared):
            if place.key == "x":
                out[place.start : place.stop] = x
            elif place.triangle:
                self.triangle(out, place)
            elif place.pooled:
                torch.sum(x * x, 0, out=out[place.start])
            else:
                torch.mul(x, x, out=out[place.start : place.stop])
        return True

    def turn(self) -> None:
        """Lay normal values out column by column, where they fit."""
        for term in self.observed():
            column = self.columns[term.name]
            normal = term.family is not None and term.family.name in ("Normal", "MultivariateNormal")
            if not normal or column.mask is not None or column.value.numel() > TURN:
                continue
            width = column.value[0].numel()
            column.turned = torch.empty(width, self.rows, dtype=self.dtype, device=column.value.device)
            for rows in self.blocks(1):
                x = column.value[rows].to(self.dtype)
                x = x if term.shift is None else x - term.shift.to(self.dtype)
                column.turned[:, rows] = x.reshape(len(x), width).T
            if term.floor is not None:  # exactly, now that all rows have been seen
                variance = self.variance(column.turned).to(term.floor)
                level = term.floor * 0 if term.shift is None else term.shift.to(term.floor)
                term.floor, term.still = ground(variance.reshape(term.floor.shape), level)

    def variance(self, values: Tensor) -> Tensor:
        """Variance of every entry, (entries, rows) -> (entries,), over the rows of all ranks."""
        if not self.ranks.shares_rows:
            return values.var(1, correction=0)
        mean = self.ranks.add(values.sum(1))[0] / self.all_rows
        return self.ranks.add((values - mean[:, None]).square().sum(1))[0] / self.all_rows

    def triangle(self, out: Tensor, place: Layout) -> None:
        """Products of the entries of x, which already lie among the features (or are their own statistic)."""
        first = next(p for p in self.layout if p.term == place.term and p.key == "x")
        width, at = place.shape[-1], place.start
        for block in out[first.start : first.stop].split(width):
            for i in range(width):
                torch.mul(block[i:], block[i], out=out[at : at + width - i])
                at += width - i

    def spare(self, name: str, height: int, n: int) -> Tensor:
        """A table that is used again and again: fresh memory costs more than the arithmetic in it."""
        old = self.scratch.get(name)
        if old is None or old.shape[0] != height or old.shape[1] < n:
            device = self.joint.problem.device
            old = self.scratch[name] = torch.empty(height, n, dtype=self.dtype, device=device)
        return old if old.shape[1] == n else old[:, :n]
