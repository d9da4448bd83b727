"""What a guide and a story learn: their `pyro.param`s, the weights of their networks, and the rows that a guide is shown."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from ..data import has_nan
from ..handlers import MissingCells
from ..lazy_rows import has_lazy
from ..problem import Problem
from ..rehearsal import MANY_ROWS
from .networks import Networks

#: Step size of a network's weights relative to that of other parameters.
NETWORK_RATE = 0.25


@dataclass(frozen=True)
class Parameter:
    """One `pyro.param`: its constraint, and whether it has one entry a row on its first axis."""

    name: str
    constraint: Any
    local: bool


class Watch(Messenger):
    """Note the parameters that a program asks for, and by which names it knows the weights of networks.

    `rows` are the numbers of rows that it may be run with.
    """

    def __init__(self, plate: str | None, rows: set[int], weights: Mapping[int, str]) -> None:
        super().__init__()
        self.plate, self.rows, self.weights = plate, rows, weights
        self.found: dict[str, Parameter] = {}
        self.known: dict[str, str] = {}

    def _pyro_post_param(self, msg: dict) -> None:
        free = pyro.get_param_store()._params.get(msg["name"])
        if free is None:
            return
        if id(free) in self.weights:
            self.known[self.weights[id(free)]] = msg["name"]
            return
        inside = any(frame.name == self.plate for frame in msg["cond_indep_stack"])
        value = msg["value"]
        local = inside and value.ndim > 0 and len(value) in self.rows
        self.found[msg["name"]] = Parameter(msg["name"], msg["kwargs"].get("constraint", constraints.real), local)


def no_guess(**data: Any) -> None:
    """The guide of a story that leaves nothing to guess."""


def watched(problem: Problem, networks: Networks | None = None) -> tuple[Watch, Any]:
    """One run of the guide and of the story beside it: what they learn, and the guide's trace."""
    guide = problem.guide or no_guess
    networks = networks or Networks(problem.story, problem.model, problem.guide)
    shown = told = problem
    if has_lazy(problem.kwargs):  # some rows tell as much; what the rows share may start from all of them
        told = problem.thumbnail
        shown = told if problem.structure.continuous_locals else problem
    rows = {p.structure.num_rows or 1 for p in (shown, told)}
    watch = Watch(problem.structure.data_plate, rows, {id(p): n for n, p in networks.weights.items()})
    many = (problem.structure.num_rows or 0) > MANY_ROWS  # their form was looked at before, on a few
    unchecked = pyro.validation_enabled(False) if many else nullcontext()
    pyro.clear_param_store()
    with torch.no_grad(), poutine.block(), watch, unchecked:
        trace = poutine.trace(guide).get_trace(**guide_arguments(problem, shown.kwargs))
        if problem.structure.learned or not many:  # a story that learns nothing has no parameter to start
            poutine.replay(MissingCells()(problem.model), trace=trace)(**told.kwargs)
    return watch, trace


def reads_missing(guide: Any) -> bool:
    """Whether a guide wants to see the holes in its data: it, or the object it belongs to, has `reads_missing = True`."""
    return bool(
        getattr(guide, "reads_missing", False) or getattr(getattr(guide, "__self__", None), "reads_missing", False)
    )


def guide_arguments(problem: Problem, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Rows as the guide takes them: holes (NaN) filled with the fitted data's column means, unless it reads holes."""
    if reads_missing(problem.guide):
        return dict(kwargs)
    return {n: filled(v, problem.kwargs.get(n)) for n, v in kwargs.items()}


def column_means(problem: Problem) -> dict[str, Tensor]:
    """Means of the columns of every argument of rows that has holes."""
    found = {}
    for name in problem.structure.row_arguments:
        value = problem.kwargs[name]
        if value.is_floating_point() and has_nan(value):
            found[name] = value.nanmean(0).nan_to_num(0.0).to(problem.device)
    return found


def filled(value: Any, fitted: Any) -> Any:
    """NaN replaced by the mean of its column in the fitted data: a guide may guess from anything."""
    if not (isinstance(value, Tensor) and value.is_floating_point() and has_nan(value)):
        return value
    mean = fitted.nanmean(0) if isinstance(fitted, Tensor) and fitted.ndim else torch.zeros_like(value)
    return torch.where(value.isnan(), mean.nan_to_num(0.0), value)
