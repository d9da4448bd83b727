"""The No-U-Turn sampler as a generator: a chain asks for a gradient by yielding a position, and many chains share one batch.

Multinomial NUTS with the generalised U-turn criterion (Hoffman and Gelman, *The No-U-Turn sampler*, JMLR 2014;
Betancourt, *A conceptual introduction to Hamiltonian Monte Carlo*, 2017, appendix A.4) and Stan's further checks between
neighbouring half-trees. Adaptation is in `adaptation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .adaptation import DualAveraging, Metric, windows
from .snapshots import Camera, Snapshot

#: Energy error beyond which a trajectory counts as diverged.
DIVERGENCE = 1000.0

#: What a chain does: it yields positions (dim,) and is sent (log density, gradient).
Chain = Generator[NDArray, tuple[float, NDArray], None]


@dataclass(frozen=True)
class Settings:
    """What all chains share; see `NUTS`."""

    warmup: int
    draws: int
    target_accept: float
    max_depth: int
    dense_mass: bool


class State(NamedTuple):
    """A point on a trajectory."""

    position: NDArray
    momentum: NDArray
    velocity: NDArray  # inverse mass times momentum
    value: float  # log density
    gradient: NDArray

    @property
    def energy(self) -> float:
        return 0.5 * float(self.momentum @ self.velocity) - self.value


class Tree(NamedTuple):
    """A stretch of trajectory."""

    first: State  # the ends, in the order of time
    last: State
    momentum: NDArray  # sum over all states
    log_weight: float  # log of the summed densities
    sample: State


class Failed(Exception):
    """No step size suits the chain; the text says in which direction it ran off."""


@dataclass
class Record:
    """What a chain has left behind.

    Attributes
    ----------
    positions
        (draws, dim), of which `kept` are filled.
    stats
        Name -> (draws,).
    position, value
        Where the chain stands, and the log density there.
    done
        Iterations, warm-up included.
    seconds
        Of the warm-up and of everything, where the chain ran on its own.
    camera
        Takes the snapshots of a checkpoint.
    """

    settings: Settings
    position: NDArray
    value: float
    done: int = 0
    step: float = 1.0
    divergences: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    camera: Camera = field(default_factory=Camera)
    positions: NDArray = field(init=False)
    stats: dict[str, NDArray] = field(init=False)

    def __post_init__(self) -> None:
        count = self.settings.draws
        self.positions = np.empty((count, len(self.position)))
        kinds = {"diverging": bool, "tree_depth": np.int64, "n_steps": np.int64}
        names = ("diverging", "energy", "tree_depth", "n_steps", "acceptance_rate", "step_size", "lp")
        self.stats = {name: np.zeros(count, kinds.get(name, np.float64)) for name in names}

    def restore(self, shot: Snapshot) -> None:
        """Go back to where a snapshot was taken."""
        for name in ("done", "divergences", "step", "value"):
            setattr(self, name, shot.numbers[name])
        self.position = shot.arrays["position"]
        self.positions[: self.kept] = shot.arrays["positions"]
        for name, values in self.stats.items():
            values[: self.kept] = shot.arrays[f"stats/{name}"]
        self.camera.latest = shot

    @property
    def kept(self) -> int:
        """Draws after warm-up."""
        return max(0, self.done - self.settings.warmup)

    def keep(self, state: State, walk: Walk) -> None:
        """Note the end of an iteration."""
        if self.done >= self.settings.warmup:
            row = self.done - self.settings.warmup
            self.positions[row] = state.position
            found = {
                "diverging": walk.diverging,
                "energy": state.energy,
                "tree_depth": walk.depth,
                "n_steps": walk.steps,
                "acceptance_rate": walk.acceptance,
                "step_size": walk.step,
                "lp": state.value,
            }
            for name, value in found.items():
                self.stats[name][row] = value
            self.divergences += walk.diverging
        self.position, self.value, self.step = state.position, state.value, walk.step
        self.done += 1


@dataclass
class Walk:
    """One trajectory on its way: its settings and what was seen of it."""

    metric: Metric
    step: float
    energy: float  # at the start
    rng: np.random.Generator
    steps: int = 0
    depth: int = 0
    diverging: bool = False
    accepted: float = 0.0

    @property
    def acceptance(self) -> float:
        """Mean Metropolis acceptance over the states of the trajectory."""
        return self.accepted / max(1, self.steps)


def chain(position: NDArray, gradient: NDArray, rng: np.random.Generator, record: Record) -> Chain:
    """Warm up, then draw, from the record's start or its last snapshot; everything worth keeping goes to `record`.

    Raises
    ------
    Failed
        No step size gives a bearable energy error.
    """
    settings, shot = record.settings, record.camera.latest
    metric = Metric(len(position), settings.dense_mass)
    state = State(position, np.zeros_like(position), np.zeros_like(position), record.value, gradient)
    begin, ends = windows(settings.warmup)
    if shot is None:
        step = yield from reasonable_step(state, 1.0, metric, rng)
        averaging = DualAveraging(step, settings.target_accept)
    else:
        metric.restore(shot.arrays, shot.numbers["seen"])
        averaging = DualAveraging.restored(shot.arrays["adaptation"])
    for i in range(record.done, settings.warmup + settings.draws):
        warm = i >= settings.warmup
        step = averaging.final if warm else averaging.step
        state, walk = yield from transition(state, step, metric, settings.max_depth, rng)
        record.keep(state, walk)
        if not warm:
            averaging.learn(walk.acceptance)
            if ends and begin <= i < ends[-1]:
                metric.see(state.position)
            if i + 1 in ends:
                metric.renew()
                step = yield from reasonable_step(state, averaging.step, metric, rng)
                averaging = DualAveraging(step, settings.target_accept)
        if record.camera.due and i + 1 < settings.warmup + settings.draws:
            record.camera.keep(record, rng, taken(state, metric, averaging, record))


def taken(state: State, metric: Metric, averaging: DualAveraging, record: Record) -> Snapshot:
    """A chain between two iterations."""
    arrays = {"position": state.position.copy(), "gradient": state.gradient.copy(), "adaptation": averaging.numbers}
    numbers = {"value": float(state.value), "done": record.done, "seen": metric.seen, "step": float(record.step)}
    return Snapshot({**arrays, **metric.arrays}, numbers)


def reasonable_step(
    state: State, step: float, metric: Metric, rng: np.random.Generator
) -> Generator[NDArray, tuple[float, NDArray], float]:
    """Double or halve the step until one leapfrog step is accepted with probability 0.8 (JMLR 2014, algorithm 4)."""
    direction = 0
    while True:
        start = refreshed(state, metric, rng)
        end = yield from leapfrog(start, step, metric)
        change = start.energy - end.energy
        better = change > math.log(0.8)  # NaN is not
        if direction == 0:
            direction = 1 if better else -1
        elif better != (direction == 1):
            return step
        step *= 2.0**direction
        if step > 1e7:
            raise Failed("the log density hardly changes over any distance: the posterior is improper")
        if step < 1e-12:
            raise Failed("the log density has no finite value or gradient next to the start")


def refreshed(state: State, metric: Metric, rng: np.random.Generator) -> State:
    """The same place with a new momentum."""
    momentum = metric.momentum(rng)
    return state._replace(momentum=momentum, velocity=metric.velocity(momentum))


def leapfrog(start: State, step: float, metric: Metric) -> Generator[NDArray, tuple[float, NDArray], State]:
    """One step of the leapfrog integrator; a negative step goes back in time."""
    momentum = start.momentum + 0.5 * step * start.gradient
    position = start.position + step * metric.velocity(momentum)
    value, gradient = yield position
    momentum = momentum + 0.5 * step * gradient
    return State(position, momentum, metric.velocity(momentum), value, gradient)


def transition(
    state: State, step: float, metric: Metric, max_depth: int, rng: np.random.Generator
) -> Generator[NDArray, tuple[float, NDArray], tuple[State, Walk]]:
    """Double a trajectory until it turns back, and draw the next state from it."""
    start = refreshed(state, metric, rng)
    walk = Walk(metric, step, start.energy, rng)
    tree = Tree(start, start, start.momentum, 0.0, start)
    while walk.depth < max_depth:
        forward = rng.random() < 0.5
        half = yield from subtree(tree.last if forward else tree.first, step if forward else -step, walk)
        if half is None:
            break
        walk.depth += 1
        # The new half is preferred to the old one: both leave the target as it is, this one moves farther.
        sample = half.sample if math.log1p(-rng.random()) < half.log_weight - tree.log_weight else tree.sample
        before, after = (tree, half) if forward else (half, tree)
        turned = turning(before, after)
        tree = joined(before, after, sample)
        if turned:
            break
    return tree.sample, walk


def subtree(edge: State, step: float, walk: Walk) -> Generator[NDArray, tuple[float, NDArray], Tree | None]:
    """As many steps beyond `edge` as the trajectory has, or None where a part of them turns back or diverges.

    Half-trees are joined as the bits of a binary counter carry.
    """
    halves: list[Tree] = []
    for index in range(2**walk.depth):
        edge = yield from leapfrog(edge, step, walk.metric)
        change = walk.energy - edge.energy
        walk.steps += 1
        if not (change > -DIVERGENCE and math.isfinite(edge.gradient.sum())):
            walk.diverging = True
            return None
        walk.accepted += math.exp(min(0.0, change))
        tree = Tree(edge, edge, edge.momentum, change, edge)
        while index & 1:
            index >>= 1
            older = halves.pop()
            before, after = (older, tree) if step > 0 else (tree, older)
            if turning(before, after):
                return None
            share = tree.log_weight - np.logaddexp(older.log_weight, tree.log_weight)
            tree = joined(before, after, tree.sample if math.log1p(-walk.rng.random()) < share else older.sample)
        halves.append(tree)
    return halves[0]


def joined(before: Tree, after: Tree, sample: State) -> Tree:
    """Two neighbouring stretches as one."""
    weight = float(np.logaddexp(before.log_weight, after.log_weight))
    return Tree(before.first, after.last, before.momentum + after.momentum, weight, sample)


def turning(before: Tree, after: Tree) -> bool:
    """Whether two neighbouring stretches together, or one with the next state of the other, turn back."""
    return not (
        apart(before.first, after.last, before.momentum + after.momentum)
        and apart(before.first, after.first, before.momentum + after.first.momentum)
        and apart(before.last, after.last, before.last.momentum + after.momentum)
    )


def apart(first: State, last: State, momentum: NDArray) -> bool:
    """The generalised criterion: both ends still move along the way between them (2017, appendix A.4.2)."""
    return bool(first.velocity @ momentum > 0 and last.velocity @ momentum > 0)


def drive(
    chains: list[Chain], evaluate: Callable[[NDArray], tuple[NDArray, NDArray]], stop: Callable[[], bool]
) -> None:
    """Answer all chains from one batch (chains, dim) a round until they have ended, or `stop()` says so.

    Chains run at their own pace. The batch keeps its width to the end, so that no chain's rounding depends on another.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # far out all is infinite: such a state is never accepted
        wanted = np.stack([next(c) for c in chains])
        running = list(range(len(chains)))
        while running and not stop():
            values, gradients = evaluate(wanted)
            for i in list(running):
                try:
                    wanted[i] = chains[i].send((float(values[i]), gradients[i]))
                except StopIteration:
                    running.remove(i)
