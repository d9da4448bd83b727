"""Rows held out of data on disk: views that pass over them, and comparisons that never copy what is left."""

import numpy as np
import pytest
import torch

from inference import EM, SVI, compare, fit, heldout, lazy_rows
from inference.gaps import Gapped, GappedTable, Gaps
from inference.lazy_rows import HostTable, LazyRows
from inference.methods.em import features
from inference.sparse_rows import FEW, Rows
from zoo import GMM, LDA, MultinomialMixture
from zoo.data.text import Corpus

#: More than the guide of a mixture looks at.
ROWS = 6000


@pytest.fixture
def small_limits(monkeypatch):
    """Tables of some thousand numbers are too large to be made at once."""
    monkeypatch.setattr(lazy_rows, "CELLS", 16_000)
    monkeypatch.setattr("inference.methods.em.features.CELLS", 16_000)
    monkeypatch.setattr("inference.methods.em.mixture.KEEP", 0)
    monkeypatch.setattr(lazy_rows, "PIECE", 2000)
    monkeypatch.setattr(lazy_rows, "LEAST", 100)
    monkeypatch.setattr(heldout, "MOST", 200)
    monkeypatch.setattr(features, "FEATURES", 20_000)


@pytest.mark.parametrize("out", [[], [0], [49], [0, 1, 2], [3, 4, 10, 48, 49], list(range(1, 50, 2))])
def test_a_list_with_gaps_is_the_list_without_them(out):
    """Against `np.delete`: every stretch, stretches of stretches, single numbers and lists of them."""
    x, out = np.arange(50) ** 2, np.array(out, dtype=np.int64)
    found, wanted = Gapped(x, Gaps.of(out)), np.delete(x, out)
    assert len(found) == len(wanted) and np.array_equal(np.asarray(found), wanted)
    for a in range(0, len(wanted), 3):
        for b in range(a, len(wanted) + 1, 4):
            part = found[a:b]
            assert len(part) == b - a and np.array_equal(np.asarray(part), wanted[a:b])
            assert np.array_equal(np.asarray(part[1:-1]), wanted[a:b][1:-1])
    index = np.random.default_rng(0).integers(len(wanted), size=20)
    assert np.array_equal(found[index], wanted[index]) and found[-1] == wanted[-1]
    assert np.array_equal(np.asarray(found[::3]), wanted[::3])


@pytest.mark.parametrize("seed", range(4))
def test_compressed_rows_without_some_are_those_of_the_dense_table(seed):
    """Empty rows among those that stay and those that go; cut, taken and read in every way."""
    random = np.random.default_rng(seed)
    dense = random.integers(0, 3, (40, 6)) * random.integers(0, 2, (40, 6)) * random.integers(0, 2, (40, 1))
    d, v = np.nonzero(dense)
    starts = np.concatenate([[0], np.cumsum(np.bincount(d, minlength=40))])
    out = np.sort(random.choice(40, 13, replace=False))
    rows, wanted = Rows(starts, v, dense[d, v], 6).without(out), np.delete(dense, out, 0)
    assert len(rows) == 27 and rows.widest == (wanted > 0).sum(1).max()
    assert np.array_equal(rows.dense(slice(0, 27), "table", 6), wanted)
    some = random.integers(27, size=9)
    assert np.array_equal(rows.dense(some, "table", 6), wanted[some])
    assert np.array_equal(rows.take(some).dense(slice(0, 9), "table", 6), wanted[some])
    for a, b in [(0, 5), (4, 20), (13, 27), (8, 8)]:
        assert np.array_equal(rows.cut(a, b).dense(slice(0, b - a), "table", 6), wanted[a:b])
        begin, words, counts = rows.stretch(a, b)
        assert begin[0] == 0 and begin[-1] == len(words) == len(counts) == (wanted[a:b] > 0).sum()


def test_a_table_with_gaps_hands_out_the_rows_that_are_left():
    x = torch.randn(100, 3)
    out = np.array([0, 7, 8, 50, 99])
    wanted = x[torch.tensor(np.delete(np.arange(100), out))]
    found = LazyRows(HostTable(x).without(out), torch.float64)
    assert found.shape == (95, 3) and torch.equal(found[:], wanted.double())
    assert torch.equal(found[5:60], wanted[5:60].double()) and torch.equal(found[[3, 94]], wanted[[3, 94]].double())
    assert torch.equal(found.source.cut(5, 60).cut(1, 50).read(slice(0, 49)), wanted[6:55])
    assert torch.allclose(found.mean(0), wanted.double().mean(0))


@pytest.fixture
def mapped(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, 3)) + 4 * random.integers(2, size=(ROWS, 1))
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def test_a_table_on_disk_is_compared_like_the_same_rows_in_memory(mapped, small_limits):
    """Held-out densities and draws are those of a fit to the rows that are left; a row in both parts would show."""
    methods = {"em": EM(restarts=1, tol=1e-12), "svi": SVI(steps=30, starts=1, mode="eager", draws=50), "nuts": "nuts"}
    found = compare(GMM(2, scale=3.0), mapped, methods, seed=0, cross_check=False)
    assert "nuts sees all rows at once" in found.refused["nuts"] and set(found.posteriors) == {"em", "svi"}
    assert found.posteriors["svi"].method.batch_size == 1024
    out = heldout.some_rows(ROWS, 200, torch.Generator().manual_seed(0)).sort().values.numpy()
    posterior = fit(GMM(2, scale=3.0), np.delete(mapped, out, 0), EM(restarts=1, tol=1e-12), seed=0)
    for name, value in posterior.draws.items():
        assert torch.allclose(found.posteriors["em"].draws[name], value, atol=1e-4), name
    assert torch.allclose(found.heldout["em"], posterior.log_prob(mapped[out]), atol=1e-4)
    assert f"{ROWS - 200:,} rows, 200 held out" in found.notes[0] and f"{ROWS // 5:,}" in found.notes[0]


def counts_of(rows, seed=0):
    """Documents of three topics over 30 words."""
    random = np.random.default_rng(seed)
    phi = random.dirichlet(np.full(30, 0.2), 3)
    return np.stack([random.multinomial(25, phi[k]) for k in random.integers(3, size=rows)])


@pytest.mark.parametrize("story", [MultinomialMixture(3), LDA(3)], ids=["mixture", "topics"])
def test_a_corpus_on_disk_is_compared(story, small_limits, tmp_path, monkeypatch):
    """Held-out densities are those of the fit that saw the other documents only, written to a folder of their own."""
    table = counts_of(FEW + 400)
    out = heldout.some_rows(len(table), 200, torch.Generator().manual_seed(0)).sort().values.numpy()
    whole, rest = (Corpus(t).save(tmp_path / n) for t, n in ((table, "whole"), (np.delete(table, out, 0), "rest")))
    found = compare(story, whole, {"em": EM(restarts=1, max_iter=20), "nuts": "nuts"}, seed=0, cross_check=False)
    assert set(found.posteriors) == {"em"} and found.refused["nuts"]
    posterior = fit(story, rest, EM(restarts=1, max_iter=20), seed=0)
    for name, value in posterior.draws.items():
        assert torch.allclose(found.posteriors["em"].draws[name], value, atol=1e-4), name
    assert len(found.heldout["em"]) == 200
    assert torch.allclose(found.heldout["em"], posterior.log_prob(Corpus(table[out])), atol=1e-3)


def test_memory_of_a_comparison_holds_no_copy_of_the_rows(mapped, small_limits, monkeypatch):
    """No block is larger than the limit, whoever asks."""
    seen = []
    read = GappedTable.read
    monkeypatch.setattr(GappedTable, "read", lambda self, rows: seen.append(len(found := read(self, rows))) or found)
    compare(GMM(2, scale=3.0), mapped, [EM(restarts=1)], seed=0, cross_check=False)
    assert seen and max(seen) <= 16_000 // 3
