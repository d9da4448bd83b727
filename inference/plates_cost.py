"""How pleasing a plate diagram is: nodes apart, plates around their members, short arrows."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Array = np.ndarray

#: Grid, in inches; nodes in a row or column usually stand two steps apart.
STEP = 0.46
GAP = 0.2
_PAD, _NEST, _LABEL = 0.17, 0.12, 0.24
_FORBIDDEN, _THROUGH, _CROSSING = 400.0, 40.0, 9.0


@dataclass(frozen=True)
class Problem:
    """A graph to lay out; sizes in inches, y pointing down.

    Attributes
    ----------
    half
        Half widths and heights of the nodes, (n, 2).
    edges
        Pairs (parent, child), (m, 2).
    chained
        Whether an edge joins two steps of a chain, (m,).
    light
        Whether a node is a parameter or an input, (n,); `loose`: whether an edge has no direction, (m,).
    plates
        Members of each plate, outer plates before inner ones.
    labels
        Widths of the plates' labels, (p,).
    steps
        Step of a node in a chain, -1 outside, (n,); `families`: a number for each family, -1 outside.
    pitch
        From one step of a chain to the next, in steps of the grid.
    """

    half: Array
    edges: Array
    chained: Array
    light: Array
    loose: Array
    plates: tuple[frozenset[int], ...]
    labels: Array
    steps: Array
    families: Array
    pitch: int = 2

    @cached_property
    def inner(self) -> tuple[tuple[int, ...], ...]:
        """Plates that lie within each plate."""
        plates = list(enumerate(self.plates))
        return tuple(tuple(j for j, q in plates if j != i and (q < p or (q == p and j > i))) for i, p in plates)

    def cross(self, i: int, j: int) -> bool:
        """Whether two plates overlap and neither holds the other."""
        p, q = self.plates[i], self.plates[j]
        return bool(p & q) and not p <= q and not q <= p

    @cached_property
    def extra(self) -> tuple[float, ...]:
        """Plates that cross would share a border line: later ones stand a little wider."""
        return tuple(0.09 * sum(self.cross(i, j) for j in range(i)) for i in range(len(self.plates)))

    @cached_property
    def above(self) -> tuple[bool, ...]:
        """Whether the label is at the top: where fewer arrows pass, or apart from a crossing plate's."""
        found = []
        for i, p in enumerate(self.plates):
            leaving = sum(a in p and b not in p for a, b in self.edges)
            entering = sum(b in p and a not in p for a, b in self.edges)
            found.append(leaving > entering or any(self.cross(i, j) for j in range(i)))
        return tuple(found)

    @cached_property
    def near(self) -> Array:
        """Whether the ends of an edge share a plate, (m,)."""
        return np.array([any(a in p and b in p for p in self.plates) for a, b in self.edges], bool)


def boxes(problem: Problem, x: Array, y: Array) -> Array:
    """Rectangles of the plates around their members and inner plates.

    Parameters
    ----------
    x, y
        Centres of the nodes, (b, n).

    Returns
    -------
    array
        Left, top, right, bottom, (b, p, 4).
    """
    result = np.zeros((x.shape[0], len(problem.plates), 4))
    for i in reversed(range(len(problem.plates))):
        members = sorted(problem.plates[i])
        hw, hh = problem.half[members, 0], problem.half[members, 1]
        pad = _PAD + problem.extra[i]
        left, right = (x[:, members] - hw).min(1) - pad, (x[:, members] + hw).max(1) + pad
        top, bottom = (y[:, members] - hh).min(1) - pad, (y[:, members] + hh).max(1) + pad
        for j in problem.inner[i]:
            left, right = (
                np.minimum(left, result[:, j, 0] - _NEST),
                np.maximum(right, result[:, j, 2] + _NEST),
            )
            top, bottom = np.minimum(top, result[:, j, 1] - _NEST), np.maximum(bottom, result[:, j, 3] + 0.04)
        missing = np.maximum(problem.labels[i] + 0.2 - (right - left), 0) / 2
        strip = _LABEL - 0.06
        over, under = (strip, 0.0) if problem.above[i] else (0.0, strip)
        result[:, i] = np.stack([left - missing, top - over, right + missing, bottom + under], 1)
    return result


def cost(problem: Problem, grids: Array) -> Array:
    """Total displeasure with each layout of (b, n, 2): what must not be outweighs what should not."""
    x, y = grids[..., 0] * STEP, grids[..., 1] * STEP
    box = boxes(problem, x, y)
    cost = _overlaps(problem, x, y) + _plate_faults(problem, x, y, box)
    cost += 0.5 * np.ptp(x, axis=1) + 0.35 * np.ptp(y, axis=1)
    for axis, each in ((x, 0.35), (y, 0.7)):  # few columns, fewer rows
        cost += each * (np.diff(np.sort(axis, 1), axis=1) > 1e-9).sum(1)
    cost += _chain_costs(problem, x, y)
    if len(problem.plates):
        cost += 0.35 * (box[..., 2] - box[..., 0] + box[..., 3] - box[..., 1]).sum(1)
    if len(problem.edges):
        cost += _edge_costs(problem, x, y) + _edge_faults(problem, x, y, box)
    return cost


def _overlaps(problem: Problem, x: Array, y: Array) -> Array:
    i, j = np.triu_indices(x.shape[1], 1)
    dx, dy = x[:, i] - x[:, j], y[:, i] - y[:, j]
    ox = problem.half[i, 0] + problem.half[j, 0] + GAP - np.abs(dx)
    oy = problem.half[i, 1] + problem.half[j, 1] + GAP - np.abs(dy)
    hit = (ox > 0) & (oy > 0)
    told = 0.12 * ((dy == 0) & (dx > 0))  # earlier sites to the left
    return (hit * _FORBIDDEN * (1 + np.minimum(ox, oy)) + told).sum(1)


def _plate_faults(problem: Problem, x: Array, y: Array, box: Array) -> Array:
    cost = np.zeros(len(x))
    for i, members in enumerate(problem.plates):
        others = [k for k in range(x.shape[1]) if k not in members]
        if others:
            hw, hh = problem.half[others, 0] + 0.1, problem.half[others, 1] + 0.1
            ox = np.minimum(x[:, others] + hw - box[:, i, :1], box[:, i, 2:3] - x[:, others] + hw)
            oy = np.minimum(y[:, others] + hh - box[:, i, 1:2], box[:, i, 3:4] - y[:, others] + hh)
            cost += (((ox > 0) & (oy > 0)) * _FORBIDDEN * (1 + np.minimum(ox, oy))).sum(1)
        for j in range(i):
            if not members & problem.plates[j]:
                ox = np.minimum(box[:, i, 2], box[:, j, 2]) - np.maximum(box[:, i, 0], box[:, j, 0]) + 0.12
                oy = np.minimum(box[:, i, 3], box[:, j, 3]) - np.maximum(box[:, i, 1], box[:, j, 1]) + 0.12
                cost += ((ox > 0) & (oy > 0)) * _FORBIDDEN * (1 + np.minimum(ox, oy))
    return cost


def _chain_costs(problem: Problem, x: Array, y: Array) -> Array:
    """A family in a row, a step in a column."""
    cost = np.zeros(len(x))
    inside = np.flatnonzero(problem.steps >= 0)
    for i in inside:
        for j in inside[inside > i]:
            if problem.families[i] == problem.families[j]:
                cost += 14 * np.abs(y[:, i] - y[:, j])
            apart = problem.pitch * STEP * (problem.steps[j] - problem.steps[i])
            cost += 16 * np.abs(x[:, j] - x[:, i] - apart)
    others = np.flatnonzero(problem.steps < 0)
    if len(inside) and len(others):  # nobody stands between the steps
        between = np.ones((len(x), len(others)), bool)
        for axis in (x, y):
            low, high = axis[:, inside].min(1)[:, None], axis[:, inside].max(1)[:, None]
            between &= (axis[:, others] > low - 1e-9) & (axis[:, others] < high + 1e-9)
        cost += 15 * between.sum(1)
    return cost


def _edge_costs(problem: Problem, x: Array, y: Array) -> Array:
    """Short, upright arrows; children below the middle of their parents; chains from left to right."""
    a, b = problem.edges.T
    dx, dy = x[:, b] - x[:, a], y[:, b] - y[:, a]
    has_parents = np.isin(a, b)
    upward = np.where(problem.loose, 0.0, np.where(has_parents, 25.0, 4.0)) * (dy < 0)
    sideways = np.where(problem.light[a], 0.2, np.where(problem.loose, 0.0, np.where(problem.near, 2.4, 0.6)))
    flat = sideways * (dy == 0)
    slanted = 0.9 * ((dx != 0) & (dy != 0)) + 0.5 * np.minimum(np.abs(dx), np.abs(dy))
    length = np.hypot(dx, dy)
    usual = upward + flat + slanted + 0.6 * length + 0.35 * length**2
    chained = 12 * np.abs(dy) + 30 * (dx <= 0) + 2 * np.abs(dx - problem.pitch * STEP)
    cost = np.where(problem.chained, chained, usual).sum(1)
    for ends, starts in ((b, a), (a, b)):
        for node in np.unique(ends):
            around = starts[(ends == node) & ~problem.chained]
            if len(around) > 1:
                cost += 0.25 * (x[:, around].mean(1) - x[:, node]) ** 2
    return cost


def _edge_faults(problem: Problem, x: Array, y: Array, box: Array) -> Array:
    """Arrows through other nodes, across each other and across plates they have no business in."""
    a, b = problem.edges.T
    ax, ay, bx, by = x[:, a], y[:, a], x[:, b], y[:, b]
    cost = np.zeros(len(x))
    for k in range(x.shape[1]):
        away = (a != k) & (b != k)
        hw, hh = problem.half[k] + 0.07
        ux, uy = (ax[:, away] - x[:, k : k + 1]) / hw, (ay[:, away] - y[:, k : k + 1]) / hh
        vx, vy = (bx[:, away] - x[:, k : k + 1]) / hw - ux, (by[:, away] - y[:, k : k + 1]) / hh - uy
        t = np.clip(-(ux * vx + uy * vy) / np.maximum(vx**2 + vy**2, 1e-9), 0, 1)
        near = (ux + t * vx) ** 2 + (uy + t * vy) ** 2
        cost += _THROUGH * (near < 1).sum(1)
    i, j = np.triu_indices(len(a), 1)
    free = (a[i] != a[j]) & (a[i] != b[j]) & (b[i] != a[j]) & (b[i] != b[j])
    i, j = i[free], j[free]

    def side(px: Array, py: Array, qx: Array, qy: Array, rx: Array, ry: Array) -> Array:
        return np.sign((qx - px) * (ry - py) - (qy - py) * (rx - px))

    first = side(ax[:, i], ay[:, i], bx[:, i], by[:, i], ax[:, j], ay[:, j])
    second = side(ax[:, i], ay[:, i], bx[:, i], by[:, i], bx[:, j], by[:, j])
    third = side(ax[:, j], ay[:, j], bx[:, j], by[:, j], ax[:, i], ay[:, i])
    fourth = side(ax[:, j], ay[:, j], bx[:, j], by[:, j], bx[:, i], by[:, i])
    cost += _CROSSING * ((first * second < 0) & (third * fourth < 0)).sum(1)
    for p, members in enumerate(problem.plates):
        foreign = np.array([s not in members and t not in members for s, t in problem.edges])
        if foreign.any():
            cost += 12 * crosses(ax[:, foreign], ay[:, foreign], bx[:, foreign], by[:, foreign], box[:, p]).sum(1)
        faults = []
        for label in label_places(problem, p, box):
            hit = 3.0 * crosses(ax, ay, bx, by, label).sum(1)
            for q in range(len(problem.plates)):
                if problem.cross(p, q):
                    other = box[:, q]
                    meets = (label[:, 0] < other[:, 2]) & (other[:, 0] < label[:, 2])
                    hit += 60.0 * (meets & (label[:, 1] < other[:, 3]) & (other[:, 1] < label[:, 3]))
            faults.append(hit)
        cost += np.min(faults, axis=0)
    return cost


def label_places(problem: Problem, plate: int, box: Array) -> list[Array]:
    """Where a plate's label may stand: at the right, the left and the middle of its strip, (b, 4) each."""
    left, top, right, bottom = (box[:, plate, k] for k in range(4))
    width, strip = problem.labels[plate], _LABEL - 0.02
    over = problem.above[plate]
    low, high = (top, top + strip) if over else (bottom - strip, bottom)
    starts = (right - width - 0.08, left + 0.08, (left + right - width) / 2)
    return [np.stack([start, low, start + width, high], 1) for start in starts]


def crosses(ax: Array, ay: Array, bx: Array, by: Array, box: Array) -> Array:
    """Whether segments (b, m) meet rectangles (b, 4): the interval of the segment inside each slab."""
    low, high = np.zeros_like(ax), np.ones_like(ax)
    for start, end, near, far in ((ax, bx, 0, 2), (ay, by, 1, 3)):
        along = np.where(np.abs(end - start) < 1e-12, 1e-12, end - start)
        t, u = (box[:, near, None] - start) / along, (box[:, far, None] - start) / along
        low, high = np.maximum(low, np.minimum(t, u)), np.minimum(high, np.maximum(t, u))
    return low < high
