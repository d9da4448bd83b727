"""Where EM starts: k-means++ clusters where latents have observed children, else the story's guide or its prior.

Where rows bring covariates, clusters of values alone always cut the same way; every other start is clusters about planes.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import one_hot

from ...data import some_rows
from ...handlers import unwrap
from ...joint import LogJoint
from ...lazy_rows import CELLS, LEAST, affordable
from .estep import Expectation, Part, accumulate, lift, read_slots
from .plan import Plan
from .terms import Term

#: Latent -> labels of the rows, (R, rows).
Clusters = dict[str, Tensor]

#: Rows that are clustered, and sweeps of Lloyd's algorithm over them.
SAMPLE, SWEEPS = 8_000, 30
#: Clusterings among which different ones are looked for, for every one that is wanted, and rows beyond which it is too dear.
CANDIDATES, MANY = 4, 5_000
#: Share of a row that is spread over all states at the start: a class that no row of a cluster shows stays possible.
SOFT = 0.05
#: Sweeps of clusterwise regression, most covariates that it looks at, and its ridge per row.
PLANE_SWEEPS, PLANE_COLUMNS, PLANE_RIDGE = 12, 20, 1e-3
#: Entries of the largest table of distances.
DISTANCES = 4_000_000


def sample_rows(joint: LogJoint, seed: int, width: int = 1) -> Tensor | None:
    """Numbers of the rows that are clustered, among those of all ranks; None where rows cannot be told apart.

    `width`: numbers of a row that become dense only to be clustered.
    """
    n = joint.structure.num_rows and joint.problem.all_rows
    if not n or not joint.structure.row_arguments:
        return None
    most = min(affordable(joint.problem.kwargs, SAMPLE), max(LEAST, CELLS // width))
    if n <= most:
        return torch.arange(n, device="cpu")
    return some_rows(n, most, torch.Generator().manual_seed(seed)).sort().values


def children_tables(joint: LogJoint, kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """Finite local latent -> table (rows, columns) of its observed children, standardised, or None."""
    structure, finite = joint.structure, set(joint.finite)
    n = structure.num_rows
    if not n or n < 2 or not finite:
        return None
    if any(len(structure[name].plates) != 1 or not structure[name].local for name in finite):
        return None
    with poutine.block(), pyro.validation_enabled(False):
        trace: Any = poutine.trace(poutine.condition(joint.problem.model, data=joint.prior_draw())).get_trace(**kwargs)
    tables = {}
    for name in joint.finite:
        children = [
            s.name
            for s in structure.observed
            if finite.intersection(s.parents) == {name} and s.plates == structure[name].plates
        ]
        if not children:
            return None
        # On the processor: steps are many and small, and starts are the same whatever the device.
        tables[name] = torch.cat([standardised(trace.nodes[c]) for c in children], 1).cpu()
    return tables


def standardised(node: dict) -> Tensor:
    """One observed site as real columns of unit variance; classes become indicators that count as one column together."""
    value, fn = node["value"], unwrap(node["fn"])
    rows = max(value.shape[: max(1, value.dim() - node["fn"].event_dim)])
    share = 1.0
    if isinstance(fn, torch.distributions.Categorical):
        value, share = one_hot(value.long(), fn._num_events), fn._num_events**-0.5
    table = value.reshape(rows, -1).double()
    table = torch.where(table.isnan(), table.nanmean(0), table)
    return share * (table - table.mean(0)) / table.std(0, correction=0).clamp_min(1e-12)


def clusters(joint: LogJoint, kwargs: dict[str, Any], runs: int, seed: int, number: int = 0) -> Clusters | None:
    """Labels (R, rows) for every finite local latent from k-means on its observed children, or None.

    `number` is that of the first run: runs with odd numbers are clusters about planes where rows bring covariates.
    Latents with the same number of states and children of the same width (the steps of a chain) share one clustering.
    """
    tables = children_tables(joint, kwargs)
    if tables is None:
        return None
    groups: dict[tuple[int, int], list[str]] = {}
    for name, table in tables.items():
        groups.setdefault((joint.structure[name].states or 1, table.shape[1]), []).append(name)
    labels: Clusters = {}
    generator = torch.Generator().manual_seed(seed)
    for (states, _), members in groups.items():
        table = torch.cat([tables[m] for m in members])
        rows = len(table) // len(members)
        chosen = torch.arange(len(table), device=table.device)
        if len(table) > SAMPLE:  # chains: one clustering of all steps is learned from some
            chosen = torch.randperm(len(table), generator=generator, device="cpu")[:SAMPLE]
        found = nearest(table, distinct(table[chosen], states, runs, generator))
        planes = covariate_table(joint, kwargs, rows) if len(members) == 1 and states > 1 else None
        odd = [r for r in range(runs) if (number + r) % 2]
        if planes is not None and odd:
            found[odd] = about_planes(planes, table, states, len(odd), generator)
        for i, name in enumerate(members):
            labels[name] = found[:, i * rows : (i + 1) * rows].to(joint.problem.device)
    return labels


def covariate_table(joint: LogJoint, kwargs: dict[str, Any], rows: int) -> Tensor | None:
    """What is known of the rows beside the observed values, (rows, columns) of unit variance, or None."""
    seen = {s.argument for s in joint.structure.observed}
    columns = []
    for name in joint.structure.row_arguments:
        value = kwargs[name]
        if name not in seen and isinstance(value, Tensor) and len(value) == rows:
            table = value.reshape(rows, -1).double()
            columns.append(table[:, table.std(0, correction=0) > 0])
    table = torch.cat(columns, 1)[:, :PLANE_COLUMNS] if columns else torch.empty(rows, 0)
    return (table - table.mean(0)) / table.std(0, correction=0) if table.shape[1] else None


def about_planes(x: Tensor, y: Tensor, k: int, runs: int, generator: torch.Generator) -> Tensor:
    """Labels (R, rows) of k planes through covariates x (rows, C) and values y (rows, D), from random planes.

    Clusterwise linear regression (Spaeth, Computing 22, 1979): every row goes to the plane that is nearest to its value,
    every plane to the least squares of its rows.
    """
    n = len(x)
    x = x.to(y)
    x = torch.cat([x.new_ones(n, 1), x], 1)
    width = x.shape[1]
    slope = torch.randn(runs, k, width, y.shape[1], generator=generator, dtype=y.dtype, device=y.device)
    slope *= (width - 1) ** -0.5
    slope[:, :, 0] *= 0.5
    labels = torch.zeros(runs, n, dtype=torch.long, device=y.device)
    ridge = PLANE_RIDGE * n * torch.eye(width, dtype=y.dtype, device=y.device)
    for _ in range(PLANE_SWEEPS):
        for r in range(runs):  # one run at a time: the distances of all runs at once would be a large table
            labels[r] = (y - x @ slope[r]).square().sum(-1).argmin(0)
            hot = one_hot(labels[r], k).to(y)
            square = torch.einsum("nk,nc,nd->kcd", hot, x, x) + ridge
            slope[r] = torch.linalg.solve(square, torch.einsum("nk,nc,nd->kcd", hot, x, y))
    return labels


def distinct(x: Tensor, k: int, runs: int, generator: torch.Generator) -> Tensor:
    """Centres (R, k, D) of R clusterings, different ones as far as more tries than R find any."""
    tries = runs if runs == 1 or len(x) > MANY else CANDIDATES * runs
    centres = lloyd(x, plus_plus(x, k, tries, generator))
    if tries == runs:
        return centres
    inertia = torch.stack([torch.cdist(x, c).amin(1).square().sum() for c in centres])
    seen: set[str] = set()
    first: list[int] = []
    again: list[int] = []
    for i, value in enumerate(inertia.tolist()):
        key = f"{value:.6g}"
        (again if key in seen else first).append(i)
        seen.add(key)
    return centres[sorted([*first, *again][:runs])]


def plus_plus(x: Tensor, k: int, runs: int, generator: torch.Generator) -> Tensor:
    """Centres (R, k, D) by greedy k-means++ for R runs at once (Arthur and Vassilvitskii, SODA 2007).

    Each new centre is the best of 2 + log k rows drawn with probability proportional to their squared distance.
    """
    n, tries = len(x), 2 + int(math.log(k))
    squares = (x * x).sum(1)
    first = torch.randint(n, (runs,), generator=generator, device="cpu")
    centres = x[first].unsqueeze(1).repeat(1, k, 1)
    distance = (squares + squares[first][:, None] - 2 * x[first] @ x.T).clamp_min(0)
    for i in range(1, k):
        mass = distance.cumsum(1)
        u = torch.rand(runs, tries, generator=generator, dtype=x.dtype, device="cpu") * mass[:, -1:]
        rows = torch.searchsorted(mass, u).clamp_max(n - 1)
        flat = rows.reshape(-1)
        new = (squares + squares[flat][:, None] - 2 * x[flat] @ x.T).clamp_min(0).view(runs, tries, n)
        new = torch.minimum(new, distance[:, None])
        best = new.sum(2).argmin(1)
        every = torch.arange(runs, device=x.device)
        distance = new[every, best]
        centres[:, i] = x[rows[every, best]]
    return centres


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre, (R, rows)."""
    runs, k, width = centres.shape
    half = 0.5 * (centres * centres).sum(-1).reshape(1, -1)
    found = []
    for part in x.split(max(1, DISTANCES // (runs * k))):
        score = part @ centres.reshape(-1, width).T - half
        found.append(score.view(len(part), runs, k).argmax(-1).T)
    return torch.cat(found, 1)


def lloyd(x: Tensor, centres: Tensor) -> Tensor:
    """Centres after Lloyd's sweeps, all runs at once; empty clusters stay where they are."""
    runs, k, width = centres.shape
    labels: Tensor | None = None
    for _ in range(SWEEPS):
        new = nearest(x, centres)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        flat = labels + k * torch.arange(runs, device=x.device).unsqueeze(1)
        total = x.new_zeros(runs * k, width)
        if runs * len(x) <= DISTANCES // max(1, width):
            total.index_add_(0, flat.reshape(-1), x.expand(runs, *x.shape).reshape(-1, width))
        else:
            for r in range(runs):
                total.index_add_(0, flat[r], x)
        count = torch.bincount(flat.reshape(-1), minlength=runs * k).to(x)
        mean = total / count.clamp_min(1).unsqueeze(1)
        centres = torch.where((count > 0).unsqueeze(1), mean, centres.reshape(-1, width)).view(runs, k, width)
    return centres


def expectation_at(
    joint: LogJoint, plan: Plan, theta: dict[str, Tensor], kwargs: dict[str, Any], labels: dict[str, Tensor]
) -> Expectation:
    """Statistics as if the latents of the given rows had the labels (rows,), for one run."""
    plate = joint.structure.data_plate
    stats: dict[str, Any] = {}
    soft = softness([t for t in plan.terms.values() if t.name not in joint.finite])
    hot = {n: softened(v, joint.structure[n].states or 1, soft).to(joint.problem.dtype) for n, v in labels.items()}
    part = Part(kwargs)
    with torch.no_grad():
        trace, names = joint.trace(theta, kwargs)
        inside = [f for f in joint.factors_of(trace, names) if f.name not in theta]
        slots = read_slots(plan, trace, names)
        weights = [weight_of(f.value, f.dims, hot, plate or "") for f in inside]
        accumulate(plan, part, trace, names, inside, weights, stats)
    return lift(-math.inf, -math.inf, stats, slots, [part], joint)


def softness(observed: list[Term]) -> float:
    """Normals may start from hard labels: no value is impossible under them."""
    return 0.0 if all("loc" in t.roles for t in observed) else SOFT


def softened(labels: Tensor, states: int, soft: float) -> Tensor:
    """Labels (...) as probabilities (..., states), a share `soft` of each spread over all states."""
    return one_hot(labels, states) * (1 - soft) + soft / states


def weight_of(like: Tensor, dims: tuple[str, ...], hot: dict[str, Tensor], plate: str) -> Tensor:
    """Product of the labels of the latents that a factor involves, over the factor's own dimensions."""
    weight = torch.ones_like(like)
    for name in dims:
        if name in hot:
            soft = hot[name]
            shape = [1] * len(dims)
            shape[dims.index(name)] = soft.shape[1]
            if plate in dims:
                shape[dims.index(plate)] = len(soft)
                soft = soft if dims.index(plate) < dims.index(name) else soft.T
            else:
                soft = soft.mean(0)
            weight = weight * soft.reshape(shape)
    return weight


def few_kwargs(joint: LogJoint, rows: Tensor | None) -> dict[str, Any]:
    """Arguments with these rows only."""
    kwargs = joint.problem.kwargs
    if rows is None or len(rows) == joint.structure.num_rows:
        return kwargs
    return joint.problem.ranks.rows(kwargs, joint.structure.row_arguments, rows)
