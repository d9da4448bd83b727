"""Pages made from what was recorded: benchmarks from their JSON files, correctness from the tests themselves."""

import ast
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pictures import picture, save


def write(source: Path, root: Path) -> None:
    """`source`/benchmarks.md with its figure, and `source`/correctness.md."""
    (source / "benchmarks.md").write_text(benchmarks(root), encoding="utf-8")
    save(goals_figure(goals(root)), source / "static", "benchmarks")
    (source / "correctness.md").write_text(correctness(root), encoding="utf-8")


@dataclass(frozen=True)
class Goal:
    """One ratio that was hoped for: what was found, as a multiple of it; above 1 it is met."""

    benchmark: str
    case: str
    what: str
    found: float
    share: float


def goals(root: Path) -> list[Goal]:
    """Every recorded goal that is a ratio of times, benchmark by benchmark."""
    made = []
    for path in sorted((root / "benchmarks").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for case in result.get("cases", ()):
            for goal in case["goals"]:
                if " / " in goal["what"] and "error" not in goal["what"] and goal["found"] > 0:
                    share = goal["bound"] / goal["found"] if goal["most"] else goal["found"] / goal["bound"]
                    made.append(Goal(result["benchmark"], case["case"], goal["what"], goal["found"], share))
    return made


def goals_figure(found: list[Goal]) -> Any:
    """Found over hoped for, on a logarithmic axis."""
    from matplotlib.figure import Figure

    ink, met, missed = "#1d2329", "#1f6f8b", "#b5541c"
    figure = Figure(figsize=(8.6, 0.9 + 0.25 * len(found)), layout="constrained")
    ax = figure.add_subplot()
    for i, goal in enumerate(found):
        colour = met if goal.share >= 1 else missed
        ax.plot([1, goal.share], [i, i], color=colour, lw=1.4)
        ax.plot(goal.share, i, "o", color=colour, ms=5)
    ax.axvline(1, color=ink, lw=0.8)
    ax.set_xscale("log")
    ax.set_ylim(len(found) - 0.4, -0.6)
    names = [f"{g.benchmark}: {g.case.split(' N=')[0]}, {g.what} = {g.found:.3g}" for g in found]
    ax.set_yticks(range(len(found)), names, fontsize=7.5, color=ink)
    ax.tick_params(axis="x", colors=ink, which="both")
    ax.set_xlabel("found, as a multiple of what was hoped for (blue: met)", fontsize=9, color=ink)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(ink)
    ax.tick_params(axis="y", length=0)
    return figure


def benchmarks(root: Path) -> str:
    """benchmarks/README.md with its tables made anew from the JSON files."""
    table = _script(root / "benchmarks" / "_table.py")
    text = (root / "benchmarks" / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(table.BEGIN)
    after = rest.partition(table.END)[2]
    tables = "\n\n".join(table.table(result) for result in table.results())
    image = picture("_static/benchmarks", "Recorded ratios beside the goals that were set for them")
    shown = f'```{{raw}} html\n<figure class="wide">{image}</figure>\n```\n\n'
    return f"{before}{shown}{tables}{after}".replace("\n```\n", "\n```bash\n", 1)


def _script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def correctness(root: Path) -> str:
    """Every test in its own words, with what the last recorded run found."""
    path = root / "docs" / "records" / "tests.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tests": {}}
    lines = ["# Correctness", "", *recorded(record), ""]
    for path in sorted((root / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        if not tests:
            continue
        about = (ast.get_docstring(tree) or path.stem).split("\n\n")[0].replace("\n", " ")
        lines += [f"## {path.stem.removeprefix('test_').replace('_', ' ').capitalize()}", "", about, ""]
        lines += [f"- {sentence(test, record['tests'].get(path.stem, {}))}" for test in tests]
        lines.append("")
    return "\n".join(lines)


def recorded(record: dict[str, Any]) -> list[str]:
    """What ran, where, and how it ended."""
    about = "What the tests hold, in their own words. `make test` runs them, `make test-slow` those marked slow"
    rows = [row for file in record["tests"].values() for row in file.values()]
    if not rows:
        return [f"{about}; `python docs/record_tests.py` puts the outcome onto this page."]
    passed, failed, skipped = (sum(row[kind] for row in rows) for kind in ("passed", "failed", "skipped"))
    seconds = sum(row["seconds"] for row in rows)
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return [
        f"{about}.",
        "",
        f"Recorded on {record['date']} by `python docs/record_tests.py` (Python {record['python']}; {versions}):",
        "",
        "| passed | failed | skipped | seconds of one core |",
        "| --- | --- | --- | --- |",
        f"| {passed:,} | {failed:,} | {skipped:,} | {seconds:,.0f} |",
        "",
        "Behind each test: how many cases passed, and in how many seconds.",
    ]


def sentence(test: ast.FunctionDef, rows: dict[str, dict[str, Any]]) -> str:
    """A test's name as words, its docstring, and its recorded outcome."""
    name = test.name.removeprefix("test_").replace("_", " ")
    slow = any("slow" in ast.dump(mark) for mark in test.decorator_list)
    told = (ast.get_docstring(test) or "").split("\n\n")[0].replace("\n", " ").replace("*", r"\*").replace("$", r"\$")
    text = f"**{name[:1].upper() + name[1:]}**" + (f": {told}" if told else "")
    row = rows.get(test.name)
    if row is None:
        return text + (" *(slow, not in the record)*" if slow else " *(not in the record)*" if rows else "")
    counts = ", ".join(f"{row[kind]} {kind}" for kind in ("passed", "failed", "skipped") if row[kind])
    return f"{text} *({counts}; {row['seconds']:.2g} s)*"
