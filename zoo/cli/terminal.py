"""What the command prints around the answers, and the checks that spare a long run a sad end."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from .faults import CommandError, UsageError

#: Columns of a table that goes to a file or a pipe, where no terminal says.
WIDTH = 110


def note(text: str) -> None:
    """A remark on standard error: standard output is for the answer."""
    print(text, file=sys.stderr)


@contextmanager
def terse_warnings() -> Iterator[None]:
    """Warnings as one line each, without the file and source line that only a developer wants."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **options: note(f"warning: {message}")
        yield


@contextmanager
def counting_interrupts() -> Iterator[list[int]]:
    """Ctrl-C as ever, and counted: a method that stops early with what it has must still not look finished."""
    seen: list[int] = []
    usual = signal.getsignal(signal.SIGINT)

    def count(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    # Elsewhere than in the main thread, or where Ctrl-C is ignored, there is nothing to count.
    mine = usual is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGINT, count)
    try:
        yield seen
    finally:
        if mine:
            signal.signal(signal.SIGINT, usual)


def leads() -> bool:
    """Whether this process speaks for all, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Several processes, one voice: what the others would print is dropped."""
    if leads():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def check_writable(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file that could not be written, before the work that fills it.

    Raises
    ------
    UsageError
        The suffix is none of `suffixes`.
    CommandError
        The folder does not exist or may not be written to, or the path is a folder.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise CommandError(f"{path} is a folder; name a file in it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise CommandError(f"there is no folder {folder} for {path.name}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"{path} may not be written to")


def print_catalog() -> None:
    """Tables of all stories by chapter and of all data sets."""
    from rich.console import Console
    from rich.table import Table

    from ..catalog import catalog
    from ..data import datasets

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    table = Table("chapter", "story", "what it tells", "methods", box=None, padding=(0, 2, 0, 0))
    chapter = None
    for entry in catalog():
        first = "" if entry.chapter == chapter else entry.chapter
        table.add_row(first, entry.name, entry.description, entry.methods)
        chapter = entry.chapter
    console.print("Stories", style="bold")
    console.print(table)
    console.print("\nData sets", style="bold")
    console.print(", ".join(datasets()))
    console.print("\nzoo show STORY tells one; zoo fit STORY --data DATA fits it.", style="dim")
