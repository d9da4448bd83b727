"""Data sets by name: scikit-learn's bundled ones and our simulators.  No download, ever."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import Dataset

#: name -> (loader in sklearn.datasets, what the rows are, where they come from)
_BUNDLED = {
    "breast_cancer": (
        "load_breast_cancer",
        "Thirty measurements of cell nuclei from breast tumours.",
        "Street, Wolberg & Mangasarian (1993), UCI repository; the copy that scikit-learn brings",
    ),
    "digits": (
        "load_digits",
        "Handwritten digits, 8 x 8 pixels with grey values 0..16.",
        "Alpaydin & Kaynak (1998), UCI repository, its test set; the copy that scikit-learn brings",
    ),
    "iris": (
        "load_iris",
        "Sepals and petals of three species of iris.",
        "Fisher, Annals of Eugenics 7 (1936); the copy that scikit-learn brings",
    ),
    "wine": (
        "load_wine",
        "Thirteen chemical measurements of wines from three cultivars.",
        "Forina et al., PARVUS (1988), UCI repository; the copy that scikit-learn brings",
    ),
}
_SIMULATED = (
    "answers",
    "bags_of_words",
    "bars",
    "drifting_words",
    "old_faithful",
    "patients",
    "poisson_counts",
    "rectangle",
    "regimes",
    "survey",
    "three_clusters",
    "two_factors",
    "two_moons",
    "two_rods",
    "weather",
)


def datasets() -> list[str]:
    """Names that `load` knows."""
    return sorted([*_BUNDLED, *_SIMULATED, "binary_digits", "faces"])


def load(name: str, **settings: Any) -> "Dataset":
    """The data set called `name`.

    Parameters
    ----------
    name
        One of `datasets()`.
    **settings
        `num_data` and `seed` of the simulated sets; the bundled ones take none.

    Raises
    ------
    ValueError
        No set is called so; names the closest and all there are.
    TypeError
        Settings that the set does not have.
    """
    if name not in datasets():
        close = get_close_matches(str(name).lower(), datasets(), n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"no data set is called {name!r}; there are {datasets()}.{guess} A file of yours is read with read(path)"
        )
    make: Callable[..., Dataset] = partial(_bundled, name)
    if name in _SIMULATED:
        make = getattr(import_module(".simulators", __package__), name)
    elif name == "binary_digits":
        make = _binary_digits
    elif name == "faces":
        make = import_module(".faces", __package__).faces
    allowed = list(inspect.signature(make).parameters)
    unknown = [key for key in settings if key not in allowed]
    if unknown:
        have = f"it has {allowed}" if allowed else "it takes none"
        raise TypeError(f"data set {name!r} has no setting {unknown[0]!r}; {have}")
    return make(**settings)


def _bundled(name: str) -> "Dataset":
    import torch

    from ..imports import bring
    from .dataset import Dataset

    loader, description, source = _BUNDLED[name]
    bunch = getattr(bring("sklearn.datasets"), loader)()
    return Dataset(
        name=name,
        x=torch.tensor(bunch.data, dtype=torch.float64),
        labels=torch.tensor(bunch.target, dtype=torch.long),
        feature_names=tuple(str(column) for column in bunch.feature_names),
        label_names=tuple(str(label) for label in bunch.target_names),
        description=description,
        source=source,
    )


def _binary_digits() -> "Dataset":
    from dataclasses import replace

    digits = _bundled("digits")
    return replace(
        digits,
        name="binary_digits",
        x=(digits.x > 7).to(digits.x.dtype),
        description="Handwritten digits, 8 x 8 pixels, black (1) where the grey value exceeds 7.",
    )
