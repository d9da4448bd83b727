"""Answer any generative story told as a Pyro program: by EM, SVI or NUTS, with the reason why that is valid.

>>> from inference import compare, fit
>>> posterior = fit(story, x)          # doctest: +SKIP
>>> print(posterior.why())             # doctest: +SKIP
"""

import importlib
import importlib.metadata
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import oracles
    from .calibration import Calibration, check
    from .checkpoint import CheckpointError, load
    from .choose import Choice, NoMethodError, choose
    from .compare import Comparison, compare
    from .crosscheck import CrossCheck
    from .data import DataNotice
    from .errors import DivergenceError, RankError
    from .fit import fit
    from .methods import EM, HMC, NUTS, SVI, Amortised, Exact, Gibbs, Verdict
    from .plates import draw_plates, draw_sheet
    from .plates_export import to_graphviz, to_mermaid
    from .posterior import Posterior
    from .simulate import simulate
    from .story_math import story_density, story_latex, story_mathml
    from .story_text import story_lines, story_text
    from .structure import Site, Structure, inspect

_HOME = {
    "Amortised": "methods",
    "Calibration": "calibration",
    "check": "calibration",
    "CheckpointError": "checkpoint",
    "load": "checkpoint",
    "Choice": "choose",
    "NoMethodError": "choose",
    "choose": "choose",
    "Comparison": "compare",
    "compare": "compare",
    "CrossCheck": "crosscheck",
    "DataNotice": "data",
    "DivergenceError": "errors",
    "RankError": "errors",
    "fit": "fit",
    "EM": "methods",
    "Exact": "methods",
    "HMC": "methods",
    "Gibbs": "methods",
    "NUTS": "methods",
    "SVI": "methods",
    "Verdict": "methods",
    "draw_plates": "plates",
    "draw_sheet": "plates",
    "to_graphviz": "plates_export",
    "to_mermaid": "plates_export",
    "Posterior": "posterior",
    "simulate": "simulate",
    "story_density": "story_math",
    "story_latex": "story_math",
    "story_mathml": "story_math",
    "story_lines": "story_text",
    "story_text": "story_text",
    "Site": "structure",
    "Structure": "structure",
    "inspect": "structure",
}

__all__ = [
    "EM",
    "HMC",
    "NUTS",
    "SVI",
    "Amortised",
    "Calibration",
    "CheckpointError",
    "Choice",
    "Comparison",
    "CrossCheck",
    "DataNotice",
    "DivergenceError",
    "Exact",
    "Gibbs",
    "NoMethodError",
    "Posterior",
    "RankError",
    "Site",
    "Structure",
    "Verdict",
    "check",
    "choose",
    "compare",
    "draw_plates",
    "draw_sheet",
    "fit",
    "inspect",
    "load",
    "oracles",
    "simulate",
    "story_density",
    "story_latex",
    "story_lines",
    "story_mathml",
    "story_text",
    "to_graphviz",
    "to_mermaid",
]


class _Package(types.ModuleType):
    """Importing the submodule `inference.fit` must not hide the function `inference.fit`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Public names load their module on first use: `import inference` costs nothing."""
    if name == "oracles":
        return importlib.import_module(".oracles", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'inference' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_of_namesake() -> None:
    """PyPI has an unrelated distribution called `inference` that installs a package of the same import name."""
    try:
        other = importlib.metadata.version("inference")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the unrelated distribution 'inference' {other} is installed and shares this package's import name; one has "
        f"overwritten files of the other. Run: pip uninstall inference, then pip install --force-reinstall pyro-model-zoo",
        stacklevel=3,
    )


_warn_of_namesake()
