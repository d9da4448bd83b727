"""From a story to an EM plan: what each site contributes, and how each unknown will be updated."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from ...enumeration import align
from ...handlers import unwrap
from ...joint import LogJoint
from .families import FAMILIES, Family, Statistics, family_of
from .priors import Conjugate, conjugate
from .recognise import Gather, recognise

Named = tuple[Tensor, tuple[str, ...]]

CLOSED, ON_STATISTICS, ON_DATA, UNUSED = "closed form", "L-BFGS on statistics", "L-BFGS on data", "prior mode"


@dataclass
class Term:
    """One site of the complete-data likelihood.

    Attributes
    ----------
    family
        None where the site is no exponential family we know: its log-factor is used as it is.
    extra
        Event dimensions that `Independent` added.
    roles, gathers
        Slot -> parametrisation, and the recognised copy of an unknown.
    depends
        Unknowns that its parameters depend on.
    dims, slot_dims
        Named dimensions along which its parameters vary, all and by slot; statistics are summed over all others.
    shift
        Subtracted from values before squaring, against cancellation.
    """

    name: str
    family: Family | None
    extra: int = 0
    roles: dict[str, str] = field(default_factory=dict)
    gathers: dict[str, Gather] = field(default_factory=dict)
    depends: frozenset[str] = frozenset()
    dims: tuple[str, ...] = ()
    slot_dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shift: Tensor | None = None

    def index(self, slot: str, gather: Gather, shape: torch.Size) -> Tensor:
        """Block of the unknown for each entry of statistics of the given batch shape (dims, then event)."""
        own = self.slot_dims[slot]
        tail = tuple(f"_{i}" for i in range(self.extra))
        return align(gather.index, own + tail, self.dims + tail).expand(shape)

    def trailing(self, slot: str) -> int:
        """Dimensions of a slot after the named ones."""
        assert self.family is not None
        return self.extra + self.family.blocks.get(slot, 0)


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
    densities
        Unknown -> its prior, where no prior depends on another unknown; None in a hierarchy.
    """

    terms: dict[str, Term]
    tiers: dict[str, str]
    reasons: dict[str, str]
    priors: dict[str, Conjugate]
    estimate: str
    densities: dict[str, Any] | None = None

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
        """Terms and slots that copy the unknown."""
        return [(t, slot) for t in self.terms.values() for slot, g in t.gathers.items() if g.theta == name]

    def __str__(self) -> str:
        lines = [f"EM plan ({self.estimate.upper()})"]
        lines += [f"  {name:<12} {tier}: {self.reasons[name]}" for name, tier in self.tiers.items()]
        return "\n".join(lines)


def named(tensor: Tensor, trailing: int, node: dict, names: dict[str, str]) -> Named:
    """Batch dimensions get the names of their plates and latents, size-1 ones are dropped."""
    batch = tensor.dim() - trailing
    symbols = node["infer"]["_dim_to_symbol"]
    keep = [i for i in range(batch) if tensor.shape[i] > 1]
    dims = tuple(names[symbols[i - batch]] for i in keep)
    return tensor.reshape([*(tensor.shape[i] for i in keep), *tensor.shape[batch:]]), dims


def spread_out(value: Named, dims: tuple[str, ...], trailing: int) -> Tensor:
    """Align the named dimensions with `dims`, trailing ones after them."""
    tensor, own = value
    tail = tuple(f"_{i}" for i in range(trailing))
    return align(tensor, own + tail, dims + tail)


def slots_of(term: Term, node: dict, names: dict[str, str]) -> dict[str, Named]:
    """Canonical parameters of one site in a run, in the parametrisation of the plan."""
    assert term.family is not None
    found = term.family.slots(unwrap(node["fn"]))
    result = {}
    for slot, (role, tensor) in found.items():
        wanted = term.roles.get(slot, role)
        result[slot] = named(in_role(tensor, role, wanted), term.trailing(slot), node, names)
    return result


def in_role(tensor: Tensor, role: str, wanted: str) -> Tensor:
    """A normal's scale as variance or precision, if the plan works with these."""
    if role == wanted:
        return tensor
    return tensor**2 if wanted == "variance" else tensor**-2


def parameters(term: Term, slots: dict[str, Named]) -> dict[str, tuple[str, Tensor]]:
    """Slots aligned to the term's dimensions, with the shift taken off the location."""
    result = {}
    for slot, value in slots.items():
        tensor = spread_out(value, term.dims, term.trailing(slot))
        if slot == "loc" and term.shift is not None:
            tensor = tensor - term.shift
        result[slot] = (term.roles[slot], tensor)
    return result


def values_of(term: Term, node: dict, names: dict[str, str]) -> dict[str, Named]:
    """Sufficient statistics of every value of one site."""
    assert term.family is not None
    base = unwrap(node["fn"])
    value = node["value"]
    if term.shift is not None:
        value = value - term.shift
    stats = term.family.statistics(value, base)
    own = {"xx": term.family.event_dims} if term.family.event_dims else {}
    return {
        key: named(s, term.extra + own.get(key, term.family.trailing[key]), node, names) for key, s in stats.items()
    }


def reduce(term: Term, weight: Named, stats: dict[str, Named]) -> Statistics:
    """Weighted sums of the statistics over everything but the term's dimensions."""
    assert term.family is not None
    r, r_dims = weight
    letters = dict(
        zip(dict.fromkeys([*r_dims, *(d for _, ds in stats.values() for d in ds), *term.dims]), string.ascii_letters)
    )
    result = {}
    for key, (s, dims) in stats.items():
        tail = string.ascii_letters[::-1][: s.dim() - len(dims)]
        left = "".join(letters[d] for d in r_dims)
        right = "".join(letters[d] for d in dims)
        present = [d for d in term.dims if d in r_dims or d in dims]
        out = "".join(letters[d] for d in present)
        if key == "xx" and term.family.event_dims:
            second = tail[:-1] + string.ascii_uppercase[0]
            total = torch.einsum(f"{left},{right}{tail},{right}{second}->{out}{tail}{second[-1]}", r, s, s)
        else:
            total = torch.einsum(f"{left},{right}{tail}->{out}{tail}", r, s)
        result[key] = total
    return result


def compile_plan(joint: LogJoint, theta: dict[str, Tensor], estimate: str) -> Plan:
    """Trace the story once at `theta` and decide, unknown by unknown, how it will be updated."""
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in theta.items()}
    with torch.enable_grad():
        trace, names = joint.trace(leaves, joint.problem.sketch)
        terms = {}
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or name in theta or name not in joint.structure:
                continue
            if joint.structure[name].kind in ("observed", "latent", "factor"):
                terms[name] = make_term(name, node, names, leaves, joint)
        prior_users = prior_dependencies(trace, leaves)
    priors = {n: trace.nodes[n]["fn"] for n in theta if trace.nodes[n]["type"] == "sample"}
    tiers, reasons, conjugates = {}, {}, {}
    certain = {b.name for b in joint.blocks if b.start == b.stop}
    for name in theta:
        if name in certain:
            tiers[name], reasons[name] = UNUSED, "it has one possible value"
            continue
        tiers[name], reasons[name], found = decide(name, terms, priors.get(name), prior_users, theta, estimate)
        if found is not None:
            conjugates[name] = found
    fixed = None if any(prior_users.values()) else priors
    return Plan(terms, tiers, reasons, conjugates, estimate, fixed)


def make_term(name: str, node: dict, names: dict[str, str], leaves: dict[str, Tensor], joint: LogJoint) -> Term:
    """Describe one site: family, recognised copies of unknowns, dimensions of its parameters."""
    fn = node["fn"]
    plain = node["scale"] == 1.0 if isinstance(node["scale"], (int, float)) else False
    masked = (
        type(fn).__name__ == "MaskedDistribution"
        or type(getattr(fn, "base_dist", None)).__name__ == "MaskedDistribution"
    )
    base = unwrap(fn)
    family = family_of(base) if plain and node["mask"] is None and not masked else None
    with torch.enable_grad():
        depends = depends_on(node, leaves)
    if family is None:
        return Term(name, None, depends=depends)
    extra = fn.event_dim - family.event_dims
    term = Term(name, family, extra, depends=depends)
    dims: dict[str, None] = {}
    for slot, (role, tensor) in family.slots(base).items():
        term.roles[slot] = role
        for wanted in [role, *(("variance", "precision") if role == "scale" else ())]:
            gather, placed = copy_of(term, slot, in_role(tensor, role, wanted), node, names, leaves)
            dims.update(dict.fromkeys(placed))
            if gather is not None:
                term.roles[slot], term.gathers[slot] = wanted, gather
                break
        term.slot_dims[slot] = placed
    term.dims = tuple(dims)
    if joint.structure.data_plate in term.dims and joint.structure[name].kind == "observed":
        return Term(name, None, depends=depends)  # parameters differ from row to row: nothing to sum over
    if family.name in ("Normal", "MultivariateNormal") and joint.structure[name].kind == "observed":
        value = node["value"]
        lead = value.dim() - extra - family.event_dims
        term.shift = value.reshape(-1, *value.shape[lead:]).mean(0)
    return term


def copy_of(
    term: Term, slot: str, tensor: Tensor, node: dict, names: dict[str, str], leaves: dict[str, Tensor]
) -> tuple[Gather | None, tuple[str, ...]]:
    """The unknown that a slot copies, and the named dimensions of the slot."""
    assert term.family is not None
    y, dims = named(tensor, term.trailing(slot), node, names)
    block = term.family.blocks.get(slot, 0)
    for name, theta in leaves.items():
        if theta.requires_grad:
            gather = recognise(y, name, theta, block, simplex=slot == "probs" and block == 1)
            if gather is not None:
                return gather, dims
    return None, dims


def depends_on(node: dict, leaves: dict[str, Tensor]) -> frozenset[str]:
    """Unknowns that move the log density of a site."""
    total = node["fn"].log_prob(node["value"]).sum()
    if not total.requires_grad:
        return frozenset()
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()), retain_graph=True, allow_unused=True)
    return frozenset(n for n, g in zip(wanted, grads) if g is not None)


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
    terms: dict[str, Term],
    prior: td.Distribution | None,
    prior_users: dict[str, frozenset[str]],
    theta: dict[str, Tensor],
    estimate: str,
) -> tuple[str, str, Conjugate | None]:
    """Tier of one unknown, the reason, and its conjugate prior where the update is closed."""
    users = [t for t in terms.values() if name in t.depends]
    hierarchy = [other for other, depends in prior_users.items() if name in depends]
    if not users and not (hierarchy and estimate == "map"):
        return UNUSED, "no observed or finite site depends on it", None
    slower = ON_DATA if any(t.family is None for t in users) else ON_STATISTICS
    other = next((t.name for t in users if t.family is None), None)
    if other:
        return slower, f"site {other!r} is no exponential family with parameters shared by the rows", None
    if estimate == "map" and (hierarchy or prior_users.get(name)):
        return slower, "its prior is part of a hierarchy", None
    copies = {(t.name, slot) for t in users for slot, g in t.gathers.items() if g.theta == name}
    unclear = [t.name for t in users if sum(key[0] == t.name for key in copies) != 1]
    if unclear:
        return slower, f"the parameters of {', '.join(unclear)} are not plain copies of it", None
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
    found = conjugate(prior if estimate == "map" else None, slot, role, theta[name])
    if found is None:
        inner = type(unwrap(prior)).__name__
        return slower, f"the prior {inner} is not conjugate to {family} {role}", None
    return CLOSED, f"{role} of {family} ({', '.join(sorted({t.name for t in users}))}), {found.text}", found


__all__ = ["CLOSED", "FAMILIES", "ON_DATA", "ON_STATISTICS", "UNUSED", "Plan", "Term", "compile_plan"]
