r"""The E-step of a one-latent mixture as two matrix products.

Every row becomes a column of features :math:`\phi_n` (a one, and the sufficient statistics of all its sites); every
component becomes a row of natural parameters W.  Then the log joint of all rows and components is :math:`W\phi`, and the
expected sufficient statistics are :math:`r\phi^\top`: one product each, whatever the families are.  Second moments enter
as the upper triangle only.  Features are made chunk by chunk, column-major, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...data import take_rows
from ...joint import LogJoint
from .estep import Expectation, Part, expectation, slots_now
from .families import Statistics
from .plan import Plan, Term, parameters, values_of

#: Rows whose features are made and used at once: small enough for the cache.
COLUMNS = 4096
#: Feature entries that are kept between iterations instead of being made again.
KEEP = 4_000_000
#: Rows on which the kernel is held against the contraction before it is used.
TRIAL = 64


@dataclass
class Layout:
    """Where a statistic of a term lies among the features: rows start:stop, its own shape."""

    term: str
    key: str
    start: int
    stop: int
    shape: tuple[int, ...]
    triangle: bool = False


@dataclass
class MixtureKernel:
    """E-step for a story whose only finite latent is one per row and whose sites are exponential families given it.

    Parameters
    ----------
    joint, plan
        The story and its plan.
    latent
        Name of the finite latent.
    """

    joint: LogJoint
    plan: Plan
    latent: str
    layout: list[Layout] = field(default_factory=list)
    columns: list[dict[str, Statistics]] = field(default_factory=list)
    base: float = 0.0
    kept: list[Tensor] | None = None

    @classmethod
    def recognise(
        cls, joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part]
    ) -> MixtureKernel | None:
        """The kernel for a story that has this structure, or None."""
        plate = joint.structure.data_plate
        if len(joint.finite) != 1 or plate is None:
            return None
        latent = joint.finite[0]
        for term in plan.terms.values():
            family, site = term.family, joint.structure[term.name]
            if family is None or family.natural is None or site.plates != (plate,):
                return None
            if term.name == latent and (family.name != "Categorical" or term.dims or term.extra):
                return None
            if term.name != latent and term.dims != (latent,):
                return None
        if latent not in plan.terms or len(plan.terms) < 2 or (joint.structure.num_rows or 0) < 2:
            return None
        kernel = cls(joint, plan, latent)
        if not kernel.agrees(theta, parts):
            return None
        kernel.collect(theta, parts)
        return kernel

    def agrees(self, theta: dict[str, Tensor], parts: list[Part]) -> bool:
        """Trusted only after it gives what the contraction gives, on some rows."""
        kwargs, rows = parts[0].kwargs, self.joint.structure.row_arguments
        some = [Part(take_rows(kwargs, rows, slice(0, TRIAL))) if rows else Part(kwargs)]
        trial = MixtureKernel(self.joint, self.plan, self.latent)
        trial.collect(theta, some)
        found, wanted = trial(theta, some), expectation(self.joint, self.plan, theta, some)
        close = abs(found.objective - wanted.objective) <= 1e-9 * (1 + abs(wanted.objective))
        return close and all(
            torch.allclose(found.stats[t][k], wanted.stats[t][k], rtol=1e-7, atol=1e-7)
            for t in wanted.stats
            for k in wanted.stats[t]
        )

    def collect(self, theta: dict[str, Tensor], parts: list[Part]) -> None:
        """Statistics of every row once, as columns; they are views of the data where the family allows."""
        start = 1
        with torch.no_grad():
            for i, part in enumerate(parts):
                trace, names = self.joint.trace(theta, part.kwargs)
                column = {}
                for term in self.observed():
                    node = trace.nodes[term.name]
                    values = {k: v for k, (v, _) in values_of(term, node, names).items()}
                    rows = self.rows_of(part)
                    column[term.name] = {k: v.reshape(rows, -1).T for k, v in values.items() if k != "n"}
                    assert term.family is not None
                    if term.family.base is not None:
                        base_dims = node["value"].to(torch.get_default_dtype())
                        self.base += float(term.family.base(base_dims).sum())
                    if i == 0:
                        start = self.place(term, values, start)
                self.columns.append(column)

    def rows_of(self, part: Part) -> int:
        """Rows of one chunk."""
        name = self.joint.structure.row_arguments[0] if self.joint.structure.row_arguments else None
        return len(part.kwargs[name]) if name else int(self.joint.structure.num_rows or 1)

    def observed(self) -> list[Term]:
        """All terms but the latent's own."""
        return [t for t in self.plan.terms.values() if t.name != self.latent]

    def place(self, term: Term, values: Statistics, start: int) -> int:
        """Reserve feature rows for the statistics of a term."""
        assert term.family is not None
        for key, value in values.items():
            if key == "n":
                continue
            shape = tuple(value.shape[1:])
            matrix = key == "xx" and term.family.event_dims == 1
            width = shape[-1] if shape else 1
            size = (width * (width + 1) // 2 if matrix else 1) * (value[0].numel() // (width if matrix else 1))
            self.layout.append(Layout(term.name, key, start, start + size, shape, matrix))
            start += size
        return start

    def features(self, column: dict[str, Statistics], rows: slice) -> Tensor:
        """(features, rows): ones, then every statistic."""
        count = next(iter(next(iter(column.values())).values())).shape[1]
        n = len(range(*rows.indices(count)))
        out = torch.empty(self.layout[-1].stop, n, dtype=self.joint.problem.dtype, device=self.joint.problem.device)
        out[0] = 1.0
        for place in self.layout:
            value = column[place.term][place.key][:, rows]
            if not place.triangle:
                out[place.start : place.stop] = value
                continue
            width, at = place.shape[-1], place.start
            for block in value.reshape(-1, width, n):
                for i in range(width):
                    torch.mul(block[i:], block[i], out=out[at : at + width - i])
                    at += width - i
        return out

    def blocks(self) -> list[Tensor]:
        """Feature blocks of all rows, kept where they are few."""
        if self.kept is not None:
            return self.kept
        made = []
        total = 0
        for column in self.columns:
            count = next(iter(next(iter(column.values())).values())).shape[1]
            total += count
            if total * self.layout[-1].stop > KEEP:
                return []
            made += [self.features(column, slice(a, a + COLUMNS)) for a in range(0, count, COLUMNS)]
        self.kept = made
        return made

    def weights(self, theta: dict[str, Tensor], slots: dict) -> Tensor:
        """Natural parameters of every component: (states, features)."""
        states = self.joint.structure[self.latent].states or 1
        own = self.plan.terms[self.latent]
        assert own.family is not None and own.family.natural is not None
        W = torch.zeros(states, self.layout[-1].stop, dtype=self.joint.problem.dtype, device=self.joint.problem.device)
        W[:, 0] = own.family.natural(parameters(own, slots[own.name]))["counts"]
        for term in self.observed():
            assert term.family is not None and term.family.natural is not None
            natural = term.family.natural(parameters(term, slots[term.name]))
            if "n" in natural:
                W[:, 0] += natural["n"].reshape(states, -1).sum(1)
            for place in (p for p in self.layout if p.term == term.name):
                value = natural[place.key]
                if place.triangle:
                    width = place.shape[-1]
                    i, j = torch.triu_indices(width, width, device=value.device)
                    double = torch.where(i == j, 1.0, 2.0).to(value)
                    value = value[..., i, j] * double
                W[:, place.start : place.stop] = value.reshape(states, -1)
        return W

    def __call__(self, theta: dict[str, Tensor], parts: list[Part]) -> Expectation:
        """Weights, log-likelihood and expected statistics at theta."""
        slots, prior = slots_now(self.joint, self.plan, theta, parts)
        with torch.no_grad():
            W = self.weights(theta, slots)
            S, total = torch.zeros_like(W), 0.0
            kept = self.blocks()
            for phi in kept or self.stream():
                logits = W @ phi
                top = logits.amax(0, keepdim=True)
                top = torch.where(top.isfinite(), top, torch.zeros_like(top))
                logits.sub_(top).exp_()
                norm = logits.sum(0, keepdim=True)
                total += float((norm.log() + top).sum())
                logits.div_(norm)
                S += logits @ phi.T
        likelihood = total + self.base
        objective = likelihood + (prior if self.plan.estimate == "map" else 0.0)
        return Expectation(objective, likelihood, self.unpack(S), slots, parts)

    def stream(self) -> Iterator[Tensor]:
        """Feature blocks made one at a time."""
        for column in self.columns:
            count = next(iter(next(iter(column.values())).values())).shape[1]
            for a in range(0, count, COLUMNS):
                yield self.features(column, slice(a, a + COLUMNS))

    def unpack(self, S: Tensor) -> dict[str, Statistics]:
        """Expected statistics of every term in its own shapes."""
        count = S[:, 0]
        stats: dict[str, Statistics] = {self.latent: {"counts": count}}
        for place in self.layout:
            value = S[:, place.start : place.stop]
            if place.triangle:
                width = place.shape[-1]
                i, j = torch.triu_indices(width, width, device=S.device)
                flat = value.reshape(len(S), -1, len(i))
                full = S.new_empty(*flat.shape[:2], width, width)
                full[..., i, j] = flat
                full[..., j, i] = flat
                value = full.reshape(len(S), *place.shape[:-1], width, width)
            else:
                value = value.reshape(len(S), *place.shape)
            stats.setdefault(place.term, {})[place.key] = value
        for term in self.observed():
            assert term.family is not None
            if "n" in term.family.trailing:
                shape = stats[term.name]["x"].shape[1 : 1 + term.extra]
                stats[term.name]["n"] = count.reshape(-1, *[1] * len(shape)).expand(len(S), *shape)
        return stats
