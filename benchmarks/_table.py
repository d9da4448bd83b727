"""The recorded results as Markdown tables: printed, or written into README.md between its two marks.

python benchmarks/_table.py [--write]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def duration(seconds: float) -> str:
    """Three digits in a unit that suits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def times(case: dict[str, Any]) -> str:
    """Every side's median and quartiles."""
    parts = []
    for side, found in case["seconds"].items():
        low, high = duration(found["low"]), duration(found["high"])
        parts.append(f"{side} {duration(found['median'])} ({low} to {high})")
    return "<br>".join(parts) or "–"


def figures(case: dict[str, Any]) -> str:
    """Ratios and other figures, with their goals."""
    parts, told = [], set()
    for goal in case["goals"]:
        sign, word = ("≤" if goal["most"] else "≥"), "met" if goal["met"] else "missed"
        parts.append(f"{goal['what']} **{goal['found']:.3g}** (goal {sign} {goal['bound']:.3g}: {word})")
        told.add(goal["what"])
    for name, value in case["facts"].items():
        if isinstance(value, float) and " / " in name and name not in told and case["sound"]:
            parts.append(f"{name} **{value:.3g}**")
    return "<br>".join(parts) or "–"


def checks(case: dict[str, Any]) -> str:
    """What was checked before the times counted."""
    if case["failed"]:
        return "failed: " + case["failed"].replace("|", "/").splitlines()[0][:120]
    parts = [
        f"{check['what']} {check['found']:.1e}" + ("" if check["passed"] else " **not passed**")
        for check in case["checks"]
    ]
    return "<br>".join(parts) or "–"


def table(result: dict[str, Any]) -> str:
    """One benchmark."""
    machine = result["machine"]
    count = machine["threads"]
    where = f"{machine.get('gpu', machine['cpu'])}, {count} thread{'s' if count > 1 else ''}"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"### {result['benchmark']}",
        "",
        f"`{result['command']}` on {result['date']}: {where}; {versions}; {result['repeats']} rounds.",
        "",
        "| case | seconds, median (quartiles) | figures | checks |",
        "| --- | --- | --- | --- |",
    ]
    for case in result["cases"]:
        name = case["case"].replace("|", "/")
        lines.append(f"| {name}, per {case['unit']} | {times(case)} | {figures(case)} | {checks(case)} |")
    return "\n".join(lines)


def results() -> list[dict[str, Any]]:
    """Every JSON beside the scripts that has cases."""
    read = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json")))
    return [result for result in read if "cases" in result]


def main() -> int:
    """Print or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    options = parser.parse_args()
    text = "\n\n".join(table(result) for result in results()) or "Nothing is recorded yet."
    if not options.write:
        print(text)
        return 0
    readme = HERE / "README.md"
    page = readme.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
