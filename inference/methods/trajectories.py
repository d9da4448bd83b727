"""How long chains that move together go: the scale of every direction, and the trajectory length that pays best.

Hoffman, Radul and Sountsov, *An adaptive MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo* (AISTATS 2021).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: States over all chains and windows for every direction, from which on covariances are learned.
PLENTY = 5
#: Steps of the logarithm of the trajectory length, and the memory of its slope and of the mean that draws are made with.
RATE, SLOPES, MEMORY = 0.05, 0.9, 0.97


class Scale:
    """Inverse mass L L^T: variances, or covariances where there are enough states for them.

    Parameters
    ----------
    inverse
        (dim,) or (dim, dim).
    """

    def __init__(self, inverse: NDArray) -> None:
        self.inverse = inverse
        self.dense = inverse.ndim == 2
        self.root = np.linalg.cholesky(inverse) if self.dense else np.sqrt(inverse)
        self._solved = np.linalg.inv(self.root) if self.dense else 1.0 / self.root

    def momentum(self, normal: NDArray) -> NDArray:
        """Momenta (chains, dim) from standard normal numbers."""
        return normal @ self._solved if self.dense else normal * self._solved

    def velocity(self, momentum: NDArray) -> NDArray:
        """L^T p: the velocity in units in which every direction has variance 1."""
        return momentum @ self.root if self.dense else momentum * self.root

    def unit(self, position: NDArray) -> NDArray:
        """L^-1 q: the position in these units."""
        return position @ self._solved.T if self.dense else position * self._solved


def van_der_corput(number: int) -> float:
    """The number's binary digits mirrored at the point: evenly spread over (0, 1) from the first on."""
    value, weight = 0.0, 0.5
    while number:
        value += weight * (number & 1)
        number >>= 1
        weight *= 0.5
    return value


def criterion(start: NDArray, end: NDArray, momentum: NDArray, accept: NDArray, scale: Scale) -> tuple[float, float]:
    """Expected squared change of the squared distance from the mean, in units of the scales, and its slope in time.

    A quarter of the former is the criterion (2021, equation 7); the slope is that of the criterion (equation 8).
    """
    usable = (accept > 1e-6) & np.isfinite(end).all(1) & np.isfinite(momentum).all(1)
    if not usable.any():
        return 0.0, 0.0
    weight = accept[usable] / accept[usable].sum()
    before, after, velocity = scale.unit(start[usable]), scale.unit(end[usable]), scale.velocity(momentum[usable])
    before = before - before.mean(0)
    after = after - weight @ after
    change = (after**2).sum(1) - (before**2).sum(1)
    return float(weight @ change**2), float(weight @ (change * (after * velocity).sum(1)))


class Climb:
    """Ascent on the logarithm of the trajectory length, towards the largest criterion for a gradient."""

    def __init__(self, length: float) -> None:
        self._log = self._mean = float(np.log(length))
        self._square = self._slope = self._cost = 0.0
        self._count = 0

    @property
    def numbers(self) -> NDArray:
        """Enough to go on from."""
        return np.array([self._log, self._mean, self._square, self._slope, self._cost, self._count])

    @classmethod
    def restored(cls, numbers: NDArray) -> Climb:
        """Where `numbers` were taken."""
        new = cls(1.0)
        new._log, new._mean, new._square, new._slope, new._cost, count = numbers.tolist()
        new._count = int(count)
        return new

    @property
    def length(self) -> float:
        """To go next."""
        return float(np.exp(self._log))

    @property
    def mean(self) -> float:
        """Geometric running mean."""
        return float(np.exp(self._mean))

    def learn(self, square: float, slope: float, time: float, step: float, longest: float) -> None:
        """One step along d log(criterion / cost) / d log(length); an iteration costs its steps and one more."""
        if not (np.isfinite(square) and np.isfinite(slope)):
            return
        self._count += 1
        self._square = SLOPES * self._square + (1 - SLOPES) * square / 4
        self._slope = SLOPES * self._slope + (1 - SLOPES) * slope * time
        self._cost = SLOPES * self._cost + (1 - SLOPES) * time / (time + step)
        cost = self._cost / (1 - SLOPES**self._count)
        gain = self._slope / max(self._square, 1e-300) - cost
        self._log = float(np.clip(self._log + RATE * np.clip(gain, -1, 1), np.log(step), np.log(longest)))
        share = max(1 - MEMORY, 1.0 / self._count)
        self._mean += share * (self._log - self._mean)


class Within:
    """Covariance of all directions within chains: chains in different modes do not widen it."""

    def __init__(self, chains: int, dim: int) -> None:
        self.states: list[NDArray] = []
        self._dim = dim

    def see(self, position: NDArray) -> None:
        """One more state of every chain."""
        self.states.append(position)

    def inverse(self) -> NDArray:
        """Variances (dim,), or covariances (dim, dim) where states are plenty; shrunk towards small variances."""
        states = np.stack(self.states, 1)  # (chains, states, dim)
        gap = (states - states.mean(1, keepdims=True)).reshape(-1, self._dim)
        count = max(1, len(gap) - len(states))
        share = count / (count + 5.0)
        floor = 1e-3 * (1.0 - share)
        variance = share * (gap**2).sum(0) / count + floor
        if count < PLENTY * self._dim:
            return variance
        return share * gap.T @ gap / count + floor * np.eye(self._dim)
