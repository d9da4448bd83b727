"""Density by counting and by independence: where generative modelling starts."""

from importlib import import_module
from typing import Any

_STORIES = {"Box": ".box", "CellTable": ".cells", "NaiveBayes": ".naive_bayes"}


def __getattr__(name: str) -> Any:
    if name in _STORIES:
        return getattr(import_module(_STORIES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
