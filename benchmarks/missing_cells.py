"""Missing cells: how well do fitted stories fill them, against scikit-learn's IterativeImputer?

Three tenths of the cells are hidden at random.  Every method sees the same remaining ones, and is measured on
the hidden ones: root mean square error of its mean, and log density of the truth under a normal with its mean
and standard deviation, in units of each column's standard deviation.  The settings of every method (ours:
number of components or factors; theirs: rounds, predictors, and where the standard deviation comes from) are
chosen on three separate tenths of the cells that it does see, hidden for that purpose; the hidden cells are
looked at once.

scikit-learn's standard deviation is that of repeated draws (`sample_posterior=True`), or that which the last
round's regression gives its prediction, whichever does better on the validation cells.

    python benchmarks/missing_cells.py [--quick] [--only wine]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from _peers import OURS, Report, Times, arguments, silent

HIDDEN, TENTHS, SEEDS = 0.3, 3, 3
#: Draws for means and standard deviations: of answers that are judged, of those chosen among, and if --quick.
DRAWS, FEW, QUICK_DRAWS = 200, 40, 20
PEER = "sklearn"
#: rows with NaN -> mean and standard deviation of every cell (those of seen cells are not looked at)
Filler = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Split:
    """One seed's cells: all of them, those that are hidden to judge, and every cell's tenth to choose
    settings by."""

    truth: np.ndarray
    hidden: np.ndarray
    tenth: np.ndarray

    @classmethod
    def draw(cls, x: np.ndarray, seed: int) -> Split:
        """Cells at random; columns are scaled by the cells that may be seen."""
        rng = np.random.default_rng(seed)
        hidden = rng.random(x.shape) < HIDDEN
        seen = np.where(hidden, np.nan, x)
        return cls((x - np.nanmean(seen, 0)) / np.nanstd(seen, 0), hidden, rng.integers(10, size=x.shape))

    def without(self, *more: np.ndarray) -> np.ndarray:
        """Rows without the hidden cells and without `more`."""
        return np.where(np.any([self.hidden, *more], axis=0), np.nan, self.truth)


def error_and_density(truth: np.ndarray, cells: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> tuple[float, float]:
    """Root mean square error, and mean log density of the cells under normals."""
    gap, sd = (truth - mean)[cells], np.maximum(sd[cells], 1e-6)
    density = -0.5 * np.log(2 * np.pi) - np.log(sd) - 0.5 * (gap / sd) ** 2
    return float(np.sqrt((gap**2).mean())), float(density.mean())


# -- sides ---------------------------------------------------------------------------------------------------


def fill_by_story(make: Callable[[], Any], rows: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """EM on a story, then draws of the missing cells given the seen ones of their row."""
    from inference import EM, fit

    posterior = fit(make(), rows, EM(restarts=2, tol=1e-4, max_iter=200), seed=0, device="cpu", progress=False)
    found = posterior.impute(draws=draws, seed=1)
    at = tuple(found.index.T.numpy())
    if len(found.index) != np.isnan(rows).sum():
        raise RuntimeError(f"{len(found.index)} cells were filled of {np.isnan(rows).sum()} missing ones")
    mean, sd = rows.copy(), np.zeros_like(rows)
    mean[at], sd[at] = found.mean.numpy(), found.sd.numpy()
    return mean, sd


def imputer(sample: bool, rounds: int, predictors: int | None) -> Any:
    """scikit-learn's imputer with its default regression, BayesianRidge."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    return IterativeImputer(sample_posterior=sample, max_iter=rounds, n_nearest_features=predictors, random_state=0)


def fill_by_draws(rounds: int, predictors: int | None, rows: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Moments of repeated draws from the regressions' predictive distributions, through all rounds."""
    with silent():
        chain = imputer(True, rounds, predictors).fit(rows)
        table = np.stack([chain.transform(rows) for _ in range(draws)])
    return table.mean(0), table.std(0, ddof=1)


def fill_by_regression(
    rounds: int, predictors: int | None, rows: np.ndarray, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """The imputer's own means, with the standard deviation of the last round's regression of each column."""
    with silent():
        chain = imputer(False, rounds, predictors)
        mean = chain.fit_transform(rows)
    sd = np.zeros_like(rows)
    for step in chain.imputation_sequence_[-rows.shape[1] :]:
        missing = np.isnan(rows[:, step.feat_idx])
        if missing.any():
            others = mean[missing][:, step.neighbor_feat_idx]
            sd[missing, step.feat_idx] = step.estimator.predict(others, return_std=True)[1]
    return mean, sd


def fill_by_column(rows: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The floor: every column's mean and standard deviation."""
    shape = np.ones_like(rows)
    return shape * np.nanmean(rows, 0), shape * np.nanstd(rows, 0)


def candidates(columns: int, quick: bool) -> dict[str, dict[str, Filler]]:
    """Method -> setting -> filler."""
    from zoo import GMM, PPCA, FactorAnalysis

    counts = [k for k in ((1, 3) if quick else (1, 2, 3, 5, 8, 12)) if k < columns]
    components = (1, 2) if quick else (1, 2, 3, 4)
    rounds = (10,) if quick else (10, 30)
    peer: dict[str, Filler] = {}
    for number in rounds:
        for near in (None, max(2, columns // 3)):
            setting = f"max_iter={number}, n_nearest_features={near}"
            peer[f"draws, {setting}"] = partial(fill_by_draws, number, near)
            peer[f"regression, {setting}"] = partial(fill_by_regression, number, near)
    return {
        "GMM": {f"K={k}": partial(fill_by_story, partial(GMM, k)) for k in components},
        "FactorAnalysis": {f"q={q}": partial(fill_by_story, partial(FactorAnalysis, q)) for q in counts},
        "PPCA": {f"q={q}": partial(fill_by_story, partial(PPCA, q)) for q in counts},
        PEER: peer,
        "column means": {"": fill_by_column},
    }


# -- the race ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One method on one seed: the setting chosen for each measure, what it scored, and the seconds that both
    took."""

    error_by: str
    density_by: str
    error: float
    density: float
    seconds: float


def validated(settings: dict[str, Filler], split: Split, tenths: int, draws: int) -> dict[str, tuple[float, float]]:
    """Setting -> error and log density on the cells of some tenths, each hidden in turn."""
    scores = {}
    for name, fill in settings.items():
        found = []
        for tenth in range(tenths):
            cells = ~split.hidden & (split.tenth == tenth)
            found.append(error_and_density(split.truth, cells, *fill(split.without(cells), draws)))
        errors, densities = zip(*found, strict=True)
        scores[name] = (statistics.mean(errors), statistics.mean(densities))
    return scores


def judged(settings: dict[str, Filler], scores: dict[str, tuple[float, float]], split: Split, draws: int) -> Result:
    """The settings that are best on the validation cells, by either measure, scored on the hidden cells."""
    by_error, by_density = min(scores, key=lambda n: scores[n][0]), max(scores, key=lambda n: scores[n][1])
    start = time.perf_counter()
    answers = {n: settings[n](split.without(), draws) for n in dict.fromkeys((by_error, by_density))}
    seconds = (time.perf_counter() - start) / len(answers)
    found = {n: error_and_density(split.truth, split.hidden, *answer) for n, answer in answers.items()}
    return Result(by_error, by_density, found[by_error][0], found[by_density][1], seconds)


def race(x: np.ndarray, seed: int, quick: bool) -> dict[str, Result]:
    """Every method's result on one seed, in an order that turns with it; "ours" chooses among all stories."""
    methods, split = candidates(x.shape[1], quick), Split.draw(x, seed)
    effort = (1, QUICK_DRAWS) if quick else (TENTHS, FEW)
    scores = {name: validated(settings, split, *effort) for name, settings in methods.items()}
    stories = ("GMM", "FactorAnalysis", "PPCA")
    methods[OURS] = {f"{story} {name}": fill for story in stories for name, fill in methods[story].items()}
    scores[OURS] = {f"{story} {name}": score for story in stories for name, score in scores[story].items()}
    names = list(methods)
    order = [*names[seed % len(names) :], *names[: seed % len(names)]]
    draws = QUICK_DRAWS if quick else DRAWS
    return {name: judged(methods[name], scores[name], split, draws) for name in order}


def one(report: Report, name: str, x: np.ndarray) -> None:
    """All methods on one data set."""
    quick = report.options.quick
    seeds = 1 if quick else SEEDS
    with report.case(
        f"{name} {len(x)} x {x.shape[1]}, {HIDDEN:.0%} hidden, {seeds} seed{'s' * (seeds > 1)}", unit="seed"
    ) as case:
        results = [race(x, seed, quick) for seed in range(seeds)]
        for method in results[0]:
            found = [r[method] for r in results]
            case.facts[f"{method}, error"] = statistics.mean(r.error for r in found)
            case.facts[f"{method}, log density a cell"] = statistics.mean(r.density for r in found)
            if method != "column means":
                case.facts[f"{method}, chosen"] = "; ".join(f"{r.error_by} | {r.density_by}" for r in found)
        errors = [r[OURS].error / r[PEER].error for r in results]
        gaps = [r[OURS].density - r[PEER].density for r in results]
        floor = max(r[side].error / r["column means"].error for r in results for side in (OURS, PEER))
        case.check("largest error, as a share of that of column means", floor, 1.0)
        case.times = {side: Times([r[side].seconds for r in results]) for side in (OURS, PEER)}
        case.goal("error, ours / sklearn, mean over seeds", statistics.mean(errors), 1.0, most=True)
        case.goal("log density a cell, ours less sklearn, mean over seeds", statistics.mean(gaps), 0.0)
        case.facts["error, ours / sklearn, by seed"] = [round(e, 4) for e in errors]
        case.facts["log density a cell, ours less sklearn, by seed"] = [round(g, 4) for g in gaps]


def main() -> int:
    """Both data sets."""
    from sklearn.datasets import load_breast_cancer, load_wine

    options = arguments(__doc__, repeats=1)
    report = Report(__file__, options)
    for name, load in {"wine": load_wine, "breast_cancer": load_breast_cancer}.items():
        if report.wants(name) and not (options.quick and name == "breast_cancer"):
            one(report, name, load().data)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
