"""Exact answers of tiny stories, and how far a method's answer is from them.

>>> from inference import fit, oracles
>>> oracle = oracles.solve(story, x)                      # doctest: +SKIP
>>> print(oracles.verify(fit(story, x, "nuts"), oracle))   # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .modes import Mode
    from .oracle import Oracle, solve
    from .rows import mass
    from .verdict import Verdict, verify, verify_draws

_HOME = {
    "Mode": "modes",
    "mass": "rows",
    "Oracle": "oracle",
    "solve": "oracle",
    "Verdict": "verdict",
    "verify": "verdict",
    "verify_draws": "verdict",
}

__all__ = ["Mode", "Oracle", "Verdict", "mass", "solve", "verify", "verify_draws"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'inference.oracles' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
