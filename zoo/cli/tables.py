"""From a table (a file or a data set of the zoo) to the arguments of a story."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from .faults import CommandError, UsageError

#: Arguments that a data set's labels answer to, besides its columns.
_LABELS = ("y", "label", "labels")
#: Bytes of a .npy file from which it is mapped and not read.
MAPPED = 1 << 29


def read_data(source: str, columns: Sequence[str] | None = None) -> Any:
    """The `Dataset` in a file, or the zoo's data set of that name.

    Raises
    ------
    CommandError
        Neither a file nor a data set.
    UsageError
        `columns` that the data set does not have.
    """
    from ..data import datasets, load, read

    path = Path(source)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return read(path, columns=list(columns) if columns else None)
    if source not in datasets():
        try:
            load(source)
        except ValueError as error:
            raise CommandError(f"{error}; there is no file {source!r} either") from None
    dataset = load(source)
    if columns:
        names = list(dataset.feature_names or ())
        unknown = [c for c in columns if c not in names]
        if unknown:
            raise UsageError(f"--columns: {source} has no column {unknown[0]!r}; it has {names}")
        from dataclasses import replace

        keep = [names.index(c) for c in columns]
        dataset = replace(dataset, x=dataset.x[:, keep], feature_names=tuple(columns))
    return dataset


def stored_arguments(story: Any, source: str) -> dict[str, Any]:
    """What a story sees of data that stay on disk: a corpus that was stored, or a large .npy table; {} of all other data."""
    from ..data import open_corpus, open_table

    path = Path(source)
    names = list(signature(getattr(story, "model", story)).parameters)
    if (path / "corpus.json").exists():
        return dict(open_corpus(path).as_arguments(names))
    if names and path.suffix == ".npy" and path.is_file() and path.stat().st_size >= MAPPED:
        return {names[0]: open_table(path)}
    return {}


def arguments_from(dataset: Any, arguments: Mapping[str, bool], label: str) -> list[dict[str, Any]]:
    """The ways to give a table to a story, the most likely first.

    A story with one argument gets the whole table, a single column as (N,) or else as (N, 1).  Where columns
    carry the names of arguments, each goes to its own; what is left over goes to the one argument that still
    waits for data, so `story(X, y)` reads `y` by its name and the other columns as `X`.

    Parameters
    ----------
    dataset
        With `x` (N, D) or (N,), `feature_names` and perhaps `labels` (N,).
    arguments
        The story's data arguments, each with whether it is needed.
    label
        What to call the story in errors.

    Returns
    -------
    list of mappings from argument to tensor.

    Raises
    ------
    CommandError
        The story takes no data, or its needed arguments and the columns do not match.
    """
    if not arguments:
        raise CommandError(f"{label} takes no data; give it an argument for what was seen, such as `x=None`")
    first = next(iter(arguments))
    columns = _columns(dataset, arguments)
    matched = {name: columns[name] for name in arguments if name in columns}
    rest = [name for name in dataset.feature_names or () if name not in matched]
    waiting = [name for name in arguments if name not in matched and (arguments[name] or name == first)]
    if not matched and (len(arguments) == 1 or waiting == [first]):
        return _shapes(first, dataset.x)
    if len(waiting) > 1 or (waiting and not rest):
        raise CommandError(
            f"{label} takes {list(arguments)} and the columns are {list(columns)}: "
            f"no data for {' and '.join(waiting)}. Name the columns after the arguments"
        )
    if not waiting:
        return [matched]
    names = list(dataset.feature_names)
    table = dataset.x[:, [names.index(name) for name in rest]]
    return [{**way, **matched} for way in _shapes(waiting[0], table)]


def _shapes(name: str, x: Any) -> list[dict[str, Any]]:
    if x.ndim == 2 and x.shape[1] == 1:
        return [{name: x[:, 0]}, {name: x}]
    if x.ndim == 1:
        return [{name: x}, {name: x[:, None]}]
    return [{name: x}]


def _columns(dataset: Any, arguments: Mapping[str, bool]) -> dict[str, Any]:
    """Columns by name; whole numbers become integers, since a column that was named may be an index."""
    names = list(dataset.feature_names or ())
    table = dataset.x if dataset.x.ndim == 2 else dataset.x[:, None]
    columns = {name: _whole(table[:, i]) for i, name in enumerate(names)}
    if dataset.labels is not None:
        columns = {name: dataset.labels for name in _LABELS if name in arguments} | columns
    return columns


def _whole(column: Any) -> Any:
    return column.long() if bool((column == column.round()).all()) else column


def write_rows(rows: Mapping[str, Any], path: Path | None) -> list[str]:
    """Sites with one value a row as CSV: a scalar site is a column, a vector site one column an entry.

    Parameters
    ----------
    rows
        (N, *event) tensors by site.
    path
        File to write; None writes to standard output.

    Returns
    -------
    The names of the columns.
    """
    import sys

    import pandas as pd

    columns: dict[str, Any] = {}
    for name, value in rows.items():
        flat = value.detach().cpu().reshape(len(value), -1)
        if value.ndim == 1:
            columns[name] = flat[:, 0].numpy()
        else:
            columns.update({f"{name}_{i + 1}": flat[:, i].numpy() for i in range(flat.shape[1])})
    pd.DataFrame(columns).to_csv(path if path is not None else sys.stdout, index=False)
    return list(columns)
