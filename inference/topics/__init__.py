"""Topic models: engines on sparse counts, evaluation, and ways to look at topics.

Reached through `fit(story, corpus)`; what is special to topics is asked here: `perplexity`, `top_words`, `coherence`.
"""

from importlib import import_module
from typing import Any

_LAZY = {"forecast": ".dynamic", "Perplexity": ".perplexity", "perplexity": ".perplexity", "shares": ".answers"}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    # Not kept: a submodule may have the name of the function in it.
    return getattr(import_module(_LAZY[name], __name__), name)
