"""Stochastic variational inference: a tractable distribution is fitted to the posterior by climbing the ELBO.

Derived guides are Gaussians in unconstrained space (Kucukelbir et al., *Automatic differentiation variational inference*,
JMLR 2017); a story's own guide runs beside its model. k-hat tells how far the answer can be trusted (Yao, Vehtari, Simpson
and Gelman, *Yes, but did it work?*, ICML 2018).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from .base import Verdict, density_objection, gradient_objection, one_of, positive_float, positive_int
from .climb_file import ClimbFile
from .climbs import INTERRUPTED, SPENT, Climbs
from .cuda_graphs import refuse
from .encoders import Amortised
from .holdout import split
from .tightened import OBJECTIVES, check_objective
from .weighted import check_beta

if TYPE_CHECKING:
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure
    from .ascent import Leaves

GUIDES = ("auto", "story", "mean_field", "low_rank", "full_rank", "flow")
SCHEDULES = ("auto", "adaptive", "constant", "cosine", "one_cycle")
MODES = ("auto", "eager", "graph", "inductor", "cudagraph")
#: Draws a step and starts where no networks are learned; and, where they are, rows from which on batches are taken, and theirs.
PARTICLES, STARTS, MANY, BATCH = 8, 3, 1024, 256
#: Rows of a batch where all of them could not be had at once.
BATCH_ELSEWHERE = 1024
#: Unknowns up to which "auto" affords a full covariance.
FULL_RANK = 50
#: Bytes that draws of latents may take; with a latent a row there are fewer draws.
DRAW_BYTES = 200e6
#: Draws of all rows together where rows share no latent: each row speaks for itself, and new ones are asked for by `local`.
ROW_DRAWS = 200_000
#: Effective share of the draws above which importance weights count as equal.
EQUAL_WEIGHTS = 0.99
#: Draws of a block of the importance-weighted bound.
BLOCK = 50
#: Rows of which a bad k-hat is put down to chance.
BAD_ROWS = 0.1


@dataclass(frozen=True)
class SVI:
    """Stochastic variational inference.

    Parameters
    ----------
    guide
        "story" (the story's own), or a Gaussian in unconstrained space: "mean_field", "low_rank" (rank sqrt of the
        unknowns), "full_rank"; "flow", a full-rank Gaussian bent by autoregressive networks; or `Amortised(...)`, a network
        that reads rows. "auto" takes the story's guide where there is one, else full rank up to 50 unknowns, else mean
        field.
    steps, lr
        Most steps of Adam, and its first step size (a quarter of it for networks); it falls whenever the ELBO stops rising.
    batch_size
        Rows a step; None takes all, and so does "auto", except for networks of 1,024 rows or more: 256; and for tables of
        more than four million numbers, on disk or in memory: 1,024.
    particles
        Draws of the guide in one step; None: 8, or 1 for networks.
    starts
        Short runs from different starts, the best of which goes on; None: 3, or 1 for networks.
    tol
        The ELBO has stopped rising when it rises by less than two standard errors, or by less than `tol` of its size.
    patience
        Falls of the step size without a gain before the run has converged.
    draws
        Draws of the fitted guide; fewer where rows share no latent and there are many of them: `local` draws for rows.
    mode
        How a step runs: "eager" (the Pyro program), "graph" (recorded once), "inductor" (the graph compiled; needs a C++
        compiler), "cudagraph" (on a card: the graph and Adam launched by one call each), or "auto": a graph where it agrees
        with the program, compiled where a long run pays for it, on a card a CUDA graph. What ran, and why nothing faster did,
        is in `posterior.diagnostics` under "mode" and "reason".
    schedule
        Step size: "adaptive" (falls when the ELBO stops rising, and may end the run), or over all `steps` "constant",
        "cosine" (to zero) or "one_cycle" (up for 30 % of the steps, then to zero). "auto": "cosine" for flows, whose climb is
        long and slow, else "adaptive".
    clip
        Longer gradients are cut to this norm; None cuts only what is ten times as long as usual.
    beta
        Weight of the divergences between a story's guide and its priors: a number (1: the ELBO), or (first, last, steps) for
        one that moves in a line and then stays. The answer's own ELBO is always that of beta 1.
    free_bits
        Nats of divergence, by dimension of a latent in the rows, that cost nothing: a remedy for units that collapse.
    divergence
        Of a story's own guide: by "formula" where torch knows one, or from the "draws" themselves. "auto" takes formulas where
        networks guess, and draws elsewhere, whose noise goes to zero as the guide becomes the posterior.
    objective
        For a story's own guide of latents in the rows: "elbo"; "iwae", `particles` draws averaged inside the logarithm;
        "renyi", their (1 - `alpha`)-th powers. `history` then holds that bound; the answer's ELBO is still the ELBO.
    alpha
        Of the Renyi bound: 0 is "iwae", 1 the ELBO.
    gradient
        Of a story's own guide: "total", or "path", without the slope of log q in its parameters: noise that goes to zero as
        the guide becomes the posterior ("sticking the landing"; under "iwae" the doubly reparameterised estimator). It
        takes divergences from draws.
    average
        Memory of a moving average of the parameters, such as 0.999, that is the answer instead of the last ones (Polyak and
        Juditsky, 1992); None takes one where the climb has levelled off.
    validation
        Share of the rows that are held out: the answer is the state of highest bound on them, and the climb ends when that
        has not risen in ten looks, of which there are a hundred. For guides that read rows.
    checkpoint
        A file that keeps the climbs every few seconds. The same call goes on from there, to the same bits; the file is
        removed at the end.
    """

    name: ClassVar[str] = "svi"
    spreads: ClassVar[str] = "rows"
    guide: str | Amortised = "auto"
    steps: int = 3000
    lr: float = 0.02
    batch_size: int | str | None = "auto"
    particles: int | None = None
    starts: int | None = None
    tol: float = 1e-5
    patience: int = 2
    draws: int = 1000
    mode: str = "auto"
    schedule: str = "auto"
    clip: float | None = None
    beta: float | tuple[float, float, int] = 1.0
    free_bits: float = 0.0
    divergence: str = "auto"
    objective: str = "elbo"
    alpha: float = 0.5
    gradient: str = "total"
    average: float | None = None
    validation: float | None = None
    checkpoint: str | Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.guide, Amortised):
            one_of("SVI", "guide", self.guide, GUIDES)
        one_of("SVI", "mode", self.mode, MODES)
        one_of("SVI", "schedule", self.schedule, SCHEDULES)
        if self.clip is not None:
            positive_float("SVI", "clip", self.clip)
        check_beta(self.beta)
        one_of("SVI", "divergence", self.divergence, ("auto", "formula", "draws"))
        one_of("SVI", "objective", self.objective, OBJECTIVES)
        one_of("SVI", "gradient", self.gradient, ("total", "path"))
        if self.gradient == "path" and (self.objective == "renyi" or self.free_bits or self.divergence == "formula"):
            raise ValueError(
                "SVI(gradient='path') follows draws of log p - log q: it goes with objective 'elbo' or 'iwae', and not with "
                "free_bits or divergence='formula'"
            )
        check_objective(
            self.objective, self.alpha, self.particles or PARTICLES, self.beta == 1.0 and not self.free_bits
        )
        positive_float("SVI", "free_bits", self.free_bits, zero=True)
        for name in ("steps", "particles", "starts", "patience", "draws"):
            if getattr(self, name) is not None or name not in ("particles", "starts"):
                positive_int("SVI", name, getattr(self, name))
        for name in ("average", "validation"):
            share = getattr(self, name)
            if share is not None and not (isinstance(share, float) and 0 < share < 1):
                raise ValueError(f"SVI({name}={share!r}): {name} must be a number between 0 and 1, or None")
        if self.batch_size is not None and self.batch_size != "auto":
            positive_int("SVI", "batch_size", self.batch_size)
        positive_float("SVI", "lr", self.lr)
        positive_float("SVI", "tol", self.tol, zero=True)

    def settled(self, problem: Problem) -> SVI:
        """The same with everything chosen that was left open."""
        from ..lazy_rows import CELLS, affordable, too_many

        structure = problem.structure
        networks = structure.has_modules or isinstance(self.guide, Amortised)
        batch_size = self.batch_size
        if batch_size == "auto":
            batch_size = BATCH if networks and structure.row_arguments and (structure.num_rows or 0) >= MANY else None
            numbers = sum(problem.kwargs[n].numel() for n in structure.row_arguments)
            if (too_many(problem.kwargs) or numbers > CELLS) and structure.row_arguments and not structure.admixture:
                batch_size = batch_size or affordable(problem.kwargs, BATCH_ELSEWHERE)
        few = networks and self.objective == "elbo"
        return replace(
            self,
            batch_size=batch_size,
            particles=self.particles or (1 if few else PARTICLES),
            starts=self.starts or (1 if networks else STARTS),
        )

    def family(self, structure: Structure) -> str:
        """The guide that "auto" stands for."""
        if isinstance(self.guide, Amortised):
            return "story"
        if self.guide != "auto":
            return self.guide
        if structure.admixture:
            return "topics"
        if structure.has_guide or structure.guideless:
            return "story"
        size = sum(math.prod(s.shape) for s in structure.latents if s.continuous)
        cut = isinstance(self.batch_size, int) and bool(structure.continuous_locals)
        return "full_rank" if size <= FULL_RANK and not cut else "mean_field"

    def check(self, structure: Structure) -> Verdict:
        """Valid where a density exists and every discrete latent can be summed out."""
        family = self.family(structure)
        guided = family == "story" and structure.has_guide and not isinstance(self.guide, Amortised)
        objection = density_objection(structure, guided=guided) or gradient_objection(structure)
        if objection:
            return Verdict(False, objection)
        if family == "topics":
            how = (
                "Dirichlet factors by natural gradients"
                if structure.admixture == "static"
                else "a Gaussian chain over time"
            )
            return Verdict(True, f"approximate posterior of a topic model: {how}")
        amortised = isinstance(self.guide, Amortised)
        if amortised and not any(s.local for s in structure.latents if s.continuous):
            return Verdict(
                False, "SVI(guide=Amortised(...)): the rows of this story have no continuous latents to guess"
            )
        if family == "story" and not structure.has_guide and structure.guideless:
            left = f"; {', '.join(s.name for s in structure.finite[:4])} summed out" if structure.finite else ""
            return Verdict(True, f"maximum likelihood of the story's networks: there is no latent to guess{left}")
        if family == "story" and not structure.has_guide and not amortised:
            return Verdict(
                False, "SVI(guide='story') needs a guide: give the story a `guide` method or pass fit(guide=...)"
            )
        if family != "story" and structure.has_modules:
            return Verdict(
                False, "the story learns networks and has no guide; give it a `guide` or pass fit(guide=...)"
            )
        if family != "story" and not any(s.continuous for s in structure.latents) and not structure.learned:
            return Verdict(False, "no latent is continuous and nothing is learned: enumeration is exact, use EM")
        if amortised:
            text = "an encoder of rows"
        elif family == "story":
            text = "the story's guide"
        else:
            text = "a flow" if family == "flow" else f"a derived {family.replace('_', '-')} Gaussian guide"
        if structure.uncountable:
            text += f"; {structure.uncountable[0].name} by score functions"
        if structure.finite:
            names = ", ".join(s.name for s in structure.finite[:4]) + (", ..." if len(structure.finite) > 4 else "")
            text += f"; {names} summed out" if family != "story" else f"; {names} summed out unless the guide has them"
        if isinstance(self.batch_size, int):
            text += f"; batches of {self.batch_size} rows"
        if any(s.improper for s in structure.latents):
            text += "; a prior is improper, so that the evidence is undefined and the ELBO known up to a constant"
        return Verdict(True, f"approximate posterior by {text}")

    def unshareable(self, structure: Structure) -> str:
        """Why several processes cannot hold rows apart, or nothing."""
        if self.family(structure) in ("story", "topics") or not structure.continuous_locals:
            return ""
        return f"the derived guide has a latent {structure.continuous_locals[0].name!r} for every row (a story's own may not)"

    def run(self, problem: Problem) -> Posterior:
        """Several short runs, the best to its end, then draws and their k-hat."""
        from ..lazy_rows import resident
        from ..meter import Meter
        from ..posterior import Posterior
        from .paired import PairTarget
        from .shared import whole_draws, whole_parameters

        if (chosen := self.settled(problem)) != self:
            return chosen.run(problem)
        family = self.family(problem.structure)
        if family == "topics":
            from ..topics.fits import run_svi

            return run_svi(problem, self)
        if self.batch_size is None:
            problem = resident(problem, "SVI without batch_size")
        with Meter() as meter:
            if isinstance(self.guide, Amortised):
                problem = replace(problem, guide=self.guide.build(problem))
            climbs = self.climbs(problem, family)
            target = climbs.target
            meter.mark("setup")
            began = time.perf_counter()
            ascent, warnings = climbs.run()
            leaves = ascent.best()
            seconds = max(5.0, 0.2 * (time.perf_counter() - began))
            draws, found, doubts = self.answer(problem, target, leaves, seconds)
            if isinstance(target, PairTarget):
                target.networks.write(target.weights(leaves))
            meter.mark("run")
        ended = any(w.startswith((INTERRUPTED, SPENT)) for w in warnings)
        if ascent.holdout is not None:
            found["validation"] = [list(look) for look in ascent.holdout.history]
        point = not draws or (isinstance(target, PairTarget) and target.points)
        # Weights of networks stay where they belong: in the networks.
        learned = [s.name for s in problem.structure.learned if "$$$" not in s.name]
        values = {n: v.detach().cpu() for n, v in target.values(leaves).items()}
        draws = whole_draws(problem, draws)
        values = whole_parameters(target, values) if family == "story" else values
        count = len(next(iter(draws.values()))) if draws else 1
        draws |= {n: values[n].expand(count, *values[n].shape) for n in learned}
        return Posterior(
            kind="point" if point else "variational",
            method=self,
            problem=problem,
            draws=draws,
            history=ascent.history,
            diagnostics={
                "guide": family,
                "mode": target.mode,
                "reason": target.reason,
                "steps": len(ascent.history),
                "elbo_slope": ascent.slope,
                "elbo_noise": ascent.noise,
                **climbs.several(),
                **found,
            },
            warnings=self.notes(problem) + warnings + doubts,
            timings=meter.timings,
            converged=ascent.converged or not (ascent.rising or ended),
            extra=self.kept(target, leaves, values),
        )

    @staticmethod
    def kept(target: Any, leaves: Leaves, values: dict[str, Tensor]) -> dict[str, Any]:
        """What asks the guide again: its parameters, and the weights of networks by their own names."""
        from .paired import PairTarget

        if not isinstance(target, PairTarget):
            return {"guide_params": {n: v.cpu() for n, v in leaves.items()}}
        weights = {n: v.detach().cpu() for n, v in target.weights(leaves).items()}
        return {"guide_params": {n: v for n, v in values.items() if n in target.parameters}, "networks": weights}

    def climbs(self, problem: Problem, family: str) -> Climbs:
        """Everything that is to be climbed, as the checkpoint left it where there is one."""
        file, options = None, self
        if problem.ranks.several and self.validation is not None:
            raise ValueError("SVI over ranks holds no rows out: leave validation out")
        if self.checkpoint is not None:
            said = replace(self, checkpoint=None)
            file = ClimbFile(Path(self.checkpoint), problem, said, family)
            options = replace(self, mode=file.mode() or self.mode)
        train, held = None, None
        if self.validation is not None:
            names = problem.structure.row_arguments
            rows = problem.structure.num_rows or 0
            if family != "story" or not names or rows < 2:
                raise ValueError(
                    f"SVI(validation={self.validation}) holds rows out, which takes a guide that reads rows (a story's own, or "
                    f"guide=Amortised(...)) and two rows or more; this fit has the guide {family!r} and {rows} rows"
                )
            train, held = split(rows, self.validation, problem.device)
        target = options.target(problem, family, train)
        if held is not None and any(p.local for p in target.parameters.values()):
            raise ValueError(
                f"SVI(validation={self.validation}): the guide has numbers of its own for every row "
                f"({', '.join(n for n, p in target.parameters.items() if p.local)}); a row held out would have none"
            )
        return Climbs(options, problem, target, held, file)

    def target(self, problem: Problem, family: str, pool: Tensor | None = None) -> Any:
        """Derived guide or the story's own; batches are drawn from the rows in `pool`."""
        from .derived import DerivedTarget
        from .paired import PairTarget
        from .svi_step import WORTH
        from .weighted import Weights

        refuse(self.mode, problem.device)
        hurried = self.mode == "auto" and problem.budget is not None and problem.budget < WORTH
        mode = "graph" if hurried else self.mode  # compiling would spend the budget
        particles = self.particles or PARTICLES
        batch = self.batch_size if isinstance(self.batch_size, int) else None
        if family == "story":
            formula = self.divergence == "formula" or (self.divergence == "auto" and problem.structure.has_modules)
            path = self.gradient == "path"
            beta = tuple(self.beta) if isinstance(self.beta, list) else self.beta
            weighing = Weights(beta, self.free_bits, formula)
            alpha = {"elbo": None, "iwae": 0.0, "renyi": float(self.alpha)}[self.objective]
            return PairTarget(problem, particles, batch, mode, self.steps, weighing, alpha, pool, path)
        if self.beta != 1.0 or self.free_bits or self.objective != "elbo" or self.gradient != "total":
            raise ValueError(
                f"SVI(beta={self.beta!r}, free_bits={self.free_bits!r}, objective={self.objective!r}, "
                f"gradient={self.gradient!r}) are for a story's own "
                f"guide; this fit derives its guide ({family})"
            )
        return DerivedTarget(problem, family, particles, batch, mode, self.steps)

    def trial(self, problem: Problem) -> Callable[[], Any]:
        """An estimate of the ELBO with its gradient, to be timed."""
        chosen = self.settled(problem)
        if chosen.family(problem.structure) == "topics":
            from ..topics.ways import trial

            return trial(problem, chosen)
        if isinstance(self.guide, Amortised):
            problem = replace(problem, guide=self.guide.build(problem))
        # As it will run, but for Inductor, which takes minutes to say whether it pays.
        hurried = replace(chosen, mode="graph" if self.mode == "auto" and problem.device.type == "cpu" else self.mode)
        target = hurried.target(problem, self.family(problem.structure))
        leaves = target.start()
        return lambda: target.objective(leaves)

    def answer(
        self, problem: Problem, target: Any, leaves: Leaves, seconds: float
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
        """Draws of the fitted guide, the ELBO again with its error, k-hat, and what they say."""
        from ..diagnostics import KHAT_LIMIT, pareto_khat
        from ..score import ladder
        from .paired import PairTarget

        kept = [
            s
            for s in problem.structure.latents
            if s.continuous and (getattr(target, "look", None) is None or not s.local)
        ]
        cells = sum(math.prod(s.shape) for s in kept)
        count = max(25, min(self.draws, int(DRAW_BYTES / 8 / max(1, cells))))
        if isinstance(target, PairTarget) and not target.shared:
            count = max(25, min(count, ROW_DRAWS // (problem.structure.num_rows or 1)))
        log_ratio, draws = target.draws(leaves, count, seconds)
        draws = {n: v[: self.draws].detach().cpu() for n, v in draws.items()}
        weights = log_ratio.detach().double().cpu().numpy()
        error = float(weights.std() / math.sqrt(len(weights))) if len(weights) > 1 else 0.0
        found: dict[str, Any] = {"elbo": float(weights.mean()), "elbo_error": error}
        warnings: list[str] = []
        if not draws or getattr(target, "points", False):
            return {n: v[:1] for n, v in draws.items()}, found, warnings
        by_row = target.row_ratios(leaves, 200, seconds) if hasattr(target, "row_ratios") else None
        if by_row is not None:
            steps = ladder(by_row.cpu(), min(BLOCK, len(by_row)))
            bad = float((steps.khat > KHAT_LIMIT).double().mean())
            found |= {"khat": float(np.median(steps.khat.numpy())), "khat_bad_rows": bad, "ladder": repr(steps)}
            if bad > BAD_ROWS:
                warnings.append(
                    f"k-hat exceeds {KHAT_LIMIT} in {bad:.0%} of the rows: there the guide misses a part of the posterior, and "
                    f"what it says about spread is not to be trusted"
                )
            return draws, found, warnings
        if getattr(target, "apart", False):
            warnings.append("k-hat is not known: ranks drew latents that all rows share apart from each other")
            return draws, found, warnings
        ratio = np.exp(weights - weights.max())
        # Where all weights are nearly equal, the shape of their tail does no harm.
        share = float(ratio.sum() ** 2 / (ratio**2).sum() / len(ratio))
        found |= {"khat": pareto_khat(weights), "weight_ess": share}
        if found["khat"] > KHAT_LIMIT and not share > EQUAL_WEIGHTS:
            warnings.append(
                f"k-hat is {found['khat']:.2f} > {KHAT_LIMIT}: the guide misses a part of the posterior, and what it says "
                f"about spread is not to be trusted; try guide='full_rank', or NUTS"
            )
        return draws, found, warnings

    def notes(self, problem: Problem) -> list[str]:
        """What holds before the first step."""
        notes, rows = [], problem.structure.num_rows and problem.all_rows
        if isinstance(self.batch_size, int) and rows and self.batch_size > rows:
            notes.append(f"batch_size={self.batch_size} exceeds the {rows} rows: all rows are used in every step")
        improper = [s.name for s in problem.structure.latents if s.improper]
        if improper:
            names = ", ".join(improper)
            notes.append(f"the prior of {names} is improper: the evidence is undefined and the ELBO bounds nothing")
        return notes
