"""Draws from the posterior of any story with continuous latents, the finite ones summed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from .base import Verdict, one_of, positive_float, positive_int
from .hamiltonian import Failed, Record, Settings, chain, drive
from .sampling import Watch, answer, beside_bar, potential_of, sampling_verdict, spread
from .snapshots import EVERY, ChainFile
from .starts import WORDS, starts

if TYPE_CHECKING:
    from ..capture import ValueAndGrad
    from ..joint import LogJoint
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure
    from .backends import Backend


#: What may compute gradients and move chains.
BACKENDS = ("auto", "compiled", "graph", "eager")
#: The same, and another project's sampler.
WITH_JAX = (*BACKENDS, "jax")
#: Iterations of the warm-up for every free number, from which on all covariances are learned: of any story, and of one most of
#: whose unknowns are one multivariate normal (a latent function), where variances alone ask for many more steps.
DENSEST, WOVEN = 20, 5


@dataclass(frozen=True)
class NUTS:
    """No-U-Turn sampler.

    Parameters
    ----------
    chains
        Independent chains, side by side on the processor's cores.
    warmup, draws
        Iterations of every chain that adapt step size and mass, and that are kept.
    target_accept
        Mean acceptance that the step size aims at; higher means smaller steps and fewer divergences.
    max_depth
        Trajectories have at most 2 ** max_depth steps.
    dense_mass
        Whether to learn all covariances of the free space instead of variances only; "auto" learns them where they are
        few beside the iterations of the warm-up.
    tries
        Starting points that each chain draws for itself.
    backend
        What computes gradients and moves the chains. "compiled": machine code, built by the system's C compiler at the
        first use and kept for later runs; "graph": the captured tensor operations; "eager": the story itself. "auto" takes
        machine code where it can be had and pays. "jax": NumPyro's sampler on the graph in JAX, an independent check (needs
        the packages jax and numpyro; no progress bar, and a budget does not stop it).
    init
        Where chains begin. "tries" (or "auto"): each at its best point of those from the story's guide, its prior and
        Uniform(-2, 2) in free space in turn; "prior": each at a draw from the prior. A mapping of latents to values, one
        for all chains or (chains, ...) of them, or a `Posterior` of the same story; what it lacks comes from the prior.
    checkpoint
        A file that is kept up to date while chains run. The same fit (story, data, seed, options) goes on from it, and ends
        with the same draws to the last bit; it is removed at the end.
    """

    name: ClassVar[str] = "nuts"
    spreads: ClassVar[str] = "chains"
    chains: int = 4
    warmup: int = 1000
    draws: int = 1000
    target_accept: float = 0.8
    max_depth: int = 10
    dense_mass: bool | str = "auto"
    tries: int = 20
    backend: str = "auto"
    init: str | Mapping[str, Any] | Posterior = field(default="auto", compare=False)
    checkpoint: str | Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for option in ("chains", "draws", "max_depth", "tries"):
            positive_int("NUTS", option, getattr(self, option))
        positive_int("NUTS", "warmup", self.warmup, least=0)
        positive_float("NUTS", "target_accept", self.target_accept, below=1.0)
        if self.target_accept == 1.0:
            raise ValueError("NUTS(target_accept=1.0): target_accept must lie between 0 and 1, both excluded")
        if not isinstance(self.dense_mass, bool) and self.dense_mass != "auto":
            raise ValueError(f"NUTS(dense_mass={self.dense_mass!r}): dense_mass must be True, False or 'auto'")
        one_of("NUTS", "backend", self.backend, WITH_JAX)
        if self.backend == "jax" and self.checkpoint is not None:
            raise ValueError(
                "NUTS(backend='jax', checkpoint=...): NumPyro's chains keep no checkpoint; leave one of them out"
            )
        check_init("NUTS", self.init)

    def check(self, structure: Structure) -> Verdict:
        """Valid where the log joint is a differentiable function of continuous latents alone."""
        return sampling_verdict(structure)

    def run(self, problem: Problem) -> Posterior:
        """Find starts, warm up and draw.

        Raises
        ------
        ValueError
            No starting point has a finite density and gradient (the site and the value are named), or the log density
            is random.
        DivergenceError
            No step size suits a chain.
        """
        from ..marginal import density_of_globals
        from ..meter import Meter
        from .chains import all_records, run_apart, same_backend

        began = time.perf_counter()
        with Meter() as meter:
            joint = density_of_globals(problem)
            potential = potential_of(joint, self.backend)
            if self.backend == "jax":
                return self.run_in_jax(problem, joint, potential, meter)
            ranks = problem.ranks
            backend = same_backend(
                ranks, potential, self.backend, self.warmup + self.draws, problem.budget, self.max_depth
            )
            file = None
            if self.checkpoint is not None:
                layout = [(b.name, b.shape) for b in joint.blocks]
                file = ChainFile(Path(self.checkpoint), problem, self.chain_options, backend.name, layout)
            run = self.begin(joint, potential, backend, file)
            meter.mark("setup")
            total = self.warmup + self.draws
            with Watch("NUTS", problem, meter, began, self.warmup, total, self.chains, run.progress, run.told) as watch:
                try:
                    run_apart(ranks, lambda line: run.go(lambda: line() or watch()))
                except KeyboardInterrupt:
                    if ranks.several:
                        raise
                    watch.stopped = "interrupted"
                except Failed as error:
                    raise failure(joint, run.records, error) from None
                finally:
                    run.leave()
            meter.mark("run" if watch.warm else "warmup")
            if file is not None and ranks.every(all(r.done == self.warmup + self.draws for r in run.records)):
                file.remove()
            records, stopped = all_records(ranks, run.records), next(filter(None, ranks.gather(watch.stopped)), "")
            positions, stats, notes = gather(records, stopped)
            notes += file.state.lost[:1] if file is not None else []
            facts = {"dense_mass": records[0].settings.dense_mass}
            posterior = answer(
                self, problem, joint, potential, backend, positions, stats, notes, facts, meter, not stopped
            )
        return replace(posterior, timings=run.timings(meter.timings))

    def run_in_jax(self, problem: Problem, joint: LogJoint, potential: ValueAndGrad, meter: Any) -> Posterior:
        """By NumPyro, from the same starts."""
        from .backends import Backend
        from .jax_nuts import run_in_jax

        seeds, generators = spread(problem.seed, self.chains)
        begun = starts(joint, potential.numpy, seeds, generators, self.init, self.tries)
        meter.mark("setup")
        places = np.stack([position for position, _, _ in begun])
        positions, stats = run_in_jax(self, potential, places, self.dense(joint), problem.seed)
        meter.mark("run")
        backend = Backend("jax", "as wanted; compiling is part of the run")
        facts = {"dense_mass": self.dense(joint)}
        return answer(self, problem, joint, potential, backend, positions, stats, [], facts, meter, True)

    def dense(self, joint: LogJoint) -> bool:
        """Whether all covariances are learned: at once where most of what moves is correlated as the prior says."""
        if isinstance(self.dense_mass, bool):
            return self.dense_mass
        woven = sum(b.stop - b.start for b in joint.blocks if joint.structure[b.name].family == "MultivariateNormal")
        return (WOVEN if 2 * woven > joint.dim else DENSEST) * joint.dim <= self.warmup

    @property
    def chain_options(self) -> tuple[Any, ...]:
        """What the path of a chain depends on."""
        return (self.chains, self.warmup, self.draws, self.target_accept, self.max_depth, self.dense_mass, self.tries)

    def begin(self, joint: LogJoint, potential: ValueAndGrad, backend: Backend, file: ChainFile | None) -> Run:
        """Every chain of this rank where it starts, or where the checkpoint left it."""
        from .chains import mine

        seeds, generators = spread(joint.problem.seed, self.chains)
        settings = Settings(self.warmup, self.draws, self.target_accept, self.max_depth, self.dense(joint))
        shots = joint.problem.ranks.together(lambda: file.read(self.chains) if file is not None else None)
        if shots is None:
            evaluate = backend.code.many if backend.code is not None else potential.numpy
            begun = starts(joint, evaluate, seeds, generators, self.init, self.tries)
            records = [Record(settings, position, value) for position, value, _ in begun]
            gradients = [gradient for _, _, gradient in begun]
        else:
            records = [Record(settings, s.arrays["position"], s.numbers["value"]) for s in shots]
            gradients = [s.arrays["gradient"] for s in shots]
            for record, generator, shot in zip(records, generators, shots, strict=True):
                record.restore(shot)
                generator.bit_generator.state = shot.numbers["generator"]
        if file is not None:
            for record in records:
                record.camera.every = EVERY
        own = mine(joint.problem.ranks, self.chains)
        if file is not None:
            file.first = own.start
        return Run(potential, backend, generators[own], gradients[own], records[own], file)


def check_init(method: str, init: Any) -> None:
    """Refuse what is no start.

    Raises
    ------
    TypeError, ValueError
        It is neither a word, a mapping nor a posterior.
    """
    if isinstance(init, str):
        one_of(method, "init", init, WORDS)
    elif not isinstance(init, Mapping) and not hasattr(init, "draws"):
        raise TypeError(
            f"{method}(init=...) is a {type(init).__name__}; it must be one of {', '.join(map(repr, WORDS))}, a mapping of "
            f"latents to values, or a Posterior"
        )


@dataclass
class Run:
    """Chains at their starts, and what moves them."""

    potential: ValueAndGrad
    backend: Backend
    generators: list[np.random.Generator]
    gradients: list[NDArray]
    records: list[Record]
    file: ChainFile | None = None

    def progress(self) -> tuple[int, int]:
        """Iterations that the slowest chain and all chains together have done."""
        done = [r.done for r in self.records]
        return min(done, default=0), sum(done)

    def told(self) -> str:
        """What stands beside the bar."""
        count = min((r.kept for r in self.records), default=0)
        if not count:
            return ""
        lp = np.stack([r.stats["lp"][:count] for r in self.records])
        return beside_bar(sum(r.divergences for r in self.records), float(np.mean([r.step for r in self.records])), lp)

    def leave(self) -> None:
        """Write the checkpoint of a run that has not come to its end once more."""
        if self.file is not None and self.records:
            settings = self.records[0].settings
            if any(r.done < settings.warmup + settings.draws for r in self.records):
                self.file.write(self.records, now=True)

    def go(self, watch: Callable[[], bool]) -> None:
        """To the end, or until the watch says stop; the checkpoint is kept up to date on the way."""
        if not self.records:  # more ranks than chains
            return

        def stop() -> bool:
            if self.file is not None:
                self.file.write(self.records)
            return watch()

        if self.backend.code is not None:
            from .native import drive as drive_native

            drive_native(self.backend.code, self.records, self.gradients, self.generators, stop)
            return
        parts = zip(self.records, self.gradients, self.generators, strict=True)
        drive([chain(r.position, g, rng, r) for r, g, rng in parts], self.potential.numpy, stop)

    def timings(self, measured: dict[str, float]) -> dict[str, float]:
        """Measured seconds; chains that ran one after the other share theirs between warm-up and draws as each spent them."""
        found = {"warmup": 0.0, "run": 0.0, **measured}
        warm, total = np.sum([r.seconds for r in self.records] or [(0.0, 0.0)], 0)
        if total > 0:
            both = found["warmup"] + found["run"]
            found["warmup"] = float(both * warm / total)
            found["run"] = both - found["warmup"]
        return found


def gather(records: list[Record], stopped: str) -> tuple[NDArray, dict[str, NDArray], list[str]]:
    """Positions (chains, draws, dim) and statistics (chains, draws) of what all chains have reached, with notes."""
    count = min(r.kept for r in records)
    if not stopped:
        return np.stack([r.positions for r in records]), stacked(records, count), []
    if count:
        note = f"{stopped} after {count} of {records[0].settings.draws} draws a chain: what there is is returned"
        return np.stack([r.positions[:count] for r in records]), stacked(records, count), [note]
    done = min(r.done for r in records)
    note = (
        f"{stopped} in iteration {done} of {records[0].settings.warmup} of the warm-up: these are the places where the chains "
        f"stand, not draws from the posterior"
    )
    stats = {n: np.zeros_like(v) for n, v in stacked(records, 1).items()}
    stats["lp"][:, 0] = [r.value for r in records]
    stats["step_size"][:, 0] = [r.step for r in records]
    return np.stack([r.position[None] for r in records]), stats, [note]


def stacked(records: list[Record], count: int) -> dict[str, NDArray]:
    """The first `count` statistics of all chains, (chains, count) each."""
    return {name: np.stack([r.stats[name][:count] for r in records]) for name in records[0].stats}


def failure(joint: LogJoint, records: list[Record], error: Failed) -> Exception:
    """No step size suits: with the place where the first chain stands."""
    from ..errors import DivergenceError

    state = joint.constrain(torch.from_numpy(records[0].position).to(joint.problem.dtype))
    step = min(r.done for r in records)
    return DivergenceError(
        f"NUTS finds no step size in iteration {step}: {error}; give every latent a proper prior or standardise the data",
        state=state,
        step=step,
    )
