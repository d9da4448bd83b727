r"""Variational Bayes for latent Dirichlet allocation: Dirichlet factors, natural gradients, and the bound they climb.

:math:`q(\phi_k) = \mathrm{Dirichlet}(\lambda_k)`, :math:`q(\theta_d) = \mathrm{Dirichlet}(\gamma_d)`,
:math:`q(z) \propto \exp(E[\log\theta] + E[\log\phi])`.  The natural gradient of the bound in lambda is
:math:`\eta + \sum_d c_{dv} r_{dvk} - \lambda_{kv}`, so that a full step of size one is coordinate ascent and a smaller step
from some documents is stochastic variational inference (Blei, Ng and Jordan 2003; Hoffman, Blei, Wang and Paisley, *Stochastic
variational inference*, JMLR 2013).  The bound, with q(z) at its best,

.. math::
   L = \sum_d \Big[\sum_v c_{dv} \log \sum_k e^{E[\log\theta_{dk}] + E[\log\phi_{kv}]}
       - \mathrm{KL}(q(\theta_d) \,\|\, p)\Big] - \sum_k \mathrm{KL}(q(\phi_k) \,\|\, p),

never falls under full steps, and stays below the log evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from . import cards
from .documents import CELLS, Block, Documents, blocks, in_parts

if TYPE_CHECKING:
    from .form import Admixture

#: Rounds of coordinate ascent within a document, at most, and the mean change of gamma that ends them.
ROUNDS, STILL = 100, 1e-3
#: Rounds within a document in sweeps that start it afresh: half-settled documents leave the topics freer to move.
FEW_ROUNDS = 8
#: Blocks of a corpus on a card, at least: the steps of a stochastic pass.
STEPS = 20
#: Steps of stochastic passes: (t + DELAY) ** -DECAY.
DELAY, DECAY = 16.0, 0.6


def mean_log(concentration: Tensor) -> Tensor:
    """E[log x] under a Dirichlet, over the last dimension."""
    return concentration.digamma() - concentration.sum(-1, keepdim=True).digamma()


@dataclass
class VariationalBayes:
    """q(phi) and q(theta) of one corpus.

    Parameters
    ----------
    documents
        Counts of words.
    alpha, eta
        Concentrations (K,) and (K, V), on the device of the work.
    lam
        Start of lambda, (K, V); None draws Gamma(100, 1 / 100), as scikit-learn does.
    fresh
        Whether every sweep infers the documents from equal shares on, which finds better optima: assignments of the first
        sweeps, kept, would freeze the topics.  Without it no sweep lowers the bound.
    """

    documents: Documents
    alpha: Tensor
    eta: Tensor
    lam: Tensor | None = None
    seed: int = 0
    still: float = STILL
    fresh: bool = True
    gamma: Tensor = field(init=False)
    blocks: list[Block] = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.lam = self.first_lam() if self.lam is None else self.lam
        K, where = len(self.alpha), self.alpha.device
        # as many steps in a stochastic pass as blocks: a small corpus makes some, too
        cells = min(cards.cells_of(where, K, CELLS), max(CELLS, len(self.documents.words) // STEPS))
        self.blocks = blocks(self.documents, self.alpha.dtype, cells, where)
        self.gamma = torch.ones(len(self.documents), K, dtype=self.alpha.dtype, device=where)
        self.steps = 0

    def first_lam(self) -> Tensor:
        """Gamma(100, 1 / 100), drawn on the processor whatever the device."""
        shape = torch.full(self.eta.shape, 100.0, dtype=self.eta.dtype)
        return (torch._standard_gamma(shape, generator=self.random) / 100.0).to(self.alpha.device)

    def visit(self, table: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """gamma of a block given exp(E[log phi]) as (V, K), its places' responsibilities, and its part of the bound."""
        W = table.index_select(0, block.flat).view(*block.words.shape, -1)
        start = self.gamma[block.rows]
        if self.fresh:
            start = self.alpha + block.counts.sum(1, keepdim=True) / len(self.alpha)
        rounds = FEW_ROUNDS if self.fresh else ROUNDS
        gamma, theta, ratio, norm = local_step(W, block.counts, start, self.alpha, self.still, rounds)
        self.gamma[block.rows] = gamma
        return ratio.unsqueeze(2) * theta.unsqueeze(1), W, self.part_of_bound(block, gamma, norm)

    def part_of_bound(self, block: Block, gamma: Tensor, norm: Tensor) -> Tensor:
        """What documents with gamma (B, K) add to the bound, given the normalisers (B, L) of their words, in double."""
        away = kl_divergence(Dirichlet(gamma), Dirichlet(self.alpha.expand_as(gamma)))
        return torch.xlogy(block.counts, norm).sum(dtype=torch.float64) - away.sum(dtype=torch.float64)

    @property
    def mean_logs(self) -> Tensor:
        """Mean of E[log theta] over the documents."""
        return mean_log(self.gamma).mean(0)

    def sweep(self) -> float:
        """One full natural-gradient step of size one; returns the bound before it."""
        assert self.lam is not None
        table = mean_log(self.lam).exp().T.contiguous()
        S = torch.zeros_like(table, dtype=cards.sum_dtype(table))
        bound = torch.zeros((), dtype=torch.float64, device=table.device)
        for block in self.blocks:
            r, _, part = self.visit(table, block)
            block.add(S, r)
            bound += part
        bound -= kl_divergence(Dirichlet(self.lam), Dirichlet(self.eta)).sum(dtype=torch.float64)
        self.lam = self.eta + (S.to(table) * table).T
        return float(bound)

    def stochastic_pass(self) -> None:
        """Steps (t + DELAY) ** -DECAY along the natural gradients of one block each."""
        assert self.lam is not None
        tokens = max(self.documents.num_tokens, 1.0)
        sizes = [float(b.counts.sum()) for b in self.blocks]
        for i in torch.randperm(len(self.blocks), generator=self.random).tolist():
            block = self.blocks[i]
            table = mean_log(self.lam).exp().T.contiguous()
            r, W, _ = self.visit(table, block)
            rho, share = (self.steps + DELAY) ** -DECAY, sizes[i] / tokens
            self.lam = self.lam * (1 - rho) + rho * self.eta
            if share:
                block.add(self.lam.T, r * W * (rho / share))
            self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered between two sweeps."""
        assert self.lam is not None
        return {"lam": self.lam, "gamma": self.gamma, "alpha": self.alpha, "eta": self.eta}

    def go_on(self, tensors: dict[str, Tensor], steps: int, fresh: bool) -> None:
        """Stand where another run stood."""
        where = self.alpha.device
        for name, value in tensors.items():
            setattr(self, name, value.to(where))
        self.steps, self.fresh = steps, fresh

    def widen(self) -> None:
        """Go on in double precision."""
        assert self.lam is not None
        self.alpha, self.eta, self.lam, self.gamma = (x.double() for x in (self.alpha, self.eta, self.lam, self.gamma))
        self.blocks = [b.to(torch.float64) for b in self.blocks]

    def bound(self) -> float:
        """The bound at the present lambda, documents at their best."""
        lam, fresh, self.fresh = self.lam, self.fresh, False
        value = self.sweep()
        self.lam, self.fresh = lam, fresh
        return value


def local_step(
    W: Tensor, counts: Tensor, gamma: Tensor, alpha: Tensor, still: float = STILL, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinate ascent on q(theta) given W (B, L, K).

    Returns
    -------
    gamma (B, K), exp(E[log theta]) (B, K), counts over normalisers (B, L), and normalisers (B, L); the last three belong to
    the gamma that is returned.
    """
    tiny = torch.finfo(W.dtype).tiny
    gamma = gamma.clone()
    active, some, c, g = torch.arange(len(gamma), device=gamma.device), W, counts, gamma
    for i in range(rounds):
        theta = mean_log(g).exp()
        ratio = c / ((some @ theta.unsqueeze(2)).squeeze(2) + tiny)
        new = alpha + theta * (ratio.unsqueeze(1) @ some).squeeze(1)
        moving = (new - g).abs().mean(1) >= still
        g = new
        left = int(moving.sum())
        if not left:
            break
        if i % 2 and left < 0.8 * len(g):  # go on with the documents that still move
            gamma[active] = g
            active, some, c, g = active[moving], some[moving], c[moving], g[moving]
    gamma[active] = g
    theta = mean_log(gamma).exp()
    norm = (W @ theta.unsqueeze(2)).squeeze(2) + tiny
    return gamma, theta, counts / norm, norm


def shares_given(table: Tensor, alpha: Tensor, documents: Documents, still: float = 1e-4) -> Tensor:
    """Concentrations of q(theta) (D, K) for documents, given `table` (V, K): phi itself or exp(E[log phi])."""
    gamma = torch.ones(len(documents), len(alpha), dtype=alpha.dtype)
    for first, part in in_parts(documents):
        for block in blocks(part, alpha.dtype):
            W = table.index_select(0, block.flat).view(*block.words.shape, -1)
            start = alpha + block.counts.sum(1, keepdim=True) / len(alpha)
            gamma[first + block.rows] = local_step(W, block.counts, start, alpha, still)[0]
    return gamma


def improve_concentrations(run: VariationalBayes, form: Admixture, steps: int, burn: int = 5) -> None:
    """The concentrations under which the bound is highest, where the story learns them and the first steps are over."""
    if steps < burn:
        return
    if form.alpha_param is not None:
        run.alpha = dirichlet_maximum(run.alpha, run.mean_logs)
    if form.eta_param is not None and run.lam is not None:
        V, total = run.eta.shape[1], float(mean_log(run.lam).mean(0).sum())

        def loss(log_eta: float) -> float:
            e = math.exp(log_eta)
            return -(math.lgamma(V * e) - V * math.lgamma(e) + (e - 1) * total)

        best = minimize_scalar(loss, bounds=(math.log(1e-4), math.log(20.0)), method="bounded")
        run.eta = torch.full_like(run.eta, math.exp(best.x))


def dirichlet_maximum(alpha: Tensor, mean_logs: Tensor, rounds: int = 20) -> Tensor:
    """The Dirichlet whose mean logarithms are these, by Newton steps in linear time (Blei et al. 2003, appendix A.2)."""
    for _ in range(rounds):
        total = alpha.sum()
        g = total.digamma() - alpha.digamma() + mean_logs
        h, z = -torch.polygamma(1, alpha), torch.polygamma(1, total)
        step = (g - (g / h).sum() / (1 / z + (1 / h).sum())) / h
        new = torch.where(alpha - step > 0, alpha - step, alpha / 2)
        if float(((new - alpha).abs() / alpha).max()) < 1e-8:
            return new
        alpha = new.clamp(1e-4, 50.0)
    return alpha
