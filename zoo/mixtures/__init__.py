"""Mixtures: every row picks one of K components, then is drawn from it.  Below is what the stories share."""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from ..imports import bring

Setting = float | Sequence[float] | Tensor

#: Rows that are enough to find centres which lie apart.
FEW_ROWS = 4_000
#: Rounds of k-means that a guide begins with.
ROUNDS = 10

_STORIES = {
    "BernoulliMixture": ".bernoulli",
    "CategoricalMixture": ".categorical",
    "ConjugateGMM": ".niw",
    "GMM": ".gmm",
    "KMeans": ".kmeans",
    "MixedMixture": ".mixed",
    "MultinomialMixture": ".multinomial",
    "PoissonMixture": ".poisson",
}


def __getattr__(name: str) -> Any:
    if name in _STORIES:
        return getattr(import_module(_STORIES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Wishart(dist.Wishart):
    r"""Wishart distribution over (D, D) precisions, drawn by Bartlett's decomposition.

    The density is that of `torch.distributions.Wishart`, whose own draws take every sound matrix for a
    singular one: it warns and draws again.  Here a draw is :math:`(LA)(LA)^\top`, where :math:`LL^\top` is
    the scale matrix and A is lower triangular, :math:`A_{ii}^2 \sim \chi^2_{df - i + 1}`, with standard
    normals below the diagonal; gradients reach `df` and the scale.

    Anderson, *An Introduction to Multivariate Statistical Analysis* (2003), section 7.2.
    """

    def __init__(self, df: Tensor | float, *args: Any, **kwargs: Any) -> None:
        # torch compares df with D as a number, which a traced program must not: the matrices set the shapes here.
        given = torch.as_tensor(df)
        size = next(m for m in (*args, *kwargs.values()) if isinstance(m, Tensor)).shape[-1]
        plain = torch.full(given.shape, size + 2.0, dtype=given.dtype, device=given.device)  # it hangs on nothing
        super().__init__(plain, *args, **kwargs)
        self.df = given.expand(self.batch_shape)

    def expand(self, batch_shape: Size | Sequence[int], _instance: Any = None) -> "Wishart":
        """The same distribution over more batch dimensions."""
        made = super().expand(Size(batch_shape), _instance=_instance or self.__new__(type(self)))
        made.df = self.df.expand(made.batch_shape)
        return made

    def rsample(self, sample_shape: Size | Sequence[int] = ()) -> Tensor:
        """Draws of shape (*sample_shape, *batch_shape, D, D)."""
        # Not `scale_tril`: it would be remembered as though the story had given it.
        L = self._unbroadcasted_scale_tril
        df = self.df.unsqueeze(-1) - torch.arange(L.shape[-1], dtype=L.dtype, device=L.device)
        diagonal = dist.Chi2(df).rsample(Size(sample_shape)).sqrt()
        below = torch.randn((*diagonal.shape, L.shape[-1]), dtype=L.dtype, device=L.device).tril(-1)
        root = L @ (below + diagonal.diag_embed())
        matrix = root @ root.mT
        return (matrix + matrix.mT) / 2  # exactly symmetric in float32 too


def count_setting(name: str, value: int) -> int:
    """`value` as a whole number from 1.

    Raises
    ------
    ValueError
        Anything else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    return int(value)


def setting(name: str, value: Setting, *, positive: bool = False) -> float | tuple[float, ...]:
    """A hyperparameter, one number or one a column, as plain floats.

    Plain floats can be compared, hashed and printed, and take the data's dtype when the story is told.

    Raises
    ------
    ValueError
        `value` is not finite, not positive where it must be, or more than a vector.
    TypeError
        `value` is not made of numbers.
    """
    try:
        # not by way of float32, where 0.1 is another number
        given = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        tensor = given.to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = f"{value!r} ({type(value).__name__})"
        raise TypeError(f"{name} must be a number or one number a column, got {found}") from None
    if tensor.ndim > 1 or tensor.numel() == 0:
        shape = tuple(tensor.shape)
        raise ValueError(f"{name} must be a number or one number a column (D,), got shape {shape}")
    wrong = ~tensor.isfinite() | (tensor <= 0) if positive else ~tensor.isfinite()
    if wrong.any():
        first = tensor[wrong].flatten()[0].item()
        what = "positive and finite" if positive else "finite"
        where = f" in column {int(wrong.int().argmax())}" if tensor.ndim else ""
        raise ValueError(f"{name} must be {what}, got {first:g}{where}")
    return tensor.item() if tensor.ndim == 0 else tuple(tensor.tolist())


def pseudo_count(name: str, value: Setting) -> float:
    """`value` as one positive number.

    Raises
    ------
    ValueError
        Anything else.
    """
    plain = setting(name, value, positive=True)
    if isinstance(plain, tuple):
        raise ValueError(f"{name} must be one number, got {len(plain)}")
    return plain


def table_columns(x: Tensor | None, num_features: int) -> int:
    """D: the columns of `x`, else `num_features`.

    Raises
    ------
    ValueError
        `x` is not (N, D).
    """
    if x is None:
        return count_setting("num_features", num_features)
    if x.ndim != 2:
        raise ValueError(f"the table has shape {tuple(x.shape)}, expected rows and columns (N, D)")
    return x.shape[1]


def num_columns(x: Tensor | None, num_features: int, **settings: Setting) -> int:
    """D: the columns of `x`, else the length of the settings that are vectors, else `num_features`.

    Raises
    ------
    ValueError
        `x` is not (N, D), or a vector of settings has another length than D.
    """
    if x is not None and x.ndim != 2:
        hint = "; one column is x[:, None]" if x.ndim == 1 else ""
        raise ValueError(f"x has shape {tuple(x.shape)}, expected rows and columns (N, D){hint}")
    lengths = {name: len(value) for name, value in settings.items() if isinstance(value, tuple)}
    told = next(iter(lengths.values()), None)
    if x is not None:
        D = x.shape[1]
    else:
        D = count_setting("num_features", num_features) if told is None else told
    for name, length in lengths.items():
        if length != D:
            whose = f"x has {D} columns" if x is not None else f"{next(iter(lengths))} has {D}"
            raise ValueError(f"{name} has {length} numbers and {whose}; give one number or {D}")
    return D


def filled(value: Setting, shape: tuple[int, ...], x: Tensor | None) -> Tensor:
    """A setting as a tensor of that shape, on the device of `x`, in its dtype or the default one if that is finer."""
    dtype = torch.get_default_dtype()
    if x is not None and x.is_floating_point():
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.tensor(value, dtype=dtype, device=None if x is None else x.device).expand(shape)


def cluster_means(x: Tensor, num_clusters: int) -> Tensor:
    """Means of the clusters that some rounds of k-means find in the rows of `x` (N, D): (num_clusters, D).

    They begin at rows that lie apart (k-means++), on standardised columns.  A missing cell counts as its column's mean.  Where
    `x` has too few rows, they repeat; of very many, some are looked at.
    Arthur & Vassilvitskii, *k-means++: The Advantages of Careful Seeding* (SODA 2007).
    """
    kmeans_plusplus = bring("sklearn.cluster").kmeans_plusplus

    most = max(FEW_ROWS, 50 * num_clusters)
    if len(x) > most:
        x = x[torch.randint(len(x), (most,), device=x.device)]
    x = x.detach().to("cpu", torch.get_default_dtype() if not x.is_floating_point() else x.dtype)
    mean = x.nanmean(0).nan_to_num(0.0)
    x = torch.where(x.isnan(), mean, x)
    if len(x) < num_clusters:
        x = x.repeat(math.ceil(num_clusters / len(x)), 1)
    info = torch.finfo(x.dtype)
    floor = (info.eps * mean.abs()).clamp_min(info.tiny)  # below it a column's spread is rounding error
    unit = (x - mean) / torch.maximum(x.std(0, correction=0), floor)
    seed = int(torch.randint(2**31 - 1, ()))
    _, rows = kmeans_plusplus(unit.double().numpy(), num_clusters, random_state=seed)
    chosen = torch.from_numpy(rows)
    centres, at = x[chosen], unit[chosen]
    for _ in range(ROUNDS):
        nearest = torch.nn.functional.one_hot(torch.cdist(unit, at).argmin(1), num_clusters).to(x.dtype)
        count = nearest.sum(0)[:, None]
        centres, at = (torch.where(count > 0, nearest.T @ v / count.clamp_min(1), old) for v, old in ((x, centres), (unit, at)))
    return centres
