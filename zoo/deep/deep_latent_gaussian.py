r"""Deep latent Gaussian model: layers of codes, each the place and scale of the next, down to what is seen.

Story
-----
::

    for n = 1..N  "data"
        z_L,n  ~ Normal(0, I)                            (K_L,)  the top code
        z_l,n  ~ Normal(loc_l(z_l+1,n), scale_l(z_l+1,n)) (K_l,)  for l = L-1 .. 1
        x_n    ~ likelihood(decoder(z_1,n))              (D,)    what we see, cell by cell

    guide, bottom up: z_1 ~ Normal(encoder_1(x_n)), z_l ~ Normal(encoder_l(z_l-1,n))

Given z_2 the codes z_1 are normal; with z_2 summed out they are an infinite mixture of normals: the prior of the layer
below is learned.  Scales of inner layers are at least `LEAST`, so that no layer can become a copy of the one above.

Rezende, Mohamed & Wierstra, *Stochastic backpropagation and approximate inference in deep generative models* (ICML 2014);
Burda, Grosse & Salakhutdinov, *Importance weighted autoencoders* (ICLR 2016), whose two-layer model this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..mixtures import count_setting
from . import seeded, widths
from .likelihoods import Columns, Likelihood
from .nets import MLP, activation_of
from .vae import check_rows

#: The least scale of a code, in the story and in the guide.
LEAST = 1e-2


class DeepLatentGaussian(nn.Module):
    """Deep latent Gaussian model with two or more layers of codes.

    Parameters
    ----------
    num_features, num_codes
        D, and K_1, ..., K_L from the rows upwards.
    hidden
        Widths of the hidden layers of the networks between two layers of codes: one number for all, or one a step upwards
        (from rows to z1 first).
    likelihood
        As for `VAE`.
    activation
        Between the layers: "relu", "tanh", "softplus" or "gelu".
    seed
        Of the weights that training starts from.

    Raises
    ------
    ValueError, TypeError
        A setting outside its range, or fewer than two layers.

    Examples
    --------
    >>> DeepLatentGaussian(num_features=64, num_codes=(10, 4), hidden=100)
    DeepLatentGaussian(num_features=64, num_codes=(10, 4), hidden=(100, 100), likelihood=Bernoulli(), activation='relu', seed=0)
    """

    encoder: nn.ModuleList
    decoder: nn.ModuleList
    origin: Tensor

    def __init__(
        self,
        num_features: int,
        num_codes: Sequence[int],
        hidden: int | Sequence[int] = 200,
        likelihood: str | Likelihood | Sequence[str | Likelihood] = "bernoulli",
        activation: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_features = count_setting("num_features", num_features)
        self.num_codes = widths("num_codes", num_codes, least=2)
        steps = len(self.num_codes)
        self.hidden = widths("hidden", hidden)
        self.hidden = self.hidden * steps if len(self.hidden) == 1 else self.hidden
        if len(self.hidden) != steps:
            raise ValueError(f"hidden has {len(self.hidden)} widths and {steps} layers of codes; give one, or {steps}")
        self.columns = Columns(self.num_features, likelihood)
        self.activation, self.seed = activation, seed
        activation_of(activation)
        made = seeded(seed, self._networks)
        self.encoder, self.decoder = made["encoder"], made["decoder"]  # type: ignore[index]
        self.register_buffer("origin", torch.zeros(self.num_codes[-1]), persistent=False)

    def _networks(self) -> nn.ModuleDict:
        below = [self.columns.inputs, *self.num_codes[:-1]]
        made = [self.columns.outputs, *(2 * K for K in self.num_codes[:-1])]
        layers = list(zip(below, made, self.num_codes, self.hidden, strict=True))
        return nn.ModuleDict(
            {
                "encoder": nn.ModuleList(MLP(low, (H, H), 2 * K, self.activation) for low, _, K, H in layers),
                "decoder": nn.ModuleList(MLP(K, (H, H), out, self.activation) for _, out, K, H in layers),
            }
        )

    def model(self, x: Tensor | None = None, num_data: int = 100) -> Tensor:
        """Tell the story; `x` (N, D), or None to dream up `num_data` rows."""
        pyro.module("decoder", self.decoder)
        check_rows(x, self.num_features)
        L = len(self.num_codes)
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample(f"z{L}", dist.Normal(self.origin, 1.0).to_event(1))
            for layer in range(L - 1, 0, -1):
                z = pyro.sample(f"z{layer}", normal_of(self.decoder[layer](z)))
            return pyro.sample("x", self.columns(self.decoder[0](z)).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 100) -> None:
        """q(z1 | x) q(z2 | z1) ...; without `x`, standard normals."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", num_data if x is None else len(x)):
            below = None if x is None else self.columns.encode(x)
            for layer, (network, K) in enumerate(zip(self.encoder, self.num_codes, strict=True)):
                if below is None:
                    pyro.sample(f"z{layer + 1}", dist.Normal(self.origin.new_zeros(K), 1.0).to_event(1))
                else:
                    below = pyro.sample(f"z{layer + 1}", normal_of(network(below)))

    def __repr__(self) -> str:
        return (
            f"DeepLatentGaussian(num_features={self.num_features}, num_codes={self.num_codes}, hidden={self.hidden}, "
            f"likelihood={self.columns}, activation={self.activation!r}, seed={self.seed})"
        )

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Handwritten digits in black and white: ten numbers a picture, and four behind them."""
        from ..data import load

        return cls(num_features=64, num_codes=(10, 4), hidden=100), {"x": load("binary_digits").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two rows of two pixels and a code in each of two layers: the integral is a quadrature."""
        x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        return cls(num_features=2, num_codes=(1, 1), hidden=3, activation="tanh"), {"x": x}


def normal_of(out: Tensor) -> Any:
    """Normals over codes (..., K) from network outputs (..., 2 K)."""
    loc, raw = out.chunk(2, -1)
    return dist.Normal(loc, softplus(raw) + LEAST).to_event(1)
