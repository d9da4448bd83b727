r"""Highest points of a joint density that lie far from its mass, since many unknowns were set instead of integrated.

Let s be one unknown and u all others.  The joint density is highest at some point, and the density of s alone, by Laplace's
approximation, where :math:`\log p(s, \hat u(s)) - \tfrac12\log|H_{uu}(s)|` is: what u leaves open changes with s as well
(Tierney and Kadane, JASA 1986).  One Newton step between the two has the length
:math:`-\tfrac12\,\mathrm{d}\log|H_{uu}|/\mathrm{d}t` in posterior sd, t being one sd of s with u following along.  It is near 0
where data are many for every unknown; where there are about as many unknowns as data (the volatility of every day, the level of
every area, Neyman and Scott, Econometrica 1948) the scale that they share is lost.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...joint import Unconstrained
from ...session import streams_kept

if TYPE_CHECKING:
    from ...joint import LogJoint

#: Posterior sd between the joint point and the mode of one unknown alone beyond which the point is not to be used.
FAR = 2.0
#: Data for every unknown from which the two cannot lie far apart.
ENOUGH = 8
#: Unknowns that are looked at together; sites of at most so many numbers are shared by the others; and of these, so many.
WIDEST, SHARED, MOST = 400, 8, 12
#: Step in sd of the difference quotients; curvature relative to the largest that counts as none.
STEP, FLAT = 1e-3, 1e-9


def displaced(joint: LogJoint, theta: dict[str, Tensor]) -> dict[str, float]:
    """Unknowns whose own highest point lies far from their place in the highest point of all.

    Parameters
    ----------
    joint, theta
        The story, and the highest point of its joint density: values of all continuous latents.

    Returns
    -------
    Entry -> distance in posterior sd, signed, for those beyond `FAR`; empty where there are plenty of data for every
    unknown, too many unknowns to look at, or the density is too flat or too rough to tell.
    """
    entries = candidates(joint)
    if not entries:
        return {}
    try:
        with streams_kept():
            flat = joint.flatten(theta)
            precision = curvature(joint, flat)
            found = {name: shift(joint, flat, precision, i) for name, i in entries.items()}
    except (RuntimeError, ValueError, NotImplementedError):
        return {}  # an operation without second derivatives, or a point on an edge
    return {name: s for name, s in found.items() if math.isfinite(s) and abs(s) > FAR}


def candidates(joint: LogJoint) -> dict[str, int]:
    """Entries of the free vector to look at, by name; none where there is nothing to be feared."""
    cells = sum(math.prod(s.shape) - s.missing for s in joint.structure.observed)
    if not 1 < joint.dim <= WIDEST or ENOUGH * joint.dim < cells or any(b.param for b in joint.blocks):
        return {}
    found = {}
    for b in joint.blocks:
        size = b.stop - b.start
        if size <= SHARED and size < joint.dim:
            found.update({f"{b.name}[{i}]" if size > 1 else b.name: b.start + i for i in range(size)})
    return dict(list(found.items())[:MOST])


def shift(joint: LogJoint, flat: Tensor, precision: Tensor, entry: int) -> float:
    """Distance of one entry's own mode from the joint one, in posterior sd; NaN where the point is no maximum in it."""
    unit = torch.zeros_like(flat)
    unit[entry] = 1.0
    way = solved(precision, unit)
    variance = float(way[entry])
    if not variance > 0 or float((precision @ way - unit).abs().max()) > 1e-4:
        return math.nan
    step = STEP * way / math.sqrt(variance)
    others = torch.arange(len(flat)) != entry
    up, down = (log_volume(curvature(joint, flat + s)[others][:, others]) for s in (step, -step))
    return -0.5 * float(up - down) / (2 * STEP)


def curvature(joint: LogJoint, flat: Tensor) -> Tensor:
    """Minus the second derivatives of the log joint, without a Jacobian, in the free vector: (dim, dim)."""
    x = flat.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = joint.total(joint.factors(Unconstrained(joint.blocks, x)), 1.0)
        slope = torch.autograd.grad(value, x, create_graph=True)[0]
        try:
            eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
            found = torch.autograd.grad(slope, x, eye, is_grads_batched=True, retain_graph=True)[0]
        except (RuntimeError, NotImplementedError):  # an operation that has no batching rule
            found = torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0] for s in slope])
    return -(found + found.mT) / 2


def scaled(precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors in units in which the diagonal is 1, and the square root of the diagonal."""
    root = precision.diagonal().abs().clamp_min(1e-300).sqrt()
    values, vectors = torch.linalg.eigh(precision / (root.unsqueeze(-1) * root))
    return values, vectors, root


def solved(precision: Tensor, right: Tensor) -> Tensor:
    """precision^-1 right, without directions in which the density is flat (a rotation of factors)."""
    values, vectors, root = scaled(precision)
    inverse = torch.where(values.abs() > FLAT * values.abs().max(), 1 / values, torch.zeros_like(values))
    return vectors @ (inverse * (vectors.mT @ (right / root))) / root


def log_volume(precision: Tensor) -> Tensor:
    """Log determinant, what is flat held at the same small curvature."""
    values, _, root = scaled(precision)
    return values.clamp_min(FLAT * values.abs().max()).log().sum() + 2 * root.log().sum()


__all__ = ["displaced"]
