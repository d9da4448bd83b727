"""Checkpoints of SVI: every climb with its optimiser, and the random stream, so that a run goes on to the same bits.

Of several ranks the first keeps one file for all: what all share, and the entries of every rank's rows in the order of the
rows.  Any number of ranks goes on from it.  As many as before take up their own random streams and the batches that were
left; another number, having other rows, begins an epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import Ranks
from ..errors import DivergenceError
from ..saved_state import SavedState, fingerprint, particulars
from ..sharing import fewer_rows

if TYPE_CHECKING:
    from ..problem import Problem
    from .ascent import Ascent, Leaves

#: Seconds between two writes.
EVERY = 5.0
#: Steps between two looks of several ranks at the clock of the first.
LOOK = 10
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
        self.ranks, self.device = problem.ranks, problem.device
        parts = (*parts, layout(problem))
        self.state = SavedState(path, "SVI", fingerprint(problem, *parts), particulars(problem, *parts))
        self.written = time.perf_counter()
        self._asked = 0

    def mode(self) -> str | None:
        """How the interrupted run made its steps: another mode would round differently."""
        found = self.kept()
        return None if found is None else str(found[1]["mode"])

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What the first rank finds, on every rank."""
        return self.state.of_first(self.ranks)

    def due(self) -> bool:
        """Whether it is time, on every rank alike."""
        late = time.perf_counter() - self.written >= self.every
        if not self.ranks.several:
            return late
        self._asked += 1
        return self._asked % (LOOK if self.every else 1) == 0 and self.ranks.first(late)

    def write(self, ascents: list[Ascent], dropped: list[DivergenceError], final: bool, now: bool = False) -> None:
        """Keep all climbs, and whether the best was chosen to go on, if it is time or `now`."""
        if not ascents or not (now or self.due()):
            return
        target: Any = ascents[-1].target
        own = {f"{i}/{n}": v.contiguous().clone() for i, a in enumerate(ascents) for n, v in tensors_of(a).items()}
        mine = {f"random/{n}": v for n, v in random_state(target).items()}
        mine |= {"order": target.batches.order.cpu().clone(), "runs": target.batches.runs.cpu().clone()}
        tensors = whole_rows(own, ascents[0], self.ranks) | mine
        if self.ranks.several:
            tensors |= {f"rank{r}/{n}": v for r, part in enumerate(self.ranks.gather(mine)) for n, v in part.items()}
        card = {
            "mode": target.mode,
            "made": getattr(target, "made", 0),
            "names": ascents[0].names,
            "climbs": [numbers_of(a) for a in ascents],
            "dropped": [str(d) for d in dropped],
            "final": final,
            "rows": list(self.ranks.counts),
        }
        if self.ranks.leads:
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
        found = self.kept()
        if found is None:
            return None
        tensors, card = found
        ascents: list[Ascent] = []
        for i, numbers in enumerate(card["climbs"]):
            whole = {n.split("/", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{i}/")}
            ascent = begun(self.on_device(fresh), whole, card["names"], self.ranks)
            restore(ascent, own_rows(whole, ascent, self.ranks), numbers)
            ascents.append(ascent)
        same = card.get("rows", []) == list(self.ranks.counts)
        if same and self.ranks.several:
            prefix = f"rank{self.ranks.rank}/"
            tensors = tensors | {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        if ascents:
            target: Any = ascents[-1].target
            if same:
                target.batches.order = tensors["order"].to(target.batches.where)
                target.batches.runs = tensors["runs"].to(target.batches.where)
            if hasattr(target, "made"):
                target.made = card["made"]
            set_random_state(target, tensors, same, sum(len(a.history) for a in ascents))
        return ascents, [DivergenceError(text) for text in card["dropped"]], bool(card["final"])

    def on_device(self, fresh: Callable[[Leaves], Ascent]) -> Callable[[Leaves], Ascent]:
        """A climb's maker that takes parameters to where the fit runs: a file is read by the processor."""
        return lambda leaves: fresh({n: v.to(self.device) for n, v in leaves.items()})

    def leave(self, finished: bool, ascents: list[Ascent], dropped: list[DivergenceError], final: bool) -> None:
        """Remove the file of a run that has come to its end; write that of another once more."""
        if finished:
            if self.ranks.leads:
                self.state.remove()
        else:
            self.write(ascents, dropped, final, now=True)


def layout(problem: Problem) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what is learned, with the rows of all ranks."""
    structure, ranks = problem.structure, problem.ranks
    sites = [*structure.latents, *structure.learned]
    if ranks.shares_rows:
        own = structure.num_rows or 1
        whole = replace(structure, plates={**structure.plates, str(structure.data_plate): problem.all_rows})
        sites = [fewer_rows(s, whole, own) for s in sites]
    return [(s.name, s.shape) for s in sites]


def random_state(target: Any) -> dict[str, Tensor]:
    """Of the generators that a step draws from."""
    found, device = {"cpu": torch.get_rng_state()}, target.batches.device
    if target.batches.generator is not None:
        found["batches"] = target.batches.generator.get_state()
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(target: Any, tensors: dict[str, Tensor], same: bool, steps: int) -> None:
    """Go on with what was drawn from; ranks that are others than before draw rows, and what belongs to rows, anew."""
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and target.batches.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], target.batches.device)
    generator, ranks = target.batches.generator, target.problem.ranks
    if generator is not None and same and "random/batches" in tensors:
        generator.set_state(tensors["random/batches"])
    elif generator is not None:
        generator.manual_seed(target.problem.seed * 1_000_003 + ranks.rank + 7_919 * steps)
    if ranks.shares_rows and not same and target.problem.structure.continuous_locals:
        torch.manual_seed(int(torch.randint(2**31, ())) + ranks.rank)


# -- parameters with a value a row ------------------------------------------------------------------------------------------


def parameter_of(key: str, ascent: Ascent) -> str:
    """The parameter that a tensor of `tensors_of` belongs to."""
    kind, name = key.split("/", 1)
    if kind != "adam":
        return name
    rates = [ascent.lr * ascent.target.rate(n) for n in ascent.names]
    order = [n for rate in ascent.rates for n, own in zip(ascent.names, rates, strict=True) if own == rate]
    return order[int(name.split("/")[0])]


def by_row(key: str, value: Tensor, ascent: Ascent) -> bool:
    """Whether a tensor has an entry a row of this rank."""
    local = getattr(ascent.target, "by_row", lambda name: False)
    return key != "level" and value.ndim > 0 and local(parameter_of(key, ascent))


def whole_rows(tensors: dict[str, Tensor], ascent: Ascent, ranks: Ranks) -> dict[str, Tensor]:
    """Tensors ("climb/key" -> value) with the entries of the rows of all ranks."""
    if not ranks.shares_rows:
        return tensors
    names = [n for n, v in tensors.items() if by_row(n.split("/", 1)[1], v, ascent)]
    parts = ranks.gather({n: tensors[n] for n in names}) if names else []
    return tensors | {n: torch.cat([p[n] for p in parts]) for n in names}


def own_rows(tensors: dict[str, Tensor], ascent: Ascent, ranks: Ranks) -> dict[str, Tensor]:
    """Tensors (key -> value) with the entries of this rank's rows."""
    if not ranks.shares_rows:
        return tensors
    part = slice(ranks.offset, ranks.offset + ranks.counts[ranks.rank])
    return {n: v[part] if by_row(n, v, ascent) else v for n, v in tensors.items()}


def begun(fresh: Callable[[Leaves], Ascent], tensors: dict[str, Tensor], names: list[str], ranks: Ranks) -> Ascent:
    """A climb of this rank's size, its parameters those that were kept."""
    probe = fresh({n: tensors[f"parameter/{n}"].clone() for n in names})
    if not ranks.shares_rows:
        return probe
    own = own_rows({f"parameter/{n}": tensors[f"parameter/{n}"] for n in names}, probe, ranks)
    return fresh({n: own[f"parameter/{n}"].clone() for n in names})


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
