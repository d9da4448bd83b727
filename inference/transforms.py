r"""From unconstrained space to the support of a site, with the log-determinant that a density needs.

PyTorch's `biject_to` covers all supports but the positive-definite matrices, for which it has no Jacobian; they are
added here: :math:`\Sigma = L L^\top` with a log-diagonal Cholesky factor, so that
:math:`\log|\partial\Sigma/\partial u| = D\log 2 + \sum_i (D - i + 2)\log L_{ii}` for i = 1..D
(Muirhead, *Aspects of Multivariate Statistical Theory*, 1982, theorem 2.1.9).
"""

import math

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform, Transform, identity_transform


class PositiveDefiniteTransform(Transform):
    """Vector of D (D + 1) / 2 reals to a positive-definite (D, D) matrix; row-major lower triangle, log diagonal."""

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PositiveDefiniteTransform)

    def _factor(self, u: Tensor) -> Tensor:
        size = (math.isqrt(8 * u.shape[-1] + 1) - 1) // 2
        rows, cols = torch.tril_indices(size, size, device=u.device)
        place = torch.zeros(size, size, dtype=torch.long, device=u.device)
        place[rows, cols] = torch.arange(len(rows), device=u.device)
        lower = u[..., place.flatten()].unflatten(-1, (size, size))
        eye = torch.eye(size, dtype=u.dtype, device=u.device)
        strict = torch.ones(size, size, dtype=u.dtype, device=u.device).tril(-1)
        # The mask goes inside exp: exp of an off-diagonal entry that is then dropped could overflow its gradient.
        return lower * strict + (lower * eye).exp() * eye

    def _call(self, u: Tensor) -> Tensor:
        factor = self._factor(u)
        return factor @ factor.mT

    def _inverse(self, matrix: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(matrix)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        lower = factor - torch.diag_embed(diagonal) + torch.diag_embed(diagonal.log())
        rows, cols = torch.tril_indices(*matrix.shape[-2:], device=matrix.device)
        return lower[..., rows, cols]

    def log_abs_det_jacobian(self, u: Tensor, matrix: Tensor) -> Tensor:
        size = matrix.shape[-1]
        place = torch.arange(size, device=u.device)
        log_diagonal = u[..., place * (place + 3) // 2]
        weights = torch.arange(size + 1, 1, -1, device=u.device, dtype=u.dtype)
        return (log_diagonal * weights).sum(-1) + size * math.log(2.0)

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def unconstrain_to(support: constraints.Constraint) -> Transform:
    """Bijection from an unconstrained space to `support`; its inverse flattens a value.

    Raises
    ------
    ValueError
        No bijection is known (a discrete or hand-made support).
    """
    base, event_dims = support, 0
    while isinstance(base, constraints.independent):
        event_dims += base.reinterpreted_batch_ndims
        base = base.base_constraint
    if base in (constraints.positive_definite, constraints.positive_semidefinite):
        return PositiveDefiniteTransform()
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"no bijection from unconstrained space to the support {support!r}; use a distribution whose support "
            f"torch.distributions.biject_to knows, or register one with biject_to.register"
        ) from None


def log_jacobian(transform: Transform, u: Tensor, value: Tensor) -> Tensor:
    """log |det d value / d u|, summed over everything: ()."""
    if transform is identity_transform or (isinstance(transform, ComposeTransform) and not transform.parts):
        return u.new_zeros(())
    return transform.log_abs_det_jacobian(u, value).sum()
