r"""Variational autoencoder: a few numbers a row, which a network turns into what is seen.

Story
-----
::

    for n = 1..N  "data"
        z_n  ~ Normal(0, I)                              (K,)   its code
        x_n  ~ likelihood(decoder(z_n))                  (D,)   what we see, cell by cell

    guide: z_n ~ Normal(loc, scale) with (loc, scale) = encoder(x_n)

The decoder's weights are points without priors.  For every encoder
:math:`\log p(x) \ge E_q[\log p(x \mid z)] - KL(q(z \mid x) \,\|\, p(z))`; the gap is the divergence of q from the posterior
of z.  Where a decoder explains a row without z, the bound is best with KL = 0 and codes say nothing (posterior collapse).
`guide_scale` keeps :math:`KL \ge K (s^2 - 1 - \log s^2)/2 > 0`, whatever the decoder; `skip` feeds z into every layer of it;
`SVI(beta=..., free_bits=...)` are the other remedies.

Kingma & Welling, *Auto-encoding variational Bayes* (ICLR 2014); Razavi et al., *Preventing posterior collapse with
delta-VAEs* (ICLR 2019); Dieng et al., *Avoiding latent variable collapse with generative skip models* (AISTATS 2019).
Missing cells: Mattei & Frellsen, *MIWAE* (ICML 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..mixtures import count_setting, pseudo_count, table_columns
from . import seeded, widths
from .likelihoods import Columns, Likelihood
from .nets import MLP, ConvDecoder, ConvEncoder, activation_of

#: The least scale of a code.
LEAST = 1e-4


class VAE(nn.Module):
    """Variational autoencoder with one layer of codes.

    Parameters
    ----------
    num_features, num_codes
        D and K.
    hidden
        Widths of the hidden layers from rows to codes; the decoder has the same, back again.
    likelihood
        What the decoder says of a cell: "bernoulli", "normal", "student_t", "poisson", "negative_binomial",
        "discretised_logistic", an instance of a likelihood, or a sequence of these, one a column (see `columns`).
    encoder, decoder
        Networks of your own. An encoder takes (N, inputs) to (N, 2 K), or (N, K) with `guide_scale`; a decoder (N, K) to
        (N, outputs). Inputs and outputs are those of `story.columns`, and D more inputs with `missing`.
    conv
        Height and width, or channels, height and width, of images: convolutions instead of dense layers.
    skip
        Whether z enters every layer of the decoder.
    guide_scale
        Scale of q(z | x) for all rows, below 1: such a guide cannot become the prior. None: the encoder's.
    missing
        Whether rows may miss cells (NaN): the encoder then sees zeros in their place, and which cells were seen.
    activation
        Between the layers: "relu", "tanh", "softplus" or "gelu".
    seed
        Of the weights that training starts from.

    Raises
    ------
    ValueError, TypeError
        A setting outside its range.

    Examples
    --------
    >>> VAE(num_features=64, num_codes=5, hidden=(100,))
    VAE(num_features=64, num_codes=5, hidden=(100,), likelihood=Bernoulli(), seed=0)
    """

    origin: Tensor
    #: The guide is shown missing cells as NaN.
    reads_missing = True

    def __init__(
        self,
        num_features: int,
        num_codes: int,
        hidden: int | Sequence[int] = (400,),
        likelihood: str | Likelihood | Sequence[str | Likelihood] = "bernoulli",
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        conv: Sequence[int] | None = None,
        skip: bool = False,
        guide_scale: float | None = None,
        missing: bool = False,
        activation: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_features = count_setting("num_features", num_features)
        self.num_codes = count_setting("num_codes", num_codes)
        self.hidden = widths("hidden", hidden)
        self.columns = Columns(self.num_features, likelihood)
        self.conv = image_shape(conv, self.columns)
        self.skip, self.missing, self.activation, self.seed = skip, missing, activation, seed
        self.guide_scale = None if guide_scale is None else pseudo_count("guide_scale", guide_scale)
        activation_of(activation)
        for name, own in (("encoder", encoder), ("decoder", decoder)):
            if own is not None and not isinstance(own, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(own).__name__}")
        if skip and (decoder is not None or self.conv is not None):
            raise ValueError(
                "skip=True is for the decoder of dense layers that the story makes; leave conv and decoder out"
            )
        if self.guide_scale is not None and self.guide_scale >= 1:
            raise ValueError(f"guide_scale must lie between 0 and 1, the scale of the prior; got {self.guide_scale:g}")
        made = seeded(seed, self._networks)
        self.encoder = made["encoder"] if encoder is None else encoder  # type: ignore[index]
        self.decoder = made["decoder"] if decoder is None else decoder  # type: ignore[index]
        self.register_buffer("origin", torch.zeros(self.num_codes), persistent=False)

    def _networks(self) -> nn.ModuleDict:
        D, K, act = self.num_features, self.num_codes, self.activation
        inputs = self.columns.inputs + D * self.missing
        guessed = K if self.guide_scale is not None else 2 * K
        if self.conv is None:
            encoder: nn.Module = MLP(inputs, self.hidden, guessed, act)
            decoder: nn.Module = MLP(K, self.hidden[::-1], self.columns.outputs, act, self.skip)
        else:
            sides = self.conv[1:]
            area, wide = math.prod(sides), self.hidden[-1] if self.hidden else 256
            encoder = ConvEncoder((inputs // area, *sides), guessed, hidden=wide, activation=act)
            decoder = ConvDecoder((self.columns.outputs // area, *sides), K, hidden=wide, activation=act)
        return nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def model(self, x: Tensor | None = None, num_data: int = 100) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, D), what was seen; None dreams up `num_data` rows.
        num_data
            N where there is no `x`.

        Returns
        -------
        x, (N, D).
        """
        pyro.module("decoder", self.decoder)
        self.check(x)
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(self.origin, 1.0).to_event(1))
            return pyro.sample("x", self.decode(z).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, num_data: int = 100) -> None:
        """q(z | x), the encoder's guess; without `x`, the prior."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", num_data if x is None else len(x)):
            loc, scale = (self.origin, torch.ones_like(self.origin)) if x is None else self.encode(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of q(z | x) for rows (N, D): (N, K) each."""
        seen = self.columns.encode(x)
        if self.missing:
            seen = torch.cat([seen, (~x.isnan()).to(seen.dtype)], -1)
        guessed = self.encoder(seen)
        if self.guide_scale is not None:
            return guessed, torch.full_like(guessed, self.guide_scale)
        loc, raw = guessed.chunk(2, -1)
        return loc, softplus(raw) + LEAST

    def decode(self, z: Tensor) -> Any:
        """The distribution of the cells of rows with codes `z` (N, K): batch shape (N, D)."""
        return self.columns(self.decoder(z))

    def check(self, x: Tensor | None) -> None:
        """Refuse rows that the networks were not made for.

        Raises
        ------
        ValueError
            Other columns than `num_features`, or missing cells without `missing=True`.
        """
        check_rows(x, self.num_features)
        if x is None or self.missing or not is_validation_enabled():
            return
        if holes := int(x.isnan().sum()):
            raise ValueError(
                f"{holes} cells of x are missing (NaN): VAE(..., missing=True) tells the encoder which were seen"
            )

    def __repr__(self) -> str:
        told = {
            "num_features": self.num_features,
            "num_codes": self.num_codes,
            "hidden": self.hidden,
            "likelihood": self.columns,
            "conv": self.conv,
            "skip": self.skip,
            "guide_scale": self.guide_scale,
            "missing": self.missing,
            "activation": self.activation,
            "seed": self.seed,
        }
        usual = {"conv": None, "skip": False, "guide_scale": None, "missing": False, "activation": "relu"}
        shown = [f"{n}={v!r}" for n, v in told.items() if n not in usual or v != usual[n]]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Handwritten digits in black and white: ten numbers a picture."""
        from ..data import load

        return cls(num_features=64, num_codes=10, hidden=(128,)), {"x": load("binary_digits").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three rows of two pixels and one code: its integral is a quadrature."""
        x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
        return cls(num_features=2, num_codes=1, hidden=(3,), activation="tanh"), {"x": x}


def check_rows(x: Tensor | None, num_features: int) -> None:
    """Refuse rows of another width than the networks'.

    Raises
    ------
    ValueError
        `x` is not (N, `num_features`).
    """
    if x is not None and table_columns(x, num_features) != num_features:
        raise ValueError(f"x has {x.shape[1]} columns and the networks were made for num_features={num_features}")


def image_shape(conv: Sequence[int] | None, columns: Columns) -> tuple[int, int, int] | None:
    """Channels, height and width.

    Raises
    ------
    ValueError
        Another number of pixels than columns, or columns of mixed kinds.
    """
    if conv is None:
        return None
    shape = widths("conv", conv)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or math.prod(shape) != len(columns.kinds):
        raise ValueError(
            f"conv={tuple(conv)} must be (height, width) or (channels, height, width) with {len(columns.kinds)} cells in all"
        )
    if columns.mixed:
        raise ValueError("conv is for images, whose cells are all of one kind; give one likelihood")
    return shape[0], shape[1], shape[2]
