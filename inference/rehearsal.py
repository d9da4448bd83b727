"""A story is told a few times before any method runs: what it shows of itself, in which precision, and whether it can be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .data import first_index, has_nan, take_rows
from .lazy_rows import LazyRows
from .session import isolated
from .shapes import Record, record, same_sites
from .structure import find_data_plate, row_arguments

#: Runs of a quick story that are compared with the first: each could take another branch.
MORE_RUNS = 5
#: Rows that are enough to see which site depends on which.
FEW_ROWS = 40
#: Rows beyond which a story is not run on all of them to learn its form.
MANY_ROWS = 1000
#: Rows of large arguments that are looked at in one go.
BLOCK_ROWS = 65_536


def count_missing(value: Tensor) -> int:
    """NaN in a tensor, block by block."""
    if not value.is_floating_point() or not has_nan(value):
        return 0
    return sum(int(part.isnan().sum()) for part in value.split(BLOCK_ROWS))


@dataclass(frozen=True)
class Runs:
    """What the story showed: all rows once, and sites whose support moves between draws on `few` rows.

    Those `by_states` do not move where the finite latents stay: summing these out meets every support there is.
    """

    full: dict[str, Record]
    few: dict[str, Any]
    moving: frozenset[str]
    by_states: frozenset[str] = frozenset()


def run_and_compare(model: Callable, kwargs: dict[str, Any], dtype: torch.dtype) -> Runs:
    """One run on all rows (or what a few show of them), more with other draws; all must tell the same sites."""
    start = time.perf_counter()
    grown = run_few(model, kwargs, dtype)
    if grown is not None:
        full, first, few = grown
    else:
        with isolated(0, dtype):
            full = record(model, kwargs)
        first, few = shorter(model, kwargs, dtype, full)
    quick = few is not kwargs or time.perf_counter() - start < 0.05
    moving: set[str] = set()
    for seed in range(1, (MORE_RUNS if quick else 1) + 1):  # a rare branch shows itself in more runs
        with isolated(seed, dtype):
            other = record(model, few)
        same_sites(first, other)
        moving |= {name for name, r in first.items() if r.bounds != other[name].bounds}
    return Runs(full, few, frozenset(moving), moved_by_states(model, few, dtype, first, moving))


def moved_by_states(
    model: Callable, kwargs: dict[str, Any], dtype: torch.dtype, first: dict[str, Record], moving: set[str]
) -> frozenset[str]:
    """Sites among `moving` whose support is that of the first run in every run with the same finite latents."""
    states = {n: r.value for n, r in first.items() if r.kind == "latent" and r.listable and isinstance(r.value, Tensor)}
    if not moving or not states:
        return frozenset()
    still = set(moving)
    for seed in range(1, MORE_RUNS + 1):
        with isolated(seed, dtype):
            other = record(poutine.condition(model, data=states), kwargs)
        still &= {name for name in still if name in other and first[name].bounds == other[name].bounds}
    return frozenset(still)


def shorter(
    model: Callable, kwargs: dict[str, Any], dtype: torch.dtype, full: dict[str, Record]
) -> tuple[dict[str, Record], dict[str, Any]]:
    """A run on a few rows only, where that tells the same sites and what the rows share keeps its shape."""
    plate = find_data_plate(full, kwargs)
    rows = row_arguments(full, kwargs, plate)
    if not rows or len(kwargs[rows[0]]) <= 2 * FEW_ROWS:
        return full, kwargs
    choices: list[Any] = [slice(0, FEW_ROWS)]
    if (telling := extreme_rows(kwargs, rows)) is not None:
        choices.append(telling)
    for some in choices:
        few = take_rows(kwargs, rows, some)
        try:
            with isolated(0, dtype):
                first = record(model, few)
        except (ValueError, RuntimeError, IndexError):
            continue  # something of full length lies outside the arguments
        if first.keys() == full.keys() and shares_alike(first, full, plate):
            return first, few
    return full, kwargs


def extreme_rows(kwargs: dict[str, Any], rows: tuple[str, ...]) -> Tensor | None:
    """The last rows, and those with the least and the greatest of every whole-numbered argument.

    A story that counts its groups in the data (`int(group.max()) + 1`) tells as many of them there as on all rows.
    """
    whole = [
        kwargs[n].flatten(1) if kwargs[n].ndim > 1 else kwargs[n].unsqueeze(1) for n in rows if is_whole(kwargs[n])
    ]
    if not whole:
        return None
    n = len(whole[0])
    ends = [part for v in whole for part in (v.argmin(0)[:FEW_ROWS], v.argmax(0)[:FEW_ROWS]) if v.shape[1]]
    last = torch.arange(max(0, n - FEW_ROWS), n, device=whole[0].device)
    return torch.cat([last, *ends]).unique()


def is_whole(value: Any) -> bool:
    """Whether an argument holds whole numbers, such as labels of groups; counts that are kept elsewhere are none."""
    labels = isinstance(value, Tensor) and not isinstance(value, LazyRows)
    return labels and not value.is_floating_point() and value.ndim > 0


def shares_alike(few: dict[str, Record], full: dict[str, Record], data_plate: str | None) -> bool:
    """Whether unknowns outside the data plate, and every other plate, have the same size in both runs."""
    for name, r in full.items():
        other = few[name]
        sizes = [{p: n for p, n in zip(x.plates, x.plate_sizes) if p != data_plate} for x in (r, other)]
        if sizes[0] != sizes[1]:
            return False
        if r.kind in ("latent", "param") and data_plate not in r.plates and r.shape != other.shape:
            return False
    return True


def run_few(
    model: Callable, kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Record], dict[str, Record], dict[str, Any]] | None:
    """(what a run on all rows would show, a run on the first rows, these rows), or None where it must be run.

    A story of many rows is run on two small numbers of them: what grows from the one to the other grows with the rows,
    and the values of a site that observes an argument as it is are known without a run.
    """
    lengths = {len(v) for v in kwargs.values() if isinstance(v, Tensor) and v.ndim}
    n = max(lengths, default=0)
    if n <= MANY_ROWS:
        return None
    names = tuple(name for name, v in kwargs.items() if isinstance(v, Tensor) and v.ndim and len(v) == n)
    sizes, parts, runs = (FEW_ROWS, FEW_ROWS + 17), [], []
    try:
        for size in sizes:
            parts.append(take_rows(kwargs, names, slice(0, size)))
            with isolated(0, dtype):
                runs.append(record(model, parts[-1]))
    except (ValueError, RuntimeError, IndexError):
        return None
    first, second = runs
    plate = find_data_plate(first, parts[0])
    if first.keys() != second.keys() or not shares_alike(first, second, plate):
        return None
    if (telling := extreme_rows(kwargs, names)) is not None:
        try:
            with isolated(0, dtype):
                third = record(model, take_rows(kwargs, names, telling))
        except (ValueError, RuntimeError, IndexError):
            return None
        if third.keys() != first.keys() or not shares_alike(first, third, plate):
            return None  # groups are counted in the data
    if row_arguments(first, parts[0], plate) != names:
        return None
    full = {}
    for name, r in first.items():
        grown = grow(r, second[name], sizes, n)
        if grown is None:
            return None
        if r.kind == "observed":
            given = kwargs.get(r.argument or "")
            seen = parts[0].get(r.argument or "")
            same = isinstance(seen, Tensor) and isinstance(r.value, Tensor) and seen.shape == r.value.shape
            if not same or not isinstance(seen, Tensor) or not isinstance(given, Tensor):
                return None
            if seen.data_ptr() != r.value.data_ptr() or r.bounds != second[name].bounds:
                return None
            missing = count_missing(given)
            grown = replace(grown, value=given, missing=missing)
        full[name] = grown
    return full, first, parts[0]


def grow(a: Record, b: Record, sizes: tuple[int, int], n: int) -> Record | None:
    """A record of n rows from those of two smaller numbers of rows; None where it grows in another way."""

    def longer(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...] | None:
        if len(x) != len(y) or any(i != j and (i, j) != sizes for i, j in zip(x, y)):
            return None
        return tuple(n if i != j else i for i, j in zip(x, y))

    shape, plates = longer(a.shape, b.shape), longer(a.plate_sizes, b.plate_sizes)
    if shape is None or plates is None or a.event_shape != b.event_shape or a.plates != b.plates:
        return None
    return replace(a, shape=shape, plate_sizes=plates)


def run_checked(
    model: Callable, kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[Runs, dict[str, Any], torch.dtype, list[str]]:
    """Run the story; whole numbers become floats, or float64 becomes float32, if the story needs it."""
    notes: list[str] = []
    try:
        runs = run_and_compare(model, kwargs, dtype)
    except RuntimeError as error:
        check_devices(error, device)
        if not is_dtype_error(error):
            raise
        floats, note = as_floats(kwargs, dtype)
        attempts = [(widened(kwargs, dtype), dtype, "")] if widened(kwargs, dtype) is not kwargs else []
        attempts += [(widened(floats, dtype), dtype, note)] if note else []
        single = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in kwargs.items()}
        attempts.append((single, torch.float32, "the story holds float32 tensors: everything runs in float32"))
        for values, kind, text in attempts:
            try:
                runs = run_and_compare(model, values, kind)
            except RuntimeError as again:
                if not is_dtype_error(again):
                    raise
                continue
            kwargs, dtype = values, kind
            notes += [text] if text else []
            break
        else:
            raise
    if dtype == torch.float64 and single_latents(runs) and widened(kwargs, torch.float32) is not kwargs:
        if not any(isinstance(v, Tensor) and v.dtype == torch.float32 for v in kwargs.values()):
            kwargs, dtype = widened(kwargs, torch.float32), torch.float32
            notes.append("the story draws its latents in float32: everything runs in float32")
            runs = run_and_compare(model, kwargs, dtype)
    seen = {r.argument for r in runs.full.values() if r.kind == "observed"}
    kept = [n for n, v in kwargs.items() if isinstance(v, Tensor) and v.dtype == torch.float32 != dtype]
    if any(n not in seen for n in kept) or (kept and single_latents(runs)):
        # covariates meet parameters in matrix products; a story that follows the data's dtype would be half as precise
        kwargs = widened(kwargs, dtype)
        runs = run_and_compare(model, kwargs, dtype)
    elif kept:
        notes.append(f"{', '.join(kept)} stays in float32; parameters and sums are {str(dtype).removeprefix('torch.')}")
    for r in list(runs.full.values()):
        value = kwargs.get(r.argument) if r.argument else None
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        if r.kind == "observed" and isinstance(value, Tensor) and whole and (not r.discrete or refuses_whole(r)):
            kwargs = {**kwargs, str(r.argument): value.to(dtype)}
            if not r.discrete:
                notes.append(f"{r.argument} holds whole numbers and {r.family} wants real ones: converted to {dtype}")
            runs = run_and_compare(model, kwargs, dtype)
    return runs, kwargs, dtype, notes


def widened(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating arguments in the dtype of the story; the same mapping where they are already."""
    if not any(isinstance(v, Tensor) and v.is_floating_point() and v.dtype != dtype for v in kwargs.values()):
        return kwargs
    return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in kwargs.items()}


def single_latents(runs: Runs) -> list[str]:
    """Continuous latents that the story draws in single precision."""
    return [n for n, r in runs.full.items() if r.kind == "latent" and r.value.dtype == torch.float32]


def refuses_whole(r: Record) -> bool:
    """Whether a discrete family has no density of whole numbers, as PyTorch's Bernoulli has not."""
    if r.family not in ("Bernoulli", "MixtureSameFamily"):
        return False
    try:
        with torch.no_grad():
            r.fn.log_prob(r.value)
    except RuntimeError as error:
        return is_dtype_error(error) or "can't be cast" in str(error)
    return False


def is_dtype_error(error: RuntimeError) -> bool:
    """Whether PyTorch complains about mixed dtypes."""
    text = str(error)
    return any(t in text for t in ("same dtype", "scalar type", "expected m1 and m2", "dtype"))


class DeviceMismatch(ValueError):
    """The story holds tensors on another device than the data."""


def check_devices(error: RuntimeError, device: torch.device) -> None:
    """Say in words that a story mixes devices.

    Raises
    ------
    DeviceMismatch
        `error` is about tensors on different devices.
    """
    if "device" not in str(error):
        return
    found = re.findall(r"\b(?:cpu|meta|mps|(?:cuda|xpu|hpu)(?::\d+)?)\b", str(error))
    others = sorted({name for name in found if torch.device(name).type != device.type})
    if others:
        raise DeviceMismatch(
            f"the data are on device {str(device)!r} and the story holds tensors on {', '.join(map(repr, others))}: pass "
            f"device={others[0]!r} to fit, or move the story's tensors to {str(device)!r} ({error})"
        ) from error


def as_floats(kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """Arguments with whole numbers as floats, and what was converted, in words."""
    whole = [n for n, v in kwargs.items() if isinstance(v, Tensor) and not v.is_floating_point()]
    floats = {n: v.to(dtype) if n in whole else v for n, v in kwargs.items()}
    return floats, f"{', '.join(whole)}: whole numbers converted to {dtype}" if whole else ""


def check_switches(model: Callable, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Truth values are masks and switches for a story; one that a site observes must say what True counts as.

    Raises
    ------
    TypeError
        A site observes an argument of dtype bool, or the story cannot be told with one and could with numbers.
    """
    switches = [n for n, v in kwargs.items() if isinstance(v, Tensor) and v.dtype == torch.bool]
    if not switches:
        return

    def told(values: dict[str, Any]) -> set[str | None] | None:
        try:
            with isolated(0, dtype):
                return {r.argument for r in record(model, values).values() if r.kind == "observed"}
        except (ValueError, RuntimeError, TypeError, IndexError):
            return None

    seen = told(kwargs)
    if seen is None and told({n: v.to(dtype) if n in switches else v for n, v in kwargs.items()}) is not None:
        seen = set(switches)
    if wrong := [n for n in switches if n in (seen or ())]:
        name = wrong[0]
        raise TypeError(f"{name} has dtype bool; say what True counts as: pass {name}.float() or {name}.astype(float)")


def check_covariates(model: Callable, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """NaN in an argument that no site observes: told before the story meets it and fails in its own words."""
    holes = {n: v for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and has_nan(v)}
    if not holes:
        return
    filled = {
        n: torch.where(v.isnan(), v.nanmean(0) if v.ndim else v, v) if n in holes else v for n, v in kwargs.items()
    }
    try:
        with isolated(0, dtype):
            records = record(model, filled)
    except (ValueError, RuntimeError):
        return  # the story has another fault, which the checked runs will name
    seen = {r.argument for r in records.values() if r.kind == "observed"}
    for name, value in holes.items():
        if name not in seen:
            nan = value.isnan()
            where = first_index(nan)
            raise ValueError(
                f"{name} holds {int(nan.sum())} NaN, the first at index {where[0] if len(where) == 1 else where}, and no site "
                f"observes it: a covariate cannot be missing; impute it, drop the rows, or give it a distribution in the story"
            )
