"""A second opinion: another method on a small replica of the problem, and how far the two answers lie apart.

Diagnostics of one method see only what that method can see of itself. Two methods that share neither algorithm nor
assumptions rarely make the same mistake, so that their agreement on a replica (some of the rows, the same story, the same
priors) is evidence for the method, and their disagreement tells which number to doubt.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .agreement import agree

if TYPE_CHECKING:
    from .methods.base import Method
    from .posterior import Posterior
    from .replica import Second

#: Posterior sd between two means beyond which answers disagree; and of a point, which is a mode and no mean.
LIMIT, POINT_LIMIT = 0.5, 2.0
#: Monte-Carlo standard errors that a gap may have for nothing.
ERRORS = 3.0
#: Ratio of sds, and its inverse, beyond which spreads disagree.
SPREAD = 1.5
#: Ratio of chains' spreads from which a sampler's draws decide nothing.
SETTLED_RHAT = 1.05
#: Seconds that a second opinion may take where nobody asked for it.
CHEAP = 10.0
#: Draws of the reference whose log joint a mode must beat.
RIVALS = 50
#: The more a kind promises, the earlier it stands.
STRENGTH = ("exact", "samples", "variational", "point")


@dataclass(frozen=True, repr=False)
class CrossCheck:
    """Two methods' answers to one replica.

    Attributes
    ----------
    first, second
        The method in question, and the one beside it.
    reason
        Why that one.
    rows, total
        Rows of the replica, and of the data; None where the data are no rows.
    what
        What was compared, in words.
    gaps
        Entry -> distance of the means in posterior sd.
    errors
        Entry -> Monte-Carlo standard error of that distance.
    ratios
        Entry -> sd by the first method / sd by the second; empty for points.
    limit
        Distance that counts as disagreement, once Monte-Carlo error is allowed for.
    doubts
        Why the comparison decides nothing, where it does not.
    rival
        Nats by which a draw of the second method lies above the first one's mode; 0 where none does.
    refused
        Why nothing could be compared; empty where it could.
    seconds
        What it took.
    """

    first: str
    second: str = ""
    reason: str = ""
    rows: int | None = None
    total: int | None = None
    what: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    limit: float = LIMIT
    doubts: list[str] = field(default_factory=list)
    rival: float = 0.0
    refused: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> str:
        """The entry whose means lie furthest apart beyond Monte-Carlo error; empty where there is none."""
        return max(self.gaps, key=self.excess, default="")

    @property
    def gap(self) -> float:
        """Distance of the means of that entry in posterior sd."""
        return self.gaps[self.worst] if self.gaps else math.nan

    @property
    def ratio(self) -> float:
        """Median ratio of the sds, NaN for a point."""
        values = sorted(self.ratios.values())
        return values[len(values) // 2] if values else math.nan

    def excess(self, entry: str) -> float:
        """Distance less what Monte-Carlo error explains."""
        return self.gaps[entry] - ERRORS * self.errors.get(entry, 0.0)

    @property
    def verdict(self) -> str:
        """ "agrees", "disagrees", "undecided" or "not made"."""
        if self.refused:
            return "not made"
        if self.doubts:
            return "undecided"
        apart = any(self.excess(n) > self.limit for n in self.gaps)
        return "disagrees" if apart or self.rival > 0 else "agrees"

    @property
    def where(self) -> str:
        """On how many rows."""
        if self.rows is None:
            return "the same data"
        return f"{self.rows:,} of {self.total:,} rows" if self.rows != self.total else f"all {self.rows:,} rows"

    @property
    def warnings(self) -> list[str]:
        """What to distrust, for the head of a summary."""
        if self.verdict in ("not made", "undecided"):
            return []
        found = []
        if self.verdict == "disagrees":
            found.append(f"{self.line} ({self.second}: {self.reason})")
        odd = [n for n, r in self.ratios.items() if not 1 / SPREAD <= r <= SPREAD]
        if odd:
            far = max(odd, key=lambda n: abs(math.log(max(self.ratios[n], 1e-12))))
            found.append(
                f"cross-check: on {self.where} the spread of {len(odd)} of {len(self.ratios)} entries is another by "
                f"{self.first} than by {self.second}: the sd of {far} is {self.ratios[far]:.2g} times as large"
            )
        return found

    @property
    def line(self) -> str:
        """All of it in one line."""
        if self.refused:
            return f"not cross-checked: {self.refused}"
        word = {"agrees": "agree", "disagrees": "DISAGREE", "undecided": "could not be held side by side"}[self.verdict]
        text = f"cross-check: {self.first} and {self.second} {word} on {self.where}"
        if self.gaps:
            error = self.errors.get(self.worst, 0.0)
            gap = f"{self.gap:.2g} ± {error:.1g} posterior sd"
            text += f": {self.what or 'means'} at most {gap} apart (in {self.worst})"
        if self.ratios:
            text += f", sds {self.ratio:.2f} times as large"
        if self.rival > 0:
            text += f"; a draw of {self.second} lies {self.rival:.3g} nats above the mode of {self.first}"
        return text + "".join(f"; {d}" for d in self.doubts)

    @property
    def cell(self) -> str:
        """In a table."""
        return "not made" if self.refused else f"{self.verdict}, {self.gap:.2g} sd ({self.second})"

    def __repr__(self) -> str:
        if self.refused:
            return self.line
        lines = [self.line, f"  {self.second}: {self.reason}"]
        for name in sorted(self.gaps, key=self.excess, reverse=True)[:5]:
            ratio = f", sd ratio {self.ratios[name]:.2f}" if name in self.ratios else ""
            lines.append(f"  {name:<20} {self.gaps[name]:.3f} ± {self.errors.get(name, 0.0):.3f} sd{ratio}")
        if len(self.gaps) > 5:
            lines.append(f"  and {len(self.gaps) - 5} entries that lie closer")
        return "\n".join([*lines, f"  {self.seconds:.1f} s"])

    def card(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def cross_check(posterior: Posterior, second: str | Method | bool = True, progress: bool | None = None) -> CrossCheck:
    """Run a second method beside the one that answered, on a small replica; see `Posterior.cross_checked`."""
    from .replica import NoSecondError, chosen_second

    began = time.perf_counter()
    progress = sys.stderr.isatty() if progress is None else progress
    first = posterior.method.name.upper()
    try:
        partner = chosen_second(posterior, second)
        found = ROUTES[partner.route](posterior, partner, progress)
    except NoSecondError as error:
        return CrossCheck(first, refused=str(error))
    return replace(found, seconds=time.perf_counter() - began)


def by_refit(posterior: Posterior, partner: Second, progress: bool) -> CrossCheck:
    """Both methods on the same rows, with the same seed."""
    from .replica import answered, replica

    problem = replica(posterior, partner)
    rows, total = problem.structure.num_rows, posterior.structure.num_rows
    whole = rows == total
    mine = posterior if whole else answered(problem, settings_of(posterior.method), progress)
    theirs = answered(problem, partner.method, progress, partner.seconds)
    kept = CrossCheck(
        posterior.method.name.upper(),
        theirs.method.name.upper(),
        partner.reason,
        rows if problem.structure.row_arguments else None,
        total,
    )
    if problem.admixture is not None:
        from .replica import word_chances

        return side_by_side(kept, *word_chances(mine, theirs))
    return held(kept, mine, theirs)


def beside(posterior: Posterior, others: Iterable[Posterior], always: bool) -> CrossCheck | None:
    """Another method's answer to the same data as the second opinion, where one is to be trusted.

    It has to promise as much; where it promises less its agreement is good enough, unless `always` asks for more.
    """
    if posterior.structure.admixture or not posterior.draws:
        return None
    strength, weakest = STRENGTH.index(posterior.kind), STRENGTH.index("variational")
    found = [
        p
        for p in others
        if p.method.name != posterior.method.name
        and p.draws
        and STRENGTH.index(p.kind) <= (min(strength, weakest) if always else weakest)
        and not doubts_of(p, reference=True)
    ]
    if not found:
        return None
    best = min(found, key=lambda p: STRENGTH.index(p.kind))
    rows = posterior.structure.num_rows if posterior.structure.row_arguments else None
    kept = CrossCheck(posterior.method.name.upper(), best.method.name.upper(), "compared as well", rows, rows)
    check = held(kept, posterior, best)
    dissent = STRENGTH.index(best.kind) > strength and check.verdict != "agrees"
    return None if check.refused or dissent else check


def all_seconded(posteriors: dict[str, Posterior], always: bool, show: bool, several: bool) -> dict[str, Posterior]:
    """Every answer with its cross-check, where one is to be had."""
    from .replica import cheap

    found = {}
    for label, posterior in posteriors.items():
        check = beside(posterior, posteriors.values(), always)
        if check is not None:
            found[label] = posterior.with_check(check)
        elif not several and (always or cheap(posterior, CHEAP)):
            found[label] = posterior.cross_checked(progress=show)
        else:
            found[label] = posterior
    return found


def held(kept: CrossCheck, mine: Posterior, theirs: Posterior) -> CrossCheck:
    """Two posteriors of one problem, on quantities that neither labels nor rotations change."""
    mine_is = STRENGTH.index(mine.kind) if mine.kind in STRENGTH else len(STRENGTH)
    reference, other = (mine, theirs) if mine_is < STRENGTH.index(theirs.kind) else (theirs, mine)
    found = agree(other, reference)
    if not found.gaps:
        return replace(kept, refused="the two answers share no continuous unknown that all rows share")
    errors = {n: math.hypot(error_of(other, n), error_of(reference, n)) for n in found.gaps}
    ratios = found.ratios if other is mine else {n: 1 / r for n, r in found.ratios.items() if r > 0}
    point = "point" in (mine.kind, theirs.kind)
    return replace(
        kept,
        what="the point" if point else "means",
        gaps=found.gaps,
        errors=errors,
        ratios=ratios,
        limit=POINT_LIMIT if point else LIMIT,
        doubts=[d for p in (mine, theirs) for d in doubts_of(p, p is reference)],
        rival=rival(mine, theirs),
    )


def side_by_side(
    kept: CrossCheck,
    mine: tuple[dict[str, Tensor], float],
    theirs: tuple[dict[str, Tensor], float],
    what: str,
    doubts: list[str],
) -> CrossCheck:
    """Draws (S,) of invariant quantities and how many of them count, of either method; one draw is a point."""
    (ours, count), (reference, other_count) = mine, theirs
    gaps, errors, ratios = {}, {}, {}
    for name, draws in reference.items():
        sd = float(draws.std())
        if not sd > 0:
            continue
        gaps[name] = abs(float(ours[name].mean() - draws.mean())) / sd
        errors[name] = math.hypot(1 / math.sqrt(count), 1 / math.sqrt(other_count))
        if len(ours[name]) > 1:
            ratios[name] = float(ours[name].std()) / sd
    limit = LIMIT if ratios else POINT_LIMIT
    return replace(kept, what=what, gaps=gaps, errors=errors, ratios=ratios, limit=limit, doubts=doubts)


def by_rows(posterior: Posterior, partner: Second, progress: bool) -> CrossCheck:
    """Latents of rows from the fitted guide, and from a normal fitted to every row: each corrected by importance weights."""
    from .replica import guided_rows

    problem, rows, gaps, errors, ratios, doubts = guided_rows(posterior, partner)
    return CrossCheck(
        posterior.method.name.upper(),
        "row-by-row normals",
        partner.reason,
        rows,
        problem.structure.num_rows,
        "means of the rows' latents, root mean square over rows,",
        gaps,
        errors,
        ratios,
        doubts=doubts,
    )


ROUTES = {"refit": by_refit, "rows": by_rows}


def settings_of(method: Any) -> Any:
    """The method as configured, without what belongs to the one run: files, callbacks, and starts that are other answers."""
    from dataclasses import fields, is_dataclass

    if not is_dataclass(method):
        return method
    options = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    changes: dict[str, Any] = {n: None for n in ("checkpoint", "callback") if n in options}
    if "start" in options and not isinstance(options["start"], Mapping):
        changes["start"] = None
    if "init" in options and not isinstance(options["init"], str):
        changes["init"] = "auto"
    return replace(method, **changes)  # type: ignore[type-var]


def error_of(posterior: Posterior, entry: str) -> float:
    """Monte-Carlo standard error of a mean, in posterior sd."""
    if posterior.kind == "point":
        return 0.0
    count = float(posterior.num_draws)
    if posterior.kind == "samples":
        known = posterior.diagnostics.get("ess_bulk_by_site", {}).get(entry.partition("[")[0], count)
        count = known if known > 0 else 1.0
    return 1.0 / math.sqrt(max(count, 1.0))


def doubts_of(posterior: Posterior, reference: bool) -> list[str]:
    """Why an answer is no measure of another."""
    d, name = posterior.diagnostics, posterior.method.name.upper()
    if posterior.kind == "samples" and not d.get("rhat", 1.0) <= SETTLED_RHAT:
        return [f"the chains of {name} did not settle on the replica (R-hat {d['rhat']:.2f})"]
    if reference and posterior.kind == "samples" and not posterior.converged:
        return [f"{name} did not come to its end on the replica"]
    if reference and posterior.kind == "variational" and d.get("khat", 0.0) > 0.7:
        return [f"the draws of {name} are no measure: k-hat {d['khat']:.2f}"]
    return []


def rival(mine: Posterior, theirs: Posterior) -> float:
    """Nats by which some draw of the second method beats the mode that EM reports; a mode is beaten by none."""
    from .marginal import density_of_globals

    if mine.kind != "point" or getattr(mine.method, "estimate", "") != "map" or mine.problem.admixture is not None:
        return 0.0
    if mine.structure.learned or theirs.num_draws < 2 or theirs.draws.keys() < mine.draws.keys():
        return 0.0
    with mine.problem.scope(mine.seed), torch.no_grad():
        joint = density_of_globals(mine.problem)
        own = {b.name for b in joint.blocks}

        def height(posterior: Posterior, index: int) -> float:
            values = {n: v.to(mine.problem.device, mine.problem.dtype) for n, v in posterior.draw(index).items()}
            return float(joint.density({n: v for n, v in values.items() if n in own}))

        best = max(height(theirs, i) for i in theirs.some_draws(RIVALS))
        gain = best - height(mine, 0)
    return gain if gain > 1e-3 * max(1.0, math.sqrt(abs(best))) else 0.0


def not_checked(posterior: Posterior) -> str:
    """What to say where nobody asked for a second opinion, with the line that asks for it."""
    from .replica import NoSecondError, chosen_second

    try:
        partner = chosen_second(posterior, True)
    except NoSecondError as error:
        return f"not cross-checked: {error}"
    name = "row-by-row normals" if partner.route == "rows" else partner.method.name.upper()
    return f"not cross-checked: posterior.cross_checked() or fit(..., cross_check=True) holds it beside {name}"
