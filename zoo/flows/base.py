r"""What every flow is made of: transforms that know their Jacobian, and the distribution they bend noise into.

For an invertible :math:`z = f(x)` and noise of density :math:`p_0`,

.. math:: \log p(x) = \log p_0(f(x)) + \log \lvert \det \partial f / \partial x \rvert .

Nothing is remembered from one call to the next: a density is that of the weights as they are now.

Tabak & Turner, *A family of nonparametric density estimation algorithms* (CPAM 66, 2013); Papamakarios et al.,
*Normalizing flows for probabilistic modeling and inference* (JMLR 22, 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

#: What `forward` of a transform does: turn data into noise, or noise into data.
DIRECTIONS = ("to_noise", "to_data")


class Transform(nn.Module):
    """An invertible map of events, which may give them another shape.

    Attributes
    ----------
    event_dim
        Dimensions of one event: 1 for vectors, 3 for images (C, H, W).
    """

    event_dim: int = 1

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and log |det dy/dx|.

        Parameters
        ----------
        x
            (..., *event).
        context
            (..., C), what the map may depend on.

        Returns
        -------
        y (..., *event) and log |det| (...).
        """
        raise TypeError(f"{type(self).__name__} must define forward(x, context)")

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x with forward(x) = y, and log |det dx/dy|: shapes as in `forward`."""
        raise TypeError(f"{type(self).__name__} must define inverse(y, context)")


class Chain(Transform):
    """One transform after the other, in the order given."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.event_dim = next((t.event_dim for t in transforms), 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._through("forward", self.transforms, x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._through("inverse", reversed(self.transforms), y, context)

    def _through(
        self, way: str, transforms: Iterable[Any], value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total: Any = None
        for transform in transforms:
            value, log_det = getattr(transform, way)(value, context)
            total = log_det if total is None else total + log_det
        return value, zero_log_det(value, self.event_dim) if total is None else total


class Inverse(Transform):
    """A transform the other way round."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform, self.event_dim = transform, transform.event_dim

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward(y, context)


class Standardise(Transform):
    """y = (x - loc) / scale, entry by entry; both have the shape of an event, are settings and are not learned."""

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.event_dim = loc.ndim

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = (x - self.loc) / self.scale
        return y, -self.scale.log().sum().expand(y.shape[: y.ndim - self.event_dim])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = y * self.scale + self.loc
        return x, self.scale.log().sum().expand(x.shape[: x.ndim - self.event_dim])


class Permute(Transform):
    """y = x[..., order]."""

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order must hold each of 0 to {len(order) - 1} once, got {list(order)}")
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("back", torch.tensor(order).argsort())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.order), zero_log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.back), zero_log_det(y)


def zero_log_det(x: Tensor, event_dim: int = 1) -> Tensor:
    """Log-determinant of a map that keeps volumes."""
    return x.new_zeros(x.shape[: x.ndim - event_dim])


def mixing_order(size: int, layer: int) -> list[int]:
    """A permutation of `size` columns that depends on the layer's number and on nothing random of yours."""
    generator = torch.Generator().manual_seed(layer)
    return torch.randperm(size, generator=generator).tolist()


class FlowDistribution(TorchDistribution):
    """Noise that a transform has bent, with an exact density.

    Parameters
    ----------
    base
        Distribution of the noise; its event has the shape of the transform's.
    transform
        A `Transform`.
    forward
        What `transform.forward` does: "to_noise" (it scores data in one pass) or "to_data" (it draws in one pass).
    context
        (*batch, C), passed to the transform.

    Raises
    ------
    ValueError
        `forward` is another word, or the base's event has other dimensions than the transform's.

    Notes
    -----
    Draws have a gradient.  Unlike `TransformedDistribution` with caching transforms, a value that was scored before is
    scored anew, with the weights as they are now.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        base: Distribution,
        transform: Transform,
        *,
        forward: str,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if forward not in DIRECTIONS:
            raise ValueError(f"forward must be one of {', '.join(map(repr, DIRECTIONS))}, got {forward!r}")
        if len(base.event_shape) != transform.event_dim:
            raise ValueError(
                f"the base has events of shape {tuple(base.event_shape)} and the transform takes {transform.event_dim} "
                f"dimensions; give the base .to_event({transform.event_dim})"
            )
        batch = base.batch_shape if context is None else torch.broadcast_shapes(base.batch_shape, context.shape[:-1])
        self.base, self.transform, self.direction, self.context = base, transform, forward, context
        super().__init__(Size(batch), base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Anything real."""
        return constraints.independent(constraints.real, self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same distribution over more batch dimensions."""
        shape = Size(batch_shape)
        context = None if self.context is None else self.context.expand(*shape, self.context.shape[-1])
        base = self.base.expand(shape) if context is None else self.base
        return FlowDistribution(base, self.transform, forward=self.direction, context=context, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape (*sample_shape, *batch_shape, *event_shape)."""
        z = self.base.expand(self.batch_shape).rsample(Size(sample_shape))
        way = self.transform.inverse if self.direction == "to_noise" else self.transform.forward
        return way(z, self._context_of(z))[0]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """The same without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of every event: (..., *event_shape) -> (...)."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[: value.ndim - self.event_dim], self.batch_shape)
        x = value.expand(*shape, *self.event_shape)
        way = self.transform.forward if self.direction == "to_noise" else self.transform.inverse
        z, log_det = way(x, self._context_of(x))
        return self.base.log_prob(z) + log_det

    def _context_of(self, value: Tensor) -> Tensor | None:
        if self.context is None:
            return None
        return self.context.expand(*value.shape[: value.ndim - self.event_dim], self.context.shape[-1])
