"""The table of an answer: what is known about each global, with what to distrust said first."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .restarts import restarts_line

if TYPE_CHECKING:
    from .posterior import Posterior

#: What Pyro writes between the name of a network and that of its weight.
NETWORK = "$$$"
#: Entries that a table lists, and entries of locals that it lists where there is nothing else.
ROWS, FEW_LOCALS = 200, 20


@dataclass(frozen=True, repr=False)
class Summary:
    """Printable summary of a posterior; `table` is the data frame behind it."""

    heading: list[str]
    warnings: list[str]
    table: pd.DataFrame

    def __str__(self) -> str:
        text = self.table.to_string(float_format=lambda v: f"{v:.4g}", na_rep="") if len(self.table) else "no globals"
        return "\n".join([*(f"warning: {w}" for w in self.warnings), *self.heading, text])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        warnings = "".join(f"<p><strong>warning:</strong> {escape(w)}</p>" for w in self.warnings)
        heading = "".join(f"<p>{escape(h)}</p>" for h in self.heading)
        return warnings + heading + self.table.to_html(float_format=lambda v: f"{v:.4g}", na_rep="")


def entries(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Indices of all entries of a value."""
    return list(itertools.product(*(range(n) for n in shape)))


def column(draws: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """All draws of one entry."""
    return draws.reshape(len(draws), -1)[:, np.ravel_multi_index(index, draws.shape[1:]) if index else 0]


def label(name: str, index: tuple[int, ...]) -> str:
    """mu[0,1]"""
    return f"{name}[{','.join(map(str, index))}]" if index else name


def summarise(posterior: Posterior) -> Summary:
    """See `Posterior.summary`."""
    rows: list[dict[str, float]] = []
    names: list[str] = []
    local = {b.name for b in posterior.joint.blocks if b.local}
    few = sum(math.prod(v.shape[1:]) for v in posterior.draws.values()) <= FEW_LOCALS
    hidden = (
        set() if local.issuperset(posterior.draws) and few else local
    )  # two arms of a trial are all there is to see
    for name, value in posterior.draws.items():
        if name in hidden:
            continue
        array = value.double().cpu().numpy()
        for index in entries(tuple(array.shape[1:])):
            if len(rows) == ROWS:
                break
            draws = column(array, index)
            names.append(label(name, index))
            if len(draws) == 1:
                rows.append({"value": draws[0]})
                continue
            row = {"mean": draws.mean(), "sd": draws.std(ddof=1)}
            row |= {"5%": np.quantile(draws, 0.05), "95%": np.quantile(draws, 0.95)}
            if posterior.kind == "samples":
                from .diagnostics import rhat_ess

                found = rhat_ess({name: draws.reshape(posterior.chains, -1)})
                row |= {"R-hat": found["rhat"], "ESS bulk": found["ess_bulk"], "ESS tail": found["ess_tail"]}
            rows.append(row)
    heading = [head_line(posterior)]
    if seen := data_line(posterior):
        heading.append(seen)
    total = sum(math.prod(v.shape[1:]) for n, v in posterior.draws.items() if n not in hidden)
    if total > len(rows):
        heading.append(f"the first {len(rows)} of {total} entries")
    heading += [f"{name} is a network of {count:,} weights" for name, count in network_weights(posterior).items()]
    for name in sorted(hidden):
        heading.append(f"{name} is local: posterior.local({name!r})")
    if several := posterior.diagnostics.get("restarts"):
        heading.append(restarts_line(several))
    heading.append(posterior.second_opinion())
    return Summary(heading, list(posterior.warnings), pd.DataFrame(rows, index=names))


def network_weights(posterior: Posterior) -> dict[str, int]:
    """How many numbers each network of the story has learned."""
    found: dict[str, int] = {}
    for site in posterior.structure.learned:
        network, divider, _ = site.name.partition(NETWORK)
        if divider:
            found[network] = found.get(network, 0) + math.prod(site.shape)
    return found


def data_line(posterior: Posterior) -> str:
    """How the data were read: which of their sides are rows."""
    structure, parts = posterior.problem.structure, []
    for name, value in posterior.problem.kwargs.items():
        shape = tuple(getattr(value, "shape", ()))
        if shape:
            rows = name in structure.row_arguments
            rest = shape[1:] if rows else shape
            inner = " x ".join(map(str, rest))
            parts.append(f"{name} ({shape[0]} rows{' of ' + inner if rest else ''})" if rows else f"{name} ({inner})")
    return f"data: {', '.join(parts)}, on {posterior.problem.device}" if parts else ""


def head_line(posterior: Posterior) -> str:
    """Kind, method and the one number that matters for it."""
    d = posterior.diagnostics
    text = f"{posterior.kind} by {posterior.method.name.upper()}, seed {posterior.seed}"
    if posterior.kind == "variational" and "elbo" in d:
        text += f"; ELBO {d['elbo']:.3f} ± {d.get('elbo_error', math.nan):.2g}, k-hat {d.get('khat', math.nan):.2f}"
    elif posterior.structure.guideless and "elbo" in d:
        text += f"; log-likelihood {d['elbo']:.3f}"
    elif "objective" in d:
        text += (
            f"; log joint {d['objective']:.3f}, log-likelihood {d['log_likelihood']:.3f}, no uncertainty of the globals"
        )
    elif posterior.kind == "samples":
        each = posterior.num_draws // posterior.chains
        text += f"; {posterior.chains} chains of {each} draws, R-hat at most {d.get('rhat', math.nan):.3f}"
    return text
