"""Effect handlers that keep missing cells, mini-batches and flat priors out of the stories."""

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .transforms import unconstrain_to


def unwrap(fn: Any) -> Any:
    """The distribution inside `Independent`, `MaskedDistribution` and the like."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


class FlatStart(Messenger):
    """Give sites with an improper prior a value to run with: it has no draws of its own."""

    def _pyro_sample(self, msg: dict) -> None:
        fn = unwrap(msg["fn"])
        if msg["value"] is None and isinstance(fn, dist.ImproperUniform):
            transform = unconstrain_to(fn.support)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            msg["value"] = transform(torch.randn(shape))
            msg["done"] = True


class Substitute(Messenger):
    """Hold latent sites and parameters at the given values; observed sites keep their data."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            # Not marked as done: Pyro's enumeration still has to note which dimensions its parameters bring.
            msg["value"] = self.values[msg["name"]]
            msg["infer"] = {**(msg["infer"] or {}), "enumerate": None, "was_substituted": True}

    def _pyro_param(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class ScaleRows(Messenger):
    """Weigh every site inside the data plate by `scale`: a batch of B rows speaks for all N."""

    def __init__(self, plate: str | None, scale: float) -> None:
        super().__init__()
        self.plate, self.scale = plate, scale

    def _pyro_sample(self, msg: dict) -> None:
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.scale


class MissingCells(Messenger):
    """Read NaN in observed values as "not seen" and integrate the cell out of its density.

    Independent cells leave the density; a multivariate normal is replaced by its exact marginal over the seen
    cells (Bishop 2006, equation 2.98).

    Parameters
    ----------
    holes
        Site -> whether any of its values may be NaN; the values of these sites are not looked at, so that a program can
        be captured with its data as inputs.
    """

    def __init__(self, holes: Mapping[str, bool] | None = None) -> None:
        super().__init__()
        self.holes = holes or {}

    def _pyro_sample(self, msg: dict) -> None:
        value = msg["value"]
        if not (msg["is_observed"] and isinstance(value, Tensor) and value.is_floating_point()):
            return
        if (msg["infer"] or {}).get("_deterministic"):
            return
        if not self.holes.get(msg["name"], True):
            return
        missing = value.isnan()
        if msg["name"] not in self.holes and not missing.any():
            return
        fn = msg["fn"]
        if not supports_missing(fn):
            raise ValueError(
                f"site {msg['name']!r}: {int(missing.sum())} cells are NaN and {type(unwrap(fn)).__name__} has no "
                f"closed marginal over the others; drop these rows, or give the missing cells a latent site of their own"
            )
        event_dims = fn.event_dim
        if isinstance(unwrap(fn), torch.distributions.MultivariateNormal):
            msg["infer"] = {**(msg["infer"] or {}), "_complete": (fn, value)}
            msg["fn"] = marginal_normal(fn, ~missing)
            msg["value"] = torch.where(missing, torch.zeros_like(value), value)
            return
        base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
        msg["fn"] = base.mask(~missing).to_event(event_dims)
        msg["value"] = torch.where(missing, _inside(base.support, value), value)


def supports_missing(fn: Any) -> bool:
    """Whether single cells can be integrated out of `fn` in closed form."""
    inner = unwrap(fn)
    if isinstance(inner, torch.distributions.MultivariateNormal):
        return isinstance(fn, torch.distributions.MultivariateNormal)
    return not inner.event_shape


def marginal_normal(fn: dist.MultivariateNormal, seen: Tensor) -> dist.MultivariateNormal:
    """Normal over the seen cells; unseen ones become independent N(0, 1 / 2 pi), whose density at 0 is 1."""
    covariance = fn.covariance_matrix
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    filler = torch.eye(seen.shape[-1], dtype=covariance.dtype, device=covariance.device) / (2 * math.pi)
    loc = torch.where(seen, fn.loc, torch.zeros_like(fn.loc))
    return dist.MultivariateNormal(loc, torch.where(both, covariance, filler), validate_args=False)


def _inside(support: constraints.Constraint, like: Tensor) -> Tensor:
    """Some value of the support, to stand in a masked cell."""
    for guess in (0.0, 1.0, 0.5):
        value = torch.full(like.shape, guess, dtype=like.dtype, device=like.device)
        if bool(support.check(value).all()):
            return value
    return unconstrain_to(support)(torch.zeros_like(like))
