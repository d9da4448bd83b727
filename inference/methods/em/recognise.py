"""Which entries of which unknown does a distribution's parameter copy?

A parameter y(theta) is recognised when it is a gather of blocks of theta, each perhaps times a constant:
y[b] = scale[b] theta[index[b]].  Its Jacobian is then a scaled selection matrix: a Jacobian-vector product with ones reveals
the scale, one with numbered tangents the index, and one with random tangents confirms both.

Values of unknowns carry a leading dimension of R runs that are climbed at once.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """y[b] = scale[b] * theta.reshape(blocks, event)[index[b]].

    Attributes
    ----------
    theta
        Name of the unknown.
    index
        Block of each batch entry of y, shape of y without its event.
    batch, event
        Shape of theta, split.
    scale
        Constant factor of each block, shape of `index`; None where all are 1.
    """

    theta: str
    index: Tensor
    batch: tuple[int, ...]
    event: tuple[int, ...]
    scale: Tensor | None = None

    def push(self, value: Tensor) -> Tensor:
        """theta (R, ...) -> y (R, ...)."""
        y = value.reshape([len(value), -1, *self.event])[:, self.index]
        return y if self.scale is None else y * self.scale.reshape([*self.scale.shape, *[1] * len(self.event)])

    def pull(self, stats: Tensor, index: Tensor) -> Tensor:
        """Sum statistics of y's shape, (R, *index, ...), into theta's shape, (R, ...)."""
        trailing = stats.shape[1 + index.ndim :]
        total = stats.new_zeros(len(stats), math.prod(self.batch), *trailing)
        total.index_add_(1, index.reshape(-1), stats.reshape(len(stats), -1, *trailing))
        return total.reshape([len(stats), *self.batch, *trailing])


def jacobian_product(y: Tensor, theta: Tensor, tangent: Tensor) -> Tensor | None:
    """d y / d theta times `tangent`, or None where y does not depend on theta."""
    seed = torch.zeros_like(y, requires_grad=True)
    (back,) = torch.autograd.grad(y, theta, seed, create_graph=True, retain_graph=True, allow_unused=True)
    if back is None or not back.requires_grad:
        return None
    (forward,) = torch.autograd.grad(back, seed, tangent, retain_graph=True, allow_unused=True)
    return forward


def recognise(y: Tensor, name: str, theta: Tensor, event_dims: int, simplex: bool) -> Gather | None:
    """The gather that makes y from theta, or None.

    Parameters
    ----------
    y
        Parameter of a distribution, differentiable in theta; the last `event_dims` dimensions are one block.
    simplex
        Blocks are probability vectors, which PyTorch renormalises: only tangents that sum to 0 pass unchanged.
    """
    if not y.requires_grad or theta.ndim < event_dims or y.ndim < event_dims:
        return None
    split = theta.ndim - event_dims
    batch, event = tuple(theta.shape[:split]), tuple(theta.shape[split:])
    if tuple(y.shape[y.ndim - event_dims :]) != event or (simplex and event[-1] < 2):
        return None
    count = math.prod(batch)
    ones: Any = (0,) * event_dims

    def blocks(numbers: Tensor) -> Tensor:
        tangent = torch.zeros_like(theta)
        tangent[(..., *ones)] = numbers
        if simplex:
            tangent[..., 1] = -numbers
        return tangent

    factor = jacobian_product(y, theta, blocks(torch.ones(batch, dtype=theta.dtype, device=theta.device)))
    if factor is None:
        return None
    scale = factor[(..., *ones)].detach()
    if not bool((scale.isfinite() & (scale != 0)).all()):
        return None
    number = torch.arange(1, count + 1, dtype=theta.dtype, device=theta.device).reshape(batch)
    moved = jacobian_product(y, theta, blocks(number))
    assert moved is not None
    found = moved[(..., *ones)].detach() / scale
    index = found.round().long() - 1
    if bool((found - found.round()).abs().max() > 1e-6) or int(index.min()) < 0 or int(index.max()) >= count:
        return None
    same = bool(((scale - 1).abs() < 1e-9).all())
    gather = Gather(name, index, batch, event, None if same else scale)
    random = torch.rand_like(theta)
    if simplex:
        random = random - random.mean(-1, keepdim=True)
    same_value = torch.allclose(gather.push(theta.detach()[None])[0], y.detach(), rtol=1e-7, atol=1e-12)
    confirmed = jacobian_product(y, theta, random)
    if confirmed is None or not same_value or not torch.allclose(gather.push(random[None])[0], confirmed, atol=1e-8):
        return None
    return gather
