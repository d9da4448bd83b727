r"""Cell table: every combination of categorical features is a cell of its own, with a probability of its own.

Story
-----
::

    theta      ~ Dirichlet(a, ..., a)                 (C,)   probability of every cell
    for n = 1..N  "data"
        x_n    ~ Categorical(theta)                   ()     the cell of row n

with C the product of the features' numbers of levels; `cells` numbers the combinations, `combinations` undoes it.

The estimate of greatest likelihood is the share of the rows, :math:`\theta_j = n_j / N`: cells that nobody has seen are
impossible.  One pseudo-count a cell, :math:`(n_j + 1)/(N + C)`, is often called a maximum likelihood estimate too; it is the
posterior mean under a = 1, and the posterior mode under a = 2.  All unseen cells remain equally likely: the model
knows of no likeness between combinations.

Bishop, *Pattern Recognition and Machine Learning* (2006), section 2.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..mixtures import count_setting, setting


@dataclass(frozen=True)
class CellTable:
    """Multinomial over all combinations of features with `sizes` levels each.

    Parameters
    ----------
    sizes
        Number of levels of every feature.
    concentration
        a, the pseudo-count of every cell (a - 1 for the mode).

    Raises
    ------
    ValueError
        A feature without levels, or a concentration that is not positive.

    Examples
    --------
    >>> CellTable(sizes=(7, 6, 3, 4, 8)).num_cells
    4032
    """

    sizes: Sequence[int]
    concentration: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.sizes, int) or not len(self.sizes):
            raise ValueError(f"sizes must list the number of levels of every feature, got {self.sizes!r}")
        object.__setattr__(self, "sizes", tuple(count_setting("sizes", size) for size in self.sizes))
        concentration = setting("concentration", self.concentration, positive=True)
        if isinstance(concentration, tuple):
            raise ValueError(f"concentration must be one number, got {len(concentration)}")
        object.__setattr__(self, "concentration", concentration)

    @property
    def num_cells(self) -> int:
        """C."""
        return math.prod(self.sizes)

    def cells(self, table: Tensor) -> Tensor:
        """Cell numbers (N,) of rows of levels (N, features), the last feature running fastest.

        Raises
        ------
        ValueError
            Another number of columns than features, or a level that a feature does not have.
        """
        if table.ndim != 2 or table.shape[1] != len(self.sizes):
            raise ValueError(
                f"the table has shape {tuple(table.shape)}, expected {len(self.sizes)} columns, one a feature"
            )
        table = table.long()
        sizes = torch.tensor(self.sizes)
        wrong = (table < 0) | (table >= sizes)
        if wrong.any():
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"row {row}, column {column} holds level {int(table[row, column])}; feature {column} has levels 0 to "
                f"{self.sizes[column] - 1}"
            )
        number = torch.zeros(len(table), dtype=torch.long)
        for j, size in enumerate(self.sizes):
            number = number * size + table[:, j]
        return number

    def combinations(self, cells: Tensor) -> Tensor:
        """Levels (N, features) of cell numbers (N,)."""
        return torch.stack(torch.unravel_index(cells.long(), self.sizes), -1)  # type: ignore[arg-type]

    def model(self, x: Tensor | None = None, num_data: int = 50) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N,), the cell of every row; None dreams up `num_data` rows.
        num_data
            N where there is no `x`.

        Returns
        -------
        x, (N,).
        """
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((self.num_cells,), self.concentration)))
        with pyro.plate("data", num_data if x is None else len(x)):
            return pyro.sample("x", dist.Categorical(theta), obs=x)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Fifty faces and the 4,032 that could be drawn."""
        from ..data import load
        from ..data.faces import SIZES

        story = cls(sizes=SIZES)
        return story, {"x": story.cells(load("faces").x)}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Five rows in three cells, few enough for an exact answer."""
        return cls(sizes=(3,), concentration=2.0), {"x": torch.tensor([0, 0, 1, 2, 0])}
