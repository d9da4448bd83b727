"""From a raw table to numbers: which columns, what each cell is worth, and where the first bad one stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Table:
    """Cells as they were found.

    Attributes
    ----------
    frame
        Columns of any type.
    where
        What to call the table in errors.
    vector
        Whether it was one-dimensional.
    lines
        Line of the file in which each row ends, where there is one.
    """

    frame: "pd.DataFrame"
    where: str
    vector: bool = False
    lines: Sequence[int] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the columns, as text."""
        return [str(name) for name in self.frame.columns]

    def column(self, name: str) -> "pd.Series":
        """The column of that name."""
        return self.frame.iloc[:, self.names.index(name)]

    def place(self, row: int) -> str:
        """Row, counted from 0 as in x, and its line where that is known."""
        return f"row {row}" + ("" if self.lines is None else f" (line {self.lines[row]})")


def check_table(table: Table) -> None:
    """Refuse a table without cells or with two columns of one name.

    Raises
    ------
    ValueError
        As said.
    """
    names = table.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{table.where} has several columns called {twice!r}; give each a name of its own")
    if not names or not len(table.frame):
        raise ValueError(f"{table.where} is empty: {len(names)} columns and {len(table.frame)} rows below their names")


def choose_columns(table: Table, columns: Sequence[str | int] | str | None, labels: str | None) -> list[str]:
    """Names of the columns that make x, in order.

    Raises
    ------
    ValueError
        A name or position that the table does not have, one that comes twice, or none at all.
    """
    names = table.names
    if labels is not None and labels not in names:
        raise ValueError(f"labels={labels!r} is no column of {table.where}; it has {names}")
    if columns is None:
        chosen = [name for name in names if name != labels]
    else:
        wanted = [columns] if isinstance(columns, str) else list(columns)
        chosen = [_name(table, column) for column in wanted]
    if not chosen:
        raise ValueError(f"no columns of {table.where} are left for x; choose some of {names}")
    twice = next((name for name in chosen if chosen.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"columns names {twice!r} twice")
    return chosen


def _name(table: Table, column: str | int) -> str:
    names = table.names
    if isinstance(column, str) and column in names:
        return column
    if not isinstance(column, str | bool) and -len(names) <= column < len(names):
        return names[column]
    close = get_close_matches(str(column), names, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"columns: {table.where} has no column {column!r}; it has {names}, at 0 to {len(names) - 1}.{guess}"
    )


def numbers(table: Table, name: str) -> np.ndarray:
    """One column as float64 (N,), NaN where a cell is empty.

    Raises
    ------
    ValueError
        A cell that is no number; names column, value and row, and the columns that would do.
    """
    values, bad = _convert(table.column(name))
    if bad is None:
        return values
    fine = [other for other in table.names if _convert(table.column(other))[1] is None]
    value = table.column(name).iloc[bad]
    shown = repr(value.item() if hasattr(value, "item") else value)
    mend = f"take the others with columns={fine}" if fine else "no column of this table holds numbers alone"
    raise ValueError(
        f"column {name!r} of {table.where} holds {shown} in {table.place(bad)}, which is no number; {mend}, "
        f"or encode {name!r} as numbers (a missing cell is left empty)"
    )


def _convert(column: "pd.Series") -> tuple[np.ndarray, int | None]:
    """Values, and the first row whose cell is no number."""
    import pandas as pd
    from pandas.api import types

    kind = column.dtype
    present = column.notna().to_numpy()
    if types.is_bool_dtype(kind) or types.is_complex_dtype(kind) or types.is_datetime64_any_dtype(kind):
        return np.empty(0), int(present.argmax())
    if types.is_numeric_dtype(kind):
        return column.to_numpy(dtype=np.float64, na_value=np.nan), None
    cells = column.astype(object)
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    # pandas would take True for 1 and a date for its nanoseconds.
    odd = cells.map(lambda cell: not isinstance(cell, int | float | str | Decimal) or isinstance(cell, bool))
    words = cells.map(lambda cell: isinstance(cell, str) and cell.strip().lower() not in ("", "nan"))
    bad = present & (odd | (words & np.isnan(values))).to_numpy(dtype=bool)
    return values, int(bad.argmax()) if bad.any() else None


def label_codes(table: Table, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as whole numbers (N,), and what each stands for; whole numbers stay as they are, without names.

    Raises
    ------
    ValueError
        A row without a label.
    """
    column = table.column(name)
    missing = column.isna().to_numpy()
    if missing.any():
        row = int(missing.argmax())
        raise ValueError(f"labels: column {name!r} of {table.where} is empty in {table.place(row)}")
    values, bad = _convert(column)
    if bad is None and bool((values == np.round(values)).all()) and bool((values >= 0).all()):
        return values.astype(np.int64), ()
    words: Any = column.astype(str).to_numpy(dtype=object)
    kinds, codes = np.unique(words, return_inverse=True)
    return codes.astype(np.int64), tuple(str(kind) for kind in kinds)
