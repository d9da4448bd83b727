"""EM's last resort for Gaussian locals: ascent on the exact marginal likelihood, locals integrated out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...joint import Unconstrained
from ...marginal import MarginalJoint
from .estep import Expectation
from .mstep import no_slope

Theta = dict[str, Tensor]

#: L-BFGS steps between two looks at the objective, and draws that compete for the start.
CLIMB, TRIES = 20, 10


class MarginalAscent:
    """Engine for any story whose rows are linear-Gaussian: L-BFGS over the globals, one run at a time.

    By Fisher's identity the gradient of the marginal log-likelihood is that of EM's expected complete log-likelihood, so
    that both climb to the same points.
    """

    together = False

    def __init__(self, joint: MarginalJoint, estimate: str) -> None:
        self.joint, self.estimate, self.ranks = joint, estimate, joint.problem.ranks
        self.names = [b.name for b in joint.blocks]
        lines = [f"EM plan ({estimate.upper()})", f"  {joint.how}"]
        lines += [
            f"  {name:<12} L-BFGS on the exact marginal likelihood: its form is not recognised" for name in self.names
        ]
        self.plan_text = "\n".join(lines)

    def start(self, seeds: Sequence[int], offset: int) -> Theta:
        """The best of some prior draws, or the guide's."""
        starts = []
        for i, seed in enumerate(seeds):
            torch.manual_seed(seed)
            guess = self.joint.guide_draw() if (offset + i) % 2 == 0 else None
            draws = self.ranks.first([guess] if guess else [self.joint.prior_draw() for _ in range(TRIES)])
            with torch.no_grad():
                values = self.ranks.add(torch.stack([self.joint.likelihood(d) for d in draws]))[0]
            best = draws[int(values.nan_to_num(-math.inf).argmax())]
            starts.append({n: best[n] for n in self.names})
        return {n: torch.stack([s[n] for s in starts]) for n in self.names}

    def expectation(self, theta: Theta) -> Expectation:
        """Log-likelihood and objective (R = 1)."""
        one = {n: v[0] for n, v in theta.items()}
        with torch.no_grad():
            likelihood = self.ranks.add(self.joint.likelihood(one).reshape(1))[0]
            return Expectation(likelihood + self.prior(one), likelihood, {}, {}, [])

    def prior(self, values: Any) -> Tensor | float:
        """Log prior of the globals."""
        return 0.0 if self.estimate == "mle" else self.joint.prior(values)

    def maximise(self, theta: Theta, e: Expectation) -> Theta:
        """Some steps of L-BFGS on the objective."""
        joint = self.joint
        begin = joint.flatten({n: v[0] for n, v in theta.items()})
        flat = begin.clone().requires_grad_()
        scale, ranks = 1.0 / joint.problem.all_rows, self.ranks
        share = ranks.size if ranks.shares_rows else 1  # every rank adds its part of the prior
        optimiser = torch.optim.LBFGS([flat], max_iter=CLIMB, line_search_fn="strong_wolfe", history_size=20)

        def values() -> dict[str, Tensor]:
            handler = Unconstrained(joint.blocks, flat)
            joint.trace(handler)
            return handler.values

        def loss() -> Tensor:
            optimiser.zero_grad()
            now = values()
            value = -scale * (joint.likelihood(now) + self.prior(now) / share)
            value.backward()
            value, flat.grad = ranks.add(value, flat.grad)  # type: ignore[arg-type]
            if not bool(value.isfinite() & flat.grad.isfinite().all()):  # type: ignore[union-attr]
                if bool(value.isfinite()) and torch.equal(flat, begin):
                    raise no_slope(joint, {n: v[0] for n, v in theta.items()}, joint.blocks, flat.grad)
                flat.grad = torch.zeros_like(flat)
                return value.new_tensor(1e30)
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        with torch.no_grad():
            new = {n: v.detach()[None] for n, v in values().items()}
        return new if float(self.expectation(new).objective) >= float(e.objective) else theta
