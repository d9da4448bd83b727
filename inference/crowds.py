"""Stories with about as many unknowns as data, of which no highest point may be taken."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .structure import Structure

#: Numbers of one unknown from which they are many.
CROWD = 8


def crowded(structure: Structure) -> str:
    """Why the highest point of the joint density would mislead; empty where it need not.

    With about as many unknowns as data, and something that they share (the scale of a walk, of a hierarchy, of the noise of a
    wide regression), the highest point of all at once lies far from where most of the density is: it over- or understates
    what is shared (Neyman and Scott, Econometrica 1948).
    """
    cells = sum(math.prod(s.shape) - s.missing for s in structure.observed)
    crowds: dict[str, int] = {}
    sizes = {s.name: math.prod(s.shape) for s in structure.latents if s.continuous and not s.local}
    for name, size in sizes.items():
        stem = name.rstrip("0123456789")  # the steps of a walk may be sites of their own
        crowds[stem] = crowds.get(stem, 0) + size
    for stem, size in crowds.items():
        if size < CROWD or 2 * size < cells or not structure.observed:
            continue
        members = {n for n in sizes if n.rstrip("0123456789") == stem}
        below = [
            s
            for s in structure.sites
            if s.name in members or (s.kind in ("observed", "factor") and members & {*s.parents})
        ]
        shared = {p for s in below for p in s.parents if sizes.get(p, CROWD) < CROWD} - members
        if shared:
            name = stem.rstrip("_") if len(members) > 1 else stem
            return (
                f"EM sets {size} numbers of {name} at once with {', '.join(sorted(shared))}, given {cells} data: the highest "
                f"point lies far from the mass there"
            )
    return ""
