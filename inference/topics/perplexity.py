r"""How well topics foretell words: perplexity :math:`\exp(-\sum_d \log p(w_d) / \sum_d N_d)`, each estimator with its name.

p(w_d) integrates over the shares of the document.  That integral is known exactly for two topics or for very short
documents; otherwise it is estimated from both sides, or replaced by another question (completion).  What scikit-learn and
gensim call `perplexity` is the exponential of a variational bound a word, subsampled and rescaled: another quantity, larger
than this one, and not comparable between libraries.

Wallach, Murray, Salakhutdinov and Mimno, *Evaluation methods for topic models* (ICML 2009).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .documents import Documents, blocks
from .expected import settle

if TYPE_CHECKING:
    from ..posterior import Posterior

ESTIMATORS = ("completion", "left-to-right", "ais", "exact")
#: Assignments of topics that `exact` is willing to sum over for more than two topics.
ASSIGNMENTS = 2_000_000


@dataclass(frozen=True, repr=False)
class Perplexity:
    """exp(-sum log p(w_d) / sum N_d).

    Attributes
    ----------
    value
        The perplexity: lower is better.
    estimator, bound
        How log p(w_d) was found, and on which side of the truth `value` lies: "exact", "upper" (log p is bounded below in
        expectation), "lower", or "completion", which is another question.
    error
        Standard error of `value` over the Monte Carlo runs; 0 where nothing was simulated.
    rows
        log p of each document, (D,).
    num_tokens
        Words that were foretold.
    """

    value: float
    estimator: str
    bound: str
    error: float
    rows: np.ndarray
    num_tokens: float

    def __repr__(self) -> str:
        error = f" ± {self.error:.2g}" if self.error else ""
        return (
            f"perplexity {self.value:.1f}{error} over {self.num_tokens:,.0f} words of {len(self.rows)} documents "
            f"({self.estimator}; {self.bound})"
        )


def perplexity(
    model: Posterior | tuple[Any, Any],
    data: Any,
    estimator: str = "completion",
    *,
    particles: int = 20,
    temperatures: int = 100,
    reverse: bool = False,
    seed: int = 0,
) -> Perplexity:
    """Perplexity of documents under fitted topics.

    Parameters
    ----------
    model
        A posterior of a topic story, or a pair: topics (K, V) and the concentrations alpha (K,), or one number.  Of several
        draws the mean topics are taken.
    data
        A corpus, a sparse matrix, a table of counts, or for a posterior also its story's arguments.
    estimator
        "completion": shares from one half of each document foretell the other.  "left-to-right": sequential, unbiased for
        p(w_d), so that the perplexity errs upwards.  "ais": annealed importance sampling; with `reverse` from the posterior
        back to the prior, which errs downwards.  "exact": quadrature for two topics, else a sum over all assignments.
    particles, temperatures
        Of the Monte Carlo estimators.
    seed
        Of everything random; nothing global moves.

    Raises
    ------
    ValueError
        An unknown estimator, word ids beyond the topics, or too many assignments for `exact`.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {list(ESTIMATORS)}, got {estimator!r}")
    parts = topics_and_documents(model, data)
    random = torch.Generator().manual_seed(seed)
    rows = np.concatenate([np.zeros(0), *(np.zeros(len(p[2])) for p in parts)])
    variance, tokens = 0.0, 0.0
    for phi, alpha, documents, where in parts:
        if estimator == "completion":
            first, second = documents.halves(np.random.default_rng(seed))
            found, noise = complete(phi, alpha, first, second), 0.0
            tokens += second.num_tokens
        else:
            tokens += documents.num_tokens
            if estimator == "exact":
                found, noise = exact(phi, alpha, documents), 0.0
            else:
                tables = (
                    left_to_right(phi, alpha, documents, particles, random)
                    if estimator == "left-to-right"
                    else annealed(phi, alpha, documents, particles, temperatures, random, reverse)
                )
                found, noise = mean_density(tables, reverse and estimator == "ais")
        rows[where] = found.numpy() if isinstance(found, Tensor) else found
        variance += float(noise)
    value = math.exp(-rows.sum() / max(tokens, 1.0))
    side = {
        "completion": "completion",
        "exact": "exact",
        "left-to-right": "upper",
        "ais": "lower" if reverse else "upper",
    }
    name = {
        "completion": "document completion, half of each document given",
        "exact": "exact integral over the shares",
        "left-to-right": f"left-to-right, {particles} particles",
        "ais": f"annealed importance sampling {'back' if reverse else 'on'}, {temperatures} steps, {particles} chains",
    }[estimator]
    return Perplexity(value, name, side[estimator], value * math.sqrt(variance) / max(tokens, 1.0), rows, tokens)


def topics_and_documents(model: Any, data: Any) -> list[tuple[Tensor, Tensor, Documents, np.ndarray]]:
    """Topics (K, V), alpha (K,), documents and their numbers: one entry, or one a slice of a dynamic model."""
    if isinstance(model, tuple):
        phi = torch.as_tensor(np.asarray(model[0]), dtype=torch.float64)
        alpha = torch.as_tensor(np.asarray(model[1]), dtype=torch.float64).expand(len(phi))
        documents = Documents.of(data)
    else:
        from .answers import alpha_of, documents_of, topics_of

        phi, alpha, documents = topics_of(model), alpha_of(model), documents_of(model, data)
    if documents.num_words > phi.shape[-1]:
        raise ValueError(
            f"the documents have word ids up to {documents.num_words - 1} and the topics {phi.shape[-1]} words"
        )
    if phi.ndim == 2:
        return [(phi, alpha, documents, np.arange(len(documents)))]
    if documents.times is None:
        raise ValueError("the documents have no times; a dynamic model needs the slice of each")
    slices = [np.flatnonzero(documents.times == t) for t in range(phi.shape[1])]
    return [(phi[:, t], alpha, documents.take(d), d) for t, d in enumerate(slices) if len(d)]


def mean_density(table: Tensor, harmonic: bool = False) -> tuple[Tensor, float]:
    """Log of the mean over particles (R, D), and the variance of the sum over documents; harmonic for reverse runs."""
    sign = -1.0 if harmonic else 1.0
    logs, R = sign * table, len(table)
    rows = logs.logsumexp(0) - math.log(R)
    ratio = (logs - rows).exp()
    return sign * rows, float(ratio.var(0).sum() / R) if R > 1 else math.nan


# -- estimators ----------------------------------------------------------------------------------------------------------


def complete(phi: Tensor, alpha: Tensor, first: Documents, second: Documents, rounds: int = 100) -> Tensor:
    """log p of the second halves at the shares that the first halves suggest, (D,)."""
    theta = torch.zeros(len(first), len(alpha), dtype=phi.dtype)
    table = phi.T.contiguous()
    for block in blocks(first, phi.dtype):
        W = table[block.flat].view(*block.words.shape, -1)
        start = block.counts.sum(1, keepdim=True) * alpha / alpha.sum()
        n, _ = settle(W, block.counts, start, alpha, rounds)
        theta[block.rows] = (n + alpha) / (n + alpha).sum(1, keepdim=True)
    rows = torch.from_numpy(np.repeat(np.arange(len(second)), np.diff(second.starts)))
    log_p = torch.zeros(len(second), dtype=phi.dtype)
    for part in torch.arange(len(rows)).split(200_000):
        p = (theta[rows[part]] * table[torch.from_numpy(second.words)[part]]).sum(1)
        log_p.index_add_(0, rows[part], p.log() * torch.from_numpy(second.counts)[part])
    return log_p


def exact(phi: Tensor, alpha: Tensor, documents: Documents) -> Tensor:
    """log p(w_d): for two topics by Gauss-Jacobi quadrature, which is exact for a polynomial; else by summing all K^N."""
    K = len(alpha)
    if K > 2:
        longest = int(documents.lengths.max(initial=0))
        if K**longest > ASSIGNMENTS:
            raise ValueError(
                f"exact would sum over {K}^{longest} assignments; it serves two topics, or documents of at most "
                f"{int(math.log(ASSIGNMENTS) / math.log(K))} words with {K} topics; use 'left-to-right' or 'ais'"
            )
        return torch.tensor([_all_assignments(phi, alpha, d) for d in documents.tokens(np.random.default_rng(0))])
    from scipy.special import betaln, roots_jacobi

    found = []
    p, (a, b) = phi.numpy(), alpha.tolist()
    for i in range(len(documents)):
        s = slice(documents.starts[i], documents.starts[i + 1])
        words, counts = documents.words[s], documents.counts[s]
        nodes, weights = roots_jacobi(int(counts.sum()) // 2 + 2, b - 1, a - 1)  # (1 - x)^(b-1) (1 + x)^(a-1)
        theta = (nodes + 1) / 2
        values = np.log(np.outer(theta, p[0, words]) + np.outer(1 - theta, p[1, words])) @ counts
        top = values.max()
        scale = betaln(a, b) + (a + b - 1) * math.log(2.0)
        found.append(top + math.log((weights * np.exp(values - top)).sum()) - scale)
    return torch.tensor(found, dtype=torch.float64)


def _all_assignments(phi: Tensor, alpha: Tensor, ids: np.ndarray) -> float:
    """log of the sum over all K^N assignments, shares integrated out."""
    K, a, total = len(alpha), alpha.numpy(), 0.0
    for z in itertools.product(range(K), repeat=len(ids)):
        n, p = np.zeros(K), 1.0
        for k, v in zip(z, ids):
            p *= float(phi[k, v]) * (n[k] + a[k]) / (n.sum() + a.sum())
            n[k] += 1
        total += p
    return math.log(total)


@dataclass
class Sequences:
    """Documents as sequences, longest first, so that those with an n-th word are the first `active[n]`."""

    words: Tensor
    active: list[int]
    order: Tensor

    @classmethod
    def of(cls, documents: Documents, random: torch.Generator) -> Sequences:
        """Words in random order, which the density does not depend on."""
        seed = int(torch.randint(2**31 - 1, (), generator=random))
        tokens = documents.tokens(np.random.default_rng(seed))
        order = np.argsort([-len(t) for t in tokens], kind="stable")
        words = np.zeros((len(tokens), max((len(t) for t in tokens), default=0)), np.int64)
        for row, d in zip(words, order):
            row[: len(tokens[d])] = tokens[d]
        lengths = np.array([len(tokens[d]) for d in order])
        active = [int((lengths > n).sum()) for n in range(words.shape[1])]
        return cls(torch.from_numpy(words), active, torch.from_numpy(order))

    def back(self, rows: Tensor) -> Tensor:
        """(..., D) in the order of the documents."""
        found = torch.zeros_like(rows)
        found[..., self.order] = rows
        return found


def draw(p: Tensor, random: torch.Generator) -> Tensor:
    """One index for every row of unnormalised probabilities (..., K)."""
    total = p.cumsum(-1)
    u = torch.rand(p.shape[:-1], generator=random, dtype=p.dtype) * total[..., -1]
    return (total <= u.unsqueeze(-1)).sum(-1).clamp_max(p.shape[-1] - 1)


def left_to_right(phi: Tensor, alpha: Tensor, documents: Documents, particles: int, random: torch.Generator) -> Tensor:
    """log of unbiased estimates of p(w_d), (particles, D).

    Every particle goes through the document, draws anew the topics of all words before, and multiplies up the predictive
    probability of the next word; the mean over particles of these products is unbiased (Buntine, ACML 2009).
    """
    table, R, K = phi.T.contiguous(), particles, len(alpha)
    s = Sequences.of(documents, random)
    D = len(documents)
    z = torch.zeros(R, D, s.words.shape[1], dtype=torch.long)
    n = torch.zeros(R, D, K, dtype=phi.dtype)
    log_p = torch.zeros(R, D, dtype=phi.dtype)
    one = torch.ones(R, D, 1, dtype=phi.dtype)
    for i, live in enumerate(s.active):
        for j in range(i):
            old = z[:, :live, j : j + 1]
            n[:, :live].scatter_add_(2, old, -one[:, :live])
            z[:, :live, j] = draw((n[:, :live] + alpha) * table[s.words[:live, j]], random)
            n[:, :live].scatter_add_(2, z[:, :live, j : j + 1], one[:, :live])
        p = (n[:, :live] + alpha) * table[s.words[:live, i]]
        log_p[:, :live] += (p.sum(-1) / (i + alpha.sum())).log()
        z[:, :live, i] = draw(p, random)
        n[:, :live].scatter_add_(2, z[:, :live, i : i + 1], one[:, :live])
    return s.back(log_p)


def annealed(
    phi: Tensor,
    alpha: Tensor,
    documents: Documents,
    chains: int,
    temperatures: int,
    random: torch.Generator,
    reverse: bool = False,
    burn: int = 100,
) -> Tensor:
    """log importance weights (chains, D) of paths between prior and posterior of the topics of all words.

    On: from the prior of z over :math:`p(z)\\prod \\phi_{z_n w_n}^{\\beta}`; the mean weight is unbiased for p(w).  Back:
    from `burn` Gibbs sweeps at beta = 1 to the prior; the mean inverse weight is unbiased for 1 / p(w) as far as the sweeps
    have reached the posterior (Neal 2001; Grosse, Ghahramani and Adams 2015).
    """
    table, K = phi.T.contiguous(), len(alpha)
    s = Sequences.of(documents, random)
    R, D, N = chains, len(documents), s.words.shape[1]
    z = torch.zeros(R, D, N, dtype=torch.long)
    n = torch.zeros(R, D, K, dtype=phi.dtype)
    one = torch.ones(R, D, 1, dtype=phi.dtype)
    logs = table.log()

    def resample(beta: float, first: bool = False) -> None:
        for i, live in enumerate(s.active):
            if not first:
                n[:, :live].scatter_add_(2, z[:, :live, i : i + 1], -one[:, :live])
            p = (n[:, :live] + alpha) * table[s.words[:live, i]] ** beta
            z[:, :live, i] = draw(p, random)
            n[:, :live].scatter_add_(2, z[:, :live, i : i + 1], one[:, :live])

    def fit() -> Tensor:
        total = torch.zeros(R, D, dtype=phi.dtype)
        for i, live in enumerate(s.active):
            total[:, :live] += logs[s.words[:live, i]].expand(R, -1, -1).gather(2, z[:, :live, i : i + 1]).squeeze(2)
        return total

    betas = np.linspace(0.0, 1.0, temperatures + 1) ** 2  # most steps near the prior, where the path turns fastest
    log_w = torch.zeros(R, D, dtype=phi.dtype)
    resample(1.0 if reverse else 0.0, first=True)
    if reverse:
        for _ in range(burn):
            resample(1.0)
        for low, high in zip(betas[-2::-1], betas[:0:-1]):
            log_w += (high - low) * fit()
            if low > 0:
                resample(float(low))
        return s.back(log_w)
    for low, high in itertools.pairwise(betas):
        log_w += (high - low) * fit()
        if high < 1:
            resample(float(high))
    return s.back(log_w)
