"""Figures as SVG for light and for dark pages."""

import io
import re
from pathlib import Path
from typing import Any

# Colours of the plate diagrams, and what they become on a dark page.
_DARK = {
    "#1d2329": "#e6e9eb",
    "#d4dade": "#46535c",
    "#8b959c": "#77838b",
    "#1f6f8b": "#7fbcd2",
    "#ffffff": "#131416",
    # fills of the views, dark enough for light letters
    "#fbe8c8": "#6b5524",
    "#d3e8f0": "#26505f",
    "#dcedc8": "#42572a",
    "#c5e3da": "#255248",
    "#e0d5f0": "#4b3a6b",
    "#f6dbe2": "#6a3546",
    "#a9b2b8": "#5d676d",
    "#b5541c": "#f0a868",
    "#000000": "#e6e9eb",
}


def svg(figure: Any) -> str:
    """A figure as SVG without header; letters are outlines, so that every reader sees the same."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "site", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.S)
    return text[text.index("<svg") :]


def save(figure: Any, folder: Path, name: str) -> None:
    """`name`.svg and `name`-dark.svg; outlines without a colour of their own take the page's ink."""
    text = svg(figure)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    dark = re.sub("|".join(_DARK), lambda match: _DARK[match[0]], text)
    dark = dark.replace("<svg ", '<svg fill="#e6e9eb" ', 1)
    (folder / f"{name}-dark.svg").write_text(dark, encoding="utf-8")


def picture(path: str, alt: str, style: str = "") -> str:
    """HTML of a figure in both palettes; `path` without its ending."""
    kinds = (("only-light", ""), ("only-dark", "-dark"))
    return "".join(
        f'<img class="{kind} {style}" loading="lazy" src="{path}{ending}.svg" alt="{alt}">' for kind, ending in kinds
    )
