r"""Neural spline flows: coupling or autoregressive layers whose monotone functions are rational-quadratic splines.

Story
-----
::

    for n = 1..N  "data"
        u_n    ~ Normal(0, I)                              (D,)    noise, which stays inside
        x_n    = f^{-1}(u_n)                               (D,)    what we see

Between knots :math:`(x_k, y_k)` and :math:`(x_{k+1}, y_{k+1})` with slopes :math:`\delta_k, \delta_{k+1}`, with
:math:`s = (y_{k+1} - y_k) / (x_{k+1} - x_k)` and :math:`t = (x - x_k) / (x_{k+1} - x_k)`,

.. math:: y = y_k + \frac{(y_{k+1} - y_k)\,(s t^2 + \delta_k t (1 - t))}{s + (\delta_k + \delta_{k+1} - 2 s)\, t (1 - t)} ;

the inverse is the root of a quadratic.  Outside [-B, B] the function is the identity.

Durkan, Bekasov, Murray & Papamakarios, *Neural spline flows* (NeurIPS 2019); Gregory & Delbourgo, *Piecewise rational
quadratic interpolation to monotonic data* (IMA J. Numerical Analysis 2, 1982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..mixtures import Setting, count_setting, pseudo_count
from .autoregressive import in_turns
from .base import Transform
from .coupling import couplings
from .story import FlowStory, several_features, widths

#: Smallest width and height of a bin, as a share of those of K equal ones, and smallest slope at a knot: without a limit a
#: steep bin makes single precision lose digits.
LEAST = 0.05


class RationalQuadratic:
    """Monotone rational-quadratic splines on [-bound, bound], the identity elsewhere.

    Parameters
    ----------
    num_bins
        K; a function has K widths, K heights and K - 1 slopes.
    bound
        B, where the identity begins.
    """

    def __init__(self, num_bins: int = 8, bound: float = 5.0) -> None:
        self.num_bins, self.bound = num_bins, bound
        self.num_parameters = 3 * num_bins - 1
        self.offset = math.log(math.expm1(1.0 - LEAST))  # zeros give slope 1, and so the identity

    def bins(self, value: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        """Left knot x, width w, low knot y, height h and the slopes d, e of the bin that each value lies in, all (...).

        Bins are the first axis and chosen by sums over masks: no number is looked up, and all loops run along the rows.
        """
        K = self.num_bins
        raw = parameters.movedim(-1, 0).contiguous()
        gaps = 2 * self.bound * (LEAST / K + (1 - LEAST) * raw[: 2 * K].unflatten(0, (2, K)).softmax(1))  # (2, K, ...)
        slopes = LEAST + functional.softplus(raw[2 * K :] + self.offset)
        with torch.no_grad():
            knots = gaps[1 if inverse else 0, :-1].cumsum(0) - self.bound
            past = (value >= knots).to(value.dtype)  # (K - 1, ...): whether the value lies beyond each inner knot
            here = torch.cat((1 - past[:1], past[:-1] - past[1:], past[-1:]))  # (K, ...): whether it lies in each bin
        left = (past * gaps[:, :-1]).sum(1) - self.bound
        size = (here * gaps).sum(1)
        d, e = here[0] + (here[1:] * slopes).sum(0), here[-1] + (here[:-1] * slopes).sum(0)
        return left[0], size[0], left[1], size[1], d, e

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        within = x.abs() < self.bound
        inner = x.clamp(-self.bound, self.bound)
        left, w, low, h, d, e = self.bins(inner, parameters, inverse=False)
        y, slope = self.curve((inner - left) / w, h / w, low, h, d, e)
        return torch.where(within, y, x), torch.where(within, slope, 0.0)

    def inverse(self, y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        within = y.abs() < self.bound
        inner = y.clamp(-self.bound, self.bound)
        left, w, low, h, d, e = self.bins(inner, parameters, inverse=True)
        s, rise = h / w, inner - low
        bend = rise * (d + e - 2 * s)
        a, b, c = h * (s - d) + bend, h * d - bend, -s * rise
        t = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0.0).sqrt())  # the root that loses no digits
        _, slope = self.curve(t, s, low, h, d, e)
        return torch.where(within, left + t * w, y), torch.where(within, -slope, 0.0)

    @staticmethod
    def curve(t: Tensor, s: Tensor, low: Tensor, h: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """y, and log dy/dx, at the share t of a bin."""
        mixed = t * (1 - t)
        bottom = s + (d + e - 2 * s) * mixed
        y = low + h * (s * t.square() + d * mixed) / bottom
        top = s.square() * (e * t.square() + 2 * s * mixed + d * (1 - t).square())
        return y, top.log() - 2 * bottom.log()


class NeuralSplineFlow(FlowStory):
    """Layers of rational-quadratic splines.

    Parameters
    ----------
    num_features
        D; two or more for couplings.
    num_layers
        Layers.
    hidden
        Widths of each layer's network; one number is one hidden layer.
    num_bins, bound
        Bins of a spline and the half width of the interval that they fill; data should lie within it, which `loc` and
        `scale` see to.
    coupling
        Whether half of the columns move at a time (both directions in one pass), or all of them, each by the ones before it
        (sharper, but D passes for a draw).
    num_context, seed, base, df, loc, scale
        See `FlowStory`.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> NeuralSplineFlow(2).distribution().sample((3,)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        num_features: int,
        num_layers: int = 4,
        hidden: int | Sequence[int] = (64, 64),
        *,
        num_bins: int = 8,
        bound: float = 5.0,
        coupling: bool = True,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        K, count = count_setting("num_bins", num_bins), count_setting("num_layers", num_layers)
        if K < 2:
            raise ValueError(f"num_bins must be 2 or more, got {K}")
        spline = RationalQuadratic(K, pseudo_count("bound", bound))
        sizes = widths(hidden)
        D = (
            several_features(num_features, "NeuralSplineFlow")
            if coupling
            else count_setting("num_features", num_features)
        )

        def make() -> list[Transform]:
            return (couplings if coupling else in_turns)(D, count, spline, sizes, num_context)

        super().__init__((D,), make, num_context=num_context, seed=seed, base=base, df=df, loc=loc, scale=scale)
