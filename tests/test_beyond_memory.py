"""Tables that stay on disk: the same answers, and memory that does not grow with them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from inference import EM, SVI, checkpoint, data, fit, load
from inference.data import some_rows
from inference.lazy_rows import LazyRows
from inference.methods import batches
from inference.problem import prepare
from zoo import GMM, PPCA, VAE

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
    first, second = (fit(GMM(2, scale=3.0), given, method, seed=0) for given in (mapped, x))
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


def test_a_table_of_another_precision_than_the_networks_is_not_copied(tmp_path, monkeypatch):
    """Float64 in a file for a story in float32: rows are converted as they are read, to the numbers of a copy."""
    monkeypatch.setattr(data, "CELLS", 1000)
    x = np.random.default_rng(0).integers(2, size=(1500, 3)).astype(np.float64)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = data.to_value("x", mapped, torch.float32)
    assert isinstance(found, LazyRows) and torch.equal(found[:], torch.tensor(x, dtype=torch.float32))
    assert not isinstance(data.to_value("x", mapped, torch.float64), LazyRows)
    method = SVI(steps=20, batch_size=100, mode="eager")
    first, second = (fit(VAE(3, 2, hidden=(8,)), v, method, seed=0).history[0] for v in (mapped, x))
    assert first == pytest.approx(second, rel=0.1)


def test_a_saved_answer_does_not_hold_the_file(table, tmp_path, monkeypatch):
    """Of a large file the first rows are kept, as of a corpus on disk, and it says so."""
    monkeypatch.setattr(checkpoint, "CELLS", 1000)
    posterior = fit(GMM(2, scale=3.0), table[0], EM(restarts=1, max_iter=5), seed=0)
    kept = load(posterior.save(tmp_path / "answer.st"), GMM(2, scale=3.0))
    assert len(kept.problem.kwargs["x"]) == checkpoint.KEPT_ROWS < 3000
    assert torch.allclose(kept.log_prob(table[1]), posterior.log_prob())


def test_columns_that_know_missing_cells_hand_them_over_as_nan():
    """Masks and pandas' nullable columns: NumPy would show what lies under a mask, and objects."""
    x = np.ma.masked_array(np.arange(6.0).reshape(3, 2), mask=[[0, 0], [0, 1], [0, 0]])
    assert data.to_value("x", x, torch.float64).isnan().nonzero().tolist() == [[1, 1]]
    frame = pd.DataFrame({"a": [0.5, 1.5, 2.5], "n": pd.array([1, None, 3], dtype="Int64")})
    found = data.to_value("x", frame, torch.float64)
    assert found.isnan().nonzero().tolist() == [[1, 1]] and float(found[2, 1]) == 3.0
    assert data.to_value("n", frame["n"].dropna(), torch.float64).tolist() == [1, 3]
    with pytest.raises(ValueError, match="x is masked in 1 cells and holds int64"):
        data.to_value("x", np.ma.masked_array([1, 2], mask=[0, 1]), torch.float64)
    with pytest.raises(TypeError, match=r"data is the path 'x.npy'; open it first: open_table"):
        fit(GMM(2), "x.npy")


def test_a_copy_of_a_large_file_is_told(tmp_path, monkeypatch):
    """Whole numbers of 16 bits cannot be used where they lie: the line that mends it is in the notice."""
    monkeypatch.setattr(data, "NOTICED", 1000)
    np.save(tmp_path / "x.npy", np.zeros((1000, 2), np.int16))
    with pytest.warns(data.DataNotice, match=r"lies in a file as int16.*open_table"):
        data.to_value("x", np.load(tmp_path / "x.npy", mmap_mode="r"), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "svi"])
def test_a_process_that_may_not_hold_the_table_fits_it(method):
    """A table of 768 MB, 700 MB beyond what the imports take; the rate is at least half of that in memory."""
    script = ROOT / "benchmarks" / "beyond_memory.py"
    words = ["--gib", "0.75", "--limit", "1100", "--method", method]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.rsplit(":", 1)[1]) >= 0.5, done.stdout
