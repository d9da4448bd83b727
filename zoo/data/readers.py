"""Tables from files and data frames.

Everything becomes float64; an empty cell becomes NaN, which stands for "not seen".  What cannot be a number
is an error that names column, row and value.  Pickled content is never loaded.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import Table, check_table, choose_columns, label_codes, numbers
from .dataset import Dataset
from .text_tables import read_text

if TYPE_CHECKING:
    import pandas as pd

_SUFFIXES = (".csv", ".tsv", ".parquet", ".npy", ".npz")


def read(
    source: Any,
    columns: Sequence[str | int] | str | None = None,
    *,
    labels: str | None = None,
    encoding: str = "utf-8",
) -> Dataset:
    """A table as a `Dataset`.

    Parameters
    ----------
    source
        Path of a CSV, TSV, Parquet, NPY or NPZ file; or a data frame: of pandas, or anything with
        `to_pandas`, `__arrow_c_stream__` or `__dataframe__`.
    columns
        Which columns to take, by name or position, in this order; all by default.
    labels
        Column with a label a row, words or whole numbers; it is kept apart from x.
    encoding
        Of CSV and TSV files.

    Returns
    -------
    Dataset with x (N, D), or (N,) for a one-dimensional array or series.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        Nothing there to read.
    ValueError
        An empty, ragged, damaged or wrongly encoded file; unknown columns; a cell that is no number.
    TypeError
        Neither a path nor a data frame.
    ImportError
        Parquet without pyarrow.
    """
    import torch

    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        table, name, origin = _table_in(path, encoding), path.stem, str(source)
    else:
        table, name, origin = _from_memory(source), "table", f"{type(source).__name__} in memory"
    check_table(table)
    chosen = choose_columns(table, columns, labels)
    codes, words = (None, ()) if labels is None else label_codes(table, labels)
    x = np.stack([numbers(table, column) for column in chosen], axis=1)
    return Dataset(
        name=name,
        x=torch.from_numpy(x[:, 0].copy() if table.vector else x),
        labels=None if codes is None else torch.from_numpy(codes),
        feature_names=tuple(chosen),
        label_names=words,
        source=origin,
    )


def _table_in(path: Path, encoding: str) -> Table:
    """The file's cells as they are."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path.name} ends in {suffix!r}; these can be read: {', '.join(_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty: it has no bytes")
    if suffix == ".parquet":
        return Table(_parquet(path), path.name)
    return _array_table(path) if suffix in (".npy", ".npz") else read_text(path, encoding)


def _parquet(path: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError:
        raise ImportError(
            f"{path.name}: Parquet needs pyarrow, which is not installed; pip install pyarrow, or save as CSV"
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} is no Parquet file, or damaged: {error}") from None


def _array_table(path: Path) -> Table:
    """Arrays of an NPY or NPZ file side by side; a matrix called `a` gives columns a1, a2, ..."""
    import pandas as pd

    arrays = _arrays(path)
    shapes = {key: array.shape for key, array in arrays.items()}
    if not arrays or any(len(shape) not in (1, 2) for shape in shapes.values()):
        raise ValueError(f"{path.name} holds arrays of shapes {shapes}; a table is (N,) or (N, D)")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"{path.name} holds arrays of different lengths, {shapes}; save one table a file")
    parts: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        if array.ndim == 1:
            parts[key] = array
        else:
            parts |= {f"{key}{i + 1}": array[:, i] for i in range(array.shape[1])}
    vector = len(arrays) == 1 and len(next(iter(shapes.values()))) == 1
    return Table(pd.DataFrame(parts), path.name, vector=vector)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    import zipfile
    import zlib

    damage = (ValueError, OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"x": loaded}
        else:
            with loaded:
                arrays = {key: loaded[key] for key in loaded.files}
    except damage as error:
        pickled = "pickle" in str(error)
        why = "it is damaged, or holds Python objects, which are never loaded" if pickled else str(error)
        kind = path.suffix[1:].upper()
        raise ValueError(f"{path.name} is no {kind} file of plain numbers: {why}") from None
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            kind = getattr(array, "dtype", type(array).__name__)
            raise ValueError(f"{path.name}: array {key!r} has dtype {kind}; save real numbers")
    return arrays


def _from_memory(source: Any) -> Table:
    """A data frame of any library as one of pandas."""
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return Table(source, "the table")
    if isinstance(source, pd.Series):
        name = "x" if source.name is None else source.name
        return Table(source.to_frame(name=name), "the series", vector=True)
    ways = {
        "to_pandas": lambda: source.to_pandas(),
        "__arrow_c_stream__": lambda: _from_arrow(source),
        "__dataframe__": lambda: _from_interchange(source),
    }
    failures = []
    for attribute, way in ways.items():
        if hasattr(source, attribute):
            try:
                found = way()
            # What that way needs is not there; another may do.
            except (ImportError, AttributeError, NotImplementedError) as error:
                failures.append(f"{attribute}: {error}")
            else:
                return _from_memory(found) if isinstance(found, pd.Series) else Table(found, "the table")
    kind = type(source).__name__
    if failures:
        raise ImportError(f"this {kind} cannot be turned into a pandas data frame ({'; '.join(failures)})")
    raise TypeError(
        f"read takes a path or a data frame, got {kind}; arrays and tensors need no reading: hand them over as they are"
    )


def _from_arrow(source: Any) -> "pd.DataFrame":
    import pyarrow

    return pyarrow.table(source).to_pandas()


def _from_interchange(source: Any) -> "pd.DataFrame":
    import warnings

    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the protocol is deprecated, and all that some libraries offer
        return pd.api.interchange.from_dataframe(source)
