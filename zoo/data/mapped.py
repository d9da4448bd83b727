"""Tables that stay on disk: `.npy` files as memory maps, and Parquet files that become one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

#: Rows of a Parquet file that are held at once.
ROWS = 65_536


def open_table(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    keep: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
) -> np.memmap:
    """A table (N, D) that stays on disk, as `fit` takes it.

    Parameters
    ----------
    path
        A .npy file; or a Parquet file, whose columns are written to a .npy file once, one row group after the other.
    columns
        Of a Parquet file, by name, in this order; None takes all.
    keep
        The .npy file that a Parquet file becomes; None takes the same name with that ending.  It is made again where the
        Parquet file is newer.
    dtype
        "float32" or "float64".

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        A column that does not exist or holds no numbers, another kind of file, or a damaged one.
    ImportError
        Parquet without pyarrow.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    if path.suffix == ".npy":
        return _mapped(path)
    if path.suffix != ".parquet":
        raise ValueError(f"{path.name} ends in {path.suffix!r}; these tables can stay on disk: .npy, .parquet")
    target = Path(keep) if keep is not None else path.with_suffix(".npy")
    if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
        _from_parquet(path, target, columns, dtype)
    return _mapped(target)


def _mapped(path: Path) -> np.memmap:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path.name} is no table of numbers: {error}") from None


def _from_parquet(path: Path, target: Path, columns: Sequence[str] | None, dtype: str) -> None:
    """Row groups of a Parquet file as rows of a .npy file, written beside it and renamed."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(
            f"{path.name}: Parquet needs pyarrow, which is not installed; pip install pyarrow, or store the table as .npy"
        ) from None
    try:
        file = ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path.name} is no Parquet file, or damaged: {error}") from None
    with file:
        names = list(columns) if columns is not None else file.schema_arrow.names
        if unknown := [n for n in names if n not in file.schema_arrow.names]:
            raise ValueError(f"{path.name} has no columns {unknown}; it has {file.schema_arrow.names}")
        kinds = {n: file.schema_arrow.field(n).type for n in names}
        wrong = {n: str(k) for n, k in kinds.items() if not (pa.types.is_integer(k) or pa.types.is_floating(k))}
        if wrong:
            raise ValueError(f"{path.name}: columns {wrong} hold no numbers; choose others with columns=[...]")
        beside, row = target.with_name(f"{target.name}.part"), 0
        shape = (file.metadata.num_rows, len(names))
        table = np.lib.format.open_memmap(beside, mode="w+", dtype=dtype, shape=shape)
        for batch in file.iter_batches(ROWS, columns=names):  # goes through the row groups; missing cells become NaN
            for j, name in enumerate(names):
                values = batch.column(batch.schema.get_field_index(name)).cast(pa.float64(), safe=False)
                table[row : row + len(batch), j] = values.to_numpy(zero_copy_only=False)
            row += len(batch)
        table.flush()
        del table
    os.replace(beside, target)
