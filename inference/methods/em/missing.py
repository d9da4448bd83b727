r"""Expected statistics of multivariate normals whose rows miss cells.

Given the seen cells o, the missing ones m are normal with mean :math:`\mu_m + \Sigma_{mo}\Sigma_{oo}^{-1}(x_o - \mu_o)` and
covariance :math:`\Sigma_{mm} - \Sigma_{mo}\Sigma_{oo}^{-1}\Sigma_{om}` (Ghahramani and Jordan, *Supervised learning from
incomplete data via an EM approach*, NIPS 1993, section 4).  Rows are sorted by which cells they miss, so that rows that miss
the same share the factorisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .families import Statistics, covariance
from .terms import Named, Term, named, parameters, slots_of, spread_out

#: Elements of the largest table of conditional covariances made at once.
ELEMENTS = 4_000_000


def expected_statistics(term: Term, weight: Named, node: dict, names: dict[str, str]) -> Statistics:
    """Sums of weight x E[1, x, x x^T | seen cells, state] over everything but the term's dimensions."""
    assert term.shift is not None
    r, r_dims = weight
    _, value = node["infer"]["_complete"]
    x, x_dims = named(value, 1, node, names)
    away = tuple(d for d in (*r_dims, *x_dims) if d not in term.dims)
    away = tuple(dict.fromkeys(away))
    size = dict(zip((*r_dims, *x_dims), (*r.shape, *x.shape)))
    p = parameters(term, slots_of(term, node, names), runs=False)
    loc, cov = p["loc"][1], covariance(*p["spread"])
    states = torch.broadcast_shapes(loc.shape[:-1], cov.shape[:-2])
    D, S = x.shape[-1], math.prod(states)
    loc, cov = loc.expand(*states, D).reshape(S, D), cov.expand(*states, D, D).reshape(S, D, D)
    rows = math.prod(size[d] for d in away)
    r = spread_out((r, r_dims), (*away, *(d for d in term.dims if d in r_dims)), 0)
    r = r.reshape(rows, *r.shape[len(away) :])
    r = spread_out((r, ("", *(d for d in term.dims if d in r_dims))), ("", *term.dims), 0)
    r = r.expand(rows, *states).reshape(rows, S)
    x = spread_out((x, x_dims), away, 1).expand(*(size[d] for d in away), D).reshape(rows, D) - term.shift
    n, sx, sxx = sums(x, r, loc, cov)
    return {"n": n.reshape(states), "x": sx.reshape(*states, D), "xx": sxx.reshape(*states, D, D)}


def sums(x: Tensor, r: Tensor, loc: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums for rows x (M, D) with NaN, weights r (M, S), means (S, D) and covariances (S, D, D)."""
    patterns, which = torch.unique(~x.isnan(), dim=0, return_inverse=True)
    order = which.argsort(stable=True)
    x, r, which = x[order], r[order], which[order]
    S, D = loc.shape
    n, sx, sxx = r.sum(0), torch.zeros_like(loc), torch.zeros_like(cov)
    step = max(1, ELEMENTS // (S * D * D))
    for a in range(0, len(x), step):
        rows, weights = x[a : a + step], r[a : a + step]
        local, here = torch.unique_consecutive(which[a : a + step], return_inverse=True)
        seen = patterns[local]
        gain, left = conditionals(seen, cov)
        known = seen[here].unsqueeze(1)
        gap = torch.where(known, rows.unsqueeze(1) - loc, torch.zeros_like(loc))
        guess = loc + (gain[here] @ gap.unsqueeze(-1)).squeeze(-1)
        full = torch.where(known, rows.unsqueeze(1), guess)
        sx += torch.einsum("ms,msd->sd", weights, full)
        sxx += torch.einsum("msd,mse->sde", weights.unsqueeze(-1) * full, full)
        by_pattern = weights.new_zeros(len(local), S).index_add_(0, here, weights)
        sxx += torch.einsum("us,usde->sde", by_pattern, left)
    return n, sx, sxx


def conditionals(seen: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Regression of all cells on the seen ones and the covariance left: (U, S, D, D) each, for patterns (U, D)."""
    columns = seen[:, None, None, :]
    both = columns & seen[:, None, :, None]
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    inside = torch.where(both, cov, eye)
    across = torch.where(columns, cov, torch.zeros_like(cov))
    gain = torch.linalg.solve(inside, across.mT).mT
    left = cov - gain @ across.mT
    neither = ~columns & ~seen[:, None, :, None]
    return gain, torch.where(neither, left, torch.zeros_like(left))
