"""Expected sums of a linear-Gaussian story, from the scatter, by component, or row by row where cells are missing.

x is centred at the columns' means throughout, against cancellation; c is the centre b of a component less that mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...distributed import ALONE, Ranks
from ...mapped_files import still_there

if TYPE_CHECKING:
    from .linear_form import Form

#: Numbers in the largest table of one chunk of rows.
ELEMENTS = 4_000_000
LOG_2PI = math.log(2 * math.pi)


@dataclass
class Sums:
    """Expected sums over the rows, for every component k and column d: only rows where d is seen count.

    n (K, D), sx, sxx: of 1, x and x^2; sz (K, D, q), szz (K, D, q, q): of z and z z^T; sxz (K, D, q): of x z.
    """

    n: Tensor
    sx: Tensor
    sxx: Tensor
    sz: Tensor
    szz: Tensor
    sxz: Tensor
    count: Tensor
    log_likelihood: Tensor

    def parts(self) -> dict[str, Tensor]:
        """Everything but the log-likelihood, by name."""
        return {k: v for k, v in vars(self).items() if k != "log_likelihood"}

    def normal_equations(self) -> tuple[Tensor, Tensor]:
        """Of the regressions of x on (z, 1): (K, D, q + 1, q + 1) and (K, D, q + 1)."""
        top = torch.cat([self.szz, self.sz.unsqueeze(-1)], -1)
        low = torch.cat([self.sz, self.n.unsqueeze(-1)], -1).unsqueeze(-2)
        return torch.cat([top, low], -2), torch.cat([self.sxz, self.sx.unsqueeze(-1)], -1)

    def weights(self, form: Form, theta: dict[str, Tensor]) -> Tensor | None:
        """Mixing weights, (K,)."""
        assert form.weights is not None
        counts = (self.count + form.weights_prior).clamp_min(0)
        return counts / counts.sum().clamp_min(1e-300)


def chunks(x: Tensor, width: int, kind: torch.dtype) -> Iterator[Tensor]:
    """Rows a chunk at a time, in `kind`."""
    for part in x.split(max(256, ELEMENTS // max(1, width))):
        still_there(part)
        yield part.to(kind)


def scatter_of(x: Tensor, kind: torch.dtype, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Mean of every column and scatter around it, (D,) and (D, D), of the rows of all ranks; missing cells count as it."""
    first = ranks.first(torch.where(x[0].isnan(), 0.0, x[0]).to(kind).cpu()).to(x.device)
    rows = ranks.total(len(x))
    total, S = torch.zeros_like(first), torch.zeros(x.shape[1], x.shape[1], dtype=kind, device=x.device)
    for part in chunks(x, x.shape[1], kind):
        gap = part - first
        total += gap.sum(0)
        S.addmm_(gap.T, gap)
    total, S = ranks.add(total, S)
    if not bool(total.isnan().any()):
        mean = total / rows
        return first + mean, S - rows * mean[:, None] * mean
    total, seen, S = torch.zeros_like(total), torch.zeros_like(total), torch.zeros_like(S)
    for part in chunks(x, x.shape[1], kind):
        total += (part - first).nan_to_num(0.0).sum(0)
        seen += (~part.isnan()).sum(0)
    total, seen = ranks.add(total, seen)
    mean = total / seen.clamp_min(1)
    for part in chunks(x, x.shape[1], kind):
        gap = (part - first - mean).nan_to_num(0.0)
        S.addmm_(gap.T, gap)
    (S,) = ranks.add(S)
    wide = (rows / seen.clamp_min(1)).sqrt()  # cells that are not seen would make the variances too small
    return first + mean, S * wide[:, None] * wide


def from_scatter(S: Tensor, n: int, W: Tensor, c: Tensor, psi: Tensor) -> Sums:
    """One component, complete rows: all sums from the scatter around the mean."""
    D, q = W.shape
    Sb = S + n * c[:, None] * c  # scatter around c
    weighted = W / psi.unsqueeze(-1)
    M = torch.eye(q, dtype=W.dtype, device=W.device) + W.T @ weighted
    L = torch.linalg.cholesky(M)
    B = torch.cholesky_solve(weighted.T, L)  # E[z | x] = B (x - b)
    SB = Sb @ B.T
    sz = -n * (B @ c)
    szz = n * torch.cholesky_inverse(L) + B @ SB
    sxz = SB + c[:, None] * sz
    log_det = psi.log().sum() + 2 * L.diagonal().log().sum()
    quadratic = (Sb.diagonal() / psi).sum() - (weighted * SB).sum()
    likelihood = -0.5 * (n * (D * LOG_2PI + log_det) + quadratic)
    count = torch.full((1, D), float(n), dtype=W.dtype, device=W.device)
    return Sums(
        count,
        torch.zeros_like(count),
        S.diagonal()[None],
        sz.expand(1, D, q),
        szz.expand(1, D, q, q),
        sxz[None],
        count[:, 0],
        likelihood,
    )


def by_component(x: Tensor, mean: Tensor, W: Tensor, c: Tensor, psi: Tensor, log_pi: Tensor) -> Sums:
    """Complete rows, K components: responsibilities by Woodbury, chunk by chunk."""
    K, D, q = W.shape
    weighted = W / psi.unsqueeze(-1)
    eye = torch.eye(q, dtype=W.dtype, device=W.device)
    L = torch.linalg.cholesky(eye + W.mT @ weighted)
    Li = torch.linalg.solve_triangular(L, eye.expand(K, q, q), upper=False)
    U = weighted @ Li.mT  # (K, D, q): u = U^T (x - c) has the length that Woodbury takes off
    log_det = psi.log().sum(1) + 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(1)
    constant = log_pi - 0.5 * (D * LOG_2PI + log_det + (c * c / psi).sum(1))
    flat, level = U.permute(1, 0, 2).reshape(D, K * q), (c.unsqueeze(1) @ U).reshape(-1)
    n, s1, s2 = W.new_zeros(K), W.new_zeros(K, D), W.new_zeros(K, D)
    su, suu, sxu, total = W.new_zeros(K, q), W.new_zeros(K, q, q), W.new_zeros(K, D, q), W.new_zeros(())
    for part in chunks(x, K * q + D, W.dtype):
        y = part - mean
        u = (y @ flat - level).view(-1, K, q)
        logits = constant + y @ (c / psi).T - 0.5 * (y * y) @ (1 / psi).T + 0.5 * (u * u).sum(-1)
        norm = logits.logsumexp(1, keepdim=True)
        total += norm.sum()
        r = (logits - norm).exp()
        ru = r.unsqueeze(-1) * u
        n += r.sum(0)
        s1 += r.T @ y
        s2 += r.T @ (y * y)
        su += ru.sum(0)
        suu += torch.einsum("nkq,nkp->kqp", ru, u)
        sxu += (y.T @ ru.reshape(len(y), K * q)).view(D, K, q).permute(1, 0, 2)
    sz = (su.unsqueeze(1) @ Li).squeeze(1)
    szz = n[:, None, None] * (Li.mT @ Li) + Li.mT @ suu @ Li
    sxz = sxu @ Li
    return Sums(
        n[:, None].expand(K, D),
        s1,
        s2,
        sz.unsqueeze(1).expand(K, D, q),
        szz.unsqueeze(1).expand(K, D, q, q),
        sxz,
        n,
        total,
    )


def by_row(x: Tensor, mean: Tensor, W: Tensor, c: Tensor, psi: Tensor, log_pi: Tensor) -> Sums:
    """Missing cells: every row's posterior of z from the cells that are seen, for every component."""
    K, D, q = W.shape
    i, j = torch.triu_indices(q, q, device=W.device)
    full = torch.zeros(q, q, dtype=torch.long, device=W.device)
    full[i, j] = full[j, i] = torch.arange(len(i), device=W.device)
    outer = W[..., i] * W[..., j] / psi.unsqueeze(-1)  # (K, D, triangle)
    eye = torch.eye(q, dtype=W.dtype, device=W.device)
    n, sx, sxx = W.new_zeros(K, D), W.new_zeros(K, D), W.new_zeros(K, D)
    sz, upper, sxz = W.new_zeros(K, D, q), W.new_zeros(K, D, len(i)), W.new_zeros(K, D, q)
    count, total = W.new_zeros(K), W.new_zeros(())
    for part in chunks(x, K * (q * q + D), W.dtype):
        seen = (~part.isnan()).to(W.dtype)
        y = torch.where(part.isnan(), torch.zeros_like(part), part - mean)
        gap = torch.where(part.isnan().unsqueeze(0), 0.0, y.unsqueeze(0) - c.unsqueeze(1))  # (K, n, D)
        P = (seen @ outer)[..., full] + eye  # (K, n, q, q)
        L = torch.linalg.cholesky(P)
        t = gap @ (W / psi.unsqueeze(-1))
        z = torch.cholesky_solve(t.unsqueeze(-1), L).squeeze(-1)
        log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        quadratic = (gap * gap) @ (1 / psi).unsqueeze(-1)
        logits = log_pi[:, None] - 0.5 * (
            seen.sum(1) * LOG_2PI + psi.log() @ seen.T + log_det + quadratic.squeeze(-1) - (t * z).sum(-1)
        )
        norm = logits.logsumexp(0)
        total += norm.sum()
        r = (logits - norm).exp()
        weight = r.unsqueeze(-1) * seen  # (K, n, D)
        second = torch.cholesky_inverse(L)[..., i, j] + z[..., i] * z[..., j]
        n += weight.sum(1)
        sx += (weight * y).sum(1)
        sxx += (weight * y * y).sum(1)
        sz += weight.mT @ z
        upper += weight.mT @ second
        sxz += (weight * y).mT @ z
        count += r.sum(1)
    return Sums(n, sx, sxx, sz, upper[..., full], sxz, count, total)
