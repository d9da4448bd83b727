"""Importance weights of the factors that variational Bayes finds for topics and shares: is their spread to be trusted?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .words import Places, library, padded, settle

#: Importance weights of a guide, fewer where there are so many pairs of words and topics.
WEIGHTS, FEW_WEIGHTS, MANY_CELLS = 200, 25, 5_000_000


def num_weights(documents: Any, form: Any) -> int:
    """Draws of the guide that are weighed."""
    return FEW_WEIGHTS if documents.counts.size * form.num_topics > MANY_CELLS else WEIGHTS


def weighed(documents: Any, phi: Tensor, lam: Tensor, run: Any, seed: int) -> dict[str, float]:
    """k-hat and effective share of importance weights p(w, theta, phi) / q(theta, phi), topics of words summed out."""
    from ..diagnostics import pareto_khat

    gamma, alpha = run.gamma.double().cpu(), run.alpha.double().cpu()
    count, theta = len(phi), dirichlet_draws(gamma, len(phi), seed + 1)
    pairs = (
        (run.eta.double().cpu().expand_as(lam), lam, phi),
        (alpha.expand_as(gamma), gamma, theta),
    )
    built = library() if count == FEW_WEIGHTS else None
    weights = heights(documents, phi[None], theta[None])[0] if built is None else told(built, documents, phi, theta)
    for prior, guide, values in pairs:
        constant = float((log_beta(guide) - log_beta(prior)).sum())
        weights = weights + np.array([constant + float(((prior - guide) * v.log()).sum()) for v in values])
    ratio = np.exp(weights - weights.max())
    return {"khat": pareto_khat(weights), "weight_ess": float(ratio.sum() ** 2 / (ratio**2).sum() / count)}


def log_beta(concentration: Tensor) -> Tensor:
    """Logarithm of the normaliser of Dirichlets (..., K), (...)."""
    return concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()


def told(built: Any, documents: Any, phi: Tensor, theta: Tensor) -> np.ndarray:
    """log p of all words at topics (S, K, V) and shares (S, D, K), in machine code and single precision, (S,)."""
    places, none = Places(documents), padded(torch.zeros(phi.shape[1]))
    return np.array([settle(built, places, padded(p.T), padded(t), none, 0) for p, t in zip(phi, theta, strict=True)])


def untrusted(found: dict[str, float], form: Any) -> list[str]:
    """A warning where the weights say that spreads are wrong."""
    from ..diagnostics import KHAT_LIMIT

    if not found:
        return ["k-hat is not known: documents are read piece by piece, and their shares are not kept"]
    if not found["khat"] > KHAT_LIMIT:
        return []
    instead = "" if form.alpha_param or form.eta_param else "; Gibbs() draws from the posterior itself"
    return [
        f"k-hat is {found['khat']:.2f} > {KHAT_LIMIT}: independent topics and shares miss a part of the posterior, and what "
        f"they say about spread is not to be trusted{instead}"
    ]


def dirichlet_draws(concentration: Tensor, count: int, seed: int) -> Tensor:
    """Draws (count, K, V); NumPy's gamma variates, which are several times as fast as torch's for small concentrations."""
    random, shape = np.random.default_rng(seed), concentration.numpy()
    gamma = torch.from_numpy(np.stack([random.standard_gamma(shape) for _ in range(count)])).clamp_min(1e-300)
    return gamma / gamma.sum(-1, keepdim=True)


def heights(documents: Any, phi: Tensor, theta: Tensor) -> np.ndarray:
    """log p(words | topics, shares) of every draw: phi (C, S, K, V) and theta (C, S, D, K) -> (C, S)."""
    owner = torch.from_numpy(np.repeat(np.arange(len(documents)), np.diff(documents.starts)))
    words, counts = torch.from_numpy(documents.words).long(), torch.from_numpy(documents.counts).to(phi.dtype)
    found = [
        [float(counts @ (t[owner] * p[:, words].T).sum(-1).log()) for p, t in zip(a, b)] for a, b in zip(phi, theta)
    ]
    return np.array(found)
