"""Checkpoints of fits that are under way: tensors and a JSON card in one file, written beside the old one and renamed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import write_atomically

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


@dataclass(frozen=True)
class SavedState:
    """Where the state of one fit is kept.

    Parameters
    ----------
    path
        The file.
    method
        Name of the method, for messages.
    print
        `fingerprint` of the fit.

    Raises
    ------
    ValueError
        The folder does not exist.
    """

    path: Path
    method: str
    print: str

    def __post_init__(self) -> None:
        if not self.path.parent.is_dir():
            raise ValueError(
                f"{self.method}(checkpoint={str(self.path)!r}): the folder {str(self.path.parent)!r} does not exist"
            )

    def write(self, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
        """Replace what was kept."""
        from safetensors.torch import save

        text = json.dumps({"print": self.print, "method": self.method, **card})
        write_atomically(self.path, save(tensors, metadata={"card": text}))

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept, or None where there is no file.

        Raises
        ------
        ValueError
            The file is no checkpoint of this method, or belongs to another fit.
        """
        if not self.path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                card = json.loads(file.metadata()["card"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            method, given = card["method"], card["print"]
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} is no checkpoint of {self.method}, or is damaged ({error}); remove it"
            ) from error
        if (method, given) != (self.method, self.print):
            raise ValueError(
                f"{self.path} belongs to another fit (other data, story, seed or options; a checkpoint needs a fixed seed): "
                f"remove it, or choose another file"
            )
        return tensors, card
