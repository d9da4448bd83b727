"""What users do wrong and what goes wrong: every row, the tests that belong to it, and how many rows hold.

`python tests/fault_table.py` (or `make faults`) runs all of them and prints the count, section by section. A row passes
when every test of it passes, for every method that it concerns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

#: Section -> rows.
TABLE: dict[str, tuple[str, ...]] = {
    "data values": (
        "a NaN among the values",
        "an infinity among the values",
        "a NaN in a covariate",
        "a column of NaN",
        "no rows",
        "one row",
        "constant data",
        "fewer rows than columns",
        "more components than rows",
        "values of 1e30",
        "a negative count",
        "half a count",
        "a label outside the classes",
        "an empty document or a word beyond the vocabulary",
        "a word of the vocabulary that never occurs",
        "pixels in 0..255 for a Bernoulli",
        "all rows equal",
    ),
    "types and shapes": (
        "whole numbers where floats are meant",
        "data in double and story in single precision",
        "booleans, complex numbers, objects and text",
        "arrays, lists, frames, series and sparse matrices",
        "a column where a vector is meant",
        "one number for a plate of many",
        "arguments of different lengths",
        "square data, transposed",
        "data on one device, story on another",
        "an unknown or a missing argument",
        "a misspelt method",
        "impossible options",
    ),
    "mistakes in a story": (
        "nothing is observed",
        "two sites of one name",
        "a vector observed outside a plate",
        "a latent with 2**40 joint states",
        "a latent with infinitely many states",
        "a guide that lacks a latent",
        "sites that come and go",
        "an observation of density zero",
        "a finite loss whose gradient is NaN",
        "an exception of the story's own",
        "a flat prior",
    ),
    "trouble in the run": (
        "a step size of 1e6",
        "a funnel",
        "chains in two modes",
        "a mean-field guide on strong correlation",
        "a budget that is used up",
    ),
    "state and concurrency": (
        "two fits with the same site names and other shapes",
        "the same fit twice",
        "four threads at once",
        "four processes at once",
        "the user's own state",
    ),
    "files": (
        "killed at a random moment, resumed",
        "a truncated, flipped or empty checkpoint",
        "a hostile pickle",
        "a checkpoint of another story, version or size",
        "a full disk or a read-only folder",
        "archive members and links that lead outside",
        "a text file in another encoding",
    ),
    "devices": (
        "CUDA is asked for and there is none",
        "CUDA runs out of memory",
        "an answer saved on CUDA, loaded without",
    ),
}
TITLES = frozenset(title for titles in TABLE.values() for title in titles)
PROPERTY = "row of the table of faults"


def row(title: str, methods: Iterable[str] = (), **cases: Any) -> Callable[[Callable], Callable]:
    """A test belongs to a row; with `methods` it takes an argument of that name, and `case` for each of `cases`."""
    assert title in TITLES, f"{title!r} is no row of the table"

    def mark(test: Callable) -> Callable:
        if cases:
            test = pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))(test)
        if methods:
            test = pytest.mark.parametrize("method", [pytest.param(m, id=f"{title} | {m}") for m in methods])(test)
        return pytest.mark.fault(title)(test)

    return mark


def configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "fault(title): a row of the table of faults")


def tag(items: list[pytest.Item]) -> None:
    """Let every report carry its row, also across processes."""
    for item in items:
        mark = item.get_closest_marker("fault")
        if mark is not None:
            item.user_properties.append((PROPERTY, mark.args[0]))


def summarise(reporter: Any) -> None:
    """Rows that hold, by section; rows that do not, by name. Silent where fewer than all rows were run."""
    seen: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.stats.get(outcome, []):
            for name, title in getattr(report, "user_properties", ()):
                if name == PROPERTY and (report.when == "call" or outcome != "passed"):
                    counts = seen.setdefault(title, {"passed": 0, "failed": 0, "skipped": 0})
                    counts["failed" if outcome == "error" else outcome] += 1
    if not TITLES <= set(seen):
        return
    reporter.section("table of faults")
    good = 0
    for section, titles in TABLE.items():
        held = [t for t in titles if seen[t]["passed"] and not seen[t]["failed"]]
        tests = sum(seen[t]["passed"] for t in titles)
        skipped = sum(seen[t]["skipped"] for t in titles)
        good += len(held)
        without = f", {skipped} skipped" if skipped else ""
        reporter.write_line(f"{section:<24} {len(held):>3} of {len(titles):>2} rows   {tests:>4} tests pass{without}")
        for title in titles:
            if title not in held:
                reporter.write_line(f"    fails: {title} ({seen[title]['failed']} tests)")
    total = sum(sum(counts[k] for k in ("passed", "failed")) for counts in seen.values())
    passed = sum(counts["passed"] for counts in seen.values())
    reporter.write_line(f"{'all':<24} {good:>3} of {len(TITLES):>2} rows   {passed:>4} of {total} tests pass")


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.exit(pytest.main([str(Path(__file__).parent / "faults"), "-q", "-m", "", *sys.argv[1:]]))
