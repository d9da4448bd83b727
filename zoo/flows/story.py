"""What the flow stories share: settings, the noise, the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..mixtures import Setting, count_setting, pseudo_count, setting
from .base import Chain, FlowDistribution, Inverse, Standardise, Transform

BASES = ("normal", "student_t")


class FlowStory(nn.Module):
    """A density over rows that a chain of transforms describes.

    Parameters
    ----------
    event_shape
        Shape of a row: (D,), or (C, H, W) for images.
    make
        Makes the transforms, from data to noise or from noise to data, as the class's `direction` says.
    num_context
        Columns of the context, `given`, on which the density depends; 0 for none.
    seed
        Of the weights that training starts from.
    base, df
        Noise: "normal", or "student_t" with `df` degrees of freedom for heavy tails; its entries are independent.
    loc, scale
        Where the data lie and how widely: one number, or one a column (D,).

    Raises
    ------
    ValueError
        A value outside its range.
    """

    direction: ClassVar[str] = "to_noise"
    #: Settings of a story that is small enough for exact answers.
    tiny_settings: ClassVar[dict[str, Any]] = {"num_layers": 2, "hidden": (4,)}
    origin: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        make: Callable[[], Sequence[Transform]],
        *,
        num_context: int = 0,
        seed: int = 0,
        base: str = "normal",
        df: float = 5.0,
        loc: Setting = 0.0,
        scale: Setting = 1.0,
    ) -> None:
        super().__init__()
        if base not in BASES:
            raise ValueError(f"base must be one of {', '.join(map(repr, BASES))}, got {base!r}")
        self.event_shape, self.num_context = tuple(event_shape), context_setting(num_context)
        self.base, self.df = base, pseudo_count("df", df)
        m, v = columns("loc", loc, self.event_shape), columns("scale", scale, self.event_shape)
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            torch.default_generator.manual_seed(seed)
            chain = list(make())
        if (m != 0).any() or (v != 1).any():
            chain = (
                [Standardise(m, v), *chain] if self.direction == "to_noise" else [*chain, Inverse(Standardise(m, v))]
            )
        self.flow = Chain(chain)
        self.register_buffer("origin", torch.zeros(self.event_shape))

    def noise(self) -> Any:
        """Distribution of the noise: independent entries of one event."""
        one = torch.ones_like(self.origin)
        if self.base == "normal":
            return dist.Normal(self.origin, one, validate_args=False).to_event(self.origin.ndim)
        return dist.StudentT(self.df * one, self.origin, one, validate_args=False).to_event(self.origin.ndim)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """Distribution of a row; of one row for each row of `context` (N, num_context) where there is one."""
        return FlowDistribution(self.noise(), self.flow, forward=self.direction, context=context, validate_args=False)

    def model(self, x: Tensor | None = None, given: Tensor | None = None, num_data: int = 300) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, D), what was seen; None dreams up `num_data` rows.
        given
            (N, num_context), the context: what is known of every row, where the story was made with `num_context`.
        num_data
            N where there is neither `x` nor `given`.

        Returns
        -------
        x, (N, D).

        Raises
        ------
        ValueError
            `x` or `given` has other columns than the story, or `given` is missing.
        """
        check_rows("x", x, self.event_shape)
        given = self.context_of(x, given, num_data)
        N = len(x) if x is not None else num_data if given is None else len(given)
        pyro.module("flow", self.flow)
        with pyro.plate("data", N):
            return pyro.sample("x", self.distribution(given), obs=x)

    def context_of(self, x: Tensor | None, given: Tensor | None, num_data: int) -> Tensor | None:
        """The context, checked; zeros where nothing is given at all."""
        if not self.num_context:
            if given is not None:
                raise ValueError("this story takes no context; make it with num_context=C to give it columns (N, C)")
            return None
        check_rows("given", given, (self.num_context,))
        if given is None and x is not None:
            raise ValueError(f"given is missing: the story was made with num_context={self.num_context}")
        return self.origin.new_zeros(num_data, self.num_context) if given is None else given

    def __repr__(self) -> str:
        size = f"num_features={self.event_shape[0]}" if len(self.event_shape) == 1 else f"shape={self.event_shape}"
        weights = sum(p.numel() for p in self.parameters())
        return f"{type(self).__name__}({size}, num_context={self.num_context}, weights={weights:,})"

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two interleaved half circles, standardised."""
        from ..data import load

        return cls(2), {"x": load("two_moons").x}  # type: ignore[arg-type, call-arg]

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Three rows of two columns under small networks: the density over the plane can be integrated."""
        x = torch.tensor([[0.3, -0.5], [1.2, 0.4], [-0.7, 0.1]])
        return cls(2, **cls.tiny_settings), {"x": x}  # type: ignore[arg-type, call-arg]


def columns(name: str, value: Setting, shape: tuple[int, ...]) -> Tensor:
    """A setting as a tensor of an event's shape; "scale" is positive."""
    plain = setting(name, value, positive=name == "scale")
    if isinstance(plain, tuple) and shape != (len(plain),):
        raise ValueError(
            f"{name} has {len(plain)} numbers and a row has the shape {shape}; give one number or one a column"
        )
    return torch.tensor(plain, dtype=torch.get_default_dtype()).expand(shape).clone()


def context_setting(value: int) -> int:
    """`num_context`: a whole number from 0."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 0:
        raise ValueError(f"num_context must be a whole number from 0, got {value!r}")
    return int(value)


def several_features(num_features: int, family: str) -> int:
    """D where columns are transformed given others: two or more."""
    D = count_setting("num_features", num_features)
    if D < 2:
        raise ValueError(
            f"{family} transforms some columns given the others: num_features must be 2 or more, got {D}; one column is "
            f"for NeuralSplineFlow(1, coupling=False) or MAF(1)"
        )
    return D


def widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """Widths of hidden layers: one or more whole numbers from 1."""
    many = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if not many:
        raise ValueError("hidden must be the widths of one or more layers, such as (64, 64); got none")
    return tuple(count_setting("hidden", width) for width in many)


def check_rows(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse rows of another shape than the story's."""
    if value is not None and tuple(value.shape[1:]) != shape:
        want = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(value.shape)}, and the story was made for rows of shape (N, {want})")
