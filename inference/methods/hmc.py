"""Hamiltonian Monte Carlo with many chains that move together and learn from each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .adaptation import DualAveraging, windows
from .base import Verdict, one_of, positive_float, positive_int
from .hamiltonian import DIVERGENCE, Failed, Record, Settings
from .movers import Ensemble, Mover, mover_for
from .nuts import BACKENDS, Run, check_init, failure
from .sampling import Watch, answer, beside_bar, potential_of, sampling_verdict, spread
from .starts import starts

if TYPE_CHECKING:
    from ..joint import LogJoint
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure
    from .backends import Backend

#: Iterations in which every chain finds the posterior's bulk on its own, at most, and their share of the warm-up.
ALONE, SHARE = 100, 0.25
#: Rounds more of them for chains that lie behind, and how far: so many times the spread of the other chains' densities.
ROUNDS, BEHIND = 6, 5.0
#: In units of the scales: first step and length, and the longest: times go up to twice that, and at pi a normal has turned.
STEP, LENGTH, LONGEST = 0.4, 1.0, 2.0
#: States over all chains and windows for every direction, from which on covariances are learned.
PLENTY = 5
#: Steps of the logarithm of the trajectory length, and the memory of its slope and of the mean that draws are made with.
RATE, SLOPES, MEMORY = 0.05, 0.9, 0.97


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo with the trajectory length that makes many chains forget where they were.

    Every iteration all chains take the same number of leapfrog steps, so that a thousand chains cost a GPU little more than
    one. Step size, scale of every direction and trajectory length are learned from all chains at once; the length climbs the
    change in the estimator of the expected square (ChEES: Hoffman, Radul and Sountsov, *An adaptive MCMC scheme for setting
    trajectory lengths in Hamiltonian Monte Carlo*, AISTATS 2021), for every gradient that it costs. Before that every chain
    finds the bulk of the posterior by a short run of NUTS of its own: no chain is ever moved to where another one is, so that
    modes stay visible.

    Parameters
    ----------
    chains
        Chains that move together, 2 to several thousand.
    warmup, draws
        Iterations of every chain that adapt, and that are kept.
    target_accept
        Harmonic mean of the acceptance probabilities that the step size is adapted to.
    max_steps
        Leapfrog steps of a trajectory, at most.
    tries, backend, init
        As for `NUTS`.
    """

    name: ClassVar[str] = "hmc"
    spreads: ClassVar[str] = "chains"

    chains: int = 16
    warmup: int = 500
    draws: int = 1000
    target_accept: float = 0.65
    max_steps: int = 500
    tries: int = 20
    backend: str = "auto"
    init: str | Mapping[str, Any] | Posterior = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        for option in ("chains", "draws", "max_steps", "tries"):
            positive_int("HMC", option, getattr(self, option))
        if self.chains < 2:
            raise ValueError("HMC(chains=1): chains learn from each other; take at least 2, or use NUTS")
        positive_int("HMC", "warmup", self.warmup, least=0)
        positive_float("HMC", "target_accept", self.target_accept, below=1.0)
        if self.target_accept == 1.0:
            raise ValueError("HMC(target_accept=1.0): target_accept must lie between 0 and 1, both excluded")
        one_of("HMC", "backend", self.backend, BACKENDS)
        check_init("HMC", self.init)

    def check(self, structure: Structure) -> Verdict:
        """Valid where NUTS is."""
        return sampling_verdict(structure)

    def run(self, problem: Problem) -> Posterior:
        """Find starts, let every chain warm up alone, then all together, and draw.

        Raises
        ------
        ValueError, DivergenceError
            As for `NUTS`.
        """
        from ..marginal import density_of_globals
        from ..meter import Meter
        from .chains import same_backend, shared_mover

        began = time.perf_counter()
        with Meter() as meter:
            joint = density_of_globals(problem)
            potential = potential_of(joint, self.backend)
            work = self.chains * (self.warmup + self.draws)
            ranks = problem.ranks
            backend = same_backend(ranks, potential, self.backend, work, problem.budget)
            mover = shared_mover(mover_for(potential, backend), ranks)
            moves = Moves(self, joint, mover, self.alone(joint, potential, backend))
            meter.mark("setup")
            total = self.warmup + self.draws
            with Watch(
                "HMC", problem, meter, began, self.warmup, total, self.chains, moves.progress, moves.told
            ) as watch:
                try:
                    moves.go((lambda: ranks.first(watch())) if ranks.several and problem.budget else watch)
                except KeyboardInterrupt:
                    if ranks.several:
                        raise
                    watch.stopped = "interrupted"
            meter.mark("run" if watch.warm else "warmup")
            positions, stats, notes = moves.gather(watch.stopped)
            facts = {"trajectory_length": moves.length, "dense_mass": moves.scale.dense}
            return answer(
                self, problem, joint, potential, backend, positions, stats, notes, facts, meter, not watch.stopped
            )

    def alone(self, joint: LogJoint, potential: Any, backend: Backend) -> tuple[list[Record], int]:
        """Every chain after a short run of NUTS of its own, and the iterations that took.

        A chain that lies far below the others goes on alone for longer, from where it is.
        """
        from .chains import all_records, mine, run_apart

        ranks, iterations = joint.problem.ranks, min(ALONE, int(SHARE * self.warmup))
        part = mine(ranks, self.chains)
        seeds, generators = spread(joint.problem.seed, self.chains)
        evaluate = backend.code.many if backend.code is not None else potential.numpy
        settings = Settings(iterations, 1, 0.8, 8, False)
        begun = starts(joint, evaluate, seeds, generators, self.init, self.tries)
        records = [Record(settings, position, value) for position, value, _ in begun]
        gradients = [gradient for _, _, gradient in begun]
        waiting = list(range(self.chains)) if iterations else []
        for _ in range(1 + ROUNDS):
            if not waiting:
                break
            here = [c for c in waiting if part.start <= c < part.stop]
            some = [records[c] for c in here]
            run = Run(potential, backend, [generators[c] for c in here], [gradients[c] for c in here], some)
            try:
                run_apart(ranks, partial(run.go, lambda: False))
            except Failed as error:
                raise failure(joint, some, error) from None
            for c, record in zip(waiting, all_records(ranks, some), strict=True):
                records[c] = record
            value = np.array([r.value for r in records])
            low, middle = np.quantile(value, [0.25, 0.5])
            waiting = np.flatnonzero(value < middle - BEHIND * (middle - low) - len(records[0].position)).tolist()
            for c in waiting:
                records[c] = Record(settings, records[c].position, records[c].value)
                gradients[c] = evaluate(records[c].position[None])[1][0]
        return records, iterations


class Scale:
    """Inverse mass L L^T: variances, or covariances where there are enough states for them.

    Parameters
    ----------
    inverse
        (dim,) or (dim, dim).
    """

    def __init__(self, inverse: NDArray) -> None:
        self.inverse = inverse
        self.dense = inverse.ndim == 2
        self.root = np.linalg.cholesky(inverse) if self.dense else np.sqrt(inverse)
        self._solved = np.linalg.inv(self.root) if self.dense else 1.0 / self.root

    def momentum(self, normal: NDArray) -> NDArray:
        """Momenta (chains, dim) from standard normal numbers."""
        return normal @ self._solved if self.dense else normal * self._solved

    def velocity(self, momentum: NDArray) -> NDArray:
        """L^T p: the velocity in units in which every direction has variance 1."""
        return momentum @ self.root if self.dense else momentum * self.root

    def unit(self, position: NDArray) -> NDArray:
        """L^-1 q: the position in these units."""
        return position @ self._solved.T if self.dense else position * self._solved


@dataclass
class Moves:
    """All chains on their way."""

    method: HMC
    joint: LogJoint
    mover: Mover
    begun: Any

    def __post_init__(self) -> None:
        method, (records, self.done_alone) = self.method, self.begun
        self.rng = np.random.default_rng([self.joint.problem.seed, 1])
        positions = np.stack([r.position for r in records])
        self.here: Ensemble = self.mover.at(positions)
        self.step = float(np.median([r.step for r in records])) if self.done_alone else 0.1
        self.scale = Scale(np.ones(positions.shape[1]))
        self.done = self.done_alone
        self.length = 4.0 * self.step
        self.divergences = 0
        chains, draws = method.chains, method.draws
        self.positions = np.empty((chains, draws, positions.shape[1]))
        kinds = {"diverging": bool, "n_steps": np.int64}
        names = ("diverging", "energy", "n_steps", "acceptance_rate", "step_size", "lp")
        self.stats = {n: np.zeros((chains, draws), kinds.get(n, np.float64)) for n in names}

    @property
    def kept(self) -> int:
        """Draws so far."""
        return max(0, self.done - self.method.warmup)

    def progress(self) -> tuple[int, int]:
        """Iterations of one chain, and of all."""
        return self.done, self.done * self.method.chains

    def told(self) -> str:
        """What stands beside the bar."""
        return beside_bar(self.divergences, self.step, self.stats["lp"][:, : self.kept])

    def go(self, watch: Callable[[], bool]) -> None:
        """To the end, or until the watch says stop."""
        method = self.method
        together = method.warmup - self.done_alone
        begin, ends = windows(together)
        averaging, climb = DualAveraging(self.step, method.target_accept), Climb(self.length)
        within = Within(*self.positions.shape[::2])
        for i in range(together):
            if watch():
                return
            self.step = averaging.step
            self.length = climb.length
            self.iteration(i, climb)
            averaging.learn(self.harmonic)
            if ends and begin <= i < ends[-1]:
                within.see(self.here.position)
            if i + 1 in ends:
                self.scale = Scale(within.inverse())
                within = Within(*self.positions.shape[::2])
                # In units of the scales, steps and lengths of a normal posterior are known: they are taken up from there.
                averaging, climb = DualAveraging(STEP, method.target_accept), Climb(LENGTH)
            self.done += 1
        self.step, self.length = averaging.final, climb.mean
        for i in range(method.draws):
            if watch():
                return
            self.iteration(together + i)
            self.done += 1

    def iteration(self, number: int, climb: Climb | None = None) -> None:
        """Move all chains once; `climb` learns from it."""
        jitter = 2.0 * van_der_corput(number + 1)
        steps = int(np.clip(np.ceil(jitter * self.length / self.step), 1, self.method.max_steps))
        start, scale = self.here, self.scale
        momentum = scale.momentum(self.rng.standard_normal(start.position.shape))
        end, final = self.mover.move(start, momentum, steps, self.step, scale.inverse)
        with np.errstate(over="ignore", invalid="ignore"):
            energy = 0.5 * (scale.velocity(momentum) ** 2).sum(1) - start.value
            change = energy - (0.5 * (scale.velocity(final) ** 2).sum(1) - end.value)
            change = np.where(np.isfinite(change) & np.isfinite(end.gradient).all(1), change, -np.inf)
        accept = np.exp(np.minimum(0.0, change))
        taken = self.rng.random(len(accept)) < accept
        diverging = ~(change > -DIVERGENCE)
        self.harmonic = float(len(accept) / (1.0 / np.maximum(accept, 1e-3)).sum())
        if climb is not None:
            found = criterion(start.position, end.position, final, accept, scale)
            longest = LONGEST if scale.dense else self.step * self.method.max_steps
            climb.learn(*found, steps * self.step, self.step, longest)
        self.here = self.mover.chosen(taken, end, start)
        if self.done >= self.method.warmup:
            row = self.done - self.method.warmup
            self.positions[:, row] = self.here.position
            self.divergences += int(diverging.sum())
            noted = {
                "diverging": diverging,
                "energy": np.where(taken, energy - change, energy),
                "n_steps": steps,
                "acceptance_rate": accept,
                "step_size": self.step,
                "lp": self.here.value,
            }
            for name, value in noted.items():
                self.stats[name][:, row] = value

    def gather(self, stopped: str) -> tuple[NDArray, dict[str, NDArray], list[str]]:
        """Positions (chains, draws, dim), statistics and notes of what was reached."""
        count = self.kept
        if not stopped:
            return self.positions, self.stats, []
        if count:
            note = f"{stopped} after {count} of {self.method.draws} draws a chain: what there is is returned"
            return self.positions[:, :count], {n: v[:, :count] for n, v in self.stats.items()}, [note]
        note = (
            f"{stopped} in iteration {self.done} of {self.method.warmup} of the warm-up: these are the places where the "
            f"chains stand, not draws from the posterior"
        )
        stats = {n: np.zeros_like(v[:, :1]) for n, v in self.stats.items()}
        stats["lp"][:, 0], stats["step_size"][:, 0] = self.here.value, self.step
        return self.here.position[:, None], stats, [note]


def van_der_corput(number: int) -> float:
    """The number's binary digits mirrored at the point: evenly spread over (0, 1) from the first on."""
    value, weight = 0.0, 0.5
    while number:
        value += weight * (number & 1)
        number >>= 1
        weight *= 0.5
    return value


def criterion(start: NDArray, end: NDArray, momentum: NDArray, accept: NDArray, scale: Scale) -> tuple[float, float]:
    """Expected squared change of the squared distance from the mean, in units of the scales, and its slope in time.

    A quarter of the former is the criterion (2021, equation 7); the slope is that of the criterion (equation 8).
    """
    usable = (accept > 1e-6) & np.isfinite(end).all(1) & np.isfinite(momentum).all(1)
    if not usable.any():
        return 0.0, 0.0
    weight = accept[usable] / accept[usable].sum()
    before, after, velocity = scale.unit(start[usable]), scale.unit(end[usable]), scale.velocity(momentum[usable])
    before = before - before.mean(0)
    after = after - weight @ after
    change = (after**2).sum(1) - (before**2).sum(1)
    return float(weight @ change**2), float(weight @ (change * (after * velocity).sum(1)))


class Climb:
    """Ascent on the logarithm of the trajectory length, towards the largest criterion for a gradient."""

    def __init__(self, length: float) -> None:
        self._log = self._mean = float(np.log(length))
        self._square = self._slope = self._cost = 0.0
        self._count = 0

    @property
    def length(self) -> float:
        """To go next."""
        return float(np.exp(self._log))

    @property
    def mean(self) -> float:
        """Geometric running mean."""
        return float(np.exp(self._mean))

    def learn(self, square: float, slope: float, time: float, step: float, longest: float) -> None:
        """One step along d log(criterion / cost) / d log(length); an iteration costs its steps and one more."""
        if not (np.isfinite(square) and np.isfinite(slope)):
            return
        self._count += 1
        self._square = SLOPES * self._square + (1 - SLOPES) * square / 4
        self._slope = SLOPES * self._slope + (1 - SLOPES) * slope * time
        self._cost = SLOPES * self._cost + (1 - SLOPES) * time / (time + step)
        cost = self._cost / (1 - SLOPES**self._count)
        gain = self._slope / max(self._square, 1e-300) - cost
        self._log = float(np.clip(self._log + RATE * np.clip(gain, -1, 1), np.log(step), np.log(longest)))
        share = max(1 - MEMORY, 1.0 / self._count)
        self._mean += share * (self._log - self._mean)


class Within:
    """Covariance of all directions within chains: chains in different modes do not widen it."""

    def __init__(self, chains: int, dim: int) -> None:
        self._states: list[NDArray] = []
        self._dim = dim

    def see(self, position: NDArray) -> None:
        """One more state of every chain."""
        self._states.append(position)

    def inverse(self) -> NDArray:
        """Variances (dim,), or covariances (dim, dim) where states are plenty; shrunk towards small variances."""
        states = np.stack(self._states, 1)  # (chains, states, dim)
        gap = (states - states.mean(1, keepdims=True)).reshape(-1, self._dim)
        count = max(1, len(gap) - len(states))
        share = count / (count + 5.0)
        floor = 1e-3 * (1.0 - share)
        variance = share * (gap**2).sum(0) / count + floor
        if count < PLENTY * self._dim:
            return variance
        return share * gap.T @ gap / count + floor * np.eye(self._dim)
