"""What a story cannot tell apart: components without names, factors without a sign; found by trying them on the density."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .density import Density

Values = Mapping[str, Tensor]
#: Ways of renumbering that are tried, and components beyond which all orders are too many.
TRIES, MOST = 512, 5


@dataclass(frozen=True)
class Symmetries:
    """Axes of every site that run over components without names, and sites that change sign together.

    Attributes
    ----------
    axes
        Site -> axes of its value.
    size
        Number of components; 1 where all have names.
    signs
        Sets of sites.
    """

    axes: dict[str, tuple[int, ...]]
    size: int
    signs: tuple[tuple[str, ...], ...]

    @property
    def trivial(self) -> bool:
        return self.size == 1 and not self.signs

    def __str__(self) -> str:
        told = []
        if self.size > 1:
            told.append(f"the {self.size} components of {', '.join(self.axes)} have no names")
        told += [f"{', '.join(names)} may change sign" for names in self.signs]
        return "; ".join(told) or "everything has a name"

    def orbit(self) -> list[Callable[[Values], dict[str, Tensor]]]:
        """Every way of renumbering and of turning signs: maps of draws (n, *shape) by site."""
        orders = list(itertools.permutations(range(self.size)))
        flips = [tuple(c) for r in range(len(self.signs) + 1) for c in itertools.combinations(self.signs, r)]
        return [lambda v, o=o, f=f: self._moved(v, torch.tensor(o), f) for o in orders for f in flips]  # type: ignore[misc]

    def _moved(self, values: Values, order: Tensor, flips: tuple[tuple[str, ...], ...]) -> dict[str, Tensor]:
        found = dict(values)
        for name, axes in self.axes.items():
            for axis in axes if name in found else ():
                found[name] = found[name].index_select(axis + 1, order)
        for names in flips:
            for name in names:
                if name in found:
                    found[name] = -found[name]
        return found


def find_symmetries(density: Density) -> Symmetries:
    """Try renumbering every axis of a size, and turning every set of signs, at points of the prior."""
    points = [u for u in (density.draw(seed) for seed in range(3)) if u is not None]
    entries = [density.values(u[None])[0] for u in points]
    values = [{p.name: e[p.entries].reshape(1, *p.shape) for p in density.places.values()} for e in entries]
    before = [density.height(_first(v)) for v in values]

    def same(moved: Callable[[Values], dict[str, Tensor]]) -> bool:
        for v, level in zip(values, before):
            try:
                found = density.height(_first(moved(v)))
            except (RuntimeError, ValueError):
                return False
            if not abs(found - level) <= 1e-9 * (1 + abs(level)):
                return False
        return bool(values)

    axes, size = _components(density, same)
    signs: list[tuple[str, ...]] = []
    names = [p.name for p in density.places.values() if bool((entries[0][p.entries] < 0).any())] if entries else []
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            if any(set(s) <= set(chosen) for s in signs):
                continue
            if same(lambda v, c=chosen: {n: -x if n in c else x for n, x in v.items()}):  # type: ignore[misc]
                signs.append(chosen)
    return Symmetries(axes, size, tuple(signs))


def _first(values: Values) -> dict[str, Tensor]:
    return {n: v[0] for n, v in values.items()}


def _components(density: Density, same: Callable) -> tuple[dict[str, tuple[int, ...]], int]:
    """Axes over components without names, and how many components there are."""
    places = list(density.places.values())
    for size in sorted({n for p in places for n in p.shape if 1 < n <= MOST}, reverse=True):
        options = []
        for p in places:
            axes = [i for i, n in enumerate(p.shape) if n == size]
            options.append([c for r in range(len(axes), -1, -1) for c in itertools.combinations(axes, r)])
        every = sorted(itertools.product(*options), key=lambda c: (-sum(map(bool, c)), sum(map(len, c))))
        for chosen in every[:TRIES]:
            found = {p.name: c for p, c in zip(places, chosen) if c}
            if not found:
                continue
            trial = Symmetries(found, size, ())
            swap = torch.arange(size)
            swap[:2] = torch.tensor([1, 0])
            turn = torch.arange(size).roll(1)
            if all(same(lambda v, o=o, t=trial: t._moved(v, o, ())) for o in (swap, turn)):  # type: ignore[misc]
                return found, size
    return {}, 1
