"""EM's last resort for Gaussian locals: ascent on the exact marginal likelihood, locals integrated out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...joint import Block, LogJoint, Unconstrained
from ...linear_gaussian import GaussianRows, take_some
from .estep import Expectation
from .mstep import Both

Theta = dict[str, Tensor]

#: L-BFGS steps between two looks at the objective, and draws that compete for the start.
CLIMB, TRIES = 20, 10


class MarginalAscent:
    """Engine for any story whose rows are linear-Gaussian: L-BFGS over the globals, one run at a time.

    By Fisher's identity the gradient of the marginal log-likelihood is that of EM's expected complete log-likelihood, so
    that both climb to the same points.
    """

    together = False

    def __init__(self, joint: LogJoint, kwargs: Mapping[str, Any], estimate: str) -> None:
        self.joint, self.estimate = joint, estimate
        self.kwargs = kwargs
        self.few = take_some(joint, self.kwargs, 2)
        self.shared: bool | None = None
        self.names = [b.name for b in joint.blocks if not b.local]
        latents = ", ".join(b.name for b in joint.blocks if b.local)
        lines = [
            f"EM plan ({estimate.upper()})",
            f"  {latents:<12} integrated out: exact Gaussian integral of every row",
        ]
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
            draws = [guess] if guess else [self.joint.prior_draw() for _ in range(TRIES)]
            with torch.no_grad():
                values = [self.rows({n: d[n] for n in self.names}).nan_to_num(-math.inf) for d in draws]
            best = draws[int(torch.stack(values).argmax())]
            starts.append({n: best[n] for n in self.names})
        return {n: torch.stack([s[n] for s in starts]) for n in self.names}

    def rows(self, theta: dict[str, Tensor]) -> Tensor:
        """Exact log-likelihood at one theta."""
        found = GaussianRows(self.joint, theta, self.kwargs, self.shared)
        self.shared = found.shared
        return found.log_rows.sum()

    def expectation(self, theta: Theta) -> Expectation:
        """Log-likelihood and objective (R = 1)."""
        one = {n: v[0] for n, v in theta.items()}
        with torch.no_grad():
            likelihood = self.rows(one).reshape(1)
            trace, _ = self.joint.trace(self.beside(one), self.few)
        return Expectation(likelihood + self.prior(trace), likelihood, {}, {}, [])

    def beside(self, one: dict[str, Tensor]) -> dict[str, Tensor]:
        """The unknowns and locals of some value, for a run on a few rows."""
        n = len(next(v for v in self.few.values() if isinstance(v, Tensor) and v.dim()))
        local = {
            b.name: torch.zeros(n, *b.shape[1:], dtype=self.joint.problem.dtype) for b in self.joint.blocks if b.local
        }
        return {**one, **local}

    def prior(self, trace: Any) -> Tensor | float:
        """Log prior of the globals in a run."""
        if self.estimate == "mle":
            return 0.0
        nodes = (trace.nodes[n] for n in self.names if trace.nodes[n]["type"] == "sample")
        return sum((n["fn"].log_prob(n["value"]).sum() for n in nodes), 0.0)

    def maximise(self, theta: Theta, e: Expectation) -> Theta:
        """Some steps of L-BFGS on the objective."""
        one = {n: v[0] for n, v in theta.items()}
        full = self.joint.flatten({**one, **{b.name: torch.zeros(b.shape) for b in self.joint.blocks if b.local}})
        blocks, pieces, at = [], [], 0
        for b in self.joint.blocks:
            if not b.local:
                size = b.stop - b.start
                blocks.append(Block(b.name, b.shape, b.free_shape, at, at + size, b.param, False))
                pieces.append(full[b.start : b.stop])
                at += size
        flat = torch.cat(pieces).clone().requires_grad_()
        local = {n: v for n, v in self.beside({}).items()}
        scale = 1.0 / max(1, self.joint.structure.num_rows or 1)

        def values() -> tuple[dict[str, Tensor], Any]:
            handler = Unconstrained(tuple(blocks), flat)
            trace, _ = self.joint.trace(Both(handler, local), self.few)
            return handler.values, trace

        optimiser = torch.optim.LBFGS([flat], max_iter=CLIMB, line_search_fn="strong_wolfe", history_size=20)

        def loss() -> Tensor:
            optimiser.zero_grad()
            now, trace = values()
            value = -scale * (self.rows(now) + self.prior(trace))
            value.backward()
            if not bool(value.isfinite() & flat.grad.isfinite().all()):  # type: ignore[union-attr]
                flat.grad = torch.zeros_like(flat)
                return value.new_tensor(1e30)
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        with torch.no_grad():
            new = {n: v.detach()[None] for n, v in values()[0].items()}
        return new if float(self.expectation(new).objective) >= float(e.objective) else theta
