"""A density over the plane: what rows of two columns look like to a fitted story, beside new rows and the fitted ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .plots import ACCENT, INK, tidy

if TYPE_CHECKING:
    from .posterior import Posterior

#: Dots of each kind that are drawn at most.
DOTS = 2000


def plot_plane(posterior: Posterior, points: int = 200, seed: int | None = None) -> Any:
    """Density of rows (x_1, x_2) on a grid; the fitted rows and as many new ones on the same axes.

    Parameters
    ----------
    posterior
        An answer to a story that observes rows (N, 2) and nothing else in its rows.
    points
        Grid points a side.
    seed
        Of the new rows; None: that of the fit plus one.

    Returns
    -------
    Figure with three panels. The title tells the mass that the grid found, which is 1 where it is fine and wide enough.

    Raises
    ------
    ValueError
        The rows have other than two columns, or other arguments go with them.
    """
    from matplotlib.figure import Figure

    observed, rows = posterior.structure.observed, posterior.structure.row_arguments
    name = observed[0].argument if len(observed) == 1 else None
    given = posterior.problem.kwargs.get(name) if name else None
    if given is None or tuple(given.shape[1:]) != (2,) or tuple(rows) != (name,):
        found = {n: tuple(posterior.problem.kwargs[n].shape) for n in rows}
        raise ValueError(f"a density over the plane needs rows (N, 2) of one argument alone; the rows are {found}")
    x = given.double().cpu()
    x = x[~x.isnan().any(1)]
    low, high = x.amin(0), x.amax(0)
    margin = 0.25 * (high - low)
    first, second = (torch.linspace(float(a), float(b), points) for a, b in zip(low - margin, high + margin))
    grid = torch.cartesian_prod(first, second).to(given.dtype)
    density = posterior.log_prob({name: grid}).exp().double().cpu().reshape(points, points)
    cell = float(first[1] - first[0]) * float(second[1] - second[0])
    new = posterior.sample(min(len(x), DOTS), seed=seed)[observed[0].name].double().cpu()
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    extent = (float(first[0]), float(first[-1]), float(second[0]), float(second[-1]))
    panels[0].imshow(np.asarray(density).T, origin="lower", extent=extent, aspect="auto", cmap="GnBu")
    panels[0].set_title(f"density (mass on the grid {float(density.sum()) * cell:.3f})", fontsize=9, loc="left")
    chosen = torch.linspace(0, len(x) - 1, min(len(x), DOTS)).round().long()
    for ax, dots, text, colour in (
        (panels[1], new, f"{len(new)} new rows", ACCENT),
        (panels[2], x[chosen], f"{len(chosen)} of {len(x)} fitted rows", INK),
    ):
        ax.scatter(dots[:, 0], dots[:, 1], s=4, lw=0, alpha=0.6, color=colour)
        ax.set_title(text, fontsize=9, loc="left")
    panels[0].set(xlim=extent[:2], ylim=extent[2:], ylabel=f"{observed[0].name}[1]")
    for ax in panels:
        ax.set_xlabel(f"{observed[0].name}[0]")
        tidy(ax)
    return figure
