"""Where the nodes of a plate diagram stand: steepest descent over a grid, every move scored at once.

Nothing is drawn at random and nothing depends on the clock: the same graph gets the same picture.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .plates_cost import GAP, STEP, Array, Problem, boxes, cost

_TURNS = 60
_WORK = 100_000_000
_FAR = tuple((dx, dy) for dx in (-4, -3, -2, -1, 0, 1, 2, 3, 4) for dy in (-4, -2, -1, 0, 1, 2, 4) if dx or dy)
_NEAR = tuple((dx, dy) for dx in (-2, -1, 0, 1, 2) for dy in (-2, 0, 2) if dx or dy)


def arrange(problem: Problem) -> tuple[Array, Array]:
    """Centres of the nodes, (n, 2), and rectangles of the plates, (p, 4), in inches with y pointing down."""
    n, m = len(problem.half), len(problem.edges)
    if n == 0:
        return np.zeros((0, 2)), np.zeros((0, 4))
    starts = list(_starts(problem))
    work = 20 * (n + m) * (n * n + n * m + m * m)  # moves a turn, times what each costs
    turns = min(_TURNS, max(1, _WORK // (work * (len(starts) + 1))))
    found = [_descend(problem, start, turns, _NEAR) for start in starts]
    grid = min(found, key=lambda f: f[1])[0]
    grid, _ = _descend(problem, grid, turns, _FAR if n <= 20 else _NEAR)
    xy = (grid - grid.min(0)) * STEP
    return xy, boxes(problem, xy[None, :, 0], xy[None, :, 1])[0]


def _ranks(problem: Problem) -> tuple[Array, Array]:
    """Longest path from a root, and the same with roots pulled down to their children."""
    n = len(problem.half)
    early = np.zeros(n, int)
    forward = [(a, b) for (a, b), c in zip(problem.edges, problem.chained, strict=True) if not c]
    for _ in range(n):
        for a, b in forward:
            early[b] = max(early[b], min(early[a] + 1, n))
    for family in set(problem.families[problem.families >= 0]):
        early[problem.families == family] = early[problem.families == family].max()
    late = early.copy()
    for _ in range(n):
        for a in range(n):
            children = [late[b] for p, b in forward if p == a]
            if children and problem.families[a] < 0:
                late[a] = min(children) - 1
    return early, late - late.min()


def _starts(problem: Problem) -> Iterator[Array]:
    """Layers with plates side by side; a chain in rows; and each set of plates in columns of its own.

    In the last one no node stands in a plate of others, unless three plates cross.
    """
    n = len(problem.half)
    early, late = _ranks(problem)
    key = [tuple(i for i, p in enumerate(problem.plates) if node in p) for node in range(n)]
    order = sorted(range(n), key=lambda i: (key[i] != (), key[i], late[i], i))
    width = max(2, int(np.ceil((2 * problem.half[:, 0].max() + GAP) / STEP)))
    chain = problem.steps >= 0
    for rank in (late, early):
        grid = np.zeros((n, 2))
        grid[:, 1] = 2 * rank
        for level in set(rank):
            row = [i for i in order if rank[i] == level]
            grid[row, 0] = width * (np.arange(len(row)) - (len(row) - 1) / 2).round()
        grid[chain, 0] = problem.pitch * problem.steps[chain]
        yield grid
    if chain.any():
        yield _around_chain(problem, 2 * early)
    grid, column = np.zeros((n, 2)), 0
    grid[:, 1] = 2 * late
    for group in dict.fromkeys(key[i] for i in order):
        used: dict[int, int] = {}
        for i in order:
            if key[i] == group:
                grid[i, 0] = width * (column + used.get(late[i], 0))
                used[late[i]] = used.get(late[i], 0) + 1
        column += max(used.values())
    yield grid


def _around_chain(problem: Problem, y: Array) -> Array:
    """Families in rows; what each depends on above the first row, or below the last one, at the right."""
    chain = problem.steps >= 0
    grid = np.stack([float(problem.pitch) * np.maximum(problem.steps, 0), y], 1).astype(float)
    rows = sorted({y[i] for i in np.flatnonzero(chain)})
    count = {-1: 0, 1: 0}
    for node in np.flatnonzero(~chain):
        children = [b for a, b in problem.edges if a == node and chain[b]]
        if children and all(problem.steps[b] == 0 for b in children):
            grid[node] = grid[children[0]] + np.array([0, -2])
            continue
        low = len(rows) > 1 and children and min(y[b] for b in children) > rows[0]
        side = 1 if low else -1
        grid[node] = 4 * problem.pitch + 2 * count[side], (rows[-1] if low else rows[0]) + 2 * side
        count[side] += 1
    return grid


def _descend(problem: Problem, grid: Array, turns: int, steps: Sequence[tuple[float, float]]) -> tuple[Array, float]:
    best = float(cost(problem, grid[None])[0])
    for _ in range(turns):
        moves = _moves(problem, grid, steps)
        costs = cost(problem, moves)
        i = int(np.argmin(costs))
        if costs[i] >= best - 1e-9:
            break
        grid, best = moves[i], float(costs[i])
    return grid, best


def _moves(problem: Problem, grid: Array, steps: Sequence[tuple[float, float]]) -> Array:
    """Neighbouring layouts: nodes, pairs, rows of a chain, plates and halves of the picture moved."""
    n = len(grid)
    found: list[Array] = []

    def shift(members: Sequence[int] | Array, by: Sequence[tuple[float, float]]) -> None:
        moved = np.repeat(grid[None], len(by), 0)
        moved[:, members] += np.asarray(by, float)[:, None, :]
        found.append(moved)

    for i in range(n):
        shift([i], steps)
    groups = {tuple(sorted(p)) for p in problem.plates}
    groups |= {tuple(np.flatnonzero(problem.families == f)) for f in set(problem.families[problem.families >= 0])}
    groups |= {tuple(np.flatnonzero(problem.steps >= 0))} if (problem.steps >= 0).any() else set()
    for group in sorted(groups):
        if 1 < len(group) < n:
            shift(list(group), steps)
            mirrored = grid.copy()
            mirrored[list(group), 0] = 2 * grid[list(group), 0].mean() - grid[list(group), 0]
            found.append(np.round(mirrored)[None])
    for axis in (0, 1):
        for cut in np.unique(grid[:, axis])[1:]:
            for by in (-2, -1, 1, 2):
                shift(np.flatnonzero(grid[:, axis] >= cut), [(by, 0) if axis == 0 else (0, by)])
    if n <= 24:
        first, second = np.triu_indices(n, 1)
        swapped = np.repeat(grid[None], len(first), 0)
        rows = np.arange(len(first))
        swapped[rows, first], swapped[rows, second] = grid[second], grid[first]
        found.append(swapped)
    for a, b in problem.edges:  # straight above, beside, across the corner
        for away in ((0, -2), (0, 2), (2, 0), (-2, 0), (2, 2), (-2, 2), (2, -2), (-2, -2)):
            moved = grid.copy()
            moved[a] = grid[b] + np.array(away)
            found.append(moved[None])
    return np.concatenate(found)
