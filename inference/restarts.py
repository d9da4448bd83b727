"""What several starts of one fit say about each other: the best, the middle, the spread, and how many different ends.

The same words and keys for EM's restarts, SVI's starts and the chains of samplers, on the objective (which no numbering of
components and no rotation of factors changes) and, for chains, on the invariant draws as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Within-chain sd between the means of two chains from which they are in different places.
APART = 3.0
#: Rises of one step a row, in units of the tolerance, that a climb may have left when it stops.
SLOW = 100.0


def restarts(what: str, objective: str, values: Sequence[float], modes: int, **more: Any) -> dict[str, Any]:
    """What goes into `posterior.diagnostics["restarts"]`.

    Parameters
    ----------
    what, objective
        What there are several of ("restarts", "starts", "chains"), and what each is judged by.
    values
        Its value at the end of each.
    modes
        How many different ends there are.
    **more
        Other facts, by name.

    Returns
    -------
    dict
        "what", "objective", "count", "best", "median", "spread" (best less worst), "modes", "values".
    """
    known = np.array([v for v in values if math.isfinite(v)])
    best, median, worst = (float(f(known)) if len(known) else math.nan for f in (np.max, np.median, np.min))
    facts = {"what": what, "objective": objective, "count": len(values)}
    return {
        **facts,
        "best": best,
        "median": median,
        "spread": best - worst,
        "modes": modes,
        "values": [float(v) for v in values],
        **more,
    }


def levels(values: Sequence[float], slack: float | Sequence[float]) -> int:
    """Groups of values that lie closer to a neighbour than both may still move."""
    wide = np.broadcast_to(np.asarray(slack, dtype=np.float64), (len(values),))
    pairs = sorted((v, s) for v, s in zip(values, wide) if math.isfinite(v))
    return bool(pairs) + sum(b - a > max(s, t) for (a, s), (b, t) in itertools.pairwise(pairs))


def of_climbs(what: str, objective: str, values: Sequence[float], tol: float, rows: int) -> dict[str, Any]:
    """Climbs that went to their ends: those that differ by less than what slow climbs leave ended in one mode."""
    slack = max(1e-3, SLOW * tol * rows)
    return restarts(what, objective, values, levels(values, slack))


def of_trials(what: str, objective: str, histories: Sequence[Sequence[float]], trial: int) -> dict[str, Any]:
    """Short climbs, of which the best went on: each by its last steps, which may still rise as fast as they did.

    Parameters
    ----------
    histories
        Objective by step of each.
    trial
        Steps of the short climb.
    """
    values, slack = [], []
    for history in histories:
        steps = np.asarray(history[:trial][-max(1, min(trial, len(history)) // 4) :], dtype=np.float64)
        half = max(1, len(steps) // 2)
        rise = abs(steps[-half:].mean() - steps[:half].mean())
        values.append(float(steps.mean()))
        slack.append(2 * rise + 3 * steps.std() / math.sqrt(len(steps)))
    return restarts(what, objective, values, levels(values, slack), steps=trial)


def of_chains(draws: Mapping[str, NDArray], height: NDArray | None) -> dict[str, Any]:
    """Chains of a sampler: those with a mean apart in any invariant entry, or in the log density, are in different places.

    Parameters
    ----------
    draws
        Site -> (chains, draws, ...shape), components matched and rotations taken out.
    height
        Log density of the draws (chains, draws), or None.
    """
    flat = [v.reshape(*v.shape[:2], -1) for v in draws.values()] + ([height[..., None]] if height is not None else [])
    table = np.concatenate(flat, -1).astype(np.float64)
    mean, spread = table.mean(1), np.maximum(table.std(1), 1e-12 * (1 + np.abs(table).max((0, 1))))
    chains = len(mean)
    place = list(range(chains))
    for a in range(chains):
        for b in range(a):
            near = np.abs(mean[a] - mean[b]) <= APART * np.sqrt((spread[a] ** 2 + spread[b] ** 2) / 2)
            if near.all():
                old, new = place[a], place[b]
                place = [new if p == old else p for p in place]
    values = height.mean(1).tolist() if height is not None else [math.nan] * chains
    return restarts("chains", "mean log density", values, len(set(place)))


def restarts_line(found: Mapping[str, Any]) -> str:
    """In one line."""
    count, modes = found["count"], found["modes"]
    where = f" after {found['steps']} steps" if "steps" in found else ""
    ends = ("place" if found["what"] == "chains" else "mode") + ("s" if modes != 1 else "")
    text = f"{count} {found['what']}: {modes} distinct {ends}"
    if math.isfinite(found["best"]):
        text += f"; {found['objective']}{where} best {found['best']:.6g}, median {found['median']:.6g}, "
        text += f"spread {found['spread']:.3g}"
    bad = found.get("collapsed", 0)
    return text + (f"; {bad} collapsed" if bad else "")
