"""Drivers: the loops that climb, from all starts at once where the engine can.

batch        E-step over all rows, then M-step (Dempster, Laird and Rubin 1977).
incremental  M-step after every block of rows, from the sums of the last visit to each (Neal and Hinton, *A view of the EM
             algorithm that justifies incremental, sparse, and other variants*, 1998): the free energy never falls.
stepwise     running averages of the blocks' statistics with falling weights, for rows that keep coming (Cappe and Moulines,
             *On-line expectation-maximization for latent data models*, JRSS B 2009); its history is the log-likelihood
             of the rows as they came, pass by pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...distributed import ALONE, Ranks
from .engine import Enumeration
from .estep import Expectation, slots_now
from .mixture import MixtureKernel
from .mstep import Theta


@dataclass(eq=False)
class Run:
    """One climb: its best state, what it was worth at every iteration, and whether it arrived."""

    theta: dict[str, Tensor]
    objective: float = -math.inf
    log_likelihood: float = -math.inf
    history: list[float] = field(default_factory=list)
    likelihoods: list[float] = field(default_factory=list)
    converged: bool = False


@dataclass
class Limits:
    """When to stop, and whom to tell.

    `tick` is called after every iteration with the iteration, the best objective and the runs that still climb.
    """

    max_iter: int
    tol: float
    rows: int
    deadline: float = math.inf
    callback: Callable[[int, float, dict[str, Tensor]], None] | None = None
    tick: Callable[[int, float, int], None] = lambda iteration, objective, active: None
    save: Callable[[Climb], None] = lambda climb: None
    ranks: Ranks = ALONE

    @property
    def over(self) -> bool:
        """Whether the time is up: on the clock of the first rank, where there are several."""
        return not self.ranks.before(self.deadline)


@dataclass
class Climb:
    """Where a driver stands: everything that a checkpoint needs to go on from, bit by bit.

    `active` are the numbers of the runs whose unknowns `theta` holds; `extra` is the driver's own.
    """

    theta: Theta
    runs: list[Run]
    active: list[int]
    iteration: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, which: list[int]) -> None:
        """Go on with some of the active runs."""
        self.theta = {n: v[which] for n, v in self.theta.items()}
        self.active = [self.active[i] for i in which]


def maximised(engine: Any, theta: Theta, e: Expectation) -> Theta:
    """M-step of every run, laid out as a checkpoint has it: products of transposed matrices round in another order."""
    return {n: v.contiguous() for n, v in engine.maximise(theta, e).items()}


def begin(theta: Theta, runs: int) -> Climb:
    """All runs at their starts."""
    return Climb(theta, [Run({n: v[r] for n, v in theta.items()}) for r in range(runs)], list(range(runs)))


def batch(engine: Any, climb: Climb, limits: Limits) -> str:
    """Climb until every run has converged; returns why it stopped early, or nothing."""
    while climb.iteration < limits.max_iter and climb.active:
        e = engine.expectation(climb.theta)
        going = note(climb, e, limits)
        climb.iteration += 1
        if len(going) < len(climb.active):
            climb.keep(going)
            e = some_runs(e, going)
        if not going:
            break
        if limits.over:
            return "the budget is used up: the best state so far is returned"
        climb.theta = maximised(engine, climb.theta, e)
        limits.save(climb)
    return ""


def note(climb: Climb, e: Expectation, limits: Limits) -> list[int]:
    """Write the E-step down and tell which of the active runs go on."""
    going = []
    objectives, likelihoods = e.objective.tolist(), e.log_likelihood.tolist()
    for i, number in enumerate(climb.active):
        run = climb.runs[number]
        if not math.isfinite(objectives[i]) or (run.history and objectives[i] < run.history[0] - abs(run.history[0]) - 1.0):
            continue  # far below its start: stays where it was; judged by the caller
        rise = objectives[i] - run.objective
        run.theta = {n: v[i] for n, v in climb.theta.items()}
        run.objective, run.log_likelihood = objectives[i], likelihoods[i]
        run.history.append(objectives[i])
        run.likelihoods.append(likelihoods[i])
        if limits.callback is not None:
            limits.callback(climb.iteration, objectives[i], {n: v.cpu() for n, v in run.theta.items()})
        run.converged = abs(rise) < limits.tol * limits.rows or not climb.theta
        if not run.converged:
            going.append(i)
    limits.tick(climb.iteration, max(r.objective for r in climb.runs), len(going))
    return going


def some_runs(e: Expectation, which: list[int]) -> Expectation:
    """The E-step of some of the runs."""
    stats = {t: {k: v[which] for k, v in s.items()} for t, s in e.stats.items()}
    return Expectation(e.objective[which], e.log_likelihood[which], stats, e.slots, e.parts)


# -- blocks of rows ------------------------------------------------------------------------------------------------------


def row_blocks(kernel: MixtureKernel, size: int, runs: int) -> list[list[slice]]:
    """Blocks of `size` rows, each a list of what the kernel takes at once; every rank has a share of every block."""
    if kernel.ranks.shares_rows:
        count = -(-kernel.all_rows // size)
        edges = [kernel.rows * c // count for c in range(count + 1)]
        return [kernel.blocks(runs, a, b) for a, b in pairwise(edges)]
    return [kernel.blocks(runs, a, a + size) for a in range(0, kernel.rows, size)]


def incremental(engine: Enumeration, climb: Climb, limits: Limits, size: int) -> str:
    """Neal and Hinton's incremental EM over blocks of `size` rows; ends with the exact objective of the answer."""
    kernel = engine.mixture
    assert kernel is not None
    blocks = row_blocks(kernel, size, len(climb.active))
    while climb.iteration < limits.max_iter and climb.active:
        first = "S" not in climb.extra
        for c, rows in enumerate(blocks):
            slots, _ = slots_now(engine.joint, engine.plan, climb.theta, engine.parts)
            W, _ = kernel.weights(slots, len(climb.active))
            S, likelihood = kernel.sweep(W, rows)
            visit(climb, c, len(blocks), S, likelihood - (S * W).sum((1, 2)))
            nothing = S.new_zeros(len(S))
            total = climb.extra["S"].sum(0)
            e = kernel.expectation(total, nothing, nothing, slots, engine.parts)
            climb.theta = maximised(engine, climb.theta, e)
        e = energy(engine, kernel, climb)
        if first:  # the sums of the first pass come from starts that moved under it
            for run in climb.runs:
                run.objective = -math.inf
        going = note(climb, e, limits)
        climb.iteration += 1
        if len(going) < len(climb.active):
            climb.keep(going)
            climb.extra = {n: v[:, going] for n, v in climb.extra.items()}
        if going and limits.over:
            return "the budget is used up: the best state so far is returned"
        limits.save(climb)
    finish(engine, climb)
    return ""


def visit(climb: Climb, c: int, count: int, S: Tensor, entropy: Tensor) -> None:
    """Replace what is known of block `c`: its statistics and the entropy of its responsibilities."""
    if "S" not in climb.extra:
        climb.extra = {"S": S.new_zeros(count, *S.shape), "entropy": entropy.new_zeros(count, len(S))}
    climb.extra["S"][c] = S
    climb.extra["entropy"][c] = entropy


def energy(engine: Enumeration, kernel: MixtureKernel, climb: Climb) -> Expectation:
    """The E-step as the sums of all blocks' last visits, with the free energy (a lower bound) as its objective."""
    slots, prior = slots_now(engine.joint, engine.plan, climb.theta, engine.parts)
    W, both = kernel.weights(slots, len(prior))
    S = climb.extra["S"].sum(0)
    bound = (S * W).sum((1, 2)) + climb.extra["entropy"].sum(0) + both + kernel.base
    return kernel.expectation(S, bound, prior, slots, engine.parts)


def stepwise(engine: Enumeration, climb: Climb, limits: Limits, size: int, decay: float = 0.7) -> str:
    """Stepwise EM: passes over blocks of `size` rows, statistics averaged with weights (t + 2)^-decay."""
    kernel = engine.mixture
    assert kernel is not None
    blocks = row_blocks(kernel, size, len(climb.active))
    before: list[float] | None = None
    while climb.iteration < limits.max_iter:
        seen = torch.zeros(len(climb.active), dtype=engine.joint.problem.dtype)
        for rows in blocks:
            slots, _ = slots_now(engine.joint, engine.plan, climb.theta, engine.parts)
            W, _ = kernel.weights(slots, len(climb.active))
            S, likelihood = kernel.sweep(W, rows)
            seen = seen + likelihood.to(seen)
            step = climb.extra.get("step", torch.zeros(1, dtype=torch.float64, device="cpu"))
            weight = float(step + 2) ** -decay
            S = S * (kernel.all_rows / S[:, :, 0].sum(1)).reshape(-1, 1, 1)
            old = climb.extra.get("running")
            running = S if old is None else (1 - weight) * old.to(S.device) + weight * S
            climb.extra = {"running": running, "step": step + 1}
            slots, prior = slots_now(engine.joint, engine.plan, climb.theta, engine.parts)
            e = kernel.expectation(climb.extra["running"], prior, prior, slots, engine.parts)
            climb.theta = maximised(engine, climb.theta, e)
        climb.iteration += 1
        now = seen.tolist()
        for i, number in enumerate(climb.active):
            climb.runs[number].history.append(now[i])
        limits.tick(climb.iteration, max(now), len(climb.active))
        if before is not None and all(abs(a - b) < limits.tol * limits.rows for a, b in zip(now, before)):
            for run in climb.runs:
                run.converged = True
            break
        before = now
        if limits.over:
            finish(engine, climb)
            return "the budget is used up: the best state so far is returned"
        limits.save(climb)
    for i, number in enumerate(climb.active):
        climb.runs[number].theta = {n: v[i] for n, v in climb.theta.items()}
    finish(engine, climb)
    return ""


def finish(engine: Enumeration, climb: Climb) -> None:
    """Exact objective and log-likelihood of the states that the runs ended in."""
    for run in climb.runs:
        e = engine.expectation({n: v[None] for n, v in run.theta.items()})
        run.objective, run.log_likelihood = float(e.objective), float(e.log_likelihood)
        run.likelihoods.append(run.log_likelihood)
