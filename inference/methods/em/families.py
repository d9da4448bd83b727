r"""Exponential families as EM needs them: sufficient statistics, canonical parameters, expected log density.

For a family with density :math:`h(x)\exp(\eta^\top T(x) - A(\eta))`, the expected complete log-likelihood depends on the
data only through the weighted sums of T (Bishop 2006, section 2.4); everything below is written in those sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.nn.functional import one_hot

Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One exponential family.

    Attributes
    ----------
    slots
        fn -> canonical parameters: slot -> (role, tensor), role naming the parametrisation the story uses.
    statistics
        (value, fn) -> sufficient statistics of each value; trailing dimensions are the family's own.
    trailing
        Statistic -> number of its own trailing dimensions.
    expected
        (parameters by slot and role, summed statistics) -> expected log density up to the base measure, elementwise.
    event_dims
        Dimensions of one event.
    blocks
        Slot -> dimensions of one parameter block (1 for a mean vector or a probability vector, 2 for a matrix).
    natural
        Parameters -> coefficient of each statistic ("n" of the count), so that the log density is their inner product;
        None where the count differs from row to row.
    base
        log h(x) of each value, None where it is 0.
    linear
        The statistic that is the value itself, where there is no other: a zero adds nothing to its sums, nor to log h(x).
    linear_base
        (values other than 0, sums of the events) -> the sum of log h(x); None where it is 0.
    """

    name: str
    slots: Callable[[Any], dict[str, tuple[str, Tensor]]]
    statistics: Callable[[Tensor, Any], Statistics]
    trailing: dict[str, int]
    expected: Callable[[dict[str, tuple[str, Tensor]], Statistics], Tensor]
    event_dims: int = 0
    blocks: dict[str, int] = field(default_factory=dict)
    natural: Callable[[dict[str, tuple[str, Tensor]]], Statistics] | None = None
    base: Callable[[Tensor], Tensor] | None = None
    linear: str | None = None
    linear_base: Callable[[Tensor, Tensor], Tensor] | None = None


def collapse(tensor: Tensor) -> Tensor:
    """Undo broadcasting: expanded (stride 0) dimensions shrink to 1."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _given(fn: td.Distribution, *names: str) -> tuple[str, Tensor]:
    """The parametrisation that the story wrote."""
    for name in names:
        if name in fn.__dict__:
            return name, collapse(getattr(fn, name))
    return names[0], collapse(getattr(fn, names[0]))


def _probabilities(fn: td.Distribution) -> dict[str, tuple[str, Tensor]]:
    role, value = _given(fn, "probs", "logits")
    return {"probs": (role, value)}


def variance(role: str, value: Tensor) -> Tensor:
    """Variance from the parametrisation of a normal's spread."""
    return {"scale": lambda: value**2, "variance": lambda: value, "precision": lambda: 1 / value}[role]()


def covariance(role: str, value: Tensor) -> Tensor:
    """Covariance from the parametrisation of a multivariate normal's spread."""
    if role == "scale_tril":
        return value @ value.mT
    return value if role == "covariance_matrix" else torch.linalg.inv(value)


def _normal_expected(p: dict[str, tuple[str, Tensor]], s: Statistics) -> Tensor:
    m, v = p["loc"][1], variance(*p["spread"])
    return -0.5 * ((s["xx"] - 2 * m * s["x"] + s["n"] * m * m) / v + s["n"] * (v.log() + math.log(2 * math.pi)))


def _mvn_slots(fn: Any) -> dict[str, tuple[str, Tensor]]:
    role, value = _given(fn, "precision_matrix", "covariance_matrix", "scale_tril")
    return {"loc": ("loc", collapse(fn.loc)), "spread": (role, value)}


def scatter(s: Statistics, loc: Tensor) -> Tensor:
    """Weighted scatter of a multivariate normal around `loc`: (..., D, D)."""
    cross = s["x"].unsqueeze(-1) * loc.unsqueeze(-2)
    return s["xx"] - cross - cross.mT + s["n"][..., None, None] * loc.unsqueeze(-1) * loc.unsqueeze(-2)


def _mvn_expected(p: dict[str, tuple[str, Tensor]], s: Statistics) -> Tensor:
    role, spread = p["spread"]
    around = scatter(s, p["loc"][1])
    size = around.shape[-1]
    if role == "precision_matrix":
        log_det, quadratic = -torch.linalg.slogdet(spread)[1], (spread * around).sum((-2, -1))
    else:
        factor = spread if role == "scale_tril" else torch.linalg.cholesky(spread)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        quadratic = torch.cholesky_solve(around, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    return -0.5 * (quadratic + s["n"] * (log_det + size * math.log(2 * math.pi)))


def _log_probabilities(p: dict[str, tuple[str, Tensor]]) -> Tensor:
    role, value = p["probs"]
    if role == "logits":
        return value.log_softmax(-1)
    return (value / value.sum(-1, keepdim=True)).clamp_min(torch.finfo(value.dtype).tiny).log()


def _binary_expected(p: dict[str, tuple[str, Tensor]], s: Statistics) -> Tensor:
    role, value = p["probs"]
    if role == "logits":
        return s["x"] * value - s["n"] * torch.nn.functional.softplus(value)
    tiny = torch.finfo(value.dtype).eps
    value = value.clamp(tiny, 1 - tiny)
    return s["x"] * value.log() + (s["n"] - s["x"]) * (1 - value).log()


def _count_like(value: Tensor, fn: td.Distribution) -> Statistics:
    x = value.to(torch.get_default_dtype())
    return {"n": torch.ones_like(x), "x": x}


def _normal_natural(p: dict[str, tuple[str, Tensor]]) -> Statistics:
    m, v = torch.broadcast_tensors(p["loc"][1], variance(*p["spread"]))
    return {"n": -0.5 * (m * m / v + v.log() + math.log(2 * math.pi)), "x": m / v, "xx": -0.5 / v}


def _mvn_natural(p: dict[str, tuple[str, Tensor]]) -> Statistics:
    role, spread = p["spread"]
    m = p["loc"][1]
    precision = spread if role == "precision_matrix" else torch.linalg.inv(covariance(role, spread))
    log_det = torch.linalg.slogdet(precision)[1]
    x = (precision @ m.unsqueeze(-1)).squeeze(-1)
    n = 0.5 * (log_det - (x * m).sum(-1) - m.shape[-1] * math.log(2 * math.pi))
    return {"n": n, "x": x, "xx": -0.5 * precision.expand(*x.shape, x.shape[-1])}


def _binary_natural(p: dict[str, tuple[str, Tensor]]) -> Statistics:
    role, value = p["probs"]
    if role == "logits":
        return {"n": -torch.nn.functional.softplus(value), "x": value}
    tiny = torch.finfo(value.dtype).eps
    value = value.clamp(tiny, 1 - tiny)
    return {"n": (1 - value).log(), "x": value.log() - (1 - value).log()}


def _poisson_natural(p: dict[str, tuple[str, Tensor]]) -> Statistics:
    rate = p["rate"][1].clamp_min(1e-300)
    return {"n": -rate, "x": rate.log()}


def _trials(x: Tensor, f: td.Binomial) -> Tensor:
    """Number of trials of every value; the states of a summed-out latent in the probability spread it as well."""
    count = collapse(f.total_count).to(torch.get_default_dtype())
    return count.expand(torch.broadcast_shapes(count.shape, x.shape))


def _multinomial_base(x: Tensor) -> Tensor:
    return torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)


_POINT = {"n": 0, "x": 0}

FAMILIES: dict[type, Family] = {
    td.Normal: Family(
        "Normal",
        lambda f: {"loc": ("loc", collapse(f.loc)), "spread": ("scale", collapse(f.scale))},
        lambda x, f: {"n": torch.ones_like(x), "x": x, "xx": x * x},
        {"n": 0, "x": 0, "xx": 0},
        _normal_expected,
        natural=_normal_natural,
    ),
    td.MultivariateNormal: Family(
        "MultivariateNormal",
        _mvn_slots,
        lambda x, f: {"n": torch.ones_like(x[..., 0]), "x": x, "xx": x},  # squares are formed while summing
        {"n": 0, "x": 1, "xx": 2},
        _mvn_expected,
        event_dims=1,
        blocks={"loc": 1, "spread": 2},
        natural=_mvn_natural,
    ),
    td.Bernoulli: Family(
        "Bernoulli", _probabilities, _count_like, _POINT, _binary_expected, natural=_binary_natural, linear="x"
    ),
    td.Binomial: Family(
        "Binomial",
        _probabilities,
        lambda x, f: {"n": _trials(x, f), "x": _count_like(x, f)["x"]},
        _POINT,
        _binary_expected,
    ),
    td.Poisson: Family(
        "Poisson",
        lambda f: {"rate": ("rate", collapse(f.rate))},
        _count_like,
        _POINT,
        lambda p, s: s["x"] * p["rate"][1].clamp_min(1e-300).log() - s["n"] * p["rate"][1],
        natural=_poisson_natural,
        base=lambda x: -torch.lgamma(x + 1),
        linear="x",
        linear_base=lambda values, totals: -torch.lgamma(values + 1).sum(),
    ),
    td.Exponential: Family(
        "Exponential",
        lambda f: {"rate": ("rate", collapse(f.rate))},
        _count_like,
        _POINT,
        lambda p, s: s["n"] * p["rate"][1].log() - s["x"] * p["rate"][1],
        natural=lambda p: {"n": p["rate"][1].log(), "x": -p["rate"][1]},
    ),
    td.Categorical: Family(
        "Categorical",
        _probabilities,
        lambda x, f: {"counts": one_hot(x.long(), f._num_events).to(torch.get_default_dtype())},
        {"counts": 1},
        lambda p, s: (s["counts"] * _log_probabilities(p)).sum(-1),
        blocks={"probs": 1},
        natural=lambda p: {"counts": _log_probabilities(p)},
    ),
    td.Multinomial: Family(
        "Multinomial",
        lambda f: _probabilities(f._categorical),
        lambda x, f: {"counts": x.to(torch.get_default_dtype())},
        {"counts": 1},
        lambda p, s: (s["counts"] * _log_probabilities(p)).sum(-1),
        event_dims=1,
        blocks={"probs": 1},
        natural=lambda p: {"counts": _log_probabilities(p)},
        base=_multinomial_base,
        linear="counts",
        linear_base=lambda values, totals: torch.lgamma(totals + 1).sum() - torch.lgamma(values + 1).sum(),
    ),
}


def family_of(fn: td.Distribution) -> Family | None:
    """The family of an unwrapped distribution; subclasses with a density of their own do not count."""
    for kind, family in FAMILIES.items():
        if isinstance(fn, kind) and type(fn).__name__ == kind.__name__:
            return family
    return None
