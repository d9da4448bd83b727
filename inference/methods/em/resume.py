"""Checkpoints of a climb: written while it runs, read when the same fit is asked for again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .climb import Climb, Run

if TYPE_CHECKING:
    from ...joint import Block
    from ...problem import Problem
    from . import EM

#: Rows of each argument that tell one data set from another.
PRINT_ROWS = 1000


def fingerprint(em: EM, problem: Problem, layout: tuple[Block, ...], offset: int) -> str:
    """What must be the same for a climb to go on: data, story, seed and options."""
    digest = hashlib.sha256()
    options = (em.estimate, em.tol, em.ridge, em.driver, em.batch_size, em.kernels, em.restarts)
    blocks = [(b.name, b.shape) for b in layout if not b.local]
    digest.update(repr((options, blocks, problem.seed, offset, type(problem.story).__name__)).encode())
    for name, value in sorted(problem.kwargs.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            rows = value[torch.linspace(0, len(value) - 1, min(PRINT_ROWS, len(value))).long()] if value.ndim else value
            digest.update(repr(tuple(value.shape)).encode() + rows.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


@dataclass
class Saved:
    """The checkpoint of one group of runs.

    `every` iterations it is written, to a temporary file that replaces the old one.
    """

    path: Path
    print: str
    every: int = 5
    written: int = field(default=0, compare=False)

    @classmethod
    def for_fit(cls, em: EM, problem: Problem, blocks: tuple[Block, ...], offset: int) -> Saved:
        """Where this climb is kept; groups after the first have files of their own."""
        path = Path(str(em.checkpoint) + (f".{offset}" if offset else ""))
        if not path.parent.is_dir():
            raise ValueError(f"EM(checkpoint={str(em.checkpoint)!r}): the folder {str(path.parent)!r} does not exist")
        return cls(path, fingerprint(em, problem, blocks, offset))

    def write(self, climb: Climb) -> None:
        """Keep the state, if it is time."""
        if climb.iteration % self.every:
            return
        from safetensors.torch import save_file

        tensors = {f"theta/{n}": v.contiguous() for n, v in climb.theta.items()}
        tensors |= {f"extra/{n}": v.contiguous() for n, v in climb.extra.items()}
        runs: list[dict[str, Any]] = []
        for r, run in enumerate(climb.runs):
            tensors |= {f"run{r}/{n}": v.contiguous().clone() for n, v in run.theta.items()}
            runs.append({k: v for k, v in vars(run).items() if k != "theta"})
        card = {"print": self.print, "iteration": climb.iteration, "active": climb.active, "runs": runs}
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, name, metadata={"card": json.dumps(card)})
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def resume(self, start: Climb) -> Climb:
        """The state that was kept, if it belongs to this fit; else the start.

        Raises
        ------
        ValueError
            The file belongs to another fit, or is no checkpoint.
        """
        if not self.path.exists():
            return start
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                card = json.loads(file.metadata()["card"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path} is no checkpoint of EM, or is damaged ({error}); remove it") from error
        if card["print"] != self.print:
            raise ValueError(
                f"{self.path} belongs to another fit (other data, story, seed or options; a checkpoint needs a fixed seed): "
                f"remove it, or choose another file"
            )
        device = next(iter(start.theta.values())).device if start.theta else torch.device("cpu")

        def part(prefix: str) -> dict[str, Tensor]:
            return {n[len(prefix) :]: v.to(device) for n, v in tensors.items() if n.startswith(prefix)}

        runs = [Run(part(f"run{r}/"), **{**values}) for r, values in enumerate(card["runs"])]
        return Climb(part("theta/"), runs, card["active"], card["iteration"], part("extra/"))
