"""Run the tests and record what passed, for the page on correctness.

python docs/record_tests.py [--slow] [--from tests.xml]
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "records" / "tests.json"


def condensed(report: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """File -> test -> how many cases passed, failed and were skipped, in how many seconds."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = case.get("classname", "").split(".")[-1]
        test = re.sub(r"\[.*", "", case.get("name", ""), flags=re.S)
        row = found.setdefault(file, {}).setdefault(test, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        tags = {child.tag for child in case}
        row["failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"] += 1
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 2)
    return {file: dict(sorted(tests.items())) for file, tests in sorted(found.items())}


def main() -> int:
    """Write docs/records/tests.json; the exit code is 1 where a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slow", action="store_true", help="the slow tests too")
    parser.add_argument("--from", dest="report", type=Path, help="a JUnit file of a run that has been made already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = options.report or Path(folder) / "tests.xml"
        if options.report is None:
            marks = "slow or not slow" if options.slow else "not slow"
            words = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junitxml={report}", "tests"]
            subprocess.run(words, cwd=ROOT, check=False)
        tests = condensed(report)
    names = ("torch", "pyro-ppl", "numpy", "scipy", "scikit-learn", "arviz")
    record = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "tests": tests,
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [row for file in tests.values() for row in file.values()]
    print(*(f"{sum(row[kind] for row in rows)} {kind}" for kind in ("passed", "failed", "skipped")), sep=", ")
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
