"""Checkpoints of SVI: every climb with its optimiser, and the random stream, so that a run goes on to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DivergenceError
from ..saved_state import SavedState, fingerprint, particulars

if TYPE_CHECKING:
    from ..problem import Problem
    from .ascent import Ascent, Leaves

#: Seconds between two writes.
EVERY = 5.0
#: Numbers and flags of a climb that are neither tensors nor settings.
NUMBERS = ("converged", "rising", "slope", "noise", "factor", "length", "phase", "stalls", "history")


class ClimbFile:
    """The checkpoint of one fit.

    Parameters
    ----------
    path, problem
        The file, and what is fitted.
    parts
        What else must be the same for a run to go on.

    Raises
    ------
    ValueError
        The folder does not exist.
    """

    every = EVERY

    def __init__(self, path: Path, problem: Problem, *parts: Any) -> None:
        layout = [(s.name, s.shape) for s in (*problem.structure.latents, *problem.structure.learned)]
        parts = (*parts, layout)
        self.state = SavedState(path, "SVI", fingerprint(problem, *parts), particulars(problem, *parts))
        self.written = time.perf_counter()

    def mode(self) -> str | None:
        """How the interrupted run made its steps: another mode would round differently."""
        found = self.state.read()
        return None if found is None else str(found[1]["mode"])

    def write(self, ascents: list[Ascent], dropped: list[DivergenceError], final: bool, now: bool = False) -> None:
        """Keep all climbs, and whether the best was chosen to go on, if it is time or `now`."""
        if not ascents or not (now or time.perf_counter() - self.written >= self.every):
            return
        tensors = {f"{i}/{n}": v.contiguous().clone() for i, a in enumerate(ascents) for n, v in tensors_of(a).items()}
        target: Any = ascents[-1].target
        tensors |= {f"random/{n}": v for n, v in random_state(target).items()}
        tensors |= {"order": target.batches.order.clone(), "runs": target.batches.runs.clone()}
        card = {
            "mode": target.mode,
            "made": getattr(target, "made", 0),
            "names": ascents[0].names,
            "climbs": [numbers_of(a) for a in ascents],
            "dropped": [str(d) for d in dropped],
            "final": final,
        }
        self.state.write(tensors, card)
        self.written = time.perf_counter()

    def read(self, fresh: Callable[[Leaves], Ascent]) -> tuple[list[Ascent], list[DivergenceError], bool] | None:
        """The climbs as they were kept, or None where there is no file; the random stream goes on from there.

        Parameters
        ----------
        fresh
            Makes a climb from parameters.

        Raises
        ------
        ValueError
            The file belongs to another fit, or is no checkpoint.
        """
        found = self.state.read()
        if found is None:
            return None
        tensors, card = found
        ascents = []
        for i, numbers in enumerate(card["climbs"]):
            own = {n.split("/", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{i}/")}
            ascent = fresh({n: own[f"parameter/{n}"] for n in card["names"]})
            restore(ascent, own, numbers)
            ascents.append(ascent)
        if ascents:
            target: Any = ascents[-1].target
            target.batches.order = tensors["order"].to(target.batches.device)
            target.batches.runs = tensors["runs"].to(target.batches.device)
            if hasattr(target, "made"):
                target.made = card["made"]
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"])
        return ascents, [DivergenceError(text) for text in card["dropped"]], bool(card["final"])

    def leave(self, finished: bool, ascents: list[Ascent], dropped: list[DivergenceError], final: bool) -> None:
        """Remove the file of a run that has come to its end; write that of another once more."""
        if finished:
            self.state.remove()
        else:
            self.write(ascents, dropped, final, now=True)


def random_state(target: Any) -> dict[str, Tensor]:
    """Of the generators that a step draws from."""
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state()} if target.batches.device.type == "cuda" else {})


def tensors_of(ascent: Ascent) -> dict[str, Tensor]:
    """Parameters, their averages, the optimiser's moments, the best held-out state."""
    found: dict[str, Tensor] = {}
    for part in ("parameters", "before", "average"):
        key = part.removesuffix("s")
        found |= {f"{key}/{n}": v.detach().cpu() for n, v in zip(ascent.names, getattr(ascent, part), strict=True)}
    for index, state in ascent.optimiser.state_dict()["state"].items():
        found |= {f"adam/{index}/{n}": v.detach().cpu() for n, v in state.items()}
    if ascent.level is not None:
        found["level"] = torch.from_numpy(ascent.level.copy())
    if ascent.holdout is not None and ascent.holdout.best is not None:
        found |= {f"best/{n}": v.cpu() for n, v in ascent.holdout.best.items()}
    return found


def numbers_of(ascent: Ascent) -> dict[str, Any]:
    """What JSON can say; NaN becomes None."""
    found = {n: getattr(ascent, n) for n in NUMBERS}
    found |= {n: None for n, v in found.items() if isinstance(v, float) and math.isnan(v)}
    if ascent.holdout is not None:
        found["looks"], found["look_seed"] = ascent.holdout.history, ascent.holdout.seed
    return found


def restore(ascent: Ascent, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put a climb where another one stood."""
    for name in NUMBERS:
        value = numbers[name]
        setattr(ascent, name, math.nan if value is None else value)
    with torch.no_grad():
        for part in ("parameters", "before", "average"):
            key = part.removesuffix("s")
            for name, tensor in zip(ascent.names, getattr(ascent, part), strict=True):
                tensor.copy_(tensors[f"{key}/{name}"])
    kept = ascent.optimiser.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
    ascent.optimiser.load_state_dict({"state": state, "param_groups": kept["param_groups"]})
    ascent.level = np.array(tensors["level"].numpy()) if "level" in tensors else None
    if ascent.holdout is not None:
        ascent.holdout.history = [(int(a), float(b)) for a, b in numbers["looks"]]
        ascent.holdout.seed = numbers["look_seed"]
        best = {n.removeprefix("best/"): v for n, v in tensors.items() if n.startswith("best/")}
        like = dict(zip(ascent.names, ascent.parameters, strict=True))
        ascent.holdout.best = {n: v.to(like[n]) for n, v in best.items()} or None
