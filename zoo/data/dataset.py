"""A table of numbers with the names and the origin that belong to it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Rows to tell a story about.

    Attributes
    ----------
    name
        What the set is called.
    x
        (N, D) or, for single counts, (N,); float64, NaN where a cell is missing.
    labels
        (N,) whole numbers that no story is shown, for comparison; or None.
    feature_names
        Of the D columns.
    label_names
        What each label stands for; () where labels have no names.
    description, source
        What the rows are and where they come from.
    truth
        For simulated rows: the values of the story's sites that they were drawn with, in the original units.
    loc, scale
        (D,), set by `standardized`: x * scale + loc is in the original units.

    Raises
    ------
    ValueError
        Names or labels whose number is not that of the columns or rows.
    """

    name: str
    x: Tensor
    labels: Tensor | None = None
    feature_names: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    description: str = ""
    source: str = ""
    truth: Mapping[str, Tensor] | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_names", tuple(self.feature_names))
        object.__setattr__(self, "label_names", tuple(self.label_names))
        columns = self.x.shape[1] if self.x.ndim > 1 else 1
        if self.feature_names and len(self.feature_names) != columns:
            names = len(self.feature_names)
            raise ValueError(f"feature_names of {self.name!r} has {names} names and x has {columns} columns")
        if self.labels is not None and self.labels.shape != self.x.shape[:1]:
            found, expected = tuple(self.labels.shape), tuple(self.x.shape[:1])
            raise ValueError(f"labels of {self.name!r} has shape {found}, expected {expected}: one a row of x")

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        rows = [("", self.description)] if self.description else []
        if self.feature_names:
            rows.append(("columns", _some(self.feature_names)))
        if self.labels is not None:
            kinds, counts = self.labels.unique(return_counts=True)
            names = {k: self.label_names[k] if self.label_names else str(k) for k in kinds.tolist()}
            pairs = zip(names.values(), counts.tolist(), strict=True)
            rows.append(("labels", _some([f"{name} ({n})" for name, n in pairs])))
        missing = int(self.x.isnan().sum())
        if missing:
            rows.append(("missing", f"{missing} cells"))
        if self.truth is not None:
            rows.append(("truth", ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.truth.items())))
        if self.loc is not None:
            rows.append(("units", "standardised; original(x) gives the original ones"))
        if self.source:
            rows.append(("source", self.source))
        size = f"{len(self)} rows" + (f", {self.x.shape[1]} columns" if self.x.ndim > 1 else "")
        lines = [f"  {key:<8} {text}" if key else f"  {text}" for key, text in rows]
        return "\n".join([f"{self.name}: {size}", *lines])

    def standardized(self) -> "Dataset":
        """The same rows with mean 0 and standard deviation 1 in each column, missing cells left out.

        A constant column becomes 0 and keeps scale 1; a column without any number stays as it is.
        """
        loc = self.x.nanmean(0).nan_to_num(0.0)
        variance = (self.x - loc).square().nanmean(0)
        rounding = torch.finfo(self.x.dtype).eps * loc.abs()
        scale = torch.where(variance.sqrt() > rounding, variance.sqrt(), torch.ones_like(variance))
        x = (self.x - loc) / scale
        if self.loc is not None and self.scale is not None:  # standardised before: the way back is one step
            loc, scale = self.loc + self.scale * loc, self.scale * scale
        return replace(self, x=x, loc=loc, scale=scale)

    def original(self, x: Tensor) -> Tensor:
        """Rows (..., D) like those of `x`, in the units before `standardized`."""
        return x if self.loc is None or self.scale is None else x * self.scale + self.loc

    def split(self, test: float = 0.2, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """Two sets of rows, drawn at random without replacement.

        Parameters
        ----------
        test
            Share of the rows in the second set, above 0 and below 1; each set has a row at least.
        seed
            Of the draw.

        Raises
        ------
        ValueError
            `test` out of range, or fewer than two rows.
        """
        if not 0 < test < 1:
            raise ValueError(f"test must be a share above 0 and below 1, got {test!r}")
        if len(self) < 2:
            raise ValueError(f"{self.name!r} has {len(self)} rows; two at least can be split")
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self)))
        size = min(max(round(test * len(self)), 1), len(self) - 1)
        return self._rows(order[size:].sort().values), self._rows(order[:size].sort().values)

    def _rows(self, index: Tensor) -> "Dataset":
        labels = None if self.labels is None else self.labels[index]
        truth = self.truth
        if truth is not None and "z" in truth:
            truth = {**truth, "z": truth["z"][index]}
        return replace(self, x=self.x[index], labels=labels, truth=truth)


def _some(names: tuple[str, ...] | list[str], most: int = 8) -> str:
    """The names, or the first few of many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", and {rest} more" if rest > 0 else "")
