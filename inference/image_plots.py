"""Pictures of rows that are images: samples, reconstructions beside what was seen, walks along codes, and codes in the plane.

Nothing here touches pyplot's global state; every function returns a figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from .handlers import Substitute
from .plots import ACCENT, INK, PALETTE, new_axes, tidy
from .predict import cycled, global_values, rows_first

if TYPE_CHECKING:
    from .posterior import Posterior

#: Colour of cells that were not seen.
UNSEEN = "#d1793b"
#: Draws over which an expected image is averaged where codes below the given one are free.
BELOW = 20


def observed_name(posterior: Posterior) -> str:
    """The site that images are shown of: the only observed one.

    Raises
    ------
    ValueError
        There are several, or none.
    """
    names = [s.name for s in posterior.structure.observed]
    if len(names) != 1:
        raise ValueError(f"pictures are of one observed site and the story has {names}")
    return names[0]


def code_name(posterior: Posterior, site: str | None) -> str:
    """The local latent that is walked along: the one told, or the only one.

    Raises
    ------
    ValueError
        It is unknown, or must be told.
    """
    names = [s.name for s in posterior.structure.continuous_locals]
    if site is not None and site in names:
        return site
    if site is None and len(names) == 1:
        return names[0]
    raise ValueError(f"site={site!r}: name one of the continuous latents in the rows, {names}")


def check_shape(shape: Sequence[int], cells: int) -> tuple[int, ...]:
    """Height and width, or channels, height and width.

    Raises
    ------
    ValueError
        Another number of cells than a row has.
    """
    sides = tuple(int(side) for side in shape)
    if len(sides) not in (2, 3) or math.prod(sides) != cells or (len(sides) == 3 and sides[0] not in (1, 3)):
        raise ValueError(
            f"shape={sides} must be (height, width), or (channels, height, width) with 1 or 3 channels, and hold {cells} cells"
        )
    return sides


def expected(posterior: Posterior, codes: dict[str, Tensor]) -> Tensor:
    """Expected cells of rows with these codes, (N, D): the mean of the observed site's distribution.

    Codes that are not given are drawn, and images averaged over `BELOW` draws.
    """
    name, count = observed_name(posterior), len(next(iter(codes.values())))
    free = {s.name for s in posterior.structure.continuous_locals} - set(codes)
    with posterior.problem.scope(posterior.seed), torch.no_grad(), pyro.validation_enabled(False):
        values = {n: v.to(posterior.problem.dtype) for n, v in {**global_values(posterior, 0), **codes}.items()}
        model = poutine.uncondition(Substitute(values)(posterior.problem.model))
        parts = []
        for _ in range(BELOW if free else 1):
            with poutine.block():
                trace: Any = poutine.trace(model).get_trace(**cycled(posterior, count))
            parts.append(trace.nodes[name]["fn"].mean.reshape(rows_first(trace, name, posterior).shape))
    return torch.stack(parts).mean(0)


def mean_codes(posterior: Posterior, data: Any, site: str, draws: int = 50) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of every row's code: (N, K) each."""
    found = posterior.local(site, data, draws=draws)
    return found.mean(0), found.std(0) if len(found) > 1 else torch.zeros_like(found[0])


# -- figures -------------------------------------------------------------------------------------------------------------


def grid(
    images: Tensor, shape: Sequence[int], columns: int, gap: int = 1, limits: tuple[float, float] | None = None
) -> Any:
    """Images (N, cells) side by side as one array of colours (height, width, 3); NaN cells stand out.

    `limits` are the values of white and black: by default the least and the largest of all.
    """
    from matplotlib.colors import to_rgb

    sides = check_shape(shape, images[0].numel())
    channels, H, W = (1, *sides) if len(sides) == 2 else sides
    x = images.detach().double().cpu().reshape(-1, channels, H, W).numpy()
    low, high = (np.nanmin(x), np.nanmax(x)) if limits is None else limits
    tone = np.clip((x - low) / max(high - low, 1e-12), 0, 1)
    colour = np.repeat(1 - tone, 3, 1) if channels == 1 else tone
    holes = np.isnan(colour)
    colour = np.where(holes, np.asarray(to_rgb(UNSEEN))[None, :, None, None], colour)
    rows = -(-len(colour) // columns)
    canvas = np.ones((rows * (H + gap) - gap, columns * (W + gap) - gap, 3))
    canvas[:] = 0.86
    for i, picture in enumerate(colour):
        top, left = (i // columns) * (H + gap), (i % columns) * (W + gap)
        canvas[top : top + H, left : left + W] = picture.transpose(1, 2, 0)
    for i in range(len(colour), rows * columns):  # places without an image
        top, left = (i // columns) * (H + gap), (i % columns) * (W + gap)
        canvas[top : top + H + gap, left : left + W + gap] = 1.0
    return canvas


def show(ax: Any, canvas: Any, title: str) -> None:
    """An array of colours without axes."""
    ax.imshow(canvas, interpolation="nearest")
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_axis_off()


def sized(canvas: Any, width: float = 6.4, head: float = 0.35) -> Any:
    """Axes of a new figure that fits the canvas."""
    from matplotlib.figure import Figure

    height = width * canvas.shape[0] / canvas.shape[1] + head
    return Figure(figsize=(width, height), layout="constrained").subplots()


def plot_samples(
    posterior: Posterior,
    shape: Sequence[int],
    num: int = 64,
    *,
    mean: bool = True,
    seed: int | None = None,
    ax: Any = None,
) -> Any:
    """New rows as images.

    Parameters
    ----------
    posterior
        An answer of a story whose rows are images.
    shape
        (height, width), or (channels, height, width) with 1 or 3 channels.
    num
        How many.
    mean
        Whether to show the expected image of every drawn code, or a drawn image.
    seed, ax
        As elsewhere.

    Raises
    ------
    ValueError
        `shape` does not fit, or the story draws no rows (n/a: no density).
    """
    drawn = posterior.sample(num, seed=seed)
    name = observed_name(posterior)
    check_shape(shape, drawn[name][0].numel())
    codes = {s.name: drawn[s.name] for s in posterior.structure.continuous_locals}
    images = expected(posterior, codes) if mean and codes else drawn[name]
    canvas = grid(images, shape, max(1, round(math.sqrt(num))))
    ax = sized(canvas) if ax is None else ax
    show(ax, canvas, f"{num} {'expected images of drawn codes' if mean and codes else 'drawn images'}")
    return ax.figure


def plot_reconstructions(
    posterior: Posterior, data: Any, shape: Sequence[int], num: int = 12, *, site: str | None = None, ax: Any = None
) -> Any:
    """Rows above, and below each the expected image given its code; cells that were missing are coloured.

    Parameters
    ----------
    posterior, shape, ax
        As in `plot_samples`.
    data
        Rows, as for `fit`; the first `num` are shown.
    site
        The latent that holds codes, where there are several: that nearest to the data reconstructs best.
    """
    name = code_name(posterior, site)
    kwargs = posterior.problem.with_data(data)
    argument = next(s.argument for s in posterior.structure.observed if s.name == observed_name(posterior))
    few = {n: v[:num] if n in posterior.structure.row_arguments else v for n, v in kwargs.items()}
    seen = few[argument]
    check_shape(shape, seen[0].numel())
    draws = posterior.local(name, few, draws=30)
    images = torch.stack([expected(posterior, {name: z}) for z in draws]).mean(0)
    canvas = grid(torch.cat([seen.to(images), images]), shape, len(seen))
    ax = sized(canvas) if ax is None else ax
    show(ax, canvas, "rows (above) and their reconstructions (below)")
    return ax.figure


def plot_traversals(
    posterior: Posterior,
    data: Any,
    shape: Sequence[int],
    *,
    row: int = 0,
    site: str | None = None,
    units: Sequence[int] | None = None,
    span: float = 2.5,
    steps: int = 11,
    ax: Any = None,
) -> Any:
    """Expected images along single units of the code of one row, from -`span` to `span`, a unit a line.

    Parameters
    ----------
    posterior, shape, ax
        As in `plot_samples`.
    data, row
        Rows, as for `fit`, and which of them the walk goes through.
    site
        The latent that holds codes, where there are several.
    units
        Which units; by default up to eight whose means vary most between the rows, most first.
    span, steps
        How far the walk goes, and in how many steps.

    Raises
    ------
    ValueError
        A unit that the code does not have.
    """
    name = code_name(posterior, site)
    loc, _ = mean_codes(posterior, data, name)
    K = loc.shape[1]
    chosen = loc.var(0).argsort(descending=True)[:8].tolist() if units is None else [int(u) for u in units]
    if bad := [u for u in chosen if not 0 <= u < K]:
        raise ValueError(f"units={bad} are not among the {K} units of {name!r}, numbered from 0")
    walk = torch.linspace(-span, span, steps, dtype=loc.dtype)
    z = loc[row].expand(len(chosen), steps, K).clone()
    for i, unit in enumerate(chosen):
        z[i, :, unit] = walk
    images = expected(posterior, {name: z.reshape(-1, K)})
    canvas = grid(images, shape, steps)
    ax = sized(canvas) if ax is None else ax
    show(ax, canvas, f"{name}: units {', '.join(map(str, chosen))} from {-span:g} to {span:g}")
    return ax.figure


def plot_codes(
    posterior: Posterior,
    data: Any = None,
    labels: Any = None,
    *,
    site: str | None = None,
    units: tuple[int, int] | None = None,
    ax: Any = None,
) -> Any:
    """Posterior means of two units of every row's code, coloured by labels.

    Parameters
    ----------
    posterior, ax
        As in `plot_samples`.
    data
        Rows, as for `fit`; None for the fitted ones.
    labels
        A whole number a row, or None.
    site
        The latent that holds codes, where there are several.
    units
        The two; by default those whose means vary most.

    Raises
    ------
    ValueError
        Another number of labels than rows, or fewer than two units.
    """
    name = code_name(posterior, site)
    loc, sd = mean_codes(posterior, data, name)
    if loc.shape[1] < 2:
        raise ValueError(f"{name!r} has one unit; a plane needs two")
    first, second = loc.var(0).argsort(descending=True)[:2].tolist() if units is None else units
    ax = new_axes(ax, (5.6, 5.2))
    if labels is None:
        ax.scatter(loc[:, first], loc[:, second], s=6, color=ACCENT, alpha=0.6, linewidths=0)
    else:
        given = np.asarray(labels)
        if len(given) != len(loc):
            raise ValueError(f"labels has {len(given)} entries and there are {len(loc)} rows")
        for i, kind in enumerate(np.unique(given)):
            some = torch.from_numpy(np.flatnonzero(given == kind))
            marker = "o^"[i // len(PALETTE) % 2]
            ax.scatter(
                loc[some, first], loc[some, second], s=9, marker=marker, color=PALETTE[i % len(PALETTE)], alpha=0.7,
                linewidths=0, label=str(kind),
            )  # fmt: skip
        ax.legend(frameon=False, fontsize=8, markerscale=1.6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set(xlabel=f"{name}[{first}]", ylabel=f"{name}[{second}]")
    width = float(sd[:, [first, second]].median())
    ax.set_title(f"posterior means of {len(loc)} codes (median sd {width:.2g})", fontsize=9, color=INK, loc="left")
    tidy(ax)
    return ax.figure
