"""Expectation maximisation for stories whose rows can be summed or integrated exactly: exact locals, points for the rest.

Dempster, Laird and Rubin, *Maximum likelihood from incomplete data via the EM algorithm*, JRSS B 1977; ECM: Meng and
Rubin, Biometrika 1993.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..base import Verdict, density_objection, gradient_objection, one_of, positive_float, positive_int

if TYPE_CHECKING:
    from ...joint import LogJoint
    from ...posterior import Posterior
    from ...problem import Problem
    from ...structure import Structure

DRIVERS = ("auto", "batch", "incremental", "stepwise")
#: Rows from which "auto" improves the unknowns after every block instead of after every pass.
MANY_ROWS = 200_000


@dataclass(frozen=True)
class EM:
    """EM derived from the story: exact E-steps, closed-form M-steps where there are any.

    Parameters
    ----------
    restarts
        Starts from different k-means++ clusterings (or draws of guide and prior); the best objective wins. Where the
        structure allows, all are climbed in one batch.
    estimate
        "map": the mode of the globals under the story's priors. "mle": the priors of the globals are left out.
    max_iter, tol
        Stop when the objective rises by less than `tol` a row, at the latest after `max_iter` passes over the rows.
    ridge
        Floor added to variances without a prior, as a share of each column's own variance (scikit-learn's `reg_covar`
        is the same in data units). Not used where the prior is proper.
    driver
        "batch": one M-step a pass. "incremental": one after every block of rows, monotone in the free energy. "stepwise":
        running averages over blocks, for rows that keep coming. "auto": incremental for large mixtures, else batch.
    batch_size
        Rows of a block; None: a twentieth of the rows, 8,192 at least.
    kernels
        Use matrix-product kernels where the story's structure is recognised; False forces the contraction.
    start
        Values of the unknowns (site name -> array), or a `Posterior`, to start from instead; then there are no
        restarts. From a stepwise answer, stepwise EM goes on with its running averages.
    checkpoint
        File in which the state is kept while climbing; an unfinished run of the same fit goes on from there, to the
        same bits.
    callback
        Called as callback(iteration, objective, values) after every iteration of every restart.
    """

    name: ClassVar[str] = "em"
    spreads: ClassVar[str] = "rows"
    restarts: int = 5
    estimate: str = "map"
    max_iter: int = 500
    tol: float = 1e-6
    ridge: float = 1e-6
    driver: str = "auto"
    batch_size: int | None = None
    kernels: bool = True
    start: Mapping[str, Any] | Posterior | None = field(default=None, compare=False)
    checkpoint: str | Path | None = field(default=None, compare=False)
    callback: Callable[[int, float, dict[str, Tensor]], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        positive_int("EM", "restarts", self.restarts)
        positive_int("EM", "max_iter", self.max_iter)
        positive_float("EM", "tol", self.tol, zero=True)
        positive_float("EM", "ridge", self.ridge, zero=True)
        one_of("EM", "estimate", self.estimate, ("map", "mle"))
        one_of("EM", "driver", self.driver, DRIVERS)
        if self.batch_size is not None:
            positive_int("EM", "batch_size", self.batch_size)

    def check(self, structure: Structure) -> Verdict:
        """Valid where every latent inside the data plate is finite or Gaussian: then the E-step is exact."""
        objection = density_objection(structure, chunked=True) or gradient_objection(structure)
        if objection:
            return Verdict(False, objection)
        if structure.has_modules:
            return Verdict(False, "the story learns networks; their M-step is what SVI does")
        if structure.admixture:
            names = ", ".join(s.name for s in (*structure.continuous_locals, *structure.finite))
            return Verdict(True, f"a topic model: {names} by expected counts (approximate); points for the globals")
        if structure.continuous_locals and not structure.linear_gaussian:
            site = structure.continuous_locals[0]
            return Verdict(
                False,
                f"local latent {site.name!r} ({site.family}) is continuous and the rows are not linear-Gaussian in it: the "
                f"E-step is an integral without a closed form",
            )
        if structure.continuous_locals:
            names = ", ".join(s.name for s in (*structure.continuous_locals, *structure.finite))
            return Verdict(
                True, f"the rows are linear-Gaussian: {names} can be integrated out exactly; points for the globals"
            )
        if structure.finite:
            names = ", ".join(s.name for s in structure.finite[:4]) + (", ..." if len(structure.finite) > 4 else "")
            return Verdict(True, f"{names} can be summed out exactly; points for the globals")
        return Verdict(True, "no latent to sum out: EM is one M-step, a point estimate of the globals")

    def plan(self, story: Any, data: Any) -> str:
        """How EM would run: every unknown's update and every latent's sum, each with its reason and cost.

        Raises
        ------
        TypeError, ValueError
            As for `fit`; `NoMethodError` where EM is not valid for the story.
        """
        from ...choose import check_request
        from ...joint import LogJoint
        from ...problem import prepare

        problem = prepare(story, data, seed=0)
        check_request(problem.structure, self)
        if problem.admixture is not None:
            from ...topics.fits import plan

            return plan(problem.admixture)
        with problem.scope(0):
            return self.engine(LogJoint(problem), None, problem.kwargs).plan_text

    def engine(self, joint: LogJoint, theta: dict[str, Tensor] | None, kwargs: dict[str, Any]) -> Any:
        """What climbs this story given `kwargs`; `joint` may know its first rows only."""
        if joint.structure.continuous_locals:
            from .linear import engine_for

            return engine_for(joint, kwargs, self.estimate, self.ridge, self.kernels)
        from .engine import Enumeration

        return Enumeration(joint, self.estimate, self.ridge, self.kernels, theta)

    def trial(self, problem: Problem) -> Callable[[], Any]:
        """An E-step, to be timed."""
        if problem.admixture is not None:
            from ...topics.ways import trial

            return trial(problem, self)
        from ...joint import LogJoint

        engine = self.engine(LogJoint(problem), None, problem.kwargs)
        theta = engine.start([problem.seed], 0)
        return lambda: engine.expectation(theta)

    def run(self, problem: Problem) -> Posterior:
        """Climb from every start and keep the best."""
        from ...joint import LogJoint
        from ...meter import Meter
        from .climb import begin
        from .contest import Contest

        if problem.admixture is not None:
            from ...topics.fits import run_em

            return run_em(problem, self)
        with Meter() as meter:
            joint = LogJoint(problem.thumbnail if problem.structure.linear_gaussian else problem)
            theta = self.starting_point(joint)
            engine = self.engine(joint, theta, problem.kwargs)
            count = 1 if theta or not joint.blocks else self.restarts
            contest = Contest(self, engine, joint, problem, count)
            meter.mark("setup")
            if theta is not None or not joint.blocks:
                kept = {n: v.clone() for n, v in self.kept().items() if not n.startswith("theta/")}
                contest.climb(begin(theta or {}, 1), kept)
            else:
                contest.climb_all()
            meter.mark("run")
        return contest.answer(problem, meter.timings)

    def starting_point(self, joint: LogJoint) -> dict[str, Tensor] | None:
        """The user's start, checked, with a leading dimension of one run."""
        if self.start is None:
            return None
        given = self.start if isinstance(self.start, Mapping) else self.start.draw(0)
        if kept := self.kept():
            given = {n.removeprefix("theta/"): v for n, v in kept.items() if n.startswith("theta/")}
        wanted = {b.name: b for b in joint.blocks if not b.local}
        if set(given) != set(wanted):
            raise ValueError(f"EM(start=...) has {sorted(given)}; it needs a value for each of {sorted(wanted)}")
        values = {}
        for name, block in wanted.items():
            value = torch.as_tensor(given[name]).to(joint.problem.device, joint.problem.dtype)
            if tuple(value.shape) != block.shape:
                raise ValueError(
                    f"EM(start={{{name!r}: ...}}) has shape {tuple(value.shape)}; the site has {block.shape}"
                )
            values[name] = value[None]
        return values

    def kept(self) -> dict[str, Tensor]:
        """What an earlier stepwise answer left to go on from, if that is the start."""
        if self.start is None or isinstance(self.start, Mapping) or self.driver != "stepwise":
            return {}
        return self.start.extra.get("stepwise", {})


__all__ = ["EM"]
