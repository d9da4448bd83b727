r"""Conjugate priors as pseudo-statistics: what the prior adds to the sums of the data in a MAP update.

The mode is that of the density of the unknown itself, in the parametrisation in which the story samples it.
"""

from dataclasses import dataclass

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor

from ...handlers import unwrap


@dataclass(frozen=True)
class Conjugate:
    """Pseudo-statistics of the shape of the unknown.

    Attributes
    ----------
    count, total
        Added to the number of observations and to their statistic: successes, events, scatter, counts per class.
    precision, mean
        Of a normal prior on a location; matrices for vectors.
    """

    text: str
    count: Tensor | float = 0.0
    total: Tensor | float = 0.0
    precision: Tensor | None = None
    mean: Tensor | None = None


def conjugate(prior: td.Distribution | None, slot: str, role: str, theta: Tensor) -> Conjugate | None:
    """Pseudo-statistics of `prior` for an unknown that plays `role`, or None where the pair is not conjugate.

    A missing (`pyro.param`, maximum likelihood) or improper prior adds nothing.
    """
    if prior is None:
        return Conjugate("no prior")
    fn = unwrap(prior)
    if isinstance(fn, dist.ImproperUniform):
        return Conjugate("flat prior")
    name = type(fn).__name__
    if role == "probs" and name == "Dirichlet":
        return Conjugate("Dirichlet prior", total=fn.concentration.expand(theta.shape) - 1)
    if role == "probs" and name == "Beta":
        a, b = fn.concentration1.expand(theta.shape), fn.concentration0.expand(theta.shape)
        return Conjugate("Beta prior", count=a + b - 2, total=a - 1)
    if role == "probs" and name == "Uniform" and bool((fn.low == 0).all() and (fn.high == 1).all()):
        return Conjugate("uniform prior")
    if role in ("rate", "precision") and name in ("Gamma", "Exponential"):
        shape = fn.concentration.expand(theta.shape) if name == "Gamma" else torch.ones_like(theta)
        rate = fn.rate.expand(theta.shape)
        if role == "rate":
            return Conjugate(f"{name} prior", count=rate, total=shape - 1)
        return Conjugate(f"{name} prior", count=2 * (shape - 1), total=2 * rate)
    if role == "variance" and name == "InverseGamma":
        a, b = fn.concentration.expand(theta.shape), fn.rate.expand(theta.shape)
        return Conjugate("inverse-gamma prior", count=2 * (a + 1), total=2 * b)
    if role == "precision_matrix" and name == "Wishart":
        size = theta.shape[-1]
        count = (fn.df - size - 1).expand(theta.shape[:-2])
        return Conjugate("Wishart prior", count=count, total=fn.precision_matrix.expand(theta.shape))
    if role == "loc" and name == "Normal":
        return Conjugate("normal prior", precision=(fn.scale**-2).expand(theta.shape), mean=fn.loc.expand(theta.shape))
    if role == "loc" and name == "MultivariateNormal":
        matrix = fn.precision_matrix.expand(*theta.shape, theta.shape[-1])
        return Conjugate("normal prior", precision=matrix, mean=fn.loc.expand(theta.shape))
    return None
