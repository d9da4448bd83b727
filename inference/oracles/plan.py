"""How an integral over many coordinates falls apart into integrals over few: found on the density, not read in the story.

Two coordinates are coupled where changing one changes what the other does to the log density, in some joint state of the
discrete latents.  Given the coordinates of some sites (the outer ones) the others fall into groups that are not coupled, each
a factor of the integral.  In a group, coordinates in which the log density is quadratic, whatever the others are, are
integrated by Gaussian algebra.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .density import Density

#: Evaluations of the log density that one integral may cost.
MOST_NODES = 6_000_000
#: Evaluations beyond which other coordinates are tried.
DEAR = 500_000
#: Coordinates of one group, or outer ones, that a grid may have.
MOST_GRID = 4


@dataclass(frozen=True)
class Group:
    """Coordinates that are integrated together: `grid` node by node, `gaussian` by algebra at every node."""

    grid: tuple[int, ...]
    gaussian: tuple[int, ...] = ()

    @property
    def members(self) -> tuple[int, ...]:
        return (*self.grid, *self.gaussian)


@dataclass(frozen=True)
class Plan:
    """`outer` coordinates first; given each of their nodes, every group by itself.

    `jumps`: the density falls to 0 within the space of coordinates, and the edge has to be found.
    """

    outer: tuple[int, ...]
    groups: tuple[Group, ...]
    jumps: bool = False

    def cost(self, nodes: int = 40) -> float:
        """Evaluations at so many nodes a coordinate."""
        return float(nodes) ** len(self.outer) * max(1.0, sum(float(nodes) ** len(g.grid) for g in self.groups))

    @property
    def order(self) -> int:
        """Coordinates that the number of evaluations grows with."""
        return len(self.outer) + max([0, *(len(g.grid) for g in self.groups)])

    @property
    def widest(self) -> int:
        return max([len(self.outer), *(len(g.grid) for g in self.groups)])


def probes(density: Density, count: int, spread: float, seed: int) -> Tensor:
    """Points around the anchor, (count, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return density.anchor + spread * torch.randn(count, density.dim, generator=generator, dtype=torch.float64)


def couplings(density: Density) -> tuple[Tensor, bool]:
    """(dim, dim) which coordinates are coupled, and whether the density vanishes somewhere."""
    d = density.dim
    coupled = torch.zeros(d, d, dtype=torch.bool)
    jumps = False
    pairs = list(itertools.combinations(range(d), 2))
    for seed, spread in enumerate((0.3, 1.0, 1.0, 3.0, 1.0, 1.0)):
        base, other = probes(density, 2, spread, seed)
        if seed >= 4:  # around the origin, too: a draw of the prior may lie where nothing moves the density any more
            base, other = base - density.anchor, other - density.anchor
        points = [base]
        for i in range(d):
            points.append(torch.where(torch.arange(d) == i, other, base))
        for i, j in pairs:
            which = (torch.arange(d) == i) | (torch.arange(d) == j)
            points.append(torch.where(which, other, base))
        f = density.log_joint(torch.stack(points))
        jumps = jumps or bool((f == -torch.inf).any())
        zero, single, double = f[:, :1], f[:, 1 : d + 1], f[:, d + 1 :]
        if not pairs:
            continue
        i, j = torch.tensor(pairs).T
        left, right = double - single[:, j], single[:, i] - zero
        size = 1 + torch.stack(
            [double.abs(), zero.abs().expand_as(double), single[:, i].abs(), single[:, j].abs()]
        ).amax(0)
        differ = (left - right).abs() > 1e-9 * size
        vanished = torch.isinf(double) != (torch.isinf(single[:, i]) | torch.isinf(single[:, j]))
        sure = (
            torch.isfinite(double) & torch.isfinite(zero) & torch.isfinite(single[:, i]) & torch.isfinite(single[:, j])
        )
        found = torch.where(sure, differ, vanished & torch.isfinite(zero)).any(0)
        coupled[i, j] |= found
        coupled[j, i] |= found
    return coupled, jumps


def value_ties(density: Density) -> Tensor:
    """(entries, dim): which coordinates each entry of the latents' values depends on."""
    base, other = probes(density, 2, 1.0, 7)
    points = [base, *(torch.where(torch.arange(density.dim) == i, other, base) for i in range(density.dim))]
    values = density.values(torch.stack(points))
    return (values[1:] != values[:1]).T


def real_coordinates(density: Density) -> set[int]:
    """Coordinates of latents that are linear in them."""
    a, b = probes(density, 2, 1.0, 11)
    values = density.values(torch.stack([a, b, 2 * a - b]))
    straight = (values[2] - (2 * values[0] - values[1])).abs() <= 1e-12 * (1 + values.abs().amax(0))
    return {i for place in density.places.values() if bool(straight[place.entries].all()) for i in place.coordinates}


def components(coupled: Tensor, members: list[int]) -> list[list[int]]:
    """Connected components of some coordinates."""
    left, found = set(members), []
    while left:
        todo, group = [min(left)], []
        left -= set(todo)
        while todo:
            i = todo.pop()
            group.append(i)
            near = {j for j in left if coupled[i, j]}
            left -= near
            todo += sorted(near)
        found.append(sorted(group))
    return found


class Quadratic:
    """Which coordinates the log density is quadratic in, whatever the others are."""

    def __init__(self, density: Density) -> None:
        self.density, self.real = density, real_coordinates(density)
        self.known: dict[tuple[int, ...], bool] = {}
        points = torch.cat([probes(density, 2, 0.7, 21), probes(density, 2, 2.0, 22)])
        self.states = {n: v[:: max(1, len(v) // 6)] for n, v in density.states.items()}
        self.points = points

    def hessians(self, points: Tensor, members: tuple[int, ...]) -> Tensor:
        """(S, B, m, m)."""
        index = torch.tensor(members)

        def hessian(u: Tensor, s: dict[str, Tensor]) -> Tensor:
            def f(part: Tensor) -> Tensor:
                return self.density.tell(u.index_copy(0, index, part), s)[0]

            return torch.func.hessian(f)(u[index])

        return self.density.batch(hessian, points, self.states, width=len(members) ** 2)

    def holds(self, members: tuple[int, ...]) -> bool:
        """Whether second derivatives stay the same when these coordinates, and only these, move."""
        if members not in self.known:
            index, moved = torch.tensor(members), self.points.clone()
            shift = torch.linspace(-1.7, 2.3, len(members), dtype=torch.float64)
            moved[:, index] = moved[:, index] + shift
            here, there = self.hessians(self.points, members), self.hessians(moved, members)
            size = here.abs().amax((-1, -2), keepdim=True)
            same = bool(((here - there).abs() <= 1e-8 * (size + 1e-300)).all()) and bool(here.isfinite().all())
            self.known[members] = same and bool((torch.linalg.eigvalsh(-here) > 1e-10).all())
        return self.known[members]

    def largest(self, group: list[int]) -> tuple[int, ...]:
        """Coordinates of a group, site by site, that can all be integrated by algebra at once."""
        parts = []
        for place in self.density.places.values():
            part = [i for i in place.coordinates if i in group and i in self.real]
            levels = [i for i in part if place.turned and (i - place.start) % place.shape[-1] == 0]
            others = [i for i in part if i not in levels]
            parts += [tuple(some) for some in (levels, others) if some]
        best: tuple[int, ...] = ()
        for order in (sorted(parts, key=len, reverse=True), parts, parts[::-1]):
            chosen: tuple[int, ...] = ()
            for more in order:
                if self.holds(tuple(sorted((*chosen, *more)))):
                    chosen = tuple(sorted((*chosen, *more)))
            best = chosen if len(chosen) > len(best) else best
        return best


def make_plans(density: Density) -> list[Plan]:
    """Ways to integrate over all coordinates, the cheapest first.

    Where they are dear, levels and contrasts are tried for the coordinates of vectors: what goes through a softmax depends on
    contrasts only, and levels are then Gaussian.

    Raises
    ------
    ValueError
        Even the cheapest is too dear; the message tells which coordinates stay together.
    """
    plans = plans_as_they_are(density)
    real = real_coordinates(density)
    vectors = {p.name for p in density.places.values() if p.shape and p.shape[-1] > 1 and p.coordinates[0] in real}
    if plans[0].cost() * density.num_states > DEAR and vectors:
        density.turn(vectors)
        others = plans_as_they_are(density)
        if others[0].cost() < plans[0].cost():
            plans = others
        else:
            density.turn(set())
    refuse(density, plans[0])
    good = [p for p in plans if p.widest <= MOST_GRID and p.cost(12) * density.num_states <= MOST_NODES]
    return [p for p in good if p.cost() <= 50 * good[0].cost()][:3]


def plans_as_they_are(density: Density) -> list[Plan]:
    """Plans in the coordinates that the density has."""
    coupled, jumps = couplings(density)
    for row in value_ties(density):
        index = row.nonzero()[:, 0]
        coupled[index[:, None], index] = True
    if jumps:
        return [_jump_plan(density, coupled)]
    sites = list(density.places.values())
    quadratic = Quadratic(density)
    plans: list[Plan] = []
    for size in range(min(len(sites), 3) + 1):
        for outer_sites in itertools.combinations(sites, size):
            outer = tuple(i for place in outer_sites for i in place.coordinates)
            if len(outer) > MOST_GRID or (size and not outer):
                continue
            rest = [i for i in range(density.dim) if i not in outer]
            groups = []
            for members in components(coupled, rest):
                gaussian = quadratic.largest(members)
                groups.append(Group(tuple(i for i in members if i not in gaussian), gaussian))
            plans.append(Plan(outer, tuple(groups)))
        plans.sort(key=lambda plan: (plan.cost(), len(plan.outer)))
        if plans[0].widest <= 2 and plans[0].cost() * density.num_states <= MOST_NODES / 20:
            break
    return plans


def edges_shared(density: Density, coupled: Tensor, tries: int = 400) -> Tensor:
    """Coordinates are coupled, too, where two moves that the data survive one by one make them impossible together."""
    d, coupled = density.dim, coupled.clone()
    for i, j in itertools.combinations(range(d), 2):
        base = probes(density, tries, 0.5, 31)
        other = probes(density, tries, 2.0, 32)
        one, two = base.clone(), base.clone()
        one[:, i], two[:, j] = other[:, i], other[:, j]
        both = one.clone()
        both[:, j] = other[:, j]
        fine = [(density.log_joint(u) > -torch.inf)[0] for u in (base, one, two, both)]
        if bool((fine[0] & (fine[3] != (fine[1] & fine[2]))).any()):
            coupled[i, j] = coupled[j, i] = True
    return coupled


def _jump_plan(density: Density, coupled: Tensor) -> Plan:
    coupled = edges_shared(density, coupled)
    groups = tuple(Group(tuple(members)) for members in components(coupled, list(range(density.dim))))
    plan = Plan((), groups, jumps=True)
    if plan.widest > 2 or density.num_states > 1:
        raise ValueError(
            f"the density of the data falls to 0 at an edge that {plan.widest} coordinates share ({spelled(density, plan)}); "
            f"the oracle follows an edge in one or two: give it fewer columns, or hold some latents fixed"
        )
    return plan


def refuse(density: Density, plan: Plan) -> None:
    """Say what makes the story too big."""
    nodes = plan.cost(12) * density.num_states
    if plan.widest <= MOST_GRID and nodes <= MOST_NODES:
        return
    raise ValueError(
        f"the story leaves {density.dim} unconstrained coordinates and {density.num_states} joint states of discrete latents; "
        f"however they are taken apart, {plan.widest} coordinates have to be integrated together ({spelled(density, plan)}), "
        f"and a grid reaches {MOST_GRID} at {nodes:.2g} of {MOST_NODES:.2g} evaluations: give it fewer rows, columns or "
        f"components, or fix some latents with pyro.poutine.condition"
    )


def spelled(density: Density, plan: Plan) -> str:
    """The widest part of a plan by sites."""
    groups = [plan.outer, *(g.grid for g in plan.groups)]
    widest = max(groups, key=len)
    told = []
    for place in density.places.values():
        count = sum(i in widest for i in place.coordinates)
        told += [f"{count} of {place.name!r}"] if count else []
    return ", ".join(told)
