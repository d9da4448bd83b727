"""Deep latent variables: networks between what is hidden and what is seen.  Below is what the stories share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_LAZY = {
    "Autoencoder": ".autoencoder",
    "Bernoulli": ".likelihoods",
    "Binomial": ".likelihoods",
    "Categorical": ".likelihoods",
    "Columns": ".likelihoods",
    "ConvDecoder": ".nets",
    "ConvEncoder": ".nets",
    "DeepLatentGaussian": ".deep_latent_gaussian",
    "DiscretisedLogistic": ".likelihoods",
    "Likelihood": ".likelihoods",
    "LinearVAE": ".linear_vae",
    "MLP": ".nets",
    "NegativeBinomial": ".likelihoods",
    "Normal": ".likelihoods",
    "Poisson": ".likelihoods",
    "StudentT": ".likelihoods",
    "VAE": ".vae",
    "columns": ".likelihoods",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def widths(name: str, given: int | Sequence[int], least: int = 0) -> tuple[int, ...]:
    """Widths of layers as plain whole numbers; one number is one layer.

    Raises
    ------
    ValueError
        Fewer than `least` layers, or a width that is no whole number from 1.
    """
    from ..mixtures import count_setting

    many = tuple(given) if isinstance(given, Sequence) else (given,)
    if len(many) < least:
        raise ValueError(f"{name} must hold {least} widths or more, got {given!r}")
    return tuple(count_setting(name, width) for width in many)


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose first weights depend on `seed` alone; the caller's random state stays."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # cards have streams of their own
        return make()
