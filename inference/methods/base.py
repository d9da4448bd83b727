"""What every method is: a frozen dataclass of its options with `check` and `run`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure


@dataclass(frozen=True)
class Verdict:
    """A method's opinion of a story: does it apply, and on what premise (or why not)."""

    applies: bool
    reason: str


@runtime_checkable
class Method(Protocol):
    """Anybody's own method: pass an instance to `fit`."""

    name: ClassVar[str]

    def check(self, structure: Structure) -> Verdict:
        """Whether the method is valid for the story, and on what premise."""
        ...

    def run(self, problem: Problem) -> Posterior:
        """Answer the question."""
        ...


def positive_int(owner: str, name: str, value: object, least: int = 1) -> None:
    """Refuse counts that are not whole numbers of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}({name}={value!r}): {name} must be a whole number of at least {least}")


def positive_float(owner: str, name: str, value: object, below: float = math.inf, zero: bool = False) -> None:
    """Refuse what is not a finite positive number under `below`."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > below or value < 0 or (value == 0 and not zero):  # type: ignore[operator]
        limit = "" if below == math.inf else f" and at most {below:g}"
        raise ValueError(
            f"{owner}({name}={value!r}): {name} must be a {'non-negative' if zero else 'positive'} number{limit}"
        )


def one_of(owner: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse what is not among the allowed words."""
    if value not in allowed:
        raise ValueError(f"{owner}({name}={value!r}): {name} must be one of {', '.join(map(repr, allowed))}")


#: Rows that a method which goes through them in chunks looks at in one go, at most.
CHUNK = 65_536


def density_objection(structure: Structure, chunked: bool = False, guided: bool = False) -> str | None:
    """Why no method that needs log p(data, latents) can run, or None.

    `chunked`: it looks at some rows at a time; `guided`: a guide guesses what cannot be summed out.
    """
    from ..structure import ENUMERATION_LIMIT, format_bytes

    if structure.implicit:
        return "there is no density: the story only generates data (implicit model)"
    if not structure.observed and not structure.unnormalised:
        return "no site is observed: there is nothing to learn from; pass data to a site with obs="
    if structure.uncountable and not guided:
        site = structure.uncountable[0]
        if site.states is None:
            return (
                f"latent {site.name!r} ({site.family}) is discrete with infinitely many states: it cannot be enumerated"
            )
        return (
            f"latent {site.name!r} has {site.states:.3g} joint states in one event: too many to sum; make its entries "
            f"independent sites inside a plate, or a chain with pyro.markov"
        )
    size = structure.enumeration_bytes()
    if chunked and structure.num_rows and structure.row_arguments and all(s.local for s in structure.finite):
        size *= min(1.0, CHUNK / structure.num_rows)
    if size > ENUMERATION_LIMIT:
        names = ", ".join(s.name for s in structure.finite[:4]) + (", ..." if len(structure.finite) > 4 else "")
        return (
            f"summing out {names} needs a table of {structure.enumeration_elements():.3g} elements ({format_bytes(size)}, "
            f"the limit is {format_bytes(ENUMERATION_LIMIT)}); put independent latents in a plate and chains in pyro.markov"
        )
    return None


def gradient_objection(structure: Structure) -> str | None:
    """Why gradients of the log joint do not answer the question, or None."""
    if structure.moving_support:
        site = structure.moving_support[0]
        return (
            f"the support of observed site {site.name!r} depends on a latent: the likelihood jumps to 0 at the edge and "
            f"gradients do not see it"
        )
    stuck = [s for s in structure.latents if s.continuous and not s.reachable]
    if stuck:
        return f"no bijection to the support of latent {stuck[0].name!r} ({stuck[0].support}) is known"
    return None
