"""One run of a story, recorded site by site, with every dimension held against the plates.

Pyro checks shapes only for some methods, and NUTS accepts an (N, 1) observation or a forgotten plate in silence and
returns a wrong posterior; here the check is the same for every method and happens before any work.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .data import first_index
from .dimensions import refuse_parts
from .handlers import FlatStart, unwrap
from .lazy_rows import LazyRows
from .mending import MISTAKES, retold

#: Rows that are checked at once.
PIECE_ROWS = 65_536


@dataclass(frozen=True)
class Record:
    """What one run showed of one site; `loops` are those of its plates that Python goes through one by one."""

    name: str
    kind: str
    family: str
    shape: tuple[int, ...]
    event_shape: tuple[int, ...] = ()
    plates: tuple[str, ...] = ()
    plate_sizes: tuple[int, ...] = ()
    loops: frozenset[str] = frozenset()
    leftmost: int = 0
    discrete: bool = False
    states: int | None = None
    listable: bool = False
    argument: str | None = None
    missing: int = 0
    support: str = ""
    constraint: Any = None
    bounds: tuple[float, ...] = ()
    improper: bool = False
    has_density: bool = True
    reparameterised: bool = True
    fn: Any = None
    value: Any = None


class Recorder(Messenger):
    """Outermost handler: sees every site as the story finally told it."""

    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.kwargs = kwargs
        self.records: dict[str, Record] = {}
        self.plates: set[str] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            nested = any(f.name == name for f in msg["cond_indep_stack"])  # Pyro has words for that
            if name in self.plates and not nested:
                size = msg["fn"].size
                raise ValueError(
                    f"plate {name!r} of size {size} is made twice; make it once and enter it wherever it is needed:\n"
                    f'  {name} = pyro.plate("{name}", {size})   and then   with {name}:'
                )
            self.plates.add(name)
            return
        if name in self.records:
            raise ValueError(
                f'two sites are called {name!r}; every pyro.sample needs a name of its own (f"{name}_{{i}}"), or, for '
                f'many that are alike, one statement inside `with pyro.plate("components", K):`'
            )
        self.records[name] = site_record(msg, self.kwargs)

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        constraint = msg["kwargs"].get("constraint", torch.distributions.constraints.real)
        frames = msg["cond_indep_stack"]
        self.records[msg["name"]] = Record(
            msg["name"],
            "param",
            "parameter",
            tuple(value.shape),
            constraint=constraint,
            support=_constraint_name(constraint),
            plates=tuple(f.name for f in frames),
            plate_sizes=tuple(f.size for f in frames),
            value=value,
        )


def record(model: Callable, kwargs: Mapping[str, Any]) -> dict[str, Record]:
    """Run the story once and record its sites, in order.

    Raises
    ------
    ValueError
        Shapes that no plate explains, or two sites of one name.
    """
    recorder = Recorder(kwargs)
    try:
        with torch.no_grad(), poutine.block(), recorder, FlatStart():
            model(**kwargs)
    except MISTAKES as error:
        match = re.match(
            r"Shape mismatch inside plate\('(.+?)'\) at site (\S+) dim (-?\d+), (\d+) vs (\d+)", str(error)
        )
        if match is None:
            told = retold(error, recorder.records, kwargs)
            if told is None:
                raise
            raise told from error
        plate, site, dim, expected, found = match.groups()
        raise ValueError(
            f"site {site!r} holds {found} values inside plate {plate!r} of size {expected}: dimension {dim} belongs to the "
            f"plate and must have {expected} entries, one a row.\n"
            f"  the {found} values are one vector: append `.to_event(1)` to the distribution\n"
            f"  they are rows: make both lengths equal, {found} and {expected}"
        ) from None
    return recorder.records


def site_record(msg: dict, kwargs: Mapping[str, Any]) -> Record:
    """Check one site against its plates and describe it."""
    from .structure import states_of

    name, fn, value = msg["name"], msg["fn"], msg["value"]
    frames = [f for f in msg["cond_indep_stack"]]
    base = unwrap(fn)
    if isinstance(base, dist.Unit) or type(base).__name__ == "Unit":
        kind = "factor"
    elif (msg["infer"] or {}).get("_deterministic"):
        kind = "deterministic"
    else:
        kind = "observed" if msg["is_observed"] else "latent"
    if kind == "latent":
        refuse_parts(name, msg["mask"])
    vectorised = {f.dim: f for f in frames if f.vectorized}
    if kind in ("observed", "latent"):
        check_batch(name, fn, vectorised, kind == "observed")
        if kind == "observed":
            check_observed(name, fn, value, vectorised)
    support = getattr(fn, "support", None)
    discrete = bool(getattr(support, "is_discrete", False))
    states, listable = states_of(fn) if kind == "latent" and discrete else (None, False)
    batch = len(getattr(fn, "batch_shape", ()))
    return Record(
        name,
        kind,
        type(base).__name__ if kind not in ("factor", "deterministic") else kind,
        tuple(getattr(value, "shape", ())) if kind != "factor" else tuple(fn.batch_shape),
        tuple(getattr(fn, "event_shape", ())),
        tuple(f.name for f in frames),
        tuple(f.size for f in frames),
        loops=frozenset(f.name for f in frames if not f.vectorized),
        leftmost=min([0, -batch if kind != "factor" else 0, *vectorised]),
        discrete=discrete,
        states=states,
        listable=listable,
        argument=_argument(name, value, kwargs) if kind == "observed" else None,
        missing=int(value.isnan().sum()) if kind == "observed" and torch.is_floating_point(value) else 0,
        support=_constraint_name(support),
        constraint=support,
        bounds=_bounds(support),
        improper=isinstance(base, dist.ImproperUniform),
        has_density=_has_density(kind, fn, value),
        reparameterised=bool(getattr(fn, "has_rsample", False)),
        fn=fn,
        value=value,
    )


def check_batch(name: str, fn: Any, frames: Mapping[int, Any], observed: bool = True) -> None:
    """Every batch dimension of the distribution belongs to a plate of its size."""
    shape = tuple(fn.batch_shape)
    for dim in range(-len(shape), 0):
        n = shape[dim]
        if n <= 1 or dim in frames:
            continue
        told = f"site {name!r} holds {n} values side by side (batch shape {shape}, dim {dim}) and no plate says "
        twice = next((f for f in frames.values() if f.size == n), None)
        if twice is not None:
            raise ValueError(
                f"{told}what they are.\n"
                f"  plate {twice.name!r} of size {n} lies on dim {twice.dim}: a column ({n}, 1) has met a row ({n},), and "
                f"every row holds all rows\n"
                f"  mend: drop the last dimension of the column, .squeeze(-1), so that it is ({n},)"
            )
        raise ValueError(
            f"{told}whether they are independent.\n"
            f'  independent: sample it inside `with pyro.plate("{"data" if observed else "components"}", {n}):`\n'
            f"  one vector:  append `.to_event(1)` to its distribution"
        )


def check_observed(name: str, fn: Any, value: Any, frames: Mapping[int, Any]) -> None:
    """The observed value has exactly the shape that the plates and the event ask for."""
    if not isinstance(value, Tensor):
        raise TypeError(f"site {name!r} observes a {type(value).__name__}; pass a tensor: obs=torch.as_tensor(...)")
    wanted, found = tuple(fn.batch_shape) + tuple(fn.event_shape), tuple(value.shape)
    if found == wanted:
        return
    plates = ", ".join(f"plate {f.name!r} of size {f.size}" for f in frames.values()) or "no plate"
    event = tuple(fn.event_shape)
    where = f"site {name!r} observes values of shape {found}, but {plates} and one event of shape {event} make {wanted}"
    if not frames and len(found) > len(fn.event_shape):
        n = found[0]
        raise ValueError(
            f"{where}: {n} values lie outside a plate.\n"
            f'  independent: sample it inside `with pyro.plate("data", {n}):`\n'
            f"  one vector:  append `.to_event(1)` to its distribution"
        )
    raise ValueError(f"{where}.\n  {misfit(found, wanted)}\n  {mending_line(name, found, wanted, event)}")


def misfit(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The dimension that does not fit, in words."""
    if len(found) > len(wanted):
        dim = (
            len(wanted)
            if found[: len(wanted)] == wanted
            else next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), len(wanted))
        )
        return f"dimension {dim} of the data, {found[dim]} long, belongs to no plate and to no event"
    if len(found) < len(wanted):
        return f"the data have {len(found)} dimensions and need {len(wanted)}"
    dim = next(i for i, (a, b) in enumerate(zip(found, wanted)) if a != b)
    return f"dimension {dim} of the data is {found[dim]} long and should be {wanted[dim]}"


def mending_line(name: str, found: tuple[int, ...], wanted: tuple[int, ...], event: tuple[int, ...]) -> str:
    """What to change, for the commonest mistakes."""
    batch = wanted[: len(wanted) - len(event)]
    if found == (*wanted, 1):
        return f"drop the last dimension of the data: {name}.squeeze(-1), shape {wanted}"
    if found[:1] == wanted[:1] and len(found) == len(wanted) + 1:
        return "if each row is one vector, append `.to_event(1)` to the distribution"
    if found == event and event[: len(batch)] == batch:
        return (
            f"the plate counts these {event[0]} rows already: use `.to_event({len(event) - 1})` instead of {len(event)}"
        )
    if len(found) < len(wanted):
        return (
            f"one value would be copied to all members of the plate; observe one each "
            f"({name}.expand{wanted} if a copy is meant)"
        )
    if len(found) != len(wanted):
        return f"reshape the data to {wanted}"
    if len(found) == 2 and found == wanted[::-1]:
        return f"rows and columns have changed places: observe {name}.mT, shape {wanted}"
    if found[: len(batch)] == batch:
        mine, theirs = wanted[len(batch) :], found[len(batch) :]
        return f"one event of the distribution is {mine} and one row of the data {theirs}: give its parameters shape {theirs}"
    return f"make the lengths equal: the data need {wanted}, or the plate the size {found[0]}"


def check_supports(records: Mapping[str, Record], moving: frozenset[str]) -> None:
    """Observed values lie in their support, wherever the support does not depend on a latent.

    Raises
    ------
    ValueError
        Naming site, number of wrong values, the first and its index.
    """
    for name, r in records.items():
        if r.kind != "observed" or name in moving or r.constraint is None:
            continue
        if r.fn.__dict__.get("_validate_args") is False or not r.has_density:
            continue
        value = r.value
        if value.ndim and len(value) > PIECE_ROWS and all_inside(r, value):
            continue
        if isinstance(value, LazyRows):
            good = torch.cat([inside(r, part) for part in value.split(PIECE_ROWS)])
        else:
            good = inside(r, value)
        if bool(good.all()):
            continue
        where = first_index(~good)
        found = value[where]
        text = f"{found.item():g}" if found.numel() == 1 else str(found.tolist()[:8])
        raise ValueError(
            f"site {name!r}: {int((~good).sum())} of {good.numel()} observed values lie outside the support of {r.family} "
            f"({r.support}); the first is {text} at index {where[0] if len(where) == 1 else where}. {_hint(r, value)}"
        )


def inside(r: Record, value: Tensor) -> Tensor:
    """Which observed values lie in the support; missing ones do."""
    assert r.constraint is not None
    good = r.constraint.check(torch.nan_to_num(value) if r.missing else value)
    if r.missing:
        nan = value.isnan()
        good = good | (nan.flatten(good.ndim).any(-1) if nan.ndim > good.ndim else nan)
    return good


def all_inside(r: Record, value: Tensor) -> bool:
    """Whether all do, looked at in pieces of rows: no table as large as the data is made."""
    try:
        return all(bool(inside(r, part).all()) for part in value.split(PIECE_ROWS))
    except (RuntimeError, ValueError):
        return False  # a support that differs from row to row


def _hint(r: Record, value: Tensor) -> str:
    top, low = value.max().item(), value.min().item()
    if r.family in ("Bernoulli", "ContinuousBernoulli") and top > 1:
        return "Pixels in 0..255: divide by 255 and round, e.g. (x / 255).round()"
    if r.family == "Bernoulli" and low >= 0:
        return "Grey values between 0 and 1 are no yes or no: threshold them, e.g. (x > 0.5), or choose another distribution"
    if r.family == "Categorical":
        shift = f": use {r.name} - {low:g}" if low > 0 else ""
        return f"Labels run from {low:g} to {top:g}; they must count from 0 to the number of classes - 1{shift}"
    if r.support.startswith("whole numbers") and bool((value != value.round()).any()):
        return "Counts are whole numbers; measurements want a distribution over the reals (Normal, Gamma)"
    if low < 0:
        return "Negative values are impossible here: check the data or choose a distribution over the reals"
    return "Check the data, or choose a distribution whose support holds them"


def same_sites(first: Mapping[str, Record], second: Mapping[str, Record]) -> None:
    """The set of sites is the same in every run; a branch on a random value is refused."""
    came, went = [n for n in second if n not in first], [n for n in first if n not in second]
    if came or went:
        raise ValueError(
            f"the set of sites changes from run to run: {[*went, *came]} come and go. A branch depends on a random "
            f"value; sample every site in each run (torch.where between the alternatives), or sum the branch out"
        )
    for name, r in first.items():
        if r.shape != second[name].shape and r.kind != "observed":
            raise ValueError(f"site {name!r} changes its shape from run to run: {r.shape}, then {second[name].shape}")


def without_values(records: Mapping[str, Record]) -> dict[str, Record]:
    """The same records holding no tensors."""
    return {name: replace(r, fn=None, value=None) for name, r in records.items()}


def _has_density(kind: str, fn: Any, value: Any) -> bool:
    if kind != "observed":
        return True
    base = unwrap(fn)
    if isinstance(base, dist.Delta):
        return False
    try:
        fn.log_prob(value)
    except NotImplementedError:
        return False
    except (ValueError, RuntimeError):
        return True
    return True


def _argument(name: str, value: Any, kwargs: Mapping[str, Any]) -> str | None:
    if isinstance(value, Tensor):
        pointer = value.untyped_storage().data_ptr()
        for argument, given in kwargs.items():
            if isinstance(given, Tensor) and given.untyped_storage().data_ptr() == pointer:
                return argument
    return name if name in kwargs else None


def _bounds(support: Any) -> tuple[float, ...]:
    """Numbers that move when the bounds of a support depend on a draw."""
    inner = support
    while isinstance(inner, torch.distributions.constraints.independent):
        inner = inner.base_constraint
    numbers: list[float] = []
    for attribute in ("lower_bound", "upper_bound"):
        bound = getattr(inner, attribute, None)
        if isinstance(bound, Tensor):
            bound = bound.double()
            numbers += [bound.sum().item(), bound.min().item(), bound.max().item()]
        elif isinstance(bound, (int, float)):
            numbers.append(float(bound))
    return tuple(numbers)


def _constraint_name(support: Any) -> str:
    if support is None:
        return ""
    inner = support
    while isinstance(inner, torch.distributions.constraints.independent):
        inner = inner.base_constraint
    plain = type(inner).__name__.lstrip("_")
    names = {
        "Real": "the reals",
        "Boolean": "{0, 1}",
        "IntegerGreaterThan": "whole numbers from 0",
        "Simplex": "the simplex",
        "PositiveDefinite": "positive-definite matrices",
        "GreaterThan": "positive numbers",
        "GreaterThanEq": "non-negative numbers",
    }
    bounds = [getattr(inner, a, None) for a in ("lower_bound", "upper_bound")]
    if plain in ("IntegerInterval", "Interval") and all(b is not None for b in bounds):
        low, high = (float(torch.as_tensor(b).double().flatten()[0]) for b in bounds)
        return f"{'whole numbers' if plain == 'IntegerInterval' else 'numbers'} from {low:g} to {high:g}"
    return names.get(plain, plain)
