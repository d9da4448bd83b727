"""Paints a laid-out plate diagram with matplotlib: nothing here decides what is shown, only how it looks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .plates_picture import (
    DOT,
    FONT,
    LABEL_SIZE,
    NAME_SIZE,
    NODE_SIZE,
    SMALL,
    SQUARE,
    Picture,
    anchor,
    arrows_across,
    text_size,
)
from .plates_views import DROPPED, KEPT, OWN, PLAIN, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SHADE, FRAME, ACCENT = "#1d2329", "#d4dade", "#8b959c", "#1f6f8b"
_LINE_SIZE, _LEADING = 12.0, 0.275
_KEY_SIZE, _KEY_LEADING, _SWATCH = 10.5, 0.26, 0.34
_TITLE_SIZE, _MARGIN, _GAP = 15, 0.2, 0.55
_PATHS: dict[str, dict[str, Any]] = {
    "": {"color": INK, "lw": 1.1},
    KEPT: {"color": ACCENT, "lw": 1.8},
    DROPPED: {"color": "#a9b2b8", "lw": 1.1, "linestyle": (0, (3, 2.5))},
    OWN: {"color": "#b5541c", "lw": 1.4, "linestyle": (0, (5, 2))},
}


class Sheet:
    """Where things stand on a figure, in inches with y pointing down.

    Parameters
    ----------
    laid
        The diagram.
    lines
        Mathtext beside it, four spaces a level of indentation.
    title
        Heading above both.
    view
        Colours, and the key under the diagram.
    """

    def __init__(self, laid: Picture, lines: Sequence[str] = (), title: str | None = None, view: View = PLAIN) -> None:
        self.laid, self.title, self.view = laid, title, view
        left, top, right, bottom = laid.extent()
        self.lines = [(line.strip(), (len(line) - len(line.lstrip())) / 4 * 0.28) for line in lines]
        wide = max((indent + text_size(text, _LINE_SIZE)[0] for text, indent in self.lines), default=0.0)
        self.text_left = right + _GAP
        self.key_top = bottom + 0.3
        key_width = max((_SWATCH + text_size(text, _KEY_SIZE)[0] for _, text in view.key), default=0.0)
        key_height = 0.2 + len(view.key) * _KEY_LEADING if view.key else 0.0
        self.middle = (top + bottom) / 2
        height = max(bottom - top, len(self.lines) * _LEADING)
        title_width = 1.15 * text_size(title, _TITLE_SIZE)[0] if title else 0.0
        self.x0 = left - _MARGIN
        self.x1 = max(self.text_left + wide if lines else right, left + title_width, left + key_width) + _MARGIN
        self.y0 = self.middle - height / 2 - _MARGIN - (0.42 if title else 0.0)
        self.y1 = max(self.middle + height / 2, bottom + key_height) + _MARGIN

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        return self.x1 - self.x0, self.y1 - self.y0

    def figure(self) -> "Figure":
        """A figure of its own that fits, and belongs to no window."""
        from matplotlib.figure import Figure

        owner = Figure(figsize=self.size, facecolor="white")
        self.paint(owner.add_axes((0.0, 0.0, 1.0, 1.0)))
        return owner

    def paint(self, ax: "Axes") -> None:
        """Into given axes, as large as fits."""
        dpi = ax.figure.figure.dpi  # type: ignore[union-attr]
        window, (width, height) = ax.get_window_extent(), self.size
        scale = min(window.width / dpi / width, window.height / dpi / height)
        ax.set_xlim(self.x0, self.x1)
        ax.set_ylim(self.y1, self.y0)
        ax.set_aspect("equal")
        ax.set_axis_off()
        _paint_plates(self.laid, ax, scale)
        _paint_nodes(self.laid, ax, scale, self.view)
        _paint_arrows(self.laid, ax, scale, self.view)
        first = self.middle - (len(self.lines) - 1) / 2 * _LEADING
        for i, (text, indent) in enumerate(self.lines):
            colour = ACCENT if text.startswith(("for ", "given ", "learned ")) else INK
            look = {"color": colour, "ha": "left", "va": "center_baseline", "gid": f"line-{i}"}
            _write(ax, self.text_left + indent, first + i * _LEADING, text, _LINE_SIZE * scale, **look)
        if self.title:
            place = (self.x0 + _MARGIN, self.y0 + _MARGIN + 0.08)
            _write(ax, *place, self.title, _TITLE_SIZE * scale, ha="left", fontweight="bold", gid="title")
        self._paint_key(ax, scale)

    def _paint_key(self, ax: "Axes", scale: float) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Ellipse

        left = self.x0 + _MARGIN
        for i, (mark, text) in enumerate(self.view.key):
            y = self.key_top + i * _KEY_LEADING
            if mark and mark in _PATHS:
                path = {"color": _PATHS[mark]["color"], "linestyle": _PATHS[mark].get("linestyle", "-")}
                ax.add_line(Line2D([left, left + 0.24], [y, y], lw=_PATHS[mark]["lw"] * scale, **path))
            elif mark:
                ax.add_patch(Ellipse((left + 0.12, y), 0.19, 0.19, fc=mark, ec=INK, lw=0.9 * scale))
            look = {"ha": "left", "va": "center_baseline", "gid": f"key-{i}"}
            _write(ax, left + (_SWATCH if mark else 0.0), y, text, _KEY_SIZE * scale, **look)


def _write(ax: "Axes", x: float, y: float, text: str, size: float, **style: Any) -> None:
    look: dict[str, Any] = {"color": INK, "ha": "center", "va": "center", "zorder": 4} | FONT | style
    ax.text(x, y, text, fontsize=size, **look)


def _paint_plates(laid: Picture, ax: "Axes", scale: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    look: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=0.1",
        "fc": "none",
        "ec": FRAME,
        "zorder": 1,
    }
    for name, (left, top, right, bottom) in laid.frames.items():
        box = FancyBboxPatch((left, top), right - left, bottom - top, lw=1.1 * scale, gid=_id("plate", name), **look)
        ax.add_patch(box)
        label = laid.plate_labels[name]
        behind = {"fc": "white", "ec": "none", "pad": 0.6} if arrows_across(laid, label.box) else None
        middle = (label.box[1] + label.box[3]) / 2
        style: dict[str, Any] = {
            "color": ACCENT,
            "ha": "left",
            "va": "center_baseline",
            "zorder": 2.5,
            "bbox": behind,
            "gid": _id("size", name),
        }
        _write(ax, label.box[0], middle, label.text, LABEL_SIZE * scale, **style)


def _paint_nodes(laid: Picture, ax: "Axes", scale: float, view: View) -> None:
    from matplotlib.patches import Ellipse, Rectangle

    for name, node in laid.graph.nodes.items():
        (x, y), (hw, hh) = laid.centres[name], laid.halves[name]
        if node.kind in SMALL:
            mark: Any = Ellipse((x, y), 2 * DOT, 2 * DOT, fc=INK, ec="none", zorder=3, gid=_id("node", name))
            if node.kind == "factor":
                mark = Rectangle((x - SQUARE, y - SQUARE), 2 * SQUARE, 2 * SQUARE, fc=INK, ec="none", zorder=3)
                mark.set_gid(_id("node", name))
            ax.add_patch(mark)
            left, top, right, bottom = laid.node_labels[name].box
            _write(
                ax, (left + right) / 2, (top + bottom) / 2, laid.texts[name], NAME_SIZE * scale, gid=_id("name", name)
            )
            continue
        if node.kind != "dots":
            line = (0, (3.5, 2.5)) if node.kind == "deterministic" else "-"
            fill = view.fills.get(node.origin or name, SHADE if node.kind == "observed" else "white")
            outline: dict[str, Any] = {"ec": INK, "lw": 1.2 * scale, "ls": line, "zorder": 3, "gid": _id("node", name)}
            ax.add_patch(Ellipse((x, y), 2 * hw, 2 * hh, fc=fill, **outline))
        _write(ax, x, y, laid.texts[name], NODE_SIZE * scale, gid=_id("text", name))


def _paint_arrows(laid: Picture, ax: "Axes", scale: float, view: View) -> None:
    from matplotlib.patches import FancyArrowPatch

    look: dict[str, Any] = {"shrinkA": 0, "shrinkB": 0, "joinstyle": "miter", "zorder": 2, "mutation_scale": 13 * scale}

    def draw(parent: str, child: str, mark: str) -> None:
        # An arrow of the guide's own keeps to the side, where one of the story's may run already.
        bend = 0.32 if mark == OWN else 0.0
        start = anchor(laid, parent, _aside(laid, parent, child, bend))
        end = anchor(laid, child, _aside(laid, child, parent, -bend))
        factor = laid.graph.nodes[child].kind == "factor"
        path = _PATHS[mark] | {"lw": _PATHS[mark]["lw"] * scale, "connectionstyle": f"arc3,rad={-bend}"}
        style = "-" if factor else "-|>,head_length=0.45,head_width=0.2"
        line = path.pop("linestyle", "-")
        arrow = FancyArrowPatch(
            start, end, arrowstyle=style, ls=line, gid=_id("edge", f"{parent}>{child}"), **look, **path
        )
        ax.add_patch(arrow)

    site = {name: node.origin or name for name, node in laid.graph.nodes.items()}
    for parent, child in laid.graph.edges:
        draw(parent, child, view.edges.get((site[parent], site[child]), ""))
    for parent, child in view.own:
        for a, b in laid.graph.copies(parent, child):
            draw(a, b, OWN)


def _aside(laid: Picture, name: str, other: str, bend: float) -> tuple[float, float]:
    """Where a bent arrow seems to go when it leaves `name`."""
    (x, y), (u, v) = laid.centres[name], laid.centres[other]
    middle = ((x + u) / 2, (y + v) / 2)
    return middle[0] + bend * (v - y), middle[1] - bend * (u - x)


def _id(kind: str, name: str) -> str:
    """What an element is called in SVG."""
    return f"{kind}-" + "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in name)
