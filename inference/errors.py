"""Errors that carry what was known when things went wrong."""

from collections.abc import Mapping
from typing import Any


class DivergenceError(RuntimeError):
    """A run left the finite numbers.

    Attributes
    ----------
    state
        Site or parameter name -> last finite value, in the processor's memory.
    step
        Iteration at which it happened, or None.
    site
        Site or parameter where it was first seen, or None where that is unknown.
    """

    def __init__(
        self, message: str, *, state: Mapping[str, Any] | None = None, step: int | None = None, site: str | None = None
    ) -> None:
        super().__init__(message)
        self.state = {n: v.detach().cpu() if hasattr(v, "detach") else v for n, v in (state or {}).items()}
        self.step = step
        self.site = site


class RankError(RuntimeError):
    """One of several processes that worked on one fit has ended or fallen silent.

    Attributes
    ----------
    rank, size
        Number of the process that noticed, and how many there were.
    """

    def __init__(self, message: str, *, rank: int = 0, size: int = 1) -> None:
        super().__init__(message)
        self.rank = rank
        self.size = size
