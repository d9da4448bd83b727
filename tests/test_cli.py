"""The `zoo` command: what it prints, where it writes, how it fails."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoo.__main__ import main
from zoo.cli.faults import FAULT, USAGE, UsageError
from zoo.cli.stories import find_story, parse_settings

COIN = '''
"""A coin of unknown bias, tossed over and over."""
import pyro
import pyro.distributions as dist

def coin(x=None, num_data=20, strength=1.0):
    """bias ~ Beta(a, a); each toss ~ Bernoulli(bias)."""
    bias = pyro.sample("bias", dist.Beta(strength, strength))
    with pyro.plate("data", num_data if x is None else len(x)):
        return pyro.sample("x", dist.Bernoulli(bias), obs=x)
'''

LINE = """
def line(X, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    with pyro.plate("data", len(X)):
        return pyro.sample("y", dist.Normal(X @ slope, 1.0), obs=y)
"""

BROKEN = """
import pyro
import pyro.distributions as dist

def broken(x=None):
    scale = 1 / 0
    with pyro.plate("data", 10 if x is None else len(x)):
        return pyro.sample("x", dist.Normal(0.0, scale), obs=x)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with story files and tables, as the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("coin.py").write_text(COIN)
    Path("two.py").write_text(COIN + LINE)
    Path("broken.py").write_text(BROKEN)
    Path("tosses.csv").write_text("toss\n" + "1\n0\n1\n1\n" * 5)
    Path("points.csv").write_text("y,a,b\n" + "".join(f"{i % 3},{i},{(i * 7) % 5}\n" for i in range(12)))
    Path("words.csv").write_text("x,kind\n1.5,red\n2.5,blue\n")
    return tmp_path


def run(capsys, *words):
    """Exit code, standard output and standard error of `zoo words...`, in this process."""
    code = main(list(words))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_help_and_version_answer_at_once_without_torch():
    """An import of torch (a second and more) on the way to `--help`."""
    program = (
        "import sys; from zoo.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'pyro', 'matplotlib', 'arviz', 'pandas', 'sklearn', 'inference'}; "
        "heavy &= set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    for words, expected in ((["--help"], "compare"), (["fit", "--help"], "--method"), (["--version"], "0.")):
        start = time.perf_counter()
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert time.perf_counter() - start < 2.0  # 0.2 s on an idle machine


def test_list_names_every_story_and_data_set(capsys):
    """A story or a data set that the list forgets."""
    from zoo.catalog import catalog
    from zoo.data import datasets

    code, out, _ = run(capsys, "list")
    assert code == 0
    assert all(entry.name in out for entry in catalog())
    assert all(name in out for name in datasets())


def test_show_tells_the_story_and_writes_its_plates(capsys, folder):
    """Story lines or diagram missing; a picture that is no picture."""
    code, out, _ = run(capsys, "show", "GMM", "--plate", "plate.png")
    assert code == 0
    assert "Categorical" in out and "π" in out
    assert Path("plate.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "show", "coin.py", "--plate", "plate.svg")
    assert code == 0
    assert "bias ~ Beta(a, a)" in out and "Bernoulli" in out
    assert "<svg" in Path("plate.svg").read_text()


def test_show_writes_formulas_and_the_text_of_diagrams(capsys, folder):
    """LaTeX with something else around it; a suffix that is taken for a picture; a view that is not passed on."""
    code, out, _ = run(capsys, "show", "GMM", "--latex")
    assert code == 0 and out.startswith("\\begin{gathered}") and out.rstrip().endswith("\\end{gathered}")
    code, out, _ = run(capsys, "show", "GMM", "--plate", "gmm.dot")
    assert code == 0 and "p(π, μ, Λ, z, x) = p(π)" in out
    assert Path("gmm.dot").read_text().startswith("digraph")
    run(capsys, "show", "GMM", "--plate", "gmm.mmd")
    assert Path("gmm.mmd").read_text().startswith("flowchart")
    for view in ("plain", "em"):
        run(capsys, "show", "GMM", "--plate", f"{view}.svg", "--view", view)
    assert Path("plain.svg").stat().st_size < Path("em.svg").stat().st_size
    code, _, err = run(capsys, "show", "GMM", "--plate", "x.png", "--view", "bright")
    assert code != 0 and "'bright'" in err and not Path("x.png").exists()


def test_gallery_draws_every_story(capsys, folder):
    from zoo.catalog import catalog

    code, out, _ = run(capsys, "gallery", "-o", "sheet.svg", "--view", "scope")
    assert code == 0 and out.startswith(f"{len(catalog())} stories")
    assert Path("sheet.svg").read_text().count('-title"') == len(catalog())
    assert run(capsys, "gallery", "--view", "em")[0] == 2


def test_show_asks_for_data_where_the_story_cannot_run_without(capsys, folder):
    """A TypeError from the depth of the user's story instead of the option to add."""
    code, _, err = run(capsys, "show", "two.py:line")
    assert code == USAGE and "X" in err and "--data" in err
    assert run(capsys, "show", "two.py:line", "--data", "points.csv")[0] == 0


def test_check_gives_structure_and_every_method(capsys, folder):
    """A method without its reason; a plate of the wrong size."""
    code, out, _ = run(capsys, "check", "coin.py", "--data", "tosses.csv")
    assert code == 0
    assert "bias" in out and "data = 20" in out
    assert all(method in out for method in ("em", "svi", "nuts"))


def test_check_reports_the_users_own_exception_with_its_line(capsys, folder):
    """The user's mistake blamed on us, or shown without the place."""
    code, out, err = run(capsys, "check", "broken.py:broken", "--data", "tosses.csv")
    assert code == FAULT and not out
    assert "ZeroDivisionError" in err and "broken.py, line 6, in broken" in err and "scale = 1 / 0" in err


def test_syntax_error_in_a_story_file_names_its_line(capsys, folder):
    """A traceback of the import machinery."""
    Path("typo.py").write_text("import pyro\ndef story(x=None:\n    pass\n")
    code, _, err = run(capsys, "check", "typo.py", "--data", "tosses.csv")
    assert code == FAULT and "SyntaxError" in err and "typo.py, line 2" in err


def test_debug_shows_the_traceback(capsys, folder):
    """`--debug` swallowed, so that nobody can report a fault."""
    code = main(["check", "broken.py", "--data", "tosses.csv", "--debug"])
    err = capsys.readouterr().err
    assert code == FAULT and "Traceback" in err


def test_fit_on_a_table_gives_the_exact_posterior_mean(capsys, folder):
    """Data that reach the story wrongly: 15 heads in 20 tosses leave Beta(16, 6), mean 0.727."""
    from inference import load

    words = ("fit", "coin.py", "--data", "tosses.csv", "--method", "nuts", "--seed", "0", "--quiet")
    code, out, _ = run(capsys, *words, "--save", "coin.posterior")
    assert code == 0 and "bias" in out and "nuts" in out.lower()
    saved = next(Path().glob("coin.posterior*"))
    bias = load(saved, find_story("coin.py").story).draws["bias"]
    assert abs(float(bias.mean()) - 16 / 22) < 0.02
    code, out, _ = run(capsys, "sample", "coin.py", "--given", str(saved), "--num-data", "50", "--seed", "1")
    assert code == 0 and set(out.split()[1:]) <= {"0", "1", "0.0", "1.0"}


def test_settings_reach_the_story(capsys, folder):
    """`--set` ignored: with strength 1000 the bias hardly moves from 1/2."""
    find = find_story("coin.py", {"strength": 1000.0})
    assert find.settings == {"strength": 1000.0} and list(find.arguments) == ["x"]
    assert parse_settings(["a=3", "b=0.5", "c=diag", "d=true", "e=[1,2]"]) == {
        "a": 3, "b": 0.5, "c": "diag", "d": True, "e": [1, 2],
    }  # fmt: skip
    code, _, err = run(capsys, "fit", "coin.py", "--data", "tosses.csv", "--set", "strenght=2")
    assert code == USAGE and "strenght" in err and "strength" in err
    with pytest.raises(UsageError, match="key=value"):
        parse_settings(["num_components"])


def test_missing_setting_of_a_zoo_story_is_named(capsys, folder):
    """`missing 1 required positional argument` instead of the words to type."""
    code, _, err = run(capsys, "fit", "GMM", "--data", "iris")
    assert code == USAGE and "--set num_components=..." in err


def test_columns_go_to_the_arguments_of_their_name(folder):
    """A regression on its own target: y must not be a column of X."""
    from zoo.cli.tables import arguments_from, read_data

    table = read_data("points.csv")
    (way,) = arguments_from(table, find_story("two.py:line").arguments, "line")
    assert set(way) == {"X", "y"}
    assert way["X"].shape == (12, 2) and way["X"][1].tolist() == [1.0, 2.0]
    assert way["y"].tolist() == [i % 3 for i in range(12)]


def test_one_column_is_tried_as_a_vector_first(folder):
    """(N, 1) given to a story of scalars, which Pyro would broadcast to N x N in silence."""
    from zoo.cli.tables import arguments_from, read_data

    ways = arguments_from(read_data("tosses.csv"), find_story("coin.py").arguments, "coin")
    assert [tuple(way["x"].shape) for way in ways] == [(20,), (20, 1)]


def test_chosen_columns_of_a_data_set():
    """Columns in the order of the set rather than of the request."""
    from zoo.cli.tables import read_data

    whole = read_data("iris")
    names = list(whole.feature_names)
    part = read_data("iris", [names[2], names[0]])
    assert part.x.tolist() == whole.x[:, [2, 0]].tolist()
    assert list(part.feature_names) == [names[2], names[0]]


def test_sample_writes_the_rows_it_was_asked_for(capsys, folder):
    """Globals among the rows, a wrong number of rows, draws that a seed does not repeat."""
    import pandas as pd

    tables = []
    for seed in ("3", "3", "4"):
        code, out, _ = run(capsys, "sample", "coin.py", "--num-data", "40", "--seed", seed, "-o", "rows.csv")
        assert code == 0 and "40 rows" in out
        tables.append(pd.read_csv("rows.csv"))
        assert list(tables[-1].columns) == ["x"] and len(tables[-1]) == 40
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])
    code, out, _ = run(capsys, "sample", "two.py:line", "--data", "points.csv")
    assert code == 0 and out.startswith("y\n") and len(out.split()) == 13
    assert run(capsys, "sample", "two.py:line")[0] == USAGE
    code, out, _ = run(capsys, "sample", "GMM", "--num-data", "5", "--seed", "0")
    header, *lines = out.split()
    assert code == 0 and len(lines) == 5 and header.startswith("z,x_1,x_2")


@pytest.mark.parametrize(
    ("words", "code", "texts"),
    [
        (["fit", "two.py", "--data", "points.csv"], USAGE, ["coin", "line", "two.py:coin"]),
        (["fit", "coin.py:cion", "--data", "tosses.csv"], FAULT, ["cion", "coin"]),
        (["fit", "nowhere.py", "--data", "tosses.csv"], FAULT, ["nowhere.py", "does not exist"]),
        (["fit", "coin.py"], USAGE, ["--data"]),
        (["fit", "coin.py", "--data", "nowhere.csv"], FAULT, ["nowhere.csv"]),
        (["fit", "coin.py", "--data", "irsi"], FAULT, ["iris"]),
        (["fit", "coin.py", "--data", "words.csv"], FAULT, ["kind", "red"]),
        (["fit", "GNM", "--data", "iris"], FAULT, ["GMM"]),
        (["fit", "coin.py", "--data", "tosses.csv", "--method", "nutz"], USAGE, ["nuts"]),
        (["compare", "coin.py", "--data", "tosses.csv", "--methods", "em,swi"], USAGE, ["svi"]),
        (["fit", "coin.py", "--data", "tosses.csv", "--columns", "heads"], FAULT, ["heads", "toss"]),
        (["fit", "coin.py", "--data", "iris", "--columns", "heads"], USAGE, ["heads"]),
        (["fit", "coin.py", "--data", "tosses.csv", "--want", "all"], USAGE, ["posterior"]),
        (["fit", "coin.py", "--data", "tosses.csv", "--sed", "1"], USAGE, ["--seed"]),
        (["fit", "coin.py", "--data", "tosses.csv", "--seed", "-1"], USAGE, ["seed"]),
        (["fit", "coin.py", "--data", "tosses.csv", "--save", "no/where"], FAULT, ["no folder"]),
        (["compare", "coin.py", "--data", "tosses.csv", "--test", "1.5"], USAGE, ["test"]),
        (["show", "coin.py", "--plate", "plate.docx"], USAGE, [".png"]),
        (["sample", "coin.py", "--num-data", "0"], USAGE, ["num-data"]),
        (["sample", "coin.py", "--given", "nowhere.posterior"], FAULT, ["nowhere.posterior"]),
        (["fot", "coin.py"], USAGE, ["fit"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_told_with_their_code_and_no_traceback(capsys, folder, words, code, texts):
    """A wrong exit code, a traceback, or a message that leaves the user guessing."""
    found, out, err = run(capsys, *words)
    assert found == code, err
    assert not out
    assert all(text in err for text in texts), err


def test_count_that_no_poisson_gives_is_refused_before_any_work(capsys, folder):
    """Half a toss: the story's own support decides, with the site in the message."""
    Path("half.csv").write_text("toss\n1\n0.5\n0\n")
    code, _, err = run(capsys, "fit", "coin.py", "--data", "half.csv")
    assert code == FAULT and "x" in err and "0.5" in err


def test_interrupt_ends_with_130(capsys, monkeypatch):
    """A traceback on Ctrl-C."""
    import zoo.cli.terminal

    def press():
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo.cli.terminal, "print_catalog", press)
    assert run(capsys, "list")[0] == 130


def test_interrupted_run_that_still_answers_ends_with_130(capsys, monkeypatch):
    """An answer from half a run that a script takes for a whole one."""
    import os
    import signal

    import zoo.cli.terminal

    def press():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            print("so far")

    monkeypatch.setattr(zoo.cli.terminal, "print_catalog", press)
    inherited = signal.getsignal(signal.SIGINT)
    before = signal.default_int_handler  # a shell starts background jobs with the signal ignored
    signal.signal(signal.SIGINT, before)
    try:
        code, out, _ = run(capsys, "list")
        assert code == 130 and "so far" in out
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_guide_beside_a_model_is_used(capsys, folder):
    """Pyro's usual pair of functions, with the guide forgotten: a guide that cannot move must be what answers."""
    Path("pair.py").write_text(
        "import torch, pyro\nimport pyro.distributions as dist\n"
        "def model(x=None):\n"
        "    m = pyro.sample('m', dist.Normal(0.0, 10.0))\n"
        "    with pyro.plate('data', 9 if x is None else len(x)):\n"
        "        pyro.sample('x', dist.Normal(m, 1.0), obs=x)\n"
        "def guide(x=None):\n"
        "    loc = pyro.param('m.loc', torch.tensor(0.0))\n"
        "    pyro.sample('m', dist.Normal(0 * loc + 5.0, 0.01))\n"
    )
    found = find_story("pair.py")
    assert found.guide.__name__ == "guide" and found.story.__name__ == "model"
    code, out, err = run(capsys, "fit", "pair.py", "--data", "tosses.csv", "--method", "svi", "--quiet")
    assert code == 0, err
    mean = next(line.split()[1] for line in out.splitlines() if line.startswith("m "))
    assert abs(float(mean) - 5.0) < 0.01


def test_story_file_leaves_no_byte_code_and_shadows_nothing(folder):
    """A user's `random.py` taken for the library's, or a __pycache__ beside it."""
    import random

    Path("random.py").write_text(COIN)
    found = find_story("random.py")
    assert found.story.__name__ == "coin"
    assert sys.modules["random"] is random and not Path("__pycache__").exists()


def test_class_and_object_in_a_file(folder):
    """An object told twice: once by itself, once by its class."""
    Path("objects.py").write_text(
        "import pyro\nimport pyro.distributions as dist\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Coin:\n    strength: float\n"
        "    def model(self, x=None, num_data=5):\n"
        "        bias = pyro.sample('bias', dist.Beta(self.strength, self.strength))\n"
        "        with pyro.plate('data', num_data if x is None else len(x)):\n"
        "            return pyro.sample('x', dist.Bernoulli(bias), obs=x)\n"
        "fair = Coin(100.0)\n"
    )
    assert find_story("objects.py").story.strength == 100.0
    assert find_story("objects.py:Coin", {"strength": 2}).story.strength == 2
    with pytest.raises(UsageError, match="strength"):
        find_story("objects.py:Coin")


def test_compare_prints_a_row_a_method_and_writes_the_report(capsys, folder):
    """A method lost on the way to the table, or a report that does not exist."""
    words = ("compare", "coin.py", "--data", "tosses.csv", "--methods", "svi,nuts", "--report", "report.html")
    code, out, err = run(capsys, *words, "--quiet")
    assert code == 0, err
    assert "svi" in out and "nuts" in out
    assert "<html" in Path("report.html").read_text().lower()


@pytest.mark.slow
def test_demo_writes_its_pictures_and_finds_the_species(capsys, folder):
    """A demo that no longer runs from end to end."""
    code, out, err = run(capsys, "demo", "--out", "demo", "--quiet")
    assert code == 0, err
    assert {p.name for p in Path("demo").iterdir()} >= {"plate.png", "compare.png", "report.html"}
    assert "em" in out and "svi" in out and "nuts" in out
