"""Many climbs, one answer: run them, mend them, choose the best, and say what to distrust."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...crowds import crowded
from ...errors import DivergenceError
from ..blame import impossibility, impossible
from .climb import Climb, Limits, Run, batch, begin, incremental, stepwise
from .displaced import WIDEST, displaced
from .engine import Enumeration
from .repair import EMPTY, collapsed, reseed
from .vanishing import vanished

if TYPE_CHECKING:
    from ...joint import LogJoint
    from ...posterior import Posterior
    from ...problem import Problem
    from . import EM

UNCONVERGED = "EM did not converge in {} iterations; raise max_iter or tol"
BROKEN = (
    "EM stopped after {} iterations, since the next step left the finite numbers or fell below the start: the density may have "
    "no maximum (a scale that goes to 0). Give such a scale a prior that keeps it away from 0, or take NUTS or SVI"
)


class Contest:
    """All climbs of one fit.

    Parameters
    ----------
    em
        The options.
    engine, joint, problem
        What climbs, the story it climbs for, and all of its data.
    count
        Number of starts.
    """

    def __init__(self, em: EM, engine: Any, joint: LogJoint, problem: Problem, count: int) -> None:
        self.em, self.engine, self.joint, self.problem, self.count = em, engine, joint, problem, count
        self.rows = problem.all_rows
        self.deadline = time.perf_counter() + (self.problem.budget or math.inf)
        self.runs: list[Run] = []
        self.stopped = ""
        self.notes: list[str] = []
        self.state: dict[str, Tensor] = {}
        self.driver = self.choose_driver()
        self.bar: Any = None
        self.saved: Any = None

    def choose_driver(self) -> str:
        """The user's driver where the engine can, else batch."""
        from . import MANY_ROWS

        wanted = self.em.driver
        blocks = isinstance(self.engine, Enumeration) and self.engine.together and self.engine.mixture is not None
        if wanted == "auto":
            return "incremental" if blocks and self.rows >= MANY_ROWS else "batch"
        if wanted != "batch" and not blocks:
            raise ValueError(
                f"EM(driver={wanted!r}) needs statistics of blocks of rows: a mixture with one finite latent a row and closed "
                f"forms for every unknown. Use driver='batch'; the plan of this story is\n{self.engine.plan_text}"
            )
        return wanted

    # -- climbing ----------------------------------------------------------------------------------------------------

    def climb_all(self) -> None:
        """Every start: in one go where the engine can, else one after another."""
        seeds = [self.problem.seed + r for r in range(self.count)]
        groups = [seeds] if self.engine.together else [[s] for s in seeds]
        done, dropped = 0, []
        for group in groups:
            try:
                self.climb(begin(self.engine.start(group, done), len(group)), {}, done)
            except DivergenceError as error:
                dropped.append(error)
            except KeyboardInterrupt:
                if not self.runs or self.problem.ranks.several:  # ranks would stop at different steps
                    raise
                self.stopped = "interrupted: the best state so far is returned"
            done += len(group)
            if self.stopped:
                break
        if dropped and not self.runs:
            raise dropped[0]
        if dropped:
            self.notes.append(f"{len(dropped)} of {self.count} starts were dropped: {dropped[0]}")

    def climb(self, climb: Climb, extra: dict[str, Tensor], offset: int = 0) -> None:
        """One group of starts to its end."""
        from .resume import Saved

        climb.extra = dict(extra)
        saved = (
            Saved.for_fit(self.em, self.problem, self.joint.blocks, offset) if self.em.checkpoint is not None else None
        )
        if saved is not None:
            climb = saved.resume(climb)
        self.saved = saved
        limits = Limits(
            self.em.max_iter,
            self.em.tol,
            self.rows,
            self.deadline,
            self.em.callback if self.problem.ranks.leads else None,
            self.tick,
            saved.write if saved else lambda climb: None,
            self.problem.ranks,
        )
        size = self.em.batch_size or max(8192, self.rows // 20)
        with tqdm(total=self.em.max_iter, desc="EM", disable=not self.problem.progress, leave=False) as self.bar:
            try:
                if self.driver == "incremental":
                    self.stopped = incremental(self.engine, climb, limits, size)
                elif self.driver == "stepwise":
                    self.stopped = stepwise(self.engine, climb, limits, size)
                    self.state = climb.extra
                else:
                    self.stopped = batch(self.engine, climb, limits)
            except DivergenceError as error:
                error.step = climb.iteration
                raise
            except KeyboardInterrupt:
                self.runs += [r for r in climb.runs if math.isfinite(r.objective)]
                raise
        if not any(math.isfinite(r.objective) for r in climb.runs):
            self.refuse(climb)
        self.runs += climb.runs
        if self.driver == "batch" and not self.stopped and self.count > 1:
            self.mend(climb.runs, limits)

    def tick(self, iteration: int, objective: float, active: int) -> None:
        """Show where the climb is."""
        self.bar.set_postfix_str(f"{objective / self.rows:.4f} a row, {active} of {self.count} climbing", refresh=False)
        self.bar.update()

    def mend(self, runs: list[Run], limits: Limits) -> None:
        """Climb again from runs that ended with an empty component, which is put beside the largest one."""
        engine = self.engine
        if not isinstance(engine, Enumeration) or not engine.together or engine.mixture is None:
            return
        theta = {n: torch.stack([r.theta[n] for r in runs]) for n in runs[0].theta}
        counts = engine.expectation(theta).stats[engine.mixture.latent]["counts"]
        which = (counts < EMPTY).any(1).nonzero().flatten().tolist()
        if not which or self.rows < engine.mixture.states:
            return
        again = reseed(engine, {n: v[which] for n, v in theta.items()}, counts[which], self.problem.seed)
        climb = begin(again, len(which))
        limits.save = lambda climb: None
        self.stopped = batch(engine, climb, limits)
        for number, run in zip(which, climb.runs):
            if run.objective > runs[number].objective:
                self.runs[self.runs.index(runs[number])] = run

    def refuse(self, climb: Climb) -> None:
        """No run has a finite objective: a start of density 0, or a step out of the finite numbers."""
        run = climb.runs[0]
        e = self.engine.expectation({n: v[None] for n, v in run.theta.items()})
        if not run.history:
            found = impossible(self.joint, self.joint.flatten(run.theta)) if self.joint.blocks else None
            if found is not None:
                raise ValueError(f"no start has a finite density: {impossibility(*found)}")
            factors = self.joint.factors(run.theta)
            bad = next((f for f in factors if not bool(f.value.isfinite().any())), None)
            where = f"site {bad.name!r}" if bad else "the story"
            raise ValueError(
                f"{where} gives the data the density {float(e.objective[0])} at the start: an observation is impossible under "
                f"every state of the latents, or the prior is far from the data's scale; check both"
            )
        raise DivergenceError(
            f"EM left the finite numbers at iteration {len(run.history)}: the objective is {float(e.objective[0])}. The last "
            f"finite state is attached; standardise the data or give the globals proper priors",
            state=run.theta,
            step=len(run.history),
        )

    # -- the answer --------------------------------------------------------------------------------------------------

    def answer(self, problem: Problem, timings: dict[str, float]) -> Posterior:
        """The best run as a posterior."""
        from ...posterior import Posterior

        fallen = self.fallen()
        sound = [r for r, bad in zip(self.runs, fallen) if not bad and math.isfinite(r.objective)]
        best = max(sound or self.runs, key=lambda r: r.objective)
        extra: dict[str, Any] = {"keep_labels": self.em.start is not None}
        if self.state:  # in the order of the climb, which the answer's components need not have
            at = self.runs.index(best)
            extra["stepwise"] = {"running": self.state["running"][at : at + 1].cpu(), "step": self.state["step"]}
            extra["stepwise"] |= {f"theta/{n}": v.cpu() for n, v in best.theta.items()}
        return Posterior(
            kind="point" if self.joint.blocks else "exact",
            method=self.em,
            problem=problem,
            draws={n: v.detach().cpu().unsqueeze(0) for n, v in best.theta.items()},
            history=best.history,
            diagnostics=self.describe(best, fallen),
            timings=timings,
            warnings=self.distrust(best, fallen),
            converged=best.converged and not self.stopped,
            extra=extra,
        )

    def fallen(self) -> list[bool]:
        """Which runs have a component that collapsed onto a few rows."""
        if not isinstance(self.engine, Enumeration) or not self.joint.blocks or len(self.runs) == 0:
            return [False] * len(self.runs)
        theta = {n: torch.stack([r.theta[n] for r in self.runs]) for n in self.runs[0].theta}
        return collapsed(self.engine, theta, self.em.ridge)

    def describe(self, best: Run, fallen: list[bool]) -> dict[str, Any]:
        """Numbers about the runs."""
        from ...restarts import of_climbs

        several = {}
        if len(self.runs) > 1:
            what = "log joint" if self.em.estimate == "map" else "log-likelihood"
            sound = [r.objective for r, bad in zip(self.runs, fallen) if not bad] or [r.objective for r in self.runs]
            several["restarts"] = of_climbs("restarts", what, sound, self.em.tol, self.rows)
            several["restarts"] |= {"count": len(self.runs), "collapsed": sum(fallen)}
        return {
            **several,
            "objective": best.objective,
            "log_likelihood": best.log_likelihood,
            "iterations": len(best.history),
            "log_likelihoods": best.likelihoods,
            "restart_objectives": [r.objective for r in self.runs],
            "restarts_collapsed": sum(fallen),
            "driver": self.driver,
            "plan": self.engine.plan_text,
        }

    def distrust(self, best: Run, fallen: list[bool]) -> list[str]:
        """What the user should know before using the answer."""
        warnings = ([self.stopped] if self.stopped else []) + self.notes
        warnings += self.saved.state.lost[:1] if self.saved is not None else []
        if self.em.batch_size and self.em.batch_size > self.rows and self.driver != "batch":
            warnings.append(
                f"batch_size={self.em.batch_size} exceeds the {self.rows} rows: all rows are used in every step"
            )
        if not best.converged and not self.stopped:
            early = self.driver == "batch" and len(best.history) < self.em.max_iter
            warnings.append(BROKEN.format(len(best.history)) if early else UNCONVERGED.format(self.em.max_iter))
        falls = [b - a for a, b in zip(best.history, best.history[1:])]
        if falls and min(falls) < -1e-6 * (1 + abs(best.objective)):
            warnings.append(
                f"the objective fell by {-min(falls):.3g} in one iteration: an M-step was not exact (see ridge)"
            )
        if fallen and all(fallen):
            warnings.append(
                "a component collapsed onto a few rows in every restart: the likelihood is unbounded there and only the "
                "ridge holds it; use fewer components, a simpler covariance, or estimate='map' with proper priors"
            )
        if self.em.estimate == "mle" and any("constant" in note for note in self.problem.structure.notes):
            warnings.append(
                f"without priors the spread of a constant column falls to 0: it stands at the variance floor "
                f"(ridge={self.em.ridge:g}), and the likelihood says nothing"
            )
        warnings += self.far_from_mass(best) if self.em.estimate == "map" else []
        if self.problem.want == "posterior":
            warnings.append("EM gives points for the globals: it says nothing about their uncertainty")
        return warnings

    def far_from_mass(self, best: Run) -> list[str]:
        """Whether the highest point of the joint density says anything about where most of it lies."""
        gone = vanished(self.joint, best.theta)
        if gone and all(self.joint.structure[n].local for n in gone):
            return [
                f"the spread of {', '.join(gone)} lies at the edge of what is possible, 0: the point says nothing about how "
                f"wide it may be; use NUTS, whose draws do"
            ]
        if gone:
            return [
                f"the spread of {', '.join(gone)} fell to 0: with its scale unknown too, a hierarchy has no highest point, and "
                f"this one says nothing about the data; use NUTS or SVI, which ask for volume, or fix the scale"
            ]
        if self.problem.structure.linear_gaussian or self.problem.ranks.several:
            return []
        far = displaced(self.joint, best.theta)
        if not far:
            crowd = crowded(self.problem.structure) if self.joint.dim > WIDEST else ""
            return [f"{crowd}; use NUTS or SVI, which integrate over them"] if crowd else []
        worst = max(far, key=lambda n: abs(far[n]))
        others = f" (also {', '.join(n for n in far if n != worst)})" if len(far) > 1 else ""
        return [
            f"{self.joint.dim} unknowns were set at once where the data are few for each, and {worst}{others} is off by about "
            f"{abs(far[worst]):.1f} posterior sd (too {'low' if far[worst] > 0 else 'high'}, by Laplace's approximation); use "
            f"NUTS or SVI, which integrate over the others"
        ]
