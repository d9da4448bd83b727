"""Libraries that are slow to import are imported where they are used, and must not be noticed there."""

import random
from importlib import import_module
from typing import Any


def bring(module: str) -> Any:
    """The module called `module`; Python's random state stays as it was.

    The first import of `rich`, which scikit-learn brings with it, draws from `random` for the ids of its styles: a user's
    seeded stream would go on elsewhere after the first data set.
    """
    state = random.getstate()
    try:
        return import_module(module)
    finally:
        random.setstate(state)
