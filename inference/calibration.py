"""Is an inference right? Simulation-based calibration of any story under any method that gives draws.

Parameters come from the prior, data from the story, draws from the method; then the truth's rank among the draws is
uniform, whatever the story (Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
2018). The likelihood of the data is one of the quantities: ranks of parameters alone cannot tell a posterior from the prior
(Modrák et al., *SBC with data-dependent test quantities*, Bayesian Analysis 2023). Uniformity is judged on the whole
empirical distribution of the ranks (Säilynoja, Bürkner and Vehtari, *Graphical test for discrete uniformity*, Statistics and
Computing 2022), and over all quantities after Holm (1979).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .methods.base import Method

#: Simulations of uniform ranks that tell how far an empirical distribution may stray.
NULL = 20_000


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
    """

    method: Method
    ranks: dict[str, NDArray]
    draws: int
    p_values: dict[str, float]
    adjusted: dict[str, float]
    notes: list[str] = field(default_factory=list)
    level: float = 1e-3

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

    def shape(self, name: str) -> str:
        """What the ranks of one quantity look like, in words."""
        u = (self.ranks[name] + 0.5) / (self.draws + 1)
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
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def plot(self, most: int = 12) -> Figure:
        """Empirical distribution of the ranks less the uniform one, with the band that a right method keeps to."""
        from .plots import calibration_figure

        return calibration_figure(self, most)


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
    from .choose import check_request, choose
    from .fit import fit
    from .methods.base import positive_int
    from .problem import prepare
    from .session import fresh_seed
    from .simulated import dreamed, from_arguments, quantities

    positive_int("check", "simulations", simulations)
    positive_int("check", "draws", draws)
    seed = fresh_seed() if seed is None else seed
    data = from_arguments(story, arguments, seed) if data is None else data
    problem = prepare(story, data, seed=seed, want="posterior")
    choice = choose(problem.structure, "posterior") if method == "auto" else check_request(problem.structure, method)
    chosen = choice.method
    if chosen.name == "em":
        raise ValueError("check needs draws, and EM gives points; use method='nuts', 'svi' or 'exact'")
    found: dict[str, list[float]] = {}
    unsettled = 0
    shown = sys.stderr.isatty() if progress is None else progress
    for s in tqdm(range(simulations), desc="calibration", unit="fit", disable=not shown, leave=False):
        with problem.scope(seed + 1 + s):
            kwargs, truth = dreamed(problem)
        posterior = fit(story, kwargs, chosen, seed=seed + 1 + s, progress=False)
        unsettled += any("R-hat" in w or "k-hat" in w or "diverged" in w for w in posterior.warnings)
        rng = np.random.default_rng([seed, s])
        for name, rank in quantities(posterior, truth, draws, rng).items():
            found.setdefault(name, []).append(rank)
    ranks = {n: np.array(v) for n, v in found.items() if len(v) == simulations}
    null = evenness(np.random.default_rng(seed).integers(0, draws + 1, (NULL, simulations)), draws)
    p = {n: float((1 + (null <= evenness(r[None], draws)[0]).sum()) / (NULL + 1)) for n, r in ranks.items()}
    notes = [f"in {unsettled} of {simulations} fits the method itself warned about its draws"] if unsettled else []
    if floor := holm({n: 1 / (NULL + 1) for n in ranks}):
        smallest = min(floor.values())
        if smallest > Calibration.level:
            notes.append(f"with {len(ranks)} quantities no adjusted probability can fall below {smallest:.2g}")
    return Calibration(chosen, ranks, draws, p, holm(p), notes, max(Calibration.level, 1.01 * smallest if ranks else 0))


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


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Probabilities adjusted for their number (Holm, *A simple sequentially rejective multiple test procedure*, 1979)."""
    order = sorted(p_values, key=lambda n: p_values[n])
    found, worst = {}, 0.0
    for i, name in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - i) * p_values[name]))
        found[name] = worst
    return {name: found[name] for name in p_values}
