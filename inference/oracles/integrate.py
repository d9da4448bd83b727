"""The integral over all latents, and the moments of their values, by the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .density import BATCH, Density
from .plan import MOST_NODES, Group, Plan, value_ties
from .ranges import Range, find_box, gaussian_batch, jump_nodes, trapezoid

#: Nodes a coordinate to begin with, by the number of coordinates of a grid, and by how much they grow.
NODES = {0: 1, 1: 32, 2: 24, 3: 18, 4: 14}
GROWTH = 1.4
#: Nats within which two resolutions agree: enough, and still bearable where the budget ends.
AGREED, BEARABLE = 1e-7, 1e-6


@dataclass(frozen=True)
class Integral:
    """log p(data, state) of every state (S,), first and second moments of the values by state (S, entries)."""

    by_state: Tensor
    first: Tensor
    second: Tensor
    nodes: int

    @property
    def evidence(self) -> float:
        """log p(data)."""
        return float(self.by_state.logsumexp(0))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every entry."""
        weight = self.by_state.softmax(0)
        mean = weight @ self.first
        return mean, (weight @ self.second - mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Converged:
    """The finest integral, and how far the one before it was off."""

    integral: Integral
    plan: Plan
    error: float
    moment_error: float


def integrate(density: Density, plans: list[Plan]) -> Converged:
    """The integral by the first plan whose grids agree.

    Raises
    ------
    ValueError
        No plan's do before the budget of evaluations is used up.
    """
    reasons = []
    for plan in plans:
        try:
            return refined(density, plan)
        except ValueError as error:
            reasons.append(error)
    raise reasons[0]


def refined(density: Density, plan: Plan) -> Converged:
    """Refine the grids, and widen them a little, until two agree."""
    box = find_box(density, plan)
    ties = value_ties(density) if density.dim else torch.zeros(density.num_entries, 0, dtype=torch.bool)
    before: Integral | None = None
    error = moment_error = float("inf")
    exact = not any(g.grid for g in plan.groups) and not plan.outer
    spent = 0
    for level in range(12):
        one = single(density, plan, box, ties, level)
        spent += one.nodes * density.num_states
        if before is not None:
            error, moment_error = difference(before, one)
        before = one
        if exact:
            return Converged(one, plan, 0.0, 0.0)
        if error < AGREED and moment_error < 1e-5:
            error = max(error, cut_off(density, plan, box, ties, max(0, level - 2)))
            break
        if spent + one.nodes * density.num_states * GROWTH**plan.order > MOST_NODES:
            break
    assert before is not None
    if not (error < BEARABLE and moment_error < 1e-4):
        raise ValueError(
            f"quadrature has not settled after {spent:,} evaluations: the last two grids differ by {error:.2g} nats and "
            f"{moment_error:.2g} posterior standard deviations ({plan.widest} coordinates together). Priors with lighter tails "
            f"or more data narrow the region; fewer latents leave more nodes to each"
        )
    return Converged(before, plan, error, moment_error)


def cut_off(density: Density, plan: Plan, box: dict[int, Range], ties: Tensor, level: int) -> float:
    """Nats that are missing near a singularity of the Gaussian algebra (a scale near 0): as many as a stricter cut costs."""
    if not density.blurred:
        return 0.0
    whole = single(density, plan, box, ties, level)
    density.sharpness = 0.25
    less = single(density, plan, box, ties, level)
    density.sharpness = 1.0
    return abs(whole.evidence - less.evidence)


def difference(before: Integral, one: Integral) -> tuple[float, float]:
    """Nats between two log evidences, and the largest gap of moments in posterior standard deviations."""
    (mean, sd), (old_mean, old_sd) = one.moments(), before.moments()
    unit = sd.clamp_min(1e-12) + 1e-9 * mean.abs()
    gaps = torch.cat([(mean - old_mean).abs() / unit, (sd - old_sd).abs() / unit, torch.zeros(1)])
    return abs(one.evidence - before.evidence), float(gaps.max())


def single(density: Density, plan: Plan, box: dict[int, Range], ties: Tensor, level: int) -> Integral:
    """The integral at one resolution."""
    margin = 0.02 * (level + 1)

    def count(members: tuple[int, ...]) -> int:
        return round(NODES[len(members)] * GROWTH**level) if members else 1

    outer, weights = trapezoid(box, plan.outer, count(plan.outer), margin)
    u = density.anchor.repeat(len(outer), 1)
    u[:, list(plan.outer)] = outer
    base = density.log_joint(u)
    total = base.clone()
    S, E, n = base.shape[0], density.num_entries, len(outer)
    values = density.values(u) if E else torch.zeros(n, 0, dtype=torch.float64)
    first = values.expand(S, n, E).clone()
    second = first.square()
    nodes = n
    for group in plan.groups:
        if plan.jumps:
            places, log_weights = jump_nodes(density, group, box, 4 * (level + 1), margin)
        else:
            places, log_weights = trapezoid(box, group.grid, count(group.grid), margin)
        nodes += n * len(places)
        one, v1, v2 = over_group(density, group, u, places, log_weights)
        total = total + (one - base)
        mine = ties[:, list(group.members)].any(1)
        first[..., mine], second[..., mine] = v1[..., mine], v2[..., mine]
    total = (total + weights).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    by_state = total.logsumexp(1)
    share = (total - by_state.clamp_min(-1e300)[:, None]).exp().unsqueeze(-1)
    first, second = ((share * v.nan_to_num(0, 0, 0)).sum(1) for v in (first, second))
    return Integral(by_state, first, second, nodes)


def over_group(
    density: Density, group: Group, u: Tensor, places: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log of the integral over one group for every state and outer node (S, n), and moments of all entries (S, n, E)."""
    S, E = density.num_states, density.num_entries
    size = max(1, BATCH // (S * (E + 4)))
    index = list(group.grid)
    parts = []
    for rows in u.split(max(1, size // len(places))):
        level = torch.full((S, len(rows)), -torch.inf, dtype=torch.float64)
        first = torch.zeros(S, len(rows), E, dtype=torch.float64)
        second = torch.zeros_like(first)
        for some, weights in zip(places.split(size), log_weights.split(size)):
            points = rows[:, None].repeat(1, len(some), 1)
            points[:, :, index] = some
            f, v1, v2 = at_nodes(density, group, points.reshape(-1, density.dim))
            f = f.reshape(S, len(rows), -1).nan_to_num(-torch.inf, torch.inf, -torch.inf) + weights
            top = torch.maximum(level, f.amax(-1))
            safe = top.clamp_min(-1e300)
            share, old = (f - safe[..., None]).exp(), (level - safe).exp()
            v1, v2 = (v.reshape(*share.shape, E).nan_to_num(0, 0, 0) for v in (v1, v2))
            scale = old + share.sum(-1)
            first = (first * old[..., None] + (share[..., None] * v1).sum(2)) / scale.clamp_min(1e-300)[..., None]
            second = (second * old[..., None] + (share[..., None] * v2).sum(2)) / scale.clamp_min(1e-300)[..., None]
            level = top + scale.log()
        parts.append((level, first, second))
    return tuple(torch.cat(p, 1) for p in zip(*parts))  # type: ignore[return-value]


def at_nodes(density: Density, group: Group, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log density (S, B) with the Gaussian coordinates of the group integrated out, and two moments of all entries."""
    if not group.gaussian:

        def plain(a: Tensor, s: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            f, values = density.tell(a, s)
            return f, values, values.square()

        return density.batch(plain, points, width=2)
    return gaussian_batch(density, points, group.gaussian)
