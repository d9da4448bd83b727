"""A fitted guide as a proposal for the latents of any rows: what amortised inference is for.

A guide that reads a row and guesses its latents answers for rows that it was not fitted to, at the cost of one pass. Its
guesses are corrected where a density is asked for: log p(x_n) by importance sampling with the guide as the proposal
(Rezende, Mohamed and Wierstra, *Stochastic backpropagation*, ICML 2014, appendix E).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .handlers import Substitute
from .joint import LogJoint
from .methods.batches import by_row, is_latent
from .methods.parameters import guide_arguments, watched

if TYPE_CHECKING:
    from .posterior import Posterior
    from .problem import Problem

#: Rows that are taken at once: large enough for matrix products, small enough for the cache.
ROWS = 1000
#: Rows on which a guide is tried.
FEW = 3


class Recogniser:
    """The fitted guide of a posterior.

    Parameters
    ----------
    problem
        The problem that was fitted; its networks hold the fitted weights.
    parameters
        Fitted values of the guide's `pyro.param`s, by name.
    sites
        Latents of the rows that the guide guesses.
    """

    def __init__(self, problem: Problem, parameters: Mapping[str, Tensor], sites: list[str]) -> None:
        assert problem.guide is not None
        self.problem, self.guide, self.sites = problem, problem.guide, sites
        self.parameters = dict(parameters)

    def trace(self, globals_: Mapping[str, Tensor], kwargs: dict[str, Any]) -> Any:
        """One run of the guide on these rows, its globals held at a draw."""
        guide = Substitute({**self.parameters, **globals_})(self.guide)
        with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
            return poutine.trace(guide).get_trace(**guide_arguments(self.problem, kwargs))

    def takes_any_rows(self) -> bool:
        """Whether the guide runs on another number of rows than it was fitted to."""
        names, fitted = self.problem.structure.row_arguments, self.problem.structure.num_rows
        count = FEW + (fitted == FEW)
        few = {n: v[torch.arange(count) % len(v)] if n in names else v for n, v in self.problem.kwargs.items()}
        try:
            trace = self.trace({}, few)
        except (ValueError, RuntimeError, IndexError, KeyError):
            return False  # it has numbers of its own for every fitted row
        return all(count in trace.nodes[n]["value"].shape for n in self.sites)

    def proposals(self, globals_: Mapping[str, Tensor], kwargs: dict[str, Any]) -> Callable[[], dict[str, dict]]:
        """A function that draws: name of each site -> its node, with a value."""
        first = self.trace(globals_, kwargs)
        if len(self.sites) > 1:  # later sites may hang on earlier ones
            return lambda: {n: node for n, node in self.trace(globals_, kwargs).nodes.items() if n in self.sites}
        node = first.nodes[self.sites[0]]
        return lambda: {self.sites[0]: {**node, "value": node["fn"].sample()}}


def recogniser(posterior: Posterior) -> Recogniser | None:
    """The guide of a fit, where it guesses the latents of a row from the row itself; else None."""
    problem, found = posterior.problem, posterior.extra.get("guide_params", {})
    structure = problem.structure
    if problem.guide is None or posterior.diagnostics.get("guide") != "story":
        return None
    if structure.data_plate is None or not structure.row_arguments or not structure.continuous_locals:
        return None
    watch, trace = watched(problem.thumbnail)
    plate = structure.data_plate
    sites = [n for n, s in trace.nodes.items() if is_latent(s) and any(f.name == plate for f in s["cond_indep_stack"])]
    if not sites or any(p.local for p in watch.found.values()):
        return None
    candidate = Recogniser(problem, found, sites)
    return candidate if candidate.takes_any_rows() else None


class GuideRows:
    """Latents of every row at one draw of the globals, proposed by the fitted guide.

    Parameters
    ----------
    recogniser, joint
        The guide and the story.
    values
        A draw; entries of rows are ignored.
    kwargs
        The rows.
    proposals
        Draws of the guide a row.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        joint: LogJoint,
        values: Mapping[str, Tensor],
        kwargs: dict[str, Any],
        proposals: int,
    ) -> None:
        self.recogniser, self.joint, self.kwargs, self.count = recogniser, joint, kwargs, proposals
        local = {b.name for b in joint.blocks if b.local}
        self.values = {n: v for n, v in values.items() if n not in local}
        names = joint.structure.row_arguments
        self.n = len(kwargs[names[0]])
        self.axes = {b.name: b.axis for b in joint.blocks if b.local}

    def pieces(self) -> Iterator[dict[str, Any]]:
        """The rows in pieces."""
        names = self.joint.structure.row_arguments
        for a in range(0, self.n, ROWS):
            yield {n: v[a : a + ROWS] if n in names else v for n, v in self.kwargs.items()}

    def log_weights(self) -> Tensor:
        """log p(x_n, z) - log q(z | x_n) at draws z of the guide, (S, N)."""
        return torch.cat([self._weights(piece)[0] for piece in self.pieces()], dim=1)

    def all_draws(self, count: int) -> dict[str, Tensor]:
        """Draws of the guide, by site: (count, ...shape) each, as the story samples them."""
        parts = []
        for piece in self.pieces():
            draw = self.recogniser.proposals(self.values, piece)
            drawn = [draw() for _ in range(count)]
            parts.append({n: torch.stack([d[n]["value"] for d in drawn]) for n in self.recogniser.sites})
        return {n: torch.cat([p[n] for p in parts], dim=1 + self.axes[n]) for n in self.recogniser.sites}

    def _weights(self, kwargs: dict[str, Any], keep: bool = False) -> tuple[Tensor, list[dict[str, Tensor]]]:
        plate = self.joint.structure.data_plate
        draw, found, kept = self.recogniser.proposals(self.values, kwargs), [], []
        with torch.no_grad(), pyro.validation_enabled(False):
            for _ in range(self.count):
                nodes = draw()
                values = {n: node["value"] for n, node in nodes.items()}
                log_q = sum(by_row(s["fn"].log_prob(s["value"]), s, plate) for s in nodes.values())
                found.append(self.joint.rows({**self.values, **values}, kwargs) - log_q)
                if keep:
                    kept.append(values)
        return torch.stack(found), kept

    def log_evidence(self) -> tuple[Tensor, Tensor]:
        """log p(x_n | globals) and the variance of the estimated density relative to its square: (N,) each."""
        from .local import evidence

        return evidence(self.log_weights())

    def resample(self, site: str, count: int = 10) -> Tensor:
        """Draws of the guide: (count, N, ...)."""
        return self.all_draws(count)[site].movedim(1 + self.axes[site], 1)

    def resample_jointly(self, count: int) -> dict[str, Tensor]:
        """Draws of all latents of every row, importance-resampled among the guide's: (count, ...shape) each."""
        parts = []
        for piece in self.pieces():
            weights, kept = self._weights(piece, keep=True)
            chosen = torch.distributions.Categorical(logits=weights.T).sample((count,))
            each = torch.arange(weights.shape[1])
            found = {}
            for n, axis in ((n, self.axes[n]) for n in kept[0]):
                table = torch.stack([k[n] for k in kept]).movedim(1 + axis, 1)
                found[n] = table[chosen, each].movedim(1, 1 + axis)
            parts.append(found)
        return {n: torch.cat([p[n] for p in parts], dim=1 + self.axes[n]) for n in parts[0]}
