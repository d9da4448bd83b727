"""A plate diagram in inches: sizes of texts, places of nodes, plates and labels; nothing is painted yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .plates_cost import STEP, Problem, crosses, label_places
from .plates_graph import Graph, Node, graph, plate_letters
from .plates_layout import arrange
from .plates_reading import Site
from .plates_symbols import symbol, upright

RADIUS, DOT, SQUARE = 0.27, 0.055, 0.075
NODE_SIZE, NAME_SIZE, LABEL_SIZE = 14.5, 12.0, 10.5
FONT: dict[str, Any] = {"family": "STIXGeneral", "math_fontfamily": "stix"}
SMALL = ("parameter", "module", "input", "factor")


@dataclass(frozen=True)
class Label:
    """Text with the rectangle it fills: left, top, right, bottom in inches, y pointing down."""

    text: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """A laid-out diagram, all in inches with y pointing down.

    Attributes
    ----------
    centres, halves
        Centre and half width and height of each node.
    frames
        Rectangle of each plate: left, top, right, bottom.
    plate_labels, node_labels
        Labels of plates, and of nodes that are too small to hold theirs.
    """

    graph: Graph
    texts: dict[str, str]
    centres: dict[str, tuple[float, float]]
    halves: dict[str, tuple[float, float]]
    frames: dict[str, tuple[float, float, float, float]]
    plate_labels: dict[str, Label]
    node_labels: dict[str, Label]

    def extent(self) -> tuple[float, float, float, float]:
        """The rectangle around everything."""
        rectangles = [(x - w, y - h, x + w, y + h) for (x, y), (w, h) in self._spots()]
        rectangles += [*self.frames.values(), *(label.box for label in self.node_labels.values())]
        corners = np.array(rectangles or [(0.0, 0.0, 0.5, 0.5)])
        return (*corners[:, :2].min(0), *corners[:, 2:].max(0))

    def _spots(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        return [(self.centres[n], self.halves[n]) for n in self.centres]


def picture(sites: dict[str, Site]) -> Picture:
    """Lay out sites whose loops are folded."""
    diagram = graph(sites)
    nodes = list(diagram.nodes.values())
    letters = plate_letters(diagram, sites)
    texts = {n.name: _node_text(n, [letters[p].index for p in n.plates]) for n in nodes}
    captions = {p.name: p.caption(letters[p.name].size, math_text=True) for p in diagram.plates.values()}
    halves = {n.name: _half_size(n, texts[n.name]) for n in nodes}
    order = {n.name: i for i, n in enumerate(nodes)}
    members = {p: frozenset(order[n.name] for n in nodes if p in n.plates) for p in diagram.plates}
    members = {p: m for p, m in members.items() if m}
    depth = {p: np.mean([n.plates.index(p) for n in nodes if p in n.plates]) for p in members}
    plates = sorted(members, key=lambda p: (-len(members[p]), depth[p], list(members).index(p)))
    families = {f: i for i, f in enumerate(dict.fromkeys(n.family for n in nodes if n.family is not None))}
    steps = {n.name: n.step for n in nodes}
    problem = Problem(
        half=np.array([halves[n.name] for n in nodes]).reshape(-1, 2),
        edges=np.array([(order[a], order[b]) for a, b in diagram.edges], int).reshape(-1, 2),
        chained=np.array([_along_chain(steps[a], steps[b]) for a, b in diagram.edges], bool),
        loose=np.array([diagram.nodes[b].kind == "factor" for _, b in diagram.edges], bool),
        light=np.array([n.kind in SMALL for n in nodes], bool),
        plates=tuple(members[p] for p in plates),
        labels=np.array([text_size(captions[p], LABEL_SIZE)[0] for p in plates]),
        steps=np.array([-1 if n.step is None else n.step for n in nodes], int),
        families=np.array([-1 if n.family is None else families[n.family] for n in nodes], int),
        pitch=_pitch(diagram, captions),
    )
    xy, frames = arrange(problem)
    centres = {n.name: (float(xy[i, 0]), float(xy[i, 1])) for i, n in enumerate(nodes)}
    rectangles = {p: tuple(map(float, frames[i])) for i, p in enumerate(plates)}
    laid = Picture(diagram, texts, centres, halves, rectangles, {}, {})  # type: ignore[arg-type]
    for node in nodes:
        if node.kind in SMALL:
            laid.node_labels[node.name] = _place_beside(laid, node)
    for i, name in enumerate(plates):
        places = [tuple(map(float, place[0])) for place in label_places(problem, i, frames[None])]
        laid.plate_labels[name] = _place_in_frame(laid, name, captions[name], places)
    return laid


def _pitch(diagram: Graph, captions: dict[str, str]) -> int:
    """How far the steps of a chain stand apart, in steps of the grid: parts of a plate need room for their labels."""
    wide = max(
        (text_size(captions[p.name], LABEL_SIZE)[0] + 0.35 for p in diagram.plates.values() if p.part), default=0
    )
    return max(2, int(np.ceil(wide / STEP)))


def _along_chain(first: int | None, second: int | None) -> bool:
    return first is not None and second is not None and first != second


def _node_text(node: Node, indices: Sequence[str]) -> str:
    if node.kind == "dots":
        return r"$\cdots$"
    if node.kind == "module":
        return f"${upright(node.name)}$"
    return f"${symbol(node.name, [''.join(indices)] if indices else [])}$"


@lru_cache(maxsize=1024)
def text_size(text: str, size: float) -> tuple[float, float]:
    """Width and height of a line in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    box = TextPath((0, 0), text, size=size, prop=FontProperties(**FONT)).get_extents()  # type: ignore[arg-type]
    return max(box.x1, 0.0) / 72, box.height / 72


def _half_size(node: Node, text: str) -> tuple[float, float]:
    width, _ = text_size(text, NODE_SIZE)
    if node.kind in SMALL:  # the mark with its label above
        width, _ = text_size(text, NAME_SIZE)
        return max(width / 2, 0.12), 0.2
    if node.kind == "dots":
        return 0.2, RADIUS * 0.6
    return (max(RADIUS, width / 2 * 1.12 + 0.07), RADIUS)


def anchor(laid: Picture, name: str, towards: tuple[float, float]) -> tuple[float, float]:
    """The point where an arrow to or from `towards` meets the outline of a node."""
    node, (x, y), (hw, hh) = laid.graph.nodes[name], laid.centres[name], laid.halves[name]
    if node.kind in SMALL:
        hw = hh = SQUARE * 1.2 if node.kind == "factor" else DOT
    dx, dy = towards[0] - x, towards[1] - y
    reach = 1 / max(np.hypot(dx / hw, dy / hh), 1e-9)
    return x + dx * reach, y + dy * reach


def _meets(box: tuple[float, float, float, float], other: Sequence[float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def arrows_across(laid: Picture, box: tuple[float, float, float, float]) -> int:
    """How many arrows run through a box (left, bottom, right, top)."""
    ends = [(anchor(laid, a, laid.centres[b]), anchor(laid, b, laid.centres[a])) for a, b in laid.graph.edges]
    if not ends:
        return 0
    (ax, ay), (bx, by) = np.array(ends).transpose(1, 2, 0)
    return int(crosses(ax[None], ay[None], bx[None], by[None], np.array([box])).sum())


def _place_beside(laid: Picture, node: Node) -> Label:
    """Label of a small node on the side where least is in the way."""
    text, (x, y) = laid.texts[node.name], laid.centres[node.name]
    width, height = text_size(text, NAME_SIZE)
    height, gap = max(height, 0.12), 0.1
    sides = ((-width / 2, -gap - height), (-width / 2, gap), (-gap - width, -height / 2), (gap, -height / 2))
    others = [
        (cx - w, cy - h, cx + w, cy + h)
        for n, ((cx, cy), (w, h)) in zip(laid.centres, laid._spots(), strict=True)
        if n != node.name
    ]
    others += [label.box for label in laid.node_labels.values()]
    best: tuple[int, Label] | None = None
    for left, top in sides:
        box = (x + left, y + top, x + left + width, y + top + height)
        borders = sum(_meets(box, f) and not _inside(box, f) for f in laid.frames.values())
        faults = arrows_across(laid, box) + 3 * sum(_meets(box, o) for o in others) + 3 * borders
        if best is None or faults < best[0]:
            best = (faults, Label(text, box))
    assert best is not None
    return best[1]


def _inside(box: Sequence[float], frame: Sequence[float]) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _place_in_frame(laid: Picture, name: str, caption: str, places: Sequence[tuple[float, ...]]) -> Label:
    """Name and size of a plate in its strip, to the right if nothing is in the way."""
    best: tuple[int, Label] | None = None
    others = [f for p, f in laid.frames.items() if p != name]
    for left, top, right, bottom in places:
        box = (left, top + 0.04, right, bottom - 0.04)
        faults = 2 * sum(_meets(box, f) and not _inside(laid.frames[name], f) for f in others)
        faults += arrows_across(laid, box)
        if best is None or faults < best[0]:
            best = (faults, Label(caption, box))
    assert best is not None
    return best[1]
