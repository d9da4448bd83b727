"""From real coordinates to the values of latents, with the log-determinants that densities need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints


@dataclass(frozen=True)
class Place:
    """Where a continuous latent lies in the vector of unconstrained coordinates, and in the vector of values.

    `turned`: the coordinates are the level of the last axis and the contrasts along it (see `contrasts`).
    """

    name: str
    shape: tuple[int, ...]
    free_shape: tuple[int, ...]
    start: int
    first: int
    turned: bool = False

    @property
    def coordinates(self) -> range:
        return range(self.start, self.start + math.prod(self.free_shape))

    @property
    def entries(self) -> slice:
        return slice(self.first, self.first + math.prod(self.shape))


class Matrix:
    """Reals to a positive-definite matrix, by a Cholesky factor with the logarithm of its diagonal."""

    @staticmethod
    def matrix(free: Tensor, size: int) -> Tensor:
        rows, columns = torch.tril_indices(size, size)
        low = free.new_zeros((*free.shape[:-1], size * size))
        L = low.index_copy(-1, rows * size + columns, free).unflatten(-1, (size, size))
        L = L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).exp())
        return L @ L.mT

    @staticmethod
    def log_det(free: Tensor, size: int) -> Tensor:
        """log |d lower triangle of the matrix / d free| (Muirhead 1982, theorem 2.1.9; a test differentiates the map)."""
        rows, columns = torch.tril_indices(size, size)
        power = (size + 1 - torch.arange(size)).double()
        diagonal = free[..., rows == columns]
        return (diagonal * power + math.log(2)).sum()


def constrain(free: Tensor, support: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Value of a site and the log-determinant of the map to it."""
    if support is constraints.positive_definite:
        value = Matrix.matrix(free, shape[-1])
        return value, Matrix.log_det(free, shape[-1])
    way = biject_to(support)
    value = way(free)
    return value, way.log_abs_det_jacobian(free, value).sum()


def contrasts(size: int) -> Tensor:
    """Orthogonal matrix (size, size) whose first row is the level and whose others are contrasts (Helmert's)."""
    rows = [torch.ones(size)]
    for k in range(1, size):
        rows.append(torch.cat([torch.ones(k), -torch.tensor([float(k)]), torch.zeros(size - k - 1)]))
    return torch.stack([r / r.norm() for r in rows]).double()


def free_shape(fn: Any, value: Tensor) -> tuple[int, ...]:
    """Shape of the unconstrained coordinates of a site."""
    if fn.support is constraints.positive_definite:
        size = value.shape[-1]
        return (*value.shape[:-2], size * (size + 1) // 2)
    return tuple(biject_to(fn.support).inv(value).shape)


def unconstrain(fn: Any, value: Tensor) -> Tensor:
    """Coordinates of a value of a site: the inverse of `constrain`."""
    if fn.support is constraints.positive_definite:
        L = torch.linalg.cholesky(value)
        rows, columns = torch.tril_indices(L.shape[-1], L.shape[-1])
        return (L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).log()))[..., rows, columns]
    return biject_to(fn.support).inv(value)
