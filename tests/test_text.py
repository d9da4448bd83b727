"""Corpora: sizes, splits and halves, every format read back, and what is wrong named by document, word, line or byte."""

import gzip
import random

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import torch
from sklearn.datasets import dump_svmlight_file
from sklearn.feature_extraction.text import CountVectorizer

from zoo import Corpus, fetch_corpus, from_texts, load_corpus, read_corpus

TABLE = np.array([[2, 0, 1], [0, 0, 0], [0, 3, 1]])
WORDS = ("bee", "hive", "honey")
LDAC = "2 0:2 2:1\n0\n2 1:3 2:1\n"
UCI = "3\n3\n4\n1 1 2\n1 3 1\n3 2 3\n3 3 1\n"


@pytest.fixture
def ldac(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    path = tmp_path / "bees.ldac"
    path.write_text(LDAC)
    return path


def same(corpus, table=TABLE, words=WORDS):
    assert corpus.vocabulary == words
    np.testing.assert_array_equal(corpus.counts.toarray(), table)


# The object


def test_a_corpus_says_what_it_holds():
    """Sizes taken for each other; an empty document left out of the account."""
    corpus = Corpus(TABLE, WORDS, times=[1990, 1991, 1995], labels=["a", "b", "a"], name="bees")
    assert (len(corpus), corpus.num_words, corpus.num_tokens) == (3, 3, 7)
    assert corpus.lengths.tolist() == [3, 0, 4]
    text = repr(corpus)
    for told in ("3 documents, 3 words, 7 tokens", "1 of them empty", "hive, bee, honey", "1990 to 1995", "a, b"):
        assert told in text


def test_documents_keep_what_belongs_to_them():
    """Labels, times or sequences that stay behind when documents are picked."""
    corpus = Corpus.from_documents([["bee"], ["hive", "bee"], ["hive"]], times=[1, 2, 3], labels=["x", "y", "z"])
    some = corpus[[2, 1]]
    assert some.times.tolist() == [3, 2] and some.labels == ("z", "y")
    assert [s.tolist() for s in some.sequences] == [[1], [1, 0]]
    np.testing.assert_array_equal(some.counts.toarray(), [[0, 1], [1, 1]])
    assert len(corpus[corpus.lengths > 1]) == 1 and len(corpus[:2]) == 2


def test_pruning_renumbers_counts_and_sequences_alike():
    """A word dropped from the table and kept in the texts, or the wrong id after renumbering."""
    corpus = Corpus.from_documents([["a", "b", "c"], ["b", "c", "c"], ["c"], ["d"]])
    fewer = corpus.pruned(min_documents=2, min_length=1)
    assert fewer.vocabulary == ("b", "c") and len(fewer) == 3
    np.testing.assert_array_equal(fewer.counts.toarray(), [[1, 1], [1, 2], [0, 1]])
    assert [s.tolist() for s in fewer.sequences] == [[0, 1], [0, 1, 1], [1]]
    assert corpus.pruned(max_share=0.5).vocabulary == ("a", "b", "d")
    assert corpus.pruned(most=1).vocabulary == ("c",)
    assert corpus.pruned(without=["a", "b"]).vocabulary == ("c", "d")
    with pytest.raises(ValueError, match=r"no word of 'corpus' is left by min_documents=9"):
        corpus.pruned(min_documents=9)


def test_split_shares_out_every_document_once_and_repeats_itself():
    """Test documents among the training ones; a global generator that moves."""
    corpus = Corpus(np.arange(1, 51)[:, None])
    state = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    parts = corpus.split(validation=0.2, test=0.3, seed=1)
    again = corpus.split(validation=0.2, test=0.3, seed=1)
    assert [len(p) for p in parts] == [25, 10, 15]
    assert sorted(int(c) for p in parts for c in p.counts.data) == list(range(1, 51))
    assert all((a.counts != b.counts).nnz == 0 for a, b in zip(parts, again))
    assert (corpus.split(seed=2)[0].counts[:25] != parts[0].counts).nnz
    assert (np.random.get_state()[1] == state[0]).all() and random.getstate() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert [len(p) for p in corpus.split(0, 0)] == [50, 0, 0]
    with pytest.raises(ValueError, match="leave nothing of 50"):
        corpus.split(0.5, 0.5)


def test_halves_add_up_to_the_document():
    """Words lost or counted twice between the half that is seen and the half that is predicted."""
    corpus = load_corpus()[:40]
    a, b = corpus.halves(seed=3)
    assert (a.counts + b.counts != corpus.counts).nnz == 0
    assert (abs(a.lengths - b.lengths) <= 1).all() and a.labels == corpus.labels


def test_padded_forms_hold_the_same_counts():
    """Padding counted as word 0."""
    corpus = Corpus(TABLE, WORDS)
    words, counts = corpus.padded()
    table = np.zeros_like(TABLE)
    for d in range(3):
        np.add.at(table[d], words[d], counts[d])
    np.testing.assert_array_equal(table, TABLE)
    tokens = corpus.padded_tokens()
    np.testing.assert_array_equal([np.bincount(t[t >= 0], minlength=3) for t in tokens], TABLE)


def test_slices_may_be_uneven_and_empty():
    """A year on the edge in two slices, or slices that vanish because no document is in them."""
    corpus = Corpus(np.eye(4, dtype=int), times=[1790, 1799, 1800, 1825])
    assert corpus.slices(10).tolist() == [0, 0, 1, 3]
    assert corpus.slices(10, start=1780).tolist() == [1, 1, 2, 4]
    with pytest.raises(ValueError, match="has no times"):
        Corpus(np.eye(2, dtype=int)).slices()


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda: Corpus.from_pairs([[(0, 1)], [(1, 2), (7, 1)]], 3), ["document 1", "word id 7", "3 words", "0 to 2"]),
        (lambda: Corpus.from_pairs([[(-1, 1)]], 3), ["document 0", "word id -1"]),
        (lambda: Corpus(np.array([[1, 2], [0, -3]])), ["document 1, word 1", "-3"]),
        (lambda: Corpus(sp.csr_matrix([[1.0, 0.0], [1.5, 0.0]])), ["document 1, word 0", "1.5"]),
        (lambda: Corpus(np.array([[1.0, np.nan]])), ["document 0, word 1", "nan"]),
        (lambda: Corpus(TABLE, ("a",)), ["vocabulary", "1 words", "3 columns"]),
        (lambda: Corpus(TABLE, times=[1, 2]), ["times", "2 entries", "3 documents"]),
        (lambda: Corpus(TABLE, times=[1, 2, np.inf]), ["times", "finite"]),
        (lambda: Corpus(np.ones(3)), ["shape (3,)"]),
        (lambda: from_texts([]), ["empty"]),
        (lambda: from_texts(["sound", "bro\0ken"]), ["text 1", "NUL", "character 3"]),
        (lambda: from_texts(["a b"]), ["no words are left of 1 texts"]),
        (lambda: fetch_corpus("rcv1"), ["20newsgroups", "rcv1"]),
    ],
)
def test_what_is_wrong_is_named(make, texts):
    """An error that leaves the user to search for the bad document."""
    with pytest.raises(ValueError) as error:
        make()
    assert all(text in str(error.value) for text in texts), error.value


# Formats


def test_lda_c(ldac):
    same(read_corpus(ldac))
    same(read_corpus(ldac, vocabulary=["x", "y", "z"]), words=("x", "y", "z"))


def test_uci_also_packed(tmp_path):
    path = tmp_path / "docword.bees.txt.gz"
    path.write_bytes(gzip.compress(UCI.encode()))
    (tmp_path / "vocab.bees.txt").write_text("\n".join(WORDS))
    same(read_corpus(path))


def test_matrix_market_and_svmlight_as_their_own_writers_write_them(tmp_path):
    """Ids that count from 1 taken as counting from 0."""
    scipy.io.mmwrite(tmp_path / "bees.mtx", sp.coo_matrix(TABLE))
    same(read_corpus(tmp_path / "bees.mtx", vocabulary=WORDS))
    dump_svmlight_file(sp.csr_matrix(TABLE), [1, 0, 1], str(tmp_path / "bees.svm"), zero_based=False)
    found = read_corpus(tmp_path / "bees.svm", vocabulary=WORDS)
    same(found)
    assert found.labels == ("1", "0", "1")


def test_folders_and_tables_are_cut_into_words_by_scikit_learn(tmp_path):
    """Texts and labels that part company; other words than CountVectorizer's."""
    texts = ["The bee is in the hive.", "Honey, honey: a hive of honey"]
    for n, text in enumerate(texts):
        (tmp_path / "in" / "ab"[n]).mkdir(parents=True)
        (tmp_path / "in" / "ab"[n] / f"{n}.txt").write_text(text)
    (tmp_path / "t.csv").write_text(
        "year,text,kind\n" + "".join(f'{1990 + n},"{t}",k{n}\n' for n, t in enumerate(texts))
    )
    reference = CountVectorizer(token_pattern=r"\b[a-z]{3,}\b").fit(texts)
    folder = read_corpus(tmp_path / "in")
    table = read_corpus(tmp_path / "t.csv", time="year", label="kind")
    for corpus in (folder, table):
        same(corpus, reference.transform(texts).toarray(), tuple(reference.get_feature_names_out()))
        assert [corpus.vocabulary[v] for v in corpus.sequences[1]] == ["honey", "honey", "hive", "honey"]
    assert folder.labels == ("a", "b") and table.labels == ("k0", "k1") and table.times.tolist() == [1990, 1991]
    with pytest.raises(ValueError, match=r"no column 'body'.*'year', 'text', 'kind'"):
        read_corpus(tmp_path / "t.csv", text="body")


def test_the_embedded_corpus_needs_no_network():
    """Only what holds for every version of Python."""
    corpus = load_corpus()
    assert len(corpus) > 100 and corpus.lengths.min() >= 25 and len(set(corpus.labels)) > 20
    assert len(corpus.sequences) == len(corpus) and corpus.sequences[3].size == corpus.lengths[3]


def test_fetchers_offline_say_what_to_do(monkeypatch, tmp_path):
    """A stack of urllib errors."""
    from sklearn import datasets

    def offline(**settings):
        raise OSError("name resolution failed")

    monkeypatch.setattr(datasets, "fetch_20newsgroups", offline)
    with pytest.raises(OSError, match=r"could not be downloaded: name resolution failed.*load_corpus"):
        fetch_corpus()


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.ldac", b"2 0:1 9:1\n", ["document 0", "word id 9", "3 words"]),
        ("a.ldac", b"2 0:1\n", ["line 1", "2 words", "lists 1"]),
        ("a.ldac", b"1 0:1\n\n1 0:1\n", ["line 2", "blank", "'0'"]),
        ("a.ldac", b"1 0;1\n", ["line 1", "'0;1'"]),
        ("a.ldac", b"1 0:-1\n", ["document 0", "-1"]),
        ("a.ldac", b"1 0:1\n1 \x00:1\n", ["a.ldac", "NUL byte at offset 8"]),
        ("a.ldac", b"", ["empty"]),
        ("docword.a.txt", b"1\n3\n1\n1 4 1\n", ["document 0", "word id 3"]),
        ("docword.a.txt", b"1\n3\n2\n1 1 1\n", ["2 entries", "3 numbers"]),
        ("docword.a.txt", b"1\n3\n1\n2 1 1\n", ["document 2", "1 to 1"]),
        ("a.mtx", b"no matrix", ["a.mtx", "Matrix Market"]),
        ("a.svm", b"1 1:one\n", ["line 1", "'1:one'"]),
        ("a.ldac.gz", b"no gzip", ["gzip"]),
        ("a.xyz", b"1", ["tells no format", "lda-c"]),
        ("a.csv", b"text\n\xe9t\xe9\n", ["a.csv", "0xe9", "offset 5", "encoding='latin-1'"]),
        ("a.csv", b"\xff\xfet\x00e\x00", ["a.csv", "offset 0", "encoding='utf-16'"]),
        ("a.csv", b"text,kind\none\n", ["row 2", "1 cells", "2"]),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, texts):
    """File, line, document or byte offset missing from the message."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_corpus(tmp_path / name)
    assert all(text in str(error.value) for text in texts), error.value


def test_encodings_are_taken_when_told(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nété hiver\n".encode("latin-1"))
    assert read_corpus(tmp_path / "a.csv", encoding="latin-1").vocabulary == ("hiver", "été")


def test_links_out_of_a_folder_are_refused(tmp_path):
    """A corpus that smuggles in another file."""
    (tmp_path / "secret.txt").write_text("secret words")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"a\.txt is a link to .*outside the folder"):
        read_corpus(tmp_path / "in")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_corpus(tmp_path / "nowhere")
