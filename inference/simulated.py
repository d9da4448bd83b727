"""One round of calibration: data and truth drawn from a story, and where the truth stands among posterior draws."""

from __future__ import annotations

import inspect as python_inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from .enumeration import sum_out
from .labels import Axes, permute
from .simulate import simulate
from .structure import pair
from .summary import column, entries, label

if TYPE_CHECKING:
    from .posterior import Posterior
    from .problem import Problem

#: Entries of one site whose ranks are taken.
MOST_ENTRIES = 12
#: Finite latents that are ranked.
MOST_FINITE = 1


def from_arguments(story: Any, arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """Data of a size that `arguments` tell, drawn from the story itself.

    Raises
    ------
    ValueError
        The story cannot be run without its data.
    """
    model, _ = pair(story)
    try:
        sites = simulate(story, seed=seed, **arguments)
    except TypeError as error:
        raise ValueError(f"check needs data, or the arguments that the story needs to draw some: {error}") from None
    names = set(python_inspect.signature(model).parameters)
    return {**arguments, **{n: v for n, v in sites.items() if n in names}}


def dreamed(problem: Problem) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The story's arguments with what is observed drawn anew, and every latent's value; call inside the problem's scope.

    Raises
    ------
    ValueError
        A prior is improper, or an observation is no part of an argument.
    """
    kwargs = {n: v.clone() if isinstance(v, Tensor) else v for n, v in problem.kwargs.items()}
    improper = [s.name for s in problem.structure.latents if s.improper]
    if improper:
        raise ValueError(f"the prior of {improper} is improper and has no draws: give it a proper one")
    with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
        try:
            trace: Any = poutine.trace(poutine.uncondition(problem.model)).get_trace(**kwargs)
        except NotImplementedError as error:
            raise ValueError(f"a prior of the story is improper and has no draws ({error})") from None
    spaces = {v.untyped_storage().data_ptr(): v for v in kwargs.values() if isinstance(v, Tensor)}
    for site in problem.structure.observed:
        node = trace.nodes[site.name]
        given = node["infer"].get("obs")
        if not isinstance(given, Tensor) or given.untyped_storage().data_ptr() not in spaces:
            raise ValueError(
                f"site {site.name!r} does not observe an argument of the story as it is: what it observes cannot be replaced "
                f"by draws"
            )
        given.copy_(node["value"])
    truth = {s.name: trace.nodes[s.name]["value"] for s in problem.structure.latents}
    return kwargs, truth


def quantities(
    posterior: Posterior, truth: dict[str, Tensor], draws: int, rng: np.random.Generator
) -> dict[str, float]:
    """Rank, 0 to `draws`, of the truth in everything that the data can tell."""
    at = torch.linspace(0, posterior.num_draws - 1, draws).round().long()
    some = {n: v[at].double() for n, v in posterior.draws.items()}
    mine = {n: truth[n].double()[None] for n in some}
    local = {b.name for b in posterior.joint.blocks if b.local}
    found = {}
    for name, (value, exact) in identified(posterior, some, mine, local).items():
        twice = name.endswith("^T")  # symmetric: one triangle says it all
        for index in [e for e in entries(tuple(value.shape[1:])) if not twice or e[-2] <= e[-1]][:MOST_ENTRIES]:
            place = label(name, index)
            found[place] = ranked(column(value.numpy(), index), float(column(exact.numpy(), index)[0]), rng)
    with posterior.problem.scope(posterior.seed), torch.no_grad():
        likelihood = np.array([log_likelihood(posterior, {n: v[i] for n, v in some.items()}) for i in range(draws)])
        reached = log_likelihood(posterior, {n: v[0] for n, v in mine.items()})
    found["log likelihood"] = ranked(likelihood, reached, rng)
    for site in posterior.structure.finite[:MOST_FINITE]:  # steps of a chain tell much the same
        rank = of_finite(posterior, site, truth[site.name], at.tolist(), rng)
        if rank is not None:
            found[rank[0]] = rank[1]
    return found


def ranked(values: NDArray, true: float, rng: np.random.Generator) -> float:
    """Draws below the truth; ties are split at random."""
    return float((values < true).sum() + rng.integers(0, (values == true).sum() + 1))


def identified(
    posterior: Posterior, draws: dict[str, Tensor], truth: dict[str, Tensor], local: set[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Globals in a form that no relabelling or rotation changes: components in order, W as W W^T."""
    from .rotations import invariants

    axes = {n: tuple(a) for n, a in posterior.diagnostics.get("exchangeable", {}).items() if n in draws}
    if posterior.problem.admixture is not None:
        axes = {posterior.problem.admixture.topics: (0,)}
    both = []
    for values in (draws, truth):
        values = {n: v for n, v in values.items() if n not in local}
        if axes:
            values = in_order(values, axes)
        both.append(invariants(values, posterior.diagnostics.get("rotating", {}), set()))
    return {n: (both[0][n], both[1][n]) for n in both[0]}


def in_order(values: dict[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """Every draw's components sorted by the first number of the site that tells them apart: one that is no share."""
    plain = [n for n, a in axes.items() if tuple(a) == (0,)]
    key = next((n for n in plain if not shares(values[n])), plain[0] if plain else next(iter(axes)))
    order = values[key].flatten(2)[..., 0].argsort(1) if values[key].dim() > 2 else values[key].argsort(1)
    sorted_ = [permute({n: values[n][i] for n in axes}, axes, order[i]) for i in range(len(order))]
    return {**values, **{n: torch.stack([v[n] for v in sorted_]) for n in axes}}


def shares(value: Tensor) -> bool:
    """Whether draws (S, K) sum to one."""
    return value.dim() == 2 and bool((value.sum(1) - 1).abs().max() < 1e-6)


def log_likelihood(posterior: Posterior, values: dict[str, Tensor]) -> float:
    """log p(data | continuous latents), finite ones summed out."""
    joint, kwargs = posterior.joint, posterior.problem.kwargs
    missing = [b.name for b in joint.blocks if b.name not in values]
    if missing:  # locals that were integrated out
        from .linear_gaussian import GaussianRows

        return float(GaussianRows(joint, values, kwargs).log_rows.sum())
    values = {n: v.to(joint.problem.dtype) for n, v in values.items()}
    factors = [f for f in joint.factors(values, kwargs) if f.name not in values]
    return float(sum_out(factors, set(joint.finite))[0])


def of_finite(
    posterior: Posterior, site: Any, true: Tensor, indices: list[int], rng: np.random.Generator
) -> tuple[str, float] | None:
    """A finite latent: whether the first two rows share their state, or the state itself where it is global.

    One draw of it goes with every draw of the globals; ties are split at random.
    """
    joint = posterior.joint
    if site.local and len(site.plates) == 1 and true.numel() >= 2:
        with posterior.problem.scope(posterior.seed):
            tables = (joint.local_probabilities(site.name, posterior.draw(i)) for i in indices)
            same = np.array([float((t[0] * t[1]).sum()) for t in tables])
        first, second = true.reshape(-1)[:2].tolist()
        return f"{site.name}[0] = {site.name}[1]", ranked(rng.random(len(same)) < same, float(first == second), rng)
    if not site.plates and true.numel() == 1:
        with posterior.problem.scope(posterior.seed):
            tables = (joint.local_probabilities(site.name, posterior.draw(i)).reshape(-1) for i in indices)
            states = [int(np.searchsorted(np.cumsum(t.numpy()), rng.random() * float(t.sum()))) for t in tables]
        return site.name, ranked(np.array(states), float(true), rng)
    return None
