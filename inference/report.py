"""A comparison as one HTML file that needs nothing from elsewhere: figures inline, mathematics as MathML."""

from __future__ import annotations

import inspect
import io
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from .checkpoint import fingerprint, write_atomically

if TYPE_CHECKING:
    from .compare import Comparison


def write_report(comparison: Comparison, path: str | Path) -> Path:
    """See `Comparison.report`.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it first")
    environment = Environment(loader=PackageLoader("inference"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(**content(comparison))
    write_atomically(path, page.encode("utf-8"))
    return path


def content(comparison: Comparison) -> dict[str, Any]:
    """Everything that the page shows."""
    from markupsafe import Markup

    from .compare import cell
    from .plates import draw_plates
    from .story_math import story_mathml

    first = next(iter(comparison.posteriors.values()))
    problem = first.problem
    table = comparison.table.map(cell).T.drop(columns=list(comparison.refused), errors="ignore")
    told, end, density = story_mathml(problem.model, **problem.kwargs).partition("</math>")
    return {
        "title": story_name(comparison.story),
        "settings": repr(comparison.story) if hasattr(comparison.story, "model") else "",
        "verdict": comparison.verdict,
        "notes": comparison.notes,
        "plate": Markup(svg(draw_plates(problem.model, show_lines=False, **problem.kwargs), "plate")),
        "mathematics": Markup(told + end),
        "density": Markup(density),
        "source": source(comparison.story),
        "structure": str(comparison.structure),
        "columns": list(table.columns),
        "rows": [(name, list(row)) for name, row in zip(table.index, table.to_numpy())],
        "pairwise": [
            (name, [cell(v) for v in row])
            for name, row in zip(comparison.pairwise.index, comparison.pairwise.to_numpy())
        ],
        "refused": comparison.refused,
        "figure": Markup(svg(comparison.plot(), "methods")),
        "methods": [method_content(f"m{i}", name, p) for i, (name, p) in enumerate(comparison.posteriors.items())],
        "card": reproducibility(comparison),
    }


def story_name(story: Any) -> str:
    """Class or function name."""
    return type(story).__name__ if hasattr(story, "model") else getattr(story, "__name__", type(story).__name__)


def method_content(key: str, name: str, posterior: Any) -> dict[str, Any]:
    """One method's section."""
    from markupsafe import Markup

    summary = posterior.summary()
    table = summary.table.map(lambda v: f"{v:.4g}")
    return {
        "name": name,
        "options": repr(posterior.method),
        "why": posterior.why(),
        "warnings": posterior.warnings,
        "heading": summary.heading,
        "columns": list(table.columns),
        "rows": [(index, list(row)) for index, row in zip(table.index, table.to_numpy())],
        "treatment": Markup(svg(treatment, f"{key}-plate")) if (treatment := treated(posterior)) is not None else "",
        "history": Markup(svg(posterior.plot_history(), f"{key}-history")),
    }


def treated(posterior: Any) -> Any:
    """What the method did with each latent, as a diagram; None for somebody's own method, whose ways are unknown."""
    from .methods import METHODS
    from .plates import draw_treatment

    return draw_treatment(posterior) if posterior.method.name in METHODS else None


def source(story: Any) -> str:
    """The program, where Python knows its text."""
    try:
        return inspect.getsource(type(story) if hasattr(story, "model") else story)
    except (OSError, TypeError):
        return ""


def svg(figure: Any, prefix: str) -> str:
    """A figure as an inline SVG element without header; `prefix` keeps its ids apart from those of other figures."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.S)
    # Matplotlib hashes a clipping box to its last bit, which rounding in the layout changes: names by order do not.
    hashed = dict.fromkeys(re.findall(r'\bid="([a-z][0-9a-f]{10})"', text))
    order = {name: f"{name[0]}{i}" for i, name in enumerate(hashed)}
    text = re.sub(r'(?<=[#"])[a-z][0-9a-f]{10}(?=[")])', lambda m: order.get(m[0], m[0]), text)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text[text.index("<svg") :])


def reproducibility(comparison: Comparison) -> dict[str, str]:
    """What it takes to get the same numbers again."""
    problem = next(iter(comparison.posteriors.values())).problem
    tensors = {n: v.cpu() for n, v in problem.kwargs.items() if isinstance(v, Tensor)}
    methods = ", ".join(repr(p.method) for p in comparison.posteriors.values())
    card = {
        "methods": methods,
        "split": comparison.notes[0] if comparison.notes else "none",
        "seed": str(comparison.seed),
        "training data": ", ".join(f"{n} {tuple(v.shape)}" for n, v in tensors.items()),
        "SHA-256 of the training data": fingerprint(tensors),
        "dtype, device": f"{problem.dtype}, {problem.device}",
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        "PyTorch": str(torch.__version__),
        "Pyro": pyro.__version__,
    }
    for name in ("arviz", "arviz-stats", "pyro-model-zoo"):
        try:
            card[name] = version(name)
        except PackageNotFoundError:
            card[name] = "not installed as a distribution"
    return card
