r"""Plain autoencoder: the baseline without a density. A row is squeezed through a few numbers and restored.

Story
-----
::

    for n = 1..N  "data"
        z_n  flat                                        (K,)   its code, wherever it lies
        x_n  ~ Normal(decoder(z_n), 1/2)                 (D,)   what we see; 1/2 is the variance

    guide: z_n = encoder(x_n), a point

With a flat prior and a point for a guide the objective is :math:`-\sum_n \|x_n - decoder(encoder(x_n))\|^2` plus a constant:
the squared error of an autoencoder, and nothing else.  There is no prior to draw codes from and
:math:`\int p(x \mid z)\,dz` need not exist, so that the story makes no rows and gives none a log density: `log_prob`, `score`
and `simulate` say n/a.  What it has are codes, `posterior.local("z", rows)`, and reconstructions.

Hinton & Salakhutdinov, *Reducing the dimensionality of data with neural networks* (Science 313, 2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..mixtures import count_setting
from . import seeded, widths
from .nets import MLP, activation_of
from .vae import check_rows


class Autoencoder(nn.Module):
    """Autoencoder with squared error.

    Parameters
    ----------
    num_features, num_codes
        D and K.
    hidden
        Widths of the hidden layers from rows to codes; the decoder has the same, back again.
    activation
        Between the layers: "relu", "tanh", "softplus" or "gelu".
    seed
        Of the weights that training starts from.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> Autoencoder(num_features=64, num_codes=5, hidden=(100,))
    Autoencoder(num_features=64, num_codes=5, hidden=(100,), activation='relu', seed=0)
    """

    def __init__(
        self,
        num_features: int,
        num_codes: int,
        hidden: int | Sequence[int] = (400,),
        activation: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        D, K = count_setting("num_features", num_features), count_setting("num_codes", num_codes)
        self.num_features, self.num_codes, self.hidden = D, K, widths("hidden", hidden)
        self.activation, self.seed = activation, seed
        activation_of(activation)
        made = seeded(
            seed,
            lambda: nn.ModuleList(
                [MLP(D, self.hidden, K, activation), MLP(K, self.hidden[::-1], D, activation)],
            ),
        )
        self.encoder, self.decoder = made[0], made[1]  # type: ignore[index]

    def model(self, x: Tensor | None = None, num_data: int = 100) -> Tensor:
        """Tell the story; `x` (N, D), or None to restore codes that a handler supplies, `num_data` of them."""
        pyro.module("decoder", self.decoder)
        check_rows(x, self.num_features)
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (self.num_codes,)))
            loc = self.decoder(z)
            return pyro.sample("x", dist.Normal(loc, torch.full_like(loc, 0.5**0.5)).to_event(1), obs=x)

    def guide(self, x: Tensor, num_data: int = 100) -> None:
        """The code of each row, a point."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Rows as they come out again, (N, D)."""
        with torch.no_grad():
            return self.decoder(self.encoder(x.to(next(self.encoder.parameters()).dtype)))

    def __repr__(self) -> str:
        return (
            f"Autoencoder(num_features={self.num_features}, num_codes={self.num_codes}, hidden={self.hidden}, "
            f"activation={self.activation!r}, seed={self.seed})"
        )

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Handwritten digits with grey values from 0 to 1, ten numbers a picture."""
        from ..data import load

        return cls(num_features=64, num_codes=10, hidden=(128,)), {"x": load("digits").x / 16}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three rows of two columns and one code by linear maps: squared error is a Gaussian."""
        return cls(num_features=2, num_codes=1, hidden=()), {"x": torch.tensor([[0.5, 0.3], [-0.9, -0.2], [0.4, -1.0]])}
