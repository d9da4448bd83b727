"""Other rows than the fitted ones: what all rows share keeps the size it was fitted with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .lazy_rows import has_lazy
from .rehearsal import is_whole
from .session import isolated
from .shapes import record

if TYPE_CHECKING:
    from .problem import Problem


def check_shared(problem: Problem, kwargs: dict[str, Any]) -> None:
    """Other rows must leave what the rows share as it was fitted.

    Raises
    ------
    ValueError
        The story gives a latent outside the data plate another size for these rows, and not because they name fewer
        groups than the fitted rows do.
    """
    shared = {s.name: s for s in problem.structure.latents if not s.local}
    rows = problem.structure.row_arguments
    if not shared or has_lazy(kwargs) or not rows or problem.admixture is not None:
        return
    if len(kwargs[rows[0]]) == problem.structure.num_rows and not any(is_whole(kwargs[n]) for n in rows):
        return
    try:
        with isolated(0, problem.dtype):
            told = record(problem.model, kwargs)
    except (ValueError, RuntimeError, TypeError, IndexError):
        return  # the story has another fault with these rows, which the question itself will name
    for name, site in shared.items():
        if name in told and (told[name].shape != site.shape or told[name].states != site.states):
            if names_fewer_groups(problem, kwargs, shared):
                return
            if told[name].shape == site.shape:
                raise ValueError(
                    f"site {name!r} has {site.states} states in the answer, and the story gives it {told[name].states} for "
                    f"{len(kwargs[rows[0]])} rows: they are read off the data. Ask for the rows that were fitted, or write "
                    f"their number into the story"
                )
            raise ValueError(
                f"site {name!r} has shape {site.shape} in the answer, and the story gives it {told[name].shape} for "
                f"{len(kwargs[rows[0]])} rows: its size is read off the data. Ask for the rows that were fitted, or write "
                f"that size into the story as a number"
            )


def names_fewer_groups(problem: Problem, kwargs: dict[str, Any], shared: dict[str, Any]) -> bool:
    """Whether these rows' sizes differ from the fitted ones' only by labels that none of them carries.

    A story that counts its groups (`g.max() + 1`) is run on the rows with one label raised to the largest fitted one.
    """
    rows = problem.structure.row_arguments
    labels = {n: kwargs[n] for n in rows if is_whole(kwargs[n]) and kwargs[n].numel() and is_whole(problem.kwargs[n])}
    if not labels or any(v.max() > problem.kwargs[n].max() or v.min() < 0 for n, v in labels.items()):
        return False
    raised = {n: v.clone() for n, v in labels.items()}
    for n, v in raised.items():
        v.view(-1)[0] = problem.kwargs[n].max()
    try:
        with isolated(0, problem.dtype):
            told = record(problem.model, {**kwargs, **raised})
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False
    return all(n in told and told[n].shape == s.shape and told[n].states == s.states for n, s in shared.items())
