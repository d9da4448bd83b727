"""Expectation maximisation for any story whose latents are finite: exact posteriors of the latents, points for the rest.

Dempster, Laird and Rubin, *Maximum likelihood from incomplete data via the EM algorithm*, JRSS B 1977; ECM: Meng and
Rubin, Biometrika 1993.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..base import Verdict, density_objection, gradient_objection, one_of, positive_float, positive_int

if TYPE_CHECKING:
    from ...joint import LogJoint
    from ...posterior import Posterior
    from ...problem import Problem
    from ...structure import Structure
    from .plan import Plan


@dataclass(frozen=True)
class EM:
    """Enumeration EM.

    Parameters
    ----------
    restarts
        Starts from different k-means++ clusterings (or draws of guide and prior); the best objective wins.
    estimate
        "map": the mode of the globals under the story's priors. "mle": the priors of the globals are left out.
    max_iter, tol
        Stop when the objective rises by less than `tol` a row, at the latest after `max_iter` iterations.
    ridge
        Floor added to variances without a prior, as a share of the data's mean variance (scikit-learn's `reg_covar`
        is the same in data units). Not used where the prior is proper.
    start
        Values of the unknowns (site name -> array) to start from instead; then there are no restarts.
    kernels
        Use matrix-product kernels where the story's structure is recognised; False forces the contraction.
    callback
        Called as callback(iteration, objective, values) after every iteration of every restart.
    """

    name: ClassVar[str] = "em"
    restarts: int = 5
    estimate: str = "map"
    max_iter: int = 500
    tol: float = 1e-6
    ridge: float = 1e-6
    kernels: bool = True
    start: Mapping[str, Any] | None = field(default=None, compare=False)
    callback: Callable[[int, float, dict[str, Tensor]], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        positive_int("EM", "restarts", self.restarts)
        positive_int("EM", "max_iter", self.max_iter)
        positive_float("EM", "tol", self.tol, zero=True)
        positive_float("EM", "ridge", self.ridge, zero=True)
        one_of("EM", "estimate", self.estimate, ("map", "mle"))

    def check(self, structure: Structure) -> Verdict:
        """Valid where every latent inside the data plate is finite: then the E-step is an exact sum."""
        objection = density_objection(structure) or gradient_objection(structure)
        if objection:
            return Verdict(False, objection)
        if structure.continuous_locals:
            site = structure.continuous_locals[0]
            return Verdict(
                False, f"local latent {site.name!r} ({site.family}) is continuous: the E-step is an integral, not a sum"
            )
        if structure.has_modules:
            return Verdict(False, "the story learns networks; their M-step is what SVI does")
        if structure.finite:
            names = ", ".join(s.name for s in structure.finite[:4]) + (", ..." if len(structure.finite) > 4 else "")
            return Verdict(True, f"{names} can be summed out exactly; points for the globals")
        return Verdict(True, "no latent to sum out: EM is one M-step, a point estimate of the globals")

    def run(self, problem: Problem) -> Posterior:
        """Climb from every start and keep the best."""
        from ...joint import LogJoint
        from ...meter import Meter
        from ...posterior import Posterior

        with Meter() as meter:
            joint = LogJoint(problem)
            fixed = self.starting_point(joint)
            runs: list[Run] = []
            stopped, plan = "", None
            deadline = time.perf_counter() + problem.budget if problem.budget else math.inf
            count = 1 if fixed or not joint.blocks else self.restarts
            meter.mark("setup")
            for restart in tqdm(
                range(count), desc="EM restarts", disable=not problem.progress or count == 1, leave=False
            ):
                try:
                    run, plan = self.climb(joint, fixed, problem.seed + restart, restart, deadline, runs)
                except KeyboardInterrupt:
                    stopped = "interrupted: the best state so far is returned"
                    if not runs:
                        raise
                    break
                runs.append(run)
                if time.perf_counter() > deadline:
                    stopped = f"the budget of {problem.budget:g} s is used up: the best state so far is returned"
                    break
            meter.mark("run")
        best = max(runs, key=lambda r: r.objective)
        return Posterior(
            kind="point" if joint.blocks else "exact",
            method=self,
            problem=problem,
            draws={n: v.detach().cpu().unsqueeze(0) for n, v in best.theta.items()},
            history=best.history,
            diagnostics=self.describe(best, runs, plan),
            timings=meter.timings,
            warnings=self.distrust(best, runs, stopped, problem),
            converged=best.converged and not stopped,
            extra={"keep_labels": fixed is not None},
        )

    def starting_point(self, joint: LogJoint) -> dict[str, Tensor] | None:
        """The user's start, checked."""
        if self.start is None:
            return None
        wanted = {b.name: b for b in joint.blocks}
        if set(self.start) != set(wanted):
            raise ValueError(f"EM(start=...) has {sorted(self.start)}; it needs a value for each of {sorted(wanted)}")
        values = {}
        for name, block in wanted.items():
            value = torch.as_tensor(self.start[name]).to(joint.problem.dtype)
            if tuple(value.shape) != block.shape:
                raise ValueError(
                    f"EM(start={{{name!r}: ...}}) has shape {tuple(value.shape)}; the site has {block.shape}"
                )
            values[name] = value
        return values

    def climb(
        self,
        joint: LogJoint,
        fixed: dict[str, Tensor] | None,
        seed: int,
        restart: int,
        deadline: float,
        done: list[Run],
    ) -> tuple[Run, Plan]:
        """One run from one start."""
        from .estep import expectation, make_parts
        from .mixture import MixtureKernel
        from .mstep import MStep
        from .plan import compile_plan
        from .start import clusters, expectation_at

        torch.manual_seed(seed)
        guess = joint.guide_draw() if restart % 2 == 0 else None
        theta = fixed or guess or joint.prior_draw()
        plan = compile_plan(joint, theta, self.estimate)
        parts = make_parts(joint)
        kernel = MixtureKernel.recognise(joint, plan, theta, parts) if self.kernels else None
        step = MStep(joint, plan, self.ridge * data_variance(joint))
        if fixed is None:
            labels = clusters(joint, seed) if joint.finite else None
            if labels is not None:
                e = expectation_at(joint, plan, theta, parts, labels)
                for _ in range(2):  # spreads depend on the means of the same labels
                    theta = step(theta, e)
            elif guess is None:
                theta = best_prior_draw(joint, theta)
        run = Run(theta, -math.inf, -math.inf, [], [], False)
        n = max(1, joint.structure.num_rows or 1)
        for iteration in range(self.max_iter):
            e = kernel(theta, parts) if kernel else expectation(joint, plan, theta, parts)
            if not math.isfinite(e.objective):
                self.refuse(joint, theta, run, e)
                break
            rise = e.objective - run.objective
            run.theta, run.objective, run.log_likelihood = theta, e.objective, e.log_likelihood
            run.history.append(e.objective)
            run.likelihoods.append(e.log_likelihood)
            if self.callback is not None:
                self.callback(iteration, e.objective, theta)
            if abs(rise) < self.tol * n or not joint.blocks:
                run.converged = True
                break
            if time.perf_counter() > deadline:
                break
            theta = step(theta, e)
        return run, plan

    def refuse(self, joint: LogJoint, theta: dict[str, Tensor], run: Run, e: Any) -> None:
        """A start of density 0 or a step out of the finite numbers."""
        from ...errors import DivergenceError

        if not run.history:
            factors = joint.factors(theta)
            bad = next((f for f in factors if not bool(f.value.isfinite().any())), None)
            where = f"site {bad.name!r}" if bad else "the story"
            raise ValueError(
                f"{where} gives the data the density {e.objective} at the start: an observation is impossible under every "
                f"state of the latents, or the prior is far from the data's scale; check both"
            )
        raise DivergenceError(
            f"EM left the finite numbers at iteration {len(run.history)}: the objective is {e.objective}. The last finite "
            f"state is attached; standardise the data or give the globals proper priors",
            state=run.theta,
            step=len(run.history),
        )

    def describe(self, best: Run, runs: list[Run], plan: Plan | None) -> dict[str, Any]:
        """Numbers about the runs."""
        return {
            "objective": best.objective,
            "log_likelihood": best.log_likelihood,
            "iterations": len(best.history),
            "log_likelihoods": best.likelihoods,
            "restart_objectives": [r.objective for r in runs],
            "plan": str(plan) if plan else "",
        }

    def distrust(self, best: Run, runs: list[Run], stopped: str, problem: Problem) -> list[str]:
        """What the user should know before using the answer."""
        warnings = [stopped] if stopped else []
        if not best.converged and not stopped:
            warnings.append(f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol")
        falls = [b - a for a, b in zip(best.history, best.history[1:])]
        if falls and min(falls) < -1e-6 * (1 + abs(best.objective)):
            warnings.append(
                f"the objective fell by {-min(falls):.3g} in one iteration: an M-step was not exact (see ridge)"
            )
        if problem.want == "posterior":
            warnings.append("EM gives points for the globals: it says nothing about their uncertainty")
        return warnings


@dataclass
class Run:
    """One climb."""

    theta: dict[str, Tensor]
    objective: float
    log_likelihood: float
    history: list[float]
    likelihoods: list[float]
    converged: bool


def best_prior_draw(joint: LogJoint, first: dict[str, Tensor], tries: int = 20) -> dict[str, Tensor]:
    """The draw of highest log joint density among several."""
    draws = [first] + [joint.prior_draw() for _ in range(tries - 1)]
    with torch.no_grad():
        values = torch.stack([joint.density(d).nan_to_num(-math.inf) for d in draws])
    return draws[int(values.argmax())]


def data_variance(joint: LogJoint) -> float:
    """Mean variance of the observed columns: the scale of the ridge."""
    found = []
    for site in joint.structure.observed:
        value = joint.problem.kwargs.get(site.argument or "")
        if isinstance(value, Tensor) and value.is_floating_point() and len(value) > 1 and not site.discrete:
            rows = value.reshape(len(value), -1)
            centred = (rows - rows.nanmean(0)).nan_to_num(0.0)
            found.append((centred**2).mean().item())
    return sum(found) / len(found) if found else 1.0


__all__ = ["EM"]
