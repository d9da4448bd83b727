"""M-step: closed forms on sufficient statistics for all runs at once, then L-BFGS for what has none.

Unknowns and statistics carry a leading dimension of R runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ...distributed import ALONE, Ranks
from ...errors import DivergenceError
from ...handlers import Substitute
from ...joint import Block, LogJoint, Unconstrained
from ..blame import steepness
from .estep import Expectation, few_rows
from .families import Statistics, covariance, scatter, variance
from .plan import Plan
from .priors import Conjugate
from .sticks import beta, mode
from .terms import RUNS, Term, over_value, parameters, prior_statistics, slots_of, spread_out

#: L-BFGS iterations in one M-step; generalised EM needs an ascent, not the maximum.
CLIMB = 30

Theta = dict[str, Tensor]


def no_slope(joint: LogJoint, theta: Theta, blocks: Sequence[Block], gradient: Any) -> DivergenceError:
    """The gradient is not a number where an M-step begins: with the state (unbatched) that it began from."""
    gradient, home = gradient.cpu(), torch.device("cpu")
    whole = torch.zeros(joint.dim, dtype=gradient.dtype, device=home)
    for block in blocks:
        here = next(b for b in joint.blocks if b.name == block.name)
        whole[here.start : here.stop] = gradient[block.start : block.stop]
    names = [b.name for b in blocks if not bool(gradient[b.start : b.stop].isfinite().all())]
    return DivergenceError(
        f"EM cannot take its next step: {steepness(joint, joint.flatten(theta), whole.numpy())}. The last "
        f"finite state is attached",
        state=theta,
        site=names[0],
    )


@dataclass
class MStep:
    """Maximise the expected complete log joint.

    Parameters
    ----------
    joint, plan
        The story and how its unknowns are updated.
    ridge
        Share of the data's own variance that is added to variances whose prior is flat: the floor below which a
        component has collapsed.
    """

    joint: LogJoint
    plan: Plan
    ridge: float

    def __call__(self, theta: Theta, e: Expectation) -> Theta:
        """theta that improves the expected complete log joint (ECM: locations, then spreads, then the rest)."""
        new = dict(theta)
        order = {"loc": 0, "spread": 2}
        copied = [n for n in self.plan.closed if n not in self.plan.sticks]
        closed = sorted(copied, key=lambda n: order.get(self.plan.users(n)[0][1], 1))
        for name in (*closed, *self.plan.sticks):
            value = self.stick(name, new, e) if name in self.plan.sticks else self.closed_form(name, new, e)
            good = value.isfinite().reshape(len(value), -1).all(1)
            new[name] = torch.where(good.reshape([-1, *[1] * (value.dim() - 1)]), value, new[name])
        if self.plan.climbed:
            if len(next(iter(theta.values()))) != 1:
                raise AssertionError("unknowns without a closed form are climbed one run at a time")
            new = {n: v[None] for n, v in self.climb({n: v[0] for n, v in new.items()}, e).items()}
        return new

    # -- closed forms ------------------------------------------------------------------------------------------------

    def statistics(self, term: Term, theta: Theta, e: Expectation) -> Statistics:
        """Of a site from the E-step; of a prior from the unknown's current value."""
        if self.plan.prior_terms.get(term.name) is term:
            return prior_statistics(term, theta[term.name])
        return e.stats[term.name]

    def closed_form(self, name: str, theta: Theta, e: Expectation) -> Tensor:
        """The maximiser in one unknown, the others held where they are."""
        users = self.plan.users(name)
        slot, prior, old = users[0][1], self.plan.priors[name], theta[name]
        family = users[0][0].family
        assert family is not None
        role, block = users[0][0].roles[slot], family.blocks.get(slot, 0)
        if slot == "loc":
            return self.location(name, users, theta, e, block)
        if slot == "spread":
            return self.spread(users, prior, theta, e, old, role, block)
        stats = [(t, self.statistics(t, theta, e)) for t, _ in users]
        if block == 1:
            counts: Any = sum(t.pull(slot, s["counts"]) for t, s in stats) + prior.total
            counts = counts.clamp_min(0)
            total = counts.sum(-1, keepdim=True)
            return torch.where(total > 0, counts / total.clamp_min(1e-300), old)
        n: Any = sum(t.pull(slot, s["n"]) for t, s in stats)
        x: Any = sum(t.pull(slot, s["x"]) for t, s in stats)
        if family.name == "Exponential":
            x, n = n + prior.total, x + prior.count
        else:
            x, n = x + prior.total, n + prior.count
        value = torch.where(n > 0, x / n.clamp_min(1e-300), old)
        tiny = torch.finfo(value.dtype).tiny
        return value.clamp(1e-12, 1 - 1e-12) if slot == "probs" else value.clamp_min(tiny)

    def stick(self, name: str, theta: Theta, e: Expectation) -> Tensor:
        """Parts of a stick, from the counts of what was broken off it; their prior may depend on other unknowns."""
        old, fn = theta[name], None
        if self.plan.estimate == "map":
            fn = (self.plan.densities or {}).get(name)
            if fn is None:
                with torch.no_grad():
                    now = {n: v[0] for n, v in theta.items()}
                    fn = self.joint.trace(now, few_rows(self.joint, e.parts[0].kwargs))[0].nodes[name]["fn"]
        shapes = beta(fn, old.shape[1:])
        assert shapes is not None
        a, b = (s.to(old) for s in shapes)
        counts = e.stats[self.plan.sticks[name]]["counts"]
        return mode(counts.reshape(len(old), -1, counts.shape[-1]).sum(1), a, b, old)

    def location(self, name: str, users: list[tuple[Term, str]], theta: Theta, e: Expectation, block: int) -> Tensor:
        """Means of normals: precision-weighted averages with the prior's pseudo-observations."""
        weight: Any = 0.0
        total: Any = 0.0
        old = theta[name]
        for term, slot in users:
            s, p = self.statistics(term, theta, e), self.current(term, theta, e)
            x = s["x"]
            if term.shift is not None:
                x = x + (s["n"].unsqueeze(-1) if block else s["n"]) * term.shift
            if block:
                inverse = torch.linalg.inv(covariance(*p["spread"]))
                weight = weight + term.pull(slot, s["n"][..., None, None] * inverse)
                total = total + term.pull(slot, (inverse @ x.unsqueeze(-1)).squeeze(-1))
            else:
                precision = 1 / variance(*p["spread"])
                weight = weight + term.pull(slot, s["n"] * precision)
                total = total + term.pull(slot, x * precision)
        matrix, pseudo = self.location_prior(name, theta, e, block)
        if matrix is not None:
            weight, total = weight + matrix, total + pseudo
        if not block:
            return torch.where(weight > 0, total / weight.clamp_min(1e-300), old)
        empty = weight.diagonal(dim1=-2, dim2=-1).amin(-1, keepdim=True) <= 1e-300
        eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        factor, bad = torch.linalg.cholesky_ex(torch.where(empty.unsqueeze(-1), eye, weight))
        empty = empty | (bad > 0).unsqueeze(-1)
        solved = torch.cholesky_solve(total.unsqueeze(-1), factor).squeeze(-1)
        return torch.where(empty, old, solved)

    def location_prior(self, name: str, theta: Theta, e: Expectation, block: int) -> tuple[Any, Any]:
        """Precision of a mean's normal prior, and that precision times its centre; (None, None) where it is flat."""
        term, prior, old = self.plan.prior_terms.get(name), self.plan.priors[name], theta[name]
        if term is not None and self.plan.estimate == "map":
            p, runs = self.current(term, theta, e), len(old)
            wide = term.family is not None and term.family.event_dims == 1
            inverse = torch.linalg.inv(covariance(*p["spread"])) if wide else 1 / variance(*p["spread"])
            matrix = over_value(term, inverse, runs, 2 * wide).reshape([*old.shape, *old.shape[-1:] * wide])
            centre = over_value(term, p["loc"][1], runs, 1 * wide).reshape(old.shape)
            if block and not wide:
                matrix = torch.diag_embed(matrix)
        elif prior.precision is not None and prior.mean is not None:
            matrix, centre = prior.precision, prior.mean
            if block and matrix.dim() == centre.dim():
                matrix = torch.diag_embed(matrix)
        else:
            return None, None
        return matrix, (matrix @ centre.unsqueeze(-1)).squeeze(-1) if block else matrix * centre

    def spread(
        self,
        users: list[tuple[Term, str]],
        prior: Conjugate,
        theta: Theta,
        e: Expectation,
        old: Tensor,
        role: str,
        block: int,
    ) -> Tensor:
        """Variances, precisions and covariances from the scatter around the updated means."""
        n: Any = 0.0
        around: Any = 0.0
        floor: Any = 0.0
        for term, slot in users:
            s, p = self.statistics(term, theta, e), self.current(term, theta, e)
            m = p["loc"][1]
            gap = scatter(s, m) if block else s["xx"] - 2 * m * s["x"] + s["n"] * m * m
            if (factor := term.scale(slot)) is not None:  # the spread is a multiple of the unknown
                factor = factor.reshape([*factor.shape, *[1] * block])
                power = {"scale": -2, "scale_tril": -2, "variance": -1, "covariance_matrix": -1}.get(role, 1)
                gap = gap * factor**power
            count = s["n"].expand(gap.shape[: gap.dim() - block])
            around = around + term.pull(slot, gap)
            n = n + term.pull(slot, count)
            if term.floor is not None:
                floor = floor + self.floor_of(term, slot, count, block)
        floor = (
            self.ridge * floor / n.clamp_min(1e-300).unsqueeze(-1)
            if block
            else self.ridge * floor / n.clamp_min(1e-300)
        )
        n, around = n + prior.count, around + prior.total
        flat = prior.text in ("no prior", "flat prior")
        if block:
            return self.matrix_spread(n, around, old, role, floor if flat else None)
        value = (around.clamp_min(0) / n.clamp_min(1e-300)) + (floor if flat else 0.0)
        value = value.clamp_min(torch.finfo(value.dtype).tiny)
        value = {"variance": value, "precision": 1 / value, "scale": value.sqrt()}[role]
        return torch.where(n > 1e-12, value, old)

    def floor_of(self, term: Term, slot: str, count: Tensor, block: int) -> Tensor:
        """Variances of the data summed as the scatter is, one for each entry of the diagonal."""
        assert term.floor is not None
        if not block:
            return term.pull(slot, count * term.floor)
        return term.pull(slot, count.unsqueeze(-1) * term.floor)

    def matrix_spread(self, n: Tensor, around: Tensor, old: Tensor, role: str, floor: Tensor | None) -> Tensor:
        """Covariance (or its inverse or factor); directions without spread are lifted to the floor, never raised."""
        cov = around / n.clamp_min(1e-300)[..., None, None]
        if floor is not None:
            cov = cov + torch.diag_embed(floor)
        factor, bad = torch.linalg.cholesky_ex(cov)
        if bool((bad > 0).any()):
            values, vectors = torch.linalg.eigh(cov.nan_to_num(0.0))
            least = torch.maximum(values.amax(-1, keepdim=True) * 1e-10, torch.full_like(values[..., :1], 1e-12))
            lifted = (vectors * values.clamp_min(least).unsqueeze(-2)) @ vectors.mT
            cov = torch.where((bad > 0)[..., None, None], lifted, cov)
            factor, _ = torch.linalg.cholesky_ex(cov)
        value = {
            "covariance_matrix": lambda: cov,
            "precision_matrix": lambda: torch.cholesky_inverse(factor),
            "scale_tril": lambda: factor,
        }[role]()
        return torch.where((n > 1e-12)[..., None, None], value, old)

    def current(self, term: Term, theta: Theta, e: Expectation) -> dict[str, tuple[str, Tensor]]:
        """Parameters of a term at `theta`: copies are read off directly, the others from the E-step's run."""
        slots = dict(e.slots[term.name])
        for slot, gather in term.gathers.items():
            slots[slot] = (gather.push(theta[gather.theta]), (RUNS, *term.slot_dims[slot]))
        return parameters(term, slots)

    # -- gradient ----------------------------------------------------------------------------------------------------

    def climb(self, theta: dict[str, Tensor], e: Expectation) -> dict[str, Tensor]:
        """L-BFGS on the expected complete log joint in the unknowns that have no closed form."""
        names = set(self.plan.climbed)
        blocks, start = [], 0
        full = self.joint.flatten(theta)
        pieces = []
        for b in self.joint.blocks:
            if b.name in names:
                size = b.stop - b.start
                blocks.append(Block(b.name, b.shape, b.free_shape, start, start + size, b.param, b.local, b.axis))
                pieces.append(full[b.start : b.stop])
                start += size
        begin = torch.cat(pieces)
        flat = begin.clone().requires_grad_()
        fixed = {n: v for n, v in theta.items() if n not in names}
        scale = 1.0 / self.joint.problem.all_rows
        ranks = self.joint.problem.ranks if any(self.plan.needs_data(t) for t in self.plan.terms.values()) else ALONE
        many = CLIMB if self.joint.finite else 400
        optimiser = torch.optim.LBFGS(
            [flat],
            max_iter=many,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-10,
            tolerance_change=1e-10 if self.joint.finite else 1e-14,  # nats a row; the next E-step moves more
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = -scale * self.expected(tuple(blocks), flat, fixed, e, ranks)
            value.backward()
            value, flat.grad = ranks.add(value, flat.grad)  # type: ignore[arg-type]
            if not bool(value.isfinite() & flat.grad.isfinite().all()):  # type: ignore[union-attr]
                if bool(value.isfinite()) and torch.equal(flat, begin):
                    raise no_slope(self.joint, theta, blocks, flat.grad)
                flat.grad = torch.zeros_like(flat)  # a step too far: high and flat, so that the line search turns back
                return value.new_tensor(1e30)
            return value

        def cost() -> float:
            with torch.no_grad():
                return float(ranks.add(-scale * self.expected(tuple(blocks), flat, fixed, e, ranks))[0])

        with pyro.validation_enabled(False):  # a step too far is no mistake of the story
            before = cost()
            with torch.enable_grad():
                optimiser.step(loss)
            after = cost()
        if not after <= before:  # also where after is NaN
            return theta
        with torch.no_grad():
            handler = Unconstrained(tuple(blocks), flat.detach())
            self.joint.trace(Both(handler, fixed))
        return {n: handler.values[n].detach() if n in names else v for n, v in theta.items()}

    def expected(
        self,
        blocks: tuple[Block, ...],
        flat: Tensor,
        fixed: dict[str, Tensor],
        e: Expectation,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """Expected complete log joint as far as it depends on the climbing unknowns; over `ranks`, this one's part."""
        names = {b.name for b in blocks}
        total: Any = 0.0
        data_terms = [t for t in self.plan.terms.values() if t.family is None and t.depends & names]
        every = data_terms or any(t.rowwise for t in self.plan.terms.values())  # statistics of each row
        for i, part in enumerate(e.parts if data_terms else e.parts[:1]):
            kwargs = part.kwargs if every else few_rows(self.joint, part.kwargs)
            trace, symbols = self.joint.trace(Both(Unconstrained(blocks, flat), fixed), kwargs)
            if i == 0:
                total = total + self.prior(trace)
                for term in self.plan.terms.values():
                    if term.family is not None and term.depends & names:
                        p = parameters(term, slots_of(term, trace.nodes[term.name], symbols))
                        total = total + term.family.expected(p, e.stats[term.name]).sum()
                total = total / ranks.size if ranks.shares_rows else total  # every rank adds its part of it
            if data_terms:
                keep = {t.name for t in data_terms}
                for factor in self.joint.factors_of(trace, symbols, only=keep):
                    weight, dims = part.weights[factor.name]
                    total = total + (spread_out((weight, dims), factor.dims, 0) * finite(factor.value)).sum()
        return total

    def prior(self, trace: Any) -> Tensor | float:
        """Log prior of the unknowns in a run (nothing for maximum likelihood)."""
        if self.plan.estimate == "mle":
            return 0.0
        nodes = (trace.nodes[n] for n in self.plan.tiers if trace.nodes[n]["type"] == "sample")
        return sum((n["fn"].log_prob(n["value"]).sum() for n in nodes), 0.0)


class Both(Substitute):
    """Some unknowns from a flat vector, the others held fixed."""

    def __init__(self, handler: Unconstrained, fixed: dict[str, Tensor]) -> None:
        super().__init__(fixed)
        self.handler = handler

    def _pyro_sample(self, msg: dict) -> None:
        super()._pyro_sample(msg)
        self.handler._pyro_sample(msg)

    def _pyro_param(self, msg: dict) -> None:
        super()._pyro_param(msg)
        self.handler._pyro_param(msg)


def finite(value: Tensor) -> Tensor:
    """Impossible configurations have weight 0; their -inf must not make 0 * inf."""
    return torch.where(value.isneginf(), torch.zeros_like(value), value)
