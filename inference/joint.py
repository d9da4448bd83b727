"""The log joint density of a story as a function of its latents, finite ones summed out.

`LogJoint` is the one place where a Pyro program is run for inference; every method asks it: EM for factors and
weights, NUTS and SVI for a density over one flat unconstrained vector, `Posterior` for rows and local posteriors.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops import packed
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import transform_to

from .dimensions import check_dimensions, rows_axis
from .enumeration import LogFactor, align, sum_out
from .handlers import Enumerated, FlatStart, MissingCells, OneProduct, Substitute
from .lazy_rows import affordable, loaded, pieces_of
from .mapped_files import still_there
from .problem import Problem
from .session import streams_kept
from .transforms import log_jacobian, unconstrain_to

#: Rows that are always taken at once, and entries of the largest table beyond that.
PIECE_ROWS, PIECE_ELEMENTS = 4096, 8_000_000


@dataclass(frozen=True)
class Block:
    """Where one site lives in the flat unconstrained vector.

    `shape` is that of the value, `free_shape` that of its unconstrained form, `start:stop` its place; `param` marks
    parameters (points without a density of their own), `local` sites inside the data plate, whose rows lie along `axis`.
    """

    name: str
    shape: tuple[int, ...]
    free_shape: tuple[int, ...]
    start: int
    stop: int
    param: bool
    local: bool
    axis: int = 0

    @property
    def free_width(self) -> int:
        """Unconstrained numbers of one row."""
        return math.prod(n for i, n in enumerate(self.free_shape) if i != self.axis)


class Unconstrained(Messenger):
    """Feed sites from one flat vector through the bijection to the support they have in this very run."""

    def __init__(self, blocks: tuple[Block, ...], flat: Tensor) -> None:
        super().__init__()
        self.blocks = {b.name: b for b in blocks}
        self.flat = flat
        self.values: dict[str, Tensor] = {}
        self.log_det: Tensor = flat.new_zeros(())
        self.local_log_det: Tensor = flat.new_zeros(())

    def _take(self, name: str) -> Tensor:
        block = self.blocks[name]
        return self.flat[block.start : block.stop].reshape(block.free_shape)

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self.blocks or msg["is_observed"]:
            return
        free = self._take(msg["name"])
        transform = unconstrain_to(msg["fn"].support)
        value = transform(free)
        log_det = log_jacobian(transform, free, value)
        if self.blocks[msg["name"]].local:
            self.local_log_det = self.local_log_det + log_det
        else:
            self.log_det = self.log_det + log_det
        self.values[msg["name"]] = msg["value"] = value  # not marked as done: see `Substitute`
        msg["infer"] = {**(msg["infer"] or {}), "enumerate": None}

    def _pyro_param(self, msg: dict) -> None:
        if msg["name"] in self.blocks:
            constraint = msg["kwargs"].get("constraint", torch.distributions.constraints.real)
            value = transform_to(constraint)(self._take(msg["name"]))
            self.values[msg["name"]] = msg["value"] = value
            msg["done"] = True


class LogJoint:
    """log p(data, latents) of one problem.

    Parameters
    ----------
    problem
        A prepared story with its data.

    Attributes
    ----------
    blocks
        Continuous latents and parameters in the order of the story.
    dim
        Length of the flat unconstrained vector.
    finite
        Names of the latents that are summed out.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.structure = problem.structure
        self.model = config_enumerate(problem.model, "parallel")
        self.finite = tuple(s.name for s in self.structure.finite)
        self.holes: dict[str, bool] = {}  # site -> may it miss cells? Sites that are not told are looked at
        self.plate_dims: dict[str, int] = {}  # dimension of every plate
        self.blocks = self._layout()
        self.dim = sum(b.stop - b.start for b in self.blocks)

    def _layout(self) -> tuple[Block, ...]:
        with isolated_run(self.problem, seed=0), torch.no_grad():
            trace: Any = poutine.trace(FlatStart()(self.problem.model)).get_trace(**self.problem.sketch)
        self.plate_dims = {
            f.name: f.dim for node in trace.nodes.values() for f in node.get("cond_indep_stack", ()) if f.vectorized
        }
        blocks, start = [], 0
        for site in self.structure.sites:
            if not (site.continuous or site.kind == "param"):
                continue
            node = trace.nodes[site.name]
            value = node["value"]
            if site.kind == "param":
                constraint = node["kwargs"].get("constraint", torch.distributions.constraints.real)
                free = transform_to(constraint).inv(value)
            else:
                free = unconstrain_to(node["fn"].support).inv(value)
            stop = start + free.numel()
            axis = rows_axis(node, self.structure.data_plate) if site.local and site.kind == "latent" else 0
            shapes = tuple(value.shape), tuple(free.shape)
            blocks.append(Block(site.name, *shapes, start, stop, site.kind == "param", site.local, axis))
            start = stop
        return tuple(blocks)

    @property
    def names(self) -> list[str]:
        """Names of the continuous latents and parameters."""
        return [b.name for b in self.blocks]

    # -- running the story -------------------------------------------------------------------------------------------

    def factors(
        self, values: Mapping[str, Tensor] | Messenger, kwargs: Mapping[str, Any] | None = None
    ) -> list[LogFactor]:
        """Log-factors of every site with the latents at `values`, the finite ones that are not given enumerated."""
        return self.factors_of(*self.trace(values, kwargs))

    def trace(
        self, values: Mapping[str, Tensor] | Messenger, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, str]]:
        """One enumerated run, and the names (latents, plates) of the symbols of its dimensions."""
        kwargs = loaded(self.problem.kwargs if kwargs is None else kwargs)
        still_there(*kwargs.values())
        given = values if isinstance(values, Messenger) else Substitute(values)
        model = OneProduct()(MissingCells(self.holes)(given(self.model)))
        model = Enumerated(first_available_dim=-1 - self.structure.max_plate_nesting)(model)
        with poutine.block(), pyro.validation_enabled(False):
            trace: Any = poutine.trace(model).get_trace(**kwargs)
        trace.symbolize_dims()
        names = {symbol: plate for plate, symbol in trace.plate_to_symbol.items()}
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and node["infer"].get("_enumerate_symbol"):
                names[node["infer"]["_enumerate_symbol"]] = name
        check_dimensions(trace, names, self.structure)
        return trace, names

    def factors_of(self, trace: Any, names: Mapping[str, str], only: set[str] | None = None) -> list[LogFactor]:
        """Log-factors of a run, of all sites or `only` some."""
        with pyro.validation_enabled(False):  # it looks at single numbers, which there are none of under `torch.vmap`
            trace.compute_log_prob(lambda name, site: only is None or name in only)
        result = []
        for name, node in trace.nodes.items():
            if only is not None and name not in only:
                continue
            if node["type"] != "sample" or site_is_subsample(node) or node["infer"].get("_deterministic"):
                continue
            value = packed.pack(node["log_prob"], node["infer"]["_dim_to_symbol"])
            dims = tuple(names[symbol] for symbol in value._pyro_dims)
            plates = frozenset(f.name for f in node["cond_indep_stack"] if f.vectorized)
            result.append(LogFactor(name, value, dims, plates))
        return result

    def density(
        self, values: Mapping[str, Tensor], kwargs: Mapping[str, Any] | None = None, scale: float = 1.0
    ) -> Tensor:
        """log p(data, values), finite latents summed out: (); `scale` weighs the rows (N / B for a batch)."""
        return self.total(self.factors(values, kwargs), scale)

    def unconstrained(self, flat: Tensor, kwargs: Mapping[str, Any] | None = None, scale: float = 1.0) -> Tensor:
        """log density of the flat unconstrained vector, Jacobian included: ().

        Latents inside the data plate belong to their rows: their Jacobian is weighed by `scale` as well.
        """
        handler = Unconstrained(self.blocks, flat)
        return self.total(self.factors(handler, kwargs), scale) + handler.log_det + scale * handler.local_log_det

    def total(self, factors: list[LogFactor], scale: float) -> Tensor:
        """Product of all factors, rows to the power `scale` after their latents are summed out, not before."""
        if scale == 1.0:
            return sum_out(factors, set(self.finite))[0]
        plate = self.structure.data_plate
        shared = [name for name in self.finite if not self.structure[name].local]
        if plate is None or shared:
            raise ValueError(
                f"batches need rows that are independent given the globals; {shared or 'no plate'} stands against it: "
                f"use all rows at once"
            )
        inside = [f for f in factors if plate in f.plates]
        outside = [f for f in factors if plate not in f.plates]
        rows, _ = sum_out(inside, set(self.finite), self._keep)
        return sum_out(outside, set())[0] + scale * rows.sum()

    def rows(self, values: Mapping[str, Tensor] | Messenger, kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """log p(x_n | values) for each row, finite locals summed out: (N,); (1,) where there is no data plate.

        Continuous locals must be among `values`; their prior density is part of the row, so that a row is
        log p(x_n, z_n | globals).
        """
        kwargs = self.problem.kwargs if kwargs is None else kwargs
        pieces = self.pieces(kwargs)
        if len(pieces) > 1:
            return torch.cat([self.rows(values, piece) for piece in pieces])
        total, dims = sum_out(self._row_factors(values, kwargs), set(self.finite), self._keep)
        return total if dims else total.reshape(1)

    def latent_rows(self, values: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> Tensor:
        """log p(z_n | values) of the continuous latents of each row, its finite ones summed out: (N,)."""
        plate, finite = self.structure.data_plate or "", set(self.finite)
        latent = {b.name for b in self.blocks if b.local and not b.param} | finite
        factors = [f for f in self.factors(values, kwargs) if plate in f.plates and f.name in latent]
        return sum_out(factors, finite, self._keep)[0]

    def pieces(self, kwargs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The same arguments in pieces of rows whose tables stay small; whole where rows have latents of their own."""
        names, rows = self.structure.row_arguments, self.structure.num_rows
        given = next((len(kwargs[n]) for n in names if n in kwargs), 0)
        most = affordable(kwargs, PIECE_ROWS)
        if not rows or given <= most or self.structure.continuous_locals:
            return [kwargs]
        if any(not self.structure[n].local for n in self.finite):
            return [kwargs]
        events = max((math.prod(s.event_shape) for s in self.structure.observed), default=1)
        width = max(1.0, self.structure.enumeration_elements() / rows) * events
        step = affordable(kwargs, max(PIECE_ROWS, int(PIECE_ELEMENTS / width)))
        return list(pieces_of(kwargs, names, given, step))

    @property
    def _keep(self) -> frozenset[str]:
        plate = self.structure.data_plate
        return frozenset({plate}) if plate else frozenset()

    def _row_factors(self, values: Mapping[str, Tensor] | Messenger, kwargs: Mapping[str, Any]) -> list[LogFactor]:
        trace, names = self.trace(values, kwargs)
        plate = self.structure.data_plate
        if plate:  # what rows share is not looked at: other rows may count fewer groups
            inside = {n for n, s in trace.nodes.items() if any(f.name == plate for f in s.get("cond_indep_stack", ()))}
            return self.factors_of(trace, names, only=inside) + self._shared_factors(values)
        return [
            f for f in self.factors_of(trace, names) if self.structure[f.name].kind != "latent" or f.name in self.finite
        ]

    def _shared_factors(self, values: Any) -> list[LogFactor]:
        """A finite latent shared by all rows enters a row with its posterior given the fitted data."""
        shared = [n for n in self.finite if not self.structure[n].local and n not in values]
        if not shared:
            return []
        if len(shared) > 1 or self.structure[shared[0]].plates:
            raise ValueError(
                f"rows are not independent given the continuous latents: {shared} are finite, shared by all rows and "
                f"dependent on each other; hold them fixed to score single rows"
            )
        probabilities = self.local_probabilities(shared[0], values)
        return [LogFactor(shared[0], probabilities.log(), (shared[0],), frozenset())]

    def weights(
        self, values: Mapping[str, Tensor], kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, list[LogFactor], list[Tensor]]:
        """E-step: log p(data, values), the log-factors, and the posterior weight of every entry of every factor.

        The gradient of the log evidence with respect to a log-factor is the posterior probability of its
        configuration (Darwiche, *A differential approach to inference in Bayesian networks*, JACM 2003, theorem 1).
        """
        with torch.no_grad():
            factors = self.factors(values, kwargs)
        return factor_weights(factors, set(self.finite))

    def local_probabilities(
        self, site: str, values: Mapping[str, Tensor], kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Posterior probabilities of a finite latent: (plates..., states), the data plate first, the rest as nested."""
        kwargs = self.problem.kwargs if kwargs is None else kwargs
        pieces = self.pieces(kwargs) if self.structure[site].local else [kwargs]
        if len(pieces) > 1:
            return torch.cat([self.local_probabilities(site, values, piece) for piece in pieces])
        with torch.no_grad():
            factors = self._row_factors(values, kwargs) if self.structure[site].local else self.factors(values, kwargs)
        _, factors, weights = factor_weights(factors, set(self.finite))
        factor, weight = next((f, w) for f, w in zip(factors, weights) if f.name == site)
        home = self.plates_of(site)
        plates = tuple(p for p in home if p in factor.dims)
        extra = tuple(i for i, d in enumerate(factor.dims) if d != site and d not in plates)
        weight = weight.sum(extra) if extra else weight
        dims = tuple(d for i, d in enumerate(factor.dims) if i not in extra)
        return align(weight, dims, (*home, site))

    def plates_of(self, site: str) -> tuple[str, ...]:
        """The plates that are dimensions of a site, the data plate first."""
        plates = [p for p in self.structure[site].plates if p in self.plate_dims]
        return tuple(sorted(plates, key=lambda p: p != self.structure.data_plate))

    def as_sampled(self, states: Tensor, site: str) -> Tensor:
        """States of a finite latent (plates..., the data plate first) in the dimensions where the story has its plates."""
        dims = [self.plate_dims[p] for p in self.plates_of(site)]
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        shape = [1] * max((-d for d in dims), default=0)
        for i in order:
            shape[dims[i]] = states.shape[i]
        return states.permute(order).reshape(shape)

    # -- flat vectors ------------------------------------------------------------------------------------------------

    def constrain(self, flat: Tensor, kwargs: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Values of every block at one flat vector (dim,), or at many (S, dim): then (S, ...) each."""
        if flat.ndim == 2:
            rows = [self.constrain(row, kwargs) for row in flat]
            return {name: torch.stack([r[name] for r in rows]) for name in rows[0]} if rows else {}
        handler = Unconstrained(self.blocks, flat)
        with isolated_run(self.problem), pyro.validation_enabled(False), torch.no_grad():
            handler(self.problem.model)(**(self.problem.sketch if kwargs is None else kwargs))
        return {b.name: handler.values[b.name] for b in self.blocks}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """The flat unconstrained vector of `values`: inverse of `constrain`."""
        with isolated_run(self.problem), pyro.validation_enabled(False), torch.no_grad():
            model = Substitute(values)(FlatStart()(self.problem.model))
            trace: Any = poutine.trace(model).get_trace(**self.problem.sketch)
        parts = []
        for block in self.blocks:
            node = trace.nodes[block.name]
            if block.param:
                constraint = node["kwargs"].get("constraint", torch.distributions.constraints.real)
                free = transform_to(constraint).inv(values[block.name])
            else:
                free = unconstrain_to(node["fn"].support).inv(values[block.name])
            parts.append(free.reshape(-1))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.problem.dtype)

    def prior_draw(self) -> dict[str, Tensor]:
        """One draw of every block from the prior (a standard normal in free space where it is improper)."""
        with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
            trace: Any = poutine.trace(FlatStart()(self.problem.model)).get_trace(**self.problem.sketch)
        return {b.name: trace.nodes[b.name]["value"].detach().clone() for b in self.blocks}

    def guide_draw(self) -> dict[str, Tensor] | None:
        """One draw of every block from the story's guide as it starts; None where it has none or misses a latent."""
        if self.problem.guide is None:
            return None
        with pyro.get_param_store().scope(), poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
            trace: Any = poutine.trace(self.problem.guide).get_trace(**self.problem.kwargs)
        if any(b.name not in trace.nodes for b in self.blocks):
            return None
        return {b.name: trace.nodes[b.name]["value"].detach().clone() for b in self.blocks}


def factor_weights(factors: list[LogFactor], finite: set[str]) -> tuple[Tensor, list[LogFactor], list[Tensor]]:
    """Log evidence, the same factors as leaves, and the gradient of the evidence with respect to each."""
    leaves = [LogFactor(f.name, f.value.detach().clone().requires_grad_(), f.dims, f.plates) for f in factors]
    with torch.enable_grad():
        total, _ = sum_out(leaves, finite)
        grads = torch.autograd.grad(total, [f.value for f in leaves])
    return total.detach(), leaves, list(grads)


@contextmanager
def isolated_run(problem: Problem, seed: int | None = None) -> Iterator[None]:
    """A bookkeeping run of the story: draws nothing from the surrounding random stream."""
    with streams_kept(), poutine.block(), pyro.get_param_store().scope():
        old = torch.get_default_dtype()
        torch.set_default_dtype(problem.dtype)
        if seed is not None:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(old)
