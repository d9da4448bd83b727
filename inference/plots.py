"""Figures of one answer. None of them touches pyplot's global state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data import take_rows
from .summary import column, entries, label

if TYPE_CHECKING:
    from .calibration import Calibration
    from .posterior import Posterior

INK, ACCENT, FAINT = "#1b1f23", "#1f6f8b", "#c9d3d8"
PALETTE = ["#1f6f8b", "#d1793b", "#6b8e4e", "#8f5a99", "#b3a13c", "#b04a4a", "#4a5fb0", "#5b6770"]
#: Panels in a figure of marginals.
PANELS = 24
#: Rows that a scatter shows at most.
SCATTERED = 5_000


def new_axes(ax: Any, size: tuple[float, float]) -> Any:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def tidy(ax: Any) -> None:
    """Only the axes that carry numbers."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK, labelsize=8)


def plot_history(posterior: Posterior, ax: Any = None) -> Any:
    """Objective by iteration, or log density by draw; returns the figure."""
    ax = new_axes(ax, (6.4, 3.4))
    if posterior.kind == "samples" and "lp" in posterior.sample_stats:
        for c, chain in enumerate(np.asarray(posterior.sample_stats["lp"])):
            ax.plot(chain, lw=0.7, color=PALETTE[c % len(PALETTE)], label=f"chain {c + 1}")
        ax.set(xlabel="draw", ylabel="log density")
        ax.legend(frameon=False, fontsize=8, ncols=4)
    elif posterior.history:
        values = np.asarray(posterior.history)
        noisy = posterior.kind == "variational" and len(values) > 50
        ax.plot(values, lw=0.6 if noisy else 1.4, color=FAINT if noisy else ACCENT)
        if noisy:
            smooth = np.convolve(values, np.ones(25) / 25, mode="valid")
            ax.plot(np.arange(len(smooth)) + 12, smooth, lw=1.4, color=ACCENT)
            low = np.quantile(values, 0.1)
            ax.set_ylim(low - 0.2 * abs(values.max() - low), values.max() + 0.05 * abs(values.max() - low))
        ax.set(
            xlabel="step" if noisy else "iteration", ylabel="ELBO" if posterior.kind == "variational" else "log joint"
        )
    else:
        ax.text(0.5, 0.5, "no history", ha="center", va="center", transform=ax.transAxes)
    ax.set_title(
        f"{posterior.method.name.upper()}" + ("" if posterior.converged else " (not converged)"),
        fontsize=10,
        loc="left",
    )
    tidy(ax)
    return ax.figure


def plot_density(posterior: Posterior, names: list[str] | None = None) -> Any:
    """Marginals of the globals, one panel an entry; returns the figure.

    Raises
    ------
    ValueError
        An unknown name.
    """
    from matplotlib.figure import Figure
    from scipy.stats import gaussian_kde

    local = {b.name for b in posterior.joint.blocks if b.local}
    wanted = names or [n for n in posterior.draws if n not in local]
    if unknown := [n for n in wanted if n not in posterior.draws]:
        raise ValueError(f"{unknown} are no drawn sites; there are {list(posterior.draws)}")
    panels = [(n, i) for n in wanted for i in entries(tuple(posterior.draws[n].shape[1:]))]
    shown = panels[:PANELS]
    columns = min(4, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.3 * columns, 1.7 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (name, index) in zip(axes, shown):
        draws = column(posterior.draws[name].double().cpu().numpy(), index)
        if len(draws) == 1 or draws.std() == 0:
            ax.axvline(draws[0], color=ACCENT, lw=1.6)
        else:
            grid = np.linspace(draws.min(), draws.max(), 120)
            for c, chain in enumerate(draws.reshape(posterior.chains, -1)):
                if chain.std() > 0:
                    ax.plot(grid, gaussian_kde(chain)(grid), lw=1, color=PALETTE[c % len(PALETTE)])
            ax.fill_between(grid, gaussian_kde(draws)(grid), color=FAINT, alpha=0.5, lw=0)
        ax.set_title(label(name, index), fontsize=8, loc="left")
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(labelsize=7)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    if len(panels) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(panels)} entries", fontsize=8)
    return figure


def plot_data(posterior: Posterior, columns: tuple[int, int] = (0, 1), ax: Any = None) -> Any:
    """Rows in two columns (or a strip of one), coloured by the posterior of the finite local latent; returns the figure.

    Of very many rows some from all over are shown.

    Raises
    ------
    ValueError
        No numeric rows, or a column that they lack.
    """
    site = next((s for s in posterior.structure.observed if s.local and s.argument in posterior.problem.kwargs), None)
    if site is None:
        raise ValueError("no observed site has rows that an argument holds: there is nothing to scatter")
    kwargs, names = posterior.problem.kwargs, posterior.structure.row_arguments
    total = len(kwargs[site.argument])
    some = None
    if total > SCATTERED and site.argument in names and not any(s.local for s in posterior.structure.learned):
        some = take_rows(kwargs, names, torch.linspace(0, total - 1, SCATTERED, dtype=torch.float64).round().long())
    x = (some or kwargs)[site.argument].double().cpu().numpy()
    x = x.reshape(len(x), -1)
    if x.shape[1] > 1 and max(columns) >= x.shape[1]:
        raise ValueError(f"columns={columns}: {site.argument} has columns 0 to {x.shape[1] - 1}")
    ax = new_axes(ax, (5.2, 4.2))
    finite = next((s.name for s in posterior.structure.finite if s.local and len(s.plates) == 1), None)
    colours: Any = ACCENT
    if finite:
        probabilities = posterior.local(finite, some).double().cpu().numpy()
        base = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in PALETTE])
        colours = np.clip(probabilities @ base[np.arange(probabilities.shape[1]) % len(base)], 0, 1)
    if x.shape[1] == 1:
        jitter = np.random.default_rng(0).uniform(-0.4, 0.4, len(x))
        ax.scatter(x[:, 0], jitter, c=colours, s=14, lw=0)
        ax.set(xlabel=site.name, yticks=[], ylim=(-1, 1))
    else:
        ax.scatter(x[:, columns[0]], x[:, columns[1]], c=colours, s=18, lw=0)
        ax.set(xlabel=f"{site.name}[{columns[0]}]", ylabel=f"{site.name}[{columns[1]}]")
    if finite:
        ax.set_title(f"colour: p({finite} | data)", fontsize=9, loc="left")
    if some is not None:
        ax.set_title(f"{len(x):,} of {total:,} rows", fontsize=8, loc="right")
    tidy(ax)
    return ax.figure


def calibration_figure(found: Calibration, most: int) -> Any:
    """One panel a quantity: its empirical distribution of ranks less the uniform one, in a 95 % band."""
    from matplotlib.figure import Figure
    from scipy import stats

    names = sorted(found.ranks, key=lambda n: found.p_values[n])[:most]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.0 * rows + 0.4), layout="constrained")
    z = np.arange(0, found.draws + 2)
    share, count = z / (found.draws + 1), found.simulations
    # Bonferroni over some independent looks is close to the simultaneous band, and on the safe side.
    low, high = (stats.binom.ppf(q, count, share) / count - share for q in (0.05 / 40, 1 - 0.05 / 40))
    for ax, name in zip(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat, names):
        gap = np.searchsorted(np.sort(found.ranks[name]), z, side="left") / count - share
        wrong = name in found.wrong
        ax.fill_between(share, low, high, color=FAINT, alpha=0.6, lw=0)
        ax.axhline(0, color=INK, lw=0.5)
        ax.step(share, gap, where="mid", color=PALETTE[5] if wrong else ACCENT, lw=1.2)
        ax.set_title(f"{name}{'  (wrong)' if wrong else ''}", fontsize=8, color=PALETTE[5] if wrong else INK)
        tidy(ax)
    for ax in figure.axes[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel("rank of the truth among posterior draws", fontsize=8)
    figure.supylabel("share of ranks below, less uniform", fontsize=8)
    return figure


def symmetry_figure(found: Calibration, most: int) -> Any:
    """One panel a quantity: how much of the answer lies below the truth, and the mirror image of that."""
    from matplotlib.figure import Figure

    names = sorted(found.asymmetry, key=lambda n: found.asymmetry[n])[:most]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.0 * rows + 0.6), layout="constrained")
    edges = np.linspace(0, 1, 11)
    for ax, name in zip(figure.subplots(rows, columns, squeeze=False, sharex=True).flat, names):
        height = np.histogram(found.shares(name), edges)[0] / found.simulations * (len(edges) - 1)
        colour = PALETTE[5] if name in found.biased else ACCENT
        ax.stairs(height, edges, fill=True, color=colour, alpha=0.35)
        ax.stairs(height[::-1], edges, color=INK, lw=1.0, ls="--")
        ax.axhline(1, color=INK, lw=0.5)
        said = ", ".join(filter(None, [found.bias(name), found.width(name)]))
        ax.set_title(f"{name}{': ' + said if said else ''}", fontsize=8, color=colour if said else INK)
        tidy(ax)
    for ax in figure.axes[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel("mass of the guide below the truth (dashed: mirrored)", fontsize=8)
    figure.supylabel("density over simulations", fontsize=8)
    return figure
