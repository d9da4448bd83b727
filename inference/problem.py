"""A story and its data, read once, checked and ready for any method."""

import inspect as signatures
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .data import bind, first_index, take_rows
from .handlers import supports_missing
from .session import fresh_seed, isolated
from .shapes import Record, check_supports, record, same_sites, without_values
from .structure import Structure, build, find_data_plate, pair, row_arguments

#: Runs of a quick story that are compared with the first: each could take another branch.
MORE_RUNS = 5
#: Numbers in the data, or in the largest table of an enumeration, up to which one thread is fastest.
SMALL = 100_000
#: Rows that are enough to see which site depends on which.
FEW_ROWS = 40


@dataclass(frozen=True)
class Problem:
    """Everything a method needs.

    Attributes
    ----------
    story, model, guide
        A copy of the user's story, its model and its guide (None: to be derived).
    kwargs
        Tensors on one device for the model's arguments.
    structure
        What `inspect` read.
    dtype, device, seed
        Where and how numbers are made.
    budget
        Seconds that the method may run, or None.
    progress
        Whether to draw progress bars.
    few
        The same arguments with the first rows only.
    """

    story: Any
    model: Callable
    guide: Callable | None
    kwargs: dict[str, Any]
    structure: Structure
    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    budget: float | None = None
    progress: bool = False
    want: str = "auto"
    few: dict[str, Any] = field(default_factory=dict)

    @property
    def sketch(self) -> dict[str, Any]:
        """Arguments that are enough to learn the story's form: a few rows, or all where rows are latents of their own."""
        n = self.structure.num_rows
        by_row = self.structure.continuous_locals or any(s.local or n in s.shape for s in self.structure.learned)
        return self.kwargs if by_row or not self.few else self.few

    @property
    def small(self) -> bool:
        """Whether waking a second thread costs more than the arithmetic it would share."""
        elements = self.structure.data_bytes / self.structure.itemsize
        return max(elements, self.structure.enumeration_elements()) < SMALL

    def scope(self, seed: int | None = None) -> AbstractContextManager[None]:
        """Everything that runs the story runs in here: see `isolated`; small problems on one thread."""
        return isolated(seed, self.dtype, threads=1 if self.small else None)

    def with_data(self, data: Any) -> dict[str, Any]:
        """Checked arguments for other data of the same story (new rows).

        Raises
        ------
        TypeError, ValueError
            As for `fit`, and where an observed column count differs from the fitted one.
        """
        kwargs = bind(self.model, data, self.dtype, self.device)
        for name, value in kwargs.items():
            fitted = self.kwargs.get(name)
            if isinstance(value, Tensor) and isinstance(fitted, Tensor) and value.shape[1:] != fitted.shape[1:]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; the story was fitted to rows of shape {tuple(fitted.shape[1:])}"
                )
            if isinstance(value, Tensor) and isinstance(fitted, Tensor) and fitted.is_floating_point():
                kwargs[name] = value.to(self.dtype)
        for name, value in self.kwargs.items():
            if name not in kwargs and not isinstance(value, Tensor):
                kwargs[name] = value
        missing = [n for n in self.kwargs if n not in kwargs and n in self.structure.row_arguments]
        optional = {n for n, p in signatures.signature(self.model).parameters.items() if p.default is not p.empty}
        if bad := [n for n in missing if n not in optional]:
            raise TypeError(f"new data lack {bad}; the story was fitted with {list(self.kwargs)}")
        for name, value in self.kwargs.items():
            if name not in kwargs and name not in self.structure.row_arguments:
                kwargs[name] = value
        return kwargs


def story_dtype(story: Any) -> torch.dtype:
    """float64, unless the story owns networks: then theirs."""
    modules = [story] if isinstance(story, nn.Module) else []
    modules += [v for v in getattr(story, "__dict__", {}).values() if isinstance(v, nn.Module)]
    for module in modules:
        for parameter in module.parameters():
            return parameter.dtype
    return torch.float64


def choose_device(device: str | torch.device) -> tuple[torch.device, str | None]:
    """The device, and a note where "auto" had to decide.

    Raises
    ------
    ValueError
        CUDA was asked for and there is none, or the name means nothing to PyTorch.
    """
    if device == "auto":
        return torch.device("cpu"), None
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:0'") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: no CUDA device was found; use device='cpu' or device='auto'")
    return chosen, None


def prepare(
    story: Any,
    data: Any,
    *,
    guide: Callable | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    budget: float | None = None,
    progress: bool = False,
    want: str = "auto",
) -> Problem:
    """Validate the data, run the story twice and read its structure.

    Raises
    ------
    TypeError, ValueError
        See `fit`; nothing has been run for long and nothing global has changed.
    """
    pair(story)
    story = _private_copy(story)
    model, own_guide = pair(story)
    if guide is not None and not callable(guide):
        raise TypeError(f"guide must be a Pyro program (a callable), got {type(guide).__name__}")
    guide = guide or own_guide
    where, note = choose_device(device)
    notes = [note] if note else []
    dtype = story_dtype(story)
    kwargs = bind(model, data, dtype, where)
    check_covariates(model, kwargs, dtype)
    runs, kwargs, dtype, more = run_checked(model, kwargs, dtype, where)
    notes += more
    check_supports(runs.full, runs.moving)
    check_missing(runs.full, kwargs)
    notes += value_notes(runs.full)
    with isolated(0, dtype), torch.no_grad():
        from .provenance import dependencies

        direct = dependencies(model, **runs.few)
        parents = see_through(direct, runs.full)
    structure = build(
        without_values(runs.full), runs.moving, kwargs, parents, direct, has_guide=guide is not None, notes=tuple(notes)
    )
    structure = replace(structure, itemsize=torch.finfo(dtype).bits // 8)
    return Problem(
        story,
        model,
        guide,
        kwargs,
        structure,
        dtype,
        where,
        fresh_seed() if seed is None else seed,
        budget,
        progress,
        want,
        runs.few,
    )


def see_through(direct: dict[str, tuple[str, ...]], records: dict[str, Record]) -> dict[str, tuple[str, ...]]:
    """Parents with deterministic sites replaced by what they are made of, in program order."""

    def ends(name: str) -> set[str]:
        found: set[str] = set()
        for parent in direct.get(name, ()):
            made = parent in records and records[parent].kind == "deterministic"
            found |= ends(parent) if made else {parent} & set(records)
        return found

    return {name: tuple(n for n in records if n in ends(name)) for name in records}


def _private_copy(story: Any) -> Any:
    """Stories with networks are trained in place: work on a copy. Functions are shared."""
    try:
        return deepcopy(story)
    except Exception as error:  # any __deepcopy__ may fail in any way
        raise TypeError(
            f"the story cannot be copied ({error}); keep open files, locks and generators out of it"
        ) from error


@dataclass(frozen=True)
class Runs:
    """What the story showed: all rows once, and sites whose support moves between draws on `few` rows."""

    full: dict[str, Record]
    few: dict[str, Any]
    moving: frozenset[str]


def run_and_compare(model: Callable, kwargs: dict[str, Any], dtype: torch.dtype) -> Runs:
    """One run on all rows, more with other draws on a few of them; all must tell the same sites."""
    start = time.perf_counter()
    with isolated(0, dtype):
        full = record(model, kwargs)
    first, few = full, kwargs
    plate = find_data_plate(full, kwargs)
    rows = row_arguments(full, kwargs, plate)
    if rows and len(kwargs[rows[0]]) > 2 * FEW_ROWS:
        shorter = take_rows(kwargs, rows, slice(0, FEW_ROWS))
        try:
            with isolated(0, dtype):
                first, few = record(model, shorter), shorter
            if first.keys() != full.keys():
                first, few = full, kwargs
        except (ValueError, RuntimeError, IndexError):
            pass  # something of full length lies outside the arguments: keep to all rows
    quick = few is not kwargs or time.perf_counter() - start < 0.05
    moving: set[str] = set()
    for seed in range(1, (MORE_RUNS if quick else 1) + 1):  # a rare branch shows itself in more runs
        with isolated(seed, dtype):
            other = record(model, few)
        same_sites(first, other)
        moving |= {name for name, r in first.items() if r.bounds != other[name].bounds}
    return Runs(full, few, frozenset(moving))


def run_checked(
    model: Callable, kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[Runs, dict[str, Any], torch.dtype, list[str]]:
    """Run the story; whole numbers become floats, or float64 becomes float32, if the story needs it."""
    notes: list[str] = []
    try:
        runs = run_and_compare(model, kwargs, dtype)
    except RuntimeError as error:
        if not is_dtype_error(error):
            raise
        floats, note = as_floats(kwargs, dtype)
        attempts = [(floats, dtype, note)] if note else []
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
            notes.append(text)
            break
        else:
            raise
    for r in list(runs.full.values()):
        value = kwargs.get(r.argument) if r.argument else None
        if r.kind == "observed" and not r.discrete and isinstance(value, Tensor) and not value.is_floating_point():
            kwargs = {**kwargs, str(r.argument): value.to(dtype)}
            notes.append(f"{r.argument} holds whole numbers and {r.family} wants real ones: converted to {dtype}")
            runs = run_and_compare(model, kwargs, dtype)
    return runs, kwargs, dtype, notes


def is_dtype_error(error: RuntimeError) -> bool:
    """Whether PyTorch complains about mixed dtypes."""
    text = str(error)
    return any(t in text for t in ("same dtype", "scalar type", "expected m1 and m2", "dtype"))


def as_floats(kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    whole = [n for n, v in kwargs.items() if isinstance(v, Tensor) and not v.is_floating_point()]
    floats = {n: v.to(dtype) if n in whole else v for n, v in kwargs.items()}
    return floats, f"{', '.join(whole)}: whole numbers converted to {dtype}" if whole else ""


def check_covariates(model: Callable, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """NaN in an argument that no site observes: told before the story meets it and fails in its own words."""
    holes = {
        n: v for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and bool(v.isnan().any())
    }
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


def check_missing(records: dict[str, Record], kwargs: dict[str, Any]) -> None:
    """NaN is missing data where it is observed by a site that can integrate it out, and an error elsewhere."""
    for name, value in kwargs.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())):
            continue
        nan = value.isnan()
        where = first_index(nan)
        text = f"{name} holds {int(nan.sum())} NaN, the first at index {where[0] if len(where) == 1 else where}"
        sites = [r for r in records.values() if r.kind == "observed" and r.argument == name]
        for r in sites:
            if r.missing and not supports_missing(r.fn):
                raise ValueError(
                    f"{text}; site {r.name!r} ({r.family}) has no closed marginal over the other cells. Drop these rows, "
                    f"or use a distribution over independent cells or a MultivariateNormal"
                )


def value_notes(records: dict[str, Record]) -> list[str]:
    """What is unusual about the observed values, though not wrong."""
    notes = []
    for r in records.values():
        if r.kind != "observed" or not isinstance(r.value, Tensor) or not r.value.is_floating_point():
            continue
        if r.missing:
            notes.append(f"{r.missing} cells of {r.argument or r.name} are missing (NaN) and are integrated out")
        rows = r.value.flatten(1) if r.value.ndim > 1 else r.value.unsqueeze(-1)
        if not r.discrete and len(rows) > 1:
            filled = rows.nan_to_num(0.0)
            flat = ((rows - filled.mean(0)).nan_to_num(0.0).abs().amax(0) == 0).nonzero().flatten().tolist()
            if flat:
                notes.append(
                    f"columns {flat[:8]} of {r.argument or r.name} are constant: a learned scale there has only its prior"
                )
        if len(rows) == 1 and r.plates:
            notes.append(f"one row only: what {r.name} says about scales is the prior")
        top = rows.nan_to_num(0.0).abs().max().item()
        if top > 1e6 and not r.discrete:
            notes.append(f"the scale of {r.argument or r.name} is {top:.0e}; standardise it")
    return notes
