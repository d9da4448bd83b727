"""The one answer type: what is known about the latents, however it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .joint import LogJoint
from .methods.base import positive_int
from .problem import Problem, brought_home
from .score import ROW_DRAWS

if TYPE_CHECKING:
    from .amortised import Recogniser
    from .choose import Choice
    from .collapse import Units
    from .crosscheck import CrossCheck
    from .methods.base import Method
    from .predict import Imputation
    from .refinement import Refinement
    from .score import Ladder, Score
    from .summary import Summary


@dataclass(frozen=True, repr=False)
class Posterior:
    """Posterior of one story given one data set.

    Attributes
    ----------
    kind
        "exact", "samples", "variational" or "point": what the numbers are.
    method
        The configured method that answered.
    draws
        Name -> (draws, ...shape): continuous latents (and learned parameters), chain after chain; a point is one draw.
        Components of mixtures are matched across draws, so that `mu[:, k]` is one component throughout.
    chains
        Number of chains among the draws.
    history
        Objective by iteration: log joint (EM), ELBO (SVI); empty for NUTS.
    diagnostics, warnings
        What the method can say about its own answer, and what to distrust.
    timings
        Seconds of "setup", "warmup", "run", "total" and "peak_memory" in MB.
    sample_stats
        Per-draw statistics of a sampler, (chains, draws).
    converged
        False where a budget, Ctrl-C or the iteration limit ended the run.
    cross_check
        How far an independent second method on a small replica ended from this one; None where nobody asked.
    """

    kind: str
    method: Method
    problem: Problem
    draws: dict[str, Tensor]
    chains: int = 1
    history: list[float] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    sample_stats: dict[str, np.ndarray] = field(default_factory=dict)
    converged: bool = True
    choice: Choice | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    cross_check: CrossCheck | None = None

    # -- what ran and why --------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """Seed that repeats this answer."""
        return self.problem.seed

    @property
    def structure(self) -> Any:
        """What `inspect` read of the story."""
        return self.problem.structure

    @property
    def num_draws(self) -> int:
        """Draws over all chains."""
        return len(next(iter(self.draws.values()))) if self.draws else 1

    @cached_property
    def joint(self) -> LogJoint:
        """Log joint density of the story and the fitted data."""
        with self.problem.scope(self.seed):
            return LogJoint(self.problem)

    @cached_property
    def recogniser(self) -> Recogniser | None:
        """The fitted guide, where it guesses the latents of a row from the row itself; else None."""
        from .amortised import recogniser

        with self.problem.scope(self.seed):
            return recogniser(self)

    def why(self) -> str:
        """The method that ran, the rule that chose it, the other methods' verdicts with their premises, device, cross-check."""
        device = [f"{n}: {self.diagnostics[n]}" for n in ("device", "ran") if n in self.diagnostics]
        told = str(self.choice or f"{self.method.name}: called directly")
        return "\n".join([told, self.second_opinion(), *device])

    def second_opinion(self) -> str:
        """What a second method found, in a line, or that none was asked and which line asks it."""
        from .crosscheck import not_checked

        return self.cross_check.line if self.cross_check else not_checked(self)

    def cross_checked(self, method: str | Method | bool = True, *, progress: bool | None = None) -> Posterior:
        """The same answer, held beside that of an independent second method on a small replica.

        Both methods see the same rows (all, where they are few), story, priors and seed. Means are compared in posterior sd,
        on what neither the numbering of components nor the rotation of factors changes. Under networks the weights are held
        as fitted and the rows' latents are found a second time, without the guide.

        Parameters
        ----------
        method
            The second method: True chooses the strongest that is valid and quick, or a name or configured method.
        progress
            A progress bar; None shows it on a terminal.

        Returns
        -------
        A copy with `cross_check` filled, and a warning in front where the two disagree.

        Raises
        ------
        ValueError
            `method` is not valid for the story, or is the one that answered.
        """
        from .crosscheck import cross_check

        return self.with_check(cross_check(self, method, progress))

    def against(self, reference: Posterior | Mapping[str, Any]) -> CrossCheck:
        """How far this answer lies from one that is known to be right, in its posterior sd.

        Parameters
        ----------
        reference
            Another answer to the same data, or independent draws: site -> (draws, ...shape), some sites or all.
        """
        from .reference import against

        return against(self, reference)

    def with_check(self, found: CrossCheck) -> Posterior:
        """A copy with this cross-check, and what it warns of in front."""
        old = self.cross_check.warnings if self.cross_check else []
        kept = [w for w in self.warnings if w not in old]
        timings = {**self.timings, "cross_check": found.seconds}
        return replace(self, cross_check=found, warnings=[*found.warnings, *kept], timings=timings)

    def brought_home(self) -> Posterior:
        """The same answer in the processor's memory."""
        problem = self.problem
        if problem.device.type == "cpu":
            return self
        parts = {n: tree_map_only(Tensor, Tensor.cpu, getattr(self, n)) for n in ("draws", "diagnostics", "extra")}
        return replace(self, problem=brought_home(problem), **parts)

    def finished(self) -> Posterior:
        """Match exchangeable components across draws, then judge convergence on the matched draws."""
        from .labels import match_labels
        from .rotations import invariants, rotating_axes

        draws, axes = match_labels(self)
        diagnostics, warnings = dict(self.diagnostics), list(self.warnings)
        if axes:
            diagnostics["exchangeable"] = {name: list(a) for name, a in axes.items()}
        turning = rotating_axes(LogJoint(self.problem.thumbnail)) if self.structure.linear_gaussian else {}
        if turning:
            diagnostics["rotating"] = turning
        if self.kind == "samples":
            from .diagnostics import rhat_ess, rhat_warnings
            from .restarts import of_chains

            fixed = invariants(draws, turning, {b.name for b in self.joint.blocks if b.local})
            by_chain = {n: d.reshape(self.chains, -1, *d.shape[1:]).cpu().numpy() for n, d in fixed.items()}
            convergence = rhat_ess(by_chain)
            diagnostics.update(convergence)
            warnings = rhat_warnings(by_chain, convergence) + warnings
            if self.chains > 1 and by_chain:
                stats = self.sample_stats
                diagnostics["restarts"] = of_chains(by_chain, stats.get("lp", stats.get("log_likelihood")))
        notes = [n for n in self.problem.structure.notes if n not in warnings]
        return replace(self, draws=draws, diagnostics=diagnostics, warnings=warnings + notes)

    # -- questions ---------------------------------------------------------------------------------------------------

    def draw(self, index: int) -> dict[str, Tensor]:
        """One draw of every continuous latent and parameter, in the story's precision."""
        return {name: self.in_precision(value[index]) for name, value in self.draws.items()}

    def in_precision(self, value: Tensor) -> Tensor:
        """Numbers as the story runs with them: samplers keep theirs in double precision."""
        return value.to(self.problem.dtype) if value.is_floating_point() else value

    def some_draws(self, most: int = ROW_DRAWS) -> list[int]:
        """Indices of at most `most` draws, evenly spaced."""
        return torch.linspace(0, self.num_draws - 1, min(most, self.num_draws)).round().long().tolist()

    def local(self, site: str, data: Any = None, *, draws: int | None = None) -> Tensor:
        """Posterior of a local latent.

        Parameters
        ----------
        site
            Name of a latent inside the data plate.
        data
            New rows, as for `fit`; None for the fitted ones.
        draws
            Draws of the globals to average over; None takes 200, and above 500,000 rows fewer, 20 at least.

        Returns
        -------
        Probabilities (rows, ..., states) for a finite latent, always the posterior's; draws (draws, rows, ...event)
        for a continuous one.

        Raises
        ------
        ValueError
            The site is unknown, observed or global.
        """
        from .local import local_posterior

        return local_posterior(self, site, data, draws)

    def log_prob(self, data: Any = None, *, draws: int | None = None) -> Tensor:
        """log p(x_n | fitted data) of every row, local latents summed or integrated out: (rows,).

        Points: the plug-in density at the point. Draws: log of the mean density over `draws` of them (None: as for `local`).
        `score` gives the same with its estimator, standard error, bound side and the rows that are not to be trusted; this
        warns where these are too many for the sum over rows.
        """
        import warnings

        from .score import ScoreNotice

        found = self.score(data, draws=draws)
        if found.warning:
            warnings.warn(found.warning, ScoreNotice, stacklevel=2)
        return found.rows

    def score(self, data: Any = None, *, draws: int | None = None) -> Score:
        """Log density of rows, with the estimator's name, its Monte Carlo error and which side it errs to."""
        from .score import score

        return score(self, data, draws)

    def ladder(self, data: Any = None, *, draws: int = 1000, k: int = 50) -> Ladder:
        """ELBO, IWAE(k) and importance-sampled log p(x_n | fitted data) of rows, each at least as high as the one before.

        Parameters
        ----------
        data
            New rows, as for `fit`; None for the fitted ones.
        draws
            Draws of the row's latents, from the fitted guide where it reads rows, else from a Laplace approximation.
        k
            Draws of a block of the middle bound.

        Raises
        ------
        ValueError
            Rows have no continuous latents of their own: `log_prob` is then no estimate of an integral over them.
        """
        from .local import row_ladder

        positive_int("ladder", "draws", draws)
        return row_ladder(self, data, draws, k)

    def units(self, data: Any = None) -> dict[str, Units]:
        """How much each unit of the codes says of its row: its divergence from the prior, and whether it is active.

        Parameters
        ----------
        data
            New rows, as for `fit`; None for the fitted ones.

        Raises
        ------
        ValueError
            The fit has no guide that reads rows, or a divergence has no closed form.
        """
        from .collapse import units

        return units(self, data)

    def refine(self, data: Any = None, *, steps: int = 300, progress: bool | None = None) -> Refinement:
        """Fit the latents of single rows from the guide's guess on, and report the amortisation gap.

        Parameters
        ----------
        data
            New rows, as for `fit`; None for the fitted ones.
        steps
            Of Adam, for all rows at once.
        progress
            A progress bar; None shows it on a terminal.

        Raises
        ------
        ValueError
            The fit has no guide that reads rows.
        """
        import sys

        from .refinement import refine

        positive_int("refine", "steps", steps)
        return refine(self, data, steps, sys.stderr.isatty() if progress is None else progress)

    def sample(self, num: int = 100, *, seed: int | None = None) -> dict[str, Tensor]:
        """New rows from the posterior predictive distribution: every local site, (num, ...event) each."""
        from .predict import sample_rows

        positive_int("sample", "num", num)
        return sample_rows(self, num, seed)

    def predict(self, data: Any = None, *, draws: int = ROW_DRAWS, seed: int | None = None) -> dict[str, Tensor]:
        """Draws of every observed site for rows with the given covariates: (draws, rows, ...event) each."""
        from .predict import predict

        return predict(self, data, draws, seed)

    def impute(self, data: Any = None, *, draws: int = ROW_DRAWS, seed: int | None = None) -> Imputation:
        """Missing cells (NaN) of the fitted or of new rows: posterior means, intervals and draws."""
        from .predict import impute

        return impute(self, data, draws, seed)

    # -- tables, figures, files --------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Table of the globals (mean, sd, 5 %, 95 %, R-hat, ESS), warnings first."""
        from .summary import summarise

        return summarise(self)

    def to_arviz(self) -> Any:
        """`xarray.DataTree` with posterior, pointwise log-likelihood, observed data and sample statistics."""
        from .arviz_io import to_datatree

        return to_datatree(self)

    def plot_history(self, ax: Any = None) -> Any:
        """Objective by iteration (EM, SVI) or log density by draw (NUTS)."""
        from .plots import plot_history

        return plot_history(self, ax)

    def plot_density(self, names: list[str] | None = None) -> Any:
        """Marginal posterior of every global entry."""
        from .plots import plot_density

        return plot_density(self, names)

    def plot_data(self, columns: tuple[int, int] = (0, 1), ax: Any = None) -> Any:
        """Rows in two columns, coloured by the posterior of the finite local latent."""
        from .plots import plot_data

        return plot_data(self, columns, ax)

    def plot_plane(self, points: int = 200, *, seed: int | None = None) -> Any:
        """Density of rows of two columns on a grid, and new rows beside the fitted ones."""
        from .plane import plot_plane

        return plot_plane(self, points, seed)

    def save(self, path: str | Path) -> Path:
        """Write draws and a card (safetensors with JSON, checksummed) to one file, atomically."""
        from .checkpoint import save

        return save(self, path)

    def __repr__(self) -> str:
        from .summary import network_weights

        lines = []
        if self.warnings:
            lines += [f"warning: {w}" for w in self.warnings]
        rows = self.structure.num_rows
        where = f" given {rows} rows" if rows else ""
        size = f"{self.num_draws} draws" + (f" in {self.chains} chains" if self.chains > 1 else "")
        what = {"point": "point estimate", "exact": "exact posterior"}.get(self.kind, f"{self.kind}, {size}")
        state = "" if self.converged else ", not converged"
        lines.append(f"Posterior by {self.method.name.upper()}: {what}{where}{state} (seed {self.seed})")
        for name, count in network_weights(self).items():
            lines.append(f"  {name:<12} a network of {count:,} weights")
        for name, value in self.draws.items():
            lines.append(f"  {name:<12} {tuple(value.shape[1:])!s:<12} mean {_preview(value.double().mean(0))}")
        finite = [s.name for s in self.structure.finite]
        if finite:
            lines.append(
                f"  summed out   {', '.join(finite[:6])}{', ...' if len(finite) > 6 else ''}: posterior.local({finite[0]!r})"
            )
        return "\n".join(lines)


def _preview(mean: Tensor) -> str:
    flat = mean.flatten()
    shown = ", ".join(f"{v:.3g}" for v in flat[:6].tolist())
    return f"[{shown}{', ...' if len(flat) > 6 else ''}]" if flat.numel() > 1 else shown
