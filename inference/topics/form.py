r"""Is this story an admixture? Topics, shares and counts, found by reading its structure and held against its own density.

A story is taken for latent Dirichlet allocation when, given topics phi (K, V), every row has shares
:math:`\theta_d \sim \mathrm{Dirichlet}(\alpha)` and a density of its words that differs from
:math:`\sum_v c_{dv} \log (\theta_d\phi)_v` by nothing that depends on the latents; for a dynamic topic model phi is the
softmax of a Gaussian walk.  Words may be counted, or told one by one with their topics.  Names and shapes only suggest the
roles; the story's log density at random points decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributions as td
from torch import Tensor

from ..handlers import unwrap
from ..sparse_rows import stored_rows
from .documents import Documents

if TYPE_CHECKING:
    from ..joint import LogJoint
    from ..problem import Problem

#: Relative difference up to which densities are the same.
CLOSE = 1e-8


@dataclass(frozen=True)
class Walk:
    """beta (K, T, V): the first slice Normal(loc, first), then steps Normal(0, step); `base` is the site of loc, if any."""

    base: str | None
    loc: Tensor
    base_loc: Tensor
    base_scale: Tensor
    first: float
    step: float
    step_param: str | None

    def to(self, device: torch.device) -> Walk:
        """The same with its prior on a device."""
        loc, base_loc, base_scale = (value.to(device) for value in (self.loc, self.base_loc, self.base_scale))
        return replace(self, loc=loc, base_loc=base_loc, base_scale=base_scale)


@dataclass(frozen=True)
class Admixture:
    """Which site and argument plays which role.

    Attributes
    ----------
    topics, theta, w, z
        Sites; `topics` is phi (K, V), or beta (K, T, V) of a dynamic model; z is None where it is summed out.
    argument, words, times
        Arguments that hold the counts or ids, the ids that belong to the counts, and the slices.
    layout
        "table" (D, V), "pairs" (ids and counts, D x L) or "tokens" (ids, D x N).
    alpha, eta
        Concentrations (K,) and (K, V); for a dynamic model eta is empty.
    alpha_param, eta_param
        Parameters that they are learned as, or None.
    theta_shape
        Shape of theta at its site without D and K.
    """

    topics: str
    theta: str
    w: str
    z: str | None
    argument: str
    words: str | None
    times: str | None
    layout: str
    num_topics: int
    num_words: int
    num_slices: int
    alpha: Tensor
    eta: Tensor
    alpha_param: str | None = None
    eta_param: str | None = None
    theta_shape: tuple[int, ...] = ()
    walk: Walk | None = None

    def to(self, device: torch.device) -> Admixture:
        """The same with its concentrations, or the prior of its walk, on a device."""
        walk = None if self.walk is None else self.walk.to(device)
        return replace(self, alpha=self.alpha.to(device), eta=self.eta.to(device), walk=walk)

    @property
    def ragged(self) -> tuple[str, ...]:
        """Arguments that may be wider in new data."""
        return () if self.layout == "table" else tuple(n for n in (self.argument, self.words) if n)

    def documents(self, kwargs: Mapping[str, Any]) -> Documents:
        """The counts of these arguments."""
        rows = stored_rows(kwargs[self.argument])
        if rows is not None and self.layout != "tokens":
            return Documents.from_stored(rows, None if self.times is None else kwargs[self.times].cpu().numpy())
        value = kwargs[self.argument].detach().cpu().numpy()
        times = None if self.times is None else kwargs[self.times].cpu().numpy()
        if self.layout == "table":
            return Documents.from_table(value, times)
        if self.layout == "pairs":
            if kwargs.get(str(self.words)) is None:  # counts of all words in their order
                if value.shape[-1] != self.num_words:
                    raise ValueError(
                        f"{self.argument} has {value.shape[-1]} columns and the topics are over {self.num_words} words: give "
                        f"{self.words}, the words that the columns count, or a column for every word"
                    )
                return Documents.from_table(value, times)
            return Documents.from_rows(kwargs[str(self.words)].cpu().numpy(), value, self.num_words, times)
        inside = (value >= 0) & (value < self.num_words)
        return Documents.from_rows(np.where(inside, value, 0), inside, self.num_words, times)

    def site_theta(self, theta: Tensor) -> Tensor:
        """Shares (..., D, K) in the shape of their site."""
        ones = [1] * len(self.theta_shape)
        return theta.reshape(*theta.shape[:-1], *ones, theta.shape[-1])


def recognise(problem: Problem) -> Admixture | None:
    """The roles of a story's sites and arguments, or None where it is another kind of story."""
    found = candidate(problem)
    if found is None:
        return None
    from ..joint import LogJoint

    few = problem.thumbnail
    joint = LogJoint(few)
    for layout, words in layouts(few, found):
        form = complete(joint, replace(found, layout=layout, words=words))
        if form is not None and agrees(joint, form):
            return form
    return None


def candidate(problem: Problem) -> Admixture | None:
    """Roles by kind, plates and shapes alone."""
    s = problem.structure
    locals_, seen = s.continuous_locals, s.observed
    if len(locals_) != 1 or len(seen) != 1 or s.unnormalised or len(s.finite) > 1 or s.uncountable or s.implicit:
        return None
    theta, w = locals_[0], seen[0]
    globals_ = [g for g in s.globals if g.continuous]
    if theta.family != "Dirichlet" or theta.plates != (s.data_plate,) or theta.parents or w.missing or not w.argument:
        return None
    K, z = theta.shape[-1], s.finite[0] if s.finite else None
    if z is not None:
        shares_plate = len(z.plates) == 2 and z.plates[0] == s.data_plate and z.plates == w.plates
        if not (shares_plate and z.parents == (theta.name,) and z.states == K):
            return None
    elif theta.name not in w.parents or w.plates != (s.data_plate,):
        return None
    topics = [g for g in globals_ if g.name in w.parents and g.shape[:1] == (K,)]
    if len(topics) != 1:
        return None
    phi = topics[0]
    static = phi.family == "Dirichlet" and len(phi.shape) == 2 and len(globals_) == 1
    if not static and (len(phi.shape) != 3 or z is not None or len(globals_) > 2):
        return None
    times = None
    if not static:
        rows = [n for n in s.row_arguments if n != w.argument and problem.kwargs[n].ndim == 1]
        if len(rows) != 1:
            return None
        times = rows[0]
    empty = torch.empty(0)
    T, V = (phi.shape[1], phi.shape[2]) if not static else (1, phi.shape[1])
    return Admixture(
        phi.name, theta.name, w.name, z.name if z else None, w.argument, None, times, "", K, V, T, empty, empty,
        theta_shape=tuple(theta.shape[1:-1]),
    )  # fmt: skip


def layouts(problem: Problem, form: Admixture) -> list[tuple[str, str | None]]:
    """In which ways the arguments could hold the counts."""
    value = problem.kwargs[form.argument]
    if form.z is not None:
        return [("tokens", None)] if not value.is_floating_point() else []
    found: list[tuple[str, str | None]] = [("table", None)] if value.shape[-1] == form.num_words else []
    for name, other in problem.kwargs.items():
        ids = isinstance(other, Tensor) and name != form.argument and other.shape == value.shape
        if ids and not other.is_floating_point() and 0 <= int(other.min()) and int(other.max()) < form.num_words:
            found.append(("pairs", name))
    return found


def nodes_at(joint: LogJoint, values: Mapping[str, Tensor]) -> Any:
    """Sites of one run with the latents at `values`."""
    with torch.no_grad():
        return joint.trace(values)[0].nodes


def complete(joint: LogJoint, form: Admixture) -> Admixture | None:
    """The same with its concentrations, and the parameters that they are learned as."""
    values = joint.prior_draw()
    params = {b.name for b in joint.blocks if b.param}
    nodes = nodes_at(joint, values)
    theta = unwrap(nodes[form.theta]["fn"])
    if not isinstance(theta, td.Dirichlet):
        return None
    alpha = theta.concentration.reshape(-1, form.num_topics)
    if len(alpha) and not bool((alpha == alpha[0]).all()):
        return None
    moved = {n: 1.5 * v if n in params else v for n, v in values.items()}
    after = nodes_at(joint, moved) if params else nodes

    def owner(before: Tensor, now: Tensor) -> tuple[bool, str | None]:
        """Whether a number of the story is constant or copies a parameter, and which."""
        if torch.equal(before, now):
            return True, None
        for name in params:
            if values[name].numel() in (1, before.shape[-1]):
                same = torch.allclose(before, values[name].expand(before.shape)) and torch.allclose(now, 1.5 * before)
                if same:
                    return True, name
        return False, None

    copies, alpha_param = owner(alpha[0], unwrap(after[form.theta]["fn"]).concentration.reshape(-1, form.num_topics)[0])
    if not copies:
        return None
    form = replace(form, alpha=alpha[0].clone(), alpha_param=alpha_param)
    phi, again = unwrap(nodes[form.topics]["fn"]), unwrap(after[form.topics]["fn"])
    if form.times is not None:
        walk = read_walk(joint, form, phi, again, owner, nodes)
        if walk is None:
            return None
        form = replace(form, walk=walk)
        used = {form.alpha_param, walk.step_param}
    else:
        if not isinstance(phi, td.Dirichlet):
            return None
        eta = phi.concentration.expand(form.num_topics, form.num_words)
        copies, eta_param = owner(eta, again.concentration.expand_as(eta))
        if not copies:
            return None
        form = replace(form, eta=eta.clone(), eta_param=eta_param)
        used = {form.alpha_param, eta_param}
    return form if params <= used else None


def read_walk(joint: LogJoint, form: Admixture, fn: Any, again: Any, owner: Any, nodes: Any) -> Walk | None:
    """The Gaussian walk that the topics take: `loc`, `first` and `step` of its distribution."""
    if not all(isinstance(getattr(fn, name, None), Tensor) for name in ("loc", "first", "step")):
        return None
    numbers = [(getattr(fn, n).reshape(-1), getattr(again, n).reshape(-1)) for n in ("first", "step")]
    if any(a.numel() != 1 for a, _ in numbers) or owner(*numbers[0]) != (True, None):
        return None
    copies, step_param = owner(*numbers[1])
    loc = fn.loc.expand(form.num_words)
    others = [g.name for g in joint.structure.globals if g.continuous and g.name != form.topics]
    base = others[0] if others else None
    if not copies:
        return None
    zero = torch.zeros_like(loc)
    if base is None:
        return Walk(None, loc.clone(), loc.clone(), zero, float(fn.first), float(fn.step), step_param)
    prior = unwrap(nodes[base]["fn"])
    if not isinstance(prior, td.Normal) or not torch.equal(loc, nodes[base]["value"].reshape(-1)):
        return None
    base_loc, base_scale = prior.loc.expand(form.num_words).clone(), prior.scale.expand(form.num_words).clone()
    return Walk(base, zero, base_loc, base_scale, float(fn.first), float(fn.step), step_param)


# -- the story's own density ---------------------------------------------------------------------------------------------


def row_density(form: Admixture, topics: Tensor, theta: Tensor, documents: Documents) -> Tensor:
    """log p(w_d, theta_d | topics) in our own words, for topics (K, V) or (K, T, V) and shares (D, K)."""
    phi = topics if form.times is None else topics.softmax(-1)
    rows = torch.from_numpy(np.repeat(np.arange(len(documents)), np.diff(documents.starts))).to(theta.device)
    v = torch.from_numpy(documents.words).to(theta.device)
    if form.times is None:
        shares = phi[:, v]
    else:
        shares = phi[:, torch.from_numpy(np.asarray(documents.times)).to(theta.device)[rows], v]
    log_p = (theta[rows] * shares.mT).sum(-1).log() * torch.from_numpy(documents.counts).to(theta)
    total = theta.new_zeros(len(documents)).index_add_(0, rows, log_p)
    return total + td.Dirichlet(form.alpha.to(theta), validate_args=False).log_prob(theta)


def prior_density(form: Admixture, values: Mapping[str, Tensor]) -> Tensor:
    """log p of the globals in our own words."""
    topics = values[form.topics]
    if form.walk is None:
        return td.Dirichlet(form.eta.to(topics), validate_args=False).log_prob(topics).sum()
    walk, total = form.walk, topics.new_zeros(())
    loc = walk.loc
    if walk.base is not None:
        loc = values[walk.base].reshape(-1)
        total = td.Normal(walk.base_loc, walk.base_scale).log_prob(loc).sum()
    total = total + td.Normal(loc, walk.first).log_prob(topics[:, 0]).sum()
    return total + td.Normal(0.0, walk.step).log_prob(topics[:, 1:] - topics[:, :-1]).sum()


def agrees(joint: LogJoint, form: Admixture) -> bool:
    """Rows differ from ours by a constant each, and the globals' density not at all."""
    kwargs = joint.problem.kwargs
    documents, gaps = form.documents(kwargs), []
    with torch.no_grad(), joint.problem.scope(97):
        fixed = {b.name for b in joint.blocks if b.param}
        first = joint.prior_draw()
        for _ in range(3):
            values = {**joint.prior_draw(), **{n: first[n] for n in fixed}}
            # draws from a sparse Dirichlet may hold zeros, whose logarithm tells nothing
            shares = {form.theta} if form.walk else {form.theta, form.topics}
            values = {n: smoothed(v) if n in shares else v for n, v in values.items()}
            theirs = joint.rows(values)
            theta = values[form.theta].reshape(len(documents), form.num_topics)
            ours = row_density(form, values[form.topics], theta, documents)
            gaps.append(theirs - ours)
            rest = joint.density(values) - theirs.sum()
            prior = prior_density(form, values)
            if not bool((rest - prior).abs() <= CLOSE * (1 + prior.abs() + theirs.abs().sum())):
                return False
        scale = 1 + ours.abs().max()
        return all(bool(((g - gaps[0]).abs() <= CLOSE * scale).all()) for g in gaps[1:])


def smoothed(value: Tensor) -> Tensor:
    """The same shares, none of them near zero."""
    return (value + 0.1) / (value + 0.1).sum(-1, keepdim=True)
