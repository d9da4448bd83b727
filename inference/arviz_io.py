"""Answers as `xarray.DataTree` for ArviZ: draws, pointwise log-likelihood, observed data, sample statistics.

Pyro's own converter drops the log-likelihood of models with enumerated latents; here finite latents are summed out and
the pointwise log-likelihood is that of the marginal model, which is what leave-one-out cross-validation needs.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .lazy_rows import too_many
from .score import rows_by_draw

if TYPE_CHECKING:
    from .posterior import Posterior

#: Draws of the globals under which rows are integrated for leave-one-out.
LOO_DRAWS = 240
#: Draws x rows of a pointwise log-likelihood that is kept.
NUMBERS = 200_000_000
#: Rows up to which leave-one-out fits each row's tail (a millisecond), and draws x numbers in the data that it may ask.
LOO_ROWS, LOO_NUMBERS = 50_000, 500_000_000
#: ArviZ's names of sampler statistics.
STATISTICS = {"diverging", "energy", "tree_depth", "n_steps", "acceptance_rate", "step_size", "lp"}


class TooManyError(ValueError):
    """Rows and draws that would take too long to hold each against each."""


def to_datatree(posterior: Posterior, most: int | None = None) -> Any:
    """See `Posterior.to_arviz`; of at most so many draws."""
    import arviz_base
    import pyro

    chosen = slice(None) if most is None or most >= posterior.num_draws else spread_draws(posterior, most)
    draws = {name: value[chosen] for name, value in posterior.draws.items()}
    table = None if too_wide(posterior) else log_likelihood(posterior, chosen)
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": {name: by_chain(posterior, value) for name, value in draws.items()},
        "log_likelihood": {} if table is None else {likelihood_name(posterior): by_chain(posterior, table)},
        "observed_data": {
            s.argument: posterior.problem.kwargs[s.argument].cpu().numpy()
            for s in posterior.structure.observed
            if s.argument in posterior.problem.kwargs
        },
    }
    if posterior.sample_stats and chosen == slice(None):
        groups["sample_stats"] = {n: v for n, v in posterior.sample_stats.items() if n in STATISTICS}
    groups = {name: group for name, group in groups.items() if group}
    attrs = {
        "inference_library": "pyro-model-zoo",
        "kind": posterior.kind,
        "method": repr(posterior.method),
        "seed": posterior.seed,
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "log_likelihood": likelihood_text(posterior) if table is not None else f"left out: {too_wide(posterior)}",
    }
    # Two axes of one length (K, K) would ask for one coordinate twice: names come from the site.
    dims = {n: [f"{n}_dim_{i}" for i in range(v.dim() - 1)] for n, v in draws.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="More chains")
        return arviz_base.from_dict(groups, dims=dims, attrs={"posterior": attrs})


def by_chain(posterior: Posterior, value: Tensor) -> np.ndarray:
    """(draws, ...) -> (chains, draws, ...)."""
    return value.reshape(posterior.chains, -1, *value.shape[1:]).detach().cpu().numpy()


def spread_draws(posterior: Posterior, most: int) -> list[int]:
    """At most so many draws, but 50 a chain at least, as many of each and from all over it."""
    each = posterior.num_draws // posterior.chains
    at = np.linspace(0, each - 1, min(each, max(50, most // posterior.chains))).round().astype(int)
    return [c * each + i for c in range(posterior.chains) for i in at.tolist()]


def too_wide(posterior: Posterior) -> str:
    """Why a pointwise log-likelihood is not made, or nothing."""
    rows, draws = posterior.structure.num_rows or 1, posterior.num_draws
    if posterior.kind == "point" or rows * draws <= NUMBERS:
        return ""
    return f"{draws:,} draws x {rows:,} rows; posterior.log_prob() averages over the draws"


def likelihood_name(posterior: Posterior) -> str:
    """Observed sites of a row, joined."""
    names = [s.name for s in posterior.structure.observed if s.local or not posterior.structure.data_plate]
    return names[0] if len(names) == 1 else "rows"


def likelihood_text(posterior: Posterior) -> str:
    """What the pointwise log-likelihood is a density of."""
    if posterior.structure.continuous_locals:
        return "conditional on the drawn continuous local latents"
    return "finite local latents summed out"


def log_likelihood(posterior: Posterior, chosen: slice | list[int] = slice(None)) -> Tensor:
    """log p(x_n | draw) for every draw, or some, and row: (draws, N)."""
    joint, kwargs = posterior.joint, posterior.problem.kwargs
    indices = list(range(posterior.num_draws))[chosen] if isinstance(chosen, slice) else chosen
    local = {b.name for b in joint.blocks if b.local}
    with posterior.problem.scope(posterior.seed), torch.no_grad():
        if not local:
            return rows_by_draw(posterior, indices, kwargs)
        rows = []
        for i in indices:
            values = posterior.draw(i)
            rows.append(joint.rows(values, kwargs) - joint.latent_rows(values, kwargs))
        return torch.stack(rows)


def elpd_loo(posterior: Posterior) -> tuple[float, float, float]:
    """ELPD by Pareto-smoothed leave-one-out (Vehtari, Gelman and Gabry 2017): estimate, standard error, worst k-hat.

    Raises
    ------
    ValueError
        A point has no draws to reweigh, or there are too few; or rows and draws are too many to hold each against each.
    """
    if posterior.num_draws < 50:
        raise ValueError(f"leave-one-out reweighs draws, and this answer has {posterior.num_draws} ({posterior.kind})")
    rows, kwargs = posterior.structure.num_rows or 1, posterior.problem.kwargs
    numbers = sum(kwargs[n].numel() for n in posterior.structure.row_arguments)
    most = max(LOO_DRAWS, LOO_NUMBERS // max(1, numbers))
    if too_many(kwargs) or rows > LOO_ROWS or most * numbers > LOO_NUMBERS:
        raise TooManyError(
            f"leave-one-out asks every row under every draw: {min(most, posterior.num_draws):,} draws x {rows:,} rows "
            f"({numbers:,} numbers) are too many; densities of rows held out, compare(..., test=0.2), tell as much"
        )
    import arviz_stats

    # Given its own latent, a row says nothing of itself: where they can be integrated out, they are.
    tree = integrated(posterior) if posterior.structure.linear_gaussian else to_datatree(posterior, most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = arviz_stats.loo(tree, pointwise=True)
    return float(found.elpd), float(found.se), float(np.max(np.asarray(found.pareto_k)))


def integrated(posterior: Posterior) -> Any:
    """Some draws of the globals of a linear-Gaussian story, and log p(x_n | draw) with the rows' latents integrated out."""
    import arviz_base

    from .linear_gaussian import GaussianRows

    indices = spread_draws(posterior, LOO_DRAWS)
    joint, kwargs = posterior.joint, posterior.problem.kwargs
    local = {b.name for b in joint.blocks if b.local}
    with posterior.problem.scope(posterior.seed), torch.no_grad():
        rows = [GaussianRows(joint, posterior.draw(i), kwargs).log_rows for i in indices]
    groups = {
        "posterior": {n: by_chain(posterior, v[indices]) for n, v in posterior.draws.items() if n not in local},
        "log_likelihood": {likelihood_name(posterior): by_chain(posterior, torch.stack(rows))},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="More chains")
        dims = {n: [f"{n}_dim_{i}" for i in range(v.ndim - 2)] for n, v in groups["posterior"].items()}
        return arviz_base.from_dict(groups, dims=dims)
