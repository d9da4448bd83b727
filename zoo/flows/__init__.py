"""Normalizing flows: simple noise, bent by invertible maps until it looks like the data.  Densities are exact.

A transform maps (..., *event) and says log |det| of its Jacobian; nothing is ever cached.  A story is a density over rows with
no latent: its networks are learned by maximum likelihood.  They learn a thousand rows by heart, if they are let, so that
training should stop by rows that are held out.
"""

from importlib import import_module
from typing import Any

_LAZY = {
    "Chain": ".base",
    "FlowDistribution": ".base",
    "Inverse": ".base",
    "Transform": ".base",
    "Glow": ".glow",
    "IAF": ".autoregressive",
    "MAF": ".autoregressive",
    "NICE": ".coupling",
    "NeuralSplineFlow": ".spline",
    "PlanarFlow": ".planar",
    "RealNVP": ".coupling",
    "draw_layers": ".pictures",
}

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "Chain",
    "FlowDistribution",
    "Glow",
    "Inverse",
    "NeuralSplineFlow",
    "PlanarFlow",
    "RealNVP",
    "Transform",
    "draw_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
