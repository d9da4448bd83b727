"""Plate diagrams: the story as a picture, in pure matplotlib, with the story as mathematics beside it.

Latent sites are white, observed ones shaded, deterministic ones dashed; parameters, networks and arrays the
story was given are dots, factors small squares. A plate is a rounded box with its name and size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .plates_fold import fold_loops
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
    picture,
    text_size,
)
from .provenance import relations
from .story_text import story_lines, story_text, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_plates", "story_lines", "story_text"]

INK, SHADE, FRAME, ACCENT = "#1d2329", "#d4dade", "#8b959c", "#1f6f8b"
_LINE_SIZE, _LEADING = 12.0, 0.275


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


def _paint(laid: Picture, lines: Sequence[str], ax: "Axes | None", title: str | None) -> "Figure":
    from matplotlib.figure import Figure

    left, top, right, bottom = laid.extent()
    margin, gap = 0.2, 0.55
    indents = [(len(line) - len(line.lstrip())) / 4 * 0.28 for line in lines]
    widths = [i + text_size(line.strip(), _LINE_SIZE)[0] for i, line in zip(indents, lines, strict=True)]
    text_width = gap + max(widths) if lines else 0.0
    head = 0.42 if title else 0.0
    middle = (top + bottom) / 2
    height = max(bottom - top, len(lines) * _LEADING)
    title_width = 1.15 * text_size(title, 15)[0] if title else 0.0
    x0, x1 = left - margin, max(right + text_width + margin, left + title_width + margin)
    y0, y1 = middle - height / 2 - margin - head, middle + height / 2 + margin
    if ax is None:
        owner = Figure(figsize=(x1 - x0, y1 - y0), facecolor="white")
        ax = owner.add_axes((0.0, 0.0, 1.0, 1.0))
        scale = 1.0
    else:
        owner = ax.figure.figure  # type: ignore[assignment]
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
        _write(
            ax,
            right + gap + indent,
            first + i * _LEADING,
            line.strip(),
            _LINE_SIZE * scale,
            color=ACCENT if loop else INK,
            ha="left",
            va="center_baseline",
        )
    if title:
        _write(ax, x0 + margin, y0 + margin + 0.08, title, 15 * scale, ha="left", fontweight="bold")
    return owner


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
        ax.add_patch(FancyBboxPatch((left, top), right - left, bottom - top, lw=1.1 * scale, **look))
        label = laid.plate_labels[name]
        behind = {"fc": "white", "ec": "none", "pad": 0.6} if arrows_across(laid, label.box) else None
        middle = (label.box[1] + label.box[3]) / 2
        style: dict[str, Any] = {
            "color": ACCENT,
            "ha": "left",
            "va": "center_baseline",
            "zorder": 2.5,
            "bbox": behind,
        }
        _write(ax, label.box[0], middle, label.text, LABEL_SIZE * scale, **style)


def _paint_nodes(laid: Picture, ax: "Axes", scale: float) -> None:
    from matplotlib.patches import Ellipse, Rectangle

    for name, node in laid.graph.nodes.items():
        (x, y), (hw, hh) = laid.centres[name], laid.halves[name]
        if node.kind in SMALL:
            mark: Any = Ellipse((x, y), 2 * DOT, 2 * DOT, fc=INK, ec="none", zorder=3)
            if node.kind == "factor":
                mark = Rectangle((x - SQUARE, y - SQUARE), 2 * SQUARE, 2 * SQUARE, fc=INK, ec="none", zorder=3)
            ax.add_patch(mark)
            left, top, right, bottom = laid.node_labels[name].box
            _write(ax, (left + right) / 2, (top + bottom) / 2, laid.texts[name], NAME_SIZE * scale)
            continue
        if node.kind != "dots":
            line = (0, (3.5, 2.5)) if node.kind == "deterministic" else "-"
            fill = SHADE if node.kind == "observed" else "white"
            ax.add_patch(
                Ellipse((x, y), 2 * hw, 2 * hh, fc=fill, ec=INK, lw=1.2 * scale, ls=line, zorder=3)  # type: ignore[arg-type]
            )
        _write(ax, x, y, laid.texts[name], NODE_SIZE * scale)


def _paint_arrows(laid: Picture, ax: "Axes", scale: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    look: dict[str, Any] = {"shrinkA": 0, "shrinkB": 0, "color": INK, "joinstyle": "miter", "zorder": 2}
    for parent, child in laid.graph.edges:
        start = anchor(laid, parent, laid.centres[child])
        end = anchor(laid, child, laid.centres[parent])
        factor = laid.graph.nodes[child].kind == "factor"
        style = "-" if factor else "-|>,head_length=0.45,head_width=0.2"
        size: dict[str, Any] = {"lw": 1.1 * scale, "mutation_scale": 13 * scale}
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, **size, **look))  # type: ignore[arg-type]
