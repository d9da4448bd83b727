"""Generative stories as Pyro programs: each one file to read, each ready for any inference.

>>> from zoo import GMM, load
>>> GMM(num_components=3).model(load("iris").x).shape
torch.Size([150, 4])
"""

from importlib import import_module
from typing import Any

# Not lazy, and cheap: the submodule of this name would otherwise hide the function once somebody imports it.
from .catalog import catalog, examples

__version__ = "0.1.0"

_LAZY = {
    "Autoencoder": ".deep.autoencoder",
    "BernoulliMixture": ".mixtures.bernoulli",
    "Box": ".basics.box",
    "CategoricalHMM": ".sequences.categorical_hmm",
    "CategoricalMixture": ".mixtures.categorical",
    "CellTable": ".basics.cells",
    "ConjugateGMM": ".mixtures.niw",
    "DTM": ".topics.dtm",
    "DeepLatentGaussian": ".deep.deep_latent_gaussian",
    "FactorAnalysis": ".factors.fa",
    "GMM": ".mixtures.gmm",
    "GaussianHMM": ".sequences.gaussian_hmm",
    "KMeans": ".mixtures.kmeans",
    "LDA": ".topics.lda",
    "LinearVAE": ".deep.linear_vae",
    "MixedMixture": ".mixtures.mixed",
    "MixtureOfFactorAnalysers": ".factors.mfa",
    "MultinomialMixture": ".mixtures.multinomial",
    "NaiveBayes": ".basics.naive_bayes",
    "PPCA": ".factors.ppca",
    "PoissonMixture": ".mixtures.poisson",
    "TokenLDA": ".topics.tokens",
    "IAF": ".flows.autoregressive",
    "MAF": ".flows.autoregressive",
    "NICE": ".flows.coupling",
    "NeuralSplineFlow": ".flows.spline",
    "PlanarFlow": ".flows.planar",
    "RealNVP": ".flows.coupling",
    "Glow": ".flows.glow",
    "VAE": ".deep.vae",
    "Corpus": ".data",
    "Dataset": ".data",
    "fetch_corpus": ".data",
    "from_texts": ".data",
    "load_corpus": ".data",
    "open_corpus": ".data",
    "open_table": ".data",
    "read_corpus": ".data",
    "store_corpus": ".data",
    "datasets": ".data",
    "load": ".data",
    "read": ".data",
}

__all__ = [
    "DTM",
    "GMM",
    "IAF",
    "LDA",
    "MAF",
    "NICE",
    "PPCA",
    "VAE",
    "Autoencoder",
    "BernoulliMixture",
    "Box",
    "CategoricalHMM",
    "CategoricalMixture",
    "CellTable",
    "ConjugateGMM",
    "Corpus",
    "Dataset",
    "DeepLatentGaussian",
    "FactorAnalysis",
    "GaussianHMM",
    "Glow",
    "KMeans",
    "LinearVAE",
    "MixedMixture",
    "MixtureOfFactorAnalysers",
    "MultinomialMixture",
    "NaiveBayes",
    "NeuralSplineFlow",
    "PlanarFlow",
    "PoissonMixture",
    "RealNVP",
    "TokenLDA",
    "catalog",
    "datasets",
    "examples",
    "fetch_corpus",
    "from_texts",
    "load",
    "load_corpus",
    "open_corpus",
    "open_table",
    "read",
    "read_corpus",
    "store_corpus",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_of_namesake() -> None:
    """Say so if the unrelated distribution `inference` has been installed over our package of that name."""
    from importlib.metadata import PackageNotFoundError, distribution
    from warnings import warn

    try:
        found = distribution("inference").version
    except PackageNotFoundError:
        return
    warn(
        f"an unrelated package called inference ({found}) is installed and shares its import name with this "
        "project's; whichever came last has overwritten the other. "
        "Mend it with: pip uninstall inference, then pip install --force-reinstall --no-deps pyro-model-zoo",
        stacklevel=3,
    )


_warn_of_namesake()
