"""What a plate diagram may show besides the story: scopes, what a method does with each latent, what a guide keeps."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from .plates_reading import Site
from .plates_symbols import symbol

KEPT, DROPPED, OWN = "kept", "dropped", "own"
VIEWS = ("plain", "scope", "guide", "exact", "em", "gibbs", "nuts", "hmc", "svi")
GUIDES = ("mean_field", "full_rank")

_GLOBAL, _LOCAL = "#fbe8c8", "#d3e8f0"
_TREATMENTS = {
    "summed out": "#dcedc8",
    "integrated out": "#c5e3da",
    "amortised": "#e0d5f0",
    "closed form": "#dcedc8",
    "point": "#fbe8c8",
    "draws": "#d3e8f0",
    "approximated": "#f6dbe2",
}
_TOLD = {
    "summed out": "enumerated: summed out exactly",
    "integrated out": "marginalised: integrated out exactly",
    "amortised": "amortised: the guide computes its posterior from the data",
    "closed form": "posterior in closed form",
    "point": "a point, the best value",
    "draws": "draws",
    "approximated": "approximate posterior",
}


@dataclass(frozen=True)
class View:
    """Colours and arrows on top of a diagram.

    Attributes
    ----------
    fills
        Colour by site.
    edges
        `KEPT` or `DROPPED` by arrow; others are the story's alone.
    own
        Arrows that the guide adds.
    key
        (colour or kind of arrow, words) for each line of the key; no mark for a line of words.
    """

    fills: Mapping[str, str] = field(default_factory=dict)
    edges: Mapping[tuple[str, str], str] = field(default_factory=dict)
    own: tuple[tuple[str, str], ...] = ()
    key: tuple[tuple[str, str], ...] = ()


PLAIN = View()


def make_view(name: str, story: Any, sites: Mapping[str, Site], args: tuple, kwargs: Mapping[str, Any]) -> View:
    """The view called `name`; see `draw_plates`.

    Raises
    ------
    ValueError
        No view is called so, or that method cannot answer the story.
    """
    if name not in VIEWS:
        raise ValueError(f"view={name!r} is unknown; use one of {', '.join(map(repr, VIEWS))}")
    if name == "plain":
        return PLAIN
    if name == "scope":
        return scope_view(sites)
    if name == "guide":
        return guide_view(story, None, sites, args, kwargs)
    return method_view(name, story, sites, args, kwargs)


def scope_view(sites: Mapping[str, Site]) -> View:
    """What is repeated with the rows and what is shared by all of them."""
    rows = {p.name for s in sites.values() if s.kind == "observed" for p in s.plates}
    fills = {
        n: _LOCAL if rows.intersection(p.name for p in s.plates) else _GLOBAL
        for n, s in sites.items()
        if s.kind == "latent"
    }
    told = {_GLOBAL: "global: shared by all rows", _LOCAL: "local: every row has its own"}
    return View(fills, key=tuple((c, words) for c, words in told.items() if c in fills.values()))


def method_view(name: str, story: Any, sites: Mapping[str, Site], args: tuple, kwargs: Mapping[str, Any]) -> View:
    """What a method does with each latent.

    Raises
    ------
    ValueError
        The method cannot answer the story; says why.
    """
    from .methods import METHODS
    from .problem import prepare

    problem = prepare(story, dict(kwargs) if kwargs else args)
    verdict = METHODS[name].check(problem.structure)
    if not verdict.applies:
        raise ValueError(f"view={name!r}: {name} cannot answer this story: {verdict.reason}")
    return treatment_view(METHODS[name], problem, sites)


def treatment_view(method: Any, problem: Any, sites: Mapping[str, Site]) -> View:
    """What `method` does with each latent of a prepared story."""
    found = treatments(method, problem, sites)
    used = [t for t in _TREATMENTS if t in found.values()]
    return View({n: _TREATMENTS[t] for n, t in found.items()}, key=tuple((_TREATMENTS[t], _TOLD[t]) for t in used))


def treatments(method: Any, problem: Any, sites: Mapping[str, Site]) -> dict[str, str]:
    """By site, as the diagram calls it: "summed out", "integrated out", "amortised", "point", "draws", ..."""
    from .marginal import density_of_globals

    structure, name = problem.structure, method.name
    with problem.scope(0):
        joint = {b.name for b in density_of_globals(problem).blocks} if name in ("nuts", "hmc") else set()
    story_guide = name == "svi" and method.family(structure) == "story"
    guided = guide_sites(problem.guide, (), problem.kwargs) if story_guide and problem.guide is not None else {}
    found: dict[str, str] = {}
    for site in structure.latents:
        moved = name == "gibbs" or site.name in guided
        if name == "exact":
            how = "closed form"
        elif site.enumerable and not moved:
            how = "summed out"
        elif name == "em":
            how = "integrated out" if structure.linear_gaussian and site.local else "point"
        elif name in ("nuts", "hmc"):
            how = "draws" if site.name in joint else "integrated out"
        elif name == "gibbs":
            how = "draws"
        else:
            how = "amortised" if site.local and _reads_data(guided, site.name) else "approximated"
        found[site.name] = how
    return {n: found[o] for n, s in sites.items() if s.kind == "latent" and (o := _original(n, found)) is not None}


def _original(name: str, found: Mapping[str, str]) -> str | None:
    """A site of the structure that a folded loop's site stands for."""
    if name in found:
        return name
    return next((n for n in found if re.sub(r"_?\d+", "", n) == name), None)


def guide_sites(guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Site]:
    """The guide read like a story."""
    from .plates_fold import fold_loops
    from .provenance import relations

    return fold_loops(relations(guide, *args, **kwargs))


def _ancestors(sites: Mapping[str, Site], name: str, kinds: tuple[str, ...]) -> set[str]:
    """Nearest ancestors of the given kinds, with deterministic sites seen through."""
    found: set[str] = set()
    for parent in sites[name].parents if name in sites else ():
        if parent in sites and sites[parent].kind == "deterministic":
            found |= _ancestors(sites, parent, kinds)
        elif parent in sites and sites[parent].kind in kinds:
            found.add(parent)
    return found


def _reads_data(guided: Mapping[str, Site], name: str) -> bool:
    return bool(_ancestors(guided, name, ("input",)))


def guide_view(
    story: Any, guide: Callable | str | None, sites: Mapping[str, Site], args: tuple, kwargs: Mapping[str, Any]
) -> View:
    """Which dependencies of the posterior a guide keeps, which it drops, and which are its own.

    Two latents depend on each other a posteriori where one is the other's parent, or both are parents of something seen
    ("explaining away").

    Raises
    ------
    ValueError
        The story has no guide and none was given, or no guide is called so.
    """
    if isinstance(guide, str) and guide not in GUIDES:
        raise ValueError(f"guide={guide!r} is unknown; use {', '.join(map(repr, GUIDES))}, or a Pyro program")
    guide = guide or getattr(story, "guide", None)
    if guide is None:
        raise ValueError("view='guide': the story has no guide; give one: draw_plates(..., guide='mean_field')")
    if not callable(guide) and not isinstance(guide, str):
        raise TypeError(f"guide must be a Pyro program or one of {GUIDES}, got {type(guide).__name__}")
    latents = [n for n, s in sites.items() if s.kind == "latent"]
    guided: dict[str, Site] = {}
    if isinstance(guide, str):
        pairs = {frozenset(p) for p in combinations(latents, 2)} if guide == "full_rank" else set()
        absent: set[str] = set()
    else:
        guided = guide_sites(guide, args, kwargs)
        pairs = {frozenset((n, p)) for n in guided for p in _ancestors(guided, n, ("latent",)) if n != p}
        absent = set(latents) - set(guided)  # summed out given all others: exact

    def kept(a: str, b: str) -> bool:
        return frozenset((a, b)) in pairs or bool(absent & {a, b})

    edges: dict[tuple[str, str], str] = {}
    for child in latents:
        for parent in sites[child].parents:
            ends = [parent] if parent in latents else sorted(_ancestors(sites, parent, ("latent",)))
            if ends:
                edges[parent, child] = KEPT if any(kept(end, child) for end in ends) else DROPPED
    seen = [n for n, s in sites.items() if s.kind == "observed"]
    reads = [n for n in latents if n in guided and _ancestors(guided, n, ("input",))]
    own = [(p, n) for n in guided for p in _ancestors(guided, n, ("latent",)) if p in latents and n in latents]
    own = [(p, n) for p, n in own if (p, n) not in edges and (n, p) not in edges]
    own += [(s, n) for n in reads for s in seen if s in _ancestors(guided, n, ("input",))]
    lost = _explained_away(sites, latents, seen, kept)
    return View({}, edges, tuple(own), _guide_key(edges, own, lost, absent))


def _explained_away(
    sites: Mapping[str, Site], latents: list[str], seen: list[str], kept: Callable[[str, str], bool]
) -> list[tuple[str, str]]:
    """Pairs of causes of one observation that the guide holds independent."""
    lost: dict[tuple[str, str], None] = {}
    for child in seen:
        causes = [n for n in latents if n in _ancestors(sites, child, ("latent",))]
        lost |= dict.fromkeys((a, b) for a, b in combinations(causes, 2) if not kept(a, b))
    return list(lost)


def _guide_key(edges: Mapping[Any, str], own: list, lost: list[tuple[str, str]], absent: set[str]) -> tuple:
    def names(found: Any) -> str:
        return ", ".join(f"${symbol(n)}$" for n in sorted(found))

    key = []
    if KEPT in edges.values():
        key.append((KEPT, "kept by the guide"))
    if DROPPED in edges.values():
        key.append((DROPPED, "dropped by the guide"))
    if own:
        key.append((OWN, "the guide's own"))
    if absent:
        key.append(("", f"summed out exactly: {names(absent)}"))
    if lost:
        shown = ", ".join(f"${symbol(a)}$ and ${symbol(b)}$" for a, b in lost[:3])
        more = f" and {len(lost) - 3} more pairs" if len(lost) > 3 else ""
        key.append(("", f"held independent given the data: {shown}{more}"))
    return tuple(key)
