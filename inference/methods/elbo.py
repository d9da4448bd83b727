"""The two things whose ELBO SVI climbs: a derived Gaussian guide on the flat log joint, and a story's own guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from ..capture import ValueAndGrad, constrain_many, value_and_grad
from ..data import take_rows
from ..diagnostics import pareto_khat
from ..handlers import MissingCells, ScaleRows
from ..joint import LogJoint
from ..problem import Problem
from .guides import GaussianGuide

#: Draws in the final estimate of the ELBO and of k-hat.
FINAL = 2000


class Batches:
    """Random rows without replacement, epoch after epoch."""

    def __init__(self, problem: Problem, size: int | None) -> None:
        self.problem = problem
        n = problem.structure.num_rows or 1
        self.size = None if size is None or size >= n else size
        if self.size is not None and not problem.structure.row_arguments:
            raise ValueError("batch_size needs an argument with one entry a row; this story has none: use batch_size=None")
        self.order = torch.empty(0, dtype=torch.long)
        self.scale = 1.0 if self.size is None else n / self.size

    def __call__(self) -> dict[str, Any]:
        """Arguments of the next batch."""
        if self.size is None:
            return self.problem.kwargs
        if len(self.order) < self.size:
            self.order = torch.randperm(self.problem.structure.num_rows or 1, device=self.problem.device)
        rows, self.order = self.order[: self.size], self.order[self.size :]
        return take_rows(self.problem.kwargs, self.problem.structure.row_arguments, rows)


class DerivedTarget:
    """A Gaussian over the flat unconstrained vector; finite latents are summed out by the log joint."""

    def __init__(self, problem: Problem, family: str, particles: int, batch_size: int | None) -> None:
        self.problem, self.family, self.particles = problem, family, particles
        self.joint = LogJoint(problem)
        self.batches = Batches(problem, batch_size)
        self.points = torch.zeros(self.joint.dim, dtype=torch.bool, device=problem.device)
        for block in self.joint.blocks:
            self.points[block.start : block.stop] = block.param
        self.captured: ValueAndGrad | None = value_and_grad(self.joint) if self.batches.size is None else None
        self.guide = GaussianGuide(family, self.start(), self.points)

    def start(self) -> Tensor:
        """The best of several tries by log density, from the prior and near the origin of the free space."""
        tries = [self.joint.flatten(self.joint.prior_draw()) for _ in range(10)]
        tries += [torch.rand_like(tries[0]) * 2 - 1 for _ in range(5)]
        with torch.no_grad():
            values = torch.stack([self.joint.unconstrained(t) for t in tries]).nan_to_num(-math.inf, posinf=-math.inf)
        if not bool(values.isfinite().any()):
            raise ValueError(impossible(self.joint))
        return tries[int(values.argmax())]

    def restart(self) -> None:
        """A new start."""
        self.guide = GaussianGuide(self.family, self.start(), self.points)

    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""
        return self.guide.parameters

    def names(self) -> list[str]:
        """Their names."""
        return self.guide.names()

    def state(self) -> list[Tensor]:
        """A copy of the guide."""
        return self.guide.state()

    def restore(self, state: list[Tensor]) -> None:
        """Put a copy back."""
        self.guide.restore(state)

    def values(self) -> dict[str, Tensor]:
        """Sites at the guide's centre."""
        return self.joint.constrain(self.guide.loc.detach())

    def density(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient at every draw; a batch of rows speaks for all."""
        if self.captured is not None:
            return self.captured(flat)
        batch = self.batches()
        values, gradients = [], []
        with torch.enable_grad():
            for row in flat:
                point = row.detach().requires_grad_()
                value = self.joint.unconstrained(point, batch, self.batches.scale)
                values.append(value.detach())
                gradients.append(torch.autograd.grad(value, point)[0])
        return torch.stack(values), torch.stack(gradients)

    def loss(self) -> Tensor:
        """Negative ELBO; its gradient goes through the draws and the closed-form entropy."""
        flat, q = self.guide.sample(self.particles)
        value, gradient = self.density(flat.detach())
        surrogate = (flat * gradient).sum() / self.particles
        return -(value.mean() + surrogate - surrogate.detach() + q.entropy())

    def answer(self, draws: int) -> dict[str, Any]:
        """Draws of the guide, the ELBO again with its error, and k-hat."""
        with torch.no_grad():
            flat, q = self.guide.sample(max(draws, FINAL))
            value = torch.cat([self.full(part) for part in flat.split(256)])
            weights = value - q.log_prob(flat[:, self.guide.latent])
            values = constrain_many(self.joint, flat[:draws])
        mode = self.captured.mode if self.captured is not None else "eager (batches)"
        return assess(weights, {"mode": mode}, {n: v.cpu() for n, v in values.items()})

    def full(self, flat: Tensor) -> Tensor:
        """Log density on all rows at several vectors."""
        if self.captured is not None:
            return self.captured(flat)[0]
        return torch.stack([self.joint.unconstrained(row) for row in flat])


class StoryTarget:
    """The story's own guide beside its model, through Pyro's ELBO; finite latents are enumerated."""

    def __init__(self, problem: Problem, family: str, particles: int, batch_size: int | None) -> None:
        self.problem = problem
        self.joint = LogJoint(problem)
        self.batches = Batches(problem, batch_size)
        plate, scale = problem.structure.data_plate, self.batches.scale
        guide: Callable = problem.guide  # type: ignore[assignment]
        self.finite = [s.name for s in problem.structure.finite]
        self.check_guide()
        model = MissingCells()(config_enumerate(problem.model, "parallel") if self.finite else problem.model)
        self.model = ScaleRows(plate, scale)(model) if scale != 1.0 else model
        self.guide = ScaleRows(plate, scale)(guide) if scale != 1.0 else guide
        kind = TraceEnum_ELBO if self.finite else Trace_ELBO
        self.elbo = kind(num_particles=1, max_plate_nesting=problem.structure.max_plate_nesting)
        self.particles = particles if not self.finite else min(particles, 2)
        self.named: list[tuple[str, Tensor]] = []

    def check_guide(self) -> None:
        """The guide covers exactly the latents that are not summed out."""
        with pyro.get_param_store().scope(), poutine.block(), torch.no_grad():
            trace: Any = poutine.trace(self.problem.guide).get_trace(**self.problem.kwargs)
        found = {n for n, s in trace.nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"}
        found -= {n for n in found if trace.nodes[n]["infer"].get("is_auxiliary")}
        latents = {s.name for s in self.problem.structure.latents}
        missing = latents - found - set(self.finite)
        if missing:
            raise ValueError(f"the guide lacks latent sites {sorted(missing)}: without them the loss is no ELBO; sample them in the guide")
        if extra := found - latents:
            raise ValueError(f"the guide samples {sorted(extra)}, which are no latents of the story; its latents are {sorted(latents)}")
        if both := found & set(self.finite):
            raise ValueError(f"the guide samples the finite latents {sorted(both)}, which are summed out; leave them out of the guide")

    def restart(self) -> None:
        """Forget the parameters; the guide makes new ones."""
        pyro.clear_param_store()
        with torch.no_grad(), poutine.block():
            poutine.trace(self.guide).get_trace(**self.batches())
            poutine.trace(self.problem.model).get_trace(**self.batches())
        self.collect()

    def collect(self) -> None:
        """Unconstrained parameters with their names."""
        store = pyro.get_param_store()
        self.named = [(name, store._params[name]) for name in store.keys()]

    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""
        return [p for _, p in self.named]

    def names(self) -> list[str]:
        """Their names."""
        return [n for n, _ in self.named]

    def state(self) -> dict[str, Tensor]:
        """A copy of the unconstrained parameters."""
        return {n: p.detach().clone() for n, p in self.named}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a copy back."""
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(state[name])

    def values(self) -> dict[str, Tensor]:
        """Constrained parameters."""
        return {n: pyro.param(n).detach().clone() for n in self.names()}

    def loss(self) -> Tensor:
        """Negative ELBO over the particles."""
        batch = self.batches()
        losses = [self.elbo.differentiable_loss(self.model, self.guide, **batch) for _ in range(self.particles)]
        return torch.stack(losses).mean()

    def answer(self, draws: int) -> dict[str, Any]:
        """Draws of the guide, the ELBO on all rows, and k-hat."""
        wanted = [b.name for b in self.joint.blocks if not b.param]
        params = {b.name: pyro.param(b.name).detach() for b in self.joint.blocks if b.param}
        kept: dict[str, list[Tensor]] = {name: [] for name in wanted}
        weights = []
        with torch.no_grad(), pyro.validation_enabled(False):
            for i in range(max(draws, 500)):
                trace: Any = poutine.trace(self.problem.guide).get_trace(**self.problem.kwargs)
                values = {n: trace.nodes[n]["value"].detach() for n in wanted}
                if i < draws:
                    for name in wanted:
                        kept[name].append(values[name].cpu())
                if i < 500:
                    weights.append(self.joint.density({**values, **params}) - trace.log_prob_sum())
        found = {name: torch.stack(v) for name, v in kept.items()}
        found |= {n: p.cpu().expand(draws, *p.shape) for n, p in params.items()}
        return assess(torch.stack(weights), {"mode": "eager"}, found, {"guide_params": self.values()})


def assess(weights: Tensor, diagnostics: dict[str, Any], draws: dict, extra: dict | None = None) -> dict[str, Any]:
    """ELBO with its standard error and k-hat from log weights log p(x, u) - log q(u)."""
    khat = pareto_khat(weights.cpu().numpy())
    found = {"elbo": weights.mean().item(), "elbo_error": (weights.std() / math.sqrt(len(weights))).item(), "khat": khat}
    warnings = []
    ratio = (weights - weights.logsumexp(0)).exp()
    share = (1 / (ratio**2).sum() / len(weights)).item()
    found["weight_ess"] = share
    if khat > 0.7 and share < 0.99:  # where all weights are nearly equal, the shape of their tail does no harm
        warnings.append(
            f"Pareto k-hat is {khat:.2f} > 0.7: the variational posterior misses part of the true one; do not trust its "
            f"spreads (try guide='full_rank', or NUTS)"
        )
    return {"draws": draws, "diagnostics": {**found, **diagnostics}, "warnings": warnings, "extra": extra or {}}


def impossible(joint: LogJoint) -> str:
    """Which site has density 0 everywhere it was tried."""
    with torch.no_grad():
        factors = joint.factors(joint.prior_draw())
    bad = [f.name for f in factors if not bool(f.value.isfinite().any())] or [f.name for f in factors if not bool(f.value.isfinite().all())]
    where = f"site {bad[0]!r}" if bad else "the story"
    return f"no start has a finite density: {where} gives the data density 0 at every try; check its values and its support"
