"""One site of the complete-data likelihood as EM sees it: its family, the unknowns it copies, its statistics.

Tensors that change with the unknowns carry a leading dimension, `RUNS`, of R climbs at once.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import MaskedDistribution
from torch import Tensor

from ...enumeration import align
from ...handlers import unwrap
from ...joint import LogJoint
from .families import Family, Statistics, family_of
from .recognise import Gather, recognise

Named = tuple[Tensor, tuple[str, ...]]

#: Name of the leading dimension: climbs from different starts, made in one go.
RUNS = "*runs"
#: Variance, as a share of the squared mean, that is nothing but rounding.
ROUNDING = 1e-28


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
    floor
        Variance of every entry of an event over the rows: the scale of the ridge (see `ground`).
    still
        Some entry is the same in every row.
    masked
        Some values do not count (a mask, or missing cells that are independent of the others).
    missing
        A multivariate normal with missing cells: its statistics are expectations given the seen ones.
    rowwise
        Rows copy different entries of the unknowns, as an observed index tells.
    value_dims, value_sizes
        Named dimensions of the value itself, where the site is the prior of an unknown.
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
    floor: Tensor | None = None
    still: bool = False
    masked: bool = False
    missing: bool = False
    rowwise: bool = False
    value_dims: tuple[str, ...] = ()
    value_sizes: tuple[int, ...] = ()

    def index(self, slot: str, gather: Gather, shape: torch.Size) -> Tensor:
        """Block of the unknown for each entry of statistics of the given batch shape (dims, then event)."""
        return self.across(slot, gather.index).expand(shape)

    def across(self, slot: str, value: Tensor) -> Tensor:
        """A tensor of the slot's named and extra dimensions, aligned with those of the statistics."""
        tail = tuple(f"_{i}" for i in range(self.extra))
        return align(value, self.slot_dims[slot] + tail, self.dims + tail)

    def trailing(self, slot: str) -> int:
        """Dimensions of a slot after the named ones."""
        assert self.family is not None
        return self.extra + self.family.blocks.get(slot, 0)

    def pull(self, slot: str, stats: Tensor) -> Tensor:
        """Statistics (R, dims, extra, ...) summed into the shape of the unknown that the slot copies."""
        gather = self.gathers[slot]
        shape = stats.shape[1 : 1 + len(self.dims) + self.extra]
        return gather.pull(stats, self.index(slot, gather, shape))

    def scale(self, slot: str) -> Tensor | None:
        """Constant factor of the slot over the unknown, aligned with the statistics; None where it is 1."""
        gather = self.gathers[slot]
        return None if gather.scale is None else self.across(slot, gather.scale)


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


def in_role(tensor: Tensor, role: str, wanted: str) -> Tensor:
    """A normal's scale as variance or precision, if the plan works with these."""
    if role == wanted:
        return tensor
    return tensor**2 if wanted == "variance" else tensor**-2


def complete(node: dict) -> Any:
    """The site's distribution before missing cells were integrated out of it, unwrapped."""
    found = node["infer"].get("_complete")
    return unwrap(found[0] if found else node["fn"])


def slots_of(term: Term, node: dict, names: dict[str, str]) -> dict[str, Named]:
    """Canonical parameters of one site in a run, in the parametrisation of the plan."""
    assert term.family is not None
    result = {}
    for slot, (role, tensor) in term.family.slots(complete(node)).items():
        wanted = term.roles.get(slot, role)
        result[slot] = named(in_role(tensor, role, wanted), term.trailing(slot), node, names)
    return result


def parameters(term: Term, slots: dict[str, Named], runs: bool = True) -> dict[str, tuple[str, Tensor]]:
    """Slots aligned to the term's dimensions (R first, unless not `runs`), with the shift taken off the location."""
    result = {}
    dims = (RUNS, *term.dims) if runs else term.dims
    for slot, value in slots.items():
        tensor = spread_out(value, dims, term.trailing(slot))
        if slot == "loc" and term.shift is not None:
            tensor = tensor - term.shift
        result[slot] = (term.roles[slot], tensor)
    return result


def mask_of(node: dict, event_dims: int) -> Tensor | None:
    """Which values count, one entry for every event of the family; None where all do."""
    total: Tensor | None = None
    outer = node["fn"].event_dim - event_dims
    if isinstance(node["mask"], Tensor):
        total = node["mask"].reshape([*node["mask"].shape, *[1] * outer])
    fn = node["fn"]
    while isinstance(fn, (td.Independent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution) and fn._mask is not True:
            mask = torch.as_tensor(fn._mask).expand(fn.batch_shape)
            mask = mask.reshape([*mask.shape, *[1] * (fn.event_dim - event_dims)])
            total = mask if total is None else total & mask
        fn = fn.base_dist
    return total


def values_of(term: Term, node: dict, names: dict[str, str]) -> dict[str, Named]:
    """Sufficient statistics of every value of one site."""
    assert term.family is not None
    value = node["value"]
    if value.is_floating_point():
        value = value.to(torch.get_default_dtype())
    value = value if term.shift is None else value - term.shift
    stats = term.family.statistics(value, unwrap(node["fn"]))
    own = {"xx": term.family.event_dims} if term.family.event_dims else {}
    if term.masked:
        mask = mask_of(node, term.family.event_dims)
        for key, s in stats.items():
            if mask is None:
                break
            width = own.get(key, term.family.trailing[key])
            stats[key] = s * mask.reshape([*mask.shape, *[1] * width]).to(s)
    return {
        key: named(s, term.extra + own.get(key, term.family.trailing[key]), node, names) for key, s in stats.items()
    }


def reduce(term: Term, weight: Named, stats: dict[str, Named]) -> Statistics:
    """Weighted sums of the statistics over everything but the term's dimensions."""
    assert term.family is not None
    r, r_dims = weight
    r = r.to(
        torch.get_default_dtype()
    )  # a density of large tables may be in single precision, sums over their rows never are
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


def make_term(name: str, node: dict, names: dict[str, str], leaves: dict[str, Tensor], joint: LogJoint) -> Term:
    """Describe one site: family, recognised copies of unknowns, dimensions of its parameters."""
    plain = node["scale"] == 1.0 if isinstance(node["scale"], (int, float)) else False
    family = family_of(complete(node)) if plain else None
    with torch.enable_grad():
        depends = depends_on(node, leaves)
    if family is None:
        return Term(name, None, depends=depends)
    site = joint.structure[name] if name in joint.structure else None
    seen = site is not None and site.kind == "observed"
    missing = "_complete" in node["infer"]
    masked = not missing and mask_of(node, family.event_dims) is not None
    term = Term(name, family, node["fn"].event_dim - family.event_dims, depends=depends, masked=masked, missing=missing)
    describe_slots(term, node, names, leaves)
    plate = joint.structure.data_plate
    if plate in term.dims and seen:
        if any(plate in dims and slot not in term.gathers for slot, dims in term.slot_dims.items()):
            return Term(name, None, depends=depends)  # parameters of each row's own: nothing to sum over
        term.rowwise = True
    if family.name in ("Normal", "MultivariateNormal") and seen:
        value = node["infer"]["_complete"][1] if missing else node["value"]
        if masked:
            mask = mask_of(node, family.event_dims)
            assert mask is not None
            value = torch.where(mask.reshape([*mask.shape, *[1] * family.event_dims]), value, torch.nan)
        rows = value.to(torch.get_default_dtype()).reshape(
            -1, *value.shape[value.dim() - term.extra - family.event_dims :]
        )
        term.shift = rows.nanmean(0).nan_to_num(0.0)
        term.floor, term.still = ground(((rows - term.shift) ** 2).nanmean(0).nan_to_num(0.0), term.shift)
    return term


def ground(variance: Tensor, level: Tensor) -> tuple[Tensor, bool]:
    """Variances of columns; one that never moves has the scale of its own level instead, so that its ridge is not 0.

    Returns
    -------
    The scales, and whether a column never moves.
    """
    still = variance <= ROUNDING * level**2
    scale = torch.where(level != 0, level**2, torch.ones_like(level))
    return torch.where(still, scale, variance), bool(still.any())


def describe_slots(term: Term, node: dict, names: dict[str, str], leaves: dict[str, Tensor]) -> None:
    """Fill in how the parameters of a term come from the unknowns."""
    assert term.family is not None
    dims: dict[str, None] = {}
    for slot, (role, tensor) in term.family.slots(complete(node)).items():
        term.roles[slot] = role
        for wanted in [role, *(("variance", "precision") if role == "scale" else ())]:
            gather, placed = copy_of(term, slot, in_role(tensor, role, wanted), node, names, leaves)
            dims.update(dict.fromkeys(placed))
            if gather is not None:
                term.roles[slot], term.gathers[slot] = wanted, gather
                break
        term.slot_dims[slot] = placed
    term.dims = tuple(dims)


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
            if gather is not None and (gather.scale is None or slot == "spread"):
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


# -- priors that depend on other unknowns: sites whose values are unknowns themselves ------------------------------------


def prior_term(name: str, node: dict, names: dict[str, str], leaves: dict[str, Tensor], joint: LogJoint) -> Term | None:
    """The normal prior of an unknown whose mean or spread copies other unknowns, or None."""
    held = {**node, "value": node["value"].detach()}
    term = make_term(name, held, names, leaves, joint)
    if term.family is None or term.family.name not in ("Normal", "MultivariateNormal"):
        return None
    if not term.depends <= {g.theta for g in term.gathers.values()} or joint.structure.data_plate in term.dims:
        return None
    value, term.value_dims = named(held["value"], term.extra + term.family.event_dims, node, names)
    term.value_sizes = tuple(value.shape)
    return term


def prior_statistics(term: Term, value: Tensor) -> Statistics:
    """Statistics of the current value (R, ...) of an unknown, as if it had been seen once."""
    assert term.family is not None
    x = value.reshape(len(value), *term.value_sizes)
    wide = term.family.event_dims
    stats = {
        "n": torch.ones(x.shape[: x.dim() - wide], dtype=x.dtype, device=x.device),
        "x": x,
        "xx": x.unsqueeze(-1) * x.unsqueeze(-2) if wide else x * x,
    }
    away = tuple(1 + i for i, d in enumerate(term.value_dims) if d not in term.dims)
    kept = tuple(d for d in term.value_dims if d in term.dims)
    result = {}
    for key, s in stats.items():
        total = s.sum(away) if away else s
        result[key] = spread_out((total, (RUNS, *kept)), (RUNS, *term.dims), total.dim() - 1 - len(kept))
    return result


def over_value(term: Term, tensor: Tensor, runs: int, block: int) -> Tensor:
    """A parameter of a prior, (R or 1, dims, extra, block...), for every entry of the unknown's own value."""
    tensor = spread_out((tensor, (RUNS, *term.dims)), (RUNS, *term.value_dims), term.extra + block)
    return tensor.expand(runs, *term.value_sizes, *tensor.shape[1 + len(term.value_sizes) :])
