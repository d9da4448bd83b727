"""Files that are shortened while a fit reads them: an error that names them, where the process would else be ended."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import NUTS, fit
from inference.data import to_value
from inference.mapped_files import file_of, known_file, still_there

ROOT = Path(__file__).parents[1]

#: Rows of every file here.
BEGIN = """
import os, sys
import numpy as np
import torch
from inference import EM, SVI, fit
from inference.mapped_files import MappedFile
from zoo import GMM, LDA, PPCA, MultinomialMixture, open_corpus, open_table, store_corpus

folder, looks = sys.argv[1], int(sys.argv[2])
look = MappedFile.check
count = 0

def shorten(path):
    \"\"\"From the given look on the file has half of its bytes, as by another process just before a block is read.\"\"\"
    def check(self):
        global count
        count += 1
        if count == looks:
            os.truncate(path, os.path.getsize(path) // 2)
        look(self)
    MappedFile.check = check

def told(work, path):
    shorten(path)
    try:
        work()
        print("read on" if count >= looks else "never shortened")
    except ValueError as error:
        print("told:", error)
"""

CASES = {
    "table": """
x = np.random.default_rng(0).standard_normal((60_000, 4))
path = f"{folder}/x.npy"
np.save(path, x)
table = open_table(path)
told(lambda: fit(GMM(3), table, METHOD, seed=0), path)
""",
    "raw": """
path = f"{folder}/x.raw"
x = np.memmap(path, np.float64, "w+", shape=(60_000, 4))
x[:] = np.random.default_rng(0).standard_normal(x.shape)
x = np.memmap(path, np.float64, "r", shape=(50_000, 4), offset=64)
told(lambda: fit(GMM(3), x, METHOD, seed=0), path)
""",
    "shared": """
path = f"{folder}/x.bin"
np.random.default_rng(0).standard_normal((60_000, 4)).tofile(path)
x = torch.from_file(path, shared=True, size=240_000, dtype=torch.float64).view(60_000, 4)
told(lambda: fit(GMM(3), x, METHOD, seed=0), path)
""",
    "corpus": """
x = np.random.default_rng(0).poisson(0.3, (30_000, 40))
corpus = store_corpus(f"{folder}/news", [x])
told(lambda: fit(STORY(3), corpus, METHOD, seed=0), f"{folder}/news/FILE")
""",
}


def run(case, folder, looks, **words):
    """A process of its own, as it may be ended by the operating system."""
    text = BEGIN + CASES[case]
    for name, value in words.items():
        text = text.replace(name, value)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text), str(folder), str(looks)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, f"ended by {done.returncode}\n{done.stderr[-1500:]}"
    return done.stdout


@pytest.mark.parametrize(
    ("case", "looks", "words"),
    [
        ("table", 3, {"METHOD": "EM(restarts=1, max_iter=20)"}),
        ("corpus", 12, {"STORY": "LDA", "METHOD": "EM(restarts=1, max_iter=20)", "FILE": "indices.npy"}),
        ("corpus", 12, {"STORY": "MultinomialMixture", "METHOD": "EM(restarts=1, max_iter=20)", "FILE": "data.npy"}),
    ],
    ids=["table", "topics", "mixture"],
)
def test_a_file_that_is_shortened_between_two_blocks_is_told(case, looks, words, tmp_path):
    """Not SIGBUS: the file, what it had and what it has."""
    said = run(case, tmp_path, looks, **words)
    name = words.get("FILE", "x.npy")
    assert said.startswith("told: ") and name in said and "bytes or more and has" in said, said


IN_BATCHES, IN_BLOCKS = "SVI(batch_size=500, steps=50, starts=1, mode='eager')", "EM(restarts=1, max_iter=20)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "looks", "words"),
    [
        *(("table", looks, {"METHOD": IN_BATCHES}) for looks in (1, 3, 20)),
        # EM has copied so few rows after a few looks, and needs their file no more.
        *((case, looks, {"METHOD": IN_BLOCKS}) for case in ("raw", "shared") for looks in (1, 3)),
        *((case, 20, {"METHOD": IN_BATCHES}) for case in ("raw", "shared")),
        *(("corpus", looks, {"STORY": "LDA", "METHOD": "SVI(steps=20)", "FILE": "indptr.npy"}) for looks in (1, 3, 20)),
    ],
)
def test_wherever_it_happens(case, looks, words, tmp_path):
    """The same from the first look on."""
    assert run(case, tmp_path, looks, **words).startswith("told: ")


def test_parts_of_a_map_know_their_file_and_other_memory_knows_none(tmp_path):
    """A view of a view; a copy; memory where a map was."""
    np.save(tmp_path / "x.npy", np.arange(4000.0).reshape(1000, 4))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    size = (tmp_path / "x.npy").stat().st_size
    assert file_of(mapped[3:][::2]).need == size and file_of(np.array(mapped)) is None
    tensor = to_value("x", mapped, torch.float64)
    assert known_file(tensor[5:, :2]).name.endswith("x.npy") and known_file(tensor.clone()) is None
    still_there(tensor, mapped, 3, None, torch.zeros(2))
    with open(tmp_path / "x.npy", "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(ValueError, match=rf"x.npy was shortened.* {size:,} bytes or more and has {size - 1:,} now"):
        still_there(tensor)
    with pytest.raises(ValueError, match="was shortened"):
        still_there(mapped[10:])


def test_a_file_that_is_replaced_is_still_the_one_that_was_mapped(tmp_path):
    """A shorter file renamed to its name is another; the old one is still there for who maps it."""
    np.save(tmp_path / "x.npy", np.zeros((1000, 4)))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.save(tmp_path / "y.npy", np.zeros((10, 4)))
    (tmp_path / "y.npy").replace(tmp_path / "x.npy")
    still_there(mapped, to_value("x", mapped, torch.float64))


def test_an_open_map_leaves_the_recording_of_other_stories_alone(tmp_path, monkeypatch):
    """What stands for tensors while a program is recorded has no memory to look up."""

    def effects(x):
        mu, s = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu + s * z, 0.5), obs=x)

    np.save(tmp_path / "x.npy", np.zeros((50, 2), np.float32))
    held = to_value("x", np.load(tmp_path / "x.npy", mmap_mode="r"), torch.float32)
    assert known_file(held) is not None
    monkeypatch.setattr("inference.marginal.FEW_LOCALS", 0)  # their integral writes into tensors: it is made functional
    x = torch.tensor([0.2, 1.4, -0.6, 2.2, 0.9, 1.1, -0.3, 0.4, 1.9, 0.1, 0.6, 1.3, -1.0, 0.8])
    found = fit(effects, x, NUTS(chains=2, warmup=20, draws=10), seed=0)
    assert found.diagnostics["gradient"] == "graph", found.diagnostics
