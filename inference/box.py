r"""The exact posterior of a box: rows uniform between two unknown corners, flat priors on the corners.

With N rows whose least and greatest values in a column are m and M, :math:`p(a, b \mid x) \propto (b - a)^{-N}` on
:math:`a \le m, b \ge M`, within the priors' bounds (DeGroot, *Optimal Statistical Decisions*, 1970, section 9.7).  Columns are
independent; both conditionals have distribution functions that can be inverted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .conjugate import ClosedForm, show
from .handlers import unwrap
from .joint import LogJoint
from .linear_gaussian import take_some
from .methods.em.recognise import recognise
from .methods.em.terms import complete

#: Bisections of a distribution function: to the last bit of a double.
HALVINGS = 80


@dataclass
class Corner:
    """p(a, b) on a <= least, b >= greatest: a from `low`, b up to `high`, and b - a at most `reach`; all (D,).

    `least`, `greatest` are of `count` rows.
    """

    least: Tensor
    greatest: Tensor
    count: int
    low: Tensor
    high: Tensor
    reach: Tensor

    def mass(self, a: Tensor) -> Tensor:
        """Integral of (b - a')^-N over b and over a' from `low` to a, in units of (greatest - least)^(2 - N)."""
        return self.primitive(a) - self.primitive(self.start)

    @property
    def start(self) -> Tensor:
        """Least possible a."""
        return torch.maximum(self.low, self.greatest - self.reach)

    def primitive(self, a: Tensor) -> Tensor:
        """Antiderivative in a of the integral over b, in the same units."""
        N, unit = self.count, self.greatest - self.least
        near = ((self.greatest - a) / unit) ** (2 - N) / (N - 2)
        fixed = ((self.high - a) / unit) ** (2 - N) / (N - 2)  # b ends at `high`
        moving = a / unit * (self.reach / unit) ** (1 - N)  # b ends at a + reach
        far = torch.where(self.high.isfinite(), fixed, torch.where(self.reach.isfinite(), moving, torch.zeros_like(a)))
        return (near - far) / (N - 1)

    def draw(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draws of both corners, (draws, D) each."""
        u, v = torch.rand(2, draws, *self.least.shape, dtype=self.least.dtype, device=self.least.device)
        a0 = self.start
        # Without a bound of its own, a lies where all but 1e-16 of the mass is.
        wide = (self.greatest - self.least) * (1e16 ** (1 / (self.count - 2)))
        left, right = (v.expand(u.shape) for v in (torch.maximum(a0, self.greatest - wide), self.least))
        base, total = self.primitive(left), self.primitive(right) - self.primitive(left)
        for _ in range(HALVINGS):
            middle = (left + right) / 2
            below = self.primitive(middle) - base < u * total
            left, right = torch.where(below, middle, left), torch.where(below, right, middle)
        a = (left + right) / 2
        top = torch.minimum(self.high, a + self.reach)
        ratio = torch.where(top.isfinite(), ((self.greatest - a) / (top - a)) ** (self.count - 1), torch.zeros_like(a))
        return a, a + (self.greatest - a) * (1 - v * (1 - ratio)) ** (-1 / (self.count - 1))

    def log_constant(self) -> float:
        """Log of the integral over both corners, all columns."""
        a0 = torch.where(
            self.start.isfinite(), self.primitive(torch.where(self.start.isfinite(), self.start, self.least)), 0.0
        )
        total = self.primitive(self.least) - a0
        return float((total.log() + (2 - self.count) * (self.greatest - self.least).log()).sum())


def box_form(joint: LogJoint) -> ClosedForm | None:
    """The posterior of the two corners, or None."""
    seen, names = joint.structure.observed, [b.name for b in joint.blocks]
    if len(seen) != 1 or seen[0].family != "Uniform" or len(names) != 2 or len(seen[0].plates) != 1:
        return None
    x = joint.problem.kwargs.get(seen[0].argument or "")
    if not isinstance(x, Tensor) or tuple(x.shape) != seen[0].shape or len(x) < 3:
        return None
    values = joint.prior_draw()
    leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
    with torch.enable_grad():
        trace, _ = joint.trace(leaves, take_some(joint, joint.problem.kwargs, 2))
        fn = complete(trace.nodes[seen[0].name])
        low, high = (v.reshape(-1, *x.shape[1:])[0] for v in torch.broadcast_tensors(fn.low, fn.high))
        first = next((n for n in names if copies(low, n, leaves[n])), None)
        second = next((n for n in names if n != first), None)
        if first is None or second is None:
            return None
        corner, size = copies(high, second, leaves[second]), copies(high - low, second, leaves[second])
    bounds = [b for n in (first, second) if (b := flat_bounds(trace.nodes[n]["fn"], values[n])) is not None]
    if not (corner or size) or len(bounds) < 2:
        return None
    least, greatest = x.amin(0), x.amax(0)
    endless = torch.full_like(least, math.inf)
    (l0, h0), (l1, h1) = bounds
    if bool((h0 < least).any()) or bool((l0 > least).any()) or bool((greatest == least).any()):
        return None
    if corner and (bool((l1 > greatest).any()) or bool((h1 < greatest).any())):
        return None
    if size and (bool((l1 > 0).any()) or bool((h1 < greatest - least).any())):
        return None
    box = Corner(least, greatest, len(x), l0, h1 if corner else endless, h1 if size else endless)
    log_prior = -sum(float((high - low).log().sum()) for low, high in bounds if bool(high.isfinite().all()))
    form = ClosedForm(
        {first: lambda v: None, second: lambda v: None},
        {
            first: f"at most {show(least)}, density ~ distance^-{len(x)}",
            second: f"{'at least' if corner else 'reaching at least'} {show(greatest)}",
        },
        box.log_constant() + log_prior,
        {first: least, second: greatest if corner else greatest - least},
    )

    def draw(shapes: dict[str, tuple[int, ...]], count: int) -> dict[str, Tensor]:
        a, b = box.draw(count)
        return {
            first: a.reshape(count, *shapes[first]),
            second: (b if corner else b - a).reshape(count, *shapes[second]),
        }

    form.draw = draw  # type: ignore[method-assign]
    return form


def copies(y: Tensor, name: str, theta: Tensor) -> bool:
    """Whether y is the unknown itself, entry by entry."""
    gather = recognise(y, name, theta, 0, simplex=False)
    return (
        gather is not None and gather.scale is None and torch.equal(gather.index.flatten(), torch.arange(theta.numel()))
    )


def flat_bounds(prior: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ends of a flat prior, None where it is not flat."""
    fn = unwrap(prior)
    if isinstance(fn, dist.Uniform):
        return fn.low.expand(like.shape), fn.high.expand(like.shape)
    if isinstance(fn, dist.ImproperUniform):
        return torch.full_like(like, -math.inf), torch.full_like(like, math.inf)
    return None
