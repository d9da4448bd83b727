r"""What draws and weights say about their own trustworthiness.

R-hat and effective sample sizes are rank-normalised and split (Vehtari, Gelman, Simpson, Carpenter and Bürkner,
*Rank-normalization, folding, and localization: an improved R-hat*, Bayesian Analysis 2021); E-BFMI compares the energy
that momentum refreshes bring with the energy that there is (Betancourt, *Diagnosing suboptimal cotangent
disintegrations*, 2016); k-hat is the shape of the largest importance weights (Vehtari, Simpson, Gelman, Yao and Gabry,
*Pareto smoothed importance sampling*, JMLR 2024).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Thresholds of the papers above.
RHAT_LIMIT = 1.01
ESS_PER_CHAIN = 100
EBFMI_LIMIT = 0.3
KHAT_LIMIT = 0.7
#: Draws a chain below which neither R-hat nor an effective sample size can be computed.
FEWEST_DRAWS = 8


def rhat_ess(draws: Mapping[str, NDArray]) -> dict[str, Any]:
    """R-hat and effective sample sizes of every entry of every site.

    Parameters
    ----------
    draws
        Site -> (chains, draws, ...shape). Entries that are constant by construction (the zeros of a triangular matrix)
        are left out; entries at which whole chains stand still at different values get R-hat = inf.

    Returns
    -------
    dict
        "rhat" (largest), "ess_bulk", "ess_tail" (smallest), "rhat_by_site", "ess_bulk_by_site", "ess_tail_by_site" and
        "worst_site" (largest R-hat). NaN where there are fewer than eight draws a chain.
    """
    tables: dict[str, dict[str, float]] = {"rhat": {}, "ess_bulk": {}, "ess_tail": {}}
    for name, value in draws.items():
        for statistic, entries in _entries(np.asarray(value, dtype=np.float64)).items():
            if len(entries):
                tables[statistic][name] = float(entries.max() if statistic == "rhat" else entries.min())
    rhat, bulk, tail = tables["rhat"], tables["ess_bulk"], tables["ess_tail"]
    return {
        "rhat": max(rhat.values(), default=math.nan),
        "ess_bulk": min(bulk.values(), default=math.nan),
        "ess_tail": min(tail.values(), default=math.nan),
        "rhat_by_site": rhat,
        "ess_bulk_by_site": bulk,
        "ess_tail_by_site": tail,
        "worst_site": max(rhat, key=lambda name: rhat[name]) if rhat else None,
    }


def _entries(value: NDArray) -> dict[str, NDArray]:
    """R-hat and effective sample sizes of (chains, draws, ...): one number an entry that is not constant."""
    chains, count = value.shape[:2]
    flat = value.reshape(chains, count, -1)
    flat = flat[:, :, (flat != flat[:1, :1]).any((0, 1))]
    size = flat.shape[-1]
    if count < FEWEST_DRAWS:
        return {name: np.full(min(size, 1), math.nan) for name in ("rhat", "ess_bulk", "ess_tail")}
    if chains == 1:  # its halves have to agree at least
        flat = flat[:, : count - count % 2].reshape(2, count // 2, size)
    stuck = (flat == flat[:, :1]).all(1).any(0) | ~np.isfinite(flat).all((0, 1))
    rhat, bulk, tail = np.full(size, math.inf), np.ones(size), np.ones(size)
    if (~stuck).any():
        from arviz_stats.base import array_stats

        moving, axes = flat[:, :, ~stuck], {"chain_axis": 0, "draw_axis": 1}
        rhat[~stuck] = array_stats.rhat(moving, method="rank", **axes)
        bulk[~stuck] = array_stats.ess(moving, method="bulk", **axes)
        tail[~stuck] = array_stats.ess(moving, method="tail", prob=(0.05, 0.95), **axes)
    return {"rhat": rhat, "ess_bulk": bulk, "ess_tail": tail}


def rhat_warnings(draws: Mapping[str, NDArray], convergence: Mapping[str, Any]) -> list[str]:
    """Sentences about chains that disagree and about samples that are too small.

    Parameters
    ----------
    draws
        Site -> (chains, draws, ...shape), as given to `rhat_ess`.
    convergence
        What `rhat_ess` said about them.
    """
    if not draws or convergence["worst_site"] is None:
        return []
    chains, count = next(iter(draws.values())).shape[:2]
    if count < FEWEST_DRAWS:
        return [f"{count} draws a chain are too few to judge convergence: R-hat and ESS are unknown"]
    warnings = ["one chain cannot show whether others would find another answer; run several"] if chains == 1 else []
    if not convergence["rhat"] <= RHAT_LIMIT:
        site = convergence["worst_site"]
        entry, means = _most_apart(np.asarray(draws[site], dtype=np.float64))
        shown = ", ".join(f"{m:.4g}" for m in means)
        apart = "the chains do not agree" if chains > 1 else "the halves of the chain do not agree"
        which = f"{site}[{', '.join(map(str, entry))}]" if entry else site
        others = [n for n, r in convergence["rhat_by_site"].items() if not r <= RHAT_LIMIT and n != site]
        also = f" (also above: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''})" if others else ""
        warnings.append(
            f"R-hat of {site} is {convergence['rhat']:.3f} > {RHAT_LIMIT}{also}: {apart}, pooled numbers "
            f"are not to be trusted; means of {which} by chain: {shown}"
        )
    least = ESS_PER_CHAIN * chains
    for kind, what in (("ess_bulk", "means"), ("ess_tail", "5 % and 95 % quantiles")):
        if convergence[kind] < least:
            site = min(convergence[f"{kind}_by_site"], key=convergence[f"{kind}_by_site"].get)
            warnings.append(
                f"effective sample size of {site} ({kind}) is {convergence[kind]:.0f} < {least}: its {what} are uncertain; "
                f"raise draws"
            )
    return warnings


def _most_apart(value: NDArray) -> tuple[tuple[int, ...], NDArray]:
    """The entry whose chain means differ most in units of its spread, and these means."""
    means = value.mean(1)
    spread = value.std(1).mean(0)
    ratio = np.ptp(means, axis=0) / np.where(spread > 0, spread, np.finfo(float).tiny)
    entry = np.unravel_index(int(np.argmax(np.nan_to_num(ratio, nan=-1.0))), ratio.shape) if ratio.ndim else ()
    index = tuple(int(i) for i in entry)
    return index, means[(slice(None), *index)]


def ebfmi(energy: NDArray) -> NDArray:
    """Energy Bayesian fraction of missing information of every chain: (chains, draws) -> (chains,)."""
    energy = np.asarray(energy, dtype=np.float64)
    if energy.shape[1] < FEWEST_DRAWS:
        return np.full(len(energy), math.nan)
    spread = energy.var(1)
    return (np.diff(energy, axis=1) ** 2).mean(1) / np.where(spread > 0, spread, math.nan)


def sampling_diagnostics(stats: Mapping[str, NDArray], max_depth: int | None) -> dict[str, Any]:
    """Numbers about the trajectories of a Hamiltonian sampler.

    Parameters
    ----------
    stats
        Name -> (chains, draws): "diverging", "energy", "tree_depth", "n_steps", "acceptance_rate", "step_size".
    max_depth
        Depth at which trajectories were cut off; None where their length is another matter.
    """
    return {
        "divergences": int(stats["diverging"].sum()),
        "divergences_by_chain": stats["diverging"].sum(1).astype(int).tolist(),
        "ebfmi": [float(v) for v in ebfmi(stats["energy"])],
        "saturated": int((stats["tree_depth"] >= max_depth).sum()) if max_depth is not None else 0,
        "mean_acceptance": float(stats["acceptance_rate"].mean()),
        "step_size": [float(v) for v in stats["step_size"][:, -1]],
        "gradients_per_draw": float(stats["n_steps"].mean()),
        **({"max_depth": max_depth} if max_depth is not None else {}),
    }


def sampling_warnings(found: Mapping[str, Any], num_draws: int) -> list[str]:
    """Sentences about trajectories that diverged, were cut off or could not reach the tails.

    Parameters
    ----------
    found
        From `sampling_diagnostics`.
    num_draws
        Draws over all chains.
    """
    warnings = []
    if found["divergences"]:
        warnings.append(
            f"{found['divergences']} of {num_draws} trajectories diverged: the sampler skipped a region of high curvature "
            f"and the draws are biased; raise target_accept, or rewrite the story with standardised (non-centred) latents"
        )
    low = [i for i, value in enumerate(found["ebfmi"]) if value < EBFMI_LIMIT]
    if low:
        shown = ", ".join(f"{found['ebfmi'][i]:.2f}" for i in low)
        warnings.append(
            f"E-BFMI is {shown} < {EBFMI_LIMIT} in chain {', '.join(map(str, low))}: the tails are explored slowly; rewrite "
            f"the story so that scales do not depend on other latents"
        )
    if found["saturated"]:
        warnings.append(
            f"{found['saturated']} of {num_draws} trajectories were cut off at max_depth={found['max_depth']}: the chains move "
            f"slowly; raise max_depth, set dense_mass=True or rescale the latents"
        )
    return warnings


def pareto_khat(log_weights: ArrayLike) -> float:
    """Shape of the generalised Pareto distribution of the largest importance weights.

    Below 0.7 estimates with these weights are reliable.

    Parameters
    ----------
    log_weights
        (draws,), log p - log q up to a constant; -inf is a weight of zero.

    Returns
    -------
    k-hat; 0 where all weights are equal (q is p, up to rounding), inf where there is a NaN or infinite weight, no
    positive weight, or fewer than 25 draws (then there is no tail to fit).

    Raises
    ------
    ValueError
        `log_weights` is empty or not a vector.
    """
    values = np.asarray(log_weights, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"log_weights must be a vector of at least one number, got shape {values.shape}")
    if np.isnan(values).any() or (values == math.inf).any() or (values == -math.inf).all():
        return math.inf
    values = values - values.max()
    if values.min() > -1e-9:
        return 0.0
    if len(values) < 25:
        return math.inf
    ordered = np.sort(values)
    count = int(min(0.2 * len(values), 3.0 * math.sqrt(len(values))))
    tail = np.exp(ordered[-count:]) - np.exp(ordered[-count - 1])
    tail = tail[tail > 0]
    if len(tail) < 5:
        return math.inf
    if tail[-1] - tail[0] <= 1e-12 * tail[-1]:
        return 0.0
    # Ten observations' worth of belief in 1/2 steadies the estimate (appendix G of the PSIS paper).
    return (generalised_pareto_shape(tail) * len(tail) + 5.0) / (len(tail) + 10.0)


def generalised_pareto_shape(tail: NDArray) -> float:
    """Shape k of positive sorted exceedances by the profile posterior mean of Zhang and Stephens (Technometrics 2009)."""
    count = len(tail)
    grid = 30 + int(math.sqrt(count))
    quartile = tail[int(count / 4 + 0.5) - 1]
    candidates = 1.0 / tail[-1] + (1.0 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3.0 * quartile)
    shapes = np.log1p(-candidates[:, None] * tail).mean(1)
    profile = count * (np.log(-candidates / shapes) - shapes - 1.0)
    weights = np.exp(profile - profile.max())
    best = (candidates * weights).sum() / weights.sum()
    return float(np.log1p(-best * tail).mean())
