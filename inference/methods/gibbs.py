"""Gibbs sampling of topic models: exact draws of topics, shares and, through them, of the topics of words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Verdict, density_objection, positive_int

if TYPE_CHECKING:
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure


@dataclass(frozen=True)
class Gibbs:
    """Partially collapsed Gibbs sampling, for stories that are topic models.

    Parameters
    ----------
    chains
        Chains, run side by side.
    warmup, draws
        Passes over all words that are thrown away, and draws that are kept, of each chain.
    thin
        Passes for each draw.
    """

    name: ClassVar[str] = "gibbs"
    chains: int = 4
    warmup: int = 500
    draws: int = 500
    thin: int = 1

    def __post_init__(self) -> None:
        for name in ("chains", "draws", "thin"):
            positive_int("Gibbs", name, getattr(self, name))
        positive_int("Gibbs", "warmup", self.warmup, least=0)

    def check(self, structure: Structure) -> Verdict:
        """Valid for admixtures with Dirichlet topics and fixed concentrations."""
        if structure.admixture != "static" and (objection := density_objection(structure)):
            return Verdict(False, objection)
        if structure.admixture != "static":
            return Verdict(False, "no admixture of Dirichlet topics: the conditional distributions are not known")
        if structure.learned:
            names = ", ".join(s.name for s in structure.learned)
            return Verdict(
                False, f"{names} are learned as points; give the story fixed concentrations, or use EM or SVI"
            )
        topics = next(s.name for s in structure.globals)
        return Verdict(True, f"draws of {topics} and {structure.continuous_locals[0].name}; z drawn word by word")

    def run(self, problem: Problem) -> Posterior:
        """Warm up, then keep draws."""
        from ..topics.fits import run_gibbs

        return run_gibbs(problem, self)
