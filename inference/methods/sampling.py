"""What samplers share: the density they move through, how they are watched, and the answer that their positions make."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .base import Verdict, density_objection, gradient_objection
from .starts import listed

if TYPE_CHECKING:
    from ..capture import ValueAndGrad
    from ..joint import LogJoint
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure
    from .backends import Backend

#: Draws of a chain from which on the effective sample size of the log density is shown.
MANY_ENOUGH = 20


def sampling_verdict(structure: Structure) -> Verdict:
    """Valid where the log joint is a differentiable function of continuous latents alone."""
    objection = density_objection(structure) or gradient_objection(structure)
    if objection:
        return Verdict(False, objection)
    if structure.learned or structure.has_modules:
        what = structure.learned[0].name if structure.learned else "its networks"
        return Verdict(False, f"the story learns {what} as a point; points are learned by SVI, not sampled")
    continuous = [s.name for s in structure.latents if s.continuous]
    if not continuous:
        return Verdict(False, "no latent is continuous: nothing to sample, summing the finite ones out is exact")
    text = f"draws of {listed(continuous)}"
    if structure.finite:
        text += f"; {listed([s.name for s in structure.finite])} summed out exactly"
    return Verdict(True, text)


def potential_of(joint: LogJoint, wanted: str) -> ValueAndGrad:
    """The density and its gradient, captured unless the eager story is wanted.

    Raises
    ------
    ValueError
        The log density is random.
    """
    from ..capture import eager_potential, value_and_grad

    potential = eager_potential(joint) if wanted == "eager" else value_and_grad(joint)
    if potential.random:
        raise ValueError(
            "the log density of the story differs from call to call at one and the same point: it draws random "
            "numbers outside its sample sites (torch.randn, dropout, a plate with subsample_size); make them latent "
            "sites or fix them, or use method='svi'"
        )
    return potential


class Watch:
    """Progress of all chains on one bar, the phases of the run, and its end where the budget is used up.

    Parameters
    ----------
    name, problem, meter, began
        Of the bar; what is fitted; phases; when the run began.
    warmup, total
        Iterations of one chain.
    chains
        How many there are.
    progress
        Iterations that the slowest chain and all chains together have done.
    told
        Text beside the bar.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        meter: Any,
        began: float,
        warmup: int,
        total: int,
        chains: int,
        progress: Callable[[], tuple[int, int]],
        told: Callable[[], str],
    ) -> None:
        self.meter, self.progress, self.told, self.warmup = meter, progress, told, warmup
        self.stopped = ""
        self.warm = False
        self.budget = problem.budget
        self._deadline = began + problem.budget if problem.budget else math.inf
        self._bar = tqdm(total=chains * total, desc=name, unit="draw", disable=not problem.progress, leave=False)
        self._bar.initial = self._bar.n = self.progress()[1]
        self._shown = 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._bar.close()

    def __call__(self) -> bool:
        now = time.perf_counter()
        if not self.warm and self.progress()[0] >= self.warmup:
            self.warm = True
            self.meter.mark("warmup")
        if now - self._shown > 0.3:
            self._show()
            self._shown = now
        if now > self._deadline:
            self.stopped = f"the budget of {self.budget:g} s is used up"
        return bool(self.stopped)

    def _show(self) -> None:
        if not self._bar.disable:
            self._bar.n = self.progress()[1]
            self._bar.set_postfix_str(self.told(), refresh=True)


def beside_bar(divergences: int, step: float, lp: NDArray) -> str:
    """Text beside the bar; `lp` (chains, draws) so far."""
    found = f"{divergences} divergences, step {step:.3g}"
    if lp.shape[1] >= MANY_ENOUGH:
        from ..diagnostics import rhat_ess

        found += f", ESS {rhat_ess({'lp': lp})['ess_bulk']:.0f}"
    return found


def answer(
    method: Any,
    problem: Problem,
    joint: LogJoint,
    potential: ValueAndGrad,
    backend: Backend,
    positions: NDArray,
    stats: dict[str, NDArray],
    notes: list[str],
    facts: dict[str, Any],
    meter: Any,
    complete: bool,
) -> Posterior:
    """A posterior from positions (chains, draws, dim) in free space and statistics (chains, draws).

    Parameters
    ----------
    notes, facts
        Warnings, and what to add to the diagnostics.
    complete
        Whether the run came to its end.
    """
    from ..capture import constrain_many
    from ..diagnostics import sampling_diagnostics, sampling_warnings
    from ..marginal import MarginalJoint
    from ..posterior import Posterior

    flat = torch.from_numpy(positions.reshape(-1, joint.dim)).to(problem.device, problem.dtype)
    draws = {n: v.double().cpu() for n, v in constrain_many(joint, flat).items()}
    if isinstance(joint, MarginalJoint):
        draws.update(joint.local_draws(flat))
    meter.mark("run")
    found = sampling_diagnostics(stats, getattr(method, "max_depth", None))
    found["backend"] = backend.text
    if isinstance(joint, MarginalJoint):
        found["locals"] = joint.how
    found["gradient"] = potential.mode + (f": {potential.reason}" if potential.reason else "")
    if potential.notice and backend.code is None:
        found["gradient"] += f"; {potential.notice}"
    return Posterior(
        kind="samples",
        method=method,
        problem=problem,
        draws=draws,
        chains=len(positions),
        diagnostics={**found, **facts},
        warnings=notes + ([backend.notice] if backend.notice else []) + sampling_warnings(found, stats["lp"].size),
        timings={"warmup": 0.0, "run": 0.0, **meter.timings},
        sample_stats=stats,
        converged=complete,
    )


def spread(seed: int, chains: int) -> tuple[list[np.random.SeedSequence], list[np.random.Generator]]:
    """A stream of random numbers for every chain."""
    seeds = np.random.SeedSequence(seed).spawn(chains)
    return seeds, [np.random.default_rng(s) for s in seeds]
