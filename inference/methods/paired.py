"""The ELBO of a story's own guide: model and guide run side by side, finite latents that the guide leaves out summed out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.distributions import constraints, transform_to

from ..capture import Captured, capture, reason_of
from ..handlers import MissingCells, ScaleRows, Substitute, unwrap
from ..joint import LogJoint
from ..lazy_rows import has_lazy
from ..problem import Problem
from ..recorder import pure_graph
from ..sharing import fewer_rows
from .ascent import Leaves
from .batches import JUDGED, Batches, is_latent, side_by_side
from .networks import Networks
from .paired_draws import own_draws, row_ratios
from .parameters import NETWORK_RATE, Parameter, column_means, guide_arguments, no_guess, reads_missing, watched
from .scored import compares, score_step
from .shared import in_step, joint_draws, of_all_ranks, whole_norm
from .svi_step import ASKED, faster
from .tightened import tight_step
from .weighted import PLAIN, Weights, weighted_elbo

#: Draws a step where the story has to be run for each.
EAGER_PARTICLES = 2


class PairTarget:
    """Parameters of guide and model, and the weights of their networks.

    Raises
    ------
    ValueError
        The guide lacks a latent that cannot be summed out, samples what the story observes or does not know, or gives a
        site another shape.
    """

    def __init__(
        self,
        problem: Problem,
        particles: int,
        batch_size: int | None,
        mode: str = "auto",
        steps: int = 1,
        weighing: Weights = PLAIN,
        alpha: float | None = None,
        pool: Tensor | None = None,
        path: bool = False,
    ) -> None:
        self.weighing, self.made, self.path = replace(weighing, formula=weighing.formula and not path), 0, path
        self.wanted, self.steps = mode, steps
        self.problem, self.particles, self.guide = problem, particles, problem.guide or no_guess
        self.joint = LogJoint(problem)
        self.batches = Batches(problem, batch_size, pool)
        self.plate = problem.structure.data_plate
        self.joint.holes = {s.name: s.missing > 0 for s in problem.structure.observed}
        self.networks = Networks(problem.story, problem.model, problem.guide)
        lazy = has_lazy(problem.kwargs)  # these have their holes filled batch by batch
        self.filled = problem.kwargs if lazy else guide_arguments(problem, problem.kwargs)
        self.means = column_means(problem) if lazy and not reads_missing(problem.guide) else {}
        self.held: dict[str, Tensor] = {}  # rows that are not on the device, while a step runs on them
        self.feeds = False
        self.judged: tuple[Tensor, dict[str, Any], dict[str, Any]] | None = None  # rows, taken once for many draws
        initialise = getattr(problem.story, "initialise", None)
        if callable(initialise):  # weights that the data set, such as those of layers that normalise
            with torch.no_grad():
                initialise(**self.filled)
        self.parameters: dict[str, Parameter] = {}
        self.names: dict[str, str] = {}
        first = self.start()
        if not first:
            raise ValueError("the guide has no parameters and the story learns none: there is nothing to optimise")
        trace = self.guide_trace(first, self.look)
        self.check(trace)
        self.sites = [n for n, s in trace.nodes.items() if is_latent(s)]
        known = problem.structure
        self.latents = [n for n in self.sites if n in known and not known[n].enumerable]
        self.points = all(type(unwrap(trace.nodes[n]["fn"])).__name__ == "Delta" for n in self.latents)
        self.certain = not self.sites and not self.parameters  # every climb is the same
        if not self.sites:
            self.particles = 1
        self.follows = all(trace.nodes[n]["fn"].has_rsample for n in self.sites)
        self.mode = "eager"
        self.reason = "the guide has latents whose draws have no gradient (score function estimator)"
        self.call: Callable[..., Any] = self.by_score
        self.lanes = False  # whether one call takes all particles side by side
        if not self.follows and compares(self, trace):
            self.call, self.lanes = partial(score_step, self), True
        if self.follows:
            self.call = self.capture(first) if alpha is None else self.tighten(first, alpha)
        elif not weighing.plain or alpha is not None or path:
            raise ValueError(
                "beta, free_bits, gradient='path' and objectives other than 'elbo' need guides whose draws have a gradient; "
                "this one needs score functions"
            )

    # -- parameters --------------------------------------------------------------------------------------------------

    def start(self) -> Leaves:
        """Free parameters as guide and model start them, and copies of the networks' weights."""
        self.made = 0
        watch, _ = watched(self.problem, self.networks)
        self.parameters = watch.found
        self.names = {watch.known.get(n, n): n for n in self.networks.weights}
        store = pyro.get_param_store()
        leaves = {n: store._params[n].detach().clone() for n in watch.found}
        leaves |= {n: self.networks.weights[own].detach().clone() for n, own in self.names.items()}
        return in_step(self, leaves)

    @property
    def look(self) -> Tensor | None:
        """Rows that the guide is looked at on: all, or a batch where rows have latents and are many.

        These are made when they are asked for, or more than a finished fit is judged on; the guide must read them.
        """
        if self.batches.size is None or not self.problem.structure.continuous_locals:
            return None
        many = self.batches.rows > JUDGED and not any(p.local for p in self.parameters.values())
        return self.batches.first() if has_lazy(self.problem.kwargs) or many else None

    def by_row(self, name: str) -> bool:
        """Whether a parameter has a value a row."""
        return name in self.parameters and self.parameters[name].local

    @property
    def answers_rows(self) -> bool:
        """Whether anything is guessed or learned for every row, so that none may be left out of the answer."""
        structure = self.problem.structure
        if self.look is not None:
            return False
        own = any(n not in structure or structure[n].local for n in self.sites)
        return self.batches.size is None or own or any(p.local for p in self.parameters.values())

    @property
    def shared(self) -> list[str]:
        """Sites of the guide that rows share."""
        structure = self.problem.structure
        return [n for n in self.sites if n not in structure or not structure[n].local]

    @property
    def apart(self) -> bool:
        """Whether ranks draw latents that all rows share along with those of their own rows, so that no two draws are one."""
        return self.problem.ranks.shares_rows and bool(self.problem.structure.continuous_locals) and bool(self.shared)

    def whole_norm(self, norm: Tensor, gradients: Leaves) -> Tensor:
        """With the parts of other ranks' rows."""
        return whole_norm(self, norm, gradients)

    def rate(self, name: str) -> float:
        """Networks take smaller steps."""
        return 1.0 if name in self.parameters else NETWORK_RATE

    def values(self, leaves: Leaves) -> dict[str, Tensor]:
        """Parameters in their own space, and weights."""
        values = self.constrained(leaves)
        return values | {n: v for n, v in leaves.items() if n not in values}

    def constrained(self, leaves: Leaves, rows: Tensor | None = None) -> Leaves:
        """Parameters in their own space, of all rows or of some."""
        found = {}
        for name, parameter in self.parameters.items():
            value = transform_to(parameter.constraint)(leaves[name])
            found[name] = value[rows] if parameter.local and rows is not None else value
        return found

    # -- the ELBO ----------------------------------------------------------------------------------------------------

    def arguments(self, rows: Tensor | None, filled: bool = False) -> dict[str, Any]:
        """The story's arguments, of all rows or of some; `filled` without holes, as the guide takes them."""
        if self.judged is not None and rows is self.judged[0]:
            _, told, guided = self.judged
            return guided if filled else told
        kwargs = self.filled if filled else self.problem.kwargs
        if self.held:
            kwargs = {**self.problem.kwargs, **self.held}
        elif rows is not None:
            kwargs = {n: v[rows] if n in self.batches.names else v for n, v in kwargs.items()}
        if not (filled and self.means):
            return kwargs
        return {n: torch.where(v.isnan(), self.means[n], v) if n in self.means else v for n, v in kwargs.items()}

    def guide_trace(self, leaves: Leaves, rows: Tensor | None = None, drawn: Leaves | None = None) -> Any:
        """One run of the guide, its latents held at what was `drawn`."""
        guide = Substitute({**self.constrained(leaves, rows), **(drawn or {})})(self.guide)
        with poutine.block():
            return self.networks.run(
                self.weights(leaves), lambda: poutine.trace(guide).get_trace(**self.arguments(rows, filled=True))
            )

    def scored_trace(self, leaves: Leaves, rows: Tensor | None = None) -> Any:
        """A run of the guide with log densities; their slope in the parameters is left out where `path` is asked for.

        That slope has mean zero, and noise that stays where the guide is the posterior (Roeder, Wu and Duvenaud, 2017).
        """
        trace = self.guide_trace(leaves, rows)
        if self.path:
            drawn = {n: s["value"] for n, s in trace.nodes.items() if is_latent(s)}
            trace = self.guide_trace({n: v.detach() for n, v in leaves.items()}, rows, drawn)
        trace.compute_log_prob()
        return trace

    def guide_leaves(self, leaves: Leaves) -> set[str]:
        """Parameters that the guide's draws depend on."""
        free = {n: v.detach().requires_grad_() for n, v in leaves.items()}
        with torch.enable_grad():
            drawn = [s["value"].sum() for s in self.guide_trace(free, self.look).nodes.values() if is_latent(s)]
            slopes = torch.autograd.grad(sum(drawn), list(free.values()), allow_unused=True)
        return {n for n, slope in zip(free, slopes, strict=True) if slope is not None}

    def weights(self, leaves: Leaves) -> Leaves:
        """Weights of networks by their own names."""
        return {own: leaves[n] for n, own in self.names.items()}

    @contextmanager
    def judging(self) -> Iterator[None]:
        """While it is open, the rows that a finished fit is judged on are taken once for all draws."""
        rows = None if self.answers_rows else self.batches.judged_rows()[0]
        if rows is not None:
            self.judged = (rows, self.arguments(rows), self.arguments(rows, filled=True))
        try:
            yield
        finally:
            self.judged = None

    def log_ratio(self, leaves: Leaves, rows: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(data, u) - log q(u) at one draw u of the guide, and u; see `judging`."""
        scale = self.batches.scale
        if rows is None and self.judged is not None:
            rows, scale = self.judged[0], self.batches.judged_rows()[1]
        elif rows is None and self.answers_rows:
            scale = self.batches.whole
        elif rows is None:
            rows, scale = self.batches.judged_rows()
        trace = self.guide_trace(leaves, rows)
        trace.compute_log_prob()
        values = {n: s["value"] for n, s in trace.nodes.items() if is_latent(s)}
        log_q: Any = 0.0
        for site in trace.nodes.values():
            if is_latent(site):
                inside = any(f.name == self.plate for f in site["cond_indep_stack"])
                log_q = log_q + (scale if inside else 1.0) * site["log_prob"].sum()
        given = {**values, **self.constrained(leaves, rows)}
        log_p = self.networks.run(self.weights(leaves), lambda: self.joint.density(given, self.arguments(rows), scale))
        return log_p - log_q, values

    def objective(self, leaves: Leaves) -> tuple[Tensor, Leaves]:
        """An estimate of the ELBO on a batch, and of its gradient."""
        rows: tuple[Tensor, ...] = () if self.batches.size is None else (self.batches.next(),)
        rows = self.fed(rows[0]) if self.feeds and rows else rows
        if isinstance(self.weighing.beta, tuple):  # an input of the graph: it moves without another capture
            first = next(iter(leaves.values()))
            rows = (torch.full((), self.weighing.at(self.made), dtype=first.dtype, device=first.device), *rows)
            self.made += 1
        calls = 1 if self.lanes else self.particles
        call = getattr(self.call, "once", self.call) if calls == 1 else self.call  # nothing is kept until the next step
        parts = [call(*leaves.values(), *rows) for _ in range(calls)]
        means = parts[0] if calls == 1 else [torch.stack(part).mean(0) for part in zip(*parts)]
        return of_all_ranks(self, means[0], dict(zip(leaves, means[1:])))

    def capture(self, leaves: Leaves) -> Callable[..., Any]:
        """Value and gradient at one draw, as a graph where that is possible."""
        names = list(leaves)

        def by_path(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad(), pyro.validation_enabled(False):
                free = [t.detach().requires_grad_() for t in inputs[: len(names)]]
                beta, rows, held = self.beside(inputs[len(names) :])
                self.held = dict(zip(self.batches.names, held))
                try:
                    value, _ = weighted_elbo(self, dict(zip(names, free)), rows, beta)
                except torch.linalg.LinAlgError:
                    return (free[0].new_full((), torch.nan), *(torch.full_like(f, torch.nan) for f in free))
                finally:
                    self.held = {}
                slopes = torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True)
            return (value.detach(), *slopes)

        some = next(iter(leaves.values()))
        moves = (
            (torch.full((), 0.5, dtype=some.dtype, device=some.device),)
            if isinstance(self.weighing.beta, tuple)
            else ()
        )
        self.feeds = self.batches.streams and self.batches.size is not None
        first: tuple[Tensor, ...] = () if self.batches.size is None else (self.batches.first(),)
        example = (*leaves.values(), *moves, *(self.fed(first[0]) if self.feeds else first))
        moved = tuple(e + 0.01 if e.is_floating_point() else e for e in example)
        if self.wanted == "eager":
            found = Captured(by_path, "eager", ASKED)
        else:
            found = capture(by_path, example, points=[moved], random=True)
        self.mode, self.reason = found.mode, found.reason
        step = found.call
        if self.mode == "eager":
            self.particles = min(self.particles, EAGER_PARTICLES)
            return step
        if self.particles > 1:
            many = side_by_side(found.call, self.particles, len(example))
            try:
                wide = pure_graph(lambda *inputs: tuple(part.mean(0) for part in many(*inputs)), example, random=True)
            except (RuntimeError, NotImplementedError) as error:  # an operation without a batching rule
                self.reason = f"draws are evaluated one by one: {reason_of(error)}"
            else:
                self.lanes = True
                step = wide
        calls = self.steps * (1 if self.lanes else self.particles)
        built = faster(step, example, [moved], self.wanted, calls)
        self.mode, self.reason = built.mode, "; ".join(filter(None, (self.reason, built.reason)))
        return built.call

    def fed(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Indices of rows, and the rows themselves."""
        return (rows, *self.batches.take(rows))

    def tighten(self, leaves: Leaves, alpha: float) -> Callable[..., Any]:
        """A bound of several draws a row and its gradient."""
        example = (*leaves.values(), *(() if self.batches.size is None else (self.batches.first(),)))
        found = tight_step(self, example, alpha, self.wanted, self.steps)
        self.mode, self.reason, self.lanes = found.mode, found.reason, True
        return found.call

    def beside(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor | float, Tensor | None, list[Tensor]]:
        """Weight of the divergences, indices of the rows, and perhaps the rows, among what follows the parameters."""
        rest = list(inputs)
        beta: Tensor | float = rest.pop(0) if isinstance(self.weighing.beta, tuple) else float(self.weighing.beta)
        return beta, rest[0] if rest else None, rest[1:]

    @property
    def settled(self) -> bool:
        """Whether the objective no longer changes under the climb."""
        return self.weighing.settled(self.made)

    def by_score(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same through Pyro, for guides that enumerate or need score functions."""
        names = [*self.parameters, *self.names]
        rows = inputs[len(names)] if len(inputs) > len(names) else None
        free = [t.detach().requires_grad_() for t in inputs[: len(names)]]
        leaves = dict(zip(names, free))
        scale = 1.0 if rows is None else self.batches.scale
        given, finite = self.constrained(leaves, rows), bool(self.problem.structure.finite)
        nesting = self.problem.structure.max_plate_nesting
        elbo = (TraceEnum_ELBO if finite else Trace_ELBO)(max_plate_nesting=nesting)

        def guide(**kwargs: Any) -> Any:
            return self.guide(**self.arguments(rows, filled=True))

        programs: list[Callable[..., Any]] = [self.problem.model, guide]
        if finite:
            programs = [config_enumerate(program, "parallel") for program in programs]
        programs = [Substitute(given)(program) for program in programs]
        programs[0] = MissingCells(self.joint.holes)(programs[0])
        model, pair = (ScaleRows(self.plate, scale)(program) for program in programs)
        with torch.enable_grad(), pyro.validation_enabled(False), poutine.block():
            loss = self.networks.run(
                self.weights(leaves), lambda: elbo.differentiable_loss(model, pair, **self.arguments(rows))
            )
            slopes = torch.autograd.grad(-loss, free, allow_unused=True, materialize_grads=True)
        return (-loss.detach(), *slopes)

    # -- checks and answers ------------------------------------------------------------------------------------------

    def check(self, trace: Any) -> None:
        """Hold the guide against the story; see the class."""
        structure = self.problem.structure
        known = {s.name: s for s in structure.latents}
        few = (
            structure
            if self.look is None
            else replace(structure, plates={**structure.plates, str(self.plate): len(self.look)})
        )
        seen = {s.name for s in structure.observed}
        guessed = {n: s for n, s in trace.nodes.items() if is_latent(s) and not s["infer"].get("is_auxiliary")}
        for name, site in guessed.items():
            if name in seen:
                raise ValueError(f"the guide samples {name!r}, which the story observes; leave it out of the guide")
            if name not in known:
                raise ValueError(
                    f"the guide samples {name!r}, which is no latent of the story; its latents are {sorted(known)}"
                )
            wanted = (
                known[name].shape if self.look is None else fewer_rows(known[name], few, structure.num_rows or 1).shape
            )
            if tuple(site["value"].shape) != wanted:
                raise ValueError(
                    f"the guide gives {name!r} the shape {tuple(site['value'].shape)} and the story {wanted}; "
                    f"use the same plates and the same to_event in both"
                )
        lacking = [s.name for s in structure.latents if s.name not in guessed and not s.enumerable]
        if lacking:
            raise ValueError(
                f"the guide lacks the latent {lacking[0]!r}, which cannot be summed out: the loss would be no ELBO. Add "
                f'pyro.sample("{lacking[0]}", ...) to the guide, or use SVI(guide="mean_field")'
            )
        with pyro.validation_enabled(True):
            trace.compute_log_prob()

    def draws(self, leaves: Leaves, count: int, seconds: float) -> tuple[Tensor, dict[str, Tensor]]:
        """log p - log q (S,) and draws (S, ...) of the continuous latents, on all rows (draws of a row: on those here).

        S is `count`, or at least 100 where `seconds` are over before; 5 where no latent is shared by the rows, each of which
        then says its own.
        """
        return joint_draws(self, lambda: own_draws(self, leaves, count, seconds))

    def row_ratios(self, leaves: Leaves, count: int, seconds: float, most: int = 100) -> Tensor | None:
        """log p - log q of single rows (S, R), where rows do not share a latent that was guessed; else None."""
        return row_ratios(self, leaves, count, seconds, most)

    def blame(self, leaves: Leaves, gradients: Leaves) -> tuple[str | None, str]:
        """The parameter whose gradient is not finite, and the site that made it so."""
        name = next((n for n, g in gradients.items() if not bool(g.isfinite().all())), None)
        name = name or self.outside(leaves)
        text = f"first at parameter {name!r}" if name else ""
        site = self.culprit(leaves)
        if site:
            text += f"{', from' if text else 'first at'} site {site!r}"
        return site or name, text or "no single site is at fault"

    def outside(self, leaves: Leaves) -> str | None:
        """A parameter that is not finite or not in its range."""
        for name, value in self.values(leaves).items():
            constraint = self.parameters[name].constraint if name in self.parameters else constraints.real
            if not bool(value.isfinite().all() and constraint.check(value).all()):
                return name
        return None

    def culprit(self, leaves: Leaves) -> str | None:
        """The site with a value, a log density or a gradient that is not finite."""
        try:
            with pyro.validation_enabled(False), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pyro's about the very NaN that is looked for
                free = {n: v.detach().requires_grad_() for n, v in leaves.items()}
                rows = self.look
                trace = self.guide_trace(free, rows)
                trace.compute_log_prob()
                values = {n: s["value"] for n, s in trace.nodes.items() if is_latent(s)}
                for name, value in values.items():
                    if not bool(value.isfinite().all() and trace.nodes[name]["log_prob"].isfinite().all()):
                        return name
                given = {**values, **self.constrained(free, rows)}
                told = self.arguments(rows)
                for factor in self.networks.run(self.weights(free), lambda: self.joint.factors(given, told)):
                    if not bool(factor.value.isfinite().all()):
                        return factor.name
                    if factor.value.requires_grad:
                        slopes = torch.autograd.grad(
                            factor.value.sum(),
                            list(free.values()),
                            allow_unused=True,
                            materialize_grads=True,
                            retain_graph=True,
                        )
                        if not all(bool(s.isfinite().all()) for s in slopes):
                            return factor.name
        except (RuntimeError, ValueError):
            return None  # the story fails at such values
        return None
