"""Tables that stay on disk: `.npy` files as memory maps, and Parquet files that become one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Rows that are held at once.
ROWS = 65_536
#: Numbers up to which a file that cannot be mapped as it lies is left to be copied by who reads it.
COPIED = 4_000_000
LARGEST = np.iinfo(np.int64).max


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
        A .npy file; or a Parquet file, whose columns are written to a .npy file once, one row group after the other.  So are
        the rows of a large .npy file that cannot be mapped as it lies (column after column, bytes in another order, 16 bits).
    columns
        Of a Parquet file, by name, in this order; None takes all.
    keep
        The .npy file that another becomes; None takes the same name, ending in .npy or .plain.npy.  It is made again where the
        Parquet file is newer, or other columns or another dtype are asked for (a .json file beside it tells which it has).
    dtype
        "float32" or "float64".

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        A column that does not exist, exists twice or holds no numbers, another kind of file, a damaged one, or a .npy file
        of that name which did not come from here.
    ImportError
        Parquet without pyarrow.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    if path.suffix == ".npy":
        return _plain(_mapped(path), path, keep)
    if path.suffix != ".parquet":
        raise ValueError(f"{path.name} ends in {path.suffix!r}; these tables can stay on disk: .npy, .parquet")
    target = Path(keep) if keep is not None else path.with_suffix(".npy")
    wanted = {"columns": None if columns is None else list(columns), "dtype": dtype}
    return _kept(path, target, wanted, lambda: _from_parquet(path, target, columns, dtype))


def _mapped(path: Path) -> np.memmap:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path.name} is no table of numbers: {error}") from None


def _plain(table: np.memmap, path: Path, keep: str | os.PathLike[str] | None) -> np.memmap:
    """The same numbers as `fit` maps them: row after row, in this machine's order of bytes, 32 or 64 bits wide."""
    kind = table.dtype.kind
    wide = "i8" if kind in "iu" else "f4" if table.dtype.itemsize <= 4 else "f8"
    if (
        kind not in "fiu"
        or table.size <= COPIED
        or (table.dtype == np.dtype(wide) and table.dtype.isnative and table.flags.c_contiguous)
    ):
        return table
    if kind == "u" and (largest := max(int(table[a : a + ROWS].max()) for a in range(0, len(table), ROWS))) > LARGEST:
        raise ValueError(f"{path.name} holds {largest}, beyond 64-bit whole numbers")
    target = Path(keep) if keep is not None else path.with_suffix(".plain.npy")
    parts = (table[a : a + ROWS] for a in range(0, len(table), ROWS))
    return _kept(path, target, {"dtype": wide}, lambda: _write(target, wide, table.shape, parts))


def _kept(path: Path, target: Path, wanted: dict[str, Any], make: Callable[[], None]) -> np.memmap:
    """The file that `path` becomes: made once, and again where `path` is newer or something else is wanted."""
    card = target.with_name(f"{target.name}.json")
    if target.exists() and not card.exists():
        raise ValueError(
            f"{target} is there already and was not made from {path.name}; choose another file with keep=..."
        )
    fresh = target.exists() and target.stat().st_mtime >= path.stat().st_mtime
    if not fresh or json.loads(card.read_text(encoding="utf-8")) != wanted:
        make()
        card.write_text(json.dumps(wanted), encoding="utf-8")
    return _mapped(target)


def _write(target: Path, dtype: str, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Rows as a .npy file, written beside it and renamed.

    Not by way of a memory map: on a full disk that would end the process without a word.
    """
    beside = target.with_name(f"{target.name}.part")
    try:
        with open(beside, "wb") as file:
            told = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, told)
            for rows in parts:
                file.write(np.ascontiguousarray(rows, dtype).data)
        os.replace(beside, target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, f"{target} was not written: {error.strerror}") from error
        raise


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
        if not names:
            raise ValueError(f"{path.name}: columns is empty; it has {file.schema_arrow.names}")
        if twice := sorted({n for n in names if file.schema_arrow.names.count(n) > 1}):
            raise ValueError(f"{path.name} has several columns of the name {twice}; rename them, or choose others")
        if unknown := [n for n in names if n not in file.schema_arrow.names]:
            raise ValueError(f"{path.name} has no columns {unknown}; it has {file.schema_arrow.names}")
        kinds = {n: file.schema_arrow.field(n).type for n in names}
        wrong = {n: str(k) for n, k in kinds.items() if not (pa.types.is_integer(k) or pa.types.is_floating(k))}
        if wrong:
            raise ValueError(f"{path.name}: columns {wrong} hold no numbers; choose others with columns=[...]")

        def rows() -> Iterator[np.ndarray]:
            for batch in file.iter_batches(ROWS, columns=names):  # through the row groups; missing cells become NaN
                found = (batch.column(batch.schema.get_field_index(n)).cast(pa.float64(), safe=False) for n in names)
                yield np.column_stack([c.to_numpy(zero_copy_only=False) for c in found])

        _write(target, dtype, (file.metadata.num_rows, len(names)), rows())
