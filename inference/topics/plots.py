"""Pictures of topics: bars of their words, a map of them, streams through time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .answers import shares
from .quality import as_topics, top_words, topic_share, word_paths, words_of

if TYPE_CHECKING:
    from ..posterior import Posterior

INK, SOFT = "#1b6183", "#b8d3de"


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **settings: Any) -> Any:
    """A figure that belongs to no window and touches no global state, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False, **settings)


def plot_top_words(
    model: Posterior | Any, vocabulary: Any = None, num: int = 8, rank: str = "probability", most: int = 12
) -> Any:
    """Bars of each topic's words, the first `most` topics; dark is what the topic has beyond the mean over topics."""
    table = top_words(model, vocabulary, num, rank)
    topics = sorted(table["topic"].unique())[:most]
    columns = min(4, len(topics))
    rows = -(-len(topics) // columns)
    fig, axes = figure(3.0 * columns, 0.5 + 0.26 * num * rows + 0.4 * rows, rows, columns, sharex=True)
    for ax in axes.flat[len(topics) :]:
        ax.set_axis_off()
    for ax, k in zip(axes.flat, topics):
        part = table[table["topic"] == k].iloc[::-1]
        mean = part["probability"] / part["lift"]
        ax.barh(part["word"], part["probability"], color=INK)
        ax.barh(part["word"], np.minimum(mean, part["probability"]), color=SOFT)
        ax.set_title(f"topic {k}", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    for ax in axes[-1]:
        ax.set_xlabel("probability")
    return fig


def plot_topic_map(posterior: Posterior, vocabulary: Any = None, num: int = 3) -> Any:
    """Topics on a plane, near each other where they use the same words; areas are their shares of all words.

    Classical scaling of Hellinger distances (Torgerson 1952).
    """
    from .answers import documents_of

    phi = as_topics(posterior)
    words = words_of(vocabulary, phi.shape[1])
    weight = (shares(posterior).numpy() * documents_of(posterior, None).lengths[:, None]).sum(0)
    weight = weight / weight.sum()
    square = np.clip(1 - np.sqrt(phi) @ np.sqrt(phi).T, 0, None)
    centre = np.eye(len(phi)) - 1 / len(phi)
    values, vectors = np.linalg.eigh(-0.5 * centre @ square @ centre)
    place = np.zeros((len(phi), 2))
    for i in range(min(2, len(phi))):
        place[:, i] = vectors[:, -1 - i] * np.sqrt(max(values[-1 - i], 0))
    place = apart(place)
    fig, axes = figure(7.5, 5.5)
    ax = axes[0, 0]
    ax.scatter(*place.T, s=9000 * weight + 20, color=SOFT, edgecolor=INK, zorder=2)
    for k, (x, y) in enumerate(place):
        text = "\n".join(words[v] for v in np.argsort(-phi[k])[:num])
        ax.annotate(text, (x, y), ha="center", va="center", fontsize=8, zorder=3)
    ax.margins(0.15)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title("topics; areas are shares of the words", loc="left", fontsize=10)
    ax.spines[:].set_visible(False)
    return fig


def apart(place: NDArray, width: float = 0.15, height: float = 0.11, rounds: int = 200) -> NDArray:
    """Places (K, 2) in the unit square, moved until no two labels of that size lie on each other."""
    size = np.array([width, height])
    span = np.ptp(place, axis=0)
    unit = (place - place.min(0)) / np.where(span > 0, span, 1.0)
    for _ in range(rounds):
        gap = unit[:, None] - unit[None]
        over = np.clip(size - np.abs(gap), 0, None)
        over[np.arange(len(unit)), np.arange(len(unit))] = 0
        hit = (over > 0).all(-1)
        if not hit.any():
            break
        along = np.argmin(over / size, -1)  # the shorter way out
        push = np.zeros_like(gap)
        rows, columns = np.nonzero(hit)
        axis = along[rows, columns]
        sign = np.where(gap[rows, columns, axis] == 0, np.sign(rows - columns), np.sign(gap[rows, columns, axis]))
        push[rows, columns, axis] = 0.5 * sign * over[rows, columns, axis] + 1e-6 * sign
        unit = unit + push.sum(1)
    return unit


def plot_topic_share(posterior: Posterior, times: Any = None, vocabulary: Any = None, num: int = 3) -> Any:
    """Shares of the topics through time, one above the other."""
    from matplotlib import colormaps

    steps, share = topic_share(posterior, times)
    phi = as_topics(posterior)
    words = words_of(vocabulary, phi.shape[1])
    fig, axes = figure(9.0, 4.5)
    ax, K = axes[0, 0], share.shape[1]
    names = [", ".join(words[v] for v in np.argsort(-row)[:num]) for row in phi]
    colours = colormaps["viridis"](np.linspace(0.1, 0.95, K))
    ax.stackplot(steps, share.T, labels=names, colors=colours, edgecolor="white", linewidth=0.5)
    ax.set(xlim=(steps[0], steps[-1]), ylim=(0, 1), xlabel="time", ylabel="share of the words")
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False)
    return fig


def plot_streams(
    posterior: Posterior,
    topics: Sequence[int] | None = None,
    vocabulary: Any = None,
    num: int = 6,
    times: Sequence[float] | None = None,
) -> Any:
    """Words of drifting topics through time, with bands of 90 % where the posterior has draws.

    Parameters
    ----------
    topics
        Which topics; None for the first four.
    num
        Words of each: those that are most frequent at some time.
    times
        (T,), what the slices are called; None: their numbers.
    """
    phi = as_topics(posterior, 0)
    words, K = words_of(vocabulary, phi.shape[1]), len(phi)
    chosen = list(range(min(4, K))) if topics is None else list(topics)
    fig, axes = figure(5.0 * min(2, len(chosen)), 2.9 * -(-len(chosen) // 2), -(-len(chosen) // 2), min(2, len(chosen)))
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    for ax, k in zip(axes.flat, chosen):
        peak = word_paths(posterior, k, range(phi.shape[1])).mean(0).max(0).values
        best = peak.argsort(descending=True)[:num].tolist()
        paths = word_paths(posterior, k, best).numpy()
        at = np.arange(paths.shape[1]) if times is None else np.asarray(times)
        ends = []
        for i, v in enumerate(best):
            line = ax.plot(at, paths[:, :, i].mean(0), linewidth=1.6)[0]
            ends.append((float(paths[:, -1, i].mean()), words[v], line.get_color()))
            if len(paths) > 1:
                low, high = np.quantile(paths[:, :, i], (0.05, 0.95), axis=0)
                ax.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        _name_ends(ax, at[-1], ends)
        ax.set_title(f"topic {k}", loc="left", fontsize=10)
        ax.set(ylim=(0, None), xlim=(at[0], at[-1]), ylabel="probability")
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def _name_ends(ax: Any, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Words beside the ends of their lines, pushed apart so that none hides another."""
    top = max(ax.get_ylim()[1], 1e-12)
    height = -np.inf
    for y, word, colour in sorted(ends):
        height = max(y, height + 0.085 * top)
        ax.annotate(
            word, (x, height), xytext=(4, 0), textcoords="offset points", color=colour, fontsize=8, va="center",
            annotation_clip=False,
        )  # fmt: skip
