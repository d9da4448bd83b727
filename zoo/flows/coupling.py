r"""Coupling flows: half of the columns move by what the other half says.

Story
-----
::

    for n = 1..N  "data"
        u_n    ~ Normal(0, I)                              (D,)    noise, which stays inside
        x_n    = f^{-1}(u_n)                               (D,)    what we see

A coupling layer splits a row into a and b and leaves a alone:

.. math:: a' = a, \qquad b' = g(b;\ \theta(a)),

with g increasing in every column of b.  Its Jacobian is triangular, so that the determinant is the product of g's slopes, and
its inverse needs no inverse of the network :math:`\theta`.  NICE shifts, :math:`b' = b + t(a)`, and keeps volumes, save for one
scale a column at its end; RealNVP scales too, :math:`b' = b\,e^{s(a)} + t(a)`.

Dinh, Krueger & Bengio, *NICE* (2014); Dinh, Sohl-Dickstein & Bengio, *Density estimation using Real NVP* (ICLR 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..mixtures import Setting, count_setting
from .base import Permute, Transform, mixing_order
from .networks import Perceptron
from .story import FlowStory, several_features, widths


class Monotone(Protocol):
    """Increasing functions of one number, a family with P parameters."""

    num_parameters: int

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx, entry by entry: (...), (..., P) -> (...), (...)."""
        ...

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dy."""
        ...


class Shift:
    """y = x + t."""

    num_parameters = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters[..., 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return y - parameters[..., 0], torch.zeros_like(y)


class ShiftScale:
    """y = x exp(s) + t with |s| < `limit`, so that no row leaves the finite numbers."""

    num_parameters = 2

    def __init__(self, limit: float = 3.0) -> None:
        self.limit = limit

    def read(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """s and t."""
        raw, t = parameters.unbind(-1)
        return self.limit * torch.tanh(raw / self.limit), t

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.read(parameters)
        return x * s.exp() + t, s

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.read(parameters)
        return (y - t) * (-s).exp(), -s


class Coupling(Transform):
    """One half of the columns moves by a monotone function whose parameters the other half gives.

    Parameters
    ----------
    num_features
        D, at least 2.
    monotone
        Family of functions.
    hidden, num_context
        Of the network that gives their parameters.
    second
        Whether the second half moves; else the first.
    """

    def __init__(
        self, num_features: int, monotone: Monotone, hidden: Sequence[int], num_context: int = 0, second: bool = True
    ) -> None:
        super().__init__()
        first = (num_features + 1) // 2 if second else num_features // 2
        self.sizes = (first, num_features - first)
        self.second, self.monotone = second, monotone
        still, moved = self.sizes if second else self.sizes[::-1]
        self.network = Perceptron(still, moved * monotone.num_parameters, hidden, num_context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(self.monotone.forward, x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(self.monotone.inverse, y, context)

    def _move(self, way: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        first, second = x.split(self.sizes, -1)
        still, moving = (first, second) if self.second else (second, first)
        parameters = self.network(still, context).unflatten(-1, (-1, self.monotone.num_parameters))
        moved, slope = way(moving, parameters)
        return torch.cat((still, moved) if self.second else (moved, still), -1), slope.sum(-1)


class Stretch(Transform):
    """y = x exp(s), one s a column."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[:-1])


def couplings(
    num_features: int, num_layers: int, monotone: Monotone, hidden: Sequence[int], num_context: int
) -> list[Transform]:
    """Layers that move the halves in turn; after every two of them the columns are mixed."""
    layers: list[Transform] = []
    for i in range(num_layers):
        if i and i % 2 == 0 and num_features > 2:
            layers.append(Permute(mixing_order(num_features, i)))
        layers.append(Coupling(num_features, monotone, hidden, num_context, second=i % 2 == 0))
    return layers


class NICE(FlowStory):
    """Additive coupling layers and one scale a column.

    Parameters
    ----------
    num_features
        D, two or more.
    num_layers
        Coupling layers.
    hidden
        Widths of each layer's network; one number is one hidden layer.
    num_context, seed, base, df, loc, scale
        See `FlowStory`.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> NICE(2).distribution().log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        num_features: int,
        num_layers: int = 8,
        hidden: int | Sequence[int] = (64, 64),
        *,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        D = several_features(num_features, "NICE")
        count, sizes = count_setting("num_layers", num_layers), widths(hidden)

        def make() -> list[Transform]:
            return [*couplings(D, count, Shift(), sizes, num_context), Stretch(D)]

        super().__init__((D,), make, num_context=num_context, seed=seed, base=base, df=df, loc=loc, scale=scale)


class RealNVP(FlowStory):
    """Affine coupling layers.

    Parameters
    ----------
    num_features
        D, two or more.
    num_layers
        Coupling layers.
    hidden
        Widths of each layer's network; one number is one hidden layer.
    num_context, seed, base, df, loc, scale
        See `FlowStory`.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> RealNVP(2).distribution().sample((3,)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        num_features: int,
        num_layers: int = 8,
        hidden: int | Sequence[int] = (64, 64),
        *,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        D = several_features(num_features, "RealNVP")
        count, sizes = count_setting("num_layers", num_layers), widths(hidden)

        def make() -> list[Transform]:
            return couplings(D, count, ShiftScale(), sizes, num_context)

        super().__init__((D,), make, num_context=num_context, seed=seed, base=base, df=df, loc=loc, scale=scale)
