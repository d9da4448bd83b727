"""Data as users have them (arrays, lists, data frames, tensors) become named tensors, or an error that says what to do."""

import inspect as signatures
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .lazy_rows import CELLS, HostTable, LazyRows
from .looks import column_ends, where
from .mapped_files import known_file, remember, remember_shared
from .sparse_rows import is_sparse_matrix, stored_counts
from .streaming import stays

#: Beyond this, squares overflow float32 and sums of squares lose every digit in float64.
LARGEST = 1e15
#: Rows up to which a list of all row numbers is nothing beside the data.
LISTED = 4_000_000
#: Numbers in a file from which a copy of it is told.
NOTICED = 25_000_000
#: Numbers in a float32 array from which it is kept as it is.
KEEP_SINGLE = 1_000_000


class DataNotice(UserWarning):
    """The data were usable, but something about them was changed or should be known."""


def bind(
    model: Callable, data: Any, dtype: torch.dtype, device: torch.device | str = "cpu", new: bool = False
) -> dict[str, Any]:
    """Tensors for the arguments of `model`.

    Parameters
    ----------
    model
        A Pyro program.
    data
        One array (the first argument), a tuple (the first arguments in order), a mapping or a data frame whose columns
        are all arguments (by name). Arrays, lists, pandas and torch objects are taken; NaN stays NaN.
    dtype, device
        Of floating tensors (large float32 arrays stay what they are); whole numbers stay whole (they may index),
        unless the story turns out to need floats.
    new
        Rows of a story that has been fitted: nothing is learned from them, so that a column may be missing in all.

    Returns
    -------
    dict of the arguments given.

    Raises
    ------
    TypeError
        Unknown or missing arguments, or values that are not numbers.
    ValueError
        Empty data, infinities, columns without a single number.
    """
    names = [
        name
        for name, p in signatures.signature(model).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    given = _by_name(model, names, data)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise TypeError(
            f"data has {unknown}, which the story does not take; its arguments are {names}. "
            f"Rename the keys of data or add the argument to the story"
        )
    needed = [
        name
        for name, p in signatures.signature(model).parameters.items()
        if name in names and p.default is p.empty and name not in given
    ]
    if needed:
        raise TypeError(f"the story needs {needed} and data has {list(given)}; pass data as a mapping with these keys")
    return {name: to_value(name, value, dtype, device, new) for name, value in given.items()}


def _by_name(model: Callable, names: list[str], data: Any) -> dict[str, Any]:
    if data is None:
        return {}
    if isinstance(data, str | os.PathLike):
        raise TypeError(
            f"data is the path {os.fspath(data)!r}; open it first: open_table(path), open_corpus(path) or numpy.load(path)"
        )
    if hasattr(data, "as_arguments"):  # an object that knows what a story wants to see of it, such as a corpus
        return dict(data.as_arguments(names))
    if isinstance(data, Mapping):
        return dict(data)
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        columns = [str(c) for c in data.columns]
        if len(names) > 1 and set(columns) <= set(names):
            return {str(c): data[c] for c in data.columns}
        _numeric_columns(data)
    if not names:
        raise TypeError("the story takes no arguments, so it cannot be shown data; give it one, such as `x=None`")
    values = data if isinstance(data, tuple) and not hasattr(data, "_fields") else (data,)
    if len(values) > len(names):
        raise TypeError(f"data has {len(values)} parts and the story takes {len(names)} arguments: {names}")
    return dict(zip(names, values))


def _numeric_columns(frame: Any) -> None:
    wrong = [str(c) for c in frame.columns if np.asarray(frame[c]).dtype.kind not in "fiu"]
    if wrong:
        raise TypeError(
            f"columns {wrong} do not hold numbers; select or encode them first, e.g. data.drop(columns={wrong})"
        )


def to_value(name: str, value: Any, dtype: torch.dtype, device: torch.device | str = "cpu", new: bool = False) -> Any:
    """One argument: numbers in arrays become a checked tensor; scalars (sizes, switches) pass as they are."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensor = remember_shared(value.detach())
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} is a sparse tensor ({tensor.layout}); pass {name}.to_dense()")
    elif is_sparse_matrix(value):
        tensor = stored_counts(name, value)
    else:
        tensor = _from_array(name, value)
    if tensor.is_complex():
        raise TypeError(f"{name} has dtype {tensor.dtype}; densities need real numbers")
    kind = dtype if tensor.is_floating_point() else torch.bool if tensor.dtype == torch.bool else torch.long
    if tensor.dtype == torch.float32 and tensor.numel() >= KEEP_SINGLE:
        kind = tensor.dtype  # twice the memory would hold no more digits; sums over it are made in float64
    converted = tensor.is_floating_point() and tensor.dtype != kind and tensor.numel() > CELLS
    if converted and known_file(tensor) is not None:  # a copy of another kind would be as long as the file
        check_values(name, tensor, new)
        return LazyRows(HostTable(tensor), kind, device)
    if not stays([tensor], torch.device(device)) and tensor.ndim:
        check_values(name, tensor, new)
        return LazyRows(HostTable(tensor), kind, device)
    copied = tensor.dtype != kind or (isinstance(value, np.memmap) and known_file(tensor) is None)
    tensor = tensor.to(device=device, dtype=kind)
    stays_here = torch.device(device).type == "cpu"  # a card has its own memory, and its data are read here first
    if isinstance(value, np.memmap) and copied and stays_here and tensor.numel() >= NOTICED:
        told = f"{value.dtype}{'' if value.flags.c_contiguous else ', column after column'}"
        warnings.warn(
            f"{name} lies in a file as {told}, and cannot be read from there as it is: it is copied to memory "
            f"({tensor.numel() * tensor.element_size() / 1e9:.1f} GB). open_table(path) writes it as it can be read, once",
            DataNotice,
            stacklevel=2,
        )
    check_values(name, tensor, new)
    return tensor


def _from_array(name: str, value: Any) -> Tensor:
    shown = plain(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", category=getattr(np, "VisibleDeprecationWarning", DeprecationWarning))
            array = np.asarray(shown)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{name} is not a rectangular array of numbers: {error}") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"{name} has dtype {array.dtype} ({type(value).__name__}); densities need real numbers. "
            f"Encode words or objects as numbers first: labels by {name}.astype('category').cat.codes"
        )
    if array.dtype.kind in "ui" and array.dtype.itemsize == 8 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {array.max()}, beyond 64-bit whole numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u":
        array = array.astype(np.int64)
    if isinstance(value, np.memmap) and array.flags.c_contiguous and array.dtype.kind in "fi":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read only, and never written to
            return remember(torch.from_numpy(np.asarray(array)), array)
    return torch.from_numpy(np.array(array, copy=True, order="C", subok=False))


def plain(name: str, value: Any) -> Any:
    """The same with NaN for cells that an array or a frame knows to be missing: NumPy would make data of them, or objects.

    Raises
    ------
    ValueError
        Whole numbers are masked, which have no NaN.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        if value.dtype.kind != "f":
            raise ValueError(
                f"{name} is masked in {int(np.ma.count_masked(value))} cells and holds {value.dtype}, which knows no missing "
                f"cells; pass {name}.astype(float).filled(numpy.nan)"
            )
        return value.filled(np.nan)
    kinds: list[Any] = list(value.dtypes) if hasattr(value, "columns") else [getattr(value, "dtype", None)]
    nullable = any(hasattr(k, "na_value") for k in kinds) and hasattr(value, "to_numpy")  # of pandas, or Arrow's
    if nullable and all(getattr(k, "kind", "O") in "fiu" for k in kinds):
        whole = not bool(np.asarray(value.isna()).any()) and all(k.kind in "iu" for k in kinds)
        return value.to_numpy(dtype=np.int64 if whole else np.float64, na_value=0 if whole else np.nan)
    return value


def first_index(mask: Tensor) -> tuple[int, ...]:
    """Index of the first True of `mask`."""
    return tuple(int(i) for i in np.unravel_index(int(mask.flatten().int().argmax()), tuple(mask.shape)))


def check_values(name: str, tensor: Tensor, new: bool = False) -> None:
    """Refuse what no story can explain: no rows, infinities, columns of NaN, numbers that overflow.

    Raises
    ------
    ValueError
        Naming the argument, how many values are wrong, the first index and what to do.
    """
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        return
    low, high = (float(v) for v in torch.aminmax(tensor))  # NaN wins over any number
    if math.isnan(low):
        tensor = tensor if tensor.ndim else tensor.reshape(1)
        least, most = column_ends(tensor)
        dead = (least > most).reshape(tensor.shape[1:] or (1,))
        if dead.any() and not new:
            what = f"column {_short(first_index(dead))} of {name}" if tensor.ndim > 1 else name
            raise ValueError(f"{what} is NaN in every row ({len(tensor)} of {len(tensor)}); drop it")
        least, most = least[least <= most], most[least <= most]
        low, high = (float(least.min()), float(most.max())) if len(least) else (0.0, 0.0)
    size = max(abs(low), abs(high))
    if math.isinf(size):
        tensor = tensor if tensor.ndim else tensor.reshape(1)
        count, index = where(tensor, torch.isinf)
        raise ValueError(
            f"{name} holds {count} infinite values, the first is {tensor[index].item()} at index "
            f"{_short(index)}; remove them or mark them missing with NaN"
        )
    if size > LARGEST:
        raise ValueError(f"the scale of {name} is {size:.0e}; standardise it first: ({name} - mean) / sd")


def has_nan(value: Tensor) -> bool:
    """Whether any number is missing: one pass, no copy."""
    return value.numel() > 0 and bool(torch.aminmax(value).max.isnan())


def _short(index: tuple[int, ...]) -> str:
    return str(index[0]) if len(index) == 1 else str(index)


def num_rows(kwargs: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Common length of the row arguments."""
    sizes = {len(kwargs[name]) for name in names if isinstance(kwargs.get(name), Tensor)}
    return sizes.pop() if len(sizes) == 1 else None


def some_rows(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different row numbers at random, in no order; beyond `LISTED` rows without a list of all of them."""
    if rows <= LISTED:
        return torch.randperm(rows, generator=generator, device="cpu")[:count]
    drawn = torch.randint(rows, (2 * count,), generator=generator, device="cpu").unique()
    return drawn[torch.randperm(len(drawn), generator=generator, device="cpu")[:count]]


def take_rows(kwargs: Mapping[str, Any], names: tuple[str, ...], rows: Any) -> dict[str, Any]:
    """The same arguments with `rows` (a slice or an index) of those in `names`."""
    return {name: value[rows] if name in names else value for name, value in kwargs.items()}
