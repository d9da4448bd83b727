"""What a diagram shows: nodes, arrows and plates; of a chain, two steps and the last one as columns, with dots between."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from .plates_fold import find_chains
from .plates_reading import Plate, Site
from .plates_symbols import Letters, index_letters


@dataclass(frozen=True)
class Node:
    """One thing to draw.

    Attributes
    ----------
    kind
        As `Site.kind`, or "dots" for the steps of a chain that are left out.
    plates
        Names of the plates around it.
    step
        Position within a chain's shown steps, None outside of one.
    family
        The chain's family, so that its steps stand in a row.
    origin
        The site that this node is one step of, "" where the node is a whole site.
    """

    name: str
    kind: str
    plates: tuple[str, ...] = ()
    step: int | None = None
    family: str | None = None
    origin: str = ""


@dataclass(frozen=True)
class Graph:
    """What a diagram shows: nodes, arrows, plates with sizes."""

    nodes: dict[str, Node]
    edges: tuple[tuple[str, str], ...]
    plates: dict[str, Plate]

    def copies(self, parent: str, child: str) -> list[tuple[str, str]]:
        """The nodes that stand for a pair of sites: those of one step, where both were taken apart."""
        ends = [[n for n in self.nodes.values() if name == (n.origin or n.name)] for name in (parent, child)]
        return [(a.name, b.name) for a in ends[0] for b in ends[1] if not (a.origin and b.origin) or a.step == b.step]


def graph(sites: dict[str, Site]) -> Graph:
    """Nodes and arrows of folded sites; of a chain, two steps, dots and the last one."""
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str], None] = {}
    hidden: set[str] = set()
    dots: list[tuple[str, str]] = []
    steps: dict[str, tuple[int, str]] = {}
    extra: list[Node] = []
    for chain in find_chains(sites):
        shown = {chain.first: 0, chain.first + 1: 1, chain.last: 3}
        steps |= {n: (shown[i], base) for n, (base, i) in chain.place.items() if i in shown}
        hidden |= {n for n, (_, i) in chain.place.items() if i not in shown}
        linked = dict.fromkeys(b for pair in chain.lagged for b in pair) or dict.fromkeys(chain.families)
        for base in linked:
            member = sites[next(iter(chain.families[base].values()))]
            extra.append(Node(f"{base} ...", "dots", tuple(p.name for p in member.plates), 2, base))
        for parent, child in chain.lagged:
            before = chain.families[parent].get(chain.first + 1)
            dots += [(before, f"{child} ...")] if before else []
            dots += [(f"{parent} ...", chain.families[child][chain.last])]
    for name, site in sites.items():
        if name not in hidden:
            step, family = steps.get(name, (None, None))
            nodes[name] = Node(name, site.kind, tuple(p.name for p in site.plates), step, family)
            edges |= dict.fromkeys((p, name) for p in site.parents if p not in hidden)
    nodes |= {n.name: n for n in extra}
    edges |= dict.fromkeys(e for e in dots if e[0] in nodes and e[1] in nodes)
    plates = {p.name: p for s in sites.values() for p in s.plates}
    return unfold(Graph(nodes, tuple(edges), plates), sites)


def unfold(drawn: Graph, sites: Mapping[str, Site]) -> Graph:
    """The graph with each chain that is one site taken apart into steps, and the plates that see one step a row with it."""
    for name, site in sites.items():
        node = drawn.nodes.get(name)
        if site.time is not None and node is not None and node.step is None:
            drawn = _unfold_one(drawn, site)
    return drawn


def plate_letters(drawn: Graph, names: Iterable[str]) -> dict[str, Letters]:
    """Index and size of each plate of a graph; the parts of a plate share theirs."""
    whole = {p.name: p.part[0] if p.part else p.name for p in drawn.plates.values()}
    letters = index_letters(dict.fromkeys(whole.values()), names)
    return {name: letters[base] for name, base in whole.items()}


def _unfold_one(drawn: Graph, site: Site) -> Graph:
    axis = site.time
    assert axis is not None
    sizes = dict(axis.columns)
    single = {
        p for p, rows in sizes.items() if set(rows) == {1} and drawn.plates[p].size == axis.steps
    }  # no box needed
    copied = {site.name} | {n for n, o in drawn.nodes.items() if set(o.plates) & set(sizes)} - axis.told
    names = {(n, step): f"{n}_{step}" for n in copied for step in axis.shown}
    taken = set(drawn.nodes) | set(drawn.plates)
    if taken & {*names.values(), *(f"{p}_{step}" for p in sizes for step in axis.shown)}:
        return drawn
    if any(drawn.nodes[n].step is not None for n in copied):
        return drawn
    long = axis.steps > len(axis.shown)
    positions = {step: i + (long and i == len(axis.shown) - 1) for i, step in enumerate(axis.shown)}
    nodes: dict[str, Node] = {}
    for n, node in drawn.nodes.items():
        if n in axis.told and axis.columns:
            continue
        if n not in copied:
            nodes[n] = node
            continue
        for step in axis.shown:
            inside = tuple(f"{p}_{step}" if p in sizes else p for p in node.plates if p not in single)
            one = replace(node, name=names[n, step], plates=inside, step=positions[step], family=n, origin=n)
            nodes[one.name] = one
        if n == site.name and long:
            nodes[f"{n} ..."] = Node(f"{n} ...", "dots", node.plates, 2, n)
    edges: dict[tuple[str, str], None] = {}
    chain = [names[site.name, step] for step in axis.shown]
    for a, b in drawn.edges:
        for step in axis.shown:
            shapes = axis.first if step == 1 else axis.later
            known = b != site.name or a in shapes or a not in axis.first | axis.later
            if known and not {a, b} & (axis.told if axis.columns else frozenset()):
                edges[names.get((a, step), a), names.get((b, step), b)] = None
    links = [*chain[:-1], f"{site.name} ...", chain[-1]] if long else chain
    edges |= dict.fromkeys(pairwise(links))
    plates: dict[str, Plate] = {}
    for p, plate in drawn.plates.items():
        if p in single:
            continue
        for step, size in zip(axis.shown, sizes.get(p, ()), strict=False):
            plates[f"{p}_{step}"] = replace(plate, name=f"{p}_{step}", size=size, part=(p, step))
        if p not in sizes:
            plates[p] = plate
    return Graph(nodes, tuple(edges), plates)
