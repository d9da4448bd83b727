"""Tutorials as notebooks with their output: run when they or the packages change, several at a time."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A script keeps its figures in variables; on the page each is shown under the cell that made it.
_SETUP = """
%matplotlib inline
import matplotlib_inline.backend_inline as _inline
from IPython import display as _display, get_ipython as _shell
from matplotlib.figure import Figure as _Figure
_inline.set_matplotlib_formats("png", metadata={})
import matplotlib.pyplot as _plt
_plt.rcParams["figure.dpi"] = 110
_shown = []

def _show_new_figures(result):
    for _name, _value in list(_shell().user_ns.items()):
        if isinstance(_value, _Figure) and not _name.startswith("_") and not any(_value is old for old in _shown):
            _shown.append(_value)
            # Figures of pyplot show themselves, and so does the value of a cell.
            if _value is not result.result and not hasattr(_value, "number"):
                _display.display(_value)

_shell().events.register("post_run_cell", _show_new_figures)
"""
_LIMIT = 600  # seconds a tutorial


def write(source: Path, root: Path, kept: Path, run: bool = True) -> None:
    """One notebook a tutorial in `source`/tutorials, and their list; output is kept in `kept`."""
    import jupytext

    folder = source / "tutorials"
    folder.mkdir(parents=True)
    scripts = sorted((root / "tutorials").glob("[0-9]*.py"))
    code = fingerprint(root)

    def one(path: Path) -> None:
        if run:
            notebook = executed(path, kept / f"{path.stem}-{code(path)}.ipynb", root)
        else:
            notebook = jupytext.read(path)
            notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        jupytext.write(notebook, folder / f"{path.stem}.ipynb")

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(one, scripts))
    (folder / "index.md").write_text(index(scripts), encoding="utf-8")


def fingerprint(root: Path) -> Any:
    """A function from a script to a hash of it and of both packages: equal hashes, equal output."""
    packages = hashlib.sha256()
    for path in sorted([*root.glob("zoo/**/*.py"), *root.glob("inference/**/*.py")]):
        packages.update(path.read_bytes())
    return lambda script: hashlib.sha256(packages.digest() + _SETUP.encode() + script.read_bytes()).hexdigest()[:16]


def executed(script: Path, kept: Path, root: Path) -> Any:
    """The notebook with output; a tutorial whose claims fail ends the build."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    if kept.exists():
        return nbformat.read(kept, as_version=4)
    print(f"running {script.name}", file=sys.stderr, flush=True)
    notebook = jupytext.read(script)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(_SETUP))
    client = NotebookClient(
        notebook, timeout=_LIMIT, kernel_name="python3", resources={"metadata": {"path": str(script.parent)}}
    )
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)})
    notebook.cells.pop(0)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{script.stem}-*.ipynb"):
        old.unlink()
    nbformat.write(notebook, kept)
    return notebook


def index(scripts: list[Path]) -> str:
    """The list, in the order of their numbers."""
    lines = [
        "# Tutorials",
        "",
        "Each opens with a question, answers it in a few cells, asserts its own claims and ends with exercises. They are",
        "scripts in `tutorials/`: `python tutorials/01_your_first_story.py` runs one, and any editor that knows cells",
        "steps through it.",
        "",
        "```{toctree}",
        ":maxdepth: 1",
        "",
        *(script.stem for script in scripts),
        "```",
        "",
    ]
    return "\n".join(lines)
