"""E-step: exact posterior weights of the finite latents by one contraction and one gradient, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...data import take_rows
from ...enumeration import LogFactor
from ...joint import LogJoint, factor_weights
from .families import Statistics
from .plan import Named, Plan, reduce, slots_of, values_of

#: Elements of the largest table in one chunk of rows.
CHUNK_ELEMENTS = 4_000_000
#: Rows below which a chunk costs more to start than to compute.
CHUNK_ROWS = 256


@dataclass
class Part:
    """One chunk of rows: arguments, statistics of its values, and weights and parameters of the last E-step."""

    kwargs: dict[str, Any]
    values: dict[str, dict[str, Named]] = field(default_factory=dict)
    weights: dict[str, Named] = field(default_factory=dict)
    slots: dict[str, dict[str, Named]] = field(default_factory=dict)


@dataclass
class Expectation:
    """What an E-step knows.

    Attributes
    ----------
    objective, log_likelihood
        Log joint (log-likelihood plus log prior under MAP) and log-likelihood.
    stats
        Term -> summed sufficient statistics.
    slots
        Term -> parameters at which they were computed.
    parts
        Chunks, with weights where the M-step needs the rows again.
    """

    objective: float
    log_likelihood: float
    stats: dict[str, Statistics]
    slots: dict[str, dict[str, Named]]
    parts: list[Part]


def make_parts(joint: LogJoint) -> list[Part]:
    """Split the rows so that no table exceeds `CHUNK_ELEMENTS`; one part where rows cannot be split."""
    structure, kwargs = joint.structure, joint.problem.kwargs
    n = structure.num_rows
    whole = [Part(kwargs)]
    if not n or not structure.row_arguments or any(not s.local for s in structure.finite):
        return whole
    width = max(1.0, structure.enumeration_elements() / n)
    events = max((s.shape[-1] if s.event_shape else 1 for s in structure.observed), default=1)
    rows = max(CHUNK_ROWS, int(CHUNK_ELEMENTS / (width * events)))
    if rows >= n:
        return whole
    return [Part(take_rows(kwargs, structure.row_arguments, slice(i, i + rows))) for i in range(0, n, rows)]


def expectation(joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part]) -> Expectation:
    """Weights and sufficient statistics of every site at `theta`."""
    stats: dict[str, Statistics] = {}
    slots: dict[str, dict[str, Named]] = {}
    likelihood, prior = 0.0, 0.0
    with torch.no_grad():
        for i, part in enumerate(parts):
            trace, names = joint.trace(theta, part.kwargs)
            factors = joint.factors_of(trace, names)
            if i == 0:
                prior = sum(float(f.value.sum()) for f in factors if f.name in theta)
                for term in plan.terms.values():
                    if term.family is not None:
                        slots[term.name] = slots_of(term, trace.nodes[term.name], names)
            inside = [f for f in factors if f.name not in theta]
            value, leaves, weights = factor_weights(inside, set(joint.finite))
            likelihood += float(value)
            accumulate(plan, part, trace, names, leaves, weights, stats)
    objective = likelihood + (prior if plan.estimate == "map" else 0.0)
    return Expectation(objective, likelihood, stats, slots, parts)


def slots_now(
    joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part]
) -> tuple[dict[str, dict[str, Named]], float]:
    """Parameters of every term at theta and the log prior: by one run on a handful of rows, then by copying."""
    if plan.copies_only and parts[0].slots:
        slots = {}
        for name, known in parts[0].slots.items():
            gathers = plan.terms[name].gathers
            slots[name] = {
                s: (gathers[s].push(theta[gathers[s].theta]) if s in gathers else v[0], v[1]) for s, v in known.items()
            }
        prior = sum((float(fn.log_prob(theta[n]).sum()) for n, fn in (plan.densities or {}).items()), 0.0)
        return slots, prior
    few = parts[0].kwargs
    rows = joint.structure.row_arguments
    if rows:
        few = take_rows(few, rows, slice(0, 2))
    with torch.no_grad():
        trace, names = joint.trace(theta, few)
        slots = {t.name: slots_of(t, trace.nodes[t.name], names) for t in plan.terms.values() if t.family is not None}
        priors = (trace.nodes[n] for n in theta if trace.nodes[n]["type"] == "sample")
        prior = sum((float(n["fn"].log_prob(n["value"]).sum()) for n in priors), 0.0)
    parts[0].slots = slots
    return slots, prior


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
        if term.name not in part.values:
            part.values[term.name] = values_of(term, trace.nodes[term.name], names)
        found = reduce(term, (weight, factor.dims), part.values[term.name])
        kept = stats.setdefault(term.name, {k: torch.zeros_like(v) for k, v in found.items()})
        for key, total in found.items():
            kept[key] = kept[key] + total
