"""Tutorials are scripts (jupytext percent format): running one is testing it."""

import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_and_keeps_its_promises(path, untouched, capsys):
    """Each tutorial asserts its own claims."""
    runpy.run_path(str(path))
    assert capsys.readouterr().out
