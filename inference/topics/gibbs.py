r"""Partially collapsed Gibbs sampling of latent Dirichlet allocation: exact, and vectorised over documents and chains.

Shares are integrated out; given the topics, documents are independent, so that the n-th words of all documents of all
chains are drawn at once from :math:`p(z_{dn} = k) \propto (n_{dk}^{-dn} + \alpha_k)\,\phi_{k w_{dn}}`; then the topics
given all assignments, :math:`\phi_k \sim \mathrm{Dirichlet}(N_k + \eta)` (Magnusson, Jonsson, Villani and Broman, *Sparse
partially collapsed MCMC for parallel inference in topic models*, JCGS 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .documents import Documents
from .perplexity import Sequences, draw


class Chains:
    """Chains of one corpus.

    Parameters
    ----------
    documents
        Counts of words.
    alpha, eta
        Concentrations (K,) and (K, V).
    num_chains
        How many run side by side.
    """

    def __init__(self, documents: Documents, alpha: Tensor, eta: Tensor, num_chains: int, seed: int) -> None:
        self.alpha, self.eta = alpha, eta
        self.random = torch.Generator().manual_seed(seed)
        self.seq = Sequences.of(documents, self.random)
        C, (D, N), (K, V) = num_chains, self.seq.words.shape, eta.shape
        self.z = torch.zeros(C, D, N, dtype=torch.long)
        self.n = torch.zeros(C, D, K, dtype=alpha.dtype)
        self.inside = torch.arange(N) < torch.tensor([sum(a > d for a in self.seq.active) for d in range(D)])[:, None]
        self.one = torch.ones(C, D, 1, dtype=alpha.dtype)
        self.phi = self.dirichlet(eta.expand(C, K, V) + 1.0)
        self.pass_over(first=True)

    def dirichlet(self, concentration: Tensor) -> Tensor:
        """A draw for each of many concentrations, none of its entries zero."""
        gamma = torch._standard_gamma(concentration, generator=self.random).clamp_min(1e-300)
        return gamma / gamma.sum(-1, keepdim=True)

    def pass_over(self, first: bool = False) -> None:
        """Draw the topic of every word, then the topics."""
        C = len(self.z)
        chain = torch.arange(C)[:, None]
        table = self.phi.transpose(1, 2)
        for i, live in enumerate(self.seq.active):
            n, place = self.n[:, :live], self.z[:, :live, i : i + 1]
            if not first:
                n.scatter_add_(2, place, -self.one[:, :live])
            p = (n + self.alpha) * table[chain, self.seq.words[:live, i]]
            self.z[:, :live, i] = draw(p, self.random)
            n.scatter_add_(2, self.z[:, :live, i : i + 1], self.one[:, :live])
        K, V = self.eta.shape
        words = self.seq.words[self.inside]
        z = self.z[:, self.inside]
        flat = z * V + words
        counts = torch.zeros(C, K * V, dtype=self.alpha.dtype).scatter_add_(
            1, flat, torch.ones_like(flat, dtype=self.alpha.dtype)
        )
        self.phi = self.dirichlet(counts.view(C, K, V) + self.eta)

    def theta(self) -> Tensor:
        """Shares given the assignments, (C, D, K), in the order of the documents."""
        theta = self.dirichlet(self.n + self.alpha)
        found = torch.zeros_like(theta)
        found[:, self.seq.order] = theta
        return found


def sample(
    documents: Documents,
    alpha: Tensor,
    eta: Tensor,
    *,
    chains: int,
    warmup: int,
    draws: int,
    thin: int,
    seed: int,
    tick: Callable[[int], Any] = lambda i: None,
    over: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor, bool]:
    """Draws of phi (chains, S, K, V) and theta (chains, S, D, K), topics in one order, and whether time ran out."""
    run = Chains(documents, alpha, eta, chains, seed)
    phis, thetas, late = [], [], False
    for i in range(warmup + draws * thin):
        run.pass_over()
        tick(i)
        if i >= warmup and (i - warmup) % thin == thin - 1:
            phis.append(run.phi.clone())
            thetas.append(run.theta())
        if over():
            late = True
            if not phis:
                phis, thetas = [run.phi.clone()], [run.theta()]
            break
    phi, theta = torch.stack(phis, 1), torch.stack(thetas, 1)
    return *in_one_order(phi, theta), late


def in_one_order(phi: Tensor, theta: Tensor, rounds: int = 3) -> tuple[Tensor, Tensor]:
    """Topics numbered alike in all draws (Stephens 2000, with a squared loss against the running mean)."""
    C, S, K, V = phi.shape
    flat, shares = phi.reshape(C * S, K, V).clone(), theta.reshape(C * S, *theta.shape[2:]).clone()
    centre = flat[-1].clone()
    for _ in range(rounds):
        for i in range(len(flat)):
            cost = -(centre @ flat[i].T).numpy() + 0.5 * flat[i].square().sum(1).numpy()[None]
            order = torch.from_numpy(np.ascontiguousarray(linear_sum_assignment(cost)[1]))
            flat[i], shares[i] = flat[i][order], shares[i][:, order]
        centre = flat.mean(0)
    return flat.view(C, S, K, V), shares.view(C, S, *theta.shape[2:])
