"""Tutorials are scripts (jupytext percent format): running one is testing it."""

import re
import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.py"))
#: Longer than fifteen seconds on one core; they run with the slow tests.
SLOW = {"09_vae_and_collapse", "13_your_own_story_and_guide", "14_reading_diagnostics"}


def marked(path):
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])


@pytest.mark.parametrize("path", [marked(path) for path in TUTORIALS])
def test_tutorial_runs_and_keeps_its_promises(path, untouched, capsys):
    """Each tutorial asserts its own claims."""
    runpy.run_path(str(path))
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_asks_answers_and_sets_exercises_with_solutions(path):
    """A tutorial without a question, a claim that could fail, or solutions teaches half of what it could."""
    text = path.read_text()
    assert "# **The question.**" in text
    assert len(re.findall(r"(?m)^\s*assert ", text)) >= 5
    solutions = text.split("# ### Solutions", 1)
    assert "# ## Exercises" in solutions[0] and len(solutions) == 2 and "assert " in solutions[1]


def test_tutorials_are_numbered_and_slow_ones_exist():
    """A renamed tutorial must not lose its mark, nor two share a number."""
    numbers = [path.stem[:2] for path in TUTORIALS]
    assert len(set(numbers)) == len(numbers) and all(n.isdigit() for n in numbers)
    assert {path.stem for path in TUTORIALS} >= SLOW
