"""Checkpoints of fits that are under way: tensors and a JSON card in one file, written beside the old one and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, checksum, write_atomically
from .data import DataNotice

if TYPE_CHECKING:
    from .problem import Problem

#: Rows of each argument that tell one data set from another.
PRINT_ROWS = 1000


def fingerprint(problem: Problem, *parts: Any) -> str:
    """Hash of what must be the same for a fit to go on: data, story and seed, and whatever else shows in `repr`.

    Rows count as those of all ranks, so that any number of ranks may go on.
    """
    digest = hashlib.sha256()
    digest.update(repr((parts, problem.seed, type(problem.story).__name__)).encode())
    shared = problem.structure.row_arguments if problem.ranks.shares_rows else ()
    for name, value in sorted(problem.kwargs.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            count = problem.all_rows if name in shared else len(value) if value.ndim else 0
            index = torch.linspace(0, count - 1, min(PRINT_ROWS, count)).long()
            if name in shared:
                rows = problem.ranks.rows({name: value}, (name,), index)[name]
            else:
                rows = value[index] if value.ndim else value
            shape = (count, *value.shape[1:]) if value.ndim else ()
            digest.update(repr(shape).encode() + rows.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def particulars(problem: Problem, *parts: Any) -> dict[str, str]:
    """What a checkpoint belongs to, in words: where two fits differ, these say in what."""
    shapes = {n: tuple(v.shape) if isinstance(v, Tensor) else v for n, v in sorted(problem.kwargs.items())}
    story = problem.story if getattr(problem.story, "model", None) is not None else None
    return {
        "story": repr(story) if story is not None else getattr(problem.story, "__qualname__", "a function"),
        "data": ", ".join(f"{n} {v}" for n, v in shapes.items()),
        "seed": str(problem.seed),
        "precision": str(problem.dtype).removeprefix("torch."),
        "options": repr(parts),
    }


@dataclass(frozen=True)
class SavedState:
    """Where the state of one fit is kept, and beside it the state before.

    Parameters
    ----------
    path
        The file; the state before is in `<path>.previous`.
    method
        Name of the method, for messages.
    print
        `fingerprint` of the fit.
    about
        `particulars` of the fit.

    Attributes
    ----------
    lost
        Why the state could not be written, each time that it could not.

    Raises
    ------
    ValueError
        The folder does not exist.
    """

    path: Path
    method: str
    print: str
    about: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if not self.path.parent.is_dir():
            raise ValueError(
                f"{self.method}(checkpoint={str(self.path)!r}): the folder {str(self.path.parent)!r} does not exist"
            )
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.method}(checkpoint={str(self.path)!r}) is no file; name one in a folder")

    @property
    def previous(self) -> Path:
        """The state before the last."""
        return Path(f"{self.path}.previous")

    def write(self, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
        """Replace what was kept; a disk that is full is told once and does not end the fit."""
        from safetensors.torch import save

        text = json.dumps({"print": self.print, "method": self.method, "about": self.about, **card})
        payload = save(tensors, metadata={"card": text, "sha256": checksum(tensors, text)})
        try:
            self._keep_previous()
            write_atomically(self.path, payload)
        except OSError as error:
            if not self.lost:
                warnings.warn(f"the state of this fit is not kept: {error.strerror}", DataNotice, stacklevel=2)
            self.lost.append(str(error.strerror))

    def _keep_previous(self) -> None:
        """A second name for the old file, so that at no moment there is neither."""
        link = Path(f"{self.previous}.new")
        try:
            link.unlink(missing_ok=True)
            os.link(self.path, link)
            os.replace(link, self.previous)
        except OSError:
            pass  # no file yet, or a file system without links: then there is one state only

    def remove(self) -> None:
        """The fit has come to its end: nothing is left to go on from."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept, or None where there is no file.

        Raises
        ------
        CheckpointError
            The file is no checkpoint of this method, is damaged, or belongs to another fit; every difference is listed.
        """
        if not self.path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        mend = f"remove it to start afresh, or go on from the state before with checkpoint={str(self.previous)!r}"
        mend = mend if self.previous.exists() else "remove it to start afresh"
        try:
            with safe_open(str(self.path), framework="pt") as file:
                metadata = file.metadata()
                # Copies: what lies in the mapped file is not aligned, and products of it round in another order.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            text, sha256 = metadata["card"], metadata["sha256"]
            card = json.loads(text)
            method, given, about = card["method"], card["print"], card.get("about", {})
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path} is no checkpoint of {self.method}, or is damaged ({error}); {mend}"
            ) from error
        if checksum(tensors, text) != sha256:
            raise CheckpointError(f"{self.path} is damaged: its SHA-256 does not match; {mend}")
        if (method, given) != (self.method, self.print):
            pairs = [("method", method, self.method)]
            pairs += [(k, about.get(k), v) for k, v in self.about.items()]
            listed = [f"  {k}: saved {a}, now {b}" for k, a, b in pairs if a != b] or ["  the numbers in the data"]
            raise CheckpointError(
                f"{self.path} belongs to another fit (a checkpoint needs a fixed seed); what differs:\n"
                + "\n".join(listed)
                + "\nremove it, or choose another file"
            )
        return tensors, card
