"""Whether the density of a row is one: its integral over every row there could be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from .density import Density
from .oracle import fitted, told_plainly

if TYPE_CHECKING:
    from ..posterior import Posterior

#: Nodes a column, by the number of columns, and the place of the outermost in units of the data's own spread.
NODES, REACH = {1: 20_000, 2: 800}, 3000.0


def mass(story: Any, data: Any, *, at: Posterior | Mapping[str, Tensor] | None = None) -> tuple[float, float]:
    """Integral of the density of one row over all real rows: 1, if it is a density.

    For stories whose rows have no latents, such as flows, with one or two columns. The nodes lie close where the data are and
    far apart in the tails, u = c + s sinh(t).

    Parameters
    ----------
    story, data
        As for `fit`; the data tell where to look.
    at
        As for `solve`.

    Returns
    -------
    The integral, and by how much it changes with half the nodes within a quarter of the reach.

    Raises
    ------
    ValueError
        The story has latents, more than two columns, or more than one table of rows.
    """
    with told_plainly():
        density = Density(*fitted(story, data, at))
        if density.places or density.states:
            raise ValueError(
                f"the story has latents {[*density.places, *density.states]}: use solve, which integrates them"
            )
        tables = [n for n, v in density.kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim]
        if len(tables) != 1 or density.kwargs[tables[0]].ndim > 2:
            raise ValueError(f"mass needs one table of rows (N,) or (N, D), got {tables or list(density.kwargs)}")
        x = density.kwargs[tables[0]]
        columns = 1 if x.ndim == 1 else x.shape[1]
        if columns not in NODES:
            raise ValueError(f"{tables[0]} has {columns} columns, and a grid reaches 2")
        found = [_total(density, tables[0], x, columns, NODES[columns] // part, REACH / part**2) for part in (1, 2)]
    return found[0], abs(found[0] - found[1])


def _total(density: Density, name: str, x: Tensor, columns: int, count: int, reach: float) -> float:
    """The trapezoid rule with `count` nodes a column."""
    table = x.reshape(len(x), columns)
    centre = table.mean(0)
    scale = (table - centre).abs().amax(0).clamp_min(1e-3)
    end = float(torch.tensor(reach).asinh())
    t = torch.linspace(-end, end, count, dtype=torch.float64)
    nodes = torch.cartesian_prod(*(c + s * t.sinh() for c, s in zip(centre, scale))).reshape(-1, columns)
    weights = torch.cartesian_prod(*((s * t.cosh() * (t[1] - t[0])) for s in scale)).reshape(-1, columns).prod(1)
    total = 0.0
    for rows, w in zip(nodes.split(50_000), weights.split(50_000)):
        kwargs = {**density.kwargs, name: rows.reshape(len(rows), *x.shape[1:])}
        trace: Any = poutine.trace(density.model).get_trace(**kwargs)
        trace.compute_log_prob()
        sites = [n for n in trace.nodes.values() if n["type"] == "sample" and n["is_observed"]]
        logs = sum(n["log_prob"] for n in sites if type(n["fn"]).__name__ != "_Subsample")
        total += float((torch.as_tensor(logs).reshape(len(rows), -1).sum(1).exp() * w).nan_to_num(0.0).sum())
    return total
