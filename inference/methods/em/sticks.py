r"""Weights broken off a stick: :math:`\pi_k = v_k \prod_{j<k} (1 - v_j)`, what is left belongs to the last one.

With expected counts :math:`n_k` the complete likelihood is :math:`\prod_k v_k^{n_k} (1 - v_k)^{n_{>k}}`, so that a Beta
prior on each part is conjugate (Ishwaran and James, *Gibbs sampling methods for stick-breaking priors*, JASA 2001, section
5.2). Whether a story breaks a stick is tested on its own numbers, however it writes that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from ...handlers import unwrap
from ...joint import LogJoint
from .terms import Term


def broken(v: Tensor) -> Tensor:
    """Weights (..., K) of parts (..., K - 1)."""
    one = torch.ones_like(v[..., :1])
    return torch.cat([v, one], -1) * torch.cat([one, (1 - v).cumprod(-1)], -1)


def mode(counts: Tensor, a: Tensor, b: Tensor, old: Tensor) -> Tensor:
    """Parts that maximise the expected complete log joint: counts (R, K), Beta(a, b), the current parts (R, K - 1)."""
    after = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    hits, total = counts[..., :-1] + a - 1, counts[..., :-1] + after + a + b - 2
    edge = torch.finfo(old.dtype).eps
    return torch.where(total > 0, hits / total.clamp_min(1e-300), old).clamp(edge, 1 - edge)


def beta(fn: td.Distribution | None, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Both shapes of a Beta prior (1 and 1 without one); None where the prior is something else."""
    inner = None if fn is None else unwrap(fn)
    if inner is None or (
        type(inner).__name__ == "Uniform" and bool((inner.low == 0).all() and (inner.high == 1).all())
    ):
        return torch.ones(shape), torch.ones(shape)
    if type(inner).__name__ != "Beta":
        return None
    return inner.concentration1.detach().expand(shape), inner.concentration0.detach().expand(shape)


def stick_of(
    joint: LogJoint, name: str, users: list[Term], theta: dict[str, Tensor], rows: dict[str, Any], prior: Any
) -> str | None:
    """The one Categorical whose weights are broken by an unknown of shape (K - 1,), and by nothing else; or None."""
    v, terms = theta[name], users
    if v.dim() != 1 or len(terms) != 1 or beta(prior, v.shape) is None:
        return None
    term = terms[0]
    if term.family is None or term.family.name != "Categorical" or term.depends != {name}:
        return None
    if term.extra or term.slot_dims.get("probs"):  # the same weights in all rows
        return None
    for share in (0.3, 0.7):  # at the current parts nothing may tell sticks from other things
        other = share * v + (1 - share) * torch.linspace(0.15, 0.8, len(v), dtype=v.dtype, device=v.device)
        with torch.no_grad():
            trace, _ = joint.trace({**theta, name: other}, rows)
        probs = unwrap(trace.nodes[term.name]["fn"]).probs
        probs = probs.reshape(-1, probs.shape[-1])
        if probs.shape[-1] != len(v) + 1 or not torch.allclose(probs, broken(other).expand_as(probs), atol=1e-9):
            return None
    return term.name
