"""Draws from the posterior of any story with continuous latents, the finite ones summed out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .base import Verdict, density_objection, gradient_objection, positive_float, positive_int
from .hamiltonian import Failed, Record, Settings, chain, drive

if TYPE_CHECKING:
    from ..capture import ValueAndGrad
    from ..joint import LogJoint
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure


@dataclass(frozen=True)
class NUTS:
    """No-U-Turn sampler.

    Parameters
    ----------
    chains
        Independent chains; they share every evaluation of the gradient as one batch.
    warmup, draws
        Iterations of every chain that adapt step size and mass, and that are kept.
    target_accept
        Mean acceptance that the step size aims at; higher means smaller steps and fewer divergences.
    max_depth
        Trajectories have at most 2 ** max_depth steps.
    dense_mass
        Whether to learn all covariances of the free space instead of variances only.
    tries
        Starting points that each chain draws for itself, from the story's guide and prior and from Uniform(-2, 2) in
        free space in turn; it starts at the one of highest density.
    """

    name: ClassVar[str] = "nuts"
    chains: int = 4
    warmup: int = 500
    draws: int = 500
    target_accept: float = 0.8
    max_depth: int = 10
    dense_mass: bool = False
    tries: int = 20

    def __post_init__(self) -> None:
        for option in ("chains", "draws", "max_depth", "tries"):
            positive_int("NUTS", option, getattr(self, option))
        positive_int("NUTS", "warmup", self.warmup, least=0)
        positive_float("NUTS", "target_accept", self.target_accept, below=1.0)
        if self.target_accept == 1.0:
            raise ValueError("NUTS(target_accept=1.0): target_accept must lie between 0 and 1, both excluded")
        if not isinstance(self.dense_mass, bool):
            raise ValueError(f"NUTS(dense_mass={self.dense_mass!r}): dense_mass must be True or False")

    def check(self, structure: Structure) -> Verdict:
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
        from ..capture import constrain_many, value_and_grad
        from ..diagnostics import sampling_diagnostics, sampling_warnings
        from ..joint import LogJoint
        from ..meter import Meter
        from ..posterior import Posterior

        began = time.perf_counter()
        with Meter() as meter:
            joint = LogJoint(problem)
            potential = value_and_grad(joint)
            if potential.random:
                raise ValueError(
                    "the log density of the story differs from call to call at one and the same point: it draws random "
                    "numbers outside its sample sites (torch.randn, dropout, a plate with subsample_size); make them latent "
                    "sites or fix them, or use method='svi'"
                )
            seeds = np.random.SeedSequence(problem.seed).spawn(self.chains)
            records, chains = self.begin(joint, potential, seeds)
            meter.mark("setup")
            watch = Watch(problem, records, began, meter)
            with watch:
                try:
                    drive(chains, potential.numpy, watch)
                except KeyboardInterrupt:
                    watch.stopped = "interrupted"
                except Failed as error:
                    raise failure(joint, records, error) from None
            meter.mark("run" if watch.warm else "warmup")
            positions, stats, notes = gather(records, watch.stopped)
            flat = torch.from_numpy(positions.reshape(-1, joint.dim)).to(problem.device, problem.dtype)
            draws = {n: v.double().cpu() for n, v in constrain_many(joint, flat).items()}
            meter.mark("run")
        found = sampling_diagnostics(stats, self.max_depth)
        found["gradient"] = potential.mode + (f": {potential.reason}" if potential.reason else "")
        if potential.notice:
            found["gradient"] += f"; {potential.notice}"
        return Posterior(
            kind="samples",
            method=self,
            problem=problem,
            draws=draws,
            chains=self.chains,
            diagnostics=found,
            warnings=notes + sampling_warnings(found, stats["lp"].size),
            timings={"warmup": 0.0, **meter.timings},
            sample_stats=stats,
            converged=not watch.stopped,
        )

    def begin(
        self, joint: LogJoint, potential: ValueAndGrad, seeds: list[np.random.SeedSequence]
    ) -> tuple[list[Record], list[Any]]:
        """Every chain at the best of its own tries."""
        settings = Settings(self.warmup, self.draws, self.target_accept, self.max_depth, self.dense_mass)
        generators = [np.random.default_rng(s) for s in seeds]
        tries = np.stack([starting_points(joint, self.tries, s, g) for s, g in zip(seeds, generators, strict=True)], 1)
        values, gradients = (np.stack(found) for found in zip(*(potential.numpy(t) for t in tries), strict=True))
        usable = np.isfinite(values) & np.isfinite(gradients).all(-1)
        records, chains = [], []
        for c, rng in enumerate(generators):
            if not usable[:, c].any():
                raise no_start(joint, tries[:, c], values[:, c], gradients[:, c])
            best = int(np.where(usable[:, c], values[:, c], -math.inf).argmax())
            value = float(values[best, c])
            records.append(Record(settings, tries[best, c], value))
            chains.append(chain(tries[best, c], value, gradients[best, c], settings, rng, records[-1]))
        return records, chains


def listed(names: list[str], most: int = 4) -> str:
    """a, b, c, d, ..."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def starting_points(
    joint: LogJoint, count: int, seed: np.random.SeedSequence, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Tries of one chain, (count, dim): from the guide, the prior and Uniform(-2, 2) in turn."""
    torch.manual_seed(int(seed.generate_state(1)[0]))
    sources = [joint.prior_draw] if joint.problem.guide is None else [joint.guide_draw, joint.prior_draw]
    points = []
    for i in range(count):
        point = rng.uniform(-2.0, 2.0, joint.dim)
        if (turn := i % (len(sources) + 1)) < len(sources):
            try:
                drawn = sources[turn]()
                flat = joint.flatten(drawn).double().cpu().numpy() if drawn else point
                point = flat if np.isfinite(flat).all() else point
            except torch.linalg.LinAlgError:
                pass  # a draw of a covariance may be singular in rounding
        points.append(point)
    return np.stack(points)


class Watch:
    """Progress of all chains on one bar, the phases of the run, and its end where the budget is used up."""

    def __init__(self, problem: Problem, records: list[Record], began: float, meter: Any) -> None:
        self.records, self.meter = records, meter
        self.stopped = ""
        self.warm = False
        self.budget = problem.budget
        self._deadline = began + problem.budget if problem.budget else math.inf
        settings = records[0].settings
        self._warmup = settings.warmup
        self._bar = tqdm(
            total=len(records) * (settings.warmup + settings.draws),
            desc="NUTS",
            unit="draw",
            disable=not problem.progress,
            leave=False,
        )
        self._shown = 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._bar.close()

    def __call__(self) -> bool:
        now = time.perf_counter()
        if not self.warm and min(r.done for r in self.records) >= self._warmup:
            self.warm = True
            self.meter.mark("warmup")
        if now - self._shown > 0.1:
            self._show()
            self._shown = now
        if now > self._deadline:
            self.stopped = f"the budget of {self.budget:g} s is used up"
        return bool(self.stopped)

    def _show(self) -> None:
        if self._bar.disable:
            return
        self._bar.n = sum(r.done for r in self.records)
        self._bar.set_postfix_str(
            f"{sum(r.divergences for r in self.records)} divergences, step {np.mean([r.step for r in self.records]):.3g}",
            refresh=True,
        )


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


def no_start(joint: LogJoint, tries: NDArray, values: NDArray, gradients: NDArray) -> ValueError:
    """Why no try can be started from: an impossible observation, or a latent whose gradient is not a number."""
    what = f"none of {len(tries)} starting points has a finite density and gradient"
    points = [torch.from_numpy(t).to(joint.problem.device, joint.problem.dtype) for t in tries]
    finite = np.isfinite(values)
    if finite.any():
        bad = ~np.isfinite(gradients[finite]).all(0)
        names = [b.name for b in joint.blocks if bad[b.start : b.stop].any()]
        return ValueError(
            f"{what}: the density is finite and its gradient with respect to {listed(names)} is not a number; look for a "
            f"square root at 0, a division by 0 or 0 * inf in what depends on {names[0]}"
        )
    found = [impossible(joint, p) for p in points]
    always = [cause for cause in dict.fromkeys(found) if cause and found.count(cause) == len(found)]
    if not always:
        sites = list(dict.fromkeys(c[0] for c in found if c))
        at = f" at {listed(sites)}" if sites else ""
        return ValueError(
            f"{what}: the log density is infinite or not a number{at}; tighten the priors or standardise the data"
        )
    site, index, value = always[0]
    where = f"[{', '.join(map(str, index))}]" if index else ""
    return ValueError(
        f"{what}: site {site!r} gives its observed value {site}{where} = {value} no density under any of them; the value is "
        f"impossible under the story, correct one or the other"
    )


def impossible(joint: LogJoint, flat: torch.Tensor) -> tuple[str, tuple[int, ...], str] | None:
    """The first observed site, index and value without finite density in any state of the finite latents."""
    with torch.no_grad():
        try:
            trace, names = joint.trace(joint.constrain(flat))
            factors = joint.factors_of(trace, names)
        except (torch.linalg.LinAlgError, ValueError):
            return None
    for factor in factors:
        if joint.structure[factor.name].kind != "observed":
            continue
        plates = [d for d in factor.dims if d in factor.plates]
        states = tuple(i for i, d in enumerate(factor.dims) if d not in factor.plates)
        best = factor.value.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        best = best.amax(states) if states else best
        bad = ~best.isfinite()
        if bad.any():
            node = trace.nodes[factor.name]
            index = dict(zip(plates, bad.nonzero()[0].tolist(), strict=True))
            frames = {f.name: f.dim - node["fn"].event_dim for f in node["cond_indep_stack"] if f.vectorized}
            value, places = node["value"], {frames[p]: i for p, i in index.items() if -frames[p] <= node["value"].ndim}
            for dim, i in sorted(places.items()):
                value = value.select(dim, i if value.shape[dim] > 1 else 0).unsqueeze(dim)
            return factor.name, tuple(index.values()), described(value.squeeze())
    return None


def described(value: torch.Tensor) -> str:
    """A number, or the first few of several."""
    if value.ndim == 0:
        return f"{value.item():g}"
    shown = [f"{v:g}" for v in value.flatten()[:6].tolist()]
    return f"[{', '.join(shown)}{', ...' if value.numel() > 6 else ''}]"
