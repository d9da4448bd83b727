"""CSV and TSV files, every row counted before pandas parses them.

pandas fills short rows with missing values in silence and loses the place of a decoding error; here both are
told.
"""

import codecs
import csv
import io
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from .columns import Table

_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass
class _Survey:
    """Where the rows of a text begin, what the columns are called, and in which line each row ends."""

    names: list[str]
    start: int
    lines: array = field(default_factory=lambda: array("L"))
    blank: list[int] = field(default_factory=list)


def read_text(path: Path, encoding: str) -> Table:
    """The table in a file of separated values.

    The separator of a CSV file is whichever of comma, semicolon and tab its first line has most of.  A first
    line of numbers alone is a row, and columns are then called x1, x2, ...

    Raises
    ------
    ValueError
        Wrong or unknown encoding, NUL bytes, an unclosed quotation mark, rows of different lengths, no cells.
    """
    import pandas as pd

    text = decode(path, encoding)
    separator = "\t" if path.suffix.lower() == ".tsv" else _separator(text)
    survey = _survey(text, separator, path.name)
    if not survey.lines:
        raise ValueError(f"{path.name} is empty: it has column names {survey.names} and no rows")
    stream = io.StringIO(text, newline="")
    stream.seek(survey.start)
    # From 3.1 on every number is read to the last bit; before, it had to be asked for, and now asking is deprecated.
    exact = tuple(int(part) for part in pd.__version__.split(".")[:2]) >= (3, 1)
    frame = pd.read_csv(
        stream,
        sep=separator,
        header=None,
        names=range(len(survey.names)),
        index_col=False,
        skip_blank_lines=False,
        skipinitialspace=True,
        low_memory=False,
        **({} if exact else {"float_precision": "round_trip"}),
    )
    # The last line break is no row, and neither are blank lines at the end.
    frame = frame.iloc[: len(survey.lines)].drop(index=survey.blank)
    frame.columns = pd.Index(survey.names)
    blank = set(survey.blank)
    return Table(frame, path.name, lines=[line for row, line in enumerate(survey.lines) if row not in blank])


def decode(path: Path, encoding: str) -> str:
    """The text of a file, without its byte order mark.

    Raises
    ------
    ValueError
        An unknown encoding, a byte that is none of it, or a NUL byte, with its offset and a guess at what the file is.
    """
    return decode_bytes(path.read_bytes(), path.name, encoding)


def decode_bytes(data: bytes, where: str, encoding: str) -> str:
    """The same for bytes that came from `where`."""
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"encoding={encoding!r} is not known; try 'utf-8', 'latin-1' or 'utf-16'") from None
    hint = next((name for mark, name in _BOMS.items() if data.startswith(mark)), "latin-1")
    if hint == encoding.lower():
        hint = "latin-1"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not {encoding}: byte {data[error.start]:#04x} at offset {error.start} "
            f"({error.reason}); say which encoding it has, perhaps encoding={hint!r}"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{where} holds a NUL byte at offset {data.find(0)}: it is not {encoding} text, perhaps "
            "encoding='utf-16-le'"
        )
    return text.removeprefix("\ufeff")


def _separator(text: str) -> str:
    first = next((line for line in text[:100_000].splitlines() if line.strip()), "")
    return max(",;\t", key=first.count)


def _survey(text: str, separator: str, where: str) -> _Survey:
    """Hold every row against the first one."""
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=separator, skipinitialspace=True, strict=True)
    before, first = 0, [""]
    try:
        while _is_blank(first):
            before, first = stream.tell(), next(reader)
        headless = _are_numbers(first)
        names = [(cell.strip(), f"x{i + 1}")[headless or not cell.strip()] for i, cell in enumerate(first)]
        survey = _Survey(names, before if headless else stream.tell())
        if headless:
            survey.lines.append(reader.line_num)
        width, last = len(names), len(survey.lines)
        for row in reader:
            blank = _is_blank(row)
            if len(row) != width and not blank:
                raise ValueError(
                    f"{where}, line {reader.line_num}, has {len(row)} cells and the first line {width}; give "
                    f"every row {width} cells (separated by {separator!r}), and leave missing ones empty"
                )
            # Among several columns a blank line is decoration; in a single one it is a missing cell.
            if blank and width > 1:
                survey.blank.append(len(survey.lines))
            survey.lines.append(reader.line_num)
            if not blank:
                last = len(survey.lines)
    except StopIteration:
        raise ValueError(f"{where} is empty: it holds blank lines only") from None
    except csv.Error as error:
        raise ValueError(f"{where}, line {reader.line_num}: {error}") from None
    del survey.lines[last:]
    survey.blank = [row for row in survey.blank if row < last]
    return survey


def _is_blank(row: list[str]) -> bool:
    return len(row) < 2 and not "".join(row).strip()


def _are_numbers(row: list[str]) -> bool:
    filled = [cell for cell in row if cell.strip()]
    try:
        return bool([float(cell) for cell in filled])
    except ValueError:
        return False
