"""E-step: exact posterior weights of the finite latents by one contraction and one gradient, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...data import take_rows
from ...distributed import Ranks
from ...enumeration import LogFactor
from ...joint import LogJoint, factor_weights
from ...lazy_rows import affordable, pieces_of
from .families import Statistics
from .missing import expected_statistics
from .plan import Plan
from .terms import RUNS, Named, Term, parameters, prior_statistics, reduce, slots_of, values_of

#: Elements of the largest table in one chunk of rows.
CHUNK_ELEMENTS = 4_000_000
#: Rows below which a chunk costs more to start than to compute.
CHUNK_ROWS = 256

Slots = dict[str, dict[str, Named]]


@dataclass
class Part:
    """One chunk of rows: arguments, statistics of its values, and weights and parameters of the last E-step."""

    kwargs: dict[str, Any]
    values: dict[str, dict[str, Named]] = field(default_factory=dict)
    weights: dict[str, Named] = field(default_factory=dict)
    slots: Slots = field(default_factory=dict)


@dataclass
class Expectation:
    """What an E-step knows, for R runs at once.

    Attributes
    ----------
    objective, log_likelihood
        Log joint (log-likelihood plus log prior under MAP) and log-likelihood, (R,).
    stats
        Term -> summed sufficient statistics, R first.
    slots
        Term -> parameters at which they were computed; those that change with the unknowns have R first.
    parts
        Chunks, with weights where the M-step needs the rows again.
    """

    objective: Tensor
    log_likelihood: Tensor
    stats: dict[str, Statistics]
    slots: Slots
    parts: list[Part]


def make_parts(joint: LogJoint, plan: Plan | None = None) -> list[Part]:
    """Split the rows so that no table exceeds `CHUNK_ELEMENTS`; one part where rows cannot be split."""
    structure, kwargs = joint.structure, joint.problem.kwargs
    n = structure.num_rows
    whole = [Part(kwargs)]
    if plan is not None and any(t.rowwise for t in plan.terms.values()):
        return whole
    if not n or not structure.row_arguments or any(not s.local for s in structure.finite):
        return whole
    width = max(1.0, structure.enumeration_elements() / n)
    events = max(
        (s.shape[-1] ** (2 if s.missing else 1) if s.event_shape else 1 for s in structure.observed), default=1
    )
    rows = affordable(kwargs, max(CHUNK_ROWS, int(CHUNK_ELEMENTS / (width * events))))
    if rows >= n:
        return whole
    return [Part(piece) for piece in pieces_of(kwargs, structure.row_arguments, n, rows)]


def few_rows(joint: LogJoint, kwargs: dict[str, Any], count: int = 2) -> dict[str, Any]:
    """Few rows, where rows are told apart: enough to read parameters off a run.

    The first ones, or those that show what all rows share in its full size, be it all of them.
    """
    rows, telling = joint.structure.row_arguments, joint.problem.few
    if not rows or (telling and len(telling[rows[0]]) >= (joint.structure.num_rows or 0)):
        return kwargs
    return take_rows(kwargs, rows, slice(0, count))


def expectation(joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part]) -> Expectation:
    """Weights and sufficient statistics of every site at one `theta` (no leading dimension)."""
    stats: dict[str, Statistics] = {}
    slots: Slots = {}
    likelihood, prior = 0.0, 0.0
    with torch.no_grad():
        for i, part in enumerate(parts):
            trace, names = joint.trace(theta, part.kwargs)
            factors = joint.factors_of(trace, names)
            if i == 0:
                prior = sum(float(f.value.sum()) for f in factors if f.name in theta)
                slots = read_slots(plan, trace, names)
            inside = [f for f in factors if f.name not in theta]
            value, leaves, weights = factor_weights(inside, set(joint.finite))
            likelihood += float(value)
            accumulate(plan, part, trace, names, leaves, weights, stats)
    objective = likelihood + (prior if plan.estimate == "map" else 0.0)
    return lift(objective, likelihood, stats, slots, parts, joint)


def of_all_ranks(e: Expectation, ranks: Ranks) -> Expectation:
    """The E-step of the rows of all ranks, from one's own; log priors are no sums over rows and count once."""
    if not ranks.shares_rows:
        return e
    names = [(t, k) for t in sorted(e.stats) for k in sorted(e.stats[t])]
    prior = e.objective - e.log_likelihood
    likelihood, *found = ranks.add(e.log_likelihood, *(e.stats[t][k] for t, k in names))
    stats: dict[str, Statistics] = {t: {} for t in e.stats}
    for (term, key), value in zip(names, found, strict=True):
        stats[term][key] = value
    return Expectation(likelihood + prior, likelihood, stats, e.slots, e.parts)


def lift(
    objective: float,
    likelihood: float,
    stats: dict[str, Statistics],
    slots: Slots,
    parts: list[Part],
    joint: LogJoint,
) -> Expectation:
    """The E-step of one run as that of R = 1 runs."""
    kind: dict[str, Any] = {"dtype": joint.problem.dtype, "device": joint.problem.device}
    lifted = {t: {k: v[None] for k, v in s.items()} for t, s in stats.items()}
    return Expectation(torch.tensor([objective], **kind), torch.tensor([likelihood], **kind), lifted, slots, parts)


def read_slots(plan: Plan, trace: Any, names: dict[str, str]) -> Slots:
    """Parameters of every term (and of priors that are terms) in a run."""
    terms = [*plan.terms.values(), *plan.prior_terms.values()]
    return {t.name: slots_of(t, trace.nodes[t.name], names) for t in terms if t.family is not None}


def slots_now(joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part]) -> tuple[Slots, Tensor]:
    """Parameters of every term at theta (R first) and the log priors (R,): by copying, or by a run on a few rows."""
    runs = len(next(iter(theta.values()))) if theta else 1
    prior = torch.zeros(runs, dtype=joint.problem.dtype, device=joint.problem.device)
    if not plan.copies_only or not parts[0].slots:
        if runs != 1 and not plan.copies_only:
            raise AssertionError("parameters that are no copies of unknowns are known for one run at a time")
        with torch.no_grad():
            trace, names = joint.trace({n: v[0] for n, v in theta.items()}, few_rows(joint, parts[0].kwargs))
            parts[0].slots = read_slots(plan, trace, names)
            nodes = (trace.nodes[n] for n in theta if trace.nodes[n]["type"] == "sample")
            prior = prior + sum((n["fn"].log_prob(n["value"]).sum() for n in nodes), 0.0)
    if not plan.copies_only:
        return parts[0].slots, prior
    slots = {}
    for term in (*plan.terms.values(), *plan.prior_terms.values()):
        slots[term.name] = {
            s: (g.push(theta[g.theta]), (RUNS, *term.slot_dims[s])) if (g := term.gathers.get(s)) else v
            for s, v in parts[0].slots[term.name].items()
        }
    return slots, prior_density(plan, theta, slots, runs) if plan.estimate == "map" else prior


def prior_density(plan: Plan, theta: dict[str, Tensor], slots: Slots, runs: int) -> Tensor:
    """Log prior density of every run, (R,)."""
    total: Any = 0.0
    for name, fn in (plan.densities or {}).items():
        total = total + fn.log_prob(theta[name]).reshape(runs, -1).sum(1)
    for name, term in plan.prior_terms.items():
        assert term.family is not None
        value = term.family.expected(parameters(term, slots[name]), prior_statistics(term, theta[name]))
        total = total + value.reshape(runs, -1).sum(1)
    return total if isinstance(total, Tensor) else torch.zeros(runs, dtype=torch.get_default_dtype())


def accumulate(
    plan: Plan,
    part: Part,
    trace: Any,
    names: dict[str, str],
    factors: list[LogFactor],
    weights: list[Tensor],
    stats: dict[str, Statistics],
) -> None:
    """Add one chunk's weighted statistics to the sums."""
    for factor, weight in zip(factors, weights):
        term = plan.terms.get(factor.name)
        if term is None:
            continue
        if term.family is None:
            part.weights[term.name] = (weight, factor.dims)
            continue
        found = site_statistics(term, part, trace.nodes[term.name], names, (weight, factor.dims))
        kept = stats.setdefault(term.name, {k: torch.zeros_like(v) for k, v in found.items()})
        for key, total in found.items():
            kept[key] = kept[key] + total


def site_statistics(term: Term, part: Part, node: dict, names: dict[str, str], weight: Named) -> Statistics:
    """Weighted sums of one site over one chunk."""
    if term.missing and "_complete" in node["infer"]:
        return expected_statistics(term, weight, node, names)
    if term.name not in part.values:
        part.values[term.name] = values_of(term, node, names)
    return reduce(term, weight, part.values[term.name])
