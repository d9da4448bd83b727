"""How far an answer is from the exact one, in the units of the exact one, against what its kind of answer promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .modes import Heights, find_mode
from .oracle import Oracle, solve, told_plainly
from .symmetry import Symmetries, find_symmetries

if TYPE_CHECKING:
    from ..posterior import Posterior

#: Monte Carlo errors that a right answer stays within, over all numbers of a table.
ERRORS = 5.0
#: Total variation where a method approximates the other latents of a row (shares of topics in documents of a few words).
ROUGH = 0.25
#: Draws at which row probabilities are compared one by one.
ROW_DRAWS = 40


@dataclass(frozen=True)
class Check:
    """One line of a verdict: what was compared, how far off it is, and how far off it may be."""

    what: str
    gap: float
    allowed: float
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.gap <= self.allowed)


@dataclass(frozen=True, repr=False)
class Verdict:
    """An answer beside the exact one.

    Attributes
    ----------
    checks
        What was compared.
    kind
        "exact", "samples", "variational" or "point": what was promised.
    symmetry
        What the story cannot tell apart, and so was averaged over.
    """

    checks: tuple[Check, ...]
    kind: str
    symmetry: str = ""

    @property
    def passed(self) -> bool:
        """All of it is within what the kind of answer promises."""
        return all(c.passed for c in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if not c.passed)

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        head = f"{'passed' if self.passed else 'FAILED'}: {self.kind} beside the exact answer"
        lines = [head + (f" ({self.symmetry})" if self.symmetry else "")]
        width = max((len(c.what) for c in self.checks), default=0)
        for c in self.checks:
            mark = "  " if c.passed else "! "
            line = f"  {mark}{c.what:<{width}}  off by {c.gap:9.2e} {c.unit}, allowed {c.allowed:.2e}"
            lines.append(line + (f"  ({c.note})" if c.note else ""))
        return "\n".join(lines)


def verify(posterior: Posterior, oracle: Oracle, *, means: float = 0.5, sds: float = 0.5, nats: float = 1.0) -> Verdict:
    """Compare a fitted posterior with the exact one, by the promise of its kind.

    ==========================  ============================================================================================
    exact                       closed-form means and the log evidence to 1e-6; draws within 5 Monte Carlo errors
    samples                     means and standard deviations within 5 Monte Carlo errors (effective draws)
    variational                 means within `means` sd, sds within a factor 1 + `sds`; ELBO below the log evidence, by at most
                                `nats`, and what a guide loses that takes one of the equal numberings
    point                       1e-4 nats below the highest point of the exact density, which nothing exceeds; `nats` for topic
                                models, whose expected counts are those of a bound
    row probabilities           given the same draws, equal to the listed ones to 1e-6, whatever the kind; within 0.25 where
                                other latents of the row are neither discrete nor Gaussian (topics of a document)
    learned parameters          the log density of the rows at the learned values, against the oracle at the same values
    ==========================  ============================================================================================

    Components without names and factors without a sign are averaged over all their numberings and signs first.

    Parameters
    ----------
    posterior
        From `fit`, with the story and data of the oracle.
    oracle
        From `solve`.
    means, sds, nats
        What an approximation is allowed, in exact standard deviations, as a share, and in nats.

    Raises
    ------
    ValueError
        The posterior is of another story: it lacks the oracle's sites.
    """
    draws = {n: v.detach().double() for n, v in posterior.draws.items()}
    latent = {n: v for n, v in draws.items() if n in oracle.density.places}
    if draws and not latent and not oracle.density.learned:
        raise ValueError(f"the posterior has {list(draws)} and the oracle {list(oracle.mean)}: another story?")
    if oracle.density.learned:
        there = solve(oracle.density.given_story, oracle.density.given_data, at=posterior)
        return Verdict(tuple(_rows(posterior, there) + _local_draws(posterior, there, means, sds)), posterior.kind)
    checks: list[Check] = []
    if posterior.kind == "point":
        return Verdict(
            tuple(_point(posterior, oracle, latent, nats) + _row_probabilities(posterior, oracle, latent)), "point"
        )
    with told_plainly():
        symmetry = find_symmetries(oracle.density)
    if posterior.kind == "variational":
        checks += _approximation(oracle, latent, symmetry, means, sds)
        checks += _bound(posterior, oracle, nats + math.log(len(symmetry.orbit())))
    else:
        checks += _samples(oracle, latent, symmetry, 0 if posterior.kind == "exact" else posterior.chains)
    if posterior.kind == "exact":
        checks += _closed(posterior, oracle)
    checks += _row_probabilities(posterior, oracle, latent)
    return Verdict(tuple(checks), posterior.kind, "" if symmetry.trivial else str(symmetry))


def verify_draws(draws: Mapping[str, Any], oracle: Oracle, *, chains: int = 1) -> Verdict:
    """Compare draws of any sampler with the exact posterior.

    Parameters
    ----------
    draws
        Site -> (draws, ...shape), chain after chain; continuous latents as they are, discrete ones as values of their support.
    oracle
        From `solve`.
    chains
        Number of chains among the draws; 0 for independent draws.

    Raises
    ------
    ValueError
        A site that the oracle does not know, another shape, or fewer than 20 draws.
    """
    tensors = {n: torch.as_tensor(v).double() for n, v in draws.items()}
    known = {**{n: p.shape for n, p in oracle.density.places.items()}, **oracle.density.finite_shape}
    for name, value in tensors.items():
        if name not in known:
            raise ValueError(f"the oracle knows no site {name!r}; it knows {list(known)}")
        event = oracle.density.levels[name].shape[1:] if name in oracle.density.levels else ()
        shape = (*known[name], *event)
        if tuple(value.shape[1:]) != shape or len(value) < 20:
            raise ValueError(
                f"draws of {name!r} have shape {tuple(value.shape)}, expected 20 draws or more of shape {shape} each"
            )
    with told_plainly():
        symmetry = find_symmetries(oracle.density)
    latent = {n: v for n, v in tensors.items() if n in oracle.density.places}
    checks = _samples(oracle, latent, symmetry, chains)
    for name in tensors.keys() & oracle.density.levels.keys():
        checks.append(_discrete(oracle, name, tensors[name], symmetry, chains))
    return Verdict(tuple(checks), "samples", "" if symmetry.trivial else str(symmetry))


# -- draws -----------------------------------------------------------------------------------------------------------


def _samples(oracle: Oracle, draws: Mapping[str, Tensor], symmetry: Symmetries, chains: int) -> list[Check]:
    """Means and second moments of draws, averaged over everything without a name."""
    checks = []
    moved = [g(draws) for g in symmetry.orbit()]
    for name in draws:
        exact_mean, exact_sd = oracle.mean[name], oracle.sd[name]
        unit = exact_sd.clamp_min(1e-12 * (1 + exact_mean.abs()))
        first = torch.stack([(v[name] - exact_mean) / unit for v in moved]).mean(0)
        second = torch.stack([((v[name] - exact_mean) / unit).square() for v in moved]).mean(0)
        alive = exact_sd > 1e-9 * (1 + exact_mean.abs())
        for what, series, target, label in ((first, first, 0.0, "mean"), (second, second, 1.0, "variance")):
            error, size = monte_carlo(series, chains)
            gap = (what.mean(0) - target).abs()
            allowed = ERRORS * error + 1e-6
            if label == "variance":
                gap, allowed = gap[alive], allowed[alive]
            if not gap.numel():
                continue
            worst = int((gap / allowed).argmax())
            note = f"{size.flatten()[min(worst, size.numel() - 1)]:.0f} effective draws"
            where = f" of {name}" + (f", entry {worst}" if gap.numel() > 1 else "")
            of = "sd" if label == "mean" else "of the exact variance"
            checks.append(Check(label + where, float(gap.flatten()[worst]), float(allowed.flatten()[worst]), of, note))
    return checks


def monte_carlo(series: Tensor, chains: int) -> tuple[Tensor, Tensor]:
    """Standard error of the mean of series (draws, ...) and the number of effective draws, both (...).

    Autocorrelations are added up by Geyer's initial positive sequence (*Statistical Science* 7, 1992), over the variance of all
    chains together, so that chains in different places count as few draws.  `chains` = 0: the draws are independent.
    """
    flat = series.reshape(len(series), -1)
    variance = flat.var(0).clamp_min(0)
    size = torch.full_like(variance, float(len(flat)))
    if chains:
        by_chain = flat[: len(flat) // chains * chains].reshape(chains, -1, flat.shape[1])
        n = by_chain.shape[1]
        centred = by_chain - by_chain.mean(1, keepdim=True)
        spectrum = torch.fft.rfft(centred, 2 * n, dim=1).abs().square()
        covariance = torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n].mean(0) / n
        within = covariance[0] * n / max(1, n - 1)
        between = by_chain.mean(1).var(0) if chains > 1 else torch.zeros_like(within)
        total = (n - 1) / n * within + between
        rho = 1 - (within - covariance) / total.clamp_min(1e-300)
        rho[0] = 1.0
        pairs = rho[: n // 2 * 2].reshape(-1, 2, rho.shape[1]).sum(1)
        positive = (pairs > 0).cumprod(0).bool()
        pairs = torch.where(positive, pairs, 0.0).cummin(0).values
        time = (-1 + 2 * pairs.sum(0)).clamp_min(1 / math.log10(max(11, chains * n)))
        size = chains * n / time
        variance = torch.maximum(variance, total)
    error = (variance / size).sqrt()
    return error.reshape(series.shape[1:]), size.reshape(series.shape[1:])


def _discrete(oracle: Oracle, name: str, draws: Tensor, symmetry: Symmetries, chains: int) -> Check:
    """Frequencies of draws of a discrete latent: by state, or of being together where states have no names."""
    levels = oracle.density.levels[name].double()
    event = levels.ndim - 1
    gaps = (draws.unsqueeze(draws.ndim - event) - levels).abs()
    index = gaps.flatten(gaps.ndim - event).sum(-1).argmin(-1) if event else gaps.argmin(-1)
    flat = index.flatten(1)
    if symmetry.size > 1:
        series = (flat[:, :, None] == flat[:, None, :]).double()
        exact = oracle.together(name)
        what = f"who is with whom in {name}"
    else:
        series = torch.nn.functional.one_hot(flat, len(levels)).double()
        exact = oracle.probs[name].reshape(series.shape[1:])
        what = f"probabilities of {name}"
    error, _ = monte_carlo(series, chains)
    floor = (exact * (1 - exact) / len(draws)).sqrt()
    gap, allowed = (series.mean(0) - exact).abs(), ERRORS * torch.maximum(error, floor) + 1e-6
    worst = int((gap / allowed).argmax())
    return Check(what, float(gap.flatten()[worst]), float(allowed.flatten()[worst]), "probability")


# -- other promises --------------------------------------------------------------------------------------------------


def _approximation(
    oracle: Oracle,
    draws: Mapping[str, Tensor],
    symmetry: Symmetries,
    means: float,
    sds: float,
    kind: str = "variational",
) -> list[Check]:
    """Means and standard deviations of an approximation, as far off as was allowed."""
    checks = []
    moved = [g(draws) for g in symmetry.orbit()] if draws else []
    for name in draws:
        every = torch.cat([v[name] for v in moved])
        unit = oracle.sd[name].clamp_min(1e-12 * (1 + oracle.mean[name].abs()))
        noise = 3 / math.sqrt(len(draws[name]))
        gap = ((every.mean(0) - oracle.mean[name]) / unit).abs().max()
        checks.append(Check(f"mean of {name}", float(gap), means + noise, "sd"))
        alive = oracle.sd[name] > 1e-9 * (1 + oracle.mean[name].abs())
        if bool(alive.any()) and kind != "point":
            ratio = (every.std(0) / unit)[alive].clamp_min(1e-12).log().abs().max().exp() - 1
            checks.append(Check(f"sd of {name}", float(ratio), sds + noise, "as a factor less 1"))
    return checks


def _bound(posterior: Posterior, oracle: Oracle, nats: float) -> list[Check]:
    """The ELBO stays below the log evidence, and not far."""
    if "elbo" not in posterior.diagnostics or oracle.improper:
        return []
    elbo, error = posterior.diagnostics["elbo"], posterior.diagnostics.get("elbo_error", 0.0)
    below = oracle.evidence - elbo
    return [
        Check("ELBO above the evidence", max(0.0, -below), 4 * error + 1e-6, "nats", f"ELBO {elbo:.4f}"),
        Check(
            "ELBO below the evidence", max(0.0, below), nats + 4 * error, "nats", f"log evidence {oracle.evidence:.4f}"
        ),
    ]


def _closed(posterior: Posterior, oracle: Oracle) -> list[Check]:
    """Evidence and means of a closed form."""
    checks = []
    found = posterior.diagnostics.get("log_evidence")
    if found is not None and not oracle.improper:
        checks.append(Check("log evidence", abs(float(found) - oracle.evidence), 1e-6, "nats"))
    for name, mean in posterior.diagnostics.get("mean", {}).items():
        unit = oracle.sd[name].clamp_min(1e-12 * (1 + oracle.mean[name].abs()))
        gap = ((mean.detach().double() - oracle.mean[name]) / unit).abs().max()
        checks.append(Check(f"closed-form mean of {name}", float(gap), 1e-6, "sd"))
    return checks


def _point(posterior: Posterior, oracle: Oracle, draws: Mapping[str, Tensor], nats: float) -> list[Check]:
    """How far a point is below the highest one; one that is above it proves the oracle wrong."""
    topics = bool(posterior.structure.admixture)  # expected counts are a bound's, not the density's
    estimate = getattr(posterior.method, "estimate", "map")
    with told_plainly():
        mode = oracle.mode
        if mode is None or mode.estimate != estimate or set(mode.values) != set(draws):
            mode = find_mode(oracle.density, estimate, tuple(draws))
        height = Heights(oracle.density, estimate, tuple(draws)).at({n: v[0] for n, v in draws.items()})
    gap = mode.height - height
    note = f"{estimate}: highest {mode.height:.8f}, found {height:.8f}"
    return [
        Check("nats below the highest point", max(0.0, gap), nats if topics else 1e-4, "nats", note),
        Check("nats above the highest point", max(0.0, -gap), 1e-6, "nats"),
    ]


def _row_probabilities(posterior: Posterior, oracle: Oracle, draws: Mapping[str, Tensor]) -> list[Check]:
    """p(discrete latent | the same draws, data), against listing every joint state.

    A method may condition on its draws of the rows' other latents, or integrate these out: both are right.
    """
    rows = [s.name for s in posterior.structure.finite if s.local and s.name in oracle.density.states]
    if not rows or (not draws and oracle.density.places):
        return []
    shared = {n: v for n, v in draws.items() if not posterior.structure[n].local}
    found = {name: posterior.local(name, draws=ROW_DRAWS).detach().double() for name in rows}
    best = _listed(posterior, oracle, draws, found)
    if len(shared) < len(draws) and any(not c.passed for c in best):
        others = _listed(posterior, oracle, shared, found)
        best = [a if a.gap <= b.gap else b for a, b in zip(best, others)]
    return best


def _listed(
    posterior: Posterior, oracle: Oracle, draws: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> list[Check]:
    """Row probabilities beside those of every joint state, given these draws."""
    checks = []
    which = posterior.some_draws(ROW_DRAWS) if draws else [0]
    with told_plainly():
        heights = Heights(oracle.density, "map", tuple(draws))
        each = torch.stack([heights.states_at({n: v[i] for n, v in draws.items()}).softmax(0) for i in which])
    # Other latents of the row that are neither given nor Gaussian are integrated by the method's own approximation.
    allowed = 1e-6 if heights.grids is None else ROUGH
    for name, answer in found.items():
        one_hot = torch.nn.functional.one_hot(oracle.density.states[name], len(oracle.density.levels[name])).double()
        exact = torch.einsum("s,s...->...", each.mean(0), one_hot)
        gap = 0.5 * (answer.reshape(exact.shape) - exact).abs().sum(-1).max()
        checks.append(Check(f"probabilities of {name}", float(gap), allowed, "total variation", "given the same draws"))
    return checks


def _rows(posterior: Posterior, oracle: Oracle) -> list[Check]:
    """log density of all rows at the learned parameters."""
    if oracle.improper:
        return []
    score = posterior.score(draws=4000)
    noise = float(score.monte_carlo_error.double().square().sum().sqrt())
    gap = abs(float(score.rows.double().sum()) - oracle.evidence)
    allowed = ERRORS * noise + 1e-4 * (1 + abs(oracle.evidence))
    return [Check("log density of the rows", gap, allowed, "nats", f"log evidence {oracle.evidence:.4f}")]


def _local_draws(posterior: Posterior, oracle: Oracle, means: float, sds: float) -> list[Check]:
    """Draws of the rows' latents from the fitted guide, as far off as was allowed."""
    names = [n for n in oracle.density.places if n in posterior.structure and posterior.structure[n].local]
    draws = {n: posterior.local(n).detach().double() for n in names}
    draws = {n: v.reshape(len(v), *oracle.mean[n].shape) for n, v in draws.items()}
    return _approximation(oracle, draws, Symmetries({}, 1, ()), means, sds, posterior.kind)
