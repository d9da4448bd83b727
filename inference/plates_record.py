"""Reads off each statement of a running story what it was made from."""

import inspect
from typing import Any

import torch
from pyro.infer.inspect import site_is_deterministic
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .plates_algebra import Apply, Expr, Listing, Number, Watch, constant
from .plates_replay import tensors_of, unwrap

ARGUMENT = "@"  # marks names of the story's arguments, so that they cannot meet those of sites


def family_arguments(fn: Any) -> dict[str, Any]:
    """What a distribution was made from, by argument name in the order of its signature.

    Of two ways to say the same (probs and logits, covariance and precision) the one that was given is kept.
    """
    base = unwrap(fn)
    if type(base).__name__ == "TransformedDistribution":  # its name tells the transforms
        return family_arguments(base.base_dist)
    own = vars(base)
    nested = [vars(v) for k, v in own.items() if isinstance(v, torch.distributions.Distribution)]
    nested += [vars(unwrap(v)) for v in own.values() if isinstance(v, torch.distributions.Distribution)]
    names = _constructor_names(type(base))
    # Tensors of the constructor that have no constraint, such as the rows that a table is read at, tell something too.
    allowed = {
        *_argument_constraints(base),
        "total_count",
        "dim",
        *(n for n in names if isinstance(own.get(n), Tensor)),
    }
    found: dict[str, Any] = {}
    for name in names:
        for holder in (own, *nested):
            if name in holder and isinstance(holder[name], Tensor | int | float) and name in allowed:
                found[name] = holder[name]
                break
        else:
            if nested and name in _required(type(base)) and isinstance(part := getattr(base, name, None), Tensor):
                found[name] = part  # kept two levels down, as the two shapes of a Beta-binomial
    if not found:
        for name in names:
            value = getattr(base, name, None) if name in allowed else None
            if isinstance(value, Tensor):
                found[name] = value
    if {"probs", "logits"} <= set(found):  # PyTorch keeps the other one too, once it was asked for
        holders = (own, *nested)
        given = any("logits" in h and h.get("_param") is h["logits"] for h in holders)
        del found["probs" if given else "logits"]
    if {"covariance_matrix", "precision_matrix", "scale_tril"} & set(names):
        order = ("df", "loc", "covariance_matrix", "precision_matrix", "scale_tril")
        found = {n: found[n] for n in (*order, *(k for k in found if k not in order)) if n in found}
    return found


def family_name(fn: Any) -> str:
    """Class of a distribution; of one that is made by transforming another, their names too: Ordered-Normal."""
    base = unwrap(fn)
    name = type(base).__name__
    if name != "TransformedDistribution":
        return name
    steps = [type(t).__name__.removesuffix("Transform") for t in reversed(base.transforms)]
    return "-".join([*steps, family_name(base.base_dist)])


def _constructor_names(family: type) -> list[str]:
    """Arguments of a distribution by name; those that it hands on as *args or **kwargs are its parent's."""
    names: dict[str, None] = {}
    for one in family.__mro__:
        parameters = inspect.signature(one.__init__).parameters.values()  # type: ignore[misc]
        named = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        names |= dict.fromkeys(n for n in named if n not in ("self", "validate_args"))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _required(family: type) -> set[str]:
    """Arguments that a distribution cannot be made without."""
    parameters = inspect.signature(family.__init__).parameters.values()  # type: ignore[misc]
    return {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _argument_constraints(base: Any) -> dict[str, Any]:
    try:
        return dict(base.arg_constraints)
    except (
        AttributeError,
        NotImplementedError,
        TypeError,
    ):  # abstract in torch, and left so by some distributions
        return {}


class Recorder(Messenger):
    """Marks the value of every site, and keeps what its distribution was made from."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.found: dict[str, dict[str, Any]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name, fn, value, watch = msg["name"], msg["fn"], msg["value"], self.watch
        family = family_name(fn)
        if site_is_deterministic(msg):
            kind, made_of, parts = "deterministic", {"value": value}, [value]
        elif family == "Unit":
            kind, made_of, parts = "factor", {"log_factor": unwrap(fn).log_factor}, list(tensors_of(fn))
        else:
            trail = watch.trail(value)
            computed = trail is not None and any(not n.startswith(ARGUMENT) for n in trail.names)
            if family == "Delta" and (computed or not msg["is_observed"]):
                kind = "deterministic"
            else:
                kind = "observed" if msg["is_observed"] else "latent"
            made_of = {"value": unwrap(fn).v} if kind == "deterministic" else family_arguments(fn)
            parts = list(tensors_of(fn))
        self.found[name] = {
            "kind": kind,
            "fn": fn,
            "family": None if kind in ("deterministic", "factor") else family,
            "names": watch.names(parts),
            "arguments": {k: (watch.expr(v), plain_constant(fn, k, v)) for k, v in made_of.items()},
            "source": watch.trail(value),
            "frames": msg["cond_indep_stack"],
            "value": value,
        }
        if isinstance(value, Tensor) and kind != "factor":
            msg["value"] = watch.mark(value, name)

    def _pyro_post_param(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        given = given if isinstance(given, torch.nn.Parameter) else None
        module, divider, _ = name.partition("$$$")
        if not divider and given is not None and "." in name:
            module, divider = name.split(".")[0], "."  # an attribute of a PyroModule
        shown = module if divider else name
        entry: dict[str, Any] = {
            "kind": "module" if divider else "parameter",
            "frames": (),
            "names": frozenset(),
            "arguments": {},
        }
        known = self.found.setdefault(shown, {**entry, "held": {}})
        known["held"][name] = (value, msg["kwargs"].get("constraint"))
        if given is not None:  # networks use their own parameter, not the one that the store returns
            self.watch.mark(given, shown, in_place=True)
        msg["value"] = self.watch.mark(value, shown)


def plain_constant(fn: Any, name: str, value: Any) -> Expr | None:
    """A constant argument as a number, a scaled identity matrix or a short listing."""
    constraint = _argument_constraints(unwrap(fn)).get(name)
    try:
        event_dim = constraint.event_dim if constraint is not None else 0
    except NotImplementedError:  # depends on the value
        event_dim = 0
    number = constant(value)
    if number is not None:
        width = value.shape[-1] if isinstance(value, Tensor) and value.dim() else 1
        if event_dim == 1 and width > 1 and constraint is not torch.distributions.constraints.real_vector:
            return Listing((number.value,) * 2, width > 2, bare=True)
        return number
    if not isinstance(value, Tensor) or value.is_complex() or not value.numel():
        return None
    value = value.detach()
    if event_dim == 2 and value.shape[-1] == value.shape[-2]:
        scale = value.flatten()[0]
        if bool((value == scale * torch.eye(value.shape[-1]).to(value)).all()):
            return Apply("eye", (Number(float(scale)),))
    flat = value.flatten()
    if flat.numel() <= 3:
        return Listing(tuple(flat.tolist()), bare=event_dim == 1)
    return Listing((float(flat[0]), float(flat[-1])), more=True, bare=event_dim == 1 and value.dim() == 1)
