r"""The E-step of a chain of finite latents by scaled forward-backward, over all sequences and runs at once.

Rabiner, *A tutorial on hidden Markov models*, Proc. IEEE 1989, section III and V.A.  The steps of a chain mostly share their
parameters: then their sites are pooled, so that emissions cost two matrix products for all steps of all sequences, and the
M-step sees one site for the transitions and one for each kind of observation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...distributed import ALONE, Ranks
from ...handlers import unwrap
from ...joint import LogJoint
from .estep import Expectation, Part, expectation, few_rows, read_slots, slots_now
from .families import Statistics
from .features import TRIAL, Column
from .mixture import MixtureKernel
from .plan import Plan
from .terms import Term, parameters

#: Numbers in the table of steps x runs x states x sequences that is worked on at once.
ELEMENTS = 2_000_000


class Emissions(MixtureKernel):
    """Observations of all steps of all sequences as the rows of one mixture without weights of its own."""

    def own(self, slots: dict) -> Tensor | float:
        """Steps have no prior here: the chain brings it."""
        return 0.0


@dataclass
class ChainKernel:
    """E-step for a story whose finite latents form one chain per row, each observation hanging on one of them.

    Parameters
    ----------
    joint
        The story.
    plan
        Its plan with one site standing for all that share their parameters.
    chain
        Names of the latents in order.
    steps
        For every step, the site that stands for its transition.
    seen
        For every step, its observed sites, in the order of those that stand for them.
    """

    joint: LogJoint
    plan: Plan
    chain: list[str]
    steps: list[str]
    seen: list[list[str]]
    states: int
    emissions: Emissions = field(init=False)
    rows: int = 0
    ranks: Ranks = ALONE

    @classmethod
    def recognise(cls, joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part]) -> ChainKernel | None:
        """The kernel for a story that has this structure, or None. `theta` is that of one run, without R."""
        chain = order(joint, plan)
        if chain is None or not plan.copies_only or plan.climbed:
            return None
        with torch.no_grad():
            trace, names = joint.trace(theta, few_rows(joint, parts[0].kwargs))
            slots = read_slots(plan, trace, names)
        seen: list[list[str]] = []
        for name in chain:
            seen.append([t.name for t in plan.terms.values() if t.dims == (name,) and t.name not in chain])
        hanging = {n for names in seen for n in names}
        if hanging | set(chain) != set(plan.terms) or len({len(s) for s in seen}) != 1 or not seen[0]:
            return None
        for position in range(len(seen[0])):
            group = [plan.terms[s[position]] for s in seen]
            if any(not alike(group[0], t, slots) for t in group) or not suits(group[0], joint):
                return None
            pool(group)
        stands: dict[str, str] = {}
        steps = []
        for name in chain:
            same = next((s for s in stands.values() if alike(plan.terms[s], plan.terms[name], slots)), name)
            stands[name] = same
            steps.append(same)
        kept = {*steps, *seen[0]}
        pooled = replace(plan, terms={n: t for n, t in plan.terms.items() if n in kept})
        kernel = cls(joint, pooled, chain, steps, seen, joint.structure[chain[0]].states or 1)
        if not joint.problem.ranks.every(kernel.agrees(plan, theta, parts)):
            return None
        kernel.ranks = joint.problem.ranks
        kernel.collect(theta, parts)
        return kernel

    def agrees(self, plan: Plan, theta: dict[str, Tensor], parts: list[Part]) -> bool:
        """Trusted only after it gives what the contraction gives, on some rows."""
        some = [Part(few_rows(self.joint, parts[0].kwargs, TRIAL))]
        wanted = expectation(self.joint, plan, theta, some)
        trial = replace(self)
        trial.collect(theta, some)
        found = trial({n: v[None] for n, v in theta.items()}, [Part(some[0].kwargs)])
        if not bool(((found.objective - wanted.objective).abs() <= 1e-9 * (1 + wanted.objective.abs())).all()):
            return False
        totals = self.pooled(wanted.stats)
        counts = all(close(found.stats[s]["counts"], totals[s]["counts"]) for s in set(self.steps))
        return counts and trial.emissions.matches(found.stats, totals)

    def pooled(self, stats: dict[str, Statistics]) -> dict[str, Statistics]:
        """Statistics of all steps, added up at the sites that stand for them."""
        stands = dict(zip(self.chain, self.steps))
        for names in self.seen:
            stands.update(zip(names, self.seen[0]))
        total: dict[str, Any] = {}
        for name, found in stats.items():
            known = total.setdefault(stands[name], dict.fromkeys(found, 0.0))
            for key, value in found.items():
                known[key] = known[key] + value
        return total

    def collect(self, theta: dict[str, Tensor], parts: list[Part]) -> None:
        """Values of every step of every sequence, step by step, as rows of the emissions."""
        self.emissions = Emissions(self.joint, self.plan, self.chain[0], self.states, ranks=self.ranks)
        traces = []
        with torch.no_grad():
            traces = [self.joint.trace(theta, p.kwargs)[0].nodes for p in parts]
            self.rows = sum(self.emissions.rows_of(p) for p in parts)
            for position, stand in enumerate(self.seen[0]):
                term = self.plan.terms[stand]
                values, masks = [], []
                for names in self.seen:
                    for nodes, part in zip(traces, parts):
                        node = nodes[names[position]]
                        values.append(self.emissions.by_row(node["value"], part))
                        masks.append(self.emissions.mask_by_row(term, node, part))
                mask = None if any(m is None for m in masks) else torch.cat(masks)  # type: ignore[arg-type]
                fn = unwrap(traces[0][self.seen[0][position]]["fn"])
                self.emissions.columns[stand] = Column(torch.cat(values), fn, mask)
            self.emissions.rows = self.rows * len(self.chain)
            self.emissions.all_rows = self.ranks.total(self.rows) * len(self.chain)
            self.emissions.dtype = self.joint.problem.dtype
            self.emissions.skip = set(self.steps)
            self.emissions.place()
            self.emissions.add_up()

    def __call__(self, theta: dict[str, Tensor], parts: list[Part]) -> Expectation:
        """Weights, log-likelihood and expected statistics of every run at theta (R first)."""
        slots, prior = slots_now(self.joint, self.plan, theta, parts)
        with torch.no_grad():
            W, both = self.emissions.weights(slots, len(prior))
            first, moves = self.transitions(slots, len(prior))
            T, N, K, R = len(self.chain), self.rows, self.states, len(prior)
            S, total = torch.zeros_like(W), torch.zeros_like(prior)
            starts, pairs = W.new_zeros(R, K), {s: W.new_zeros(R, K, K) for s in set(self.steps[1:])}
            width = max(1, ELEMENTS // (T * K * R))
            for a in range(0, N, width):
                b = min(a + width, N)
                index = (torch.arange(T)[:, None] * N + torch.arange(a, b)).reshape(-1)
                phi = self.emissions.features(index if b - a < N else slice(0, T * N))
                logits = (W.reshape(R * K, -1) @ phi).view(R, K, T, b - a).permute(2, 0, 1, 3)  # (T, R, K, n)
                weights, found, likelihood = forward_backward(first, moves, logits)
                total += likelihood
                starts += weights[0].sum(-1)
                for t, step in enumerate(self.steps[1:]):
                    pairs[step] += found[t]
                S += (weights.permute(1, 2, 0, 3).reshape(R * K, -1) @ phi.T).view(R, K, -1)
        names = sorted(pairs)
        S, total, starts, *moved = self.ranks.add(S, total, starts, *(pairs[n] for n in names))
        pairs = dict(zip(names, moved, strict=True))
        e = self.emissions.expectation(S, total + both + self.emissions.base, prior, slots, parts)
        e.stats[self.chain[0]] = {"counts": starts}
        for step, counts in pairs.items():
            e.stats[step] = {"counts": counts}
        return e

    def transitions(self, slots: dict, runs: int) -> tuple[Tensor, list[Tensor]]:
        """Probabilities of the first state, (R, K), and of every move, (R, K, K) each."""
        tables = {}
        for step in dict.fromkeys(self.steps):
            term = self.plan.terms[step]
            assert term.family is not None and term.family.natural is not None
            log_p = term.family.natural(parameters(term, slots[step]))["counts"]
            tables[step] = log_p.exp().expand(runs, *log_p.shape[1:])
        first = tables[self.steps[0]]
        moves = [
            tables[s] if tables[s].dim() == 3 else tables[s].unsqueeze(1).expand(-1, self.states, -1)
            for s in self.steps[1:]
        ]
        return first, moves


def forward_backward(first: Tensor, moves: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior of every state and of every move.

    Parameters
    ----------
    first, moves
        (R, K), and T - 1 tables (R, K, K).
    logits
        Log density of every observation in every state, (T, R, K, n).

    Returns
    -------
    (T, R, K, n) probabilities of the states, (T - 1, R, K, K) expected moves summed over sequences, (R,) log-likelihood.
    """
    T = len(logits)
    top = logits.amax(2, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    b = (logits - top).exp_()
    alpha, scale = torch.empty_like(b), b.new_empty(T, b.shape[1], 1, b.shape[3])
    now = first.unsqueeze(-1) * b[0]
    for t in range(T):
        if t:
            now = (moves[t - 1].mT @ now).mul_(b[t])
        torch.sum(now, 1, keepdim=True, out=scale[t])
        now = torch.div(now, scale[t], out=alpha[t])
    b.div_(scale)
    beta = torch.ones_like(b)
    for t in range(T - 2, -1, -1):
        torch.matmul(moves[t], b[t + 1] * beta[t + 1], out=beta[t])
    likelihood = (scale.log() + top).sum((0, 2, 3))
    pairs = logits.new_zeros(0, *first.shape, first.shape[-1])
    if T > 1:
        pairs = (alpha[:-1] @ (b[1:] * beta[1:]).mT) * torch.stack(moves)
    return alpha.mul_(beta), pairs, likelihood


def order(joint: LogJoint, plan: Plan) -> list[str] | None:
    """The finite latents as one chain, or None."""
    plate, states = joint.structure.data_plate, set()
    after: dict[str, str] = {}
    heads = []
    for name in joint.finite:
        site, term = joint.structure[name], plan.terms.get(name)
        if term is None or term.family is None or term.family.name != "Categorical" or term.masked:
            return None
        if site.plates != (plate,) or term.extra:
            return None
        states.add(site.states)
        before = [p for p in site.parents if p in joint.finite]
        if not before:
            heads.append(name)
        elif len(before) > 1 or before[0] in after or term.dims not in ((), (before[0],)):
            return None
        else:
            after[before[0]] = name
    if len(heads) != 1 or len(states) != 1 or plan.terms[heads[0]].dims:
        return None
    chain = heads
    while chain[-1] in after:
        chain.append(after[chain[-1]])
    return chain if len(chain) == len(joint.finite) > 1 else None


def suits(term: Term, joint: LogJoint) -> bool:
    """Whether an observation can be a row of the emissions."""
    site = joint.structure[term.name]
    return (
        term.family is not None
        and term.family.natural is not None
        and site.plates == (joint.structure.data_plate,)
        and not term.missing
    )


def alike(a: Term, b: Term, slots: dict[str, Any]) -> bool:
    """Whether two sites have the same parameters, but for the names of the latents they hang on."""
    if a.family is not b.family or a.extra != b.extra or a.roles != b.roles or len(a.dims) != len(b.dims):
        return False
    if a.gathers.keys() != b.gathers.keys():
        return False
    for slot in a.roles:
        if (g := a.gathers.get(slot)) is not None:
            h = b.gathers[slot]
            same = g.theta == h.theta and g.scale is None and h.scale is None and torch.equal(g.index, h.index)
        else:
            same = torch.equal(slots[a.name][slot][0], slots[b.name][slot][0])
        if not same:
            return False
    return True


def pool(group: list[Term]) -> None:
    """One shift and one ridge for sites that are treated as one; a mask of one is a mask of all."""
    if group[0].shift is not None:
        shift = torch.stack([t.shift for t in group if t.shift is not None]).mean(0)
        spread = torch.stack(
            [t.floor + (t.shift - shift) ** 2 for t in group if t.floor is not None and t.shift is not None]
        )
        for t in group:
            t.shift, t.floor = shift, spread.mean(0)
    if any(t.masked for t in group):
        for t in group:
            t.masked = True


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to 1e-8 of the largest entry."""
    return bool(((a - b).abs() <= 1e-8 * (1 + b.abs().max())).all())
