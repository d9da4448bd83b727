"""The reference: every public name of both packages, under headings that say what it is for."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from .gallery import chapters, heading

_PAGES = {
    "asking": (
        "Asking",
        "What turns a story and data into an answer.",
        ("fit", "compare", "choose", "inspect", "simulate", "check", "load"),
    ),
    "methods": (
        "Methods",
        "Each is a frozen dataclass of its options: `fit(story, data, EM(restarts=10))`.",
        ("Exact", "EM", "NUTS", "HMC", "SVI", "Gibbs", "Verdict"),
    ),
    "answers": (
        "Answers",
        "What comes back.",
        ("Posterior", "Comparison", "CrossCheck", "Calibration", "Choice", "Structure", "Site"),
    ),
    "pictures": (
        "Pictures and mathematics",
        "The story as a diagram, as formulas and as text, all read off the running program.",
        (
            "draw_plates", "draw_sheet", "story_text", "story_lines", "story_density", "story_latex", "story_mathml",
            "to_graphviz", "to_mermaid",
        ),
    ),
    "errors": (
        "Errors and notes",
        "What a fault is called. Faults in what you gave are `ValueError` and `TypeError`.",
        ("NoMethodError", "DivergenceError", "CheckpointError", "DataNotice"),
    ),
}  # fmt: skip


_INNER = ("codegen", "methods", "native")  # parts of the engine; the methods themselves stand on a page of their own


def write(source: Path) -> None:
    """Pages under `source`/api."""
    folder = source / "api"
    folder.mkdir(parents=True)
    inference = import_module("inference")
    grouped = {name for _, _, names in _PAGES.values() for name in names}
    more = [n for n in inference.__all__ if n not in grouped and not inspect.ismodule(getattr(inference, n))]
    pages = dict(_PAGES)
    if more:
        pages["more"] = ("More", "Further public names.", tuple(more))
    for name, (title, about, members) in pages.items():
        text = [*heading(title, "="), about, ""]
        for member in members:
            text += entry("inference", member)
        (folder / f"{name}.rst").write_text("\n".join(text), encoding="utf-8")
    others = [*packages(folder), *stories(folder), *data(folder)]
    (folder / "index.rst").write_text(index([*pages, *others]), encoding="utf-8")


def index(names: list[str]) -> str:
    """The list of pages."""
    lines = heading("Reference", "=")
    lines += ["Every public name, from its own docstring.", "", ".. toctree::", "   :maxdepth: 2", ""]
    return "\n".join([*lines, *(f"   {name}" for name in names), ""])


def entry(module: str, name: str) -> list[str]:
    """One name, with what its object needs."""
    found: Any = getattr(import_module(module), name)
    kind = "autofunction"
    options: list[str] = []
    if inspect.isclass(found):
        kind = "autoexception" if issubclass(found, BaseException) else "autoclass"
        options = [] if kind == "autoexception" else ["   :members:", "   :no-undoc-members:"]
    return [*heading(name, "-"), f".. {kind}:: {module}.{name}", *options, ""]


def packages(folder: Path) -> list[str]:
    """Public subpackages of `inference` that list their names."""
    written = []
    for path in sorted(Path(import_module("inference").__path__[0]).glob("*/__init__.py")):
        name = path.parent.name
        module = import_module(f"inference.{name}")
        if name in _INNER or not getattr(module, "__all__", None):
            continue
        text = [*heading(f"inference.{name}", "="), (module.__doc__ or "").strip(), ""]
        for member in module.__all__:
            if not inspect.ismodule(getattr(module, member)):
                text += entry(f"inference.{name}", member)
        (folder / f"{name}.rst").write_text("\n".join(text), encoding="utf-8")
        written.append(name)
    return written


def stories(folder: Path) -> list[str]:
    """Every story's class, chapter by chapter; its page in the gallery tells the story itself."""
    text = [
        *heading("Stories", "="),
        "Settings and methods of the classes; :doc:`/stories/index` tells the stories.",
        "",
    ]
    for chapter, entries in chapters().items():
        text += heading(chapter.capitalize(), "-")
        for one in entries:
            module, _, name = one.path.partition(":")
            members = ", ".join(m for m in ("model", "guide", "example") if hasattr(one.story, m))
            text += [f".. autoclass:: {module}.{name}", f"   :members: {members}", ""]
    (folder / "stories.rst").write_text("\n".join(text), encoding="utf-8")
    return ["stories"]


def data(folder: Path) -> list[str]:
    """What `zoo` holds besides stories."""
    zoo = import_module("zoo")
    told = {one.path.partition(":")[2] for entries in chapters().values() for one in entries}
    text = heading("Data and catalog", "=")
    for name in zoo.__all__:
        if name not in told and not inspect.ismodule(getattr(zoo, name)):
            text += entry("zoo", name)
    (folder / "data.rst").write_text("\n".join(text), encoding="utf-8")
    return ["data"]
