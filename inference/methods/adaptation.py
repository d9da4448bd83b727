"""What a chain learns while it warms up: a step size, and the scale of every direction.

Step size: dual averaging towards a target acceptance (Hoffman and Gelman 2014, section 3.2.1). Mass: posterior
(co)variances estimated in windows that double, as in Stan (*Stan Reference Manual*, section 15.2).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: Stan's schedule for a thousand iterations: first and last window, and the shortest in between.
FIRST, LAST, SHORTEST = 75, 50, 25


class DualAveraging:
    """Step sizes that bring the mean acceptance to its target."""

    def __init__(self, step: float, target: float) -> None:
        self._target = target
        self._centre = math.log(10.0 * step)
        self._error = self._average = 0.0
        self._count = 0
        self.step = step

    def learn(self, acceptance: float) -> None:
        """Take the acceptance of one trajectory of size `step` into account."""
        self._count += 1
        share = 1.0 / (self._count + 10.0)
        self._error = (1.0 - share) * self._error + share * (self._target - acceptance)
        log_step = self._centre - math.sqrt(self._count) / 0.05 * self._error
        decay = self._count**-0.75
        self._average = decay * log_step + (1.0 - decay) * self._average
        self.step = math.exp(log_step)

    @property
    def numbers(self) -> NDArray:
        """Target, centre, error, average, count and step: enough to go on from."""
        return np.array([self._target, self._centre, self._error, self._average, self._count, self.step])

    @classmethod
    def restored(cls, numbers: NDArray) -> DualAveraging:
        """Where `numbers` were taken."""
        new = cls(1.0, float(numbers[0]))
        _, new._centre, new._error, new._average, count, new.step = numbers.tolist()
        new._count = int(count)
        return new

    @property
    def final(self) -> float:
        """The averaged step size, to draw with."""
        return math.exp(self._average) if self._count else self.step


class Metric:
    """Inverse mass: variances (dim,) or a covariance (dim, dim), with their running estimate."""

    def __init__(self, dim: int, dense: bool) -> None:
        self._dim, self._dense = dim, dense
        self._inverse: NDArray = np.eye(dim) if dense else np.ones(dim)
        self._factor: NDArray = self._inverse
        self._forget()

    def _forget(self) -> None:
        self._count = 0
        self._mean = np.zeros(self._dim)
        self._spread = np.zeros_like(self._inverse)

    @property
    def arrays(self) -> dict[str, NDArray]:
        """Copies of everything but the count of states seen: enough to go on from."""
        found = {"inverse": self._inverse, "factor": self._factor, "mean": self._mean, "spread": self._spread}
        return {name: value.copy() for name, value in found.items()}

    @property
    def seen(self) -> int:
        """States in the running estimate."""
        return self._count

    def restore(self, arrays: dict[str, NDArray], seen: int) -> None:
        """Go back to where `arrays` were taken."""
        self._inverse, self._factor = arrays["inverse"].copy(), arrays["factor"].copy()
        self._mean, self._spread, self._count = arrays["mean"].copy(), arrays["spread"].copy(), seen

    def velocity(self, momentum: NDArray) -> NDArray:
        """Inverse mass times momentum."""
        return self._inverse @ momentum if self._dense else self._inverse * momentum

    def momentum(self, rng: np.random.Generator) -> NDArray:
        """A draw from the normal distribution whose covariance is the mass."""
        normal = normals(rng, self._dim)
        return self._factor @ normal if self._dense else self._factor * normal

    def see(self, position: NDArray) -> None:
        """One more state for the estimate (Welford's recurrence)."""
        self._count += 1
        gap = position - self._mean
        self._mean = self._mean + gap / self._count
        left = position - self._mean
        self._spread += np.outer(gap, left) if self._dense else gap * left

    def renew(self) -> None:
        """Take the estimate, shrunk towards a small multiple of the identity, and begin another."""
        count = self._count
        if count > 1:
            share = count / (count + 5.0)
            floor = 1e-3 * (1.0 - share)
            estimate = share * self._spread / (count - 1)
            self._inverse = estimate + floor * (np.eye(self._dim) if self._dense else 1.0)
            if self._dense:
                lower = np.linalg.cholesky(self._inverse)
                # Laid out as a file gives it back: another layout rounds its products in another way.
                self._factor = np.ascontiguousarray(np.linalg.inv(lower).T)
            else:
                self._factor = 1.0 / np.sqrt(self._inverse)
        self._forget()


def normals(rng: np.random.Generator, count: int) -> NDArray:
    """Standard normal draws from pairs of uniform ones (Box and Muller 1958), in an order that machine code can follow."""
    pairs = rng.random((-(-count // 2), 2))
    radius, angle = np.sqrt(-2.0 * np.log1p(-pairs[:, 0])), 2.0 * math.pi * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()[:count]


def windows(warmup: int) -> tuple[int, list[int]]:
    """Where mass adaptation begins, and after which iterations the mass is renewed.

    Examples
    --------
    >>> windows(1000)
    (75, [100, 150, 250, 450, 950])
    >>> windows(100)
    (15, [90])
    >>> windows(10)
    (0, [])
    """
    if warmup < 20:
        return 0, []
    first, last, size = FIRST, LAST, SHORTEST
    if first + size + last > warmup:
        first, last = int(0.15 * warmup), int(0.1 * warmup)
        size = warmup - first - last
    stop, end, ends = warmup - last, first, []
    while end < stop:
        # A window that leaves no room for the next, twice as long, takes the rest.
        end = end + size if end + 3 * size <= stop else stop
        ends.append(end)
        size *= 2
    return first, ends
