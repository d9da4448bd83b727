"""Hamiltonian Monte Carlo with many chains that move together and learn from each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .adaptation import DualAveraging, windows
from .backends import NUMBER, Backend, numbers_of
from .base import Verdict, one_of, positive_float, positive_int
from .hamiltonian import DIVERGENCE, Failed, Record, Settings
from .hmc_file import MoveFile
from .movers import BatchMover, Ensemble, Mover, mover_for
from .native import cores
from .nuts import BACKENDS, Run, check_init, failure
from .sampling import Watch, answer, beside_bar, potential_of, sampling_verdict, spread
from .starts import starts
from .trajectories import Climb, Scale, Within, criterion, van_der_corput

if TYPE_CHECKING:
    from ..capture import ValueAndGrad
    from ..distributed import Ranks
    from ..joint import LogJoint
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure

#: Leapfrog steps that a device is timed on.
TRIED = 5
#: Seconds of Python for every gradient that a chain asks for where chains run in lockstep but at their own pace.
ASKED = 5e-5
#: Iterations in which every chain finds the posterior's bulk on its own, at most, and their share of the warm-up.
ALONE, SHARE = 100, 0.25
#: Rounds more of them for chains that lie behind, and how far: so many times the spread of the other chains' densities.
ROUNDS, BEHIND = 6, 5.0
#: In units of the scales: first step and length, and the longest: times go up to twice that, and at pi a normal has turned.
STEP, LENGTH, LONGEST = 0.4, 1.0, 2.0


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo with the trajectory length that makes many chains forget where they were.

    Every iteration all chains take the same number of leapfrog steps, so that a thousand chains cost a GPU little more than
    one. Step size, scale of every direction and trajectory length are learned from all chains at once; the length climbs the
    change in the estimator of the expected square (ChEES: Hoffman, Radul and Sountsov, *An adaptive MCMC scheme for setting
    trajectory lengths in Hamiltonian Monte Carlo*, AISTATS 2021), for every gradient that it costs. Before that every chain
    finds the bulk of the posterior by a short run of NUTS of its own: no chain is ever moved to where another one is, so that
    modes stay visible.

    On a card a leapfrog step of all chains is one launch of a CUDA graph where it can be recorded;
    `posterior.diagnostics["leapfrog"]` says "cudagraph", or why not.

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
    checkpoint
        A file that is kept up to date while the chains move together. The same fit goes on from it, on any number of ranks,
        and ends with the same draws; it is removed at the end.
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
    checkpoint: str | Path | None = field(default=None, compare=False)

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
            file = None
            if self.checkpoint is not None:
                said, layout = replace(self, checkpoint=None, init="auto"), [(b.name, b.shape) for b in joint.blocks]
                file = MoveFile(Path(self.checkpoint), problem, said, backend.name, layout)
            kept = file.read() if file is not None else None
            begun = None if kept is not None else self.alone(joint, *self.searched_by(ranks, potential, backend))
            moves = Moves(self, joint, mover, begun, kept, file)
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
            if file is not None and watch.stopped:
                file.write(moves, now=True)
            elif file is not None:
                file.remove()
            positions, stats, notes = moves.gather(watch.stopped)
            facts: dict[str, Any] = {"trajectory_length": moves.length, "dense_mass": moves.scale.dense}
            own = getattr(mover, "own", mover)
            if isinstance(own, BatchMover):
                facts["leapfrog"] = f"{own.mode}: {own.reason}" if own.reason else own.mode
            return answer(
                self, problem, joint, potential, backend, positions, stats, notes, facts, meter, not watch.stopped
            )

    def trial(self, problem: Problem) -> Callable[[], Any]:
        """A few leapfrog steps of all chains, to be timed."""
        from ..marginal import density_of_globals
        from .backends import choose_backend

        joint = density_of_globals(problem)
        potential = potential_of(joint, self.backend)
        work = self.chains * (self.warmup + self.draws)
        mover = mover_for(potential, choose_backend(potential, self.backend, work, problem.budget))
        here = mover.at(np.stack([potential.points[c % len(potential.points)].double().cpu() for c in range(self.chains)]))
        still, scales = np.zeros_like(here.position), np.ones(here.position.shape[1])
        return lambda: mover.move(here, still, TRIED, 1e-6, scales)

    def searched_by(self, ranks: Ranks, potential: ValueAndGrad, backend: Backend) -> tuple[ValueAndGrad, Backend]:
        """What moves chains that are alone: on a card each asks for itself, so that machine code is often faster there."""
        if potential.points[0].device.type == "cpu" or self.backend not in ("auto", "compiled"):
            return potential, backend
        home = potential.at_home()
        if home is potential or NUMBER * numbers_of(home) > ASKED * cores():
            return potential, backend
        from .chains import same_backend

        found = same_backend(ranks, home, "auto", self.chains * ALONE, None)
        return (home, found) if found.code is not None else (potential, backend)

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
                run_apart(ranks, run.go)
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


@dataclass
class Moves:
    """All chains on their way."""

    method: HMC
    joint: LogJoint
    mover: Mover
    begun: Any
    resumed: tuple[dict[str, NDArray], dict[str, Any]] | None = None
    file: MoveFile | None = None

    def __post_init__(self) -> None:
        method = self.method
        self.rng = np.random.default_rng([self.joint.problem.seed, 1])
        chains, draws, dim = method.chains, method.draws, self.joint.dim
        self.positions = np.empty((chains, draws, dim))
        kinds = {"diverging": bool, "n_steps": np.int64}
        names = ("diverging", "energy", "n_steps", "acceptance_rate", "step_size", "lp")
        self.stats = {n: np.zeros((chains, draws), kinds.get(n, np.float64)) for n in names}
        self.within = Within(chains, dim)
        if self.resumed is not None:
            self.restore(*self.resumed)
            return
        records, self.done_alone = self.begun
        self.here: Ensemble = self.mover.at(np.stack([r.position for r in records]))
        self.step = float(np.median([r.step for r in records])) if self.done_alone else 0.1
        self.scale = Scale(np.ones(dim))
        self.done = self.done_alone
        self.length = 4.0 * self.step
        self.divergences = 0
        self.averaging, self.climb = DualAveraging(self.step, method.target_accept), Climb(self.length)

    def snapshot(self) -> tuple[dict[str, NDArray], dict[str, Any]]:
        """Where all chains stand between two iterations, and what they have learned: enough to go on to the same bits."""
        kept = self.kept
        arrays = {"position": self.here.position, "value": self.here.value, "gradient": self.here.gradient}
        arrays |= {"inverse": self.scale.inverse, "averaging": self.averaging.numbers, "climb": self.climb.numbers}
        arrays |= {"within": np.array(self.within.states).reshape(-1, *self.here.position.shape)}
        arrays |= {"positions": self.positions[:, :kept], **{f"stats/{n}": v[:, :kept] for n, v in self.stats.items()}}
        numbers = {n: getattr(self, n) for n in ("done", "done_alone", "step", "length", "divergences")}
        return arrays, {**numbers, "generator": self.rng.bit_generator.state}

    def restore(self, arrays: dict[str, NDArray], numbers: dict[str, Any]) -> None:
        """Where a snapshot was taken."""
        for name in ("done", "done_alone", "step", "length", "divergences"):
            setattr(self, name, numbers[name])
        self.rng.bit_generator.state = numbers["generator"]
        self.here = Ensemble(arrays["position"], arrays["value"], arrays["gradient"])
        self.scale = Scale(arrays["inverse"])
        self.averaging, self.climb = DualAveraging.restored(arrays["averaging"]), Climb.restored(arrays["climb"])
        self.within.states = list(arrays["within"])
        kept = self.kept
        self.positions[:, :kept] = arrays["positions"]
        for name, table in self.stats.items():
            table[:, :kept] = arrays[f"stats/{name}"]

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
        for i in range(self.done - self.done_alone, together):
            if self.stops(watch):
                return
            self.step = self.averaging.step
            self.length = self.climb.length
            self.iteration(i, self.climb)
            self.averaging.learn(self.harmonic)
            if ends and begin <= i < ends[-1]:
                self.within.see(self.here.position)
            if i + 1 in ends:
                self.scale = Scale(self.within.inverse())
                self.within = Within(*self.positions.shape[::2])
                # In units of the scales, steps and lengths of a normal posterior are known: they are taken up from there.
                self.averaging, self.climb = DualAveraging(STEP, method.target_accept), Climb(LENGTH)
            self.done += 1
        self.step, self.length = self.averaging.final, self.climb.mean
        for i in range(self.kept, method.draws):
            if self.stops(watch):
                return
            self.iteration(together + i)
            self.done += 1

    def stops(self, watch: Callable[[], bool]) -> bool:
        """Keep where the chains stand, and ask whether to go on."""
        if self.file is not None:
            self.file.write(self)
        return watch()

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
