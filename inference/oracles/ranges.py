"""Where the mass lies: a box of coordinates outside which the density is negligible, and nodes within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .density import Density
from .plan import Group, Plan

#: Nats below the highest density at which it counts as nothing.
DEPTH = 36.0
#: Nats below it at which nodes begin to lie further apart.
CORE = 5.0
#: Size of numbers beyond which their differences are worth another round, and beyond which they are lost in rounding.
FAR, LOST = 1e8, 1e13
#: Points that wander through the region above that level, and how often its ends are pushed outwards.
WALKERS, PUSHES = 64, 20


def marginal(density: Density, plan: Plan, points: Tensor) -> Tensor:
    """log density of the coordinates that grids run over (B, m): states summed, Gaussian coordinates integrated: (B,)."""
    grid = torch.tensor(grid_coordinates(plan), dtype=torch.long)
    gaussian = tuple(sorted(i for g in plan.groups for i in g.gaussian))
    u = density.anchor.repeat(len(points), 1)
    u[:, grid] = points
    found = gaussian_batch(density, u, gaussian)[0] if gaussian else density.log_joint(u)
    return found.logsumexp(0).nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def gaussian_batch(density: Density, u: Tensor, gaussian: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals over Gaussian coordinates at many points, for every state: log (S, B), two moments of all values (S, B, E).

    Where the start lies so far from the mass that differences lose digits, they are taken again from the mean found.
    """
    step, width = steps(density, gaussian), 2 + len(gaussian) ** 2

    def run(points: Tensor, rounds: int) -> tuple[Tensor, ...]:
        return density.batch(
            lambda a, s: integrate_gaussian(density, a, s, gaussian, step, rounds), points, width=width
        )

    total, first, second, size = run(u, 1)
    again = (size > FAR).any(0).nonzero()[:, 0]
    if len(again):
        better = run(u[again], 3)
        total[:, again], first[:, again], second[:, again], size[:, again] = better
    unclear = ~(size < LOST * density.sharpness)
    density.blurred = density.blurred or bool(unclear.any())
    return total.masked_fill(unclear, -torch.inf), first, second


def integrate_gaussian(
    density: Density, u: Tensor, state: dict[str, Tensor], gaussian: tuple[int, ...], step: Tensor, rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integral over coordinates in which the log density is quadratic, by its differences, which are exact for a parabola.

    Returns
    -------
    log of the integral; mean and second moment of the values of all latents, which are linear in these coordinates (E,); and
    how much larger than 1 the numbers are whose differences were taken, times how nearly singular the curvature is.
    """
    k, index = len(gaussian), torch.tensor(gaussian)
    i, j = torch.triu_indices(k, k, 1)
    start = u[index]
    for left in reversed(range(rounds)):
        one = torch.diag_embed(step)
        moves = torch.cat([torch.zeros(1, k, dtype=torch.float64), one, -one, one[i] + one[j]])
        f, values = torch.func.vmap(lambda move, s=start: density.tell(u.index_copy(0, index, s + move), state))(moves)
        level, up, down, across = f[0], f[1 : k + 1], f[k + 1 : 2 * k + 1], f[2 * k + 1 :]
        slope = (up - down) / 2  # in steps
        bend = up - 2 * level + down
        mixed = across - up[i] - up[j] + level
        curve = torch.diag_embed(bend).index_put((torch.cat([i, j]), torch.cat([j, i])), torch.cat([mixed, mixed]))
        covariance = torch.linalg.inv_ex(-curve)[0]
        move = covariance @ slope
        if left:
            start = start + step * move
            step = step * (-bend).clamp(1e-30, 1e30).rsqrt()
    sign, log_det = torch.linalg.slogdet(-curve)
    total = level + 0.5 * slope @ move + 0.5 * k * math.log(2 * math.pi) + step.log().sum() - 0.5 * log_det
    J = (values[1 : k + 1] - values[0]).T
    first = values[0] + J @ move
    size = torch.maximum(level.abs(), (slope @ move).abs()) * (1 + covariance.diagonal().abs().amax())
    size = torch.where(sign > 0, size, torch.inf)
    return total, first, first.square() + ((J @ covariance) * J).sum(-1), size


def steps(density: Density, gaussian: tuple[int, ...]) -> Tensor:
    """A step of every Gaussian coordinate that is about as long as its conditional standard deviation, (m,)."""
    if gaussian in density.known_steps:
        return density.known_steps[gaussian]
    k, index = len(gaussian), torch.tensor(gaussian)
    found = torch.ones(k, dtype=torch.float64)
    for _ in range(3):
        u = density.anchor.repeat(2 * k + 1, 1)
        u[1 : k + 1, index] += found.diag()
        u[k + 1 :, index] -= found.diag()
        f = density.log_joint(u).amax(0)
        curve = -(f[1 : k + 1] - 2 * f[0] + f[k + 1 :]) / found.square()
        found = curve.clamp(1e-20, 1e20).rsqrt()
    density.known_steps[gaussian] = found
    return found


def grid_coordinates(plan: Plan) -> list[int]:
    """All coordinates that grids run over, in order."""
    return sorted({*plan.outer, *(i for g in plan.groups for i in g.grid)})


@dataclass(frozen=True)
class Range:
    """Interval of one coordinate outside which the density is negligible, and the interval where it is near its height."""

    low: float
    high: float
    core_low: float
    core_high: float

    def nodes(self, count: int, margin: float) -> tuple[Tensor, Tensor]:
        """Nodes u = c + s sinh(t) with t evenly spaced, and weights: close together in the core, far apart in the tails.

        The trapezoid rule in t converges beyond all orders, as the one in u does, and faster by far where tails are long
        (Trefethen & Weideman, *SIAM Review* 56, 2014).
        """
        centre, scale = (self.core_low + self.core_high) / 2, max((self.core_high - self.core_low) / 2, 1e-300)
        pad = margin * (self.high - self.low)
        ends = torch.tensor([self.low - pad - centre, self.high + pad - centre], dtype=torch.float64) / scale
        first, last = ends.asinh().tolist()
        t = torch.linspace(first, last, count, dtype=torch.float64)
        return centre + scale * t.sinh(), scale * t.cosh() * (t[1] - t[0])


def find_box(density: Density, plan: Plan) -> dict[int, Range]:
    """Where every coordinate of a grid has to go: levels of `DEPTH` and of `CORE` nats below the density's height."""
    where = grid_coordinates(plan)
    if not where:
        return {}
    low, high, best = region(density, plan, DEPTH, density.anchor[where])
    core_low, core_high, _ = region(density, plan, CORE, best)
    return {
        i: Range(
            *(float(v[k]) for v in (torch.minimum(low, core_low), torch.maximum(high, core_high), core_low, core_high))
        )
        for k, i in enumerate(where)
    }


def region(density: Density, plan: Plan, depth: float, home: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least and greatest value of every coordinate where the density is at least its height less `depth`, and the best point.

    Points wander through that region by differences of each other's places, which suits regions of any size and slant
    (ter Braak, *Statistics and Computing* 16, 2006), with every place in it equally good.
    """
    generator = torch.Generator().manual_seed(0)
    m = len(home)
    scales = 10.0 ** torch.linspace(-4, 0.3, WALKERS, dtype=torch.float64).unsqueeze(1)
    x = home + scales * torch.randn(WALKERS, m, generator=generator, dtype=torch.float64)
    x[0] = home
    level = marginal(density, plan, x)
    lost = level < level.max() - depth
    x[lost], level[lost] = x[level.argmax()].clone(), level.max()
    for _ in range(25 + 8 * m):
        a, b = (torch.randint(WALKERS, (WALKERS,), generator=generator) for _ in range(2))
        stretch = 0.3 + 2.2 * torch.rand(WALKERS, 1, generator=generator, dtype=torch.float64)
        tried = x + stretch * (x[a] - x[b]) * (
            1 + 0.1 * torch.randn(WALKERS, m, generator=generator, dtype=torch.float64)
        )
        keep = torch.randint(m, (WALKERS,), generator=generator)
        alone = torch.rand(WALKERS, generator=generator) < 0.4  # along one coordinate
        tried = torch.where(alone[:, None] & (torch.arange(m) != keep[:, None]), x, tried)
        found = marginal(density, plan, tried)
        top = torch.maximum(level.max(), found.max())
        taken = found >= top - depth
        x, level = torch.where(taken[:, None], tried, x), torch.where(taken, found, level)
        gone = level < top - depth  # the height has risen
        x[gone], level[gone] = x[level.argmax()].clone(), level.max()
    low, high = pushed(density, plan, x, level, depth, generator)
    return low, high, x[level.argmax()]


def pushed(
    density: Density, plan: Plan, x: Tensor, level: Tensor, depth: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The ends of every coordinate, reached by going on from the outermost walkers: tips are thin, and seldom met by chance."""
    m = x.shape[1]
    sign = torch.cat([torch.ones(m), -torch.ones(m)]).to(x)
    coordinate = torch.arange(m).repeat(2)
    ends = x[(x[:, coordinate] * sign).argmax(0)].clone()
    top, tries = level.max(), 12
    for _ in range(PUSHES):
        a, b = (torch.randint(WALKERS, (2 * m, tries), generator=generator) for _ in range(2))
        move = x[a] - x[b]
        along = move.gather(2, coordinate[:, None, None].expand(-1, tries, 1)) * sign[:, None, None]
        move = (
            move * along.sign() * (10.0 ** -(2 * torch.rand(2 * m, tries, 1, generator=generator, dtype=torch.float64)))
        )
        alone = torch.rand(2 * m, tries, 1, generator=generator) < 0.5
        move = torch.where(alone & (torch.arange(m) != coordinate[:, None, None]), 0.0, move)
        tried = ends[:, None] + move
        found = marginal(density, plan, tried.reshape(-1, m)).reshape(2 * m, tries)
        top = torch.maximum(top, found.max())
        reach = tried.gather(2, coordinate[:, None, None].expand(-1, tries, 1)).squeeze(2) * sign[:, None]
        reach = torch.where(found >= top - depth, reach, -torch.inf)
        best = reach.argmax(1)
        rows = torch.arange(2 * m)
        better = reach[rows, best] > ends[rows, coordinate] * sign
        ends = torch.where(better[:, None], tried[rows, best], ends)
    return ends[m:].diagonal(), ends[:m].diagonal()


def trapezoid(box: dict[int, Range], members: tuple[int, ...], count: int, margin: float) -> tuple[Tensor, Tensor]:
    """Nodes (n, m) and log weights (n,) of a product of trapezoid rules."""
    if not members:
        return torch.zeros(1, 0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    axes = [box[i].nodes(count, margin) for i in members]
    nodes = torch.cartesian_prod(*(a for a, _ in axes)).reshape(-1, len(members))
    weights = torch.cartesian_prod(*(w.log() for _, w in axes)).reshape(-1, len(members)).sum(1)
    return nodes, weights


def panels(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights (..., 12 count) of intervals (...,), in `count` equal panels each."""
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(12))
    edges = torch.arange(count, dtype=torch.float64)
    unit = ((edges[:, None] + (x + 1) / 2) / count).reshape(-1)
    weight = (w / 2 / count).repeat(count)
    width = (high - low).unsqueeze(-1)
    return low.unsqueeze(-1) + width * unit, width * weight


def jump_nodes(
    density: Density, group: Group, box: dict[int, Range], count: int, margin: float
) -> tuple[Tensor, Tensor]:
    """Nodes and log weights where the density falls to 0 at an edge: the edge is found by halving, panels end there."""
    ends = []
    for i in group.grid:
        pad = margin * (box[i].high - box[i].low)
        ends.append((box[i].low - pad, box[i].high + pad))

    def alive(points: Tensor) -> Tensor:
        u = density.anchor.repeat(len(points), 1)
        u[:, list(group.grid)] = points
        return (density.log_joint(u) > -torch.inf).any(0)

    if len(group.grid) == 1:
        low, high = _edges(lambda t: alive(t.reshape(-1, 1)).reshape(t.shape), *ends[0], torch.zeros(1))
        nodes, weights = panels(low, high, count)
        return nodes.reshape(-1, 1), weights.reshape(-1).log()
    fine = torch.linspace(*ends[1], 257, dtype=torch.float64)

    def any_alive(t: Tensor) -> Tensor:
        pairs = torch.stack([t.reshape(-1, 1).expand(-1, len(fine)), fine.expand(t.numel(), -1)], -1)
        return alive(pairs.reshape(-1, 2)).reshape(-1, len(fine)).any(1).reshape(t.shape)

    low, high = _edges(any_alive, *ends[0], torch.zeros(1))
    first, first_weights = (v.reshape(-1) for v in panels(low, high, count))

    def alive_given(t: Tensor) -> Tensor:  # (n, k): places of the second coordinate for every node of the first
        pairs = torch.stack([first[:, None].expand_as(t), t], -1)
        return alive(pairs.reshape(-1, 2)).reshape(t.shape)

    low, high = _edges(alive_given, *ends[1], first)
    second, second_weights = panels(low, high, count)
    nodes = torch.stack([first[:, None].expand_as(second), second], -1).reshape(-1, 2)
    return nodes, (first_weights[:, None] * second_weights).reshape(-1).log()


def _edges(alive: object, start: float, end: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place of an interval where the density is not 0, one pair for every entry of `like`."""
    scan = torch.linspace(start, end, 257, dtype=torch.float64)
    n = like.numel()
    found = alive(scan.expand(n, -1))  # type: ignore[operator]
    first = found.int().argmax(1)
    last = 256 - found.flip(1).int().argmax(1)
    step = scan[1] - scan[0]
    out = []
    for at, outward in ((first, -1), (last, 1)):
        inside = scan[at]
        beyond = (inside + outward * step).clamp(start, end)
        for _ in range(60):
            middle = (inside + beyond) / 2
            fine = alive(middle.reshape(n, 1)).reshape(n)  # type: ignore[operator]
            inside, beyond = torch.where(fine, middle, inside), torch.where(fine, beyond, middle)
        out.append(inside)
    return out[0], out[1]
