"""Tables that stay on disk: the same answers, and memory that does not grow with them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from inference import EM, SVI, fit
from inference.data import some_rows
from inference.methods import batches
from inference.problem import prepare
from zoo import GMM, PPCA

ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(tmp_path):
    """A memory-mapped table, and the same in memory."""
    random = np.random.default_rng(0)
    x = random.standard_normal((3000, 3)) + 4 * random.integers(2, size=(3000, 1))
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r"), x


@pytest.mark.parametrize(
    "method",
    [
        EM(restarts=2),
        EM(restarts=2, driver="incremental"),
        SVI(steps=60, batch_size=100, starts=1, mode="eager", draws=50),
    ],
    ids=["batch", "incremental", "svi"],
)
def test_a_table_on_disk_gives_the_answer_of_the_table_in_memory(table, method):
    """Bit by bit; a block read from the wrong place, or written to, shows."""
    mapped, x = table
    first, second = (fit(GMM(2, scale=3.0), data, method, seed=0) for data in (mapped, x))
    for name, value in second.draws.items():
        assert torch.equal(first.draws[name], value), name
    assert np.array_equal(mapped, x)


def test_scatter_of_a_table_on_disk(table):
    mapped, x = table
    found = fit(PPCA(1), mapped, EM(estimate="mle"), seed=0).draws
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    assert abs(float(found["psi"][0]) - values[:-1].mean()) < 1e-10


def story_of(rows):
    return prepare(PPCA(1), torch.randn(rows, 2, dtype=torch.float64), seed=0)


def test_batches_of_long_tables_take_every_row_once(monkeypatch):
    """Without a list of all rows: an epoch has each row once, in no order, with neighbours apart."""
    monkeypatch.setattr(batches, "LISTED", 1000)
    monkeypatch.setattr(batches, "RUN", 16)
    monkeypatch.setattr(batches, "RUNS", 8)
    problem = story_of(2048)
    torch.manual_seed(0)
    found = batches.Batches(problem, 64)
    epoch = torch.cat([found.next() for _ in range(2048 // 64)])
    assert torch.equal(epoch.sort().values, torch.arange(2048))
    assert float(((epoch[1:] - epoch[:-1]) == 1).double().mean()) < 0.05
    again = torch.cat([found.next() for _ in range(2048 // 64)])
    assert torch.equal(again.sort().values, torch.arange(2048)) and not torch.equal(again, epoch)


def test_long_tables_are_judged_on_rows_from_all_over(monkeypatch):
    """Their weight is that of all rows: without it the ELBO would be that of a few."""
    monkeypatch.setattr(batches, "JUDGED", 100)
    kwargs, scale = batches.Batches(story_of(2048), 64).judged()
    assert kwargs["x"].shape == (100, 2) and scale == pytest.approx(20.48)


def test_some_rows_of_a_billion():
    """Different ones, from everywhere, at once."""
    rows = some_rows(10**9, 1000, torch.Generator().manual_seed(0))
    assert len(rows.unique()) == 1000 and abs(float(rows.double().mean()) / 10**9 - 0.5) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "svi"])
def test_a_process_that_may_not_hold_the_table_fits_it(method):
    """A table of 768 MB, 700 MB beyond what the imports take; the rate is at least half of that in memory."""
    script = ROOT / "benchmarks" / "beyond_memory.py"
    words = ["--gib", "0.75", "--limit", "1100", "--method", method]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.rsplit(":", 1)[1]) >= 0.5, done.stdout
