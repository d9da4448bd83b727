"""Errors as people at a terminal want them: one message, a line to look at, an exit code."""

import linecache
import traceback
from pathlib import Path

#: Exit codes: an error in data or story, a command that cannot be meant, Ctrl-C.
FAULT, USAGE, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """Data or a story that the command cannot use; the text says what was found and what to do."""

    exit_code = FAULT


class UsageError(CommandError):
    """The command line itself is wrong: an unknown method, a setting that the story does not have."""

    exit_code = USAGE


def describe(error: BaseException, file: Path | None = None) -> str:
    """What to tell the user about `error`.

    Parameters
    ----------
    error
        What was raised.
    file
        The user's own story file; an error that passed through it is reported with the line it passed.

    Returns
    -------
    The message, over several lines where there is a place in a file to show.
    """
    if isinstance(error, CommandError):
        return str(error)
    if file is not None:
        place = where(error, file)
        if place:
            return f"{type(error).__name__}: {_message(error)}\n{place}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror or type(error).__name__}: {error.filename}"
    if isinstance(error, (ValueError, TypeError, ImportError, OSError)) or type(error).__name__ == "RankError":
        return _message(error)
    return f"{type(error).__name__}: {_message(error)}\n(`--debug` shows where)"


def where(error: BaseException, file: Path) -> str:
    """File, line and source of the deepest frame of `error` that lies in `file`; empty if none does."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == file:
        source = (error.text or "").strip()
        return f"  {file.name}, line {error.lineno}" + (f"\n    {source}" if source else "")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    if not frames:
        return ""
    last = frames[-1]
    source = linecache.getline(last.filename, last.lineno or 0).strip()
    place = f"  {file.name}, line {last.lineno}" + ("" if last.name == "<module>" else f", in {last.name}")
    return place + (f"\n    {source}" if source else "")


def _message(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return str(error.msg)
    if isinstance(error, KeyError) and error.args:
        return repr(error.args[0])
    return str(error) or type(error).__name__
