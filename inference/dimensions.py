"""Summed-out latents keep their states in a dimension of their own, left of all plates; a story must not move it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro.poutine.util import site_is_subsample

from .mending import StoryError

if TYPE_CHECKING:
    from .structure import Structure


def check_dimensions(trace: Any, names: Mapping[str, str], structure: Structure) -> None:
    """Every dimension of every site belongs to a plate, or to a latent that the site depends on.

    Parameters
    ----------
    trace
        An enumerated run whose dimensions have symbols.
    names
        Symbol -> plate or latent.
    structure
        Which site depends on which.

    Raises
    ------
    StoryError
        A value with the states of a latent was reshaped, so that they stand where a plate, another latent or nothing
        belongs: the site, its shape, and the line that mends it.
    """
    nodes = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
    summed = {
        names[s["infer"]["_enumerate_symbol"]]: s["infer"]["_enumerate_dim"]
        for s in nodes.values()
        if s["infer"].get("_enumerate_symbol") and "_enumerate_dim" in s["infer"]
    }
    if not summed or any(s["infer"].get("expand") for s in nodes.values()):
        return
    for name, node in nodes.items():
        shape, symbols = tuple(node["fn"].batch_shape), node["infer"].get("_dim_to_symbol", {})
        near = {name, *(structure[name].parents if name in structure else summed)}
        for dim in range(-len(shape), 0):
            owner = names.get(symbols.get(dim, ""))
            if shape[dim] == 1 or (owner is not None and (owner not in summed or owner in near)):
                continue
            moved = [n for n in near & set(summed) if n != name] or [n for n in summed if n != name] or [name]
            raise StoryError(
                f"site {name!r} has shape {shape} while {', '.join(map(repr, moved[:3]))} "
                f"{'is' if len(moved) == 1 else 'are'} summed out, and dimension {dim} of it belongs to "
                f"{'no plate' if owner is None else repr(owner) + ', which it does not depend on'}.\n"
                f"  offending: the states of {moved[0]!r} stand in dimension {summed.get(moved[0], dim)}, left of all plates, "
                f"and a .unsqueeze(-1), [:, None] or reshape after it moves them\n"
                f"  mend: leave it out where the rows are meant ({moved[0]} broadcasts against rows as it is), "
                f"to look up a table use table[{moved[0]}.long()], to join columns torch.stack(..., -1) with .to_event(1)"
            )


def rows_axis(node: Any, plate: str | None) -> int:
    """Axis of a site's value along which the members of a plate lie; 0 where it lies in no such plate."""
    batch = len(node["fn"].batch_shape)
    return next((batch + f.dim for f in node["cond_indep_stack"] if f.name == plate and f.vectorized), 0)
