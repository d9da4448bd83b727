"""What depends on what, by numbers: change one value, run the story again, see whose distribution changed.

This decides what watching the operations cannot: values that left torch, and whether row n of a site follows
from row n of its parents alone.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.inspect import site_is_deterministic
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints, transform_to

from .plates_algebra import constant

Run = Callable[[Messenger], None]


def unwrap(fn: Any) -> Any:
    """The distribution inside `Independent`, `ExpandedDistribution` and `MaskedDistribution`."""
    wrappers = (torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn


def tensors_of(value: Any, depth: int = 7, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that a distribution, a transform or a network holds."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or id(value) in seen or isinstance(value, str | int | float | type(None)):
        return
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, torch.nn.Module):
        parts = [*value.parameters(), *vars(value).values()]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, tuple | list | set):
        parts = list(value)
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        parts = list(vars(value).values())
    elif hasattr(value, "__self__") and isinstance(value.__self__, torch.nn.Module):
        parts = [value.__self__]
    for part in parts:
        yield from tensors_of(part, depth - 1, seen)


class Replay(Messenger):
    """Runs a story with every value held, and keeps the distributions that the story then asks for.

    Parameters
    ----------
    values
        Value of each sample and deterministic site.
    params
        Values for `pyro.param` sites.
    """

    def __init__(self, values: Mapping[str, Any], params: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.values, self.params = values, params or {}
        self.asked: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not site_is_subsample(msg) and not site_is_deterministic(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            return
        self.asked[name] = {"fn": msg["fn"], "computed": msg["value"] if site_is_deterministic(msg) else None}
        if site_is_deterministic(msg) and name in self.values:
            msg["value"] = self.values[name]

    def _pyro_post_param(self, msg: Any) -> None:
        if msg["name"] in self.params:
            msg["value"] = self.params[msg["name"]]


def replay(run: Run, values: Mapping[str, Any], params: Mapping[str, Tensor] | None = None) -> dict[str, dict] | None:
    """What each site asks for under these values; None where the story does not run with them."""
    again = Replay(values, params)
    try:
        run(again)
    except Exception:  # a value that the story does not take is no evidence either way
        return None
    return again.asked


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: more than rounding apart."""
    if not a.is_floating_point():
        return a != b
    a, b = a.detach().double(), b.detach().double()
    near = (a - b).abs() <= 1e-6 * (1e-3 + a.abs())
    return ~(near | (a == b) | (a.isnan() & b.isnan()))


def _changed(a: Any, b: Any) -> bool:
    first, second = list(tensors_of(a)), list(tensors_of(b))
    if len(first) != len(second):
        return True
    return any(s.shape != t.shape or _moved(s, t) for s, t in zip(first, second, strict=True))


def _moved(a: Tensor, b: Tensor) -> bool:
    """Some entry is more than rounding apart; most that are compared are equal, which is seen at once."""
    same = a is b or (a.dtype == b.dtype and torch.equal(a, b))
    return not same and bool(_differ(a, b).any())


def _resized(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape
    return both and constant(a) is not None and constant(a) == constant(b)


def another_value(fn: Any, value: Tensor, row: tuple[int, int] | None = None) -> Tensor | None:
    """Another value of the same support; different in entry `row[1]` of dimension `row[0]` if given."""

    def restricted(other: Tensor) -> Tensor | None:
        other = other.to(value.dtype) if other.dtype != value.dtype else other
        if other.shape != value.shape:
            return None
        if row is not None:
            mixed = value.detach().clone()
            mixed.select(*row).copy_(other.select(*row))
            other = mixed
        return other if bool(_differ(value, other).any()) else None

    if _is_discrete(fn) and (other := restricted(_next_in(unwrap(fn), value))) is not None:
        return other
    for _ in range(12):
        try:
            other = restricted(fn.sample())
        except (NotImplementedError, AttributeError, RuntimeError, ValueError):
            break
        if other is not None:
            return other
    return restricted(value.detach() * 1.1 + 0.1) if value.is_floating_point() else None


def entry_changed(value: Tensor, dim: int, row: int) -> Tensor:
    """An argument with other numbers in one entry of a dimension; whole numbers come from its other rows."""
    changed = value.detach().clone()
    old = value.select(dim, row)
    if value.is_floating_point():
        changed.select(dim, row).copy_(old * 1.1 + 0.1)
    else:
        different = (value != old.unsqueeze(dim)).movedim(dim, 0).reshape(value.shape[dim], -1).any(1)
        changed.select(dim, row).copy_(value.select(dim, int(different.int().argmax())))
    return changed


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _next_in(base: Any, value: Tensor) -> Tensor:
    """The next value of a discrete support, the first after the last."""
    support = base.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.boolean:
        return 1 - value
    if support is constraints.one_hot:
        return value.roll(1, -1)
    lower, upper = getattr(support, "lower_bound", 0), getattr(support, "upper_bound", None)
    return value + 1 if upper is None else lower + (value - lower + 1) % (upper - lower + 1)


def another_param(value: Tensor, constraint: Any) -> Tensor | None:
    """A nearby value that keeps the parameter's constraint."""
    if not value.is_floating_point():
        return None
    to = transform_to(constraint if constraint is not None else constraints.real)
    with torch.no_grad():
        unconstrained = to.inv(value)
        return to(unconstrained + torch.linspace(0.1, 0.3, unconstrained.numel()).to(value).view_as(unconstrained))


def changes(
    before: dict[str, dict], after: dict[str, dict] | None, arguments: Callable[[Any], dict[str, Any]]
) -> dict[str, set[str]]:
    """Sites whose distribution (or computed value) changed, with the arguments that did ("" for none)."""
    found: dict[str, set[str]] = {}
    for name, old in before.items() if after is not None else ():
        new = after.get(name) if after is not None else None
        if new is None:
            found[name] = {""}
            continue
        if old["computed"] is not None:
            if _changed(old["computed"], new["computed"]):
                found[name] = {"value"}
        elif _changed(old["fn"], new["fn"]):
            a, b = arguments(old["fn"]), arguments(new["fn"])
            # Where nothing but the number of rows changed, no argument did.
            found[name] = {k for k in a if k not in b or (_changed(a[k], b[k]) and not _resized(a[k], b[k]))} or {""}
    return found


def row_dimension(value: Tensor, fn: Any, dim: int, size: int, computed: bool) -> int | None:
    """The dimension of a value along a plate whose dimension among the batch dimensions is `dim`.

    A deterministic value does not say how many of its dimensions are an event: the plate's size decides.
    """
    tried = range(dim, -value.dim() - 1, -1) if computed else (dim - len(fn.event_shape),)
    return next((d for d in tried if value.dim() >= -d and value.shape[d] == size), None)


def rows_changed(old: dict, new: dict, value: Any, dim: int, size: int) -> Tensor | None:
    """Which entries along plate dimension `dim` (counted from the right of the batch shape) change.

    Returns
    -------
    Tensor or None
        Boolean, (size,); None where neither a value nor a density can be compared.
    """
    if old["computed"] is not None:
        a, b = old["computed"], new["computed"]
        dim = row_dimension(a, old["fn"], dim, size, True) or dim
    elif isinstance(unwrap(old["fn"]), dist.Unit):
        a, b = unwrap(old["fn"]).log_factor, unwrap(new["fn"]).log_factor
    else:
        try:
            a, b = _log_prob(old["fn"], value), _log_prob(new["fn"], value)
        except Exception:  # no density, or not for this value
            return None
    if a.shape != b.shape or a.dim() < -dim:
        return None
    return _differ(a, b).movedim(dim, 0).flatten(1).any(1) if a.dim() > 1 else _differ(a, b)


def aligned(
    before: dict, with_row: Callable[[int], dict | None], names: list[str], values: dict, frame: Any
) -> set[str]:
    """Sites whose row r, and no other, changes where row r of something is changed; tried until some r shows it."""
    good: set[str] = set()
    bad: set[str] = set()
    last = frame.size - 1
    for r in dict.fromkeys((0, last, last // 2, last // 3, *range(1, min(7, frame.size)))):
        left = [n for n in names if n in before and n not in good and n not in bad]
        after = with_row(r) if left else None
        for name in left if after is not None else ():
            rows = None
            if after is not None and name in after:
                rows = rows_changed(before[name], after[name], values.get(name), frame.dim, frame.size)
            if rows is None or len(rows) != frame.size:
                bad.add(name)
            elif bool(rows.any()):
                (good if bool(rows[r]) and int(rows.sum()) == 1 else bad).add(name)
    return good


def row_changed(site: dict, value: Any, frame: Any, row: int) -> Tensor | None:
    """The value of a site with another row of a plate; None where it has no rows there."""
    if not isinstance(value, Tensor) or site["kind"] == "factor":
        return None
    dim = row_dimension(value, site["fn"], frame.dim, frame.size, site["kind"] == "deterministic")
    return None if dim is None else another_value(site["fn"], value, (dim, row))


def varies(asked: dict, value: Any, dim: int, size: int) -> bool:
    """Whether a site's distribution differs between the rows of a plate: told by the density of one value in all rows."""
    fn = asked["fn"]
    if asked["computed"] is not None or not isinstance(value, Tensor) or isinstance(unwrap(fn), dist.Unit):
        return False
    at = value.dim() - len(fn.event_shape) + dim
    if not 0 <= at < value.dim() or value.shape[at] != size:
        return False
    try:
        rows = _log_prob(fn, value.narrow(at, 0, 1).expand_as(value))
    except Exception:  # no density, or not for this value
        return False
    if rows.dim() < -dim or rows.shape[dim] != size:
        return False
    return bool(_differ(rows, rows.narrow(dim, 0, 1).expand_as(rows)).any())


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    floating = next((t.dtype for t in tensors_of(fn) if t.is_floating_point()), value.dtype)
    return fn.log_prob(value.to(floating) if value.is_floating_point() else value)


def networks_of(story: Any) -> list[torch.nn.Module]:
    """Networks that a story holds or closes over."""
    owner = getattr(story, "__self__", story)
    around = [owner, *(vars(owner).values() if hasattr(owner, "__dict__") else ())]
    code = inspect.getclosurevars(story) if inspect.isfunction(story) else None
    around += [*code.nonlocals.values(), *code.globals.values()] if code else []
    return [m for m in around if isinstance(m, torch.nn.Module)]


@contextmanager
def buffers_kept(networks: list[torch.nn.Module]) -> Iterator[None]:
    """Running averages of batch normalisation and the like stay as they were."""
    kept = [(b, b.detach().clone()) for m in networks for b in m.buffers()]
    try:
        yield
    finally:
        for buffer, old in kept:
            buffer.data.copy_(old)
