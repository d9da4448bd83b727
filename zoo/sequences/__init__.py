"""Sequences: what is seen now depends on a state that depends on the one before."""

from importlib import import_module
from typing import Any

from torch import Tensor

_STORIES = {"GaussianHMM": ".gaussian_hmm", "CategoricalHMM": ".categorical_hmm"}


def __getattr__(name: str) -> Any:
    if name in _STORIES:
        return getattr(import_module(_STORIES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_lengths(lengths: Tensor | None, N: int, T: int) -> None:
    """One whole number from 1 to T for every sequence.

    Raises
    ------
    ValueError
        Another number of lengths than sequences, or a length outside 1..T.
    """
    if lengths is None:
        return
    if tuple(lengths.shape) != (N,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected one a sequence: ({N},)")
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or high > T:
        raise ValueError(f"lengths run from {low} to {high}; they must lie in 1..{T}, the steps of x")
