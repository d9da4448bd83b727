"""Gaussian walks of many words at once: tridiagonal systems side by side, and Newton steps with them as preconditioner."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compiled import NotCompiled, sampler
from .form import Walk
from .words import address

#: Newton steps in one M-step (one where there are so many numbers), rounds of conjugate gradients in one of them, and how far a
#: word's weight may move in one.
NEWTON, LARGE, ROUNDS, FAR = 2, 5_000_000, 6, 1.5
#: Bounds of a learned sigma.
LEAST, MOST = 0.01, 3.0


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Newton steps in machine code; None where there is no C compiler."""
    try:
        return sampler("walks")
    except NotCompiled:
        return None


@dataclass
class Chains:
    """Tridiagonal systems side by side, eliminated forwards: `pivot` (T, N) and the constant off-diagonal."""

    pivot: Tensor
    off: Tensor

    @classmethod
    def of(cls, diagonal: Tensor, off: Tensor) -> Chains:
        """LDL^T of symmetric tridiagonal matrices with diagonals (T, N) and off-diagonal (N,) or one number."""
        pivot = diagonal.clone()
        for t in range(1, len(pivot)):
            pivot[t].sub_(off * off / pivot[t - 1])
        return cls(pivot, off)

    def solve(self, b: Tensor) -> Tensor:
        """x with A x = b, (T, N)."""
        y = b.clone()
        for t in range(1, len(y)):
            y[t].sub_(self.off / self.pivot[t - 1] * y[t - 1])
        y.div_(self.pivot)
        for t in range(len(y) - 2, -1, -1):
            y[t].sub_(self.off / self.pivot[t] * y[t + 1])
        return y

    def spreads(self) -> tuple[Tensor, Tensor]:
        """Variances (T, N), and covariances of neighbours (T - 1, N), under the precision A."""
        variance, between = 1 / self.pivot, torch.zeros_like(self.pivot[1:])
        for t in range(len(variance) - 2, -1, -1):
            g = self.off / self.pivot[t]
            between[t] = -g * variance[t + 1]
            variance[t] += g * g * variance[t + 1]
        return variance, between

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw with precision A around zero, (T, N)."""
        noise = torch.empty_like(self.pivot).normal_(generator=generator)
        x = noise / self.pivot.sqrt()
        for t in range(len(x) - 2, -1, -1):
            x[t].sub_(self.off / self.pivot[t] * x[t + 1])
        return x


@dataclass
class Walks:
    """Modes of the walks and what they depend on.

    Attributes
    ----------
    beta
        (T, K, V).
    base
        m, (V,).
    first, step
        s and sigma.
    """

    beta: Tensor
    base: Tensor
    first: float
    step: float
    totals: Tensor = field(init=False)  # words of topics in slices (T, K, 1), at the last Newton step

    def pull(self, x: Tensor) -> Tensor:
        """The walk's precision times x (T, K, V)."""
        found, move = torch.zeros_like(x), (x[1:] - x[:-1]) / self.step**2
        found[1:] += move
        found[:-1] -= move
        found[0] += x[0] / self.first**2
        return found

    def chains(self, counts: Tensor) -> Chains:
        """The tridiagonal part of the negative Hessian where `counts` (T, K, V) are n pi."""
        T = len(self.beta)
        diagonal = counts.reshape(T, -1).clone()
        if T > 1:
            diagonal += 2 / self.step**2
            diagonal[0] -= 1 / self.step**2
            diagonal[-1] -= 1 / self.step**2
        diagonal[0] += 1 / self.first**2
        return Chains.of(diagonal, diagonal.new_tensor(-1 / self.step**2))

    def objective(self, S: Tensor) -> float:
        """The log posterior of the walks given the counts, without constants."""
        n = S.sum(2)
        value = (S * self.beta).sum() - (n * self.beta.logsumexp(2)).sum()
        start, move = self.beta[0] - self.base, self.beta[1:] - self.beta[:-1]
        return float(value - 0.5 * start.square().sum() / self.first**2 - 0.5 * move.square().sum() / self.step**2)

    def curvature(self) -> Chains:
        """The chains at the present point."""
        return self.chains(self.beta.softmax(2) * self.totals)

    def newton(self, S: Tensor, steps: int = 0, rounds: int = ROUNDS) -> None:
        """Newton steps towards the mode, topics side by side; in machine code where there is a compiler."""
        steps = steps or (1 if S.numel() > LARGE else NEWTON)
        n, shape = S.sum(2, keepdim=True), S.shape
        self.totals = n
        built = library() if S.dtype == torch.float32 else None
        for _ in range(steps):
            pi = self.beta.softmax(2)
            if built is not None:
                self.move(built, S, pi, n, rounds)
                continue
            counts = pi * n
            offset = torch.zeros_like(self.beta)
            offset[0] = self.base / self.first**2
            residual = S - counts - self.pull(self.beta) + offset
            chains = self.chains(counts)

            def hessian(x: Tensor, pi: Tensor = pi, counts: Tensor = counts) -> Tensor:
                return self.pull(x) + counts * x - counts * (pi * x).sum(2, keepdim=True)

            move = conjugate(hessian, lambda r, c=chains: c.solve(r.reshape(len(r), -1)).view(shape), residual, rounds)
            self.beta = self.beta + move.clamp(-FAR, FAR)

    def move(self, built: ctypes.CDLL, S: Tensor, pi: Tensor, n: Tensor, rounds: int) -> None:
        """One Newton step by `native/walks.c`, a topic a thread."""
        self.beta, S, pi = (x.contiguous() for x in (self.beta, S, pi))
        T, K, V = S.shape
        counts, base = n[:, :, 0].T.contiguous(), self.base.to(S.dtype).contiguous()

        def of(k: int) -> None:
            work = torch.empty(6 * T * V + 2 * T, dtype=S.dtype)
            built.newton_step(
                ctypes.c_int64(T), ctypes.c_int64(V), ctypes.c_int64(K * V), address(self.beta[:, k]), address(S[:, k]),
                address(pi[:, k]), address(counts[k]), address(base), ctypes.c_float(1 / self.first**2),
                ctypes.c_float(1 / self.step**2), ctypes.c_int64(rounds), ctypes.c_float(FAR), address(work),
            )  # fmt: skip

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(of, range(K)))

    def learn_step(self) -> None:
        """sigma from the expected squared moves under the Gaussian Markov guide."""
        if len(self.beta) < 2:
            return
        variance, between = self.curvature().spreads()
        move = (self.beta[1:] - self.beta[:-1]).reshape(len(between), -1)
        square = (move.square() + variance[1:] + variance[:-1] - 2 * between).mean()
        self.step = min(max(float(square) ** 0.5, LEAST), MOST)

    def learn_base(self, walk: Walk) -> None:
        """m from the first slices of all topics and its own prior."""
        if walk.base is None:
            return
        mine, prior = len(self.beta[0]) / self.first**2, walk.base_scale.to(self.base).square().reciprocal()
        loc = walk.base_loc.to(self.base)
        self.base = (self.beta[0].sum(0) / self.first**2 + prior * loc) / (mine + prior)


def conjugate(hessian: Callable, precondition: Callable, b: Tensor, rounds: int) -> Tensor:
    """Preconditioned conjugate gradients for one system a topic: (T, K, V)."""

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum((0, 2)).view(1, -1, 1)

    tiny = torch.finfo(b.dtype).tiny
    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz = z, dot(r, z)
    for i in range(rounds):
        Hp = hessian(p)
        a = rz / dot(p, Hp).clamp_min(tiny)
        x = x + a * p
        r = r - a * Hp
        if i == rounds - 1:
            break
        z = precondition(r)
        new = dot(r, z)
        p, rz = z + new / rz.clamp_min(tiny) * p, new
    return x
