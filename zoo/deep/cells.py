"""Distributions of single cells that Pyro lacks: columns of mixed kinds, and rounded logistic grey values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus


class _Supports(constraints.Constraint):
    """Column by column."""

    def __init__(self, columns: Sequence[Sequence[int]], parts: Sequence[constraints.Constraint]) -> None:
        self.columns, self.parts = columns, parts
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        """Whether no column is continuous."""
        return all(part.is_discrete for part in self.parts)

    def check(self, value: Tensor) -> Tensor:
        """Whether each cell lies in the support of its column."""
        good = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
        for columns, part in zip(self.columns, self.parts, strict=True):
            good[..., list(columns)] = part.check(value[..., list(columns)])
        return good

    def __repr__(self) -> str:
        return " | ".join(map(str, self.parts))


class Cells(TorchDistribution):
    """Independent cells whose columns have distributions of different families.

    Parameters
    ----------
    columns
        Positions of each family's columns; together 0..D-1.
    parts
        Distributions of batch shape (..., number of its columns), without event dimensions.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self, columns: Sequence[Sequence[int]], parts: Sequence[Any], validate_args: bool | None = None
    ) -> None:
        self.columns, self.parts = [list(c) for c in columns], list(parts)
        width = sum(len(c) for c in self.columns)
        order = torch.empty(width, dtype=torch.long)
        order[torch.tensor([j for c in self.columns for j in c])] = torch.arange(width)
        self.order = order
        super().__init__(Size((*self.parts[0].batch_shape[:-1], width)), validate_args=validate_args)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        """Column by column."""
        return _Supports(self.columns, [part.support for part in self.parts])

    def expand(self, batch_shape: Size | Sequence[int], _instance: Any = None) -> Cells:
        """The same distribution over more batch dimensions."""
        shape = Size(batch_shape)
        parts = [part.expand(Size((*shape[:-1], len(c)))) for c, part in zip(self.columns, self.parts, strict=True)]
        return Cells(self.columns, parts, validate_args=False)

    def _joined(self, values: list[Tensor]) -> Tensor:
        dtype = torch.get_default_dtype()
        for value in values:
            dtype = torch.promote_types(dtype, value.dtype) if value.is_floating_point() else dtype
        return torch.cat([v.to(dtype) for v in values], -1).index_select(-1, self.order.to(values[0].device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of every cell."""
        if self._validate_args:
            self._validate_sample(value)
        each = [
            part.log_prob(value.index_select(-1, torch.tensor(c, device=value.device)))
            for c, part in zip(self.columns, self.parts, strict=True)
        ]
        return self._joined(each)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape (*sample_shape, ..., D)."""
        with torch.no_grad():
            return self._joined([part.sample(Size(sample_shape)) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        """Mean of every cell; of a level among several, the likeliest."""
        return self._joined([p.mode if isinstance(p, torch.distributions.Categorical) else p.mean for p in self.parts])


class DiscretisedLogisticCells(TorchDistribution):
    r"""A logistic variable rounded to 0..levels - 1; what lies beyond the ends counts to them.

    :math:`P(x) = \sigma((x + ½ - \mu)/s) - \sigma((x - ½ - \mu)/s)` within (Kingma et al., *Improving variational
    inference with inverse autoregressive flow*, NeurIPS 2016, appendix).

    Parameters
    ----------
    loc, scale
        Place and scale in grey values.
    levels
        Number of grey values.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """0..levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Size | Sequence[int], _instance: Any = None) -> DiscretisedLogisticCells:
        """The same distribution over more batch dimensions."""
        shape = Size(batch_shape)
        return DiscretisedLogisticCells(self.loc.expand(shape), self.scale.expand(shape), self.levels, False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of every cell, without cancellation in the tails."""
        if self._validate_args:
            self._validate_sample(value)
        top = (value + 0.5 - self.loc) / self.scale
        low = (value - 0.5 - self.loc) / self.scale
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b))
        inside = logsigmoid(top) + logsigmoid(-low) + torch.log(-torch.expm1(-1 / self.scale))
        at_end = value >= self.levels - 1
        first = torch.where(at_end, torch.zeros_like(top), -softplus(-top))
        return torch.where(value <= 0, first, torch.where(at_end, -softplus(low), inside))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape (*sample_shape, ...)."""
        shape = self._extended_shape(Size(sample_shape))
        with torch.no_grad():
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(1e-7, 1 - 1e-7)
            return (self.loc + self.scale * torch.logit(u)).round().clamp(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """The place, kept within the range: the mean but for rounding and the tails."""
        return self.loc.clamp(0, self.levels - 1)
