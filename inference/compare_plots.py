"""The figure of a comparison: who predicts best, where they disagree, what they cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .agreement import shared
from .plots import INK, PALETTE, tidy
from .summary import column, entries, label

if TYPE_CHECKING:
    from .compare import Comparison

#: Entries in the forest plot.
SHOWN = 14


def plot_comparison(comparison: Comparison) -> Any:
    """See `Comparison.plot`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.0, 1.5, 1.0])
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(comparison.table.index)}
    held_out(left, comparison, colours)
    forest(middle, comparison, colours)
    cost(right, comparison)
    for ax in (left, middle, right):
        tidy(ax)
    return figure


def below(ax: Any) -> None:
    """A legend under the axes, where nothing is drawn."""
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def held_out(ax: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    """Mean log density of held-out rows with two standard errors."""
    names = list(comparison.heldout)
    ax.set_title("held-out log density a row", fontsize=10, loc="left")
    if not names:
        ax.text(0.5, 0.5, "no rows held out", ha="center", va="center", transform=ax.transAxes, color=INK)
        ax.set_axis_off()
        return
    for i, name in enumerate(names):
        rows = comparison.heldout[name]
        error = 2 * float(rows.std() / math.sqrt(len(rows))) if len(rows) > 1 else 0.0
        ax.errorbar(float(rows.mean()), i, xerr=error, fmt="o", color=colours[name], capsize=3)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("mean ± 2 standard errors")
    ax.locator_params(axis="x", nbins=4)


def forest(ax: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    """90 % intervals (or points) of the globals by method, those that disagree most first, in reference sds."""
    reference = comparison.posteriors[comparison.reference]
    draws = {comparison.reference: shared(reference)} | {n: a.draws for n, a in comparison.agreements.items()}
    gaps: dict[str, float] = {}
    for agreement in comparison.agreements.values():
        for entry, gap in agreement.gaps.items():
            gaps[entry] = max(gaps.get(entry, 0.0), gap)
    places = {label(n, i): (n, i) for n, v in draws[comparison.reference].items() for i in entries(tuple(v.shape[1:]))}
    chosen = sorted((e for e in places if e in gaps), key=lambda e: -gaps[e]) or list(places)
    chosen = chosen[:SHOWN]
    methods = list(draws)
    for row, entry in enumerate(chosen):
        name, index = places[entry]
        base = column(draws[comparison.reference][name].numpy(), index)
        centre, unit = base.mean(), base.std(ddof=1) if len(base) > 1 else max(abs(base.mean()), 1e-12)
        for k, method in enumerate(methods):
            value = (column(draws[method][name].numpy(), index) - centre) / unit
            y = row + 0.22 * (k - (len(methods) - 1) / 2)
            if len(value) > 1:
                low, high = np.quantile(value, [0.05, 0.95])
                ax.plot([low, high], [y, y], color=colours[method], lw=1.6)
            ax.plot(value.mean(), y, "o" if len(value) > 1 else "D", color=colours[method], ms=4)
    for method in methods:
        ax.plot([], [], "o-", color=colours[method], label=method)
    ax.axvline(0, color="#9aa5ab", lw=0.8, zorder=0)
    ax.set_yticks(range(len(chosen)), chosen, fontsize=8)
    ax.set_ylim(len(chosen) - 0.4, -0.6)
    ax.set_xlabel(f"difference from {comparison.reference}'s mean, in its sds; 90 % intervals")
    more = f" (the {len(chosen)} of {len(places)} that differ most)" if len(chosen) < len(places) else ""
    ax.set_title(f"globals by method{more}", fontsize=10, loc="left")
    below(ax)


def cost(ax: Any, comparison: Comparison) -> None:
    """Wall time, split into set-up, warm-up and run."""
    parts = (("set-up s", "set-up", "#c9d3d8"), ("warm-up s", "warm-up", "#7fa9b8"), ("run s", "run", "#1f6f8b"))
    names = list(comparison.posteriors)
    table = comparison.table.loc[names]
    start = np.zeros(len(names))
    for name, text, colour in parts:
        width = table[name].astype(float).fillna(0.0).to_numpy()
        ax.barh(range(len(names)), width, left=start, color=colour, label=text, height=0.55)
        start = start + width
    for i, total in enumerate(start):
        ax.text(total, i, f" {total:.2g} s", va="center", fontsize=8, color=INK)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, max(start.max(), 1e-9) * 1.25)
    ax.set_xlabel("seconds")
    ax.set_title("wall time", fontsize=10, loc="left")
    below(ax)
