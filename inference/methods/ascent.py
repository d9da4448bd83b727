"""Climb a noisy objective: Adam whose step size falls whenever the objective stops rising, until falling no longer helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DivergenceError
from ..problem import Problem
from .cuda_graphs import GraphedAdam, set_rate

if TYPE_CHECKING:
    from .holdout import Holdout

Leaves = dict[str, Tensor]

#: The step size is multiplied by this where the objective has stopped rising.
FALL = 0.3
#: Shares of all steps after which the step size falls in any case, so that the last steps are small ones.
FORCED = (0.6, 0.75, 0.87)
#: Nats: in noise that hides a larger rise the step size falls at the forced steps only.
HIDDEN = 0.25
#: Nats of a rise over the last tenth of a schedule that do not matter.
SETTLED = 0.05
#: Gradients longer than this many times their running mean are cut back: one wild draw must not undo the rest.
CLIP = 10.0
#: Share of the steps in which a "one_cycle" step size rises.
ONE_CYCLE = 0.3
#: Memory of the averaged iterate, in steps.
MEMORY = 50
#: Steps between two looks of the average at the iterate.
STRIDE = 5


class Target(Protocol):
    """Something whose ELBO can be climbed."""

    problem: Problem

    def start(self) -> Leaves:
        """Parameters at a new start."""
        ...

    def whole_norm(self, norm: Tensor, gradients: Leaves) -> Tensor:
        """Length of the gradient (), of which several ranks may hold parts."""
        ...

    def objective(self, leaves: Leaves) -> tuple[Tensor, Leaves]:
        """An estimate of the ELBO (), and of its gradient."""
        ...

    def rate(self, name: str) -> float:
        """Step size of one parameter relative to the others."""
        ...

    def values(self, leaves: Leaves) -> dict[str, Tensor]:
        """Sites and parameters in their own space."""
        ...

    def outside(self, leaves: Leaves) -> str | None:
        """A parameter that is not finite or not in its range."""
        ...

    def blame(self, leaves: Leaves, gradients: Leaves) -> tuple[str | None, str]:
        """The site at fault where value or gradient is not finite, and a sentence."""
        ...


@dataclass
class Ascent:
    """One climb, which can be taken up again.

    Attributes
    ----------
    history
        Estimate of the objective at every step.
    converged
        Whether smaller steps have stopped helping.
    rising
        Whether the objective still rose, beyond its noise, when the steps ended.
    schedule
        "adaptive", or what `scheduled` knows.
    clip
        Longest gradient, or None.
    decay
        Of an average of the parameters that is the answer in the end, or None.
    holdout
        Rows that say when to stop, or None.
    slope, noise
        Its rise a step, and the smallest rise that could be told from noise.
    """

    target: Target
    leaves: Leaves
    lr: float
    steps: int
    tol: float
    patience: int
    history: list[float] = field(default_factory=list)
    converged: bool = False
    rising: bool = True
    slope: float = math.nan
    noise: float = math.nan
    factor: float = 1.0
    schedule: str = "adaptive"
    clip: float | None = None
    decay: float | None = None
    holdout: Holdout | None = None

    def __post_init__(self) -> None:
        self.names = list(self.leaves)
        self.parameters = [self.leaves[n] for n in self.names]
        rates = [self.lr * self.target.rate(n) for n in self.names]
        self.rates = sorted(set(rates))
        groups = [
            {"params": [p for p, own in zip(self.parameters, rates) if own == rate], "lr": rate} for rate in self.rates
        ]  # one a rate, so that one kernel steps many parameters
        fused = all(p.is_floating_point() for p in self.parameters)
        recorded = getattr(self.target, "mode", "") == "cudagraph" and fused
        kind: Any = GraphedAdam if recorded else partial(torch.optim.Adam, fused=fused)
        self.optimiser = kind(groups, betas=(0.9, 0.99), maximize=True)
        self.before = [p.clone() for p in self.parameters]
        self.average = [p.clone() for p in self.parameters]
        self.length = math.nan
        self.phase = 0  # first step of the phase
        self.level: NDArray | None = None
        self.stalls = 0

    def run(self, until: int, deadline: float = math.inf, watch: Callable[[float, float], None] | None = None) -> None:
        """Go on until `until` steps have been made, or convergence, or the deadline; `watch` is called after each.

        Raises
        ------
        DivergenceError
            The objective or its gradient is not finite; the last finite state is attached.
        """
        ranks = self.target.problem.ranks
        while len(self.history) < until and not self.converged and ranks.before(deadline):
            self.step()
            if self.schedule == "adaptive":
                self.adapt()
            if self.holdout is not None and len(self.history) % self.holdout.every == 0:
                self.converged |= self.holdout.look(len(self.history), self.current())
            if watch is not None:
                watch(self.history[-1], self.lr * self.factor)

    def adapt(self) -> None:
        """Make smaller steps where the objective has stopped rising."""
        least, done = max(20, self.steps // 20), len(self.history)
        if not getattr(self.target, "settled", True):  # an objective that moves says nothing by its rise
            self.phase = done
            return
        if done - self.phase >= least and (done - self.phase) % (least // 2) == 0:
            self.judge()
        forced = any(done == int(f * self.steps) for f in FORCED) and self.factor > FALL**5
        if forced and done - self.phase >= 10 and not self.converged:
            self.fall()

    def step(self) -> None:
        """One step of Adam."""
        try:
            value, gradients = self.target.objective(self.leaves)
        except (ValueError, RuntimeError) as error:
            self.failed(error)
            raise
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values()))))
            norm = self.target.whole_norm(norm, gradients)
            number, length = torch.stack([value.to(norm.dtype), norm]).tolist()
            if not (math.isfinite(number) and math.isfinite(length)):
                self.diverged(number, gradients)
            limit = math.inf if math.isnan(self.length) else CLIP * self.length
            limit = limit if self.clip is None else min(limit, self.clip)
            share = min(1.0, limit / length) if length > 0 else 1.0
            self.length = length if math.isnan(self.length) else 0.95 * self.length + 0.05 * share * length
            for name, parameter in zip(self.names, self.parameters):
                parameter.grad = gradients[name] if share == 1.0 else gradients[name] * share
            torch._foreach_copy_(self.before, self.parameters)
            share_of_rate = scheduled(self.schedule, len(self.history), self.steps) * self.factor
            for group, rate in zip(self.optimiser.param_groups, self.rates):
                set_rate(group, rate * share_of_rate)
            self.optimiser.step()
            fresh = len(self.history) == self.phase
            if self.decay is not None:
                # Early steps count for less than a long memory would give them (the ramp of TensorFlow's moving averages).
                memory = min(self.decay, (1 + len(self.history)) / (10 + len(self.history)))
                torch._foreach_lerp_(self.average, self.parameters, 1.0 - memory)
            elif fresh or len(self.history) % STRIDE == 0:  # reading all parameters costs as much as a small step
                torch._foreach_lerp_(self.average, self.parameters, 1.0 if fresh else STRIDE / MEMORY)
        self.history.append(number)

    def judge(self) -> None:
        """Has the phase stopped rising, and was it higher than the one before?"""
        values = np.array(self.history[self.phase :])
        third = len(values) // 3
        middle, last = values[third : 2 * third], values[2 * third :]
        rise, noise = difference(last, middle)
        self.slope = rise / max(1, (len(middle) + len(last)) / 2)
        self.rising = rise > max(2 * noise, self.tolerance(last))
        self.noise = 2 * noise
        hidden = self.noise > max(HIDDEN, self.tolerance(last))
        if self.rising or hidden:
            return
        if self.level is not None:
            gain, noise = difference(last, self.level)
            helped = gain > max(2 * noise, self.tolerance(last))
            self.stalls = 0 if helped else self.stalls + 1
            self.converged = self.stalls >= self.patience
        self.level = last
        if not self.converged:
            if self.decay is None:
                torch._foreach_copy_(self.parameters, self.average)
            self.fall()

    def conclude(self) -> None:
        """Whether the last steps still rose."""
        # A schedule has no phases: its first steps say nothing about its end.
        begin = self.phase if self.schedule == "adaptive" else int(0.8 * len(self.history))
        values = np.array(self.history[begin:])
        if not self.converged and len(values) >= 20:
            half = len(values) // 2
            rise, noise = difference(values[half:], values[:half])
            self.slope = rise / half
            self.noise = 2 * noise
            least = (
                0.0 if self.schedule == "adaptive" else SETTLED
            )  # what shrinking steps gain at their end is no climb
            self.rising = rise > max(self.noise, self.tolerance(values[half:]), least)

    def tolerance(self, values: NDArray) -> float:
        return self.tol * (1.0 + abs(float(values.mean())))

    def fall(self) -> None:
        """Smaller steps from here on."""
        self.factor *= FALL
        self.phase = len(self.history)

    def best(self) -> Leaves:
        """The best state on the rows held out; else the average, where one was asked for or the climb has levelled off."""
        if self.holdout is not None and self.holdout.best is not None:
            return dict(self.holdout.best)
        levelled = not self.rising and len(self.history) - self.phase >= 10
        chosen = self.average if levelled or self.decay is not None else self.parameters
        return {n: p.detach().clone() for n, p in zip(self.names, chosen)}

    def current(self) -> Leaves:
        """Where the climb stands: its average, where one was asked for."""
        return dict(zip(self.names, self.parameters if self.decay is None else self.average))

    def recent(self) -> float:
        """Mean objective of the last steps."""
        return float(np.mean(self.history[-max(1, len(self.history) // 4) :])) if self.history else -math.inf

    def failed(self, error: Exception) -> None:
        """Where parameters have left their range the story's error is a divergence; else it is the story's own."""
        name = self.target.outside(self.leaves)
        if name is not None and self.history:
            text = f"parameter {name!r} left its range and the story failed ({type(error).__name__})"
            raise self.error(name, text) from error

    def diverged(self, value: float, gradients: Leaves) -> None:
        """Stop, naming what went wrong first."""
        site, text = self.target.blame(self.leaves, gradients)
        what = (
            f"the ELBO is {value}"
            if not math.isfinite(value)
            else f"the ELBO is {value:.6g} but its gradient is not finite"
        )
        raise self.error(site, f"{what}; {text}")

    def error(self, site: str | None, text: str) -> DivergenceError:
        """With the last finite state."""
        last = dict(zip(self.names, self.before))
        finite = all(bool(v.isfinite().all()) for v in last.values())
        state: dict[str, Any] = self.target.values(last) if finite else {}
        if not all(bool(v.isfinite().all()) for v in state.values()):
            state = last
        return DivergenceError(
            f"SVI left the finite numbers at step {len(self.history)}: {text}. The last finite state is attached; "
            f"lower lr (it was {self.lr:g}), or standardise the data",
            state=state,
            step=len(self.history),
            site=site,
        )


def scheduled(schedule: str, step: int, steps: int) -> float:
    """Share of the full step size at a step: 20 steps of warming up, then what the schedule says.

    "cosine" falls to zero along half a cosine (Loshchilov and Hutter, *SGDR*, ICLR 2017); "one_cycle" rises for 30 % of the
    steps from a 25th of the full size and falls to zero (Smith and Topin, *Super-convergence*, 2019); "constant" stays, and
    so does "adaptive", whose falls are decided elsewhere.
    """
    done = min(1.0, step / max(1, steps))
    if schedule == "one_cycle":
        if done < ONE_CYCLE:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / ONE_CYCLE))
        return 0.5 * (1 + math.cos(math.pi * (done - ONE_CYCLE) / (1 - ONE_CYCLE)))
    warm = min(1.0, (step + 1) / 20)
    return warm * 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else warm


def difference(a: NDArray, b: NDArray) -> tuple[float, float]:
    """Difference of two means and its standard error."""
    return float(a.mean() - b.mean()), math.sqrt(a.var() / len(a) + b.var() / len(b))
