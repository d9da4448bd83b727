r"""What networks say of a column: for every kind of column a distribution, made of a few numbers a cell.

A likelihood knows how many numbers a cell takes (`outputs`), which distribution they make (calling it), the support of a
cell, and how a cell is shown to an encoder (`encode`).  `Columns` puts likelihoods side by side, one a column.

================================  ==========================================  ===================================
likelihood                        numbers a cell                              a cell holds
================================  ==========================================  ===================================
Bernoulli()                       logit                                       0 or 1
Binomial(total)                   logit                                       successes, 0..total
Categorical(levels)               a logit a level                             level, 0..levels - 1
Normal()                          place, log-like scale                       a real number
Normal(scale)                     place                                       a real number
StudentT(df)                      place, log-like scale                       a real number with outliers
Poisson()                         log-like rate                               a count
NegativeBinomial()                log-like mean, log-like count               a count with more spread than Poisson's
DiscretisedLogistic(levels)       place, log-like scale                       a grey value, 0..levels - 1
================================  ==========================================  ===================================

"Log-like" numbers pass through a softplus, which is linear where they are large: gradients stay tame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from ..mixtures import count_setting, pseudo_count
from .cells import Cells, DiscretisedLogisticCells

#: The least scale of a column whose scale is learned: without it the density of a constant column has no bound.
LEAST = 1e-3


class Likelihood:
    """What all likelihoods of a column share.

    Attributes
    ----------
    outputs
        Numbers that the decoder gives for a cell.
    inputs
        Numbers that an encoder sees of a cell.
    """

    outputs: int = 1
    inputs: int = 1

    @property
    def support(self) -> constraints.Constraint:
        """The values that a cell can have."""
        return self(torch.zeros(self.outputs, 1)).support

    def __call__(self, out: Tensor) -> Any:
        """The distribution of cells (..., D) that decoder outputs (..., outputs, D) describe."""
        raise TypeError(f"{type(self).__name__} describes no distribution")

    def encode(self, x: Tensor) -> Tensor:
        """Cells (..., D) as an encoder sees them: (..., inputs, D)."""
        return x.unsqueeze(-2)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Yes or no."""

    def __call__(self, out: Tensor) -> dist.Bernoulli:
        return dist.Bernoulli(logits=out.squeeze(-2))


@dataclass(frozen=True)
class Binomial(Likelihood):
    """`total` tries, each a success or not."""

    total: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", count_setting("total", self.total))

    def __call__(self, out: Tensor) -> dist.Binomial:
        return dist.Binomial(self.total, logits=out.squeeze(-2))

    def encode(self, x: Tensor) -> Tensor:
        """Shares of successes."""
        return (x / self.total).unsqueeze(-2)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of `levels` levels, numbered from 0."""

    levels: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", count_setting("levels", self.levels))

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """A logit a level."""
        return self.levels

    inputs = outputs  # type: ignore[assignment]

    def __call__(self, out: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=out.movedim(-2, -1))

    def encode(self, x: Tensor) -> Tensor:
        """One number a level, 1 at the one seen."""
        levels = torch.arange(self.levels, dtype=x.dtype, device=x.device)
        return (x.unsqueeze(-2) == levels.unsqueeze(-1)).to(x.dtype)


@dataclass(frozen=True)
class Normal(Likelihood):
    """A normal whose scale the decoder learns cell by cell, or one of a given `scale`."""

    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", pseudo_count("scale", self.scale))

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """A place, and a scale where none is given."""
        return 2 if self.scale is None else 1

    def __call__(self, out: Tensor) -> dist.Normal:
        if self.scale is not None:
            loc = out.squeeze(-2)
            return dist.Normal(loc, torch.full_like(loc, self.scale))
        loc, raw = out.unbind(-2)
        return dist.Normal(loc, softplus(raw) + LEAST)


@dataclass(frozen=True)
class StudentT(Likelihood):
    """Student's t with `df` degrees of freedom: a real number with outliers."""

    df: float = 4.0
    outputs = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "df", pseudo_count("df", self.df))

    def __call__(self, out: Tensor) -> dist.StudentT:
        loc, raw = out.unbind(-2)
        return dist.StudentT(torch.full_like(loc, self.df), loc, softplus(raw) + LEAST)


@dataclass(frozen=True)
class Poisson(Likelihood):
    """A count whose mean and variance are equal."""

    def __call__(self, out: Tensor) -> dist.Poisson:
        return dist.Poisson(softplus(out.squeeze(-2)) + LEAST)

    def encode(self, x: Tensor) -> Tensor:
        """log(1 + x): counts differ by factors."""
        return x.log1p().unsqueeze(-2)


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """A count with mean m and variance m + m^2 / r."""

    outputs = 2

    def __call__(self, out: Tensor) -> dist.NegativeBinomial:
        m, r = (softplus(part) + LEAST for part in out.unbind(-2))
        return dist.NegativeBinomial(r, logits=m.log() - r.log())

    def encode(self, x: Tensor) -> Tensor:
        """log(1 + x): counts differ by factors."""
        return x.log1p().unsqueeze(-2)


@dataclass(frozen=True)
class DiscretisedLogistic(Likelihood):
    """A grey value, 0..levels - 1: a logistic variable rounded to whole numbers, its tails counted to the ends."""

    levels: int = 256
    outputs = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", count_setting("levels", self.levels))

    def __call__(self, out: Tensor) -> DiscretisedLogisticCells:
        loc, raw = out.unbind(-2)
        half = (self.levels - 1) / 2
        return DiscretisedLogisticCells(half * (1 + loc), half * (softplus(raw) + LEAST), self.levels)

    def encode(self, x: Tensor) -> Tensor:
        """From -1 to 1."""
        return (2 * x / max(self.levels - 1, 1) - 1).unsqueeze(-2)


#: Likelihoods by name; Binomial and Categorical must be told their size.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "binomial": Binomial,
    "categorical": Categorical,
    "discretised_logistic": DiscretisedLogistic,
    "negative_binomial": NegativeBinomial,
    "normal": Normal,
    "poisson": Poisson,
    "student_t": StudentT,
}
_NEED_A_SIZE = {"binomial": "Binomial(total=...)", "categorical": "Categorical(levels=...)"}


def likelihood_of(given: str | Likelihood) -> Likelihood:
    """A likelihood by its name, or itself.

    Raises
    ------
    ValueError
        No likelihood is called so, or it needs a size; lists all names.
    TypeError
        Neither a name nor a likelihood.
    """
    if isinstance(given, Likelihood):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"likelihood must be one of {sorted(LIKELIHOODS)} or an instance of theirs, or a sequence of these, one a "
            f"column; got {given!r} ({type(given).__name__})"
        )
    if given in _NEED_A_SIZE:
        raise ValueError(f"likelihood {given!r} needs a size: pass zoo.deep.{_NEED_A_SIZE[given]}")
    if given not in LIKELIHOODS:
        close = get_close_matches(given, LIKELIHOODS, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no likelihood is called {given!r}; there are {sorted(LIKELIHOODS)}.{guess}")
    return LIKELIHOODS[given]()


class Columns:
    """Likelihoods side by side: one for all columns, or one a column.

    Parameters
    ----------
    num_features
        D.
    likelihood
        A name of `LIKELIHOODS`, an instance, or a sequence of D of these.

    Attributes
    ----------
    kinds
        The likelihood of every column, (D,).
    outputs, inputs
        Numbers that the decoder gives for a row, and that an encoder sees of it.

    Raises
    ------
    ValueError, TypeError
        See `likelihood_of`; or there are more or fewer likelihoods than columns.
    """

    def __init__(self, num_features: int, likelihood: str | Likelihood | Sequence[str | Likelihood]) -> None:
        if isinstance(likelihood, Sequence) and not isinstance(likelihood, str):
            self.kinds = tuple(likelihood_of(kind) for kind in likelihood)
            if len(self.kinds) != num_features:
                raise ValueError(
                    f"likelihood has {len(self.kinds)} entries and there are {num_features} columns; give one, or one a column"
                )
        else:
            self.kinds = (likelihood_of(likelihood),) * num_features
        groups: dict[Likelihood, list[int]] = {}
        for j, kind in enumerate(self.kinds):
            groups.setdefault(kind, []).append(j)
        self.groups = [(kind, tuple(columns)) for kind, columns in groups.items()]
        self.outputs = sum(kind.outputs * len(columns) for kind, columns in self.groups)
        self.inputs = sum(kind.inputs * len(columns) for kind, columns in self.groups)

    @property
    def mixed(self) -> bool:
        """Whether columns differ in kind."""
        return len(self.groups) > 1

    def __repr__(self) -> str:
        return repr(self.kinds[0]) if not self.mixed else f"[{', '.join(map(repr, self.kinds))}]"

    def __call__(self, out: Tensor) -> Any:
        """The distribution of rows of cells (..., D), every cell an event of its own, from outputs (..., `outputs`)."""
        parts, start = [], 0
        for kind, columns in self.groups:
            stop = start + kind.outputs * len(columns)
            parts.append(kind(out[..., start:stop].unflatten(-1, (kind.outputs, len(columns)))))
            start = stop
        return Cells([columns for _, columns in self.groups], parts) if self.mixed else parts[0]

    def encode(self, x: Tensor) -> Tensor:
        """Rows (..., D) as an encoder sees them, (..., `inputs`), in the order of `groups`; missing cells are zeros."""
        seen, parts = ~x.isnan(), []
        x = torch.where(seen, x, torch.zeros_like(x))
        for kind, columns in self.groups:
            index = torch.tensor(columns, device=x.device)
            some, there = (x, seen) if not self.mixed else (x.index_select(-1, index), seen.index_select(-1, index))
            parts.append((kind.encode(some) * there.unsqueeze(-2)).flatten(-2))
        return torch.cat(parts, -1) if self.mixed else parts[0]


def columns(
    num_features: int,
    *,
    real: Sequence[int] = (),
    counts: Sequence[int] = (),
    binary: Sequence[int] = (),
    categories: Mapping[int, int] | None = None,
) -> tuple[Likelihood, ...]:
    """Likelihoods of columns of mixed kinds, named as the arguments of `MixedMixture` are.

    Parameters
    ----------
    num_features
        D.
    real, counts, binary
        Positions of the columns that hold real numbers (normal), counts (negative binomial) and yes or no.
    categories
        Position -> number of levels of the columns that hold one of several levels.

    Raises
    ------
    ValueError
        A column that is in no list, in two, or that does not exist.

    Examples
    --------
    >>> columns(3, real=[0], binary=[1], categories={2: 4})
    (Normal(scale=None), Bernoulli(), Categorical(levels=4))
    """
    chosen: dict[int, Likelihood] = {}
    told: list[tuple[int, Likelihood]] = [(j, Normal()) for j in real]
    told += [(j, NegativeBinomial()) for j in counts]
    told += [(j, Bernoulli()) for j in binary]
    told += [(j, Categorical(levels)) for j, levels in (categories or {}).items()]
    for j, kind in told:
        if not 0 <= j < num_features:
            raise ValueError(f"there is no column {j}; columns are numbered 0 to {num_features - 1}")
        if j in chosen:
            raise ValueError(f"column {j} is both {chosen[j]} and {kind}; name it once")
        chosen[j] = kind
    if missing := [j for j in range(num_features) if j not in chosen]:
        raise ValueError(f"columns {missing} are of no kind; add them to real, counts, binary or categories")
    return tuple(chosen[j] for j in range(num_features))
