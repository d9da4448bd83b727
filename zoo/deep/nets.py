"""Networks of modest size: dense ones for any table, convolutions for images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation_of(name: str) -> type[nn.Module]:
    """The activation called `name`.

    Raises
    ------
    ValueError
        None is called so; lists all.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; there are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """Dense layers.

    Parameters
    ----------
    inputs, hidden, outputs
        Widths; an empty `hidden` is one linear map.
    activation
        Between the layers: a name of `ACTIVATIONS`.
    skip
        Whether the input enters every layer again, and not just the first (Dieng, Kim, Rush and Blei, *Avoiding latent
        variable collapse with generative skip models*, AISTATS 2019).
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, activation: str = "relu", skip: bool = False
    ) -> None:
        super().__init__()
        self.skip = skip
        self.act = activation_of(activation)()
        widths = [inputs, *hidden]
        extra = [0, *[inputs if skip else 0 for _ in hidden]]
        self.layers = nn.ModuleList(
            nn.Linear(wide + more, narrow) for wide, more, narrow in zip(widths, extra, [*hidden, outputs], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        h = x
        for i, layer in enumerate(self.layers):
            if i:
                h = self.act(h)
                h = torch.cat([h, x], -1) if self.skip else h
            h = layer(h)
        return h


def halved(size: int, times: int) -> int:
    """Pixels on a side after as many convolutions of stride 2."""
    for _ in range(times):
        size = -(-size // 2)
    return size


class ConvEncoder(nn.Module):
    """Convolutions of stride 2, then one hidden layer.

    Parameters
    ----------
    image
        Channels, height and width of what comes in.
    outputs
        Numbers a row.
    channels
        Of every convolution.
    hidden
        Width of the last hidden layer.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        outputs: int,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.image, act = image, activation_of(activation)
        layers: list[nn.Module] = []
        for wide, narrow in zip([image[0], *channels], channels):
            layers += [nn.Conv2d(wide, narrow, 3, stride=2, padding=1), act()]
        area = halved(image[1], len(channels)) * halved(image[2], len(channels))
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels[-1] * area, hidden), act(), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels * height * width) -> (N, outputs)."""
        return self.layers(x.reshape(-1, *self.image))


class ConvDecoder(nn.Module):
    """A hidden layer, then convolutions on pictures that double in size: the mirror of `ConvEncoder`.

    Parameters
    ----------
    image
        Channels (those of the picture times the numbers a cell), height and width of what comes out.
    inputs
        Numbers a row.
    channels, hidden
        As for the encoder.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        inputs: int,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.image, act = image, activation_of(activation)
        self.small = (channels[-1], halved(image[1], len(channels)), halved(image[2], len(channels)))
        wide = self.small[0] * self.small[1] * self.small[2]
        self.dense = nn.Sequential(nn.Linear(inputs, hidden), act(), nn.Linear(hidden, wide), act())
        layers: list[nn.Module] = []
        sizes = [*reversed(channels), image[0]]
        for i, (many, few) in enumerate(pairwise(sizes)):
            layers += [nn.ConvTranspose2d(many, few, 4, stride=2, padding=1)]
            layers += [act()] if i + 2 < len(sizes) else []
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """(N, inputs) -> (N, channels * height * width)."""
        picture = self.layers(self.dense(z).reshape(-1, *self.small))
        return picture[..., : self.image[1], : self.image[2]].flatten(1)
