"""Several short climbs from different starts, the best of which goes on to the end."""

from __future__ import annotations

import math
import time
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import DivergenceError
from .ascent import Ascent, Leaves
from .climb_file import ClimbFile
from .holdout import Holdout

if TYPE_CHECKING:
    from ..problem import Problem
    from .svi import SVI

#: Share of the steps that every start may take before the best goes on.
SHORT = 0.15
SPENT = "the budget"
INTERRUPTED = "interrupted: the best state so far is returned"


class Climbs:
    """All climbs of one fit.

    Parameters
    ----------
    options, problem, target
        The method, what is fitted, and what is climbed.
    held
        Indices of rows that say when to stop, or None.
    file
        Where the climbs are kept, or None.
    """

    def __init__(
        self, options: SVI, problem: Problem, target: Any, held: Any = None, file: ClimbFile | None = None
    ) -> None:
        self.options, self.problem, self.target, self.held, self.file = options, problem, target, held, file
        self.ascents: list[Ascent] = []
        self.dropped: list[DivergenceError] = []
        self.final = False
        self.starts = (
            1 if getattr(target, "certain", False) else options.starts or 1
        )  # from the same weights all climbs are one

    def fresh(self, leaves: Leaves) -> Ascent:
        """A climb from these parameters."""
        options = self.options
        schedule = options.schedule
        if schedule == "auto":
            schedule = "cosine" if options.guide == "flow" else "adaptive"
        return Ascent(
            self.target,
            leaves,
            options.lr,
            options.steps,
            options.tol,
            options.patience,
            schedule=schedule,
            clip=options.clip,
            decay=options.average,
            holdout=None if self.held is None else Holdout(self.target, self.held, options.steps),
        )

    def run(self) -> tuple[Ascent, list[str]]:
        """The best climb at its end, and what there is to say about it.

        Raises
        ------
        DivergenceError
            Every start left the finite numbers.
        """
        deadline = time.perf_counter() + self.problem.budget if self.problem.budget else math.inf
        if self.file is not None and (found := self.file.read(self.fresh)) is not None:
            self.ascents, self.dropped, self.final = found
        warnings: list[str] = []
        ranks = self.problem.ranks
        try:
            self.climb(deadline)
        except KeyboardInterrupt:
            if ranks.several or not any(ascent.history for ascent in self.ascents):
                raise
            warnings.append(INTERRUPTED)
        best = max(self.ascents, key=lambda a: a.recent())
        best.conclude()
        spent = not ranks.before(deadline) and not best.converged
        if self.file is not None and INTERRUPTED not in warnings:
            self.file.leave(not spent, self.ascents, self.dropped, self.final)
        if self.dropped:
            warnings.append(f"{len(self.dropped)} of {self.starts} starts were dropped: {self.dropped[0]}")
        if best.converged or INTERRUPTED in warnings:
            return best, warnings
        if spent:
            warnings.append(f"{SPENT} of {self.problem.budget:g} s is used up: the best state so far is returned")
        elif best.rising:
            steps = self.options.steps
            warnings.append(f"SVI did not converge in {steps} steps: the ELBO was still rising; raise steps or lr")
        return best, warnings

    @property
    def short(self) -> int:
        """Steps that every start takes before the best goes on."""
        return max(1, int(SHORT * self.options.steps)) if self.starts > 1 else self.options.steps

    def several(self) -> dict[str, Any]:
        """What the starts say about each other."""
        from ..restarts import of_trials

        begun = [a.history for a in self.ascents if a.history]
        return {"restarts": of_trials("starts", "ELBO", begun, self.short)} if len(begun) > 1 else {}

    def climb(self, deadline: float) -> None:
        """Every start for a while, then the best to its end."""
        steps, short = self.options.steps, self.short
        total = steps + (self.starts - 1) * short
        done = sum(len(a.history) for a in self.ascents)
        with tqdm(total=total, initial=done, desc="SVI", disable=not self.problem.progress, leave=False) as bar:

            def watch(elbo: float, lr: float) -> None:
                bar.update()
                if bar.n % 20 == 0:
                    bar.set_postfix(elbo=f"{elbo:.5g}", lr=f"{lr:.2g}", refresh=False)
                if self.file is not None:
                    self.file.write(self.ascents, self.dropped, self.final)

            begun = len(self.ascents) + len(self.dropped)
            for start in range(max(0, begun - 1), self.starts):
                if start >= begun:
                    self.ascents.append(self.fresh(self.target.start()))
                try:
                    self.ascents[-1].run(short, deadline, watch)
                except DivergenceError as error:
                    clear_frames(error.__traceback__)  # they hold the climb that has failed
                    self.dropped.append(error)
                    self.ascents.pop()
                if not self.problem.ranks.before(deadline):
                    break
            if not self.ascents:
                raise self.dropped[0]
            if not self.final:
                self.ascents.sort(key=lambda a: -a.recent())
                self.final = True
            self.ascents[0].run(steps, deadline, watch)
