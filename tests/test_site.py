"""The site asks nobody for anything, and what checks it sees the faults it is there for."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def module(name):
    path = ROOT / "docs" / "writers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


check = module("check")
GOOD = '<html><body id="top"><a href="#top">up</a><a href="https://example.org">elsewhere</a></body></html>'


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ('<script src="https://example.org/a.js"></script>', "fetches https://example.org/a.js"),
        ('<script src="//example.org/a.js"></script>', "fetches //example.org/a.js"),
        ('<link rel="stylesheet" href="http://example.org/a.css">', "fetches http://example.org/a.css"),
        ('<link rel="preconnect" href="https://fonts.example.org">', "fetches https://fonts.example.org"),
        ('<img src="https://example.org/a.png">', "fetches https://example.org/a.png"),
        ('<p style="background: url(https://example.org/b.png)"></p>', "fetches https://example.org/b.png"),
        ("<style>@import 'https://example.org/c.css';</style>", "fetches https://example.org/c.css"),
        ('<img src="missing.png">', "missing.png leads nowhere"),
        ('<a href="other.html">x</a>', "other.html leads nowhere"),
        ('<a href="#nowhere">x</a>', "#nowhere leads nowhere"),
        ("x" * 300_001, "bytes without pictures"),
    ],
)
def test_every_planted_fault_is_seen(tmp_path, page, fault):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    found = check.faults(tmp_path)
    assert len(found) == 1 and fault in found[0]


def test_links_for_people_and_pictures_within_are_no_faults(tmp_path):
    """A link to another site is followed by a reader, not by the page; a picture inside a page is no weight."""
    (tmp_path / "page.html").write_text(GOOD, encoding="utf-8")
    (tmp_path / "heavy.html").write_text(f'<img src="data:image/png;base64,{"A" * 400_000}">', encoding="utf-8")
    assert check.faults(tmp_path) == []


def test_style_sheets_are_read_too(tmp_path):
    (tmp_path / "a.css").write_text("@font-face { src: url('https://example.org/f.woff2') }", encoding="utf-8")
    assert check.faults(tmp_path) == ["a.css: fetches https://example.org/f.woff2"]


def test_formulas_of_pages_become_mathml():
    """Nothing on a page may wait for a script that reads LaTeX."""
    from inference.story_math import mathml

    text = mathml(r"p(x \mid \theta) = \prod_{n=1}^{N} p(x_n \mid \theta)", "block")
    assert text.startswith("<math") and "\\" not in text


def test_a_run_is_recorded_case_by_case(tmp_path):
    """A failed case among passed ones must not vanish in the record."""
    spec = importlib.util.spec_from_file_location("record_tests", ROOT / "docs" / "record_tests.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    (tmp_path / "run.xml").write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.test_em" name="test_a[1]" time="0.5"/>
        <testcase classname="tests.test_em" name="test_a[x-2]" time="0.25"><failure message="no"/></testcase>
        <testcase classname="tests.test_em" name="test_b" time="1"><skipped message="later"/></testcase>
        </testsuite></testsuites>""",
        encoding="utf-8",
    )
    found = record.condensed(tmp_path / "run.xml")
    assert found == {
        "test_em": {
            "test_a": {"passed": 1, "failed": 1, "skipped": 0, "seconds": 0.75},
            "test_b": {"passed": 0, "failed": 0, "skipped": 1, "seconds": 1.0},
        }
    }


def test_every_recorded_figure_reaches_its_page(monkeypatch):
    """A record of another shape than the tables would stop the site."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    results = importlib.import_module("writers.results")
    text = results.benchmarks(ROOT)
    assert text.count("| ---") > 20 and all(goal.share > 0 for goal in results.goals(ROOT))
    assert results.correctness(ROOT).count(" passed; ") > 500


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_builds_without_a_warning():
    """Every page, the tutorials shown and not run; docs/build.py itself fails on warnings and on faults of the pages."""
    for needed in ("sphinx", "myst_nb", "furo", "jupytext"):
        pytest.importorskip(needed)
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--skip-tutorials"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    pages = {path.stem for path in (ROOT / "docs" / "_build" / "html" / "stories").glob("*.html")}
    from zoo.catalog import catalog

    assert {entry.name.lower() for entry in catalog()} <= pages
