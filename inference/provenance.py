"""Which site depends on which, and through what formula.

A story runs once while every torch operation is watched; what left torch on the way, and which rows belong to
which, is settled by changing values and running it again. Everything is put back as if it had not run.
"""

from typing import Any

from .plates_reading import Plate, Reading, Site, program

__all__ = ["Plate", "Site", "dependencies", "program", "relations"]


def relations(story: Any, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """Sites, parameters and used arguments of a story, with what each depends on.

    Parameters
    ----------
    story
        A Pyro program, or an object with a `model` method.
    *args, **kwargs
        Passed to the story. NumPy arrays and data frames arrive as tensors.

    Returns
    -------
    dict
        `Site` by name, in program order; inputs first.

    Raises
    ------
    TypeError
        `story` is neither callable nor has a `model`. Exceptions of the story itself pass through unchanged.
    """
    return Reading(story, args, kwargs).sites(align=True)


def dependencies(
    story: Any, *args: Any, through_deterministic: bool = False, **kwargs: Any
) -> dict[str, tuple[str, ...]]:
    """Which sample sites each sample site depends on directly.

    Parameters
    ----------
    story, *args, **kwargs
        As for `relations`.
    through_deterministic
        Leave `pyro.deterministic` sites out and connect what lies on either side of them.

    Returns
    -------
    dict
        Names of the parents by site, in program order, without parameters and the story's arguments.
    """
    sites = Reading(story, args, kwargs).sites(align=False)
    kept = {n: s for n, s in sites.items() if s.kind in ("latent", "observed", "deterministic", "factor")}
    found: dict[str, set[str]] = {}
    for name, site in kept.items():
        direct = [p for p in site.parents if p in kept]
        if through_deterministic:
            found[name] = set().union(*(found[p] if kept[p].kind == "deterministic" else {p} for p in direct))
        else:
            found[name] = set(direct)
    order = list(kept)
    hidden = {n for n, s in kept.items() if through_deterministic and s.kind == "deterministic"}
    return {n: tuple(sorted(p - hidden, key=order.index)) for n, p in found.items() if n not in hidden}
