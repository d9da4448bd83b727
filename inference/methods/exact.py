"""Exact posteriors by conjugacy: nothing is approximated, nothing is iterated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Verdict, density_objection, positive_int

if TYPE_CHECKING:
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure


@dataclass(frozen=True)
class Exact:
    """Independent draws from a posterior that can be written down.

    Parameters
    ----------
    draws
        Number of independent draws from the closed form; its parameters are in `posterior.diagnostics["closed_form"]`.
    """

    name: ClassVar[str] = "exact"
    draws: int = 1000

    def __post_init__(self) -> None:
        positive_int("Exact", "draws", self.draws)

    def check(self, structure: Structure) -> Verdict:
        """Valid where every unknown is conjugate to what it generates and the rows have no latents."""
        if structure.conjugate:
            return Verdict(
                True, "every unknown is conjugate to what it generates: the posterior is known in closed form"
            )
        if objection := density_objection(structure):
            return Verdict(False, objection)
        local = [s.name for s in structure.latents if s.local or s.discrete]
        if local:
            return Verdict(False, f"{local[0]!r} is latent in the rows: the posterior of the globals is no closed form")
        return Verdict(False, "the posterior is none of the known closed forms")

    def run(self, problem: Problem) -> Posterior:
        """Draw from the closed form."""
        from ..conjugate import closed_form
        from ..joint import LogJoint
        from ..meter import Meter
        from ..posterior import Posterior

        with Meter() as meter:
            found = closed_form(problem)
            if found is None:
                raise ValueError("the posterior of this story is no known closed form; use 'nuts', 'svi' or 'em'")
            shapes = {b.name: b.shape for b in LogJoint(problem).blocks}
            meter.mark("setup")
            draws = found.draw(shapes, self.draws)
            meter.mark("run")
        diagnostics = {"closed_form": found.text, "log_evidence": found.log_evidence}
        means = {n: found.mean(n) for n in found.factors}
        diagnostics["mean"] = {n: m.reshape(shapes[n]) for n, m in means.items() if m is not None}
        if found.point:
            diagnostics["maximum_likelihood"] = {n: v.reshape(shapes[n]) for n, v in found.point.items()}
        return Posterior(
            kind="exact",
            method=self,
            problem=problem,
            draws={n: v.detach().cpu() for n, v in draws.items()},
            diagnostics=diagnostics,
            timings=meter.timings,
        )
