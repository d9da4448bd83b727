"""From a story to an EM plan: what each site contributes, and how each unknown will be updated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from ...handlers import unwrap
from ...joint import LogJoint
from .priors import Conjugate, conjugate
from .sticks import stick_of
from .terms import Term, depends_on, make_term, prior_term

CLOSED, ON_STATISTICS, ON_DATA, UNUSED = "closed form", "L-BFGS on statistics", "L-BFGS on data", "prior mode"
#: Rows from which a plan is made, evenly spaced, and how many of those that miss cells are added.
PLAN_ROWS, PLAN_MISSING = 512, 8


@dataclass
class Plan:
    """How EM will run on one story.

    Attributes
    ----------
    terms
        Sites of the complete-data likelihood, in order.
    tiers
        Unknown -> "closed form", "L-BFGS on statistics", "L-BFGS on data" or "prior mode" (no site depends on it).
    reasons
        Unknown -> why.
    priors
        Unknown -> conjugate pseudo-statistics, for those in closed form.
    prior_terms
        Unknown -> its prior as a site of its own, where that copies other unknowns.
    densities
        Unknown -> its prior, for those whose prior depends on nothing; None where a hierarchy is not understood.
    sums
        Latent -> how it is summed out and at what cost.
    sticks
        Unknown -> the Categorical whose weights it breaks off a stick; see `sticks`.
    """

    terms: dict[str, Term]
    tiers: dict[str, str]
    reasons: dict[str, str]
    priors: dict[str, Conjugate]
    estimate: str
    prior_terms: dict[str, Term] = field(default_factory=dict)
    densities: dict[str, Any] | None = None
    sums: dict[str, str] = field(default_factory=dict)
    sticks: dict[str, str] = field(default_factory=dict)

    @property
    def copies_only(self) -> bool:
        """Every parameter that moves is a plain copy of an unknown: the story need not be run again to know it."""
        return self.densities is not None and all(
            t.family is not None and t.depends <= {g.theta for g in t.gathers.values()} for t in self.terms.values()
        )

    @property
    def closed(self) -> list[str]:
        return [name for name, tier in self.tiers.items() if tier == CLOSED]

    @property
    def climbed(self) -> list[str]:
        return [name for name, tier in self.tiers.items() if tier in (ON_STATISTICS, ON_DATA)]

    def needs_data(self, term: Term) -> bool:
        """Whether the M-step has to look at this site's rows again."""
        return term.family is None and bool(term.depends & set(self.climbed))

    def users(self, name: str) -> list[tuple[Term, str]]:
        """Terms (and, under MAP, priors of other unknowns) that copy the unknown, with the slot."""
        terms = [*self.terms.values(), *(self.prior_terms.values() if self.estimate == "map" else ())]
        return [(t, slot) for t in terms for slot, g in t.gathers.items() if g.theta == name]

    def __str__(self) -> str:
        lines = [f"EM plan ({self.estimate.upper()})"]
        lines += [f"  {name:<12} summed out: {how}" for name, how in self.sums.items()]
        lines += [f"  {name:<12} {tier}: {self.reasons[name]}" for name, tier in self.tiers.items()]
        return "\n".join(lines)


def plan_rows(joint: LogJoint) -> dict[str, Any]:
    """Arguments with some rows from all over the data, among them some that miss cells."""
    kwargs, names = joint.problem.kwargs, joint.structure.row_arguments
    ranks, n = joint.problem.ranks, joint.structure.num_rows and joint.problem.all_rows
    if joint.problem.sketch is kwargs or not names or not n or (n <= PLAN_ROWS and not ranks.shares_rows):
        return kwargs
    index = torch.linspace(0, n - 1, PLAN_ROWS).round().long() if n > PLAN_ROWS else torch.arange(n)
    for site in joint.structure.observed:
        value = kwargs.get(site.argument or "")
        if site.missing and isinstance(value, Tensor):
            holes = value.flatten(1).isnan().any(1).nonzero().flatten()[:PLAN_MISSING] + ranks.offset
            index = torch.cat([index, *(found.to(index.device) for found in ranks.gather(holes.cpu()))])
    return ranks.rows(kwargs, names, index.unique())


def compile_plan(joint: LogJoint, theta: dict[str, Tensor], estimate: str, rows: dict[str, Any] | None = None) -> Plan:
    """Trace the story once at `theta` (on some rows) and decide, unknown by unknown, how it will be updated."""
    rows = plan_rows(joint) if rows is None else rows
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in theta.items()}
    with torch.enable_grad():
        trace, names = joint.trace(leaves, rows)
        terms = {}
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or name in theta or name not in joint.structure:
                continue
            if joint.structure[name].kind in ("observed", "latent", "factor"):
                terms[name] = make_term(name, node, names, leaves, joint)
        if rows is not joint.problem.kwargs and any(t.rowwise for t in terms.values()):
            return compile_plan(joint, theta, estimate, joint.problem.kwargs)
        prior_users = prior_dependencies(trace, leaves)
        prior_terms, unclear = {}, set()
        for name in (n for n, users in prior_users.items() if users):
            own = prior_term(name, trace.nodes[name], names, leaves, joint)
            if own is None:
                unclear.add(name)
            else:
                prior_terms[name] = own
    priors = {n: trace.nodes[n]["fn"] for n in theta if trace.nodes[n]["type"] == "sample"}
    plan = Plan(terms, {}, {}, {}, estimate, prior_terms)
    certain = {b.name for b in joint.blocks if b.start == b.stop}
    for name in theta:
        if name in certain:
            plan.tiers[name], plan.reasons[name] = UNUSED, "it has one possible value"
            continue
        hierarchy = {other for other, depends in prior_users.items() if name in depends}
        tier, reason, found = decide(name, plan, priors.get(name), hierarchy, unclear, theta)
        users = [t for t in terms.values() if name in t.depends]
        prior = priors.get(name) if estimate == "map" else None
        if tier == ON_STATISTICS and not hierarchy and (stick := stick_of(joint, name, users, theta, rows, prior)):
            plan.sticks[name] = stick
            what = "no prior" if prior is None else f"{type(unwrap(prior)).__name__} prior"
            tier, reason = CLOSED, f"stick-breaking probs of Categorical ({stick}), {what}"
        plan.tiers[name], plan.reasons[name] = tier, reason
        if found is not None:
            plan.priors[name] = found
    plan.densities = None if unclear else {n: fn for n, fn in priors.items() if n not in prior_terms}
    return plan


def prior_dependencies(trace: Any, leaves: dict[str, Tensor]) -> dict[str, frozenset[str]]:
    """Unknown -> other unknowns that its prior depends on (a hierarchy)."""
    result = {}
    for name in leaves:
        node = trace.nodes[name]
        if node["type"] == "sample":
            result[name] = depends_on({**node, "value": node["value"].detach()}, leaves) - {name}
    return result


def decide(
    name: str,
    plan: Plan,
    prior: td.Distribution | None,
    hierarchy: set[str],
    unclear: set[str],
    theta: dict[str, Tensor],
) -> tuple[str, str, Conjugate | None]:
    """Tier of one unknown, the reason, and its conjugate prior where the update is closed.

    `hierarchy` are unknowns whose prior depends on it, `unclear` those whose prior is no normal with copied parameters.
    """
    bayes = plan.estimate == "map"
    users = [t for t in plan.terms.values() if name in t.depends]
    if bayes:
        users += [plan.prior_terms[other] for other in sorted(hierarchy - unclear)]
    if not users and not (hierarchy and bayes):
        return UNUSED, "no observed or finite site depends on it", None
    slower = ON_DATA if any(t.family is None for t in users) else ON_STATISTICS
    other = next((t.name for t in users if t.family is None), None)
    if other:
        return slower, f"site {other!r} is no exponential family with parameters shared by the rows", None
    if bayes and (hierarchy & unclear or name in unclear):
        return slower, "its prior is part of a hierarchy", None
    copies = {(t.name, slot) for t in users for slot, g in t.gathers.items() if g.theta == name}
    mixed = [t.name for t in users if sum(key[0] == t.name for key in copies) != 1]
    if mixed:
        return slower, f"the parameters of {', '.join(mixed)} are not plain copies of it", None
    roles = {
        (t.family.name, slot, t.roles[slot])
        for t in users
        if t.family
        for slot, g in t.gathers.items()
        if g.theta == name
    }
    if len(roles) > 1:
        return slower, "it plays different parts in different sites", None
    family, slot, role = next(iter(roles))
    names = list(dict.fromkeys(t.name for t in users))
    where = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
    if bayes and name in plan.prior_terms:
        if slot != "loc":
            return slower, "its prior is part of a hierarchy", None
        return CLOSED, f"{role} of {family} ({where}), normal prior tied to other unknowns", Conjugate("normal prior")
    found = conjugate(prior if bayes else None, slot, role, theta[name])
    if found is None:
        inner = type(unwrap(prior)).__name__
        return slower, f"the prior {inner} is not conjugate to {family} {role}", None
    return CLOSED, f"{role} of {family} ({where}), {found.text}", found


__all__ = ["CLOSED", "ON_DATA", "ON_STATISTICS", "UNUSED", "Plan", "compile_plan"]
