"""Corpora from files in the field's formats, from texts, from scikit-learn, and one that needs neither file nor network."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..imports import bring
from .text import Corpus, check_ids
from .text_tables import decode, decode_bytes

#: What a format is told by, where none is named.
_ENDINGS = {
    ".ldac": "lda-c",
    ".lda-c": "lda-c",
    ".dat": "lda-c",
    ".mtx": "matrix market",
    ".svm": "svmlight",
    ".svmlight": "svmlight",
    ".libsvm": "svmlight",
    ".csv": "table",
    ".tsv": "table",
}
FORMATS = ("lda-c", "uci", "matrix market", "svmlight", "table", "folder")
#: Words of at least three letters: figures and single letters say little about a topic.
WORD = r"(?u)\b[^\W\d_]{3,}\b"


def read_corpus(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    vocabulary: str | os.PathLike[str] | Sequence[str] | None = None,
    encoding: str = "utf-8",
    text: str = "text",
    time: str | None = None,
    label: str | None = None,
    author: str | None = None,
    **vectorizer: Any,
) -> Corpus:
    """Documents from a file or a folder.

    Parameters
    ----------
    path
        LDA-C (a line a document, `N id:count id:count ...`), UCI bag of words (three header lines, then `document word
        count`, from 1), Matrix Market, SVMlight (`label id:count ...`, from 1), a CSV or TSV with a column of texts, or a
        folder with a file a document. All but folders may end in .gz.
    format
        One of `FORMATS`; None goes by the file's name.
    vocabulary
        A file with a word a line, or the words; None takes vocab.txt beside the file, if that is there.
    encoding
        Of all text.
    text, time, label, author
        Columns of a table. In a folder of folders, the inner folders are labels.
    **vectorizer
        Of scikit-learn's `CountVectorizer`, for texts: `stop_words="english"`, `min_df=3`, `max_df=0.5`, ...

    Raises
    ------
    FileNotFoundError
        Nothing there to read.
    ValueError
        An unknown format, a wrong encoding or a NUL byte (file and byte offset), a line that is none of the format (file
        and line), a word id beyond the vocabulary (document and id), a link that leads out of the folder.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"there is no file or folder {place}")
    kind = format or _guess(place)
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}, got {format!r}")
    if kind == "folder":
        corpus = _folder(place, encoding, vectorizer)
    elif kind == "table":
        corpus = _table(place, encoding, {"text": text, "time": time, "label": label, "author": author}, vectorizer)
    else:
        if vectorizer:
            raise TypeError(f"{sorted(vectorizer)} belong to texts; {kind} holds counts already: use Corpus.pruned")
        words = _vocabulary(place, vocabulary, encoding)
        content = _content(place, encoding)
        reader: Callable = {"lda-c": _ldac, "uci": _uci, "matrix market": _market, "svmlight": _svmlight}[kind]
        corpus = reader(content, place.name, words)
    return replace(corpus, name=place.name.split(".")[0] or place.name, source=str(path))


def from_texts(texts: Sequence[str], **about: Any) -> Corpus:
    """A corpus from whole texts, cut into words by scikit-learn's `CountVectorizer`; the order of words is kept.

    Parameters
    ----------
    texts
        One a document.
    **about
        Attributes of `Corpus` (`times`, `labels`, ...); all else goes to `CountVectorizer`. By default words have three
        letters at least.

    Raises
    ------
    ValueError
        No texts, one that holds a NUL byte, or no word that is left by the settings.
    """
    ours = {k: about.pop(k) for k in list(about) if k in Corpus.__dataclass_fields__ and k != "vocabulary"}
    if not len(texts):
        raise ValueError("texts is empty: there is no document")
    for n, one in enumerate(texts):
        if not isinstance(one, str):
            raise TypeError(f"text {n} is {type(one).__name__}, expected str; decode bytes first")
        if "\0" in one:
            raise ValueError(f"text {n} holds a NUL byte at character {one.index(chr(0))}: it is no text")
    vectorizer = bring("sklearn.feature_extraction.text").CountVectorizer(**{"token_pattern": WORD, **about})
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise ValueError(f"no words are left of {len(texts)} texts: {error}") from None
    words = tuple(str(w) for w in vectorizer.get_feature_names_out())
    ids, cut = {word: v for v, word in enumerate(words)}, vectorizer.build_analyzer()
    sequences = tuple(np.array([ids[w] for w in cut(one) if w in ids], dtype=np.int64) for one in texts)
    return Corpus(counts, words, sequences=sequences, **ours)


def fetch_corpus(name: str = "20newsgroups", **settings: Any) -> Corpus:
    """A corpus that scikit-learn downloads once: "20newsgroups".

    Parameters
    ----------
    **settings
        Of `fetch_20newsgroups` (`subset`, `categories`, `remove`, `data_home`), and of `CountVectorizer`.

    Raises
    ------
    ValueError
        Another name.
    OSError
        No network and nothing in scikit-learn's cache.
    """
    datasets = bring("sklearn.datasets")

    if name != "20newsgroups":
        why = "; rcv1 holds weights and no counts" if name == "rcv1" else ""
        raise ValueError(f"fetch_corpus knows '20newsgroups', got {name!r}{why}; without a network use load_corpus()")
    known = ("data_home", "subset", "categories", "remove", "download_if_missing")
    fetch = {k: settings.pop(k) for k in known if k in settings}
    try:
        bunch = datasets.fetch_20newsgroups(**fetch)
    except OSError as error:
        raise OSError(
            f"20newsgroups is not in scikit-learn's cache ({datasets.get_data_home()}) and could not be downloaded: {error}. "
            "Fetch it once with a network, or use load_corpus(), which needs none"
        ) from None
    labels = tuple(bunch.target_names[t] for t in bunch.target)
    texts = [one.replace("\0", " ") for one in bunch.data]
    defaults = {"stop_words": "english", "min_df": 5, "max_df": 0.5}
    return from_texts(
        texts,
        labels=labels,
        name=name,
        description="Postings to twenty newsgroups.",
        source="Lang, ICML 1995; fetched by scikit-learn",
        **{**defaults, **settings},
    )


def load_corpus(min_words: int = 25) -> Corpus:
    """Python's own manual (`pydoc_data.topics`): passages about statements, types and operators.  No download.

    Its text differs from one version of Python to the next: nothing should be pinned to its numbers.

    Parameters
    ----------
    min_words
        Passages are paragraphs put together until they have so many words.
    """
    from pydoc_data.topics import topics

    texts, labels = [], []
    for label, page in sorted(topics.items()):
        passage: list[str] = []
        for paragraph in re.split(r"\n\s*\n", page):
            passage.append(paragraph)
            if len(re.findall(WORD, " ".join(passage))) >= 3 * min_words:
                texts.append(" ".join(passage))
                labels.append(label)
                passage = []
        if passage:
            texts.append(" ".join(passage))
            labels.append(label)
    found = from_texts(texts, labels=labels, stop_words="english", min_df=4, max_df=0.25, lowercase=True)
    found = found[found.lengths >= min_words]
    return replace(
        found,
        name="python_manual",
        description="Passages of the Python manual, labelled by the keyword that shows them.",
        source="pydoc_data.topics of this Python",
    )


# -- formats -------------------------------------------------------------------------------------------------------------


def _guess(place: Path) -> str:
    if place.is_dir():
        return "folder"
    name = place.name.lower().removesuffix(".gz")
    if name.startswith("docword"):
        return "uci"
    kind = _ENDINGS.get(Path(name).suffix)
    if kind is None:
        raise ValueError(
            f"{place.name}: its name tells no format; say format=, one of {list(FORMATS)}, or let it end in one of "
            f"{', '.join(_ENDINGS)} (docword.* is UCI)"
        )
    return kind


def _content(place: Path, encoding: str) -> str:
    if place.stat().st_size == 0:
        raise ValueError(f"{place.name} is empty: it has no bytes")
    if place.suffix != ".gz":
        return decode(place, encoding)
    try:
        return decode_bytes(gzip.decompress(place.read_bytes()), place.name, encoding)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{place.name} is no gzip file, or damaged: {error}") from None


def _vocabulary(place: Path, given: Any, encoding: str) -> tuple[str, ...]:
    """The words: given, from the file named, or from a file beside the counts."""
    if given is not None and not isinstance(given, str | os.PathLike):
        return tuple(str(word) for word in given)
    if given is None:
        stem = place.name.replace("docword", "vocab").removesuffix(".gz")
        beside = [place.with_name("vocab.txt"), place.with_name(stem) if stem.startswith("vocab") else place]
        found = next((p for p in beside if p.exists() and p != place), None)
        if found is None:
            return ()
    else:
        found = Path(given).expanduser()
        if not found.exists():
            raise FileNotFoundError(f"there is no vocabulary {found}")
    return tuple(line.rstrip("\r") for line in decode(found, encoding).removesuffix("\n").split("\n"))


def _numbers(line: str, where: str) -> list[int]:
    try:
        return [int(cell) for cell in line.split()]
    except ValueError:
        raise ValueError(f"{where}: {line.strip()[:60]!r} is not made of whole numbers") from None


def _pairs(cells: list[str], where: str) -> np.ndarray:
    """`id:count` cells as (cells, 2)."""
    try:
        return np.array([[int(part) for part in cell.split(":")] for cell in cells], np.int64).reshape(len(cells), 2)
    except ValueError:
        wrong = next(c for c in cells if not re.fullmatch(r"[+-]?\d+:[+-]?\d+", c))
        raise ValueError(f"{where}: {wrong!r} is no 'id:count' of whole numbers") from None


def _ldac(content: str, name: str, words: tuple[str, ...]) -> Corpus:
    documents = []
    lines = content.splitlines()
    for n, line in enumerate(lines, 1):
        cells = line.split()
        where = f"{name}, line {n}"
        if not cells:
            raise ValueError(f"{where} is blank; a document without words is the line '0'")
        (told,) = _numbers(cells[0], where)
        if told != len(cells) - 1:
            raise ValueError(f"{where} tells of {told} words and lists {len(cells) - 1}")
        documents.append(_pairs(cells[1:], where))
    return Corpus.from_pairs(documents, len(words) or None, vocabulary=words, name=name)


def _uci(content: str, name: str, words: tuple[str, ...]) -> Corpus:
    head, _, body = content.partition("\n")
    second, _, body = body.partition("\n")
    third, _, body = body.partition("\n")
    sizes = _numbers(" ".join((head, second, third)), f"{name}, lines 1 to 3")
    if len(sizes) != 3:
        raise ValueError(f"{name}: its first three lines must be documents, words and entries, one number each")
    D, V, entries = sizes
    found = np.array(_numbers(body, f"{name}, from line 4 on"), np.int64)
    if len(found) != 3 * entries:
        raise ValueError(
            f"{name} tells of {entries} entries (document word count) and holds {len(found)} numbers for them"
        )
    d, v, c = found.reshape(-1, 3).T
    if len(d) and (d.min() < 1 or d.max() > D):
        raise ValueError(f"{name}: an entry is of document {d.max() if d.max() > D else d.min()}; there are 1 to {D}")
    if words and len(words) != V:
        raise ValueError(f"{name} tells of {V} words and the vocabulary has {len(words)}")
    check_ids(d - 1, v - 1, V, name)
    return Corpus(sp.csr_matrix((c, (d - 1, v - 1)), shape=(D, V)), words, name=name)


def _market(content: str, name: str, words: tuple[str, ...]) -> Corpus:
    import io

    from scipy.io import mmread

    try:
        matrix = sp.csr_matrix(mmread(io.BytesIO(content.encode())))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} is no Matrix Market file of counts: {error}") from None
    return Corpus(matrix, words, name=name)


def _svmlight(content: str, name: str, words: tuple[str, ...]) -> Corpus:
    documents, labels = [], []
    for n, line in enumerate(content.splitlines(), 1):
        cells = line.partition("#")[0].split()
        if not cells:
            continue
        labels.append(cells[0])
        pairs = _pairs([c for c in cells[1:] if not c.startswith("qid:")], f"{name}, line {n}")
        documents.append(pairs - np.array([1, 0]))
    return Corpus.from_pairs(documents, len(words) or None, vocabulary=words, name=name, labels=labels)


def _table(place: Path, encoding: str, columns: dict[str, str | None], settings: dict[str, Any]) -> Corpus:
    """A CSV or TSV with a column of texts."""
    import csv
    import io

    content = _content(place, encoding)
    separator = "\t" if ".tsv" in place.name.lower() else ","
    rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=separator))
    head = [cell.strip() for cell in rows[0]]
    unknown = [name for name in columns.values() if name is not None and name not in head]
    if unknown:
        raise ValueError(f"{place.name} has no column {unknown[0]!r}; it has {head}")
    ragged = next((n for n, row in enumerate(rows, 1) if len(row) != len(head)), None)
    if ragged is not None:
        raise ValueError(f"{place.name}, row {ragged}, has {len(rows[ragged - 1])} cells and the first {len(head)}")

    def column(role: str) -> list[str] | None:
        name = columns[role]
        return None if name is None else [row[head.index(name)] for row in rows[1:]]

    times = column("time")
    about: dict[str, Any] = {"labels": column("label") or (), "authors": column("author") or ()}
    if times is not None:
        try:
            about["times"] = np.array([float(t) for t in times])
        except ValueError as error:
            raise ValueError(f"{place.name}, column {columns['time']!r}: {error}") from None
    return from_texts(column("text") or [], **about, **settings)


def _folder(place: Path, encoding: str, settings: dict[str, Any]) -> Corpus:
    """Every file in the folder and the folders in it is a document."""
    root = place.resolve()
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{place} holds no files")
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"{file} is a link to {file.resolve()}, outside the folder: it is not read")
    texts = [decode(file, encoding) for file in files]
    titles = tuple(str(file.relative_to(root)) for file in files)
    labels = tuple(file.parent.name for file in files) if any(f.parent != root for f in files) else ()
    return from_texts(texts, titles=titles, labels=labels, **settings)
