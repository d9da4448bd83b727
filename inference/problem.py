"""A story and its data, read once, checked and ready for any method."""

from __future__ import annotations

import inspect as signatures
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .data import DataNotice, bind, first_index, has_nan, take_rows
from .handlers import supports_missing
from .session import fresh_seed, isolated
from .shapes import Record, check_supports, record, same_sites, without_values
from .structure import Structure, build, find_data_plate, pair, row_arguments
from .wide import wide_tables

#: Runs of a quick story that are compared with the first: each could take another branch.
MORE_RUNS = 5
#: Numbers in the data, or in the largest table of an enumeration, up to which one thread is fastest.
SMALL = 100_000
#: Rows that are enough to see which site depends on which.
FEW_ROWS = 40
#: Rows beyond which a story is not run on all of them to learn its form.
MANY_ROWS = 1000
#: Rows of large arguments that are looked at in one go.
BLOCK_ROWS = 65_536


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
    admixture
        Which site plays which role, where the story is a topic model (`topics.form.Admixture`), else None.
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
    admixture: Any = None

    @property
    def sketch(self) -> dict[str, Any]:
        """Arguments that are enough to learn the story's form: a few rows, or all where rows are latents of their own."""
        n = self.structure.num_rows
        by_row = self.structure.continuous_locals or any(s.local or n in s.shape for s in self.structure.learned)
        return self.kwargs if by_row or not self.few else self.few

    @property
    def thumbnail(self) -> Problem:
        """The same problem with its first rows only: enough to read how parameters enter, at no cost in rows."""
        return self.over(self.few) if self.few else self

    def over(self, kwargs: dict[str, Any]) -> Problem:
        """The same problem with other rows, checked already."""
        plate, rows = self.structure.data_plate, self.structure.row_arguments
        if not rows or plate is None or kwargs is self.kwargs:
            return self
        plates = {**self.structure.plates, plate: len(kwargs[rows[0]])}
        return replace(self, kwargs=kwargs, structure=replace(self.structure, plates=plates))

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
            ragged = self.admixture is not None and name in self.admixture.ragged
            if ragged or not isinstance(value, Tensor) or not isinstance(fitted, Tensor):
                pass  # padded rows may be wider
            elif value.shape[1:] != fitted.shape[1:]:
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
    problem = Problem(
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
    if structure.continuous_locals:
        from .linear_gaussian import is_linear_gaussian

        with problem.scope(0):
            found = is_linear_gaussian(problem)
        problem = replace(problem, structure=replace(structure, linear_gaussian=found))
        if not found:
            problem = with_admixture(problem)
    elif structure.latents and not any(s.discrete or s.local for s in structure.latents):
        from .conjugate import closed_form

        with problem.scope(0):
            try:
                conjugate = closed_form(problem) is not None
            except (ValueError, RuntimeError, NotImplementedError, IndexError):
                conjugate = False  # the story has another fault, which its method will name
        problem = replace(problem, structure=replace(structure, conjugate=conjugate))
    if problem.admixture is None and (wide := wide_tables(runs.full, structure)):
        for text in wide:
            warnings.warn(text, DataNotice, stacklevel=3)
        problem = replace(problem, structure=replace(problem.structure, notes=(*problem.structure.notes, *wide)))
    return problem


def with_admixture(problem: Problem) -> Problem:
    """The same problem with the roles of its sites, where the story is a topic model."""
    from .topics.form import candidate, recognise

    if candidate(problem) is None:
        return problem
    with problem.scope(0):
        try:
            form = recognise(problem)
        except (ValueError, RuntimeError, NotImplementedError, IndexError):
            form = None  # of another form than it seemed, or with a fault that its method will name
    if form is None:
        return problem
    kind = "dynamic" if form.walk else "static"
    return replace(problem, admixture=form, structure=replace(problem.structure, admixture=kind))


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
    return Runs(full, few, frozenset(moving))


def shorter(
    model: Callable, kwargs: dict[str, Any], dtype: torch.dtype, full: dict[str, Record]
) -> tuple[dict[str, Record], dict[str, Any]]:
    """A run on the first rows only, where that tells the same sites."""
    rows = row_arguments(full, kwargs, find_data_plate(full, kwargs))
    if not rows or len(kwargs[rows[0]]) <= 2 * FEW_ROWS:
        return full, kwargs
    few = take_rows(kwargs, rows, slice(0, FEW_ROWS))
    try:
        with isolated(0, dtype):
            first = record(model, few)
    except (ValueError, RuntimeError, IndexError):
        return full, kwargs  # something of full length lies outside the arguments: keep to all rows
    return (first, few) if first.keys() == full.keys() else (full, kwargs)


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
    if row_arguments(first, parts[0], find_data_plate(first, parts[0])) != names or first.keys() != second.keys():
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


def count_missing(value: Tensor) -> int:
    """NaN in a tensor, block by block."""
    if not value.is_floating_point() or not has_nan(value):
        return 0
    return sum(int(part.isnan().sum()) for part in value.split(BLOCK_ROWS))


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
        if r.kind == "observed" and not r.discrete and isinstance(value, Tensor) and not value.is_floating_point():
            kwargs = {**kwargs, str(r.argument): value.to(dtype)}
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


def check_missing(records: dict[str, Record], kwargs: dict[str, Any]) -> None:
    """NaN is missing data where it is observed by a site that can integrate it out, and an error elsewhere."""
    for name, value in kwargs.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and has_nan(value)):
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
        if r.missing:
            rows = torch.where(rows.isnan(), rows.nanmean(0), rows)
        if not r.discrete and len(rows) > 1:
            still = rows[0] == rows[:: max(1, len(rows) // FEW_ROWS)]
            flat = [j for j in still.all(0).nonzero().flatten().tolist() if bool((rows[:, j] == rows[0, j]).all())]
            if flat:
                notes.append(
                    f"columns {flat[:8]} of {r.argument or r.name} are constant: a learned scale there has only its prior"
                )
        if len(rows) == 1 and r.plates:
            notes.append(f"one row only: what {r.name} says about scales is the prior")
        low, high = torch.aminmax(rows)
        top = max(-float(low), float(high))
        if top > 1e6 and not r.discrete:
            notes.append(f"the scale of {r.argument or r.name} is {top:.0e}; standardise it")
    return notes
