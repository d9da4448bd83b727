"""Files that are not as they should be: a clear error before machine code meets them, or the right answer."""

import os
import resource
import shutil
import signal

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from inference import EM, SVI, fit
from inference.topics import shares
from zoo import DTM, GMM, LDA, Corpus, MultinomialMixture, open_corpus, open_table, store_corpus
from zoo.data import mapped

EM_SHORT = EM(restarts=1, max_iter=3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """1,500 documents over 40 words, half of them empty, in two slices."""
    random = np.random.default_rng(0)
    table = random.poisson(0.4, (1500, 40))
    table[::2] = 0
    corpus = Corpus(table, times=np.repeat([0, 1], 750))
    return corpus, corpus.save(tmp_path_factory.mktemp("corpora") / "full")


@pytest.fixture
def folder(stored, tmp_path):
    """A copy of the corpus's folder that may be damaged."""
    source = tmp_path / "copy"
    stored[1].counts.indptr  # noqa: B018 - the corpus outlives the copy
    shutil.copytree(os.path.dirname(stored[1].counts.data.filename), source)
    return source


@pytest.mark.parametrize("name", ["indptr", "indices", "data", "times"])
@pytest.mark.parametrize("left", [0.5, 0.0])
def test_a_file_that_was_cut_is_told(folder, name, left):
    file = folder / f"{name}.npy"
    os.truncate(file, int(file.stat().st_size * left))
    with pytest.raises(ValueError, match=f"is damaged: {name}.npy"):
        open_corpus(folder)


STORIES = {
    "lda": (LDA(3), EM_SHORT),
    "lda svi": (LDA(3), SVI(steps=3, starts=1)),
    "dtm": (DTM(2, drift=0.4), EM(max_iter=3)),
    "mixture": (MultinomialMixture(3), EM_SHORT),
}


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize(
    ("file", "value", "told"),
    [
        ("indices", 10**6, "a word 1000000 in a vocabulary of 40"),
        ("indices", -3, "a word -3"),
        ("data", -5, "a count of -5"),
        ("indptr", 3, "not in order"),
        ("indptr", 10**7, "not in order"),
    ],
)
def test_numbers_that_no_counts_can_have_are_told(folder, name, file, value, told):
    """Late in the file, where a look at the first rows would not find them; machine code would write out of its tables."""
    numbers = np.load(folder / f"{file}.npy")
    numbers[-len(numbers) // 4] = value
    np.save(folder / f"{file}.npy", numbers)
    with pytest.raises(ValueError, match=f"damaged: .*{told}"):
        fit(STORIES[name][0], open_corpus(folder), STORIES[name][1], seed=0, progress=False)


def test_counts_that_are_no_whole_numbers_are_told(folder):
    np.save(folder / "data.npy", np.load(folder / "data.npy") / 2)
    with pytest.raises(ValueError, match=r"data.npy holds float64 .* whole numbers"):
        open_corpus(folder)


@pytest.mark.parametrize("name", STORIES)
def test_folders_that_may_only_be_read_and_empty_documents(folder, name):
    """Nothing is written beside a corpus; documents without words change nothing."""
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir())
    posterior = fit(STORIES[name][0], open_corpus(folder), STORIES[name][1], seed=0, progress=False)
    folder.chmod(0o755)
    assert all(bool(v.isfinite().all()) for v in posterior.draws.values())
    assert sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir()) == before


@pytest.mark.parametrize("name", ["lda", "mixture"])
def test_corpora_of_nothing(tmp_path, name):
    """Documents without a word leave the prior; no documents and no words are told."""
    story, method = STORIES[name]
    empty = store_corpus(tmp_path / "empty", [sp.csr_matrix((1500, 5), dtype=int)])
    phi = fit(story, empty, method, seed=0).draws["phi"]
    assert torch.allclose(phi, torch.full_like(phi, 0.2), atol=1e-6)
    one = store_corpus(tmp_path / "one", [np.array([[3, 0, 1]])])
    assert fit(story, one, method, seed=0).draws["phi"].shape == (1, 3, 3)
    for shape in ((0, 5), (1500, 0)):
        with pytest.raises(ValueError):
            fit(story, store_corpus(tmp_path / f"none{shape[0]}", [sp.csr_matrix(shape, dtype=int)]), method, seed=0)


@pytest.fixture
def room():
    """A limit on the size of files, as a full disk is one."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_nothing_is_left(stored, tmp_path, room):
    """Shares, corpora and tables; what was there before stays."""
    corpus, on_disk = stored
    posterior = fit(LDA(3), on_disk, EM_SHORT, seed=0)
    np.save(tmp_path / "theta.npy", np.zeros(3))
    np.save(tmp_path / "swapped.npy", np.zeros((1000, 9), ">f8"))
    room(4096)
    with pytest.raises(OSError, match=r"1,500 x 3 numbers need .* MB at .*theta.npy"):
        shares(posterior, path=tmp_path / "theta.npy")
    with pytest.raises(OSError, match="was not stored, and nothing of it is left"):
        store_corpus(tmp_path / "corpus", [corpus])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="was not written"):
        patch.setattr(mapped, "COPIED", 10)
        open_table(tmp_path / "swapped.npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["swapped.npy", "theta.npy"]
    assert np.load(tmp_path / "theta.npy").tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [">f8", "<f2", ">f4", "<i4", ">i8", "u1", "u8", "fortran"])
def test_tables_that_cannot_be_mapped_as_they_lie_are_written_once(tmp_path, monkeypatch, kind):
    """Number by number the same, and the fit is that of the array."""
    monkeypatch.setattr(mapped, "COPIED", 100)
    monkeypatch.setattr(mapped, "ROWS", 64)
    random = np.random.default_rng(0)
    x = (8 * random.integers(2, size=(500, 1)) + random.standard_normal((500, 3))).clip(0)
    x = np.asfortranarray(x) if kind == "fortran" else np.floor(x).astype(kind) if kind[-2] in "iu" else x.astype(kind)
    np.save(tmp_path / "x.npy", x)
    table = open_table(tmp_path / "x.npy")
    assert isinstance(table, np.memmap) and table.flags.c_contiguous and table.dtype.isnative
    assert table.dtype.itemsize in (4, 8) and np.array_equal(table, x)
    written = (tmp_path / "x.plain.npy").stat().st_mtime_ns
    found, wanted = (fit(GMM(2), data, EM_SHORT, seed=0).draws["mu"] for data in (open_table(tmp_path / "x.npy"), x))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "x.plain.npy").stat().st_mtime_ns == written


def test_parquet_is_read_anew_for_other_columns(tmp_path):
    """The file that it became holds what was asked for; one of the same name that came from elsewhere is left alone."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).standard_normal((50, 2))
    pq.write_table(pa.table({"a": x[:, 0], "b": x[:, 1]}), tmp_path / "t.parquet")
    assert np.array_equal(open_table(tmp_path / "t.parquet", ["a"], dtype="float64"), x[:, :1])
    assert np.array_equal(open_table(tmp_path / "t.parquet", ["b", "a"], dtype="float64"), x[:, ::-1])
    assert open_table(tmp_path / "t.parquet").dtype == np.float32
    with pytest.raises(ValueError, match="columns is empty"):
        open_table(tmp_path / "t.parquet", [])
    np.save(tmp_path / "u.npy", x)
    shutil.copy(tmp_path / "t.parquet", tmp_path / "u.parquet")
    with pytest.raises(ValueError, match=r"was not made from u\.parquet; .*keep="):
        open_table(tmp_path / "u.parquet")
    twice = pa.Table.from_arrays([pa.array(x[:, 0]), pa.array(x[:, 1])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "v.parquet")
    with pytest.raises(ValueError, match=r"several columns of the name \['a'\]"):
        open_table(tmp_path / "v.parquet")


def test_a_file_replaced_while_fitting_changes_nothing(folder):
    """A new file under the old name is another file: the fit goes on with the one it opened."""
    wanted = fit(LDA(3), open_corpus(folder), EM(restarts=1, max_iter=4, tol=0.0), seed=0).draws["phi"]

    def replace(*_):
        np.save(folder / "new.npy", np.full(3, 7, np.int32))
        os.replace(folder / "new.npy", folder / "indices.npy")

    method = EM(restarts=1, max_iter=4, tol=0.0, callback=replace)
    assert torch.equal(fit(LDA(3), open_corpus(folder), method, seed=0).draws["phi"], wanted)
    with pytest.raises(ValueError, match=r"is damaged: .* 3 words"):
        open_corpus(folder)
