"""Plate diagrams: the story as a picture, in pure matplotlib, with the story as mathematics beside it.

Latent sites are white, observed ones shaded, deterministic ones dashed; parameters, networks and arrays that the
story was given are dots, factors small squares. A plate is a rounded box with its name and size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .plates_fold import Graph, Node, fold_loops, graph
from .plates_layout import Problem, arrange, crosses, label_places
from .plates_symbols import index_letters, symbol
from .provenance import Site, relations
from .story_text import story_lines, story_text, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_plates", "picture", "story_lines", "story_text"]

INK, SHADE, FRAME, ACCENT = "#1d2329", "#d4dade", "#8b959c", "#1f6f8b"
_RADIUS, _DOT, _SQUARE = 0.27, 0.055, 0.075
_NODE_SIZE, _LABEL_SIZE, _LINE_SIZE = 14.5, 10.5, 12.0
_LEADING = 0.275
_FONT: dict[str, Any] = {"family": "STIXGeneral", "math_fontfamily": "stix"}
_SMALL = ("parameter", "module", "input", "factor")


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


def draw_plates(
    story: Any,
    *args: Any,
    ax: "Axes | None" = None,
    show_lines: bool = True,
    title: str | None = None,
    **kwargs: Any,
) -> "Figure":
    """Draw the plate diagram of a story.

    Parameters
    ----------
    story
        A Pyro program, or an object with a `model` method.
    *args, **kwargs
        Passed to the story, which runs a few times and leaves nothing behind.
    ax
        Axes to draw into; by default a figure of its own that fits the diagram and belongs to no window.
    show_lines
        Write the story as mathematics beside the diagram.
    title
        Heading.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with ``figure.savefig("story.svg")``.

    Raises
    ------
    TypeError
        `story` is no story. Exceptions of the story itself pass through unchanged.
    """
    sites = fold_loops(relations(story, *args, **kwargs))
    drawn = picture(sites)
    lines = write(sites, math_text=True) if show_lines else []
    return _paint(drawn, lines, ax, title)


def picture(sites: dict[str, Site]) -> Picture:
    """Lay out sites whose loops are folded."""
    diagram = graph(sites)
    nodes = list(diagram.nodes.values())
    letters = index_letters(diagram.plates, sites)
    texts = {n.name: _node_text(n, [letters[p].index for p in n.plates]) for n in nodes}
    captions = {p.name: f"{p.name}  ${letters[p.name].size} = {p.size}$" for p in diagram.plates.values()}
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
        light=np.array([n.kind in _SMALL for n in nodes], bool),
        plates=tuple(members[p] for p in plates),
        labels=np.array([_text_size(captions[p], _LABEL_SIZE)[0] for p in plates]),
        steps=np.array([-1 if n.step is None else n.step for n in nodes], int),
        families=np.array([-1 if n.family is None else families[n.family] for n in nodes], int),
    )
    xy, frames = arrange(problem)
    centres = {n.name: (float(xy[i, 0]), float(xy[i, 1])) for i, n in enumerate(nodes)}
    rectangles = {p: tuple(map(float, frames[i])) for i, p in enumerate(plates)}
    laid = Picture(diagram, texts, centres, halves, rectangles, {}, {})  # type: ignore[arg-type]
    for node in nodes:
        if node.kind in _SMALL:
            laid.node_labels[node.name] = _place_beside(laid, node)
    for i, name in enumerate(plates):
        places = [tuple(map(float, place[0])) for place in label_places(problem, i, frames[None])]
        laid.plate_labels[name] = _place_in_frame(laid, name, captions[name], places)
    return laid


def _along_chain(first: int | None, second: int | None) -> bool:
    return first is not None and second is not None and first != second


def _node_text(node: Node, indices: Sequence[str]) -> str:
    if node.kind == "dots":
        return r"$\cdots$"
    return f"${symbol(node.name, [''.join(indices)] if indices else [])}$"


@lru_cache(maxsize=1024)
def _text_size(text: str, size: float) -> tuple[float, float]:
    """Width and height of a line in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    box = TextPath((0, 0), text, size=size, prop=FontProperties(**_FONT)).get_extents()  # type: ignore[arg-type]
    return max(box.x1, 0.0) / 72, box.height / 72


def _half_size(node: Node, text: str) -> tuple[float, float]:
    width, _ = _text_size(text, _NODE_SIZE)
    if node.kind in _SMALL:  # the mark with its label above
        width, _ = _text_size(text, _LABEL_SIZE + 1.5)
        return max(width / 2, 0.12), 0.2
    if node.kind == "dots":
        return 0.2, _RADIUS * 0.6
    return (max(_RADIUS, width / 2 * 1.12 + 0.07), _RADIUS)


def _anchor(laid: Picture, name: str, towards: tuple[float, float]) -> tuple[float, float]:
    """The point where an arrow to or from `towards` meets the outline of a node."""
    node, (x, y), (hw, hh) = laid.graph.nodes[name], laid.centres[name], laid.halves[name]
    if node.kind in _SMALL:
        hw = hh = _SQUARE * 1.2 if node.kind == "factor" else _DOT
    dx, dy = towards[0] - x, towards[1] - y
    reach = 1 / max(np.hypot(dx / hw, dy / hh), 1e-9)
    return x + dx * reach, y + dy * reach


def _meets(box: tuple[float, float, float, float], other: Sequence[float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _arrows_across(laid: Picture, box: tuple[float, float, float, float]) -> int:
    ends = [
        (_anchor(laid, a, laid.centres[b]), _anchor(laid, b, laid.centres[a])) for a, b in laid.graph.edges
    ]
    if not ends:
        return 0
    (ax, ay), (bx, by) = np.array(ends).transpose(1, 2, 0)
    return int(crosses(ax[None], ay[None], bx[None], by[None], np.array([box])).sum())


def _place_beside(laid: Picture, node: Node) -> Label:
    """Label of a small node on the side where least is in the way."""
    text, (x, y) = laid.texts[node.name], laid.centres[node.name]
    width, height = _text_size(text, _LABEL_SIZE + 1.5)
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
        faults = _arrows_across(laid, box) + 3 * sum(_meets(box, o) for o in others) + 3 * borders
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
        faults += _arrows_across(laid, box)
        if best is None or faults < best[0]:
            best = (faults, Label(caption, box))
    assert best is not None
    return best[1]


def _paint(laid: Picture, lines: Sequence[str], ax: "Axes | None", title: str | None) -> "Figure":
    from matplotlib.figure import Figure

    left, top, right, bottom = laid.extent()
    margin, gap = 0.2, 0.55
    indents = [(len(line) - len(line.lstrip())) / 4 * 0.28 for line in lines]
    widths = [i + _text_size(line.strip(), _LINE_SIZE)[0] for i, line in zip(indents, lines, strict=True)]
    text_width = gap + max(widths) if lines else 0.0
    head = 0.42 if title else 0.0
    middle = (top + bottom) / 2
    height = max(bottom - top, len(lines) * _LEADING)
    x0, x1 = left - margin, right + text_width + margin
    y0, y1 = middle - height / 2 - margin - head, middle + height / 2 + margin
    if ax is None:
        owner = Figure(figsize=(x1 - x0, y1 - y0), facecolor="white")
        ax = owner.add_axes((0.0, 0.0, 1.0, 1.0))
        scale = 1.0
    else:
        owner = ax.get_figure(root=True)  # type: ignore[assignment]
        width, tall = (ax.get_window_extent().width, ax.get_window_extent().height)
        scale = min(width / owner.dpi / (x1 - x0), tall / owner.dpi / (y1 - y0))
    ax.set_xlim(x0, x1)
    ax.set_ylim(y1, y0)
    ax.set_aspect("equal")
    ax.set_axis_off()
    _paint_plates(laid, ax, scale)
    _paint_nodes(laid, ax, scale)
    _paint_arrows(laid, ax, scale)
    first = middle - (len(lines) - 1) / 2 * _LEADING
    for i, (line, indent) in enumerate(zip(lines, indents, strict=True)):
        loop = line.strip().startswith(("for ", "given ", "learned "))
        place = (right + gap + indent, first + i * _LEADING)
        ax.text(*place, line.strip(), fontsize=_LINE_SIZE * scale, color=ACCENT if loop else INK,
                ha="left", va="center_baseline", **_FONT)
    if title:
        ax.text(x0 + margin, y0 + margin + 0.08, title, fontsize=15 * scale, color=INK, ha="left", va="center",
                fontweight="bold", **_FONT)
    return owner


def _paint_plates(laid: Picture, ax: "Axes", scale: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    for name, (left, top, right, bottom) in laid.frames.items():
        style = "round,pad=0,rounding_size=0.1"
        ax.add_patch(FancyBboxPatch((left, top), right - left, bottom - top, boxstyle=style, fc="none", ec=FRAME,
                                    lw=1.1 * scale, zorder=1))
        label = laid.plate_labels[name]
        ax.text(label.box[0], (label.box[1] + label.box[3]) / 2, label.text, fontsize=_LABEL_SIZE * scale,
                color=ACCENT, ha="left", va="center_baseline", zorder=2.5, bbox=behind, **_FONT)


def _paint_nodes(laid: Picture, ax: "Axes", scale: float) -> None:
    from matplotlib.patches import Ellipse, Rectangle

    for name, node in laid.graph.nodes.items():
        (x, y), (hw, hh) = laid.centres[name], laid.halves[name]
        if node.kind in _SMALL:
            if node.kind == "factor":
                ax.add_patch(
                    Rectangle(
                        (x - _SQUARE, y - _SQUARE), 2 * _SQUARE, 2 * _SQUARE, fc=INK, ec="none", zorder=3
                    )
                )
            else:
                ax.add_patch(Ellipse((x, y), 2 * _DOT, 2 * _DOT, fc=INK, ec="none", zorder=3))
            label = laid.node_labels[name]
            middle = ((label.box[0] + label.box[2]) / 2, (label.box[1] + label.box[3]) / 2)
            ax.text(*middle, label.text, fontsize=(_LABEL_SIZE + 1.5) * scale, color=INK, ha="center", va="center",
                    zorder=4, **_FONT)
            continue
        if node.kind != "dots":
            ax.add_patch(Ellipse((x, y), 2 * hw, 2 * hh, fc=SHADE if node.kind == "observed" else "white", ec=INK,
                                 lw=1.2 * scale, ls=(0, (3.5, 2.5)) if node.kind == "deterministic" else "-", zorder=3))
        ax.text(x, y, laid.texts[name], fontsize=_NODE_SIZE * scale, color=INK, ha="center", va="center", zorder=4,
                **_FONT)


def _paint_arrows(laid: Picture, ax: "Axes", scale: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    for parent, child in laid.graph.edges:
        start = _anchor(laid, parent, laid.centres[child])
        end = _anchor(laid, child, laid.centres[parent])
        plain = laid.graph.nodes[child].kind == "factor"
        style = "-" if plain else "-|>,head_length=0.45,head_width=0.2"
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13 * scale, shrinkA=0, shrinkB=0,
                                     lw=1.1 * scale, color=INK, joinstyle="miter", zorder=2))
