r"""The E-step of a one-latent mixture as two matrix products, for all runs at once.

Every row becomes a column of features :math:`\phi_n` (a one, and the sufficient statistics of all its sites); every
component of every run becomes a row of natural parameters W.  Then the log joint of all rows and components is
:math:`W\phi`, and the expected sufficient statistics are :math:`r\phi^\top`: one product each, whatever the families are.
Second moments enter as the upper triangle only; a statistic whose coefficient all components share (a tied covariance)
enters as its total over the rows, and squares under one variance (spherical) as their sum.  Features are made block by
block, column-major, from the data as they lie in memory or on disk, so that memory stays bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...joint import LogJoint
from .counted import back, times
from .estep import Expectation, Part, expectation, few_rows, slots_now
from .families import Statistics
from .features import TRIAL, RowFeatures
from .plan import Plan
from .start import softened, softness
from .terms import Term, parameters

#: Feature entries that are kept between iterations instead of being made again.
KEEP = 4_000_000


@dataclass
class MixtureKernel(RowFeatures):
    """E-step for a story whose only finite latent is one per row and whose sites are exponential families given it.

    See `RowFeatures` for the parameters.
    """

    # -- recognition -------------------------------------------------------------------------------------------------

    @classmethod
    def recognise(
        cls, joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part]
    ) -> MixtureKernel | None:
        """The kernel for a story that has this structure, or None. `theta` is that of one run, without R."""
        plate = joint.structure.data_plate
        if len(joint.finite) != 1 or plate is None:
            return None
        latent = joint.finite[0]
        for term in plan.terms.values():
            family, site = term.family, joint.structure[term.name]
            if family is None or family.natural is None or site.plates != (plate,) or term.missing:
                return None
            if term.name == latent and (family.name != "Categorical" or term.dims or term.extra or term.masked):
                return None
            if term.name != latent and term.dims != (latent,):
                return None
        if latent not in plan.terms or len(plan.terms) < 2 or joint.problem.all_rows < 2:
            return None
        kernel = cls(joint, plan, latent, joint.structure[latent].states or 1, ranks=joint.problem.ranks)
        kernel.counts = frozenset(t.name for t in kernel.observed() if kernel.sparse(t))
        if not kernel.ranks.every(kernel.agrees(theta, parts)):
            return None
        kernel.collect(theta, parts)
        return kernel

    def agrees(self, theta: dict[str, Tensor], parts: list[Part]) -> bool:
        """Trusted only after it gives what the contraction gives, on some rows."""
        some = [Part(few_rows(self.joint, parts[0].kwargs, TRIAL))]
        trial = MixtureKernel(self.joint, self.plan, self.latent, self.states, counts=self.counts)
        trial.collect(theta, some)
        wanted = expectation(self.joint, self.plan, theta, some)
        found = trial({n: v[None] for n, v in theta.items()}, [Part(some[0].kwargs)])
        loose = 1.0 if trial.dtype == self.joint.problem.dtype else 1e5
        close = (found.objective - wanted.objective).abs() <= loose * 1e-9 * (1 + wanted.objective.abs())
        return bool(close.all()) and trial.matches(found.stats, wanted.stats, loose)

    def matches(self, found: dict[str, Statistics], wanted: dict[str, Statistics], loose: float = 1.0) -> bool:
        """Whether statistics are the same, as far as single entries are known and matter."""
        for place in self.layout:
            value = wanted[place.term][place.key]
            away = ([1] if place.shared else []) + (list(range(2, value.dim())) if place.pooled else [])
            value = value.mean(away, keepdim=True).expand_as(value) if away else value
            atol = loose * 1e-7 * (1 + float(value.abs().max()))
            if not bool(torch.isclose(found[place.term][place.key], value, rtol=0, atol=atol).all()):
                return False
        return True

    # -- one iteration -----------------------------------------------------------------------------------------------

    def own(self, slots: dict) -> Tensor | float:
        """Log weights of the components, (R, K)."""
        own = self.plan.terms[self.latent]
        assert own.family is not None and own.family.natural is not None
        return own.family.natural(parameters(own, slots[own.name]))["counts"]

    def weights(self, slots: dict, runs: int) -> tuple[Tensor, Tensor]:
        """Natural parameters, (R, K, features), and the log density that all components share, (R,)."""
        kind: dict[str, Any] = {"dtype": self.joint.problem.dtype, "device": self.joint.problem.device}
        W = torch.zeros(runs, self.states, self.layout[-1].stop, **kind)
        W[:, :, 0] = self.own(slots)
        both = torch.zeros(runs, **kind)
        for term in self.observed():
            assert term.family is not None and term.family.natural is not None
            natural = term.family.natural(parameters(term, slots[term.name]))
            if "n" in natural and self.columns[term.name].mask is None:
                n = natural["n"]
                per = n.reshape(len(n), n.shape[1], -1)
                entries = math.prod(self.layout_shape(term)) if per.shape[2] == 1 else 1
                W[:, :, 0] += per.sum(2) * entries
            for place in (p for p in self.layout if p.term == term.name):
                value = natural[place.key]
                if place.shared:
                    value = value[:, :1].squeeze(1)
                    total = self.totals[place.term, place.key].to(value)
                    both = both + (value * total).reshape(len(value), -1).sum(1)
                    continue
                if place.triangle:
                    i, j = torch.triu_indices(place.shape[-1], place.shape[-1], device=value.device)
                    value = value[..., i, j] * torch.where(i == j, 1.0, 2.0).to(value)
                if place.pooled:
                    value = value.reshape(*value.shape[:2], -1)[..., :1]
                if not place.triangle and not place.pooled:
                    value = value.expand(*value.shape[:2], *place.shape)
                W[:, :, place.start : place.stop] = value.reshape(*value.shape[:2], -1)
        return W, both

    def layout_shape(self, term: Term) -> tuple[int, ...]:
        """Extra dimensions of an event, those that `Independent` added."""
        return next(p.shape for p in self.layout if p.term == term.name)[: term.extra]

    def sweep(self, W: Tensor, rows: list[slice]) -> tuple[Tensor, Tensor]:
        """Expected features (R, K, features) and log-likelihood (R,) of some rows, the shared part left out.

        Of several ranks, each gives rows of its own, and all get the sums.
        """
        runs = len(W)
        flat = W.reshape(-1, W.shape[-1]).to(self.dtype)
        S, total = torch.zeros_like(flat, dtype=W.dtype), W.new_zeros(runs)
        places = [place for _, place in self.counted]
        for block, counted in self.with_counts(rows):
            phi = self.block(block)
            n = phi.shape[1]
            logits = torch.mm(
                flat[:, : self.dense],
                phi,
                out=self.spare("table", len(flat), n) if n == block.stop - block.start else None,
            )
            for x, place in zip(counted, places, strict=True):
                logits += times(x, flat[:, place])
            table = logits.view(runs, self.states, n)
            top = table.amax(1)
            r = table.softmax(1)
            norm = top - r.amax(1).log_()  # log-sum-exp, without a second exponential
            total += torch.where(top.isneginf(), top, norm).sum(1, dtype=W.dtype)
            S[:, : self.dense] += r.view(-1, n) @ phi.T
            for x, place in zip(counted, places, strict=True):
                S[:, place] += back(x, r.view(-1, n))
        S, total = self.ranks.add(S, total)
        return S.reshape(W.shape), total

    def with_counts(self, rows: list[slice]) -> Iterator[tuple[slice, tuple[Any, ...]]]:
        """Blocks of rows, and those of their values that are compressed rows."""
        kept = [c for c, _ in self.counted]
        yield from zip(rows, zip(*(c.each(rows) for c in kept), strict=True) if kept else [()] * len(rows), strict=True)

    def block(self, rows: slice) -> Tensor:
        """Features of a block; those of small data are kept."""
        if self.rows * self.dense > KEEP:
            return self.features(rows)
        if self.kept is None:
            self.kept = self.features(slice(0, self.rows)).clone()
        return self.kept[:, rows]

    def __call__(self, theta: dict[str, Tensor], parts: list[Part]) -> Expectation:
        """Weights, log-likelihood and expected statistics of every run at theta (R first)."""
        slots, prior = slots_now(self.joint, self.plan, theta, parts)
        with torch.no_grad():
            W, both = self.weights(slots, len(prior))
            S, total = self.sweep(W, self.blocks(len(W)))
        return self.expectation(S, total + both + self.base, prior, slots, parts)

    def expectation(self, S: Tensor, likelihood: Tensor, prior: Tensor, slots: dict, parts: list[Part]) -> Expectation:
        """Expected features as the E-step's answer."""
        objective = likelihood + prior if self.plan.estimate == "map" else likelihood
        return Expectation(objective, likelihood, self.unpack(S), slots, parts)

    def of_labels(self, labels: Tensor, rows: Tensor) -> Tensor:
        """Expected features (R, K, features) if the rows (n,), numbered through all ranks, had the labels (R, n)."""
        if self.ranks.shares_rows:
            here = self.ranks.mine(rows)
            rows, labels = rows[here] - self.ranks.offset, labels[:, here]
        phi = self.features(rows)
        hot = softened(labels, self.states, softness(self.observed())).to(phi).transpose(1, 2)
        hot = hot.reshape(-1, len(rows))
        found = [hot @ phi.T, *(back(c.block(rows.cpu().numpy()), hot) for c, _ in self.counted)]
        S = torch.cat(found, 1).reshape(len(labels), self.states, -1)
        return self.ranks.add(S.to(self.joint.problem.dtype))[0]

    def unpack(self, S: Tensor) -> dict[str, Statistics]:
        """Expected statistics of every term in its own shapes; what is only known as a sum is shared out evenly."""
        count = S[:, :, 0]
        stats: dict[str, Statistics] = {self.latent: {"counts": count}}
        for place in self.layout:
            value = S[:, :, place.start : place.stop]
            lead = value.shape[:2]
            if place.shared:
                total = self.totals[place.term, place.key].to(S) / self.states
                share = count.sum(1) / self.all_rows  # of the rows, where only some have been seen
                value = (share.reshape(-1, *[1] * total.dim()) * total).unsqueeze(1).expand(*lead, *total.shape)
            elif place.triangle:
                value = square(value, place.shape[-1]).reshape(*lead, *place.shape, place.shape[-1])
            elif place.pooled:
                value = (value / math.prod(place.shape)).reshape(*lead, *[1] * len(place.shape))
                value = value.expand(*lead, *place.shape)
            else:
                value = value.reshape(*lead, *place.shape)
            stats.setdefault(place.term, {})[place.key] = value
        for term in self.observed():
            assert term.family is not None
            if "n" in term.family.trailing and "n" not in stats[term.name]:
                shape = self.layout_shape(term)
                stats[term.name]["n"] = count.reshape(*count.shape, *[1] * len(shape)).expand(*count.shape, *shape)
        return stats


def square(upper: Tensor, width: int) -> Tensor:
    """Symmetric matrices from their upper triangles: (..., blocks * triangle) -> (..., blocks, width, width)."""
    i, j = torch.triu_indices(width, width, device=upper.device)
    flat = upper.reshape(*upper.shape[:-1], -1, len(i))
    full = upper.new_empty(*flat.shape[:-1], width, width)
    full[..., i, j] = flat
    full[..., j, i] = flat
    return full
