"""Several methods, one story, one table: held-out density, agreement, cost, and what to distrust."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from .agreement import Agreement, agree
from .choose import check_request
from .crosscheck import STRENGTH, all_seconded
from .distributed import first_warns, start
from .errors import DivergenceError
from .fit import fit
from .foresight import too_long
from .heldout import split
from .methods import METHODS, resolve
from .methods.base import Method
from .posterior import Posterior
from .problem import prepare
from .score import without_density
from .session import fresh_seed
from .sharing import same_call
from .structure import Structure


@dataclass(frozen=True, repr=False)
class Comparison:
    """Answers of several methods to one question.

    Attributes
    ----------
    table
        One row a method (data frame).
    posteriors
        Label -> answer, fitted to the training rows.
    refused
        Label -> reason, for methods that are not valid or failed.
    reference
        Label of the strongest method that can be trusted; agreement is measured against it.
    agreements
        Label -> agreement with the reference.
    heldout
        Label -> log density of each held-out row; empty without held-out rows.
    pairwise
        Mean difference of held-out log density for each pair, with the standard error of the paired difference.
    verdict, notes
        What the numbers say, and how they came about.
    """

    story: Any
    structure: Structure
    table: pd.DataFrame
    posteriors: dict[str, Posterior]
    refused: dict[str, str]
    reference: str
    agreements: dict[str, Agreement]
    heldout: dict[str, Tensor]
    pairwise: pd.DataFrame
    verdict: str
    seed: int
    notes: list[str] = field(default_factory=list)

    def plot(self) -> Any:
        """Held-out density, disagreeing entries and wall time, side by side: a figure."""
        from .compare_plots import plot_comparison

        return plot_comparison(self)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML file; returns its path."""
        from .report import write_report

        return write_report(self, path)

    def __str__(self) -> str:
        lines = []
        for name, posterior in self.posteriors.items():
            lines += [f"warning ({name}): {w}" for w in posterior.warnings]
        lines += [self.table_text(), ""]
        lines += [f"{name}: not run. {reason}" for name, reason in self.refused.items()]
        return "\n".join([*lines, *self.notes, f"Verdict: {self.verdict}"])

    __repr__ = __str__

    def table_text(self) -> str:
        """The table for a terminal: methods as columns, so that it never runs wide."""
        return self.table.map(cell).T.to_string()

    def _repr_html_(self) -> str:
        from html import escape

        return self.table.map(cell).T.to_html() + f"<p>{escape(self.verdict)}</p>"


def cell(value: Any) -> str:
    """A table cell in four digits, n/a where there is no number."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "n/a"
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:.4g}" if abs(number) < 1e5 else f"{number:.3e}"
    return str(value)


def compare(
    story: Any,
    data: Any,
    methods: Sequence[str | Method] | Mapping[str, str | Method] = ("exact", "em", "svi", "nuts"),
    *,
    test: Any = 0.2,
    guide: Any = None,
    seed: int | None = 0,
    device: str = "auto",
    budget: float | None = None,
    progress: bool | None = None,
    cross_check: bool | str = "auto",
) -> Comparison:
    """Fit one story with several methods on the same rows and hold the answers side by side.

    Under `torchrun` all processes work on every fit, as with `fit(..., ranks="split")`, and get the same answer.

    Parameters
    ----------
    story, data, guide, device
        As for `fit`.
    methods
        Names or configured methods, or a mapping from labels of your own to these.
    test
        Share of rows held out at random, held-out data in the form of `data`, or None for none.
    seed
        Of the split and of every fit.
    budget
        Seconds for each method. None: as long as it takes, but for samplers by their names that would take more than ten
        minutes by a timed gradient: these are not run, and the answer says what they would take.
    progress
        Progress bars; None shows them on a terminal.
    cross_check
        Hold every answer beside an independent method (`posterior.cross_check`): one of the others, where it gives draws to
        be trusted, else one on a small replica. "auto": the replica only where it takes seconds; True: always; False: never.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        No method is valid, or `test` leaves no rows.
    """
    chosen = labelled(methods)
    if cross_check not in (True, False, "auto"):
        raise ValueError(f"compare(cross_check={cross_check!r}): cross_check must be True, False or 'auto'")
    others = start("split")
    asked = {"methods": chosen, "test": test, "guide": guide, "seed": seed, "device": device, "budget": budget}
    same_call(others, "compare", story=story, **asked, cross_check=cross_check)
    seed = others.first(fresh_seed()) if seed is None else seed
    with first_warns(others):
        problem = others.together(lambda: prepare(story, data, guide=guide, device=device, seed=seed))
    train, held, notes = split(problem, data, test, seed)
    show = (sys.stderr.isatty() if progress is None else progress) and others.leads
    posteriors, refused = answers(problem, story, train, chosen, guide, seed, device, budget, show, others.several)
    if cross_check is not False:
        posteriors = all_seconded(posteriors, cross_check is True, show, others.several)
    reference = strongest(posteriors)
    agreements = {n: agree(p, posteriors[reference]) for n, p in posteriors.items() if n != reference}
    heldout = {}
    for label, posterior in posteriors.items():
        if held is not None and not without_density(posterior):
            found = posterior.score(held)
            heldout[label] = found.rows
            notes += [f"{label}: {found.warning}"] if found.warning else []
    table = others.first(table_of(posteriors, refused, heldout, agreements, reference, notes).reindex(list(chosen)))
    if problem.structure.continuous_locals and not problem.structure.linear_gaussian:
        notes.append(
            "ELPD-LOO is that of rows given their drawn latents: it flatters, compare held-out densities instead"
        )
    pairwise = paired(heldout)
    verdict = others.first(judge(posteriors, reference, agreements, heldout))  # it tells seconds
    return Comparison(
        story,
        problem.structure,
        table,
        posteriors,
        refused,
        reference,
        agreements,
        heldout,
        pairwise,
        verdict,
        seed,
        notes,
    )


def answers(
    problem: Any,
    story: Any,
    train: Any,
    chosen: dict[str, Method],
    guide: Any,
    seed: int,
    device: str,
    budget: float | None,
    show: bool,
    several: bool = False,
) -> tuple[dict[str, Posterior], dict[str, str]]:
    """Every method's answer, or the reason why there is none."""
    posteriors: dict[str, Posterior] = {}
    refused: dict[str, str] = {}
    for label, method in tqdm(chosen.items(), desc="compare", disable=not show, leave=False):
        try:
            check_request(problem.structure, method)
            if budget is None and not several and (why := too_long(problem, method)):
                raise ValueError(why)
            posteriors[label] = fit(
                story, train, method, guide=guide, seed=seed, device=device, budget=budget, progress=show
            )
        except (DivergenceError, ValueError) as error:
            refused[label] = str(error)
    if not posteriors:
        reasons = "\n".join(f"  {label}: {reason}" for label, reason in refused.items())
        raise ValueError(f"none of the methods can answer this story:\n{reasons}")
    return posteriors, refused


def labelled(methods: Any) -> dict[str, Method]:
    """Label -> configured method; two of one kind are numbered."""
    if isinstance(methods, Mapping):
        return {str(label): resolve(method) for label, method in methods.items()}
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        close = difflib.get_close_matches(str(methods), METHODS, 1)
        raise TypeError(
            f"methods must be a list such as ['em', 'nuts'], got {methods!r}{' (one name)' if close else ''}"
        )
    if not methods:
        raise ValueError(f"methods is empty; name at least one of {list(METHODS)}")
    found: dict[str, Method] = {}
    for method in map(resolve, methods):
        label, k = method.name, 2
        while label in found:
            label, k = f"{method.name} {k}", k + 1
        found[label] = method
    return found


def strongest(posteriors: dict[str, Posterior]) -> str:
    """Draws whose chains agree come before variational answers, and these before points."""

    def rank(label: str) -> tuple[int, int]:
        p = posteriors[label]
        doubtful = p.kind == "samples" and not p.diagnostics.get("rhat", 1.0) <= 1.05
        return (STRENGTH.index(p.kind) + (2 if doubtful else 0), list(posteriors).index(label))

    return min(posteriors, key=rank)


def table_of(
    posteriors: dict[str, Posterior],
    refused: dict[str, str],
    heldout: dict[str, Tensor],
    agreements: dict[str, Agreement],
    reference: str,
    notes: list[str],
) -> pd.DataFrame:
    """One row a method, those without an answer too; what is left out is noted."""
    rows: dict[str, dict[str, Any]] = {}
    for label, posterior in posteriors.items():
        loo = left_out(label, posterior, notes)
        rows[label] = table_row(posterior, heldout.get(label), agreements.get(label), label == reference, loo)
        if without_density(posterior):
            rows[label]["held-out log p"] = "n/a (no density)"
    implicit = posteriors[reference].structure.implicit
    rows |= {label: {"kind": "n/a (no density)" if implicit else "n/a (refused)"} for label in refused}
    return pd.DataFrame.from_dict(rows, orient="index")


def left_out(label: str, posterior: Posterior, notes: list[str]) -> tuple[float, float, float]:
    """Leave-one-out, NaN where there is none; that it would take too long is noted."""
    from .arviz_io import TooManyError, elpd_loo

    try:
        if posterior.kind in ("samples", "variational"):
            return elpd_loo(posterior)
    except TooManyError as error:
        notes.append(f"{label}: {error}")
    except (ValueError, TypeError):
        pass
    return math.nan, math.nan, math.nan


def table_row(
    posterior: Posterior,
    heldout: Tensor | None,
    agreement: Agreement | None,
    is_reference: bool,
    loo: tuple[float, float, float],
) -> dict[str, Any]:
    """One method's row."""
    d, t = posterior.diagnostics, posterior.timings
    return {
        "kind": posterior.kind,
        "held-out log p": float(heldout.mean()) if heldout is not None else math.nan,
        "± se": float(heldout.std() / math.sqrt(len(heldout)))
        if heldout is not None and len(heldout) > 1
        else math.nan,
        "ELPD-LOO": loo[0],
        "± se (LOO)": loo[1],
        "worst Pareto k": loo[2],
        "R-hat": d.get("rhat", math.nan),
        "ESS": d.get("ess_bulk", math.nan),
        "k-hat": d.get("khat", math.nan),
        "gap (sd)": "reference" if is_reference else (agreement.worst if agreement else math.nan),
        "sd ratio": 1.0 if is_reference else (agreement.ratio if agreement else math.nan),
        "cross-check": posterior.cross_check.cell if posterior.cross_check else "not made",
        "set-up s": t.get("setup", math.nan),
        "warm-up s": t.get("warmup", 0.0),
        "run s": t.get("run", math.nan),
        "total s": t.get("total", math.nan),
        "peak MB": t.get("peak_memory", math.nan),
        "warnings": len(posterior.warnings),
    }


def paired(heldout: dict[str, Tensor]) -> pd.DataFrame:
    """Differences of held-out log density between methods, row by row."""
    names = list(heldout)
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            gap = heldout[a] - heldout[b]
            error = float(gap.std() / math.sqrt(len(gap))) if len(gap) > 1 else math.nan
            rows.append({"methods": f"{a} - {b}", "difference": float(gap.mean()), "± se": error})
    return pd.DataFrame(rows, columns=["methods", "difference", "± se"]).set_index("methods")


def judge(
    posteriors: dict[str, Posterior], reference: str, agreements: dict[str, Agreement], heldout: dict[str, Tensor]
) -> str:
    """Plain sentences that the table bears out."""
    said = []
    for label, a in agreements.items():
        if math.isnan(a.worst):
            continue
        worst = max(a.gaps, key=lambda n: a.gaps[n])
        if a.worst <= 2:
            said.append(f"{label} agrees with {reference}: every mean within {a.worst:.2g} posterior sd")
        else:
            far = sum(g > 2 for g in a.gaps.values())
            said.append(
                f"{label} disagrees with {reference} in {far} of {len(a.gaps)} entries by more than 2 posterior sd "
                f"(most in {worst}: {a.worst:.2g})"
            )
        kind = posteriors[label].kind
        if kind == "point":
            said[-1] += "; it is a point and says nothing about uncertainty"
        elif not 0.8 <= a.ratio <= 1.25:
            said[-1] += f"; its sds are {a.ratio:.2g} times as large"
    for label, p in posteriors.items():
        d = p.diagnostics
        if p.kind == "samples" and not d.get("rhat", 1.0) <= 1.01:
            said.append(f"do not trust {label} yet: R-hat {d['rhat']:.3g}")
        if p.kind == "variational" and d.get("khat", 0.0) > 0.7 and any("k-hat" in w for w in p.warnings):
            said.append(f"do not trust the spreads of {label}: k-hat {d['khat']:.2g}")
    if len(heldout) > 1:
        best = max(heldout, key=lambda n: float(heldout[n].mean()))
        worse = []
        for label, rows in heldout.items():
            gap = heldout[best] - rows
            if label != best and float(gap.mean()) > 2 * float(gap.std() / math.sqrt(len(gap))):
                worse.append(label)
        if worse:
            said.append(
                f"held-out log density is best for {best}, and worse for {', '.join(worse)} beyond 2 standard errors"
            )
        else:
            said.append("held-out log densities do not differ beyond 2 standard errors")
    for label, p in posteriors.items():
        check = p.cross_check
        if check is None or check.refused:
            said.append(f"{label} is not cross-checked" + (f" ({check.refused})" if check else ""))
        elif check.verdict == "disagrees":
            said.append(
                f"cross-checked with {check.second}, {label} lies {check.gap:.2g} posterior sd away in {check.worst}"
            )
    fastest = min(posteriors, key=lambda n: posteriors[n].timings.get("total", math.inf))
    said.append(f"fastest: {fastest}, {posteriors[fastest].timings.get('total', math.nan):.2g} s")
    return ". ".join(s[0].upper() + s[1:] if not s.startswith(tuple(posteriors)) else s for s in said) + "."
