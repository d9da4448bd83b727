r"""Naive Bayes: features that are independent given the class, with the class seen, hidden, or left out.

Story
-----
::

    pi                ~ Dirichlet(a, ..., a)             (C,)      share of every class
    for j = 0..D-1    one feature after another, since each has levels of its own
        for c = 1..C  "classes"
            theta_j_c ~ Dirichlet(b, ..., b)             (V_j,)    levels of feature j in class c
    for n = 1..N      "data"
        y_n           ~ Categorical(pi)                  ()        its class, seen or not
        x_j_n         ~ Categorical(theta_j[y_n])        ()        its level of feature j

a is `concentration`, b is `pseudo_count`.  With one class there is no y: :math:`p(x) = \prod_j \theta_{j x_j}`, which the
lectures call naive Bayes though it has no class.  With the class seen it is the classifier
:math:`p(y \mid x) \propto \pi_y \prod_j \theta_{j y x_j}`; with the class hidden it is a mixture, or latent class analysis.

Murphy, *Machine Learning: A Probabilistic Perspective* (2012), section 3.5.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..mixtures import count_setting, pseudo_count


@dataclass(frozen=True)
class NaiveBayes:
    """Independent categorical features within `num_classes` classes.

    Parameters
    ----------
    sizes
        Number of levels of every feature.
    num_classes
        C; 1 for features that are independent over all rows.
    concentration, pseudo_count
        a and b: rows of every class, and of every level in a class, seen beforehand (less 1 for the mode).

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> NaiveBayes(sizes=(7, 6, 3), num_classes=2)
    NaiveBayes(sizes=(7, 6, 3), num_classes=2, concentration=1.0, pseudo_count=1.0)
    """

    sizes: Sequence[int]
    num_classes: int = 1
    concentration: float = 1.0
    pseudo_count: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.sizes, int) or not len(self.sizes):
            raise ValueError(f"sizes must list the number of levels of every feature, got {self.sizes!r}")
        object.__setattr__(self, "sizes", tuple(count_setting("sizes", size) for size in self.sizes))
        object.__setattr__(self, "num_classes", count_setting("num_classes", self.num_classes))
        for name in ("concentration", "pseudo_count"):
            object.__setattr__(self, name, pseudo_count(name, getattr(self, name)))

    def model(self, x: Tensor | None = None, y: Tensor | None = None, num_data: int = 300) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, D) levels, what was seen; None dreams up `num_data` rows.
        y
            (N,) classes 0..C-1; None where they are hidden.
        num_data
            N where there is no `x`.

        Returns
        -------
        x, (N, D).
        """
        C, N = self.num_classes, num_data if x is None else len(x)
        if x is not None and (x.ndim != 2 or x.shape[1] != len(self.sizes)):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected {len(self.sizes)} columns, one a feature: {self.sizes}"
            )
        if y is not None and C == 1:
            raise ValueError(
                f"y tells classes 0 to {int(y.max())} and num_classes is 1; set num_classes to their number"
            )
        pi = pyro.sample("pi", dist.Dirichlet(torch.full((C,), self.concentration))) if C > 1 else None
        classes = pyro.plate("classes", C) if C > 1 else nullcontext()
        theta = []
        for j, V in enumerate(self.sizes):
            with classes:
                theta.append(pyro.sample(f"theta_{j}", dist.Dirichlet(torch.full((V,), self.pseudo_count))))
        seen = []
        with pyro.plate("data", N):
            cls = pyro.sample("y", dist.Categorical(pi), obs=y) if pi is not None else None
            for j, table in enumerate(theta):
                fn = dist.Categorical(table if cls is None else table[cls])
                seen.append(pyro.sample(f"x_{j}", fn, obs=None if x is None else x[:, j]))
        return torch.stack(seen, 1)

    def classify(self, theta: dict[str, Tensor], x: Tensor) -> Tensor:
        """p(y | x) for rows (N, D), at one value of pi and theta: (N, C)."""
        logits = theta["pi"].log().expand(len(x), -1)
        for j in range(len(self.sizes)):
            logits = logits + theta[f"theta_{j}"].log()[:, x[:, j].long()].T
        return logits.softmax(-1)

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Fifty faces, feature by feature."""
        from ..data import load
        from ..data.faces import SIZES

        return cls(sizes=SIZES), {"x": load("faces").x.long()}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Four rows of two features whose class is hidden, few enough for an exact answer."""
        x = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 1]])
        return cls(sizes=(2, 2), num_classes=2, concentration=2.0, pseudo_count=2.0), {"x": x}
