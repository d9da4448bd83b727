"""Plate diagrams: the story as a picture, in pure matplotlib, with the story as mathematics beside it.

Latent sites are white, observed ones shaded, deterministic ones dashed; parameters, networks and arrays the
story was given are dots, factors small squares. A plate is a rounded box with its name and size.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .plates_fold import fold_loops
from .plates_paint import Sheet
from .plates_picture import picture
from .plates_symbols import own_symbols, with_symbols
from .plates_views import guide_view, make_view, treatment_view
from .provenance import relations
from .story_text import story_lines, story_text, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_plates", "draw_sheet", "story_lines", "story_text"]


@with_symbols
def draw_plates(
    story: Any,
    *args: Any,
    ax: "Axes | None" = None,
    show_lines: bool = True,
    title: str | None = None,
    view: str = "plain",
    guide: Callable | str | None = None,
    **kwargs: Any,
) -> "Figure":
    """Draw the plate diagram of a story.

    Parameters
    ----------
    story
        A Pyro program, or an object with a `model` method.
    *args, **kwargs
        Passed to the story, which runs a few times and leaves nothing behind.
    ax
        Axes to draw into; by default a figure of its own that fits the diagram and belongs to no window.
    show_lines
        Write the story as mathematics beside the diagram.
    title
        Heading.
    view
        "plain"; "scope" colours what is repeated with the rows and what is shared by all of them; the name of a
        method ("exact", "em", "gibbs", "nuts", "hmc", "svi") colours each latent by what that method does with it;
        "guide" shows which dependencies the guide keeps, which it drops and which are its own.
    guide
        For `view="guide"`: a Pyro program, or "mean_field" or "full_rank"; the story's own by default. Given alone it
        implies the view.

    Notes
    -----
    Names of sites become symbols by themselves. A story that wants others has an attribute `symbols`, a mapping from names
    of sites and plates to names: ``{"weights": "pi", "centres": "mu", "data": "i"}``.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with ``figure.savefig("story.svg")``.

    Raises
    ------
    ValueError
        An unknown view; a method that cannot answer the story, with its reason; no guide to look at.
    TypeError
        `story` is no story. Exceptions of the story itself pass through unchanged.
    """
    sites = fold_loops(relations(story, *args, **kwargs))
    if guide is not None or view == "guide":
        chosen = guide_view(story, guide, sites, args, kwargs)
    else:
        chosen = make_view(view, story, sites, args, kwargs)
    lines = write(sites, math_text=True) if show_lines else []
    sheet = Sheet(picture(sites), lines, title, chosen)
    if ax is None:
        return sheet.figure()
    sheet.paint(ax)
    return ax.figure.figure  # type: ignore[return-value]


def draw_treatment(posterior: Any) -> "Figure":
    """The diagram of a fitted story, each latent coloured by what the method did with it.

    Parameters
    ----------
    posterior
        From `fit`.
    """
    problem = posterior.problem
    with own_symbols(problem.story):
        sites = fold_loops(relations(problem.model, **problem.kwargs))
        return Sheet(picture(sites), view=treatment_view(posterior.method, problem, sites)).figure()


def draw_sheet(
    stories: Mapping[str, tuple[Any, Mapping[str, Any]]],
    *,
    show_lines: bool = True,
    width: float = 22.0,
    view: str = "plain",
) -> "Figure":
    """Many plate diagrams on one sheet, all at the same scale.

    Parameters
    ----------
    stories
        Name to (story, its arguments by name), as `zoo.examples()` gives them.
    show_lines
        Write each story as mathematics beside its diagram.
    width
        Of the sheet, in inches; a wider diagram makes it wider.
    view
        As for `draw_plates`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        There is no story; see also `draw_plates`.
    """
    from matplotlib.figure import Figure

    if not stories:
        raise ValueError("stories is empty: give at least one name with (story, arguments)")
    sheets = []
    for name, (story, data) in stories.items():
        with own_symbols(story):
            sites = fold_loops(relations(story, **data))
            chosen = make_view(view, story, sites, (), data)
            lines = write(sites, math_text=True) if show_lines else []
            sheets.append(Sheet(picture(sites), lines, name, chosen))
    rows: list[list[Sheet]] = [[]]
    for sheet in sheets:
        if rows[-1] and sum(s.size[0] for s in (*rows[-1], sheet)) > width:
            rows.append([])
        rows[-1].append(sheet)
    width = max(width, *(sum(s.size[0] for s in row) for row in rows))
    heights = [max(s.size[1] for s in row) + 0.25 for row in rows]
    total = sum(heights)
    figure = Figure(figsize=(width, total), facecolor="white")
    top = 0.0
    for row, height in zip(rows, heights, strict=True):
        spare = (width - sum(s.size[0] for s in row)) / len(row)
        left = 0.0
        for sheet in row:
            wide, tall = sheet.size
            ax = figure.add_axes((left / width, 1 - (top + tall) / total, wide / width, tall / total))
            sheet.paint(ax)
            for artist in (*ax.patches, *ax.texts):  # one id, one element
                if artist.get_gid():
                    artist.set_gid(f"{sheet.title}-{artist.get_gid()}")
            left += wide + spare
        top += height
    return figure
