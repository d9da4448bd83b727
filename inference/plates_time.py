"""Sites whose value is a Markov chain along one of its own dimensions, and the rows that see one step of it alone.

A distribution says so itself: `time_dim` is the event dimension along which a step depends on the one before it alone,
`first_arguments` names the arguments that shape the first step alone. Which rows belong to which step is no claim of
anybody's: it is tried, by changing one step and looking who notices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .plates_algebra import references
from .plates_replay import another_value, replay, rows_changed, unwrap


@dataclass(frozen=True)
class TimeAxis:
    """A chain within one site.

    Attributes
    ----------
    steps
        T.
    first, later
        Parents of the first step, and of each later one.
    columns
        (plate, rows of it that see each of the shown steps): such a plate falls into one part a step.
    told
        Given arrays that hold nothing but the step of each row.
    """

    steps: int
    first: frozenset[str]
    later: frozenset[str]
    columns: tuple[tuple[str, tuple[int, ...]], ...] = ()
    told: frozenset[str] = frozenset()

    @property
    def shown(self) -> tuple[int, ...]:
        """Steps that a diagram shows, from 1: two and the last one, or all of a short chain."""
        return tuple(range(1, self.steps + 1)) if self.steps <= 3 else (1, 2, self.steps)


def time_axis(fn: Any, value: Any, site: Any) -> TimeAxis | None:
    """The chain that the distribution of a site declares, with no plate divided yet; None without one."""
    base = unwrap(fn)
    dim = getattr(base, "time_dim", None)
    if not isinstance(dim, int) or not isinstance(value, Tensor) or not -len(fn.event_shape) <= dim < 0:
        return None
    first = set(getattr(base, "first_arguments", ()))
    named = {key: references(expr) for key, expr in site.arguments}
    early = frozenset().union(*(names for key, names in named.items() if key in first))
    late = frozenset().union(*(names for key, names in named.items() if key not in first))
    unknown = frozenset(site.parents) - early - late
    steps = value.shape[dim]
    return TimeAxis(steps, early | unknown, late | unknown) if steps > 1 else None


def divided(
    axis: TimeAxis,
    name: str,
    frame: Any,
    sites: Mapping[str, Any],
    found: Mapping[str, dict],
    values: Mapping[str, Any],
    before: Mapping[str, dict],
    run: Callable[..., None],
) -> list[Tensor] | None:
    """Which rows of a plate see each shown step of the site `name`, (rows,) each; None where that is not one step a row.

    A plate is divided where each of its rows sees one step, and no row has to do with another row.
    """
    inside = [n for n, s in sites.items() if frame.name in (p.name for p in s.plates)]
    users = [n for n in inside if name in sites[n].parents and n in found]
    apart = all(frame.name in sites[n].aligned or not set(inside) & set(sites[n].parents) for n in inside if n in found)
    closed = all(n in inside for n, s in sites.items() if set(inside) & set(s.parents))
    if not users or not apart or not closed or name in inside:
        return None
    value, dim = values[name], unwrap(found[name]["fn"]).time_dim
    other = another_value(found[name]["fn"], value)
    if other is None:
        return None
    rows: list[Tensor] = []
    for step in axis.shown:
        one, rest = value.detach().clone(), other.detach().clone()
        one.select(dim, step - 1).copy_(other.select(dim, step - 1))
        rest.select(dim, step - 1).copy_(value.select(dim, step - 1))
        seen = [_rows(replay(run, {**values, name: v}), before, users, values, frame) for v in (one, rest)]
        if seen[0] is None or seen[1] is None or bool((seen[0] & seen[1]).any()) or not bool((seen[0] | seen[1]).all()):
            return None
        rows.append(seen[0])
    return rows if any(bool(r.any()) for r in rows) else None


def _rows(
    after: dict[str, dict] | None, before: Mapping[str, dict], users: list[str], values: Mapping[str, Any], frame: Any
) -> Tensor | None:
    """Rows of the plate where any user notices, (rows,)."""
    total = torch.zeros(frame.size, dtype=torch.bool)
    for n in users:
        if after is None or n not in after or n not in values:
            return None
        rows = rows_changed(before[n], after[n], values[n], frame.dim, frame.size)
        if rows is None or len(rows) != frame.size:
            return None
        total |= rows.cpu()
    return total


def tells_step(value: Any, axis: TimeAxis, rows: list[Tensor]) -> bool:
    """Whether a given array holds the step of each row and nothing else, counted from anywhere."""
    if not isinstance(value, Tensor) or value.dim() != 1 or len(value) != len(rows[0]) or value.is_complex():
        return False
    held = [value.cpu()[r].double() - step for step, r in zip(axis.shown, rows, strict=True) if bool(r.any())]
    return bool((torch.cat(held) == held[0][0]).all())
