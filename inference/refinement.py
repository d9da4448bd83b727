"""Rows whose latents are fitted one by one, from the guide's guess on: what a shared encoder costs each of them.

The loss of an amortised guide splits in two: the amortisation gap, between the encoder's guess and the best member of its
family for that row, and the approximation gap, between that member and the posterior (Cremer, Li and Duvenaud, *Inference
suboptimality in variational autoencoders*, ICML 2018). Fitting single rows closes the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from .handlers import MissingCells, Substitute
from .local import FreeRows, row_integral
from .transforms import unconstrain_to

if TYPE_CHECKING:
    from .posterior import Posterior

#: Draws of a row in one step, in pairs of opposite sign; and those its bound is measured with.
PARTICLES, MEASURE = 8, 200
#: First step size of Adam, which falls to zero along half a cosine.
RATE = 0.05


@dataclass(frozen=True, repr=False)
class Refinement:
    """Normals in unconstrained space, one a row.

    Attributes
    ----------
    family
        "mean_field" or "full_rank".
    guide, elbo
        log p(x_n) bounded from below by the guide and by the row's own normal, (N,).
    error
        Standard error of their difference, (N,).
    loc, factor
        Centre (N, L) and lower Cholesky factor (N, L, L) of every row's normal.
    """

    family: str
    guide: Tensor
    elbo: Tensor
    error: Tensor
    loc: Tensor
    factor: Tensor
    rows: FreeRows

    @property
    def gap(self) -> Tensor:
        """Amortisation gap of every row in nats, (N,)."""
        return self.elbo - self.guide

    def local(self, site: str, draws: int = 200) -> Tensor:
        """Draws of a latent of the rows from their own normals: (draws, N, ...)."""
        names = [b[0] for b in self.rows.blocks]
        if site not in names:
            raise ValueError(f"{site!r} is no continuous latent of the rows; they have {names}")
        noise = torch.randn(draws, *self.loc.shape, dtype=self.loc.dtype)
        with self.rows.joint.problem.scope(), torch.no_grad():
            free = self.loc + (self.factor @ noise.unsqueeze(-1)).squeeze(-1)
            found = torch.stack([self.rows.log_rows(f)[1][site] for f in free])
            return found.movedim(1 + self.rows.axes[site], 1)

    def __repr__(self) -> str:
        return (
            f"{len(self.gap)} rows refined ({self.family.replace('_', '-')} normals): ELBO {self.guide.mean().item():.4f} by "
            f"the guide, {self.elbo.mean().item():.4f} row by row; amortisation gap {self.gap.mean().item():.4f} ± "
            f"{self.gap.std().item() / math.sqrt(len(self.gap)):.2g} nats a row, at most {self.gap.max().item():.3g}"
        )


def refine(posterior: Posterior, data: Any, steps: int, progress: bool) -> Refinement:
    """See `Posterior.refine`."""
    problem, found = posterior.problem, posterior.recogniser
    if found is None:
        raise ValueError(
            "refine() starts from a guide that reads rows: fit with SVI and a story whose guide has an encoder, or with "
            "SVI(guide=Amortised(...)). What other fits say of a row is fitted to that row already"
        )
    kwargs = problem.kwargs if data is None else problem.with_data(data)
    family = getattr(found.guide, "family", "mean_field")
    family = family if family == "mean_field" else "full_rank"
    with problem.scope(posterior.seed):
        index = posterior.some_draws(1)[0]
        rows = FreeRows(posterior.joint, posterior.draw(index), kwargs)
        proposals: Any = row_integral(posterior, index, kwargs, MEASURE)
        weights, draws = proposals.log_weights(), proposals.all_draws(MEASURE)
        free = torch.stack([unconstrained(rows, {n: v[s] for n, v in draws.items()}) for s in range(MEASURE)])
        q = RowNormals(free, family)
        climb(q, rows, steps, progress)
        with torch.no_grad():
            loc, factor = q.shape()
            own = bounds(rows, *q.draw(MEASURE))
    gap_error = (weights.var(0) / len(weights) + own.var(0) / len(own)).sqrt()
    return Refinement(family, weights.mean(0), own.mean(0), gap_error, loc, factor, rows)


class RowNormals:
    """One normal a row, begun at the moments of draws (S, N, L)."""

    def __init__(self, draws: Tensor, family: str) -> None:
        loc = draws.mean(0)
        gap = (draws - loc).movedim(0, -1)
        covariance = gap @ gap.mT / len(draws)
        ridge = 1e-6 * torch.eye(loc.shape[-1], dtype=loc.dtype)
        factor = torch.linalg.cholesky(covariance + ridge)
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt() + 1e-6
        self.full = family == "full_rank"
        diagonal = factor.diagonal(dim1=-2, dim2=-1) if self.full else scale
        self.loc = loc.clone().requires_grad_()
        self.raw = torch.log(torch.expm1(diagonal)).requires_grad_()
        self.below = factor.tril(-1).requires_grad_() if self.full else torch.zeros_like(factor)

    @property
    def leaves(self) -> list[Tensor]:
        """What is learned."""
        return [self.loc, self.raw, *([self.below] if self.full else [])]

    def shape(self) -> tuple[Tensor, Tensor]:
        """Centres and Cholesky factors."""
        return self.loc, self.below.tril(-1) + torch.diag_embed(softplus(self.raw))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws (count, N, L) in pairs of opposite sign, and the log density of each (count, N)."""
        loc, factor = self.shape()
        half = torch.randn((count + 1) // 2, *loc.shape, dtype=loc.dtype)
        noise = torch.cat([half, -half])[:count]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_q = -0.5 * (noise.square().sum(-1) + loc.shape[-1] * math.log(2 * math.pi)) - log_det
        return loc + (factor @ noise.unsqueeze(-1)).squeeze(-1), log_q


def bounds(rows: FreeRows, free: Tensor, log_q: Tensor) -> Tensor:
    """log p(x_n, u) - log q(u) at draws (S, N, L): (S, N). All draws are rows of one run."""
    names, count = rows.joint.structure.row_arguments, len(free)
    many = {n: v.repeat(count, *[1] * (v.ndim - 1)) if n in names else v for n, v in rows.kwargs.items()}
    told = rows.log_rows(free.flatten(0, 1), many)[0]
    return told.unflatten(0, (count, rows.n)) - log_q


def climb(q: RowNormals, rows: FreeRows, steps: int, progress: bool) -> None:
    """Adam on the sum of all rows' ELBOs."""
    optimiser = torch.optim.Adam(q.leaves, lr=RATE, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad(), pyro.validation_enabled(False):
        for _ in tqdm(range(steps), desc="refining", disable=not progress, leave=False):
            value = bounds(rows, *q.draw(PARTICLES)).mean(0).sum()
            for leaf, slope in zip(q.leaves, torch.autograd.grad(value, q.leaves), strict=True):
                leaf.grad = slope.nan_to_num(0.0)
            optimiser.step()
            schedule.step()


def unconstrained(rows: FreeRows, values: dict[str, Tensor]) -> Tensor:
    """The rows' latents as unconstrained vectors (N, L)."""
    given = Substitute({**rows.globals, **values})
    with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
        trace: Any = poutine.trace(MissingCells(rows.joint.holes)(given(rows.joint.problem.model))).get_trace(
            **rows.kwargs
        )
    parts = []
    for name, _, _ in rows.blocks:
        free = unconstrain_to(trace.nodes[name]["fn"].support).inv(values[name])
        parts.append(free.movedim(rows.axes[name], 0).reshape(rows.n, -1))
    return torch.cat(parts, -1)
