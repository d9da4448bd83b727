"""Tables of counts of which only what occurred is stored, in memory or on disk; rows become dense as they are asked for.

`CountRows` looks like the dense tensor that a story wants to see: it has its shape, and `x[rows]` is an ordinary tensor.
So whatever goes through rows block by block works on it unchanged, with memory that does not grow with their number.  What
asks for the whole table gets it where it is small, and an error that says what to do where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .problem import Problem

#: Numbers of a table that may become dense at once.
CELLS = 16_000_000
#: Rows up to which a table is dense from the start: the story is told on all of them anyway.
FEW = 1000
#: Entries that are looked at in one go.
SPAN = 4_000_000
#: What the stored entries are seen as.
VIEWS = ("table", "words", "counts")


@dataclass(frozen=True)
class Rows:
    """N rows of counts of V words, compressed.

    Attributes
    ----------
    starts
        (N + 1,), where the entries of each row begin.
    words, counts
        The column of every entry, and its count.
    num_words
        V.
    """

    starts: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    num_words: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def on_disk(self) -> bool:
        """Whether entries are read from a file as they are needed."""
        return is_mapped(self.words) or is_mapped(self.counts)

    @property
    def widest(self) -> int:
        """Entries of the longest row."""
        return max((int(np.diff(part).max(initial=0)) for part in overlapping(self.starts, SPAN)), default=0)

    def cut(self, first: int, last: int) -> Rows:
        """Consecutive rows."""
        a, b = int(self.starts[first]), int(self.starts[last])
        return Rows(np.asarray(self.starts[first : last + 1]) - a, self.words[a:b], self.counts[a:b], self.num_words)

    def entries(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row (counted from 0), place in the row and number of every entry of some rows."""
        if isinstance(rows, slice):
            begin, end = self.starts[rows.start : rows.stop], self.starts[rows.start + 1 : rows.stop + 1]
        else:
            begin, end = self.starts[rows], self.starts[rows + 1]
        widths = np.asarray(end) - np.asarray(begin)
        before = np.cumsum(widths) - widths
        which = np.repeat(np.arange(len(widths)), widths)
        place = np.arange(len(which)) - before[which]
        return which, place, np.asarray(begin, dtype=np.int64)[which] + place

    def dense(self, rows: slice | np.ndarray, view: str, width: int) -> np.ndarray:
        """Some rows side by side, (n, width), whole numbers; shorter ones end in word 0 with count 0."""
        which, place, number = self.entries(rows)
        if isinstance(rows, slice) and len(number):
            part = slice(int(number[0]), int(number[-1]) + 1)  # one stretch of the file
            words, counts = self.words[part], self.counts[part]
        else:
            words, counts = self.words[number], self.counts[number]
        out = np.zeros((rows.stop - rows.start if isinstance(rows, slice) else len(rows), width), np.int64)
        out[which, np.asarray(words) if view == "table" else place] = words if view == "words" else counts
        return out


def is_mapped(array: Any) -> bool:
    """Whether an array is part of a memory-mapped file."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def overlapping(starts: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Pieces of `starts`, each with the first entry of the next."""
    for a in range(0, len(starts) - 1, size):
        yield np.asarray(starts[a : a + size + 1])


class CountRows(Tensor):
    """Counts (N, V), or words and counts side by side (N, L), made dense row by row.

    Parameters
    ----------
    rows
        What is stored.
    view
        "table" (N, V); "words", the ids of each row, or "counts", how often each occurs: (N, L), L those of the longest row.
    dtype, device
        Of the dense rows.

    Raises
    ------
    ValueError
        Where something asks for all of a large table at once.
    """

    rows: Rows
    view_as_: str
    width: int

    @staticmethod
    def __new__(
        cls,
        rows: Rows,
        view: str = "table",
        width: int | None = None,
        dtype: torch.dtype = torch.long,
        device: torch.device | str = "cpu",
    ) -> CountRows:
        assert view in VIEWS
        width = (rows.num_words if view == "table" else max(1, rows.widest)) if width is None else width
        made = Tensor._make_wrapper_subclass(cls, (len(rows), width), dtype=dtype, device=torch.device(device))
        made.rows, made.view_as_, made.width = rows, view, width
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        where = "on disk" if self.rows.on_disk else "in memory"
        return f"CountRows({tuple(self.shape)}, {len(self.rows.words):,} entries {where}, {self.dtype})"

    def like(self, rows: Rows | None = None, dtype: torch.dtype | None = None, device: Any = None) -> CountRows:
        """The same with other rows, or dense rows of another kind."""
        with torch._C.DisableTorchFunctionSubclass():
            kind, where = dtype or self.dtype, device or self.device
        return CountRows(self.rows if rows is None else rows, self.view_as_, self.width, kind, where)

    def take(self, index: Any) -> Tensor:
        """`x[index]`: a slice of many rows stays as it is, all else becomes dense."""
        rest: tuple[Any, ...] = ()
        if isinstance(index, tuple):
            index, rest = index[0], index[1:]
        chosen = self.numbers(index)
        count = chosen.stop - chosen.start if isinstance(chosen, slice) else len(chosen)
        if isinstance(chosen, slice) and count * self.width > CELLS and not rest:
            return self.like(self.rows.cut(chosen.start, chosen.stop))
        found = self.made(chosen, "these rows")
        found = found[0] if isinstance(index, int) else found
        return found[(slice(None), *rest)] if rest else found

    def numbers(self, index: Any) -> slice | np.ndarray:
        """Row numbers of an index over the first dimension."""
        n = len(self.rows)
        if index is Ellipsis:
            return slice(0, n)
        if isinstance(index, slice):
            a, b, step = index.indices(n)
            return slice(a, max(a, b)) if step == 1 else np.arange(a, b, step)
        array = np.atleast_1d(index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index))
        if array.dtype == bool:
            return np.flatnonzero(array)
        array = np.where(array < 0, array + n, array)
        if len(array) and (array.min() < 0 or array.max() >= n):
            raise IndexError(f"row {int(array.max())} of a table of {n} rows")
        return array

    def made(self, rows: slice | np.ndarray, what: str) -> Tensor:
        """These rows, dense."""
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        if count * self.width > max(CELLS, 256 * self.width):
            raise ValueError(
                f"{what}: {count:,} rows x {self.width:,} numbers would be dense at once "
                f"({8e-9 * count * self.width:,.1f} GB), and the counts are stored sparsely to avoid that; take fewer rows: "
                f"SVI(batch_size=...), EM, or part of the data"
            )
        with torch._C.DisableTorchFunctionSubclass():
            kind, where = self.dtype, self.device
        return torch.from_numpy(self.rows.dense(rows, self.view_as_, self.width)).to(device=where, dtype=kind)

    def whole(self, what: str = "the whole table") -> Tensor:
        """All rows, dense."""
        return self.made(slice(0, len(self.rows)), what)

    def parts(self, size: int) -> Iterator[Tensor]:
        """Dense rows one piece after the other, at most `size` of them and never more than fit."""
        size = max(1, min(size, CELLS // self.width))
        for a in range(0, len(self.rows), size):
            yield self.made(slice(a, min(a + size, len(self.rows))), "a piece")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Questions about form are answered, rows are handed out, and only the rest asks for the whole table."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = getattr(func.__self__, "__name__", name) if name == "__get__" else name
        if name in FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in OWN and isinstance(args[0], CountRows):
            return OWN[name](*args, **kwargs)

        def filled(value: Any) -> Any:
            return value.whole(f"{name} on the counts of all rows") if isinstance(value, CountRows) else value

        return func(*map(filled, args), **{k: filled(v) for k, v in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Below `__torch_function__` nothing may see a tensor without numbers."""
        raise TypeError(f"{func} met counts that are stored sparsely; give it rows of them")


def _moved(x: CountRows, *args: Any, **kwargs: Any) -> CountRows:
    """`x.to(...)`."""
    given = [*args, kwargs.get("dtype"), kwargs.get("device")]
    dtype = next((a for a in given if isinstance(a, torch.dtype)), None)
    device = next((a for a in given if isinstance(a, str | torch.device)), None)
    other = next((a for a in args if isinstance(a, Tensor)), None)
    if other is not None:
        dtype, device = other.dtype, other.device
    return x.like(dtype=dtype, device=device)


#: Attributes and methods that ask for no number.
FORM = frozenset(
    "shape dtype device ndim layout dim size numel nelement is_floating_point is_complex __len__ requires_grad is_cuda is_meta "
    "is_sparse is_quantized is_nested is_leaf grad_fn grad itemsize element_size nbytes names is_mps is_xpu __hash__ "
    "__repr__ is_mkldnn is_cpu is_signed is_inference is_neg is_conj _is_view is_shared".split()
)
OWN: dict[str, Callable[..., Any]] = {
    "__getitem__": lambda x, index: x.take(index),
    "split": lambda x, size, dim=0: x.parts(size),
    "to": _moved,
    "double": lambda x: x.like(dtype=torch.float64),
    "float": lambda x: x.like(dtype=torch.float32),
    "long": lambda x: x.like(dtype=torch.long),
    "cpu": lambda x: x.like(device="cpu"),
    "detach": lambda x: x,
    "contiguous": lambda x: x,
    "is_pinned": lambda x: False,
}


# -- from what users have -------------------------------------------------------------------------------------------------


def stored_counts(name: str, value: Any) -> Tensor:
    """A sparse matrix of whole numbers, or an object of its form, as a tensor: dense where it is small.

    Parameters
    ----------
    value
        Has `indptr`, `indices`, `data` and `shape`, as SciPy's compressed rows, and perhaps `view` (see `CountRows`).

    Raises
    ------
    TypeError
        A matrix of real numbers, which is a dense table for any story.
    ValueError
        Negative counts, or words beyond the columns; the first row is named.
    """
    matrix = value if hasattr(value, "indptr") and getattr(value, "format", "csr") == "csr" else value.tocsr()
    if np.asarray(matrix.data[:0]).dtype.kind not in "iu":
        raise TypeError(
            f"{name} is a sparse matrix ({type(value).__name__}) of {matrix.data.dtype}; pass {name}.toarray(), or, where it "
            f"holds counts, {name}.astype(int)"
        )
    if not getattr(value, "checked", False):
        matrix = canonical(name, matrix)
    rows = Rows(matrix.indptr, matrix.indices, matrix.data, int(matrix.shape[1]))
    found = CountRows(rows, getattr(value, "view", "table"))
    small = len(rows) <= FEW or (not rows.on_disk and len(rows) * found.width <= CELLS)
    return found.whole() if small else found


def canonical(name: str, matrix: Any) -> Any:
    """Compressed rows without doubles, whose entries are counts of columns that exist."""
    if not is_mapped(matrix.data) and hasattr(matrix, "sum_duplicates") and not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    for a in range(0, len(matrix.data), SPAN):
        counts, words = matrix.data[a : a + SPAN], matrix.indices[a : a + SPAN]
        bad = (np.asarray(counts) < 0) | (np.asarray(words) < 0) | (np.asarray(words) >= matrix.shape[1])
        if bad.any():
            at = a + int(bad.argmax())
            row = int(np.searchsorted(matrix.indptr, at, side="right")) - 1
            raise ValueError(
                f"{name}: row {row} has count {int(matrix.data[at])} in column {int(matrix.indices[at])}; counts are whole "
                f"numbers from 0 in columns 0 to {matrix.shape[1] - 1}"
            )
    return matrix


def is_sparse_matrix(value: Any) -> bool:
    """Whether a value is a sparse matrix of SciPy, or compressed rows of another kind."""
    return (hasattr(value, "toarray") and hasattr(value, "nnz")) or (
        hasattr(value, "indptr") and hasattr(value, "indices") and hasattr(value, "data")
    )


def has_lazy(kwargs: Mapping[str, Any]) -> bool:
    """Whether any argument is stored sparsely."""
    return any(isinstance(v, CountRows) for v in kwargs.values())


def made_dense(problem: Problem, who: str) -> Problem:
    """The same problem for a method that sees all rows at once.

    Raises
    ------
    ValueError
        The table is too large for that.
    """
    if not has_lazy(problem.kwargs):
        return problem
    dense = {
        n: v.whole(f"{who} sees all rows at once") if isinstance(v, CountRows) else v for n, v in problem.kwargs.items()
    }
    return replace(problem, kwargs=dense)
