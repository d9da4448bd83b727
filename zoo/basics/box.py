r"""Box: a uniform density on a rectangle, which two corners describe.

Story
-----
::

    low        ~ Uniform(m - 10 s, m + 10 s)          (D,)   the lower corner
    size       ~ Uniform(0, 20 s)                     (D,)   what lies between the corners
    high       = low + size                           (D,)   the upper corner
    for n = 1..N  "data"
        x_n    ~ Uniform(low, high)                   (D,)   what we see

m and s are `loc` and `scale`: the corners lie within 10 s of m, more or less.

The likelihood is :math:`\prod_d (\mathrm{high}_d - \mathrm{low}_d)^{-N}` as long as every row lies inside, and 0
otherwise: it is greatest for the smallest box that holds the data, low = min x_n and high = max x_n, and it jumps
there.  Gradients do not see the jump, so that neither SVI nor NUTS is valid; the exact posterior is known.

DeGroot, *Optimal Statistical Decisions* (1970), section 9.7.
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..mixtures import Setting, filled, num_columns, setting


@dataclass(frozen=True)
class Box:
    """Uniform density on a rectangle.

    Parameters
    ----------
    loc, scale
        m and s, where the corners may lie: one number, or one a column (D,).

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> Box(scale=2.0)
    Box(loc=0.0, scale=2.0)
    """

    loc: Setting = 0.0
    scale: Setting = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "loc", setting("loc", self.loc))
        object.__setattr__(self, "scale", setting("scale", self.scale, positive=True))

    def model(self, x: Tensor | None = None, num_data: int = 300, num_features: int = 2) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, D), what was seen; None dreams up `num_data` rows.
        num_data, num_features
            N where there is no `x`, and D where neither `x` nor `loc` nor `scale` has columns.

        Returns
        -------
        x, (N, D).
        """
        D = num_columns(x, num_features, loc=self.loc, scale=self.scale)
        N = num_data if x is None else len(x)
        m, s = filled(self.loc, (D,), x), filled(self.scale, (D,), x)
        low = pyro.sample("low", dist.Uniform(m - 10 * s, m + 10 * s).to_event(1))
        size = pyro.sample("size", dist.Uniform(0 * s, 20 * s).to_event(1))
        high = pyro.deterministic("high", low + size)
        with pyro.plate("data", N):
            return pyro.sample("x", dist.Uniform(low, high).to_event(1), obs=x)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Points in a rectangle."""
        from ..data import load

        return cls(), {"x": load("rectangle").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four numbers in an interval, few enough for an exact answer."""
        return cls(), {"x": torch.tensor([[0.2], [0.9], [-1.1], [1.4]])}
