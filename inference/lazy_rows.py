"""Tables that are not where they are worked on: counts stored sparsely, or rows in another memory than the device's.

`LazyRows` looks like the tensor that a story wants to see: it has its shape, kind and device, and `x[rows]` is an ordinary
tensor.  So whatever goes through rows block by block works on it unchanged, with memory that does not grow with their number;
blocks in a row are read ahead.  What asks for the whole table gets it where it is small, and an error that says what to do
where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .gaps import GappedTable, Gaps
from .mapped_files import still_there
from .streaming import Stream

if TYPE_CHECKING:
    from .problem import Problem

#: Numbers of a table that may be made at once.
CELLS = 4_000_000
#: Numbers of a piece, where a pass goes through all rows: the next one is there before this one is gone.
PIECE = 500_000
#: Numbers that may be made at once where a whole table that lies in memory, without its zeros, is asked for.
WHOLE = 100_000_000
#: Rows that may be made at once however wide they are.
LEAST = 512

Numbers = slice | np.ndarray


class Source(Protocol):
    """Where rows come from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        ...

    @property
    def slow(self) -> bool:
        """Whether reading takes long enough to be done ahead."""
        ...

    def read(self, rows: Numbers) -> Tensor:
        """Some rows, in the processor's memory."""
        ...

    def cut(self, first: int, last: int) -> Source:
        """Consecutive rows, not read."""
        ...

    def extremes(self) -> tuple[float, float]:
        """Smallest and largest number; NaN where there is one."""
        ...


@dataclass(frozen=True)
class HostTable:
    """Rows in the processor's memory, or in a file, for a device that has no room for them."""

    table: Tensor
    slow: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        return tuple(self.table.shape)

    def read(self, rows: Numbers) -> Tensor:
        """Some rows."""
        still_there(self.table)
        return self.table[rows if isinstance(rows, slice) else torch.from_numpy(rows)]

    def cut(self, first: int, last: int) -> HostTable:
        """A view."""
        return HostTable(self.table[first:last])

    def without(self, rows: np.ndarray) -> GappedTable:
        """All but some rows (sorted numbers), not read."""
        return GappedTable(self.table, Gaps.of(rows), self.slow)

    def extremes(self) -> tuple[float, float]:
        """One pass."""
        low, high = torch.aminmax(self.table)
        return float(low), float(high)


class LazyRows(Tensor):
    """A table (N, ...) whose rows are made when they are asked for.

    Parameters
    ----------
    source
        Where they come from.
    dtype, device
        Of the rows that are handed out.

    Raises
    ------
    ValueError
        Where something asks for all of a large table at once.
    """

    source: Source
    stream: Stream | None
    width: int

    @staticmethod
    def __new__(cls, source: Source, dtype: torch.dtype, device: torch.device | str = "cpu") -> LazyRows:
        made = Tensor._make_wrapper_subclass(cls, source.shape, dtype=dtype, device=torch.device(device))
        made.source, made.stream = source, None
        made.width = max(1, int(np.prod(source.shape[1:])))
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyRows({tuple(self.shape)}, {self.dtype}, {self.device}, from {type(self.source).__name__})"

    def __deepcopy__(self, memo: Any) -> LazyRows:
        return self

    def like(self, source: Source | None = None, dtype: torch.dtype | None = None, device: Any = None) -> LazyRows:
        """The same with other rows, or handed out in another way."""
        return LazyRows(source or self.source, dtype or self.dtype, device or self.device)

    # -- rows --------------------------------------------------------------------------------------------------------

    def take(self, index: Any) -> Tensor:
        """`x[index]`: very many rows stay as they are where their source can tell them apart, all else is made."""
        rest: tuple[Any, ...] = ()
        if isinstance(index, tuple):
            index, rest = index[0], index[1:]
        chosen = self.numbers(index)
        count = length(chosen)
        if isinstance(chosen, slice) and count * self.width > CELLS and not rest:
            return self.like(self.source.cut(chosen.start, chosen.stop))
        pick = getattr(self.source, "pick", None)
        if pick is not None and count * self.width > CELLS and not rest and (found := pick(chosen)) is not None:
            return self.like(found)
        found = self.made(chosen, "these rows")
        if isinstance(index, int):
            return found[0][rest] if rest else found[0]
        return found[(slice(None), *rest)] if rest else found

    def numbers(self, index: Any) -> Numbers:
        """Row numbers of an index over the first dimension."""
        n = self.source.shape[0]
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

    def host(self, rows: Numbers) -> Tensor:
        """Some rows in the processor's memory, of the kind that is handed out."""
        return self.source.read(rows).to(self.dtype)

    def made(self, rows: Numbers, what: str, most: int | None = None) -> Tensor:
        """Some rows on the device; where they are a block, the next one is read ahead."""
        if length(rows) * self.width > (most or max(CELLS, LEAST * self.width)):
            raise ValueError(
                f"{what}: {length(rows):,} rows x {self.width:,} numbers would be made at once "
                f"({in_bytes(8 * length(rows) * self.width)}), and the data are kept elsewhere because they are many; take "
                f"fewer rows: SVI(batch_size=...), EM, or part of the data"
            )
        if not self.source.slow or not isinstance(rows, slice):
            return self.host(rows).to(self.device)
        if self.stream is None:
            self.stream = Stream(lambda key: (self.host(key),), self.device)
        (found,) = self.stream.take(rows)
        following = slice(rows.stop, min(2 * rows.stop - rows.start, self.source.shape[0]))
        if following.stop > following.start and rows.stop > rows.start:
            self.stream.expect(following)
        return found

    def whole(self, what: str = "the whole table") -> Tensor:
        """All rows."""
        most = None if self.source.slow else max(WHOLE, LEAST * self.width)
        return self.made(slice(0, self.source.shape[0]), what, most)

    def parts(self, size: int) -> Iterator[Tensor]:
        """Rows one piece after the other, at most `size` of them and never more than may be made."""
        n, size = self.source.shape[0], max(1, min(size, min(CELLS, PIECE) // self.width))
        for a in range(0, n, size):
            yield self.made(slice(a, min(a + size, n)), "a piece")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Questions about form are answered, rows are handed out, and only the rest asks for the whole table."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = getattr(func.__self__, "__name__", name) if name == "__get__" else name
        if name in FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in OWN and isinstance(args[0], LazyRows):
            return OWN[name](*args, **kwargs)

        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        home = next((v.device for v in given if isinstance(v, LazyRows)), torch.device("cpu"))
        there = any(not isinstance(v, LazyRows) and v.ndim for v in given)

        def filled(value: Any) -> Any:
            if not isinstance(value, LazyRows):
                return value
            if isinstance(value.source, HostTable):  # a look at the data, before any work
                table = value.source.table.to(value.dtype)
                return table.to(value.device) if there else table
            return value.whole(f"{name} on all rows")

        found = func(*map(filled, args), **{k: filled(v) for k, v in kwargs.items()})
        # A summary is wanted on the device; a large table of looks, such as `isnan`, stays where the data are.
        return tree_map_only(Tensor, lambda t: t.to(home) if t.numel() <= CELLS else t, found)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below `__torch_function__` nothing may see a tensor without numbers."""
        raise TypeError(f"{func} met a table whose rows are kept elsewhere; give it rows of it")


def in_bytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 5e8 else f"{count / 1e6:,.0f} MB"


def length(rows: Numbers) -> int:
    """How many."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _moved(x: LazyRows, *args: Any, **kwargs: Any) -> LazyRows:
    """`x.to(...)`."""
    given = [*args, kwargs.get("dtype"), kwargs.get("device")]
    dtype = next((a for a in given if isinstance(a, torch.dtype)), None)
    device = next((a for a in given if isinstance(a, str | torch.device)), None)
    other = next((a for a in args if isinstance(a, Tensor)), None)
    if other is not None:
        dtype, device = other.dtype, other.device
    return x.like(dtype=dtype, device=device)


def _aminmax(x: LazyRows) -> Any:
    """`torch.aminmax(x)`."""
    low, high = x.source.extremes()
    ends = (torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))
    return torch.return_types.aminmax(ends)  # type: ignore[attr-defined]


def _sum(x: LazyRows, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """`x.sum(...)`, piece by piece."""
    found = [p.sum() if dim is None else p.sum(dim, keepdim) for p in x.parts(LEAST)]
    return torch.stack(found).sum(0) if dim is None or dim % x.ndim == 0 else torch.cat(found)


def _mean(x: LazyRows, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """`x.mean(...)`."""
    return _sum(x, dim, keepdim) / (x.numel() if dim is None else x.shape[dim])


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
    "aminmax": _aminmax,
    "sum": _sum,
    "mean": _mean,
}


# -- problems with such tables --------------------------------------------------------------------------------------------


def has_lazy(kwargs: Mapping[str, Any]) -> bool:
    """Whether rows of any argument are made when they are asked for."""
    return any(isinstance(v, LazyRows) for v in kwargs.values())


def too_many(kwargs: Mapping[str, Any]) -> bool:
    """Whether a table's rows are read as they are needed, and could not be made all at once."""
    tables = [v for v in kwargs.values() if isinstance(v, LazyRows)]
    return any(v.source.slow and v.numel() > max(CELLS, LEAST * v.width) for v in tables)


def affordable(kwargs: Mapping[str, Any], count: int) -> int:
    """At most `count` rows, fewer where so many could not be made at once."""
    return min([count, *(max(LEAST, CELLS // v.width) for v in kwargs.values() if isinstance(v, LazyRows))])


def loaded(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of which every row is there."""
    if not has_lazy(kwargs):
        return kwargs
    return {n: v.whole("a run of the story") if isinstance(v, LazyRows) else v for n, v in kwargs.items()}


def pieces_of(kwargs: Mapping[str, Any], names: tuple[str, ...], rows: int, step: int) -> list[dict[str, Any]]:
    """The arguments in pieces of `step` rows; of those that are made when they are asked for, none is made yet."""

    def piece(value: Any, a: int) -> Any:
        if isinstance(value, LazyRows):
            return value.like(value.source.cut(a, min(a + step, rows)))
        return value[a : a + step]

    return [{n: piece(v, a) if n in names else v for n, v in kwargs.items()} for a in range(0, rows, step)]


def resident(problem: Problem, who: str) -> Problem:
    """The same problem for a method that sees all rows at once.

    Raises
    ------
    ValueError
        The table is too large for that.
    """
    if not has_lazy(problem.kwargs):
        return problem
    made = {
        n: v.whole(f"{who} sees all rows at once") if isinstance(v, LazyRows) else v for n, v in problem.kwargs.items()
    }
    return replace(problem, kwargs=made)
