"""How far draws of a guide of a topic model are from the posterior: importance weights, of documents kept or read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import ALONE, Ranks
from .documents import Documents
from .streamed import StreamedBayes
from .variational import mean_log, shares_given
from .visits import pieces, runs_of
from .words import Places, library, padded, settle

#: Importance weights of a guide, fewer where there are so many pairs of words and topics.
WEIGHTS, FEW_WEIGHTS, MANY_CELLS = 200, 25, 5_000_000


def num_weights(documents: Documents, form: Any) -> int:
    """Draws of the guide that are weighed."""
    return FEW_WEIGHTS if len(documents.counts) * form.num_topics > MANY_CELLS else WEIGHTS


def weighed(
    documents: Documents,
    phi: Tensor,
    lam: Tensor,
    run: Any,
    seed: int,
    ranks: Ranks = ALONE,
    over: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """k-hat and effective share of importance weights p(w, theta, phi) / q(theta, phi), topics of words summed out.

    Parameters
    ----------
    phi, lam
        Draws of the topics (S, K, V) and the concentrations of q(phi) (K, V) they come from.
    run
        A finished climb: its documents' concentrations, or the means to infer them again, run by run.
    over
        Whether the time is up: then there is no answer.

    Returns
    -------
    "khat" and "weight_ess"; nothing where the time was up before all documents were seen.
    """
    from ..diagnostics import pareto_khat

    alpha, total = run.alpha.double().cpu(), np.zeros(len(phi))
    for first, part, gamma in with_shares(documents, run, alpha, lam):
        theta = dirichlet_draws(gamma, len(phi), seed + 1 + first)
        total += density(part, phi, theta) + ratio_of(alpha.expand_as(gamma), gamma, theta)
        if len(part) < len(documents) and not ranks.shares_rows and over():
            return {}
    total = ranks.add(torch.from_numpy(total))[0].numpy() + ratio_of(run.eta.double().cpu().expand_as(lam), lam, phi)
    ratio = np.exp(total - total.max())
    return {"khat": pareto_khat(total), "weight_ess": float(ratio.sum() ** 2 / (ratio**2).sum() / len(phi))}


def with_shares(documents: Documents, run: Any, alpha: Tensor, lam: Tensor) -> Iterator[tuple[int, Documents, Tensor]]:
    """Documents, all or run by run, with the number of the first and the concentrations (D, K) of their shares."""
    if not isinstance(run, StreamedBayes):
        yield 0, documents, run.gamma.double().cpu()
        return
    table = mean_log(lam).exp().T.contiguous()
    for (first, _), part in pieces(documents, runs_of(documents)):
        yield first, part, shares_given(table, alpha, part)


def density(documents: Documents, phi: Tensor, theta: Tensor) -> np.ndarray:
    """log p of all words at topics (S, K, V) and shares (S, D, K), (S,); in machine code where there are few draws."""
    built = library() if len(phi) == FEW_WEIGHTS else None
    return heights(documents, phi[None], theta[None])[0] if built is None else told(built, documents, phi, theta)


def ratio_of(prior: Tensor, guide: Tensor, values: Tensor) -> np.ndarray:
    """log of the prior's over the guide's density, Dirichlets (..., K) both, at values (S, ..., K), (S,)."""
    constant = float((log_beta(guide) - log_beta(prior)).sum())
    return np.array([constant + float(((prior - guide) * v.log()).sum()) for v in values])


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
        return ["k-hat is not known: the time was up before all documents had been read for it"]
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
