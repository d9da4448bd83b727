r"""Autoregressive flows: every column moves by what the columns before it say.

Story
-----
::

    for n = 1..N  "data"
        u_n    ~ Normal(0, I)                              (D,)    noise, which stays inside
        x_n,d  = u_n,d exp(s_d) + t_d                              what we see, column by column

with :math:`s_d, t_d` given by :math:`x_{n,<d}` (MAF) or by :math:`u_{n,<d}` (IAF).  The Jacobian is triangular.  MAF scores
data in one pass and draws in D; IAF draws in one pass and scores in D.  The affine layers are written the way they run in one
pass, :math:`y_d = x_d\,e^{s_d(x_{<d})} + t_d(x_{<d})`.

Papamakarios, Pavlakou & Murray, *Masked autoregressive flow* (NeurIPS 2017); Kingma et al., *Improving variational inference
with inverse autoregressive flow* (NeurIPS 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..mixtures import Setting, count_setting
from .base import Transform
from .coupling import Monotone, ShiftScale
from .networks import MADE
from .story import FlowStory, widths


class Autoregressive(Transform):
    """Every column moves by a monotone function whose parameters the columns before it give.

    Parameters
    ----------
    order
        Place of each column in the chain, 0 to D - 1.
    monotone
        Family of functions.
    hidden, num_context
        Of the masked network that gives their parameters.
    """

    known: Tensor

    def __init__(self, order: Sequence[int], monotone: Monotone, hidden: Sequence[int], num_context: int = 0) -> None:
        super().__init__()
        self.monotone = monotone
        self.network = MADE(order, monotone.num_parameters, hidden, num_context)
        place = torch.tensor(order)
        self.register_buffer("known", place <= torch.arange(len(order))[:, None])  # (D, D): after pass d

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, slope = self.monotone.forward(x, self.network(x, context))
        return y, slope.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(y)
        slope = x
        for known in self.known:
            x, slope = self.monotone.inverse(y, self.network(x, context))
            x = torch.where(known, x, 0.0)  # what is not known yet must not overflow
        return x, slope.sum(-1)


def in_turns(
    num_features: int, num_layers: int, monotone: Monotone, hidden: Sequence[int], num_context: int
) -> list[Transform]:
    """Layers through the columns forwards and backwards in turn."""
    forwards = list(range(num_features))
    return [
        Autoregressive(forwards[::-1] if i % 2 else forwards, monotone, hidden, num_context) for i in range(num_layers)
    ]


class MAF(FlowStory):
    """Masked autoregressive flow: scores data in one pass.

    Parameters
    ----------
    num_features
        D.
    num_layers
        Autoregressive layers, whose order of columns turns round each time.
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
    >>> MAF(2).distribution().log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        num_features: int,
        num_layers: int = 5,
        hidden: int | Sequence[int] = (64, 64),
        *,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        D = count_setting("num_features", num_features)
        count, sizes = count_setting("num_layers", num_layers), widths(hidden)

        def make() -> list[Transform]:
            return in_turns(D, count, ShiftScale(), sizes, num_context)

        super().__init__((D,), make, num_context=num_context, seed=seed, base=base, df=df, loc=loc, scale=scale)


class IAF(FlowStory):
    """Inverse autoregressive flow: draws in one pass, and scores data in D.

    Parameters
    ----------
    num_features
        D.
    num_layers
        Autoregressive layers, whose order of columns turns round each time.
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
    >>> IAF(2).distribution().sample((3,)).shape
    torch.Size([3, 2])
    """

    direction: ClassVar[str] = "to_data"

    def __init__(
        self,
        num_features: int,
        num_layers: int = 5,
        hidden: int | Sequence[int] = (64, 64),
        *,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        D = count_setting("num_features", num_features)
        count, sizes = count_setting("num_layers", num_layers), widths(hidden)

        def make() -> list[Transform]:
            return in_turns(D, count, ShiftScale(), sizes, num_context)

        super().__init__((D,), make, num_context=num_context, seed=seed, base=base, df=df, loc=loc, scale=scale)
