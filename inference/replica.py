"""The replica of a problem on which two methods are held side by side, and which method is to stand beside which."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .data import some_rows, take_rows
from .diagnostics import pareto_khat, rhat_ess

if TYPE_CHECKING:
    from .methods.base import Method
    from .posterior import Posterior
    from .problem import Problem
    from .structure import Structure

#: Rows of a replica; of one whose rows have latents that are sampled; and documents.
ROWS, WITH_LATENTS, DOCUMENTS = 200, 40, 100
#: Seconds of sampling, by a timed gradient, from which a quarter of the rows is taken, and after which it ends.
PATIENCE, LONGEST = 30.0, 120.0
#: The captured program is at least so many times as fast as the story.
CAPTURED = 8
#: Seconds of Gibbs for one word of every document.
WORD = 2e-4
#: Draws of a row's latents, and words that are looked at in every document.
ROW_DRAWS, WORDS = 400, 5


class NoSecondError(ValueError):
    """No independent second method exists; the text says why."""


@dataclass(frozen=True)
class Second:
    """The method beside, why, how the two are compared ("refit" or "rows"), and the seconds it may take."""

    method: Any
    reason: str
    route: str = "refit"
    seconds: float = LONGEST


def quick_methods() -> dict[str, Method]:
    """Methods that give draws from the posterior itself, strongest first, at a length that suits a replica."""
    from .methods import HMC, NUTS, Exact, Gibbs

    # The tensor graph, not generated code: what stands beside a chain in machine code should not share it.
    return {
        "exact": Exact(draws=4000),
        "gibbs": Gibbs(chains=4, warmup=300, draws=500),
        "nuts": NUTS(chains=4, warmup=500, draws=500),
        "hmc": HMC(chains=8, warmup=400, draws=500, backend="graph"),
    }


REASONS = {
    "exact": "the posterior in closed form",
    "gibbs": "draws from the exact posterior, topic by topic",
    "nuts": "draws from the posterior itself, by no-U-turn trajectories",
    "hmc": "draws from the posterior itself, by trajectories of another length, on the graph instead of compiled code",
}


def chosen_second(posterior: Posterior, wanted: str | Method | bool = True) -> Second:
    """The method to stand beside, and why.

    Raises
    ------
    NoSecondError
        None is valid for the story and independent of the first.
    ValueError, TypeError
        `wanted` is no method, is not valid for the story, or is the method that answered.
    """
    from .choose import check_request
    from .methods import resolve
    from .methods.encoders import Amortised

    structure, first = posterior.structure, posterior.method.name
    if wanted is not True:
        method = check_request(structure, resolve(wanted)).method  # type: ignore[arg-type]
        if method.name == first:
            raise ValueError(
                f"cross_check={method.name!r} is the method that answered: the same method twice makes the same mistake "
                f"twice; name another, or say True"
            )
        return Second(method, "as asked")
    if structure.implicit:
        raise NoSecondError("the story has no density, and samples of a generator have no second method")
    networks = bool(posterior.extra.get("networks")) or structure.has_modules
    if networks and not (isinstance(getattr(posterior.method, "guide", None), Amortised) and not structure.has_modules):
        if posterior.recogniser is not None:
            return Second(
                None,
                "the networks are held as fitted; the rows' latents by importance sampling from normals fitted row by row, "
                "without the guide",
                "rows",
            )
        what = "the density is exact and " if structure.guideless else ""
        raise NoSecondError(f"{what}networks are learned as points, of which no other method gives a posterior")
    if not posterior.draws:
        raise NoSecondError("nothing continuous is unknown: every latent is summed out exactly")
    reasons = {}
    for name, method in quick_methods().items():
        if name == first or (name == "hmc" and first in ("exact", "gibbs")):
            continue
        verdict = method.check(structure)
        if verdict.applies:
            return Second(method, REASONS[name])
        reasons[name] = verdict.reason
    if posterior.recogniser is not None:
        return Second(None, "parameters are held as fitted; the rows' latents by normals fitted row by row", "rows")
    why = reasons.get("nuts") or next(iter(reasons.values()))
    raise NoSecondError(f"no second method is valid for this story ({why})")


def cheap(posterior: Posterior, seconds: float) -> bool:
    """Whether a second opinion is to be had in about that time."""
    try:
        partner = chosen_second(posterior)
        if partner.route == "rows" or partner.method.name not in ("nuts", "hmc", "gibbs"):
            return True
        small = replica(posterior, partner)
        return (walk(small, partner.method) if partner.method.name == "gibbs" else cost(small)) <= seconds
    except NoSecondError:
        return True  # which says so at once


# -- the replica ---------------------------------------------------------------------------------------------------------


def rows_of(structure: Structure) -> int | None:
    """How many rows a replica takes; None where the data are no rows."""
    if not structure.row_arguments or not structure.num_rows:
        return None
    if structure.admixture:
        most = DOCUMENTS
    else:
        most = WITH_LATENTS if structure.continuous_locals and not structure.linear_gaussian else ROWS
    # Of a little more than that, all: the main answer then serves as it is.
    return structure.num_rows if structure.num_rows <= 1.5 * most else most


def replica(posterior: Posterior, partner: Second) -> Problem:
    """The problem with some of its rows, at random; all of them where they are few.

    Raises
    ------
    NoSecondError
        The rows chosen make no problem of their own.
    """
    problem, count = posterior.problem, rows_of(posterior.structure)
    if count is None or count == posterior.structure.num_rows:
        return problem
    small = smaller(posterior, count)
    if partner.method.name in ("nuts", "hmc") and count >= 40 and cost(small) > PATIENCE:
        less = smaller(posterior, count // 4)
        if cost(less) < 0.6 * cost(small):
            return less
    return small


def smaller(posterior: Posterior, count: int) -> Problem:
    """The problem with `count` rows at random, read anew."""
    from .methods.encoders import Amortised
    from .problem import prepare

    problem, structure = posterior.problem, posterior.structure
    generator = torch.Generator().manual_seed(problem.seed)
    rows = some_rows(int(structure.num_rows or 1), count, generator).sort().values
    kwargs = take_rows(problem.kwargs, structure.row_arguments, rows)
    own = isinstance(getattr(posterior.method, "guide", None), Amortised)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say was said of all rows
            return prepare(
                problem.story,
                kwargs,
                guide=None if own else problem.guide,
                device=problem.device,
                seed=problem.seed,
                want="posterior",
            )
    except (ValueError, TypeError) as error:
        raise NoSecondError(f"{count} rows at random make no replica: {str(error).splitlines()[0]}") from error


def cost(problem: Problem) -> float:
    """Seconds that quick NUTS would take, by a few gradients of the story as it is."""
    from .fit import pilot

    return pilot(problem)[0] / 2 / CAPTURED


def walk(problem: Problem, method: Any) -> float:
    """Seconds that Gibbs would take: its passes go word by word through all documents at once, as often as the longest has."""
    if problem.admixture is None:
        return 0.0
    documents = problem.admixture.documents(problem.kwargs)
    counts = np.concatenate([[0.0], np.cumsum(documents.counts, dtype=float)])
    longest = float(np.diff(counts[np.asarray(documents.starts)]).max(initial=0.0))
    return WORD * longest * (method.warmup + method.draws)


def answered(problem: Problem, method: Any, progress: bool, seconds: float | None = None) -> Posterior:
    """One method's answer to the replica.

    Raises
    ------
    NoSecondError
        It found none.
    """
    from .choose import check_request
    from .errors import DivergenceError
    from .fit import run

    try:
        return run(replace(problem, budget=seconds, progress=progress), check_request(problem.structure, method))
    except (DivergenceError, ValueError, RuntimeError) as error:
        raise NoSecondError(f"{method.name.upper()} failed on the replica: {str(error).splitlines()[0]}") from error


# -- topic models --------------------------------------------------------------------------------------------------------


def word_chances(
    mine: Posterior, theirs: Posterior
) -> tuple[tuple[dict[str, Tensor], float], tuple[dict[str, Tensor], float], str, list[str]]:
    """Chances of words in documents, sum_k theta_dk phi_kv, by either method: whatever the topics are called.

    Returns
    -------
    Draws (S,) of each chance and how many of them count, for either; what they are; what speaks against using them.
    """
    form = theirs.problem.admixture
    documents = form.documents(theirs.problem.kwargs)
    places = []
    for d in range(len(documents)):
        own = slice(documents.starts[d], documents.starts[d + 1])
        often = np.argsort(-documents.counts[own], kind="stable")[:WORDS]
        places += [(d, int(v)) for v in documents.words[own][often]]
    tables = []
    for posterior in (mine, theirs):
        theta, beta = shares(posterior), posterior.draws[form.topics].double()
        steps = np.linspace(0, len(beta) - 1, min(len(beta), len(theta))).round().astype(int)
        # A drifting model keeps the logarithms of its topics, slice by slice.
        phi = (
            beta[steps].softmax(-1)
            if form.walk
            else beta[steps].reshape(len(steps), form.num_topics, 1, form.num_words)
        )
        picked = theta.mean(0, keepdim=True) if len(beta) == 1 else theta[: len(steps)]
        when = documents.times if form.walk else np.zeros(len(documents), dtype=int)
        chance = torch.stack([(picked[:, d] * phi[:, :, int(when[d]), v]).sum(-1) for d, v in places], -1)
        tables.append({f"p(word {v} | document {d})": chance[:, i] for i, (d, v) in enumerate(places)})
    by_chain = torch.stack(list(tables[1].values()), -1).reshape(theirs.chains, -1, len(places)).numpy()
    found = rhat_ess({"p": by_chain})
    doubts = [] if found["rhat"] <= 1.1 else [f"the chains of the replica did not settle (R-hat {found['rhat']:.2f})"]
    count = math.inf if len(next(iter(tables[0].values()))) == 1 else float(len(next(iter(tables[0].values()))))
    return (tables[0], count), (tables[1], max(found["ess_bulk"], 1.0)), "chances of words in documents", doubts


def shares(posterior: Posterior) -> Tensor:
    """Draws of the documents' shares, (S, D, K), one for each draw of the topics."""
    from .topics.weights import dirichlet_draws

    form = posterior.problem.admixture
    if form.theta in posterior.draws:
        theta = posterior.draws[form.theta].double()
        return theta.reshape(len(theta), -1, form.num_topics)
    if "theta.concentration" not in posterior.extra.get("topics", {}):
        raise NoSecondError("documents were read piece by piece, and their shares are not kept")
    concentration = posterior.extra["topics"]["theta.concentration"].double()
    if posterior.num_draws == 1:
        return (concentration / concentration.sum(-1, keepdim=True))[None]
    return dirichlet_draws(concentration, min(posterior.num_draws, 1000), posterior.seed)


# -- rows under networks -------------------------------------------------------------------------------------------------


def guided_rows(
    posterior: Posterior, partner: Second
) -> tuple[Problem, int, dict[str, float], dict[str, float], dict[str, float], list[str]]:
    """Posterior means of the rows' latents by the guide, corrected by weights, and by normals fitted row by row."""
    from .local import row_integral
    from .refinement import bounds, refine

    problem = posterior.problem
    total = int(problem.structure.num_rows or 1)
    generator = torch.Generator().manual_seed(problem.seed)
    rows = some_rows(total, min(total, WITH_LATENTS), generator).sort().values
    kwargs = take_rows(problem.kwargs, problem.structure.row_arguments, rows)
    fitted = refine(posterior, kwargs, 200, False)
    with problem.scope(problem.seed), torch.no_grad():
        guide: Any = row_integral(posterior, posterior.some_draws(1)[0], kwargs, ROW_DRAWS)
        weights, kept = guide._weights(kwargs, keep=True)
        by_guide = {n: torch.stack([k[n] for k in kept]).flatten(2) for n in kept[0]}
        free, log_q = drawn(fitted, ROW_DRAWS)
        own = bounds(fitted.rows, free, log_q)
        values = [fitted.rows.log_rows(f)[1] for f in free]
        by_normal = {n: torch.stack([v[n] for v in values]).flatten(2) for n in values[0]}
    khat = [float(np.median([pareto_khat(w.double().numpy()) for w in table.T])) for table in (weights, own)]
    doubts = (
        [f"the median k-hat of the rows is {max(khat):.2f}: their weights decide nothing"] if max(khat) > 0.7 else []
    )
    gaps, errors, ratios = {}, {}, {}
    for name in by_normal:
        mean, sd, ess = weighted(by_normal[name], own)
        other, other_sd, other_ess = weighted(by_guide[name], weights)
        for j in range(mean.shape[-1]):
            gap = (other[:, j] - mean[:, j]) / sd[:, j]
            noise = 1 / ess + 1 / other_ess
            rms = float(gap.square().mean().sqrt())
            entry = f"{name}[{j}]"
            gaps[entry], errors[entry] = rms, float(noise.mean().sqrt())
            ratios[entry] = float((other_sd[:, j] / sd[:, j]).median())
    return problem, len(rows), gaps, errors, ratios, doubts


def drawn(fitted: Any, count: int) -> tuple[Tensor, Tensor]:
    """Draws (S, N, L) of the rows' normals, somewhat wider than these, and the log density of each (S, N)."""
    wide = 1.2 * fitted.factor
    noise = torch.randn(count, *fitted.loc.shape, dtype=fitted.loc.dtype)
    log_det = wide.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_q = -0.5 * (noise.square().sum(-1) + fitted.loc.shape[-1] * math.log(2 * math.pi)) - log_det
    return fitted.loc + (wide @ noise.unsqueeze(-1)).squeeze(-1), log_q


def weighted(draws: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sd (N, L) of draws (S, N, L) under weights (S, N), and how many of the draws count (N,)."""
    w = log_weights.softmax(0)
    mean = (w.unsqueeze(-1) * draws).sum(0)
    sd = (w.unsqueeze(-1) * (draws - mean).square()).sum(0).sqrt().clamp_min(1e-12)
    return mean, sd, (1 / w.square().sum(0)).clamp_min(1.0)
