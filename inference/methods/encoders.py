"""Amortised guides for any story: one network reads a row and guesses all of its continuous latents.

Kingma and Welling, *Auto-encoding variational Bayes* (ICLR 2014); the full-rank family is that of their appendix F, with one
Cholesky factor a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions.transforms import ReshapeTransform
from torch.nn.functional import softplus

from ..dimensions import rows_axis
from ..handlers import FlatStart
from ..transforms import unconstrain_to
from .base import one_of, positive_int

if TYPE_CHECKING:
    from ..problem import Problem

FAMILIES = ("mean_field", "low_rank", "full_rank")
#: softplus of this is one: guesses begin as wide as a standard normal.
ONE = math.log(math.e - 1)


@dataclass(frozen=True)
class Amortised:
    """A guide q(latents | row) whose shapes are read from the story.

    Parameters
    ----------
    encoder
        Widths of the hidden layers of a multilayer perceptron, or a module from features (rows, F) to (rows, H). Features
        are the row's arguments side by side, standardised; missing cells are zeros, and a second table (rows, F) beside
        them says which cells were seen.
    family
        Of the latents of one row, in unconstrained space: "mean_field", "full_rank" (one covariance a row), or "low_rank"
        (rank: the root of their number).

    What rows share (weights, means, variances) is guessed by independent normals, finite latents are summed out. A story with
    a method `amortised`, of the encoder and its arguments, brings a guide of its own for "mean_field", as `LDA` does.

    Examples
    --------
    >>> fit(story, x, SVI(guide=Amortised((64, 64))))           # doctest: +SKIP

    Raises
    ------
    ValueError
        A width below one or an unknown family; and, when the story is known, a story without continuous latents in its
        rows, or with rows that are not the leftmost dimension of their latents.

    Plates inside the rows belong to the row: their size must be that of the fitted rows.
    """

    encoder: Sequence[int] | nn.Module = (64, 64)
    family: str = "mean_field"

    def __post_init__(self) -> None:
        one_of("Amortised", "family", self.family, FAMILIES)
        if isinstance(self.encoder, nn.Module):
            return
        if not isinstance(self.encoder, Sequence) or isinstance(self.encoder, str):
            raise TypeError(f"Amortised(encoder={self.encoder!r}): give widths of hidden layers, or a torch module")
        object.__setattr__(self, "encoder", tuple(self.encoder))
        for width in self.encoder:
            positive_int("Amortised", "encoder", width)

    def build(self, problem: Problem) -> nn.Module:
        """The guide for a story and its data, the story's own where it has one; weights come from the seed of the problem."""
        own = getattr(problem.story, "amortised", None)
        with problem.scope(problem.seed):
            if callable(own) and self.family == "mean_field":
                return own(self.encoder, **problem.kwargs)
            return AmortisedGuide(problem, self.encoder, self.family)


class AmortisedGuide(nn.Module):
    """What `Amortised.build` returns: a Pyro program with the arguments of the story."""

    reads_missing = True
    mean: Tensor
    spread: Tensor

    def __init__(self, problem: Problem, encoder: Any, family: str) -> None:
        super().__init__()
        self.family, self.plate = family, problem.structure.data_plate or "data"
        self.arguments = [n for n in problem.structure.row_arguments if isinstance(problem.kwargs[n], Tensor)]
        latents = [s for s in problem.structure.latents if s.continuous]
        inside = [s for s in latents if s.local]
        if not inside or not self.arguments:
            raise ValueError("Amortised: the rows of this story have no continuous latents to guess; use SVI()")
        sites = example_sites(problem)
        if bad := next((s for s in inside if rows_axis(sites[s.name], self.plate)), None):
            raise ValueError(
                f"Amortised: the rows of {bad.name!r} lie along dimension {rows_axis(sites[bad.name], self.plate)} of its "
                f"shape {bad.shape}; they must come first. Give the plate of the rows the leftmost dimension: "
                f"pyro.plate({self.plate!r}, ..., dim={-1 - rows_axis(sites[bad.name], self.plate)})"
            )
        self.sites = {s.name: SiteShape.of(sites[s.name], rows=True) for s in inside}
        self.shared = {s.name: SiteShape.of(sites[s.name], rows=False) for s in latents if not s.local}
        self.frames = {n: [f for f in sites[n]["cond_indep_stack"] if f.vectorized] for n in self.shared}
        table = features(problem.kwargs, self.arguments)
        seen = ~table.isnan()
        self.holes = not bool(seen.all())
        mean = table.nanmean(0)
        spread = (table - mean).nan_to_num(0.0).square().mean(0).sqrt()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", torch.where(spread > 0, spread, torch.ones_like(spread)))
        self.size = sum(s.size for s in self.sites.values())
        self.encoder = self.network(encoder, table.shape[1] * (2 if self.holes else 1)).to(table)

    def network(self, encoder: Any, inputs: int) -> nn.Module:
        """Encoder and head."""
        n, rank = self.size, math.ceil(math.sqrt(self.size))
        more = {"mean_field": 0, "low_rank": n * rank, "full_rank": n * (n - 1) // 2}[self.family]
        if isinstance(encoder, nn.Module):
            body: nn.Module = encoder
            like = next(encoder.parameters(), torch.zeros(()))
            with torch.no_grad():
                width = encoder(torch.zeros(2, inputs, dtype=like.dtype, device=like.device)).shape[-1]
        else:
            widths = [inputs, *encoder]
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
            body, width = nn.Sequential(*layers), widths[-1]
        head = nn.Linear(width, 2 * n + more)
        with torch.no_grad():  # all rows start alike, near a standard normal
            head.weight.mul_(0.1)
            head.bias.zero_()
        return nn.Sequential(body, head)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Sample what rows share, then the latents of every row."""
        if args:
            raise TypeError("an amortised guide takes the story's arguments by name")
        for name, site in self.shared.items():
            self.sample_shared(name, site)
        table = features(kwargs, self.arguments)
        pyro.module("encoder", self.encoder)
        z = ((table - self.mean) / self.spread).nan_to_num(0.0)
        found = self.encoder(torch.cat([z, (~table.isnan()).to(z)], -1) if self.holes else z)
        with pyro.plate(self.plate, len(table), dim=-1):
            self.sample_rows(found)

    def sample_shared(self, name: str, site: SiteShape) -> None:
        """Independent normals in unconstrained space."""
        loc = pyro.param(f"{name}.loc", lambda: 0.1 * torch.randn(site.free_shape, dtype=self.mean.dtype))
        raw = pyro.param(f"{name}.spread", lambda: torch.full(site.free_shape, -2.0, dtype=self.mean.dtype))
        with ExitStack() as stack:
            for frame in self.frames[name]:
                stack.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
            pyro.sample(name, site.place(dist.Normal(loc, softplus(raw)).to_event(site.event_dim)))

    def sample_rows(self, found: Tensor) -> None:
        """q(u_1) q(u_2 | u_1) ... of one joint normal a row, u the unconstrained latents."""
        n = self.size
        loc, scale = found[:, :n], softplus(found[:, n : 2 * n] + ONE) + 1e-6
        if self.family == "mean_field":
            for site, a, b in self.places():
                shape = (len(found), *site.free_event)
                free = dist.Normal(loc[:, a:b].reshape(shape), scale[:, a:b].reshape(shape))
                pyro.sample(site.name, site.place(free.to_event(len(site.free_event))))
            return
        factor = self.factor(found[:, 2 * n :], scale)
        noise: list[Tensor] = []
        for site, a, b in self.places():
            centre = loc[:, a:b]
            if noise:
                centre = centre + (factor[:, a:b, :a] @ torch.cat(noise, -1).unsqueeze(-1)).squeeze(-1)
            block = factor[:, a:b, a:b]
            free = dist.MultivariateNormal(centre, scale_tril=block, validate_args=False)
            value = pyro.sample(site.name, site.place(free, flat=True))
            if b < n:
                u = site.transform.inv(value).reshape(len(centre), b - a)
                gap = (u - centre).unsqueeze(-1)
                noise.append(torch.linalg.solve_triangular(block, gap, upper=False).squeeze(-1))

    def factor(self, rest: Tensor, scale: Tensor) -> Tensor:
        """Cholesky factor of every row's covariance (rows, n, n)."""
        n = self.size
        if self.family == "low_rank":
            W = 0.1 * rest.unflatten(-1, (n, -1))
            return torch.linalg.cholesky(W @ W.mT + torch.diag_embed(scale.square()))
        low = torch.tril_indices(n, n, -1, device=rest.device)
        place = torch.zeros(n, n, dtype=torch.long, device=rest.device)
        place[low[0], low[1]] = torch.arange(low.shape[1], device=rest.device)
        strict = torch.ones(n, n, dtype=rest.dtype, device=rest.device).tril(-1)
        below = rest[:, place.reshape(-1)].unflatten(-1, (n, n)) * strict if low.shape[1] else strict
        return below + torch.diag_embed(scale)

    def places(self) -> list[tuple[SiteShape, int, int]]:
        """Every site of the rows and its part of the unconstrained vector."""
        found, start = [], 0
        for site in self.sites.values():
            found.append((site, start, start + site.size))
            start += site.size
        return found


@dataclass(frozen=True)
class SiteShape:
    """How one latent comes from unconstrained numbers: of one row, or of the whole where rows share it."""

    name: str
    transform: Any
    free_shape: tuple[int, ...]
    free_event: tuple[int, ...]
    event_dim: int

    @property
    def size(self) -> int:
        """Unconstrained numbers of one event."""
        return max(1, math.prod(self.free_event))

    @classmethod
    def of(cls, node: Any, rows: bool) -> SiteShape:
        """From a site of the story."""
        fn = node["fn"]
        transform = unconstrain_to(fn.support)
        shape = tuple(transform.inverse_shape(node["value"].shape))
        batch = 1 if rows else len(fn.batch_shape)  # plates inside the rows are part of a row's event
        return cls(node["name"], transform, shape, shape[batch:], len(shape) - batch)

    def place(self, free: Any, flat: bool = False) -> Any:
        """A distribution of unconstrained numbers, carried to the site's support."""
        steps = (
            [ReshapeTransform(torch.Size((self.size,)), torch.Size(self.free_event))]
            if flat and self.free_event != (self.size,)
            else []
        )
        if not is_identity(self.transform):
            steps.append(self.transform)
        return dist.TransformedDistribution(free, steps) if steps else free


def is_identity(transform: Any) -> bool:
    """Whether a transform changes nothing."""
    base = getattr(transform, "base_transform", transform)
    return isinstance(base, torch.distributions.ComposeTransform) and not base.parts


def features(kwargs: dict[str, Any], names: Sequence[str]) -> Tensor:
    """(rows, F): the rows' arguments side by side."""
    tables = [kwargs[n].reshape(len(kwargs[n]), -1) for n in names]
    like = next((t for t in tables if t.is_floating_point()), None)
    dtype = like.dtype if like is not None else torch.get_default_dtype()
    return torch.cat([t.to(dtype) for t in tables], -1)


def example_sites(problem: Problem) -> dict[str, Any]:
    """One run of the story, for the shapes and supports of its sites."""
    with pyro.get_param_store().scope(), poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
        return dict(poutine.trace(FlatStart()(problem.model)).get_trace(**problem.kwargs).nodes)
