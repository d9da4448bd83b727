"""How-to guides keep their promises: the Python in each runs from top to bottom, the commands parse."""

import re
import shlex
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  (draws a random number when first imported)

from zoo.__main__ import app

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))


def code(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", [p for p in (*GUIDES, DOCS / "index.md") if code(p, "python")], ids=lambda p: p.stem)
def test_the_code_of_a_guide_runs(path, untouched, tmp_path, monkeypatch, capsys):
    """A name that has changed since the page was written."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "guide"}
    for block in code(path, "python"):
        exec(compile(block, str(path), "exec"), space)


@pytest.mark.parametrize("path", [p for p in GUIDES if code(p, "console")], ids=lambda p: p.stem)
def test_the_commands_of_a_guide_are_commands(path):
    """An option that no longer exists."""
    for block in code(path, "console"):
        for line in block.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            assert words[0] == "zoo"
            command, _, unused, *_ = app.parse_known_args(words[1:])
            assert command is not None and not unused, line


def test_every_guide_is_listed_and_every_link_leads_somewhere():
    listed = code(DOCS / "guides" / "index.md", r"\{toctree\}")[0].split()
    assert {p.stem for p in GUIDES} - {"index"} <= set(listed)
    for path in (*GUIDES, DOCS / "index.md"):
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), (path, target)
