"""Posteriors in closed form: every unknown conjugate to what it generates, nothing latent left in the rows.

The pairs are those of Gelman et al., *Bayesian Data Analysis* (2013), chapters 2 and 3.  Recognised from the story as EM's
closed forms are, and trusted after the log joint less the log of the closed posterior is the same number, the log evidence,
at several draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .joint import LogJoint
from .methods.em.families import covariance, scatter, variance
from .methods.em.terms import RUNS, Term, over_value, parameters, spread_out

if TYPE_CHECKING:
    from .methods.em.estep import Expectation
    from .methods.em.plan import Plan
    from .problem import Problem

#: Draws at which the closed form is held against the log joint.
CHECKS = 4


@dataclass
class ClosedForm:
    """A posterior that can be written down.

    Attributes
    ----------
    factors
        Unknown -> its posterior given draws of the unknowns before it: values -> distribution.
    tied
        Unknowns whose posterior depends on those draws: one distribution for each draw.
    text
        Unknown -> the same in words.
    log_evidence
        log p(data).
    point
        Unknown -> maximum likelihood estimate, where that is a corner (a box).
    """

    factors: dict[str, Callable[[dict[str, Tensor]], Any]]
    text: dict[str, str]
    log_evidence: float = math.nan
    point: dict[str, Tensor] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()

    def draw(self, shapes: dict[str, tuple[int, ...]], count: int) -> dict[str, Tensor]:
        """Joint draws, (count, ...) each."""
        values: dict[str, Tensor] = {}
        for name, make in self.factors.items():
            fn = make(values)
            drawn = fn.sample() if name in self.tied else fn.sample((count,))
            values[name] = drawn.reshape(count, *shapes[name])
        return values

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log posterior density of draws, (count,)."""
        total: Any = 0.0
        for name, make in self.factors.items():
            fn, count = make(values), len(values[name])
            shape = fn.batch_shape + fn.event_shape
            value = values[name].reshape(shape if name in self.tied else (count, *shape))
            total = total + fn.log_prob(value).reshape(count, -1).sum(1)
        return total

    def mean(self, name: str) -> Tensor | None:
        """Posterior mean where it has a formula."""
        if name in self.tied:
            return None
        try:
            return self.factors[name]({}).mean
        except (NotImplementedError, AttributeError):
            return None


def closed_form(problem: Problem) -> ClosedForm | None:
    """The closed posterior of a story, or None."""
    structure = problem.structure
    unknowns = [s for s in structure.latents]
    if not unknowns or structure.learned or structure.has_modules or not structure.observed:
        return None
    if any(s.discrete or s.local for s in unknowns) or any(not s.has_density for s in structure.observed):
        return None
    if structure.unnormalised or any(s.missing for s in structure.observed):
        return None
    joint = LogJoint(problem)
    if structure.moving_support:
        from .box import box_form

        return box_form(joint)
    found = conjugate_form(joint)
    if found is None:
        return None
    shapes = {b.name: b.shape for b in joint.blocks}
    values = found.draw(shapes, CHECKS)
    ours = found.log_prob(values).tolist()
    differences = [float(joint.density({n: v[i] for n, v in values.items()})) - ours[i] for i in range(CHECKS)]
    level = sum(differences) / len(differences)
    if not all(abs(d - level) <= 1e-7 * (1 + abs(level)) for d in differences):
        return None
    found.log_evidence = level
    return found


def conjugate_form(joint: LogJoint) -> ClosedForm | None:
    """Posteriors by the plan that EM would make, or None."""
    from .methods.em.estep import expectation, make_parts
    from .methods.em.plan import CLOSED, compile_plan

    theta = joint.prior_draw()
    plan = compile_plan(joint, theta, "map")
    if any(tier != CLOSED for tier in plan.tiers.values()) or not plan.copies_only:
        return None
    return Conjugacy(plan, theta, expectation(joint, plan, theta, make_parts(joint, plan))).solve()


@dataclass
class Pair:
    """A mean whose prior shares its spread with the data.

    kappa and m of the prior, n and the mean of the posterior, all in the shape of the mean.
    """

    kappa: Tensor
    m: Tensor
    n: Tensor
    mean: Tensor


class Conjugacy:
    """Posteriors of the unknowns of one plan, from the sums of one E-step.

    Parameters
    ----------
    plan, theta, e
        A plan all of whose unknowns have closed forms, some values of them, and the sums of the rows.
    """

    def __init__(self, plan: Plan, theta: dict[str, Tensor], e: Expectation) -> None:
        self.plan, self.theta, self.stats, self.slots = plan, theta, e.stats, e.slots
        self.lifted = {n: v[None] for n, v in theta.items()}

    def solve(self) -> ClosedForm | None:
        """All posteriors, spreads before the means that are tied to them."""
        factors: dict[str, Callable[[dict[str, Tensor]], Any]] = {}
        text: dict[str, str] = {}
        tied: dict[str, str] = {}
        for name, term in self.plan.prior_terms.items():
            if set(term.gathers) != {"spread"}:
                return None
            tied[name] = term.gathers["spread"].theta
        for name in self.plan.closed:
            if name not in tied:
                loc = next((n for n, other in tied.items() if other == name), None)
                made = self.one(name, loc)
                if made is None:
                    return None
                factors[name], text[name] = made
        for name, other in tied.items():
            if other not in factors:
                return None
            factors[name], text[name] = self.tied_mean(name, other)
        return ClosedForm(factors, text, tied=frozenset(tied))

    def users(self, name: str) -> list[tuple[Term, str]]:
        """Observed sites that copy the unknown."""
        return [(t, s) for t, s in self.plan.users(name) if t is not self.plan.prior_terms.get(t.name)]

    def one(self, name: str, loc: str | None) -> tuple[Callable, str] | None:
        """Posterior of one unknown, `loc` integrated out of a pair; None where its site has more that is unknown."""
        users, prior = self.users(name), self.plan.priors[name]
        for t, s in users:
            if any(slot != s and g.theta != loc for slot, g in t.gathers.items()):
                return None
        if not users or users[0][0].family is None or (loc is not None and len(users) != 1):
            return None
        slot, family = users[0][1], users[0][0].family
        if slot == "loc":
            return self.mean(name)
        if slot == "spread":
            return self.spread(name, loc)
        if family.blocks.get(slot, 0) == 1:
            concentration = self.total(users, "counts") + prior.total + 1
            return (lambda v: dist.Dirichlet(concentration)), f"Dirichlet({show(concentration)})"
        x, n = self.total(users, "x"), self.total(users, "n")
        if slot == "probs":
            a, b = x + prior.total + 1, n - x + (prior.count - prior.total) + 1
            return (lambda v: dist.Beta(a, b)), f"Beta({show(a)}, {show(b)})"
        x, n = (n, x) if family.name == "Exponential" else (x, n)
        a, b = x + prior.total + 1, n + prior.count
        return (lambda v: dist.Gamma(a, b)), f"Gamma({show(a)}, {show(b)})"

    def total(self, users: list[tuple[Term, str]], key: str) -> Tensor:
        """A statistic in the shape of the unknown."""
        return sum(t.pull(s, self.stats[t.name][key])[0] for t, s in users)  # type: ignore[return-value]

    def parameters(self, term: Term) -> dict[str, tuple[str, Tensor]]:
        """Parameters of a site at theta, aligned with its statistics."""
        slots = dict(self.slots[term.name])
        for slot, gather in term.gathers.items():
            slots[slot] = (gather.push(self.lifted[gather.theta]), (RUNS, *term.slot_dims[slot]))
        return parameters(term, slots)

    def sums(self, term: Term) -> tuple[Tensor, Tensor]:
        """Count and sum of the rows, in the shape of the sum."""
        s = self.stats[term.name]
        wide = term.family is not None and term.family.event_dims == 1
        n = s["n"].unsqueeze(-1) if wide else s["n"]
        x = s["x"] if term.shift is None else s["x"] + n * term.shift
        return n.expand(x.shape), x

    def mean(self, name: str) -> tuple[Callable, str] | None:
        """Normal mean, spread known."""
        prior, old, users = self.plan.priors[name], self.theta[name], self.users(name)
        if prior.precision is None or prior.mean is None:
            return None
        block = users[0][0].family.blocks.get("loc", 0) if users[0][0].family else 0
        weight: Any = 0.0
        total: Any = 0.0
        for term, slot in users:
            p, (n, x) = self.parameters(term), self.sums(term)
            if block:
                inverse = torch.linalg.inv(covariance(*p["spread"]))
                weight = weight + term.pull(slot, n[..., :1, None] * inverse)[0]
                total = total + term.pull(slot, (inverse @ x.unsqueeze(-1)).squeeze(-1))[0]
            else:
                precision = (1 / variance(*p["spread"])).expand(x.shape)
                weight, total = weight + term.pull(slot, n * precision)[0], total + term.pull(slot, x * precision)[0]
        matrix, centre = prior.precision, prior.mean
        if not block:
            weight, total = weight + matrix, total + matrix * centre
            mean, sd = total / weight, weight.rsqrt()
            return (lambda v: dist.Normal(mean, sd)), f"Normal({show(mean)}, {show(sd)})"
        matrix = torch.diag_embed(matrix) if matrix.dim() == centre.dim() else matrix
        weight, total = weight + matrix, total + (matrix @ centre.unsqueeze(-1)).squeeze(-1)
        mean = torch.linalg.solve(weight, total.unsqueeze(-1)).squeeze(-1).reshape(old.shape)
        return (
            lambda v: dist.MultivariateNormal(mean, precision_matrix=weight)
        ), f"MultivariateNormal({show(mean)}, ...)"

    def pair(self, name: str) -> Pair:
        """Moments of a mean that is tied to a spread."""
        prior, old = self.plan.prior_terms[name], self.theta[name]
        (term, slot), wide = self.users(name)[0], prior.family.event_dims if prior.family else 0
        factor, role = prior.scale("spread"), prior.roles["spread"]
        kappa = torch.ones([1] * (len(prior.dims) + prior.extra), dtype=old.dtype) if factor is None else factor
        power = {"scale": -2, "scale_tril": -2, "variance": -1, "covariance_matrix": -1}.get(role, 1)
        kappa = (kappa**power).reshape(1, *kappa.shape, *[1] * wide)
        k = over_value(prior, kappa, 1, wide)[0].reshape(old.shape)
        centre = spread_out(self.slots[name]["loc"], (RUNS, *prior.dims), prior.extra + wide)
        m = over_value(prior, centre, 1, wide)[0].reshape(old.shape)
        n, x = (term.pull(slot, v)[0] for v in self.sums(term))
        return Pair(k, m, n, (k * m + x) / (k + n))

    def spread(self, name: str, loc: str | None) -> tuple[Callable, str] | None:
        """Precision or variance of normals, the mean known or integrated out."""
        prior, users = self.plan.priors[name], self.users(name)
        (term, slot), role = users[0], users[0][0].roles[users[0][1]]
        block = term.family.blocks.get("spread", 0) if term.family else 0
        n_total: Any = 0.0
        around: Any = 0.0
        for term, slot in users:
            s = self.stats[term.name]
            m = self.parameters(term)["loc"][1]
            if loc is not None:
                pair, gather = self.pair(loc), term.gathers["loc"]
                m = gather.push(pair.mean[None]) - (0.0 if term.shift is None else term.shift)
            gap = scatter(s, m) if block else s["xx"] - 2 * m * s["x"] + s["n"] * m * m
            if loc is not None:
                away, k = gather.push((pair.mean - pair.m)[None]), gather.push(pair.kappa[None])
                gap = gap + (k[..., :1, None] * away.unsqueeze(-1) * away.unsqueeze(-2) if block else k * away * away)
            if (factor := term.scale(slot)) is not None:
                power = {"variance": -1, "covariance_matrix": -1}.get(role, 1)
                gap = gap * factor.reshape([*factor.shape, *[1] * block]) ** power
            around = around + term.pull(slot, gap)[0]
            n_total = n_total + term.pull(slot, s["n"].expand(gap.shape[: gap.dim() - block]))[0]
        if role == "precision_matrix":
            df, matrix = n_total + prior.count + self.theta[name].shape[-1] + 1, around + prior.total
            return (lambda v: dist.Wishart(df, precision_matrix=matrix)), f"Wishart({show(df)}, ...)"
        if role not in ("precision", "variance"):
            return None
        b = (around + prior.total) / 2
        if role == "precision":
            a = (n_total + prior.count) / 2 + 1
            return (lambda v: dist.Gamma(a, b)), f"Gamma({show(a)}, {show(b)})"
        a = (n_total + prior.count) / 2 - 1
        return (lambda v: dist.InverseGamma(a, b)), f"InverseGamma({show(a)}, {show(b)})"

    def tied_mean(self, name: str, other: str) -> tuple[Callable, str]:
        """A mean given the spread that its prior shares with the data."""
        pair, prior = self.pair(name), self.plan.prior_terms[name]
        mean, count = pair.mean, pair.kappa + pair.n
        wide = prior.family.event_dims if prior.family else 0
        role, gather = prior.roles["spread"], replace(prior.gathers["spread"], scale=None)

        def make(values: dict[str, Tensor]) -> Any:
            slot = (gather.push(values[other]), (RUNS, *prior.slot_dims["spread"]))
            unit, runs = spread_out(slot, (RUNS, *prior.dims), prior.trailing("spread")), len(values[other])
            if wide:
                precision = over_value(prior, torch.linalg.inv(covariance(role, unit)), runs, 2)
                matrix = precision.reshape(runs, *mean.shape, mean.shape[-1]) * count.unsqueeze(-1)
                return dist.MultivariateNormal(mean.expand(runs, *mean.shape), precision_matrix=matrix)
            spread = over_value(prior, variance(role, unit), runs, 0).reshape(runs, *mean.shape)
            return dist.Normal(mean, (spread / count).sqrt())

        return make, f"Normal({show(mean)}, spread of {other} / {show(count)})"


def show(value: Tensor | float) -> str:
    """A number, or the first few of many."""
    flat = torch.as_tensor(value).flatten().tolist()
    text = ", ".join(f"{v:.4g}" for v in flat[:6]) + (", ..." if len(flat) > 6 else "")
    return text if len(flat) == 1 else f"[{text}]"
