"""One story and its data, ready to climb: where to start, what to expect, how to improve.

Unknowns carry a leading dimension of R runs.  `Enumeration` serves every story whose latents are finite; an engine for other
structures has the same three calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...joint import LogJoint
from .chain import ChainKernel
from .estep import Expectation, expectation, make_parts, of_all_ranks, slots_now
from .mixture import MixtureKernel
from .mstep import MStep, Theta
from .plan import Plan, compile_plan
from .start import clusters, expectation_at, few_kwargs, sample_rows


class Engine(Protocol):
    """What a driver climbs with.

    Attributes
    ----------
    plan_text
        How every unknown is updated and every latent integrated, and why.
    together
        Whether several runs can be climbed in one go.
    blocks
        Whether statistics of parts of the rows can be asked for (`MixtureKernel.sweep`).
    """

    plan_text: str
    together: bool

    def start(self, seeds: Sequence[int], offset: int) -> Theta:
        """A start for every seed, (R, ...); `offset` is the number of the first."""
        ...

    def expectation(self, theta: Theta) -> Expectation:
        """E-step of every run."""
        ...

    def maximise(self, theta: Theta, e: Expectation) -> Theta:
        """M-step of every run."""
        ...


class Enumeration:
    """Finite latents: summed out by matrix products where the structure is recognised, else by contraction."""

    def __init__(self, joint: LogJoint, estimate: str, ridge: float, kernels: bool, theta: Theta | None) -> None:
        self.joint, self.ranks = joint, joint.problem.ranks
        first = {n: v[0] for n, v in theta.items()} if theta else joint.guide_draw() or joint.prior_draw()
        self.first = self.ranks.first(first)
        self.plan: Plan = compile_plan(joint, self.first, estimate)
        self.whole = self.plan
        self.parts = make_parts(joint, self.plan)
        self.kernel = self.recognise() if kernels else None
        self.mixture = self.kernel if isinstance(self.kernel, MixtureKernel) else None
        self.chain = self.kernel if isinstance(self.kernel, ChainKernel) else None
        if self.chain is not None:
            self.plan = self.chain.plan  # one site stands for all steps
        self.step = MStep(joint, self.plan, ridge)
        self.together = self.kernel is not None and self.plan.copies_only and not self.plan.climbed
        self.plan.sums.update(self.describe_sums())
        self.plan_text = str(self.plan)

    def recognise(self) -> Any:
        """The kernel for this structure, or None."""
        for kind in (MixtureKernel, ChainKernel):
            found = kind.recognise(self.joint, self.plan, self.first, self.parts)
            if self.ranks.every(found is not None):
                return found
        return None

    def describe_sums(self) -> dict[str, str]:
        """Latent -> how it is summed out, and what one E-step costs."""
        structure, n = self.joint.structure, self.joint.problem.all_rows
        states = {name: structure[name].states or 1 for name in self.joint.finite}
        if self.mixture is not None:
            width, k = self.mixture.layout[-1].stop, self.mixture.states
            how = f"softmax over {k} states, two matrix products of {n:,} rows x {width} features x {k}"
            return {self.mixture.latent: how}
        if self.chain is not None:
            names = self.chain.chain
            how = f"chain of {len(names)} steps, scaled forward-backward, {n:,} x {len(names)} x {self.chain.states}^2"
            return {f"{names[0]}..": how}
        size = structure.enumeration_elements() if states else 0
        how = f"contraction, largest table {size:,.0f} numbers"
        few = list(states)[:4]
        return {**{name: f"{states[name]} states, {how}" for name in few}, **({"...": how} if len(states) > 4 else {})}

    # -- starts ------------------------------------------------------------------------------------------------------

    def start(self, seeds: Sequence[int], offset: int) -> Theta:
        """k-means++ clusters of the latents' children; without such children, the guide or the best of prior draws."""
        joint, base = self.joint, self.first
        torch.manual_seed(seeds[0])
        wide = [c.rows.num_words for c, _ in self.mixture.counted] if self.mixture is not None else []
        rows = sample_rows(joint, seeds[0], max(wide, default=1))
        kwargs = few_kwargs(joint, rows)
        labels = self.ranks.first(clusters(joint, kwargs, len(seeds), seeds[0], offset) if joint.finite else None)
        if labels is None:
            return stack([self.start_without(seed, offset + i) for i, seed in enumerate(seeds)])
        if self.together and self.mixture is not None and rows is not None:
            theta = {n: v.expand(len(seeds), *v.shape).clone() for n, v in base.items()}
            S = self.mixture.of_labels(labels[self.mixture.latent], rows)  # rows of all ranks
            slots, prior = slots_now(joint, self.plan, theta, self.parts)
            e = self.mixture.expectation(S, prior, prior, slots, self.parts)
            return self.settle(theta, e)
        starts, plan = [], self.whole
        for r in range(len(seeds)):
            e = expectation_at(joint, plan, base, kwargs, {n: v[r] for n, v in labels.items()})
            if self.chain is not None:
                e.stats = self.chain.pooled(e.stats)
            starts.append(self.settle({n: v[None] for n, v in base.items()}, e))
        return {n: torch.cat([s[n] for s in starts]) for n in base}

    def settle(self, theta: Theta, e: Expectation) -> Theta:
        """Two M-steps from the same labels: spreads depend on the means."""
        return self.step(self.step(theta, e), e)

    def start_without(self, seed: int, number: int, tries: int = 20) -> dict[str, Tensor]:
        """The guide's own guess for every other run, else the draw of highest density among some from the prior."""
        torch.manual_seed(seed)
        if number % 2 == 0 and (guess := self.ranks.first(self.joint.guide_draw())) is not None:
            return guess
        draws = self.ranks.first([self.joint.prior_draw() for _ in range(tries)])
        with torch.no_grad():
            values = torch.stack([self.density(d).nan_to_num(-math.inf) for d in draws])
        return draws[int(values.argmax())]

    def density(self, theta: dict[str, Tensor]) -> Tensor:
        """Log joint of the rows of all ranks, the globals' priors counted once."""
        if not self.ranks.shares_rows:
            return self.joint.density(theta)
        factors = self.joint.factors(theta)
        own = [f for f in factors if self.joint.structure.data_plate in f.plates]
        rest = sum((f.value.sum() for f in factors if f not in own), torch.zeros(()))
        return self.ranks.add(self.joint.total(own, 1.0))[0] + rest

    # -- one iteration -----------------------------------------------------------------------------------------------

    def expectation(self, theta: Theta) -> Expectation:
        """E-step of every run."""
        if self.kernel is not None:
            return self.kernel(theta, self.parts)
        e = expectation(self.joint, self.plan, {n: v[0] for n, v in theta.items()}, self.parts)
        return of_all_ranks(e, self.ranks)

    def maximise(self, theta: Theta, e: Expectation) -> Theta:
        """M-step of every run."""
        return self.step(theta, e)


def stack(thetas: Sequence[dict[str, Tensor]]) -> Theta:
    """Values of single runs side by side."""
    return {n: torch.stack([t[n] for t in thetas]) for n in thetas[0]}
