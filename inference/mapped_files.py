"""Files that are read where they lie: whether they are still as long as they were when they were mapped.

A file that is shortened in place ends the process that reads beyond its end (SIGBUS), and no error can be raised then.  What
can be done is to look before every block: the length of an open file takes the operating system less than a microsecond.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

Length = Callable[[], int | None]


@dataclass(frozen=True)
class MappedFile:
    """A file, the bytes that are mapped of it (from its beginning), and how to ask for its present length.

    Attributes
    ----------
    name
        For messages.
    need
        Bytes without which the map has a hole.
    length
        The bytes that it has now; None where nobody maps it any more.
    shared
        Whether PyTorch mapped it, whose storage knows its name.
    """

    name: str
    need: int
    length: Length
    shared: bool = False

    def check(self) -> None:
        """Refuse to read a file that was shortened.

        Raises
        ------
        ValueError
            Its name, and its length then and now.
        """
        now = self.length()
        if now is not None and now < self.need:
            raise ValueError(
                f"{self.name} was shortened, or written anew, while it was read: it had {self.need:,} bytes or more and has "
                f"{now:,} now. Restore it and call again; a file in use is replaced safely by writing another and renaming it"
            )


#: Address of a tensor's numbers -> the file that they lie in.
KNOWN: dict[int, MappedFile] = {}


def file_of(array: Any) -> MappedFile | None:
    """The file that an array, or a list with gaps (`gaps.Gapped`), is a view of, if any."""
    array = getattr(array, "array", array)
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array._mmap is not None:  # type: ignore[attr-defined]
            name, memory = array.filename, array._mmap  # type: ignore[attr-defined]
            begin = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
            told = os.fspath(name) if name else "a mapped file"
            return MappedFile(told, begin + len(memory), partial(length_of, weakref.ref(memory)))
        array = array.base
    return None


def length_of(memory: Any) -> int | None:
    """Bytes of the file behind a map, which stays open under whatever name."""
    found = memory()
    try:
        return None if found is None else found.size()
    except (OSError, ValueError):  # closed
        return None


def remember(tensor: Tensor, array: np.ndarray) -> Tensor:
    """The same tensor, whose file is known from now on to whoever holds a part of it."""
    found = file_of(array)
    if found is not None:
        for address in [a for a, f in KNOWN.items() if f.length() is None]:
            del KNOWN[address]
        KNOWN[tensor.untyped_storage().data_ptr()] = found
    return tensor


def remember_shared(tensor: Tensor) -> Tensor:
    """The same for a tensor that PyTorch mapped itself (`torch.from_file`)."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu":
        return tensor
    storage = tensor.untyped_storage()
    name = getattr(storage, "filename", None)
    if name and storage.data_ptr() not in KNOWN:
        try:
            number = os.stat(name).st_ino
        except OSError:
            return tensor
        KNOWN[storage.data_ptr()] = MappedFile(
            str(name), storage.nbytes(), partial(length_under, str(name), number), True
        )
    return tensor


def length_under(name: str, number: int) -> int | None:
    """Bytes of a file by its name, as long as that is the same file."""
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_size if found.st_ino == number else None


def known_file(tensor: Tensor) -> MappedFile | None:
    """The file that a tensor is a view of, if that is known."""
    if not KNOWN or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return None
    storage = tensor.untyped_storage()
    try:
        found = KNOWN.get(storage.data_ptr())
    except RuntimeError:  # what stands for a tensor while a program is recorded has no memory
        return None
    if found is None or found.length() is None or (found.shared and storage.filename != found.name):
        return None  # not a file, or memory that lies where one was mapped before
    return found


def still_there(*values: Any) -> None:
    """Refuse to go on where the file of a tensor or an array was shortened; anything else passes.

    Raises
    ------
    ValueError
        See `MappedFile.check`.
    """
    for value in values:
        found = known_file(value) if isinstance(value, Tensor) else file_of(value)
        if found is not None:
            found.check()
