"""Effect handlers that keep missing cells, mini-batches and flat priors out of the stories."""

import copy
import inspect as signatures
import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .transforms import unconstrain_to


def unwrap(fn: Any) -> Any:
    """The distribution inside `Independent`, `MaskedDistribution` and the like."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


class Forward:
    """A module as a Pyro program: called as it is, with the arguments that its `forward` names."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.__signature__ = signatures.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class FlatStart(Messenger):
    """Give sites with an improper prior a value to run with: it has no draws of its own."""

    def _pyro_sample(self, msg: dict) -> None:
        fn = unwrap(msg["fn"])
        if msg["value"] is None and isinstance(fn, dist.ImproperUniform):
            transform = unconstrain_to(fn.support)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            msg["value"] = transform(torch.randn(shape))
            msg["done"] = True


class Enumerated(EnumMessenger):
    """Pyro's, that also runs over many values side by side: it reads the `data` of a value, which `torch.vmap` forbids.

    Tables of states say what they list, so that a recording tells equal ones without a look at their numbers.
    """

    def _pyro_sample(self, msg: Any) -> None:
        before = msg["done"]
        super()._pyro_sample(msg)
        value, fn = msg["value"], msg["fn"]
        if msg["done"] and not before and isinstance(fn, (dist.Categorical, dist.Bernoulli)):
            if (
                isinstance(value, Tensor) and value.dim() and len(value) == value.numel()
            ):  # 0, 1, ... along one dimension
                value._listed_states = (value.dtype, value.device, tuple(value.shape))  # type: ignore[attr-defined]

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not (isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)):
            return super()._pyro_post_sample(msg)
        msg["value"] = torch.empty(value.shape, device="meta")
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value


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


class Multinomial(dist.Multinomial):
    """The same density from one matrix product: of many states and many rows, no table states x rows x words is made.

    PyTorch's spreads probabilities and counts over each other first.  Neither sampling nor parameters change.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log of the multinomial coefficient, and of the product of probabilities; (...,) of values (..., V)."""
        known = self._categorical.__dict__
        if "logits" in known or value.ndim == 0:  # logits may be -inf, where the product would not be a number
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        probs = known["probs"]
        tiny = torch.finfo(probs.dtype).eps
        value, log_p = value.to(probs.dtype), collapsed(probs).clamp(tiny, 1 - tiny).log()
        orders = (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1)
        return (orders + inner(value, log_p)).expand(torch.broadcast_shapes(self.batch_shape, value.shape[:-1]))


def collapsed(tensor: Tensor) -> Tensor:
    """Without repetition: dimensions before the last along which the same memory is read again have size 1."""
    for dim in range(tensor.ndim - 1):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the last dimension of a * b, (..., V) each; one matrix product where they vary along different dimensions."""
    width = max(a.ndim, b.ndim)
    a, b = (x.reshape((1,) * (width - x.ndim) + x.shape) for x in (a, b))
    if any(m > 1 and n > 1 for m, n in zip(a.shape[:-1], b.shape[:-1], strict=True)):
        return (a * b).sum(-1)
    table = a.reshape(-1, a.shape[-1]) @ b.reshape(-1, b.shape[-1]).mT
    outer = table.reshape(a.shape[:-1] + b.shape[:-1])
    turned = outer.permute([d for i in range(width - 1) for d in (i, i + width - 1)])
    return turned.reshape([m * n for m, n in zip(a.shape[:-1], b.shape[:-1], strict=True)])


class OneProduct(Messenger):
    """Multinomial sites whose density is one matrix product."""

    def _pyro_sample(self, msg: dict) -> None:
        if type(msg["fn"]) is dist.Multinomial:
            fn = msg["fn"] = copy.copy(msg["fn"])
            fn.__class__ = Multinomial


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
