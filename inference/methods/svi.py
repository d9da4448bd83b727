"""Stochastic variational inference: a tractable distribution is fitted to the posterior by climbing the ELBO.

Derived guides are Gaussians in unconstrained space (Kucukelbir et al., *Automatic differentiation variational
inference*, JMLR 2017); a story's own guide runs beside its model through Pyro's ELBO.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .base import Verdict, density_objection, gradient_objection, one_of, positive_float, positive_int

if TYPE_CHECKING:
    from ..posterior import Posterior
    from ..problem import Problem
    from ..structure import Structure

GUIDES = ("auto", "story", "mean_field", "low_rank", "full_rank")
#: Steps in one window of the convergence rule.
WINDOW = 100
#: Unknowns up to which "auto" affords a full covariance.
FULL_RANK = 50


class Target(Protocol):
    """Something whose ELBO can be climbed: a derived guide or the story's own."""

    def parameters(self) -> list[Tensor]: ...
    def names(self) -> list[str]: ...
    def loss(self) -> Tensor: ...
    def state(self) -> Any: ...
    def restore(self, state: Any) -> None: ...
    def values(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class SVI:
    """Stochastic variational inference.

    Parameters
    ----------
    guide
        "story" (the story's own), or a Gaussian in unconstrained space: "mean_field", "low_rank", "full_rank". "auto"
        takes the story's guide where there is one, else full rank up to 50 unknowns and mean field beyond.
    steps, lr
        Most steps of Adam, and its first step size; it halves whenever the ELBO stops rising.
    batch_size
        Rows a step; None takes all.
    particles
        Draws of the guide in one step.
    starts
        Short runs from different starts, the best of which goes on.
    tol
        A window of 100 steps has stopped rising when its mean ELBO exceeds the last one's by less than two standard
        errors, or by less than `tol` nats a row.
    patience
        Halvings of the step size before the run has converged.
    draws
        Draws of the fitted guide.
    """

    name: ClassVar[str] = "svi"
    guide: str = "auto"
    steps: int = 5000
    lr: float = 0.05
    batch_size: int | None = None
    particles: int = 8
    starts: int = 3
    tol: float = 1e-5
    patience: int = 5
    draws: int = 1000

    def __post_init__(self) -> None:
        one_of("SVI", "guide", self.guide, GUIDES)
        for name in ("steps", "particles", "starts", "patience", "draws"):
            positive_int("SVI", name, getattr(self, name))
        if self.batch_size is not None:
            positive_int("SVI", "batch_size", self.batch_size)
        positive_float("SVI", "lr", self.lr)
        positive_float("SVI", "tol", self.tol, zero=True)

    def family(self, structure: Structure) -> str:
        """The guide that "auto" stands for."""
        if self.guide != "auto":
            return self.guide
        if structure.has_guide:
            return "story"
        size = sum(math.prod(s.shape) for s in structure.latents if s.continuous)
        return "full_rank" if size <= FULL_RANK else "mean_field"

    def check(self, structure: Structure) -> Verdict:
        """Valid where a density exists and every discrete latent can be summed out."""
        objection = density_objection(structure) or gradient_objection(structure)
        if objection:
            return Verdict(False, objection)
        family = self.family(structure)
        if not any(s.continuous for s in structure.latents) and not structure.learned:
            return Verdict(False, "no latent is continuous: enumeration is exact, use EM")
        if family == "story" and not structure.has_guide:
            return Verdict(False, "SVI(guide='story') needs a guide: give the story a `guide` method or pass fit(guide=...)")
        if family != "story" and structure.has_modules:
            return Verdict(False, "the story learns networks and has no guide; pass one with fit(guide=...)")
        if self.batch_size and structure.continuous_locals and family != "story":
            site = structure.continuous_locals[0].name
            return Verdict(
                False, f"latent {site!r} has a value a row: batches need an amortised guide (fit(guide=...)), or batch_size=None"
            )
        text = "the story's guide" if family == "story" else f"a derived {family.replace('_', '-')} guide"
        summed = ", ".join(s.name for s in structure.finite[:4]) + (", ..." if len(structure.finite) > 4 else "")
        return Verdict(True, f"approximate posterior by {text}" + (f"; {summed} summed out" if summed else ""))

    def run(self, problem: Problem) -> Posterior:
        """Several short runs, the best to its end, then draws and their k-hat."""
        from ..meter import Meter
        from ..posterior import Posterior

        with Meter() as meter:
            family = self.family(problem.structure)
            target = self.target(problem, family)
            meter.mark("setup")
            climb = Climb(self, problem, target)
            climb.best_of_starts()
            climb.to_the_end()
            meter.mark("run")
            answer = target.answer(self.draws)
        warnings = climb.warnings + answer["warnings"]
        if any(s.improper for s in problem.structure.latents):
            warnings.append("a prior is improper: the ELBO is no bound on an evidence")
        n = problem.structure.num_rows
        if self.batch_size and n and self.batch_size > n:
            warnings.append(f"batch_size={self.batch_size} exceeds the {n} rows: all rows are used in every step")
        return Posterior(
            kind="variational", method=self, problem=problem, draws=answer["draws"], history=climb.history,
            diagnostics={"guide": family, "steps": len(climb.history), **climb.described(), **answer["diagnostics"]},
            warnings=warnings, timings=meter.timings, converged=climb.converged, extra=answer["extra"],
        )

    def target(self, problem: Problem, family: str) -> Any:
        """Derived guide or the story's own."""
        from .elbo import DerivedTarget, StoryTarget

        kind = StoryTarget if family == "story" else DerivedTarget
        return kind(problem, family, self.particles, self.batch_size)


class Climb:
    """One optimisation: fused Adam, windows of the ELBO, halving step sizes, divergence told apart from noise."""

    def __init__(self, method: SVI, problem: Problem, target: Any) -> None:
        self.method, self.problem, self.target = method, problem, target
        self.history: list[float] = []
        self.warnings: list[str] = []
        self.converged = False
        self.start_elbos: list[float] = []
        self.deadline = time.perf_counter() + problem.budget if problem.budget else math.inf
        self.rows = max(1, problem.structure.num_rows or 1)

    def best_of_starts(self) -> None:
        """Short runs from different starts; the best state goes on."""
        if self.method.starts == 1:
            self.target.restart()
            return
        short = max(1, min(300, self.method.steps // 10))
        best: tuple[float, Any] | None = None
        for _ in range(self.method.starts):
            self.target.restart()
            values = self.steps(self.adam(self.method.lr), short, 0)
            elbo = float(np.mean(values[-max(1, short // 3) :]))
            self.start_elbos.append(elbo)
            if best is None or elbo > best[0]:
                best = elbo, self.target.state()
        assert best is not None
        self.target.restore(best[1])

    def adam(self, lr: float) -> torch.optim.Optimizer:
        """One optimiser for everything."""
        return torch.optim.Adam(self.target.parameters(), lr=lr, betas=(0.9, 0.99))

    def steps(self, optimiser: torch.optim.Optimizer, count: int, done: int) -> list[float]:
        """Some steps; ELBO of each."""
        values: list[Tensor] = []
        good = self.target.state()
        parameters = self.target.parameters()
        for i in range(count):
            optimiser.zero_grad()
            loss = self.target.loss()
            if loss.requires_grad:
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1e3 * math.sqrt(len(parameters)) * self.rows)
            if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(norm)):
                self.diverged(done + i, loss, good)
            values.append(-loss.detach())
            if i % 25 == 0:
                good = self.target.state()
            optimiser.step()
        return torch.stack(values).tolist()

    def diverged(self, step: int, loss: Tensor, good: Any) -> None:
        """Stop with the step, the parameter and the last finite state."""
        from ..errors import DivergenceError

        bad = [n for n, p in zip(self.target.names(), self.target.parameters()) if p.grad is not None and not bool(p.grad.isfinite().all())]
        bad = bad or [n for n, p in zip(self.target.names(), self.target.parameters()) if not bool(p.isfinite().all())]
        self.target.restore(good)
        what = f"the loss is {loss.item():g}" if not bool(torch.isfinite(loss)) else "the gradient is not finite"
        site = bad[0] if bad else None
        where = f", first in parameter {site!r}" if site else ""
        raise DivergenceError(
            f"SVI diverged at step {step}: {what}{where}. The last finite state is attached; lower lr (now {self.method.lr:g}) "
            f"or standardise the data",
            state=self.target.values(), step=step, site=site,
        )

    def to_the_end(self) -> None:
        """Windows until the ELBO has stopped rising at ever smaller steps, or steps, budget or patience end."""
        lr, stalls, last = self.method.lr, 0, None
        optimiser = self.adam(lr)
        bar = tqdm(total=self.method.steps, desc="SVI", disable=not self.problem.progress, leave=False)
        try:
            while len(self.history) < self.method.steps:
                values = self.steps(optimiser, min(WINDOW, self.method.steps - len(self.history)), len(self.history))
                self.history += values
                bar.update(len(values))
                bar.set_postfix(elbo=f"{np.mean(values):.4g}", lr=f"{lr:.2g}")
                now = np.array(values)
                if last is not None:
                    error = math.sqrt(now.var() / len(now) + last.var() / len(last))
                    if now.mean() - last.mean() < max(2 * error, self.method.tol * self.rows):
                        stalls += 1
                        if stalls > self.method.patience:
                            self.converged = True
                            break
                        lr /= 2
                        for group in optimiser.param_groups:
                            group["lr"] = lr
                last = now
                if time.perf_counter() > self.deadline:
                    self.warnings.append(f"the budget of {self.problem.budget:g} s is used up: SVI has not converged")
                    return
            if not self.converged:
                self.warnings.append(f"SVI did not converge in {self.method.steps} steps: the ELBO was still rising; raise steps")
        except KeyboardInterrupt:
            self.warnings.append(f"interrupted after {len(self.history)} steps: SVI has not converged")
        finally:
            bar.close()

    def described(self) -> dict[str, Any]:
        """Numbers about the climb."""
        tail = np.array(self.history[-2 * WINDOW :])
        slope = float(np.polyfit(np.arange(len(tail)), tail, 1)[0]) if len(tail) > 2 else math.nan
        return {"elbo_slope": slope, "start_elbos": self.start_elbos}
