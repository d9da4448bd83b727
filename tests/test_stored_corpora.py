"""Corpora and sparse tables on disk: what comes back is what was stored, and answers are those of memory, bit by bit."""

import builtins
import json
import threading

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from inference import EM, SVI, Gibbs, fit, lazy_rows, load, rehearsal, sparse_rows
from inference.lazy_rows import LazyRows
from inference.sparse_rows import Counts, Rows
from inference.topics import shares, streamed, visits
from inference.topics.documents import Documents
from zoo import GMM, LDA, Corpus, MultinomialMixture, TokenLDA, load_corpus, open_corpus, open_table, store_corpus
from zoo.data import mapped, stored

EVERYTHING = {
    "vocabulary": ("bee", "hive", "wax"),
    "times": np.array([1990, 1991]),
    "labels": ("a", "b"),
    "authors": ("x", "y"),
    "titles": ("t", "u"),
    "name": "bees",
}


@pytest.fixture(scope="module")
def corpus():
    """Passages of Python's manual: some 500, as this Python has them."""
    return load_corpus()


@pytest.fixture(scope="module")
def on_disk(corpus, tmp_path_factory):
    return corpus.save(tmp_path_factory.mktemp("corpora") / "manual")


@pytest.fixture(scope="module")
def narrow(corpus):
    """The same documents over their sixty most frequent words."""
    return corpus.pruned(most=60)


@pytest.fixture
def few_rows(monkeypatch):
    """Small corpora are treated as large ones are."""
    monkeypatch.setattr(sparse_rows, "FEW", 0)
    monkeypatch.setattr(rehearsal, "MANY_ROWS", 100)


# -- files -----------------------------------------------------------------------------------------------------------


def test_everything_of_a_corpus_comes_back(tmp_path):
    """Counts, words, times, lists and sequences; none of the numbers is read to open it."""
    first = Corpus.from_sequences([[0, 1, 0], [2]], **EVERYTHING)
    kept = first.save(tmp_path / "bees")
    assert kept.on_disk and isinstance(kept.counts.data, np.memmap) and sparse_rows.is_mapped(kept.times)
    np.testing.assert_array_equal(kept.counts.toarray(), first.counts.toarray())
    np.testing.assert_array_equal(kept.times, first.times)
    assert [s.tolist() for s in kept.sequences] == [[0, 1, 0], [2]] and kept.sequences[-1].tolist() == [2]
    for name in ("vocabulary", "labels", "authors", "titles", "name"):
        assert getattr(kept, name) == getattr(first, name)
    assert repr(kept) == repr(first) and kept.num_tokens == 4 and kept.lengths.tolist() == [3, 1]
    part = kept[1:]
    assert not part.on_disk and part.counts.dtype == np.int64 and part.sequences[0].tolist() == [2]


def test_parts_become_one_corpus(corpus, tmp_path, monkeypatch):
    """Rows in their order, whatever the parts; positions are kept in 64 bits where there are many."""
    monkeypatch.setattr(stored, "LONG", 10_000)
    monkeypatch.setattr(stored, "ENTRIES", 777)
    kept = store_corpus(tmp_path / "all", (corpus[a : a + 100] for a in range(0, len(corpus), 100)))
    assert (kept.counts != corpus.counts).nnz == 0 and len(kept.sequences) == len(corpus.sequences)
    assert kept.counts.indptr.dtype == kept.counts.indices.dtype == np.int64
    again = store_corpus(tmp_path / "again", [kept], name="again")
    assert again.name == "again" and (again.counts != corpus.counts).nnz == 0


@pytest.mark.parametrize("compressed", [True, False])
def test_a_matrix_that_scipy_saved_is_stored_once(corpus, tmp_path, monkeypatch, compressed):
    """In pieces, with doubled entries added up; the second time the folder is opened."""
    monkeypatch.setattr(stored, "ENTRIES", 500)
    c = corpus.counts
    doubled = sp.csr_matrix((np.repeat(c.data, 2), np.repeat(c.indices, 2), 2 * c.indptr), shape=c.shape)
    sp.save_npz(tmp_path / "counts.npz", doubled, compressed=compressed)
    kept = open_corpus(tmp_path / "counts.npz", vocabulary=corpus.vocabulary)
    assert kept.name == "counts" and kept.vocabulary == corpus.vocabulary
    assert (kept.counts != 2 * c).nnz == 0
    (tmp_path / "counts.npz").write_bytes(b"")  # not looked at again
    assert len(open_corpus(tmp_path / "counts.npz")) == len(corpus)


def test_faults_of_folders_are_told(corpus, tmp_path):
    kept = corpus[:3].save(tmp_path / "a")
    with pytest.raises(FileExistsError, match="is there already"):
        kept.save(tmp_path / "a")
    with pytest.raises(ValueError, match="documents from 3 on are counted over 2 words"):
        store_corpus(tmp_path / "b", [corpus[:3], np.ones((1, 2), int)])
    with pytest.raises(ValueError, match="no parts"):
        store_corpus(tmp_path / "b", [])
    with pytest.raises(ValueError, match="labels are known of 3 documents and there are 4"):
        store_corpus(tmp_path / "b", [corpus[:3], corpus.counts[:1]])
    assert not list(tmp_path.glob("b*"))
    with pytest.raises(FileNotFoundError):
        open_corpus(tmp_path / "c")
    np.save(tmp_path / "a" / "data.npy", np.zeros(5, np.int32))
    with pytest.raises(ValueError, match="is damaged"):
        open_corpus(tmp_path / "a")
    card = json.loads((tmp_path / "a" / "corpus.json").read_text())
    (tmp_path / "a" / "corpus.json").write_text(json.dumps({**card, "version": 99}))
    with pytest.raises(ValueError, match="layout 99"):
        open_corpus(tmp_path / "a")


def test_parquet_becomes_a_map_once(tmp_path, monkeypatch):
    """Row groups one after the other, empty cells NaN, columns by name."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(mapped, "ROWS", 7)
    random = np.random.default_rng(0)
    a, b = random.standard_normal(50), random.integers(0, 9, 50).astype(object)
    b[3] = None
    table = pa.table({"a": a, "b": pa.array(b.tolist(), pa.int32()), "word": ["x"] * 50})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20)
    x = open_table(tmp_path / "t.parquet", ["b", "a"], dtype="float64")
    assert isinstance(x, np.memmap) and np.isnan(x[3, 0])
    np.testing.assert_array_equal(x[:, 1], a)
    np.testing.assert_array_equal(np.delete(x[:, 0], 3), np.delete(b, 3).astype(float))
    with pytest.raises(ValueError, match="hold no numbers"):
        open_table(tmp_path / "t.parquet", keep=tmp_path / "other.npy")
    with pytest.raises(ValueError, match=r"no columns.*'c'"):
        open_table(tmp_path / "t.parquet", ["c"], keep=tmp_path / "other.npy")
    before = (tmp_path / "t.npy").stat().st_mtime_ns
    open_table(tmp_path / "t.parquet", ["b", "a"], dtype="float64")
    assert (tmp_path / "t.npy").stat().st_mtime_ns == before
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda n, *r: _missing(n) if "pyarrow" in n else real(n, *r))
    with pytest.raises(ImportError, match="needs pyarrow"):
        open_table(tmp_path / "t.parquet", keep=tmp_path / "other.npy")


def _missing(name):
    raise ImportError(name)


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["table", "words", "counts"])
def test_rows_are_those_of_the_dense_table(corpus, on_disk, view):
    """Slices, numbers, masks, single rows; words and counts side by side are those that `padded` makes."""
    c = on_disk.counts
    words, counts = corpus.padded()
    dense = {"table": corpus.counts.toarray(), "words": words, "counts": counts}[view]
    x = LazyRows(Counts(Rows(c.indptr, c.indices, c.data, c.shape[1]), view, dense.shape[1]), torch.float64)
    full = torch.from_numpy(dense).double()
    mask = torch.arange(len(corpus)) % 3 == 0
    for index in (
        slice(3, 40),
        slice(0, 0),
        slice(None, None, 7),
        torch.tensor([5, 1, -1, 5]),
        mask,
        7,
        (slice(2, 9), 1),
    ):
        assert torch.equal(x[index], full[index]), index
    assert x.shape == full.shape and len(x) == len(corpus) and x.ndim == 2 and x.dtype == torch.float64
    assert torch.equal(torch.cat(list(x.split(100))), full) and torch.equal((x + 1), full + 1)
    assert x.to(torch.float32)[:3].dtype == torch.float32
    with pytest.raises(IndexError):
        x[torch.tensor([len(corpus)])]


def test_a_table_that_is_too_large_is_never_made_whole(on_disk, monkeypatch):
    """It is told what asks, how much that is, and what to do; large slices stay as they are."""
    monkeypatch.setattr(lazy_rows, "CELLS", 1000)
    monkeypatch.setattr(lazy_rows, "LEAST", 50)
    c = on_disk.counts
    x = LazyRows(Counts(Rows(c.indptr, c.indices, c.data, c.shape[1]), "table", c.shape[1]), torch.long)
    with pytest.raises(ValueError, match=rf"cumsum on all rows: {len(x)} rows x {c.shape[1]:,} .*SVI\(batch_size"):
        x.cumsum(0)
    dense = torch.from_numpy(c.toarray()).long()
    assert torch.equal(x.sum(0), dense.sum(0)) and torch.equal(x.sum(-1), dense.sum(-1)) and x.sum() == dense.sum()
    part = x[100:400]
    assert isinstance(part, LazyRows) and torch.equal(part[5], x[105]) and len(part) == 300


def test_sparse_counts_in_memory_are_taken(narrow):
    """Whole numbers only; of small tables the dense form is made at once."""
    a = fit(MultinomialMixture(2), narrow.counts, EM(restarts=1), seed=0)
    b = fit(MultinomialMixture(2), narrow.counts.toarray(), EM(restarts=1), seed=0)
    assert torch.equal(a.draws["phi"], b.draws["phi"])
    bad = narrow.counts.copy()
    bad.data[7] = -1
    with pytest.raises(ValueError, match="x: row 0 has count -1"):
        fit(MultinomialMixture(2), bad, "em")


# -- fits ------------------------------------------------------------------------------------------------------------


def test_mixtures_of_documents_on_disk(narrow, few_rows, monkeypatch, tmp_path):
    """The answer of the dense table in memory from compressed rows, to 1e-9; no dense block is a tenth of the table."""
    monkeypatch.setattr("inference.methods.em.counted.ENTRIES", 300)
    monkeypatch.setattr("inference.methods.em.mixture.KEEP", 0)
    monkeypatch.setattr("inference.methods.em.features.TURN", 0)
    monkeypatch.setattr("inference.methods.batches.JUDGED", 40)
    monkeypatch.setattr("inference.methods.em.start.SAMPLE", 60)
    monkeypatch.setattr("inference.methods.em.plan.PLAN_ROWS", 60)
    monkeypatch.setattr("inference.shapes.PIECE_ROWS", 64)
    monkeypatch.setattr(lazy_rows, "CELLS", 64 * 60)
    monkeypatch.setattr("inference.methods.em.features.CELLS", 64 * 60)
    monkeypatch.setattr(lazy_rows, "LEAST", 256)
    method, on_disk = EM(restarts=2, max_iter=20), narrow.save(tmp_path / "narrow")
    dense = fit(MultinomialMixture(3), narrow.counts.toarray(), method, seed=0)
    largest: list[int] = []
    read = Counts.read

    def counted(self, rows):
        largest.append(lazy_rows.length(rows))
        return read(self, rows)

    monkeypatch.setattr(Counts, "read", counted)
    sparse = fit(MultinomialMixture(3), on_disk, method, seed=0)
    for name, value in dense.draws.items():
        torch.testing.assert_close(sparse.draws[name], value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sparse.history, dense.history, rtol=1e-9)
    assert largest and max(largest) <= 256
    torch.testing.assert_close(sparse.local("z"), dense.local("z"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sparse.log_prob(), dense.log_prob(), rtol=1e-9, atol=0)


@pytest.mark.slow
def test_batches_of_documents_on_disk(narrow, few_rows, tmp_path):
    """The end is that of the table in memory: a wrong weight of the batch, or of the rows it is judged on, would show."""
    method = SVI(batch_size=64, steps=150, starts=1, draws=30, lr=0.05, particles=2)
    dense = fit(MultinomialMixture(2), narrow.counts.toarray(), method, seed=0)
    sparse = fit(MultinomialMixture(2), narrow.save(tmp_path / "narrow"), method, seed=0)
    a, b = sparse.diagnostics["elbo"], dense.diagnostics["elbo"]
    assert abs(a / b - 1) < 0.02, (a, b)


@pytest.mark.parametrize("driver", ["stepwise", "batch"])
@pytest.mark.parametrize("learned", [False, True])
def test_topics_of_documents_on_disk(corpus, on_disk, few_rows, monkeypatch, driver, learned):
    """The same passes in memory give the same topics, to the last bit; no run of documents is longer than it may be."""
    monkeypatch.setattr(streamed, "SAMPLE", 150)
    story = LDA(5, None, None) if learned else LDA(5)
    method = EM(restarts=2, max_iter=8, driver=driver)
    cut, longest = Documents.cut, []
    monkeypatch.setattr(Documents, "cut", lambda self, a, b: longest.append(b - a) or cut(self, a, b))
    first, second = (fit(story, data, method, seed=0) for data in (corpus, on_disk))
    if second.diagnostics["device"].startswith("cpu"):  # on a card the counts stay
        assert max(longest) <= visits.FEWEST
    assert second.problem.admixture.documents(second.problem.kwargs).on_disk
    for name, value in first.draws.items():
        assert torch.equal(second.draws[name], value), name
    assert first.history == second.history and len(first.history) <= 8
    gains = np.diff(first.history[: None if not learned else 3])
    assert (gains > -1e-4 * abs(first.history[0])).all()


def test_streamed_topics_are_as_good_as_those_in_memory(corpus, on_disk, few_rows):
    """Held-out perplexity within two percent of the engine that keeps every word's topic."""
    from inference.topics import perplexity

    train, _, held = corpus.split(validation=0.0, test=0.2, seed=0)
    kept, streams = (fit(LDA(6), train, EM(restarts=2, driver=d), seed=0) for d in ("incremental", "stepwise"))
    values = [perplexity(p, held).value for p in (kept, streams)]
    assert values[1] < 1.02 * values[0], values


@pytest.mark.slow
def test_variational_bounds_on_disk(corpus, on_disk, few_rows):
    """Natural gradients without a document kept: the same bound as with all of them."""
    svi = SVI(steps=40, starts=1, draws=30)
    kept, streams = (fit(LDA(5), data, svi, seed=0) for data in (corpus, on_disk))
    assert abs(kept.diagnostics["elbo"] / streams.diagnostics["elbo"] - 1) < 1e-3


def test_natural_gradients_of_documents_on_disk(corpus, on_disk):
    """Bit by bit those of the same documents in memory."""
    alpha, eta = torch.full((5,), 0.1), torch.full((5, 1068), 0.05)
    runs = [streamed.StreamedBayes(Documents.of(c), alpha, eta, seed=1) for c in (corpus, on_disk)]
    for run in runs:
        run.stochastic_pass()
        run.sweep()
    assert torch.equal(runs[0].lam, runs[1].lam)


def test_shares_are_written_piece_by_piece(corpus, on_disk, few_rows, tmp_path, monkeypatch):
    """Those that are answered at once; and local answers for part of the corpus. No table of all documents is ever made."""
    monkeypatch.setattr(lazy_rows, "CELLS", 5000)
    monkeypatch.setattr(lazy_rows, "LEAST", 60)
    posterior = fit(LDA(4), on_disk, EM(restarts=1, max_iter=5), seed=0)
    whole = shares(posterior)
    monkeypatch.setattr("inference.topics.answers.WRITTEN", 97)
    written = shares(posterior, path=tmp_path / "theta.npy")
    np.testing.assert_allclose(np.load(tmp_path / "theta.npy"), whole.numpy(), atol=1e-4)
    n = len(corpus)
    assert written.shape == (n, 4)
    assert posterior.local("theta").shape[1:] == (n, 4) and posterior.log_prob().shape == (n,)
    assert f"{n} rows" in str(posterior.summary())
    np.testing.assert_allclose(shares(posterior, corpus[100:120]), whole[100:120], atol=1e-5)


def test_a_saved_answer_holds_some_documents_and_says_so(corpus, on_disk, few_rows, tmp_path, monkeypatch):
    """Not a corpus of any size; topics and questions about new documents are those of the fit."""
    monkeypatch.setattr("inference.checkpoint.KEPT_ROWS", 30)
    posterior = fit(LDA(3), on_disk, EM(restarts=1, max_iter=4), seed=0)
    again = load(posterior.save(tmp_path / "answer"), LDA(3))
    assert torch.equal(again.draws["phi"], posterior.draws["phi"]) and len(shares(again)) == 30
    assert any(f"{len(corpus)} rows of the fit were not saved" in w for w in again.warnings)
    np.testing.assert_allclose(shares(again, corpus[40:50]), shares(posterior, corpus[40:50]), atol=1e-6)


def test_the_command_line_reads_what_is_on_disk(narrow, tmp_path, monkeypatch):
    """A folder is a corpus; a large table is mapped."""
    from zoo.cli import tables

    narrow.save(tmp_path / "narrow")
    found = tables.stored_arguments(LDA(2), str(tmp_path / "narrow"))
    assert set(found) == {"words", "w", "num_words"} and found["num_words"] == 60
    posterior = fit(LDA(2), found, EM(restarts=1, max_iter=3), seed=0)
    assert posterior.draws["phi"].shape == (1, 2, 60)
    np.save(tmp_path / "x.npy", np.zeros((5, 2)))
    assert tables.stored_arguments(GMM(2), str(tmp_path / "x.npy")) == {}
    monkeypatch.setattr(tables, "MAPPED", 1)
    assert isinstance(tables.stored_arguments(GMM(2), str(tmp_path / "x.npy"))["x"], np.memmap)


def test_methods_that_see_all_rows_are_refused_in_time(narrow, few_rows, monkeypatch, tmp_path):
    """Before any work, with the way out."""
    on_disk = narrow.save(tmp_path / "narrow")
    monkeypatch.setattr(lazy_rows, "CELLS", 10_000)
    monkeypatch.setattr(lazy_rows, "LEAST", 100)
    with pytest.raises(ValueError, match=r"SVI without batch_size sees all rows.*SVI\(batch_size"):
        fit(MultinomialMixture(3), on_disk, SVI(steps=5, batch_size=None), seed=0)
    with pytest.raises(ValueError, match="nuts sees all rows at once"):
        fit(MultinomialMixture(3), on_disk, "nuts", seed=0)
    assert not [t for t in threading.enumerate() if t.name == "reads ahead" and t.is_alive() and not t.daemon]


def test_stories_that_tell_every_word_take_small_corpora_only(narrow, few_rows, tmp_path, monkeypatch):
    """A topic for every word is held in memory: a large corpus is refused with its size before its words are read."""
    on_disk = narrow.save(tmp_path / "narrow")
    kept = fit(TokenLDA(2), on_disk, Gibbs(chains=1, warmup=2, draws=2), seed=0)
    assert kept.draws["phi"].shape == (2, 2, 60)
    monkeypatch.setattr(stored, "TOLD", 2000)
    monkeypatch.setattr(type(on_disk), "tokens", lambda *_: pytest.fail("words were read"))
    with pytest.raises(ValueError, match=r"tells every word of its .* documents: at least .*LDA"):
        fit(TokenLDA(2), on_disk, "gibbs")
    monkeypatch.setattr(lazy_rows, "CELLS", 1000)
    monkeypatch.setattr(lazy_rows, "LEAST", 100)
    with pytest.raises(ValueError, match=r"gibbs sees all rows at once: .* rows x .* MB"):
        fit(LDA(2), on_disk, "gibbs")
