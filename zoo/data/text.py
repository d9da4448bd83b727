"""Documents as counts of words, with what belongs to them: times, labels, authors, and the order of words where known."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from .stored import DOCUMENTS, Ragged, StoredRows, check_told, store_corpus

#: Numbers of a table of counts beyond which a story is given compressed rows.
DENSE = 20_000_000


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Counts of V words in D documents, kept sparse.

    Attributes
    ----------
    counts
        (D, V) whole numbers in compressed sparse rows; any SciPy matrix or array of counts is taken.
    vocabulary
        V words; made up ("word 7") where none are given.
    times
        (D,) a number a document, such as its year; or None.
    labels, authors, titles
        One text or number a document, or ().
    sequences
        Word ids in the order of the text, an array a document; () where only counts are known.
    name, description, source
        What the documents are and where they come from.

    Raises
    ------
    ValueError
        Counts that are negative or no whole numbers, a word id beyond the vocabulary, a list whose length is not that of
        the documents; the first document, word and value are named.

    Examples
    --------
    >>> Corpus.from_documents([["bee", "hive", "bee"], ["hive"]]).counts.toarray()
    array([[2, 1],
           [0, 1]])
    """

    counts: Any
    vocabulary: tuple[str, ...] = ()
    times: Any = None
    labels: tuple[Any, ...] = ()
    authors: tuple[Any, ...] = ()
    titles: tuple[Any, ...] = ()
    sequences: Sequence[np.ndarray] = ()
    name: str = "corpus"
    description: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        counts = _whole(self.counts, self.name)
        words = tuple(str(word) for word in self.vocabulary) or tuple(f"word {v}" for v in range(counts.shape[1]))
        if len(words) != counts.shape[1]:
            raise ValueError(f"vocabulary of {self.name!r} has {len(words)} words and counts {counts.shape[1]} columns")
        fields: dict[str, Any] = {"counts": counts, "vocabulary": words}
        for field in ("labels", "authors", "titles", "sequences"):
            value = getattr(self, field)
            fields[field] = value if isinstance(value, Ragged) else tuple(value)
        if self.times is not None:
            fields["times"] = times = np.asarray(self.times)
            if times.dtype.kind not in "fiu" or not np.isfinite(times).all():
                raise ValueError(
                    f"times of {self.name!r} must be finite numbers, one a document; got dtype {times.dtype}"
                )
        for field, value in fields.items():
            if field not in ("counts", "vocabulary") and len(value) not in (0, counts.shape[0]):
                raise ValueError(
                    f"{field} of {self.name!r} has {len(value)} entries and there are {len(self)} documents"
                )
            object.__setattr__(self, field, value)
        for field in ("counts", "vocabulary"):
            object.__setattr__(self, field, fields[field])

    @classmethod
    def from_pairs(cls, documents: Iterable[Any], num_words: int | None = None, **about: Any) -> Self:
        """A corpus from (word id, count) pairs, a list a document.

        Parameters
        ----------
        num_words
            V; otherwise the length of `vocabulary`, or else the largest id and one.
        **about
            `vocabulary`, `times` and the other attributes.

        Raises
        ------
        ValueError
            A word id below 0 or beyond the vocabulary; names document, position and id.
        """
        pairs = [np.asarray(d, dtype=np.int64).reshape(-1, 2) for d in documents]
        rows = np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])
        both = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)
        vocabulary = tuple(about.get("vocabulary", ()))
        V = num_words or len(vocabulary) or (int(both[:, 0].max()) + 1 if len(both) else 0)
        check_ids(rows, both[:, 0], V, about.get("name", "corpus"))
        return cls(sp.csr_matrix((both[:, 1], (rows, both[:, 0])), shape=(len(pairs), V)), **about)

    @classmethod
    def from_sequences(cls, documents: Iterable[Any], num_words: int | None = None, **about: Any) -> Self:
        """A corpus from word ids in the order of the text, a list a document; see `from_pairs`."""
        sequences = tuple(np.asarray(d, dtype=np.int64).reshape(-1) for d in documents)
        pairs = [np.stack([s, np.ones_like(s)], 1) for s in sequences]
        return cls.from_pairs(pairs, num_words, sequences=sequences, **about)

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[str]], **about: Any) -> Self:
        """A corpus from lists of words; the vocabulary is every word that occurs, in alphabetical order."""
        texts = [list(words) for words in documents]
        vocabulary = tuple(sorted({word for words in texts for word in words}))
        ids = {word: v for v, word in enumerate(vocabulary)}
        return cls.from_sequences([[ids[w] for w in words] for words in texts], vocabulary=vocabulary, **about)

    # -- sizes -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def num_words(self) -> int:
        """V, the size of the vocabulary."""
        return self.counts.shape[1]

    @property
    def num_tokens(self) -> int:
        """Words of all documents together, repetitions counted."""
        return sum(int(part.sum()) for part in self._parts())

    @property
    def lengths(self) -> np.ndarray:
        """Words of each document, (D,)."""
        found = [np.asarray(part.sum(1)).reshape(-1).astype(np.int64) for part in self._parts()]
        return np.concatenate([np.zeros(0, np.int64), *found])

    @property
    def on_disk(self) -> bool:
        """Whether the counts are read from files as they are needed; see `open_corpus`."""
        return getattr(self.counts, "on_disk", False)

    def _parts(self) -> Iterator[sp.csr_matrix]:
        """The counts, so many documents at a time that they can be held."""
        if not self.on_disk:
            yield self.counts
            return
        for a in range(0, len(self), DOCUMENTS):
            yield self.counts[a : a + DOCUMENTS]

    def __repr__(self) -> str:
        lengths = self.lengths
        lines = [f"{self.name}: {len(self):,} documents, {self.num_words:,} words, {self.num_tokens:,} tokens"]
        if self.description:
            lines.append(f"  {self.description}")
        if len(self):
            low, mid, high = (int(q) for q in np.quantile(lengths, (0, 0.5, 1)))
            empty = int((lengths == 0).sum())
            told = f"; {empty} of them empty" if empty else ""
            lines.append(f"  lengths  {low} to {high:,}, half of them up to {mid:,}{told}")
            total = sum(np.asarray(part.sum(0)).reshape(-1) for part in self._parts())
            common = np.argsort(-total, kind="stable")[:8]
            lines.append(f"  words    {', '.join(self.vocabulary[v] for v in common)}, ...")
        if self.times is not None and len(self):
            lines.append(f"  times    {self.times.min():g} to {self.times.max():g}")
        for field in ("labels", "authors"):
            if values := getattr(self, field):
                kinds = sorted({str(v) for v in values}, key=[str(v) for v in values].count, reverse=True)
                rest = f", and {len(kinds) - 6} more" if len(kinds) > 6 else ""
                lines.append(f"  {field:<8} {', '.join(kinds[:6])}{rest}")
        if self.source:
            lines.append(f"  source   {self.source}")
        return "\n".join(lines)

    # -- parts -------------------------------------------------------------------------------------------------------

    def __getitem__(self, which: Any) -> Self:
        """Some of the documents: a slice, a mask or an array of their numbers."""
        index = np.arange(len(self))[which].reshape(-1)
        parts: dict[str, Any] = {
            field: tuple(getattr(self, field)[i] for i in index) if len(getattr(self, field)) else ()
            for field in ("labels", "authors", "titles", "sequences")
        }
        times = None if self.times is None else self.times[index]
        return replace(self, counts=self.counts[index], times=times, **parts)

    def pruned(
        self,
        min_documents: int = 1,
        max_share: float = 1.0,
        most: int | None = None,
        without: Iterable[str] = (),
        min_length: int = 0,
    ) -> Self:
        """Fewer words, and then only documents that are still long enough.

        Parameters
        ----------
        min_documents, max_share
            Keep words of at least so many documents, and of at most this share of them.
        most
            Keep the most frequent words only.
        without
            Words to leave out.
        min_length
            Then keep documents of at least so many words.

        Raises
        ------
        ValueError
            A setting out of range, or nothing is left.
        """
        if not 0 < max_share <= 1:
            raise ValueError(f"max_share must be a share above 0 and up to 1, got {max_share!r}")
        if most is not None and most < 1:
            raise ValueError(f"most must be a whole number from 1, got {most!r}")
        spread = np.diff(self.counts.tocsc().indptr)
        keep = (spread >= min_documents) & (spread <= max_share * max(len(self), 1))
        banned = set(without)
        keep &= np.array([word not in banned for word in self.vocabulary], dtype=bool)
        if most is not None and keep.sum() > most:
            total = np.where(keep, np.asarray(self.counts.sum(0)).reshape(-1), -1)
            keep = np.zeros_like(keep)
            keep[np.argsort(-total, kind="stable")[:most]] = True
        if not keep.any():
            raise ValueError(
                f"no word of {self.name!r} is left by min_documents={min_documents}, max_share={max_share}"
            )
        number = np.where(keep, keep.cumsum() - 1, -1)
        shorter = replace(
            self,
            counts=self.counts[:, np.flatnonzero(keep)],
            vocabulary=tuple(word for word, kept in zip(self.vocabulary, keep) if kept),
            sequences=tuple(number[s][number[s] >= 0] for s in self.sequences),
        )
        if min_length <= 0:
            return shorter
        long = shorter.lengths >= min_length
        if not long.any():
            raise ValueError(f"no document of {self.name!r} has {min_length} words left")
        return shorter[long]

    def split(self, validation: float = 0.1, test: float = 0.2, seed: int = 0) -> tuple[Self, Self, Self]:
        """Documents to learn from, to choose with, and to touch once: drawn at random without replacement.

        Parameters
        ----------
        validation, test
            Shares of the documents, 0 for none; together below 1.
        seed
            Of the draw; nothing global moves.

        Raises
        ------
        ValueError
            Shares out of range, or too few documents for a document in each part asked for.
        """
        for name, share in (("validation", validation), ("test", test)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be a share from 0 and below 1, got {share!r}")
        sizes = [max(1, round(share * len(self))) if share else 0 for share in (validation, test)]
        if validation + test >= 1 or sum(sizes) >= len(self):
            raise ValueError(
                f"validation={validation} and test={test} leave nothing of {len(self)} documents to learn from"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        cut = np.split(order, [len(self) - sum(sizes), len(self) - sizes[1]])
        train, val, held = (self[np.sort(part)] for part in cut)
        return train, val, held

    def halves(self, seed: int = 0) -> tuple[Self, Self]:
        """Every document in two, its words dealt out at random: one half to infer topics from, one to predict."""
        rng = np.random.default_rng(seed)
        first, second = [], []
        for tokens in self.tokens(seed):
            mixed = rng.permutation(tokens)
            first.append(np.sort(mixed[: len(mixed) // 2]))
            second.append(np.sort(mixed[len(mixed) // 2 :]))
        made = [type(self).from_sequences(half, self.num_words) for half in (first, second)]
        a, b = (replace(self, counts=m.counts, sequences=m.sequences) for m in made)
        return a, b

    def save(self, folder: str | os.PathLike[str]) -> Self:
        """Write everything to a new folder, from which `open_corpus` opens it without reading it; returns that corpus."""
        return store_corpus(folder, [self])  # type: ignore[return-value]

    # -- other forms -------------------------------------------------------------------------------------------------

    def tokens(self, seed: int = 0) -> list[np.ndarray]:
        """Word ids of each document, in the order of the text where it is known, else in random order."""
        if len(self.sequences):
            return [s.copy() for s in self.sequences]
        rng = np.random.default_rng(seed)
        c = self.counts
        rows = (slice(a, b) for a, b in zip(c.indptr, c.indptr[1:]))
        return [rng.permutation(np.repeat(c.indices[r], c.data[r])).astype(np.int64) for r in rows]

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct words of each document and their counts, (D, L) each; shorter documents end in word 0, count 0."""
        c = self.counts
        widths = np.diff(c.indptr)
        words = np.zeros((len(self), max(1, widths.max(initial=0))), dtype=np.int64)
        counts = np.zeros_like(words)
        inside = np.arange(words.shape[1]) < widths[:, None]
        words[inside], counts[inside] = c.indices, c.data
        return words, counts

    def padded_tokens(self, seed: int = 0) -> np.ndarray:
        """`tokens` as one table (D, L); shorter documents end in -1."""
        tokens = self.tokens(seed)
        table = np.full((len(tokens), max((len(t) for t in tokens), default=0) or 1), -1, dtype=np.int64)
        for row, t in zip(table, tokens):
            row[: len(t)] = t
        return table

    def slices(self, width: float = 1.0, start: float | None = None) -> np.ndarray:
        """The number of the time slice of each document, (D,), from 0; a slice is `width` units of time.

        Raises
        ------
        ValueError
            The documents have no times, or `width` is not positive.
        """
        if self.times is None:
            raise ValueError(f"{self.name!r} has no times; give Corpus(times=...) a number a document")
        if not width > 0:
            raise ValueError(f"width must be positive, got {width!r}")
        begin = self.times.min() if start is None else start
        return np.floor((self.times - begin) / width).astype(np.int64)

    def sliced(self, width: float, start: float | None = None) -> Self:
        """The same documents with the number of their slice for a time; see `slices`."""
        return replace(self, times=self.slices(width, start))

    def as_arguments(self, names: Sequence[str]) -> Mapping[str, Any]:
        """What a story with these arguments wants to see of the documents.

        A story with `words` gets distinct words and their counts side by side, one with `num_words` alone gets word ids in
        order, any other a table (D, V) of counts as its first argument; `times` and `num_slices` are added where they
        are asked for.

        Raises
        ------
        ValueError
            A corpus on disk is too large for its words to be told one by one.
        """
        if not names:
            return {}
        given: dict[str, Any] = {}
        if "words" in names:
            views = ("words", "counts")
            given["words"], given["w"] = [StoredRows(self.counts, v) for v in views] if self.on_disk else self.padded()
            given["num_words"] = self.num_words
        elif "num_words" in names:
            check_told(self)
            given[names[0]], given["num_words"] = self.padded_tokens(), self.num_words
        else:
            large = len(self) * self.num_words > DENSE
            given[names[0]] = self.counts if self.on_disk or large else self.counts.toarray()
        if "times" in names and self.times is not None:
            given["times"] = self.times
            given["num_slices"] = int(self.times.max()) + 1
        return {name: value for name, value in given.items() if name in names}


def check_ids(rows: np.ndarray, ids: np.ndarray, num_words: int, where: str) -> None:
    """Refuse word ids outside 0 .. V - 1, naming the first document that has one."""
    wrong = (ids < 0) | (ids >= num_words)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"{where}: document {int(rows[first])} has word id {int(ids[first])}, and the vocabulary has {num_words} words "
            f"with ids 0 to {num_words - 1}; {int(wrong.sum())} ids in all are outside"
        )


def _whole(counts: Any, where: str) -> sp.csr_matrix:
    """Counts as a canonical CSR matrix of int64, without stored zeros; those in files were so when they were written."""
    if getattr(counts, "on_disk", False):
        return counts
    if not sp.issparse(counts):
        counts = np.asarray(counts)
        if counts.ndim != 2 or counts.dtype.kind not in "fiub":
            raise ValueError(
                f"counts of {where!r} have shape {counts.shape} and dtype {counts.dtype}; expected numbers (documents, words)"
            )
    matrix = sp.csr_matrix(counts)
    matrix.sum_duplicates()
    data = matrix.data
    wrong = (data < 0) | (data != np.floor(data)) if data.dtype.kind == "f" else data < 0
    if wrong.any() or (data.dtype.kind == "f" and not np.isfinite(data).all()):
        first = int((wrong | ~np.isfinite(data)).argmax())
        row = int(np.searchsorted(matrix.indptr, first, side="right")) - 1
        raise ValueError(
            f"counts of {where!r} must be whole numbers from 0: document {row}, word {int(matrix.indices[first])} has "
            f"{data[first]}"
        )
    matrix = sp.csr_matrix((data.astype(np.int64), matrix.indices, matrix.indptr), shape=matrix.shape)
    matrix.eliminate_zeros()
    return matrix
