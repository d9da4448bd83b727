r"""Planar flow: noise is stretched and pressed along a few directions.

Story
-----
::

    for n = 1..N  "data"
        z_0    ~ Normal(0, I)                              (D,)    noise, which stays inside
        z_k    = z_{k-1} + u_k tanh(w_k . z_{k-1} + b_k)   (D,)    k = 1..K
        x_n    = z_K                                       (D,)    what we see

By the matrix determinant lemma a layer's determinant is :math:`1 + (1 - \tanh^2(w^\top z + b))\, u^\top w`, at a cost of D.  It
is positive everywhere, and the layer invertible, where :math:`u^\top w > -1`.

Layers draw in one pass.  To score x, take the product of :math:`x = z + u \tanh(w^\top z + b)` with w: the number
:math:`a = w^\top z` solves :math:`a + u^\top w \tanh(a + b) = w^\top x`, whose left side rises in a.

Rezende & Mohamed, *Variational inference with normalizing flows* (ICML 2015), section 4.1 and appendix A.1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..mixtures import Setting, count_setting
from .base import Transform
from .story import FlowStory

#: Halvings of the interval around the root, then steps of Newton's method.
HALVINGS, NEWTON = 16, 4
#: How far u . w stays above -1.
MARGIN = 1e-3


class Planar(Transform):
    """y = x + u tanh(w . x + b) with u . w > -1; the inverse by one-dimensional root finding.

    Parameters
    ----------
    num_features
        D.
    num_context
        Columns of context that move b, linearly.
    """

    def __init__(self, num_features: int, num_context: int = 0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(num_features) / num_features**0.5)
        self.free_u = nn.Parameter(0.1 * torch.randn(num_features))
        self.b = nn.Parameter(torch.randn(()))
        self.network = nn.Linear(num_context, 1, bias=False) if num_context else None

    def read(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """u (D,), u . w () and b.

        u is the free vector moved along w until u . w = softplus(free . w) - 1, and a little more.
        """
        product = self.free_u @ self.w
        allowed = functional.softplus(product) - 1 + MARGIN
        u = self.free_u + (allowed - product) * self.w / (self.w.square().sum() + 1e-12)
        return u, u @ self.w, self.b if self.network is None else self.b + self.network(context).squeeze(-1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, product, b = self.read(context)
        bent = torch.tanh(x @ self.w + b)
        return x + bent.unsqueeze(-1) * u, torch.log1p((1 - bent.square()) * product)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, product, b = self.read(context)
        target = y @ self.w
        a = root(target.detach(), product.detach(), b.detach())
        # One more step of Newton's: it moves nothing, and carries the gradient of the implicit function.
        bent = torch.tanh(a + b)
        slope = 1 + (1 - bent.square()) * product
        a = a - (a + product * bent - target) / slope.detach()
        bent = torch.tanh(a + b)
        return y - bent.unsqueeze(-1) * u, -torch.log1p((1 - bent.square()) * product)


def root(target: Tensor, product: Tensor, b: Tensor) -> Tensor:
    """a with a + product tanh(a + b) = target, for product > -1: bisection, then Newton's method.

    The number of steps is fixed, so that the search can be recorded as a graph.
    """
    low, high = target - product.abs(), target + product.abs()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = middle + product * torch.tanh(middle + b) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    a = (low + high) / 2
    for _ in range(NEWTON):
        bent = torch.tanh(a + b)
        a = a - (a + product * bent - target) / (1 + (1 - bent.square()) * product)
    return a


class PlanarFlow(FlowStory):
    """Layers that stretch or press along one direction each.

    Parameters
    ----------
    num_features
        D.
    num_layers
        K.
    num_context, seed, base, df, loc, scale
        See `FlowStory`.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> PlanarFlow(2).distribution().log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    direction: ClassVar[str] = "to_data"
    tiny_settings: ClassVar[dict[str, Any]] = {"num_layers": 2}

    def __init__(
        self,
        num_features: int,
        num_layers: int = 10,
        *,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        D, K = count_setting("num_features", num_features), count_setting("num_layers", num_layers)
        super().__init__(
            (D,),
            lambda: [Planar(D, num_context) for _ in range(K)],
            num_context=num_context,
            seed=seed,
            base=base,
            df=df,
            loc=loc,
            scale=scale,
        )
