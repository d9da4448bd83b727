"""Inference methods, in order of what they promise."""

import difflib
from typing import Any

from .base import Method, Verdict
from .em import EM
from .encoders import Amortised
from .exact import Exact
from .gibbs import Gibbs
from .hmc import HMC
from .nuts import NUTS
from .svi import SVI

#: Names that `fit(..., method=...)` takes, strongest promise about the latents first.
METHODS: dict[str, Method] = {
    "exact": Exact(),
    "em": EM(),
    "gibbs": Gibbs(),
    "nuts": NUTS(),
    "hmc": HMC(),
    "svi": SVI(),
}


def resolve(method: Any) -> Method:
    """A configured method from a name or an instance.

    Raises
    ------
    ValueError
        An unknown name; the message lists the names and the closest.
    TypeError
        Neither a name nor an object with `check` and `run`.
    """
    if isinstance(method, str):
        if method.lower() in METHODS:
            return METHODS[method.lower()]
        close = difflib.get_close_matches(method.lower(), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method={method!r} is unknown; use 'auto', {', '.join(map(repr, METHODS))}{hint}")
    if isinstance(method, type):
        raise TypeError(f"method={method.__name__} is a class; pass an instance: {method.__name__}()")
    if not isinstance(method, Method):
        raise TypeError(f"method must be a name or have `name`, `check` and `run`; got {type(method).__name__}")
    return method


__all__ = ["EM", "HMC", "METHODS", "NUTS", "SVI", "Amortised", "Exact", "Gibbs", "Method", "Verdict", "resolve"]
