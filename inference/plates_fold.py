"""Loops unrolled into numbered sites, folded again: equal rounds into a plate, chains into a few steps."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .plates_algebra import renamed
from .plates_reading import Plate, Site
from .plates_symbols import spoken

_NUMBER = re.compile(r"_?(\d+)")


@dataclass(frozen=True)
class Chain:
    """Numbered sites of one loop.

    Attributes
    ----------
    families
        Name without its number -> {number: name of the site}.
    first, last
        Smallest and largest number.
    lagged
        Pairs (parent, child) of families where a step depends on an earlier one.
    """

    families: dict[str, dict[int, str]]
    first: int
    last: int
    lagged: tuple[tuple[str, str], ...]

    @property
    def place(self) -> dict[str, tuple[str, int]]:
        """Family and number by name of the site."""
        return {name: (base, i) for base, members in self.families.items() for i, name in members.items()}


def _without_number(name: str, which: int) -> tuple[str, int] | None:
    found = list(_NUMBER.finditer(name))
    if which >= len(found) or found[which].start() == 0:
        return None
    return name[: found[which].start()] + name[found[which].end() :], int(found[which][1])


def fold_loops(sites: dict[str, Site]) -> dict[str, Site]:
    """Each sequential plate as if it had been a vectorised one, where all its rounds tell the same.

    Rounds that differ stay unrolled, and lose the plate: a box around them would claim too many of them.
    """
    for plate in dict.fromkeys(p for s in sites.values() for p in s.plates if p.dim is None):
        inside = [n for n, s in sites.items() if plate in s.plates]
        folded = next((f for which in range(3) if (f := _fold(sites, plate, inside, which))), None)
        if folded is None:
            strip = {n: tuple(p for p in sites[n].plates if p != plate) for n in inside}
            folded = {n: replace(s, plates=strip[n]) if n in strip else s for n, s in sites.items()}
        sites = folded
    return sites


def _fold(sites: dict[str, Site], plate: Plate, inside: list[str], which: int) -> dict[str, Site] | None:
    places = {n: _without_number(n, which) for n in inside}
    if any(p is None for p in places.values()):
        return None
    place = {n: p for n, p in places.items() if p is not None}
    numbers = {i for _, i in place.values()}
    if len(numbers) < 2 or any(b in sites for b, _ in place.values()):
        return None
    if len(place) != len(numbers) * len({b for b, _ in place.values()}):
        return None
    merged: dict[str, Site] = {}
    for name, site in sites.items():
        if name not in place:
            if set(site.parents) & set(place):
                parents = tuple(dict.fromkeys(place[p][0] if p in place else p for p in site.parents))
                arguments = tuple((k, renamed(e, lambda n: place.get(n, (n, 0))[0])) for k, e in site.arguments)
                site = replace(site, parents=parents, arguments=arguments)
            merged[name] = site
            continue
        base, i = place[name]
        if any(p in place and place[p][1] != i for p in site.parents):
            return None
        parents = tuple(place[p][0] if p in place else p for p in site.parents)
        arguments = tuple((k, renamed(e, lambda n: place.get(n, (n, 0))[0])) for k, e in site.arguments)
        one = replace(site, name=base, parents=parents, arguments=arguments, aligned=site.aligned | {plate.name})
        if merged.setdefault(base, one) != one:
            return None
    return merged


def find_chains(sites: dict[str, Site], shortest: int = 4) -> list[Chain]:
    """Families of at least `shortest` sites numbered in a row; families of one loop are one chain."""
    families: dict[str, dict[int, str]] = {}
    for name, site in sites.items():
        count = len(_NUMBER.findall(name))
        place = _without_number(name, count - 1) if count and name[-1].isdigit() else None
        if place is not None and site.kind not in ("parameter", "module", "input"):
            families.setdefault(place[0], {})[place[1]] = name
    long = {
        b: m
        for b, m in families.items()
        if len(m) >= shortest and max(m) - min(m) + 1 == len(m)
        and len({(sites[n].kind, sites[n].plates) for n in m.values()}) == 1
    }  # fmt: skip
    by_end: dict[int, dict[str, dict[int, str]]] = {}
    for base, members in long.items():
        by_end.setdefault(max(members), {})[base] = members
    return [_chain(group, sites) for group in by_end.values()]


def _chain(families: dict[str, dict[int, str]], sites: dict[str, Site]) -> Chain:
    place = {name: (base, i) for base, members in families.items() for i, name in members.items()}
    lagged: dict[tuple[str, str], None] = {}
    for name, (base, i) in place.items():
        for parent in sites[name].parents:
            if parent in place and place[parent][1] < i:
                lagged[place[parent][0], base] = None
    starts = [min(m) for m in families.values()]
    return Chain(families, min(starts), max(next(iter(families.values()))), tuple(lagged))


def used_words(sites: Iterable[Site]) -> set[str]:
    """First words of all names, which indices must not repeat."""
    return {re.split(r"[_\d]", spoken(s.name))[0] for s in sites}
