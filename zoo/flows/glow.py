r"""Glow: an image is squeezed, turned and coupled, and half of it becomes noise at every scale.

Story
-----
::

    for n = 1..N  "data"
        u_n    ~ Normal(0, I)                              (C, H, W)  noise, which stays inside
        x_n    = f^{-1}(u_n)                               (C, H, W)  what we see

A level squeezes blocks of 2 x 2 pixels into channels, makes some steps, and lets half of the channels go.  A step is

.. math:: y = s \odot x + b, \qquad y' = W y, \qquad y'' = (y'_a,\ y'_b\,e^{s(y'_a)} + t(y'_a)),

with s, b one number a channel, W a C x C matrix that all pixels share, :math:`W = P L (U + \mathrm{diag}\,d)`, so that
:math:`\log |\det| = HW \sum \log d`, and a convolutional network in the coupling.  The channels that go are first scaled and
shifted by what the others say of them: Glow's learned prior.

Kingma & Dhariwal, *Glow: generative flow with invertible 1 x 1 convolutions* (NeurIPS 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..mixtures import Setting, count_setting
from .base import Chain, Transform, mixing_order, zero_log_det
from .coupling import ShiftScale
from .networks import silence
from .story import FlowStory

#: Images that set the scales of the channels at the start.
FIRST = 512


class ActNorm(Transform):
    """y = x exp(s) + b, one s and b a channel; `initialise` makes the channels of some images have mean 0 and scale 1."""

    event_dim = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set s and b by images (N, C, H, W)."""
        mean, scale = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0).clamp_min(1e-3)
        self.log_scale.copy_(-scale.log()[:, None, None])
        self.shift.copy_((-mean / scale)[:, None, None])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y - self.shift) * (-self.log_scale).exp(), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * math.prod(x.shape[-2:])).expand(x.shape[:-3])


class Turn(Transform):
    """A 1 x 1 convolution y = P L (U + diag(d)) x, d > 0, at every pixel; P is fixed, and all else is learned."""

    event_dim = 3
    order: Tensor
    back: Tensor

    def __init__(self, channels: int, layer: int = 0) -> None:
        super().__init__()
        order = torch.tensor(mixing_order(channels, layer))
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_d = nn.Parameter(torch.zeros(channels))

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(d)."""
        eye = torch.eye(len(self.log_d), dtype=self.log_d.dtype, device=self.log_d.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + self.log_d.exp().diag_embed()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        L, U = self.factors()
        matrix = (L @ U).index_select(0, self.order)
        return functional.conv2d(x, matrix[:, :, None, None]), self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        L, U = self.factors()
        pixels = y.index_select(-3, self.back).flatten(-2)
        inner = torch.linalg.solve_triangular(L, pixels, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, inner, upper=True).view_as(y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_d.sum() * math.prod(x.shape[-2:])).expand(x.shape[:-3])


class ImageCoupling(Transform):
    """The last half of the channels is scaled and shifted by what a convolutional network makes of the first."""

    event_dim = 3

    def __init__(self, channels: int, hidden: int, num_context: int = 0) -> None:
        super().__init__()
        self.still = channels - channels // 2
        self.moved = channels // 2
        self.affine = ShiftScale(limit=2.0)
        self.network = nn.Sequential(
            nn.Conv2d(self.still + num_context, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * self.moved, 3, padding=1),
        )
        silence(self.network[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(self.affine.forward, x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move(self.affine.inverse, y, context)

    def _move(self, way: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        still, moving = x.split((self.still, self.moved), -3)
        seen = still
        if context is not None:
            everywhere = context[..., None, None].expand(*context.shape, *x.shape[-2:])
            seen = torch.cat((still, everywhere), -3)
        parameters = self.network(seen).unflatten(-3, (2, -1)).movedim(-4, -1)
        moved, slope = way(moving, parameters)
        return torch.cat((still, moved), -3), slope.sum((-3, -2, -1))


class Squeeze(Transform):
    """Blocks of 2 x 2 pixels become channels: (C, H, W) -> (4 C, H / 2, W / 2)."""

    event_dim = 3

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return functional.pixel_unshuffle(x, 2), zero_log_det(x, 3)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return functional.pixel_shuffle(y, 2), zero_log_det(y, 3)


class MultiScale(Transform):
    """Levels of steps, after each of which but the last half of the channels are done; noise has the shape of the image.

    Parameters
    ----------
    shape
        (C, H, W); H and W are divisible by 2 ** num_levels.
    num_levels, num_steps
        Levels, and steps in each.
    hidden
        Channels of the hidden layers.
    num_context
        Columns of context.
    """

    event_dim = 3

    def __init__(
        self, shape: tuple[int, int, int], num_levels: int, num_steps: int, hidden: int, num_context: int = 0
    ) -> None:
        super().__init__()
        channels, height, width = shape
        levels, self.shapes = [], []
        for level in range(num_levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            steps: list[Transform] = [Squeeze()]
            for k in range(num_steps):
                turn = Turn(channels, level * num_steps + k)
                steps += [ActNorm(channels), turn, ImageCoupling(channels, hidden, num_context)]
            last = level == num_levels - 1
            if not last:
                steps.append(ImageCoupling(channels, hidden, num_context))  # the prior of the half that goes
            levels.append(Chain(steps))
            gone = channels if last else channels // 2
            self.shapes.append((gone, height, width))
            channels -= gone
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, known = flat(x, context)
        total, done = zero_log_det(value, 3), []
        for level, (gone, _, _) in zip(self.levels, self.shapes):
            value, log_det = level(value, known)
            total = total + log_det
            value, ready = value.split((value.shape[1] - gone, gone), 1)
            done.append(ready.flatten(1))
        return torch.cat(done, 1).view(x.shape), total.view(x.shape[:-3])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noise, known = flat(y, context)
        parts = noise.flatten(1).split([math.prod(s) for s in self.shapes], 1)
        value = noise.new_zeros(len(noise), 0, *self.shapes[-1][1:])
        total = zero_log_det(noise, 3)
        for level, part, shape in zip(reversed(self.levels), reversed(parts), reversed(self.shapes)):
            value, log_det = cast(Chain, level).inverse(torch.cat((value, part.unflatten(1, shape)), 1), known)
            total = total + log_det
        return value.view(y.shape), total.view(y.shape[:-3])

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Let every `ActNorm` see what reaches it of images (N, C, H, W)."""
        for level, (gone, _, _) in zip(self.levels, self.shapes):
            for transform in cast(Chain, level).transforms:
                if isinstance(transform, ActNorm):
                    transform.initialise(x)
                x, _ = transform(x, context)
            x = x[:, : x.shape[1] - gone]


def flat(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Images and context with one batch dimension."""
    return x.reshape(-1, *x.shape[-3:]), None if context is None else context.reshape(-1, context.shape[-1])


class Glow(FlowStory):
    """Multi-scale flow over images (N, C, H, W) of continuous values.

    Whole grey values are to be made continuous first: add uniform noise between 0 and 1 to each, else the density is unbounded.

    Parameters
    ----------
    shape
        (C, H, W); H and W are divisible by 2 ** num_levels.
    num_levels, num_steps
        Levels, and steps in each.
    hidden
        Channels of the hidden layers of each coupling's network.
    num_context, seed, base, df, loc, scale
        See `FlowStory`; loc and scale are one number each.

    Raises
    ------
    ValueError
        A value outside its range, or a shape that cannot be halved so often.

    Examples
    --------
    >>> Glow((1, 8, 8), num_steps=2, hidden=16).distribution().sample((3,)).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_levels: int = 2,
        num_steps: int = 4,
        hidden: int = 64,
        *,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        if len(shape) != 3:
            raise ValueError(f"shape must be channels, height and width (C, H, W), got {tuple(shape)}")
        C, H, W = (count_setting("shape", size) for size in shape)
        levels, steps = count_setting("num_levels", num_levels), count_setting("num_steps", num_steps)
        if H % 2**levels or W % 2**levels:
            raise ValueError(
                f"images of {H} x {W} pixels cannot be halved {levels} times; pad them, or use fewer num_levels"
            )
        width = count_setting("hidden", hidden)

        def make() -> list[Transform]:
            return [MultiScale((C, H, W), levels, steps, width, num_context)]

        super().__init__((C, H, W), make, num_context=num_context, seed=seed, base=base, df=df, loc=loc, scale=scale)

    def initialise(self, x: Tensor, given: Tensor | None = None, **rest: Any) -> None:
        """Set the scales and shifts of the channels by the first images; `fit` calls this once, before it climbs."""
        x, context = x[:FIRST], None if given is None else given[:FIRST]
        for transform in self.flow.transforms:
            if isinstance(transform, MultiScale):
                transform.initialise(x, context)
            x, _ = cast(Transform, transform)(x, context)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Digits of 8 x 8 pixels, with uniform noise added to their 17 grey values."""
        from ..data import load

        x = load("digits").x
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        story = cls((1, 8, 8), num_steps=2, hidden=32, loc=0.5, scale=0.36)
        return story, {"x": ((x + noise) / 17).view(-1, 1, 8, 8)}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two images of two by two pixels: small enough for the whole Jacobian."""
        x = torch.tensor([[0.3, -0.5, 1.2, 0.4], [-0.7, 0.1, 0.2, 0.9]]).view(-1, 1, 2, 2)
        return cls((1, 2, 2), num_levels=1, num_steps=2, hidden=3), {"x": x}
