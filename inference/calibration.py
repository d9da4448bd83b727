"""Is an inference right? Simulation-based calibration of any story under any method that gives draws.

Parameters come from the prior, data from the story, draws from the method; then the truth's rank among the draws is
uniform, whatever the story (Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
2018). The likelihood of the data is one of the quantities: ranks of parameters alone cannot tell a posterior from the prior
(Modrák et al., *SBC with data-dependent test quantities*, Bayesian Analysis 2023). Uniformity is judged on the whole
empirical distribution of the ranks (Säilynoja, Bürkner and Vehtari, *Graphical test for discrete uniformity*, Statistics and
Computing 2022), and over all quantities after Holm (1979).

A variational answer is rarely even: it need not be, to be of use. What matters first is whether it is off to one side, which
shows as ranks that are not symmetric (Yao, Vehtari, Simpson and Gelman, *Yes, but did it work?: evaluating variational
inference*, ICML 2018).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .methods.base import Method
    from .problem import Problem

#: Simulations of uniform ranks that tell how far an empirical distribution may stray.
NULL = 20_000
#: Adjusted probability of symmetric ranks below which a quantity counts as biased, and random mirrorings that tell it.
BIAS_LEVEL, FLIPS = 1e-2, 5_000


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of the truth among posterior draws.

    Attributes
    ----------
    method
        What was judged.
    ranks
        Quantity -> rank of the truth, 0 to `draws`, in every simulation (S,).
    draws
        Posterior draws that the truth is ranked among.
    p_values, adjusted
        Quantity -> probability of ranks as uneven as these under a right method, alone and among all quantities (Holm).
    notes
        How it came about, and what to keep in mind.
    level
        Below this adjusted probability a quantity counts as wrong.
    kind
        What the answers were: "exact", "samples" or "variational".
    asymmetry
        Unknown -> adjusted probability of ranks as lopsided as these where the answer is off to neither side.
    """

    method: Method
    ranks: dict[str, NDArray]
    draws: int
    p_values: dict[str, float]
    adjusted: dict[str, float]
    notes: list[str] = field(default_factory=list)
    level: float = 1e-3
    kind: str = "samples"
    asymmetry: dict[str, float] = field(default_factory=dict)

    @property
    def simulations(self) -> int:
        """Data sets that were simulated and answered."""
        return len(next(iter(self.ranks.values())))

    @property
    def wrong(self) -> list[str]:
        """Quantities whose ranks are not uniform."""
        return [name for name, p in self.adjusted.items() if p < self.level]

    @property
    def passed(self) -> bool:
        """Whether every quantity's ranks may be uniform."""
        return not self.wrong

    def shares(self, name: str) -> NDArray:
        """Share of the answer's mass below the truth, in every simulation: (S,)."""
        return (self.ranks[name] + 0.5) / (self.draws + 1)

    @property
    def biased(self) -> list[str]:
        """Quantities that are off to one side."""
        return [name for name, p in self.asymmetry.items() if p < BIAS_LEVEL]

    def bias(self, name: str) -> str:
        """ "overestimated", "underestimated", or nothing where neither shows."""
        if name not in self.biased:
            return ""
        return "underestimated" if self.shares(name).mean() > 0.5 else "overestimated"

    def width(self, name: str) -> str:
        """ "too narrow", "too wide", or nothing where neither shows."""
        u = self.shares(name)
        # Of a uniform variable (u - 1/2)^2 has mean 1/12 and variance 1/180; a shift is no width.
        z = ((u - u.mean()) ** 2).mean() - 1 / 12
        if abs(z) < 3 / math.sqrt(180 * len(u)):
            return ""
        return "too narrow" if z > 0 else "too wide"

    def shape(self, name: str) -> str:
        """What the ranks of one quantity look like, in words."""
        u = self.shares(name)
        error = 4 / math.sqrt(12 * len(u))
        if abs(u.mean() - 0.5) > error:
            return "draws lie too low" if u.mean() > 0.5 else "draws lie too high"
        spread = u.std() * math.sqrt(12)
        if abs(spread - 1) > 4 * 0.45 / math.sqrt(len(u)):
            return "draws spread too little" if spread > 1 else "draws spread too much"
        return "uneven" if name in self.wrong else "uniform"

    def __repr__(self) -> str:
        head = (
            f"Calibration of {self.method.name.upper()}: {self.simulations} simulations, ranks among {self.draws} draws"
        )
        width = max(len("quantity"), *map(len, self.ranks))
        lines = [head, f"  {'quantity':<{width}}  {'p':>8}  {'adjusted':>8}  ranks"]
        for name in self.ranks:
            mark = " <- wrong" if name in self.wrong else ""
            lines.append(
                f"  {name:<{width}}  {self.p_values[name]:>8.2g}  {self.adjusted[name]:>8.2g}  {self.shape(name)}{mark}"
            )
        if self.passed:
            lines.append(f"passed: no quantity is uneven at {self.level:g} after Holm's correction")
        else:
            lines.append(f"FAILED: {', '.join(self.wrong)}; the draws are not from the posterior")
        if self.kind == "variational":
            lines += self.lean()
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def lean(self) -> list[str]:
        """Where a variational answer is off, and which way."""
        width = max(len("quantity"), *map(len, self.ranks))
        lines = [f"  {'quantity':<{width}}  symmetric  off"]
        for name in self.asymmetry:
            off = ", ".join(filter(None, [self.bias(name), self.width(name)])) or "nothing shows"
            lines.append(f"  {name:<{width}}  {self.asymmetry[name]:>9.2g}  {off}")
        biased = [f"{self.bias(n)}: {n}" for n in self.biased]
        lines.append("biased: " + "; ".join(biased) if biased else "no bias shows: centres are right on average")
        return lines

    def plot(self, most: int = 12) -> Figure:
        """Empirical distribution of the ranks less the uniform one, with the band that a right method keeps to.

        Of a variational method: the ranks against their mirror image, which a method that is off to neither side repeats.
        """
        from .plots import calibration_figure, symmetry_figure

        return symmetry_figure(self, most) if self.kind == "variational" else calibration_figure(self, most)


def check(
    story: Any,
    data: Any = None,
    method: str | Method = "auto",
    *,
    simulations: int = 200,
    draws: int = 99,
    seed: int | None = 0,
    progress: bool | None = None,
    **arguments: Any,
) -> Calibration:
    """Simulation-based calibration of a method on a story.

    Parameters
    ----------
    story
        A Pyro program, or an object with `model`; its priors must be proper.
    data
        Data of the size in question, as for `fit`: covariates are kept, what is observed is replaced by draws from the story.
        None: the story is run once with `arguments` to learn its size.
    method
        As for `fit`; it must give draws (EM's points have no ranks).
    simulations
        Data sets to draw and answer.
    draws
        Posterior draws, thinned to that many, among which the truth is ranked.
    seed
        Of everything.
    progress
        A bar on stderr; None shows it on a terminal.
    **arguments
        Of the story where `data` is None: sizes, covariates.

    Raises
    ------
    ValueError
        The method gives no draws, a prior is improper, or an observed site shows no argument that can be replaced.

    Examples
    --------
    >>> print(check(story, num_data=20, method="nuts"))  # doctest: +SKIP
    """
    from .methods.base import positive_int
    from .session import fresh_seed
    from .simulated import from_arguments

    positive_int("check", "simulations", simulations)
    positive_int("check", "draws", draws)
    seed = fresh_seed() if seed is None else seed
    data = from_arguments(story, arguments, seed) if data is None else data
    problem, chosen = asked(story, data, method, seed)
    shown = sys.stderr.isatty() if progress is None else progress
    rounds = tqdm(range(simulations), desc="calibration", unit="fit", disable=not shown, leave=False)
    found = simulated_ranks(story, problem, chosen, rounds, draws, seed)
    return judged(chosen, found, simulations, draws, seed)


def asked(story: Any, data: Any, method: str | Method, seed: int) -> tuple[Problem, Method]:
    """The problem whose data are to be drawn anew, and the method in question.

    Raises
    ------
    ValueError
        The method gives no draws, or the data are too many to be drawn.
    """
    from .choose import check_request, choose
    from .lazy_rows import too_many
    from .problem import prepare

    problem = prepare(story, data, seed=seed, want="posterior")
    if too_many(problem.kwargs):
        raise ValueError(
            f"check draws every data set anew, in memory, and these are {problem.structure.num_rows:,} rows that are read as "
            f"they are needed; give it data of a size that can be drawn and fitted many times: data[:200]"
        )
    choice = choose(problem.structure, "posterior") if method == "auto" else check_request(problem.structure, method)
    if choice.method.name == "em":
        raise ValueError("check needs draws, and EM gives points; use method='nuts', 'svi' or 'exact'")
    return problem, choice.method


@dataclass
class Simulated:
    """Ranks of the truth by quantity; in how many fits the method doubted itself; the kind of answer; what was drawn."""

    ranks: dict[str, list[float]] = field(default_factory=dict)
    unsettled: int = 0
    kind: str = "samples"
    truth: Mapping[str, Any] = field(default_factory=dict)


def simulated_ranks(
    story: Any, problem: Problem, method: Method, rounds: Iterable[int], draws: int, seed: int
) -> Simulated:
    """Draw unknowns and data from the story, fit, and rank what was drawn among draws of the posterior; again and again."""
    from .fit import fit
    from .simulated import dreamed, quantities

    found = Simulated()
    for s in rounds:
        with problem.scope(seed + 1 + s):
            kwargs, found.truth = dreamed(problem)
        posterior = fit(story, kwargs, method, seed=seed + 1 + s, progress=False)
        found.kind = posterior.kind
        found.unsettled += any("R-hat" in w or "k-hat" in w or "diverged" in w for w in posterior.warnings)
        rng = np.random.default_rng([seed, s])
        for name, rank in quantities(posterior, found.truth, draws, rng).items():
            found.ranks.setdefault(name, []).append(rank)
    return found


def judged(method: Method, found: Simulated, simulations: int, draws: int, seed: int) -> Calibration:
    """How probable ranks as uneven, and as lopsided, as these are for a method without fault."""
    ranks = {n: np.array(v) for n, v in found.ranks.items() if len(v) == simulations}
    null = evenness(np.random.default_rng(seed).integers(0, draws + 1, (NULL, simulations)), draws)
    p = {n: float((1 + (null <= evenness(r[None], draws)[0]).sum()) / (NULL + 1)) for n, r in ranks.items()}
    notes = []
    if found.unsettled:
        notes.append(f"in {found.unsettled} of {simulations} fits the method itself warned about its draws")
    smallest = min(holm({n: 1 / (NULL + 1) for n in ranks}).values(), default=0.0)
    if smallest > Calibration.level:
        notes.append(f"with {len(ranks)} quantities no adjusted probability can fall below {smallest:.2g}")
    # A guide of the wrong width is off in the likelihood on one side: only the unknowns themselves can be biased.
    sites = {n: n.partition("[")[0].removesuffix("^T").split()[0] for n in ranks if " = " not in n}
    unknown = {n: ranks[n] for n, site in sites.items() if site in found.truth}
    lopsided = holm({n: asymmetry(r, draws, seed) for n, r in unknown.items()})
    level = max(Calibration.level, 1.01 * smallest)
    return Calibration(method, ranks, draws, p, holm(p), notes, level, found.kind, lopsided)


def evenness(ranks: NDArray, draws: int) -> NDArray:
    """Smallest pointwise two-sided probability of the empirical distribution of ranks (R, S), (R,): small where uneven."""
    from scipy import stats

    count = ranks.shape[1]
    least = np.ones(len(ranks))
    for z in np.unique(np.linspace(1, draws, min(draws, 50)).round().astype(int)):
        below = (ranks < z).sum(1)
        share = z / (draws + 1)
        table = np.minimum(
            stats.binom.cdf(np.arange(count + 1), count, share), stats.binom.sf(np.arange(count + 1) - 1, count, share)
        )
        least = np.minimum(least, 2 * table[below])
    return least


def asymmetry(ranks: NDArray, draws: int, seed: int = 0) -> float:
    """Probability of ranks (S,) as lopsided as these where the share of mass below the truth, u, and 1 - u are alike.

    The distance is that of Kolmogorov and Smirnov between the two; its distribution is that over random mirrorings of single
    simulations, since the two samples are one.
    """
    gap = 2 * np.asarray(ranks, dtype=np.float64) - draws
    size, sign = np.abs(gap), np.sign(gap)
    order = np.argsort(-size, kind="stable")
    size, sign = size[order], sign[order]
    ends = np.append(size[1:] != size[:-1], True)  # ties are passed together
    found = np.abs(np.cumsum(sign))[ends].max()
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], (FLIPS, len(sign)))
    null = np.abs(np.cumsum(flips * (sign != 0), 1))[:, ends].max(1)
    return float((1 + (null >= found).sum()) / (FLIPS + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Probabilities adjusted for their number (Holm, *A simple sequentially rejective multiple test procedure*, 1979)."""
    order = sorted(p_values, key=lambda n: p_values[n])
    found, worst = {}, 0.0
    for i, name in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - i) * p_values[name]))
        found[name] = worst
    return {name: found[name] for name in p_values}
