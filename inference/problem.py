"""A story and its data, read once, checked and ready for any method."""

from __future__ import annotations

import inspect as signatures
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .data import DataNotice, bind, has_nan
from .distributed import ALONE, Ranks
from .handlers import supports_missing
from .lazy_rows import LazyRows, has_lazy
from .looks import where
from .notes import part_notes, value_notes
from .rehearsal import DeviceMismatch, Runs, check_covariates, check_switches, run_checked
from .session import at_home, fresh_seed, isolated, parts_of_plates
from .shapes import Record, check_supports, without_values
from .structure import Structure, build, pair
from .wide import wide_tables

#: Numbers in the data, or in the largest table of an enumeration, up to which one thread is fastest.
SMALL = 100_000


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
    asked
        The device as the user named it.
    few
        The same arguments with the first rows only.
    admixture
        Which site plays which role, where the story is a topic model (`topics.form.Admixture`), else None.
    ranks
        The processes that work on it together; the rows here are this one's.
    twins
        Arguments on a card, each with the same in the processor's memory.
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
    asked: str = "auto"
    few: dict[str, Any] = field(default_factory=dict)
    admixture: Any = None
    ranks: Ranks = ALONE
    twins: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def all_rows(self) -> int:
        """Rows of all ranks together."""
        return self.ranks.total(max(1, self.structure.num_rows or 1))

    @property
    def sketch(self) -> dict[str, Any]:
        """Arguments that are enough to learn the story's form: a few rows, or all where rows are latents of their own."""
        n = self.structure.num_rows
        by_row = self.structure.continuous_locals or any(s.local or n in s.shape for s in self.structure.learned)
        if has_lazy(self.kwargs):
            return self.few or self.kwargs
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
        return replace(self, kwargs=kwargs, structure=replace(self.structure, plates=plates), twins=())

    @property
    def small(self) -> bool:
        """Whether waking a second thread costs more than the arithmetic it would share."""
        elements = self.structure.data_bytes / self.structure.itemsize
        return max(elements, self.structure.enumeration_elements()) < SMALL

    def scope(self, seed: int | None = None) -> AbstractContextManager[None]:
        """Everything that runs the story runs in here: see `isolated`; small problems on one thread."""
        return isolated(seed, self.dtype, threads=1 if self.small else None, device=self.device)

    def with_data(self, data: Any) -> dict[str, Any]:
        """Checked arguments for other data of the same story (new rows).

        Raises
        ------
        TypeError, ValueError
            As for `fit`, and where an observed column count differs from the fitted one.
        """
        kwargs = bind(self.model, data, self.dtype, self.device, new=True)
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
        self.check_shared(kwargs)
        return kwargs

    def check_shared(self, kwargs: dict[str, Any]) -> None:
        """Other rows must leave what the rows share as it was fitted; see `shared_sizes.check_shared`."""
        from .shared_sizes import check_shared

        check_shared(self, kwargs)


def networks_of(story: Any) -> list[nn.Module]:
    """Networks that a story owns, or is."""
    modules = [story] if isinstance(story, nn.Module) else []
    return modules + [v for v in getattr(story, "__dict__", {}).values() if isinstance(v, nn.Module)]


def settle(story: Any, guide: Any, device: torch.device) -> None:
    """Take the networks of a private copy, and of its guide, to a device."""
    for module in (*networks_of(story), *networks_of(getattr(guide, "__self__", guide))):
        module.to(device)


def brought_home(problem: Problem) -> Problem:
    """The same problem in the processor's memory, where answers are given: the card is free again."""
    if problem.device.type == "cpu":
        return problem
    settle(problem.story, problem.guide, home := torch.device("cpu"))
    known = {id(there): twin for there, twin in problem.twins}

    def come_home(value: Tensor) -> Tensor:
        return known[id(value)] if id(value) in known else here(value, home)

    kwargs, few = (
        {n: come_home(v) if isinstance(v, Tensor) else v for n, v in given.items()}
        for given in (problem.kwargs, problem.few)
    )
    form = None if problem.admixture is None else problem.admixture.to(home)
    return replace(problem, kwargs=kwargs, few=few, device=home, admixture=form, twins=())


def here(value: Tensor, home: torch.device) -> Tensor:
    """A tensor on the processor; of rows that are read as they are needed, the place where they are handed out."""
    return value.like(device=home) if isinstance(value, LazyRows) else value.to(home)


def story_dtype(story: Any) -> torch.dtype:
    """float64, unless the story owns networks: then theirs."""
    for module in networks_of(story):
        for parameter in module.parameters():
            return parameter.dtype
    return torch.float64


def choose_device(device: str | torch.device) -> torch.device:
    """The device that a name means; "auto" begins on the processor.

    Raises
    ------
    ValueError
        CUDA was asked for and there is none, or no such card, or the name means no device that fits run on.
    """
    if device == "auto":
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index):
        raise ValueError(f"device={device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:0'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: no CUDA device was found; use device='cpu' or device='auto'")
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        there = "only 'cuda:0'" if count == 1 else f"'cuda:0' to 'cuda:{count - 1}'"
        raise ValueError(f"device={device!r}: there is no such card; here {'is' if count == 1 else 'are'} {there}")
    return chosen


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
    derived = guide if hasattr(guide, "build") else None  # one that is made when the story's shapes are known
    if guide is not None and not callable(guide) and derived is None:
        raise TypeError(f"guide must be a Pyro program (a callable) or Amortised(...), got {type(guide).__name__}")
    guide = guide or own_guide
    where, kept = choose_device(device), {}
    if where.type != "cpu":
        kept = rehearse(story, model, guide, data)
        settle(story, guide, where)
    asked = {"seed": fresh_seed() if seed is None else seed, "budget": budget, "progress": progress}
    with at_home(where):
        problem = read(story, model, guide, derived, data, where, **asked, want=want, asked=str(device))
    return replace(problem, twins=tuple(twins(problem.kwargs, kept)))


def rehearse(story: Any, model: Callable, guide: Any, data: Any) -> dict[str, Any]:
    """Run a story on the processor before a card does: an index out of range there ends all its work in this process.

    Returns
    -------
    The arguments in the processor's memory; none of a story that holds tensors on the card, which is left to it.

    Raises
    ------
    TypeError, ValueError
        As `prepare`.
    """
    home = torch.device("cpu")
    settle(story, guide, home)
    try:
        return told(model, data, story_dtype(story), home)[1]
    except DeviceMismatch:
        return {}


def twins(there: dict[str, Any], here: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Arguments on a card, each with the one in the processor's memory, which a file may lie under."""
    for name, value in there.items():
        twin = here.get(name)
        if isinstance(value, Tensor) and isinstance(twin, Tensor) and (value.shape, value.dtype) == (twin.shape, twin.dtype):
            yield value, twin


def told(
    model: Callable, data: Any, dtype: torch.dtype, where: torch.device
) -> tuple[Runs, dict[str, Any], torch.dtype, list[str]]:
    """What some runs of the story on these data show, their arguments, the precision that it takes, and notes."""
    kwargs = bind(model, data, dtype, where)
    check_switches(model, kwargs, dtype)
    check_covariates(model, kwargs, dtype)
    return run_checked(model, kwargs, dtype, where)


def read(
    story: Any, model: Callable, guide: Any, derived: Any, data: Any, where: torch.device, **asked: Any
) -> Problem:
    """Bind the data to the story's arguments, run it, and tell its structure."""
    notes: list[str] = []
    dtype = story_dtype(story)
    with parts_of_plates() as parts:
        runs, kwargs, dtype, more = told(model, data, dtype, where)
    notes += more + part_notes(parts, runs.full)
    check_supports(runs.full, runs.moving)
    check_missing(runs.full, kwargs)
    notes += value_notes(runs.full)
    moving = runs.moving - runs.by_states
    with isolated(0, dtype), torch.no_grad():
        from .provenance import dependencies

        direct = dependencies(model, **runs.few)
        parents = see_through(direct, runs.full)
    structure = build(
        without_values(runs.full), moving, kwargs, parents, direct, has_guide=guide is not None, notes=tuple(notes)
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
        few=runs.few,
        **asked,
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
    if derived is not None:
        problem = replace(problem, guide=derived.build(problem))
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

    known: dict[str, set[str]] = {}

    def ends(name: str) -> set[str]:
        if name not in known:
            known[name] = set()
            for parent in direct.get(name, ()):
                made = parent in records and records[parent].kind == "deterministic"
                known[name] |= ends(parent) if made else {parent} & records.keys()
        return known[name]

    return {name: tuple(n for n in records if n in found) for name in records for found in [ends(name)]}


def _private_copy(story: Any) -> Any:
    """Stories with networks are trained in place: work on a copy. Functions are shared."""
    try:
        return deepcopy(story)
    except Exception as error:  # any __deepcopy__ may fail in any way
        raise TypeError(
            f"the story cannot be copied ({error}); keep open files, locks and generators out of it"
        ) from error


def check_missing(records: dict[str, Record], kwargs: dict[str, Any]) -> None:
    """NaN is missing data where it is observed by a site that can integrate it out, and an error elsewhere."""
    for name, value in kwargs.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and has_nan(value)):
            continue
        count, index = where(value, torch.isnan)
        text = f"{name} holds {count} NaN, the first at index {index[0] if len(index) == 1 else index}"
        sites = [r for r in records.values() if r.kind == "observed" and r.argument == name]
        for r in sites:
            if r.missing and not supports_missing(r.fn):
                raise ValueError(
                    f"{text}; site {r.name!r} ({r.family}) has no closed marginal over the other cells. Drop these rows, "
                    f"leave them out with poutine.mask, or use a distribution over independent cells or a MultivariateNormal"
                )
