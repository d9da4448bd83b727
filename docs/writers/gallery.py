"""The gallery of stories, and a page for each: picture, mathematics, structure, methods, commands, source."""

import ast
import html
import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from inference import Structure, choose, draw_plates, inspect, story_latex, story_mathml
from zoo import GMM, load
from zoo.catalog import Entry, catalog

from .pictures import picture, save

_CHAPTERS = {
    "basics": "Counting: boxes, cells, naive Bayes",
    "mixtures": "Mixtures: every row picks a component",
    "factors": "Factors: a few hidden numbers explain many columns",
    "topics": "Topics: documents that mix word distributions",
    "sequences": "Sequences: a hidden state moves on",
}


def chapters() -> dict[str, list[Entry]]:
    """Entries of the catalog by chapter, in its order."""
    found: dict[str, list[Entry]] = {}
    for entry in catalog():
        found.setdefault(entry.chapter, []).append(entry)
    return found


def write(source: Path, root: Path) -> None:
    """Pages under `source`/stories; `root` holds the packages."""
    folder = source / "stories"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in catalog():
        story, data = entry.example()
        name = entry.name.lower()
        save(draw_plates(story, show_lines=False, **data), source / "static" / "plates", name)
        (folder / f"{name}.rst").write_text(page(entry, source, root), encoding="utf-8")
    (folder / "index.rst").write_text(index(), encoding="utf-8")
    irises = load("iris").x
    hero = draw_plates(GMM(num_components=3), irises)
    save(hero, source / "static" / "plates", "hero")


def heading(text: str, mark: str) -> list[str]:
    """A title in reStructuredText."""
    return [text, mark * len(text), ""]


def raw(text: str) -> list[str]:
    """HTML as it is."""
    return [".. raw:: html", "", indent(text, "   "), ""]


def block(language: str, text: str) -> list[str]:
    """Code or what a command prints."""
    return [f".. code-block:: {language}", "", indent(text.rstrip("\n"), "   "), ""]


def index() -> str:
    """All stories as cards."""
    lines = heading("Stories", "=")
    lines += [
        "Every story is one file that reads like a slide. A picture leads to its page: the story as mathematics, what",
        "inference reads off it, which methods answer it, and the source.",
        "",
    ]
    for chapter, entries in chapters().items():
        lines += heading(_CHAPTERS.get(chapter, chapter.capitalize()), "-")
        cards = "\n".join(card(entry) for entry in entries)
        lines += raw(f'<div class="gallery">\n{cards}\n</div>')
    lines += [".. toctree::", "   :hidden:", "", *(f"   {e.name.lower()}" for e in catalog()), ""]
    return "\n".join(lines)


def card(entry: Entry) -> str:
    """One story in the gallery."""
    name = entry.name.lower()
    image = picture(f"../_static/plates/{name}", f"Plate diagram of {entry.name}")
    text = html.escape(entry.description)
    return (
        f'<a class="card" href="{name}.html"><span class="thumb">{image}</span>'
        f"<strong>{entry.name}</strong><span>{text}</span></a>"
    )


def page(entry: Entry, source: Path, root: Path) -> str:
    """Everything about one story."""
    story, data = entry.example()
    name = entry.name.lower()
    module = Path(*entry.path.partition(":")[0].split(".")).with_suffix(".py")
    docstring = __import__(entry.path.partition(":")[0], fromlist=["_"]).__doc__ or ""
    structure = inspect(story, data)
    image = picture(f"../_static/plates/{name}", f"Plate diagram of {entry.name}")
    told, end, density = story_mathml(story, **data).partition("</math>")
    lines = [
        *heading(entry.name, "="),
        *raw(f'<div class="plate-and-maths"><figure>{image}</figure><div class="maths">{told}{end}</div></div>'),
        *raw(f'<div class="maths density">{density}</div>'),
        *docstring.strip().splitlines(),
        "",
        *heading("What inference reads off it", "-"),
        f"On the story's own example, ``{story!r}``:",
        "",
        *block("text", str(structure)),
        *heading("Which methods, and why", "-"),
        *block("text", str(choose(structure))),
        "What each does with every latent, and what the story's guide keeps of the dependencies where it has one:",
        "",
        *raw(views(entry.name, story, data, structure, source / "static" / "plates")),
        *heading("For a paper", "-"),
        f"What ``story_latex`` writes, or ``zoo show {entry.name} --latex``:",
        "",
        *block("latex", story_latex(story, **data)),
        *heading("From the shell", "-"),
        *block("console", f"$ zoo show {entry.name} --plate {name}.svg\n$ zoo fit {entry.name} --seed 0"),
        *heading("The source", "-"),
        f".. literalinclude:: {os.path.relpath(root / module, source / 'stories')}",
        "   :language: python",
        f"   :lines: {first_line(root / module)}-",
        "",
    ]
    return "\n".join(lines)


def first_line(module: Path) -> int:
    """Where the code begins: after the docstring, which the page has shown already."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return next(node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))


def views(name: str, story: Any, data: Mapping[str, Any], structure: Structure, folder: Path) -> str:
    """Small diagrams side by side: scopes, the methods that are admissible, the guide."""
    admissible = [m for m, verdict in choose(structure).verdicts.items() if verdict.applies and m != "hmc"]
    shown = ["scope", *admissible, *(["guide"] if getattr(story, "guide", None) else [])]
    cards = []
    for view in shown:
        file = f"{name.lower()}-{view}"
        save(draw_plates(story, view=view, show_lines=False, **data), folder, file)
        image = picture(f"../_static/plates/{file}", f"{name}: {view}")
        cards.append(f"<figure>{image}<figcaption>{view}</figcaption></figure>")
    return f'<div class="views">{"".join(cards)}</div>'
