"""Corpora that stay on disk: plain `.npy` files in a folder, opened as memory maps and read where they are needed.

A folder holds `indptr.npy`, `indices.npy` and `data.npy`, the compressed rows of the counts; `times.npy`, `tokens.npy` and
`token_starts.npy` where they are known; and `corpus.json` with names, words and whatever else belongs to the documents.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from .text import Corpus

#: Documents and entries that are held at once.
DOCUMENTS, ENTRIES = 20_000, 4_000_000
#: Word ids of a corpus on disk that may be told one by one.
TOLD = 4_000_000
#: Entries from which positions need 64 bits.
LONG = 2**31 - 1
#: Layout of a folder.
VERSION = 1


class StoredCounts(sp.csr_matrix):
    """Counts whose entries lie in files: checked when they were written, and not looked at again."""

    checked = True

    @classmethod
    def opened(cls, folder: Path, shape: tuple[int, int]) -> StoredCounts:
        """The matrix in a folder, without reading it.

        Raises
        ------
        ValueError
            Files are missing, damaged, or do not fit each other.
        """
        indptr, indices, data = (_whole_numbers(folder / f"{n}.npy") for n in ("indptr", "indices", "data"))
        fits = len(indptr) == shape[0] + 1 and len(indices) == len(data)
        if not fits or int(indptr[0]) != 0 or int(indptr[-1]) != len(data):
            raise ValueError(
                f"{folder} is damaged: {len(indptr)} row starts up to {int(indptr[-1]) if len(indptr) else 0}, "
                f"{len(indices)} words and {len(data)} counts for {shape[0]} documents; store it again"
            )
        made = cls(shape, dtype=data.dtype)
        made.indptr, made.indices, made.data = indptr, indices, data  # past SciPy's checks, which would read it all
        made.has_canonical_format = True
        return made

    @property
    def on_disk(self) -> bool:
        """Whether these are still the files, and not some of their rows."""
        return isinstance(self.data, np.memmap)


def _whole_numbers(path: Path) -> np.ndarray:
    """A list of whole numbers, mapped."""
    found = _opened(path)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(
            f"{path.parent} is damaged: {path.name} holds {found.dtype} {found.shape}, and a list of whole numbers is wanted"
        )
    return found


def _opened(path: Path) -> np.ndarray:
    """A file of a folder, mapped."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path.parent} is no corpus that was stored, or is damaged: {path.name}: {error}") from None


class StoredRows:
    """Words or counts of the documents side by side, as a story with `words` wants to see them: a view of stored counts."""

    checked = True

    def __init__(self, counts: StoredCounts, view: str) -> None:
        self.indptr, self.indices, self.data, self.shape = counts.indptr, counts.indices, counts.data, counts.shape
        self.view = view


class Ragged(Sequence):
    """Arrays of different lengths that lie behind each other in one: word ids of every document, in their order."""

    def __init__(self, values: np.ndarray, starts: np.ndarray) -> None:
        self.values, self.starts = values, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        i = range(len(self))[index]
        return np.asarray(self.values[int(self.starts[i]) : int(self.starts[i + 1])], dtype=np.int64)


def check_told(corpus: Corpus) -> None:
    """Refuse to tell the words of a corpus on disk one by one where they are many.

    Raises
    ------
    ValueError
        With the size, and what to do.
    """
    if not corpus.on_disk:
        return
    size = corpus.counts.nnz  # all words are no fewer, and these need not be read to be known
    size = size if size > TOLD else len(corpus) * int(corpus.lengths.max(initial=0))
    if size > TOLD:
        raise ValueError(
            f"{corpus.name!r} is on disk, and this story tells every word of its {len(corpus):,} documents: at least {size:,} "
            f"numbers at once ({8e-9 * size:,.1f} GB), and a topic for each. Take part of the corpus (corpus[:1000]), or a "
            f"story of counts (LDA), which reads them run by run"
        )


class Growing:
    """A one-dimensional .npy file that is written piece by piece."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.count = np.dtype(dtype), 0
        self._file: BinaryIO = open(path, "w+b")
        self._header()

    def _header(self) -> None:
        """NumPy leaves room in the header for the first dimension to grow."""
        shape = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, shape)

    def append(self, values: np.ndarray) -> None:
        """Some more numbers."""
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.count += len(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()


def store_corpus(folder: str | os.PathLike[str], parts: Iterable[Any], **about: Any) -> Corpus:
    """Write a corpus to a folder, part after part, and open it.

    Memory holds one part at a time, so that a corpus of any size can be stored.

    Parameters
    ----------
    folder
        A folder that does not exist yet.
    parts
        Consecutive documents: `Corpus` objects, or SciPy matrices or arrays of counts, all over the same V words.  Times,
        labels, authors, titles and sequences of corpora are kept.
    **about
        `vocabulary`, `name`, `description` and `source`; otherwise those of the first part.

    Returns
    -------
    Corpus
        As `open_corpus(folder)`.

    Raises
    ------
    FileExistsError
        The folder is there already.
    OSError
        There is no room for it.
    ValueError
        No parts, parts over different words, counts that are no whole numbers, or lists that only some parts have.

    Examples
    --------
    >>> stored = store_corpus("news", (read_part(path) for path in paths), name="news")   # doctest: +SKIP
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; choose another folder, or remove it")
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _write(beside, parts, about)
        os.replace(beside, folder)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(
                error.errno, f"{folder} was not stored, and nothing of it is left: {error.strerror}"
            ) from error
        raise
    return open_corpus(folder)


def _write(folder: Path, parts: Iterable[Any], about: dict[str, Any]) -> None:
    """All files of a folder."""
    from .text import Corpus

    lists: dict[str, list[Any]] = {"labels": [], "authors": [], "titles": []}
    times: list[np.ndarray] = []
    card: dict[str, Any] = {}
    documents, entries, tokens, first = 0, 0, 0, None
    with (
        Growing(folder / "indptr.npy", np.int64) as indptr,
        Growing(folder / "indices.npy", np.int32) as indices,
        Growing(folder / "data.npy", np.int32) as data,
        Growing(folder / "tokens.npy", np.int32) as ids,
        Growing(folder / "token_starts.npy", np.int64) as starts,
    ):
        indptr.append(np.zeros(1))
        starts.append(np.zeros(1))
        for part in (piece for whole in parts for piece in _pieces(whole)):
            corpus = part if isinstance(part, Corpus) else Corpus(part)
            if first is None:
                first = corpus
                known = corpus.vocabulary if isinstance(part, Corpus) else ()
                card = {"vocabulary": list(known), "num_words": corpus.num_words}
                card |= {n: getattr(corpus, n) for n in ("name", "description", "source")}
            if corpus.num_words != first.num_words:
                raise ValueError(
                    f"documents from {documents} on are counted over {corpus.num_words} words, those before over "
                    f"{first.num_words}: all parts need the same vocabulary"
                )
            counts = corpus.counts
            if len(counts.data) and counts.data.max() > LONG:
                raise ValueError(f"documents from {documents} on have a count of {counts.data.max()}, beyond 32 bits")
            indptr.append(entries + counts.indptr[1:].astype(np.int64))
            indices.append(counts.indices)
            data.append(counts.data)
            entries, documents = entries + len(counts.data), documents + len(corpus)
            for name, kept in lists.items():
                kept += getattr(corpus, name)
            times += [] if corpus.times is None else [corpus.times]
            for sequence in corpus.sequences:
                ids.append(sequence)
                tokens += len(sequence)
                starts.append(np.array([tokens]))
        num_starts = starts.count - 1
    if first is None:
        raise ValueError("there are no parts: a corpus needs a document")
    told = {**{n: len(v) for n, v in lists.items()}, "times": sum(map(len, times)), "sequences": num_starts}
    for name, count in told.items():
        if count not in (0, documents):
            raise ValueError(
                f"{name} are known of {count} documents and there are {documents}: all parts need them, or none"
            )
    if times:
        np.save(folder / "times.npy", np.concatenate(times))
    if not num_starts:
        for name in ("tokens.npy", "token_starts.npy"):
            (folder / name).unlink()
    _same_width(folder, entries)
    card |= {n: v for n, v in lists.items() if v} | {"num_documents": documents, "version": VERSION}
    card |= {n: list(v) if n == "vocabulary" else v for n, v in about.items()}
    (folder / "corpus.json").write_text(json.dumps(card, default=_plain), encoding="utf-8")


def _plain(value: Any) -> Any:
    """NumPy's numbers for JSON."""
    return value.item() if hasattr(value, "item") else str(value)


def _pieces(part: Any) -> Iterator[Any]:
    """Consecutive documents, few enough to be held."""
    if getattr(getattr(part, "counts", None), "on_disk", False):
        for a in range(0, len(part), DOCUMENTS):
            yield part[a : a + DOCUMENTS]
    else:
        yield part


def _same_width(folder: Path, entries: int) -> None:
    """Positions and words of one width, as SciPy wants them: 32 bits where that is enough."""
    name, dtype = ("indptr.npy", np.int32) if entries <= LONG else ("indices.npy", np.int64)
    old = np.load(folder / name, mmap_mode="r")
    with Growing(folder / "new", dtype) as file:
        for a in range(0, len(old), ENTRIES):
            file.append(old[a : a + ENTRIES])
    del old
    os.replace(folder / "new", folder / name)


def open_corpus(path: str | os.PathLike[str], keep: str | os.PathLike[str] | None = None, **about: Any) -> Corpus:
    """A corpus that stays on disk.

    `fit` reads it in pieces: EM and SVI of topic models and of mixtures of counts need memory for a few thousand documents,
    however many there are.  Parts (`corpus[:100]`) are in memory.

    Parameters
    ----------
    path
        A folder that `store_corpus` or `Corpus.save` wrote; or counts that `scipy.sparse.save_npz` wrote as compressed rows,
        which are stored in a folder once and opened from there later.
    keep
        That folder; None takes the file's name without its ending.
    **about
        `vocabulary`, `name`, ... of a .npz file, which knows none.

    Raises
    ------
    FileNotFoundError
        There is nothing at `path`.
    ValueError
        Files are damaged, or hold no counts.
    """
    from .text import Corpus

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}")
    if path.suffix == ".npz":
        folder = Path(keep) if keep is not None else path.with_suffix("")
        if not folder.exists():
            return store_corpus(folder, _npz_parts(path), **({"name": path.stem} | about))
        path = folder
    try:
        card = json.loads((path / "corpus.json").read_text(encoding="utf-8"))
        shape = (int(card["num_documents"]), int(card["num_words"]))
        version = card["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no corpus that was stored, or is damaged: {error}") from None
    if version > VERSION:
        raise ValueError(f"{path} was stored in layout {version}; this version reads layouts up to {VERSION}")
    fields: dict[str, Any] = {n: card[n] for n in ("name", "description", "source") if n in card}
    fields |= {n: tuple(card.get(n, ())) for n in ("vocabulary", "labels", "authors", "titles")}
    if (path / "times.npy").exists():
        fields["times"] = _opened(path / "times.npy")
    if (path / "tokens.npy").exists():
        flat, starts = (_whole_numbers(path / f"{n}.npy") for n in ("tokens", "token_starts"))
        fields["sequences"] = Ragged(flat, starts)
    return Corpus(StoredCounts.opened(path, shape), **fields)


def _npz_parts(path: Path) -> Iterator[sp.csr_matrix]:
    """Documents of a matrix that SciPy saved, some at a time; compressed members are read as streams."""
    try:
        with zipfile.ZipFile(path) as archive:
            kind = _member(archive, "format").tobytes().rstrip(b"\0").decode()
            if kind != "csr":
                raise ValueError(f"it holds a {kind} matrix; save it with scipy.sparse.save_npz(path, matrix.tocsr())")
            shape, indptr = _member(archive, "shape"), _member(archive, "indptr")
            with archive.open("indices.npy") as words, archive.open("data.npy") as counts:
                kinds = [_header(words)[1], _header(counts)[1]]
                a = 0
                while a < len(indptr) - 1:
                    room = np.searchsorted(indptr, indptr[a] + ENTRIES, side="right") - 1
                    b = int(min(max(room, a + 1), len(indptr) - 1))
                    n = int(indptr[b] - indptr[a])
                    ids, values = (
                        np.frombuffer(f.read(n * k.itemsize), k).copy()
                        for f, k in zip((words, counts), kinds, strict=True)
                    )
                    yield sp.csr_matrix((values, ids, indptr[a : b + 1] - indptr[a]), shape=(b - a, int(shape[1])))
                    a = b
    except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} is no matrix that scipy.sparse.save_npz wrote: {error}") from None


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in a stream, which then stands at its numbers."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


__all__ = ["Growing", "Ragged", "StoredCounts", "StoredRows", "open_corpus", "store_corpus"]
