"""Topic models: engines on sparse counts, evaluation, and ways to look at topics.

Reached through `fit(story, corpus)`; what is special to topics is asked here: `perplexity`, `top_words`, `coherence`.
"""

import sys
import types
from importlib import import_module
from typing import Any

_LAZY = {
    "Perplexity": ".perplexity",
    "coherence": ".quality",
    "diversity": ".quality",
    "forecast": ".dynamic",
    "forecast_concentration": ".dynamic",
    "match_topics": ".quality",
    "perplexity": ".perplexity",
    "plot_streams": ".plots",
    "plot_top_words": ".plots",
    "plot_topic_map": ".plots",
    "plot_topic_share": ".plots",
    "shares": ".answers",
    "top_words": ".quality",
    "topic_share": ".quality",
    "word_paths": ".quality",
}

__all__ = sorted(_LAZY)


class _Package(types.ModuleType):
    """Importing the submodule `perplexity` must not hide the function `perplexity`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_LAZY[name], __name__), name)
