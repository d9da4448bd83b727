r"""Exact integrals over continuous locals where every row's log joint is quadratic in them.

At fixed globals, and for every state s of the row's finite locals, a linear-Gaussian row has
:math:`\log p(x_n, z, s) = \ell + g^\top z - \tfrac12 z^\top P z`, so that z is normal with mean :math:`P^{-1}g` and precision
P, and integrates to :math:`\ell + \tfrac12 g^\top P^{-1} g + \tfrac q2\log 2\pi - \tfrac12\log|P|` (Roweis and Ghahramani, *A
unifying review of linear Gaussian models*, Neural Computation 1999).  The three are read off the story itself, by running it
at a few values of z: whatever the user wrote, missing cells and covariates included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import take_rows
from .enumeration import align, multiply
from .handlers import unwrap

if TYPE_CHECKING:
    from .joint import Block, LogJoint
    from .problem import Problem

#: Families that a linear-Gaussian local can have, and the most numbers and states a row may have.
FAMILIES, WIDEST, STATES = ("Normal", "MultivariateNormal"), 64, 256
#: Numbers of a row up to which its log joint is read off one place after another; places that are looked at together, and
#: numbers of all rows' locals there.
SMALL, MANY, NUMBERS = 8, 256, 2_000_000
#: Rows on which a story is tested.
TRIAL_ROWS = 12


def locals_of(joint: LogJoint) -> list[Block]:
    """Continuous locals, in the order of the story."""
    return [b for b in joint.blocks if b.local and not b.param]


@dataclass
class RowTable:
    """log p(x_n, z_n, s | globals) as a function of the continuous locals, at one draw of the globals.

    Parameters
    ----------
    joint, values, kwargs
        The story, a draw (its local entries are ignored), and the rows.
    """

    joint: LogJoint
    values: Mapping[str, Tensor]
    kwargs: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.blocks, self.width = [], 0
        self.n = row_count(self.joint, self.kwargs)
        for b in locals_of(self.joint):
            self.blocks.append((b.name, self.width, self.width + b.free_width))
            self.width += b.free_width
        self.globals = {b.name: self.values[b.name] for b in self.joint.blocks if not b.local}
        self.finite = [n for n in self.joint.finite if self.joint.structure[n].local]

    def table(self, z: Tensor, kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """log p(x_n, z_n, s | globals), (N, S), for z (N, q) or one (q,) for all rows."""
        kwargs = self.kwargs if kwargs is None else kwargs
        n = row_count(self.joint, kwargs)
        plate = self.joint.structure.data_plate or ""
        inside = []
        for f in self.joint.factors_of(*self.run(z, kwargs)):
            if plate in f.plates:
                away = tuple(i for i, d in enumerate(f.dims) if d != plate and d not in self.finite)
                dims = tuple(d for i, d in enumerate(f.dims) if i not in away)
                inside.append((f.value.sum(away) if away else f.value, dims))
        value, dims = multiply(inside)
        sizes = [self.joint.structure[name].states or 1 for name in self.finite]
        value = align(value, dims, (plate, *self.finite))
        return value.expand(n, *sizes).reshape(n, -1)

    def run(self, z: Tensor, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
        """One enumerated run of the story with its locals at z; see `LogJoint.trace`."""
        from .local import RowsFree, Stacked

        n = row_count(self.joint, kwargs)
        plate = self.joint.structure.data_plate
        handler = Stacked(dict(self.globals), RowsFree(self.blocks, z.expand(n, self.width), plate))
        return self.joint.trace(handler, kwargs)


@dataclass
class GaussianRows(RowTable):
    """The rows at one draw of the globals, with their continuous locals integrated out.

    Parameters
    ----------
    shared
        Whether P is that of all rows: then it is read off the first ones only. None: found out.

    Attributes
    ----------
    log_states
        log p(x_n, s) with z integrated out, (N, S).
    mean, factor
        Of z given row and state: (N, S, q), and the Cholesky factor of the precision (N or 1, S, q, q).
    """

    shared: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.read()

    def read(self) -> None:
        """Level, slope and precision from values at the prior's mean and at some steps of its spread."""
        few = take_some(self.joint, self.kwargs, TRIAL_ROWS)
        steps = self.prior_moments(few)[1]
        eye = steps.diag()  # at unit distances from 0 a local of tiny spread would leave no digits for its data
        if self.shared is None:
            P = self.curvature(eye, few)
            self.shared = not self.holes() and bool((P - P[:1]).abs().max() <= 1e-9 * (1 + P.abs().max()))
        one = self.shared and self.n > TRIAL_ROWS  # a story of few rows may insist on their number
        P = self.curvature(eye, take_some(self.joint, self.kwargs, 1) if one else self.kwargs)
        centre = self.prior_moments(self.kwargs)[0]
        factor, _ = torch.linalg.cholesky_ex(P)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 2 * steps.log().sum()
        single = P.shape[1] == 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not single):
            half = 0.5 * P.diagonal(dim1=-2, dim2=-1)
            level, slope = self.level_and_slope(centre, eye, torch.ones_like(eye[:1]), half)
            mean = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        self.mean = centre.unsqueeze(1) + mean * steps
        self.factor = factor / steps[:, None]
        if single:  # at its summit the log joint is no difference of large numbers, however small the noise
            top = self.summit(P / (steps[:, None] * steps))
        else:
            top = level + 0.5 * (slope * mean).sum(-1)
        self.log_states = top + 0.5 * self.width * math.log(2 * math.pi) - 0.5 * log_det

    def level_and_slope(self, at: Tensor, eye: Tensor, wide: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint at `at`, (N, S), and its slope along steps `wide * eye`, (N, S, q), given half the curvature there."""
        if self.width > SMALL:
            f = self.tables(at, torch.cat([torch.zeros_like(eye[:1]), eye]), wide, self.kwargs)
            return f[0], (f[1:] - f[0]).movedim(0, -1) + half
        level = self.table(at)
        return level, torch.stack([self.table(at + wide * e) - level + half[..., i] for i, e in enumerate(eye)], -1)

    def summit(self, P: Tensor) -> Tensor:
        """The largest log joint of every row, (N, 1), with its gradient: read off at the mean, in steps of its spread."""
        at = self.mean[:, 0].detach()
        wide = P.detach().diagonal(dim1=-2, dim2=-1).rsqrt()  # (N or 1, 1, q)
        P = P * wide.unsqueeze(-1) * wide.unsqueeze(-2)
        eye = torch.eye(self.width, dtype=at.dtype, device=at.device)
        level, slope = self.level_and_slope(at, eye, wide[:, 0], 0.5 * P.diagonal(dim1=-2, dim2=-1))
        factor, _ = torch.linalg.cholesky_ex(P)
        return level + 0.5 * (slope * torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)).sum(-1)

    def prior_moments(self, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean (N, q) and standard deviation (q,), at most 1, of the locals before their data: where it is well read off.

        The integral does not depend on them, which is why no gradient runs through them.
        """
        n = row_count(self.joint, kwargs)
        kind: dict[str, Any] = {"dtype": self.joint.problem.dtype, "device": self.joint.problem.device}
        mean, spread = torch.zeros(n, self.width, **kind), torch.ones(self.width, **kind)
        with torch.no_grad():
            for _ in self.blocks:  # a local may follow another
                nodes = self.run(mean, kwargs)[0].nodes
                fns = [(unwrap(nodes[b.name]["fn"]), b) for b in locals_of(self.joint)]
                mean = torch.cat([by_row(fn.mean, n, b) for fn, b in fns], -1)
                narrow = [by_row(fn.variance.rsqrt(), n, b).mean(0) for fn, b in fns]
                spread = torch.cat([v.clamp(min=1.0).reciprocal() for v in narrow])
        return mean.detach(), spread.detach()

    def curvature(self, eye: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """P from second differences, exact for a quadratic: (N, S, q, q)."""
        centre = self.prior_moments(kwargs)[0]
        if self.width > SMALL:
            return self.curvature_together(eye, centre, kwargs)
        zero = self.table(centre, kwargs)
        up = [self.table(centre + e, kwargs) for e in eye]
        P = zero.new_zeros(*zero.shape, self.width, self.width)
        for i in range(self.width):
            down = self.table(centre - eye[i], kwargs)
            P[..., i, i] = 2 * zero - up[i] - down
            for j in range(i):
                both = self.table(centre + eye[i] + eye[j], kwargs)
                P[..., i, j] = P[..., j, i] = up[i] + up[j] - both - zero
        return P

    def curvature_together(self, eye: Tensor, centre: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The same with all pairs of steps side by side."""
        q = self.width
        i, j = torch.tril_indices(q, q, -1, device=centre.device)
        steps = torch.cat([torch.zeros_like(eye[:1]), eye, -eye, eye[i] + eye[j]])
        f = self.tables(centre, steps, torch.ones_like(eye[:1]), kwargs)
        zero, up, down, both = f[0], f[1 : q + 1], f[q + 1 : 2 * q + 1], f[2 * q + 1 :]
        entries = torch.cat([2 * zero - up - down, up[i] + up[j] - both - zero]).movedim(0, -1)
        place = torch.arange(q, device=centre.device).diag()
        place[i, j] = place[j, i] = torch.arange(q, q + len(i), device=centre.device)
        return entries[..., place]

    def tables(self, at: Tensor, steps: Tensor, wide: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """`table` at `at + wide * step` for many steps (M, q): (M, N, S); side by side where the story allows."""
        chunk = max(1, min(MANY, NUMBERS // (len(at) * self.width)))
        try:
            return torch.vmap(lambda step: self.table(at + wide * step, kwargs), chunk_size=chunk)(steps)
        except (RuntimeError, ValueError, NotImplementedError):  # an operation that has no batching rule
            return torch.stack([self.table(at + wide * step, kwargs) for step in steps])

    def holes(self) -> bool:
        """Whether observed cells are missing: rows then know different parts of z."""
        values = (self.kwargs.get(s.argument or "") for s in self.joint.structure.observed)
        return any(isinstance(v, Tensor) and v.is_floating_point() and bool(v.isnan().any()) for v in values)

    # -- answers -----------------------------------------------------------------------------------------------------

    @property
    def log_rows(self) -> Tensor:
        """log p(x_n | globals), (N,)."""
        return self.log_states.logsumexp(-1)

    def log_evidence(self) -> tuple[Tensor, Tensor]:
        """`log_rows`, and its Monte Carlo variance: none."""
        return self.log_rows, torch.zeros_like(self.log_rows)

    def probabilities(self) -> Tensor:
        """Posterior of the joint state of the finite locals, (N, S)."""
        return self.log_states.softmax(-1)

    def state_probabilities(self, site: str) -> Tensor:
        """Posterior of one finite local, (N, states)."""
        sizes = [self.joint.structure[name].states or 1 for name in self.finite]
        p = self.probabilities().reshape(self.n, *sizes)
        away = tuple(1 + i for i, name in enumerate(self.finite) if name != site)
        return p.sum(away) if away else p

    def draw(self, count: int) -> Tensor:
        """Joint draws of all continuous locals: (count, N, q)."""
        states = torch.distributions.Categorical(logits=self.log_states).sample((count,))
        index = states.unsqueeze(-1).expand(count, self.n, self.width)
        mean = self.mean.expand(count, *self.mean.shape).gather(2, index.unsqueeze(2)).squeeze(2)
        factor = self.factor.expand(self.n, *self.factor.shape[1:])
        eps = torch.randn(count, self.n, self.width, dtype=mean.dtype, device=mean.device)
        chosen = factor[torch.arange(self.n), states]
        return mean + torch.linalg.solve_triangular(chosen.mT, eps.unsqueeze(-1), upper=True).squeeze(-1)

    def resample(self, site: str, count: int = 10) -> Tensor:
        """Draws of one local, rows first: (count, N, ...)."""
        axis = next(b.axis for b in locals_of(self.joint) if b.name == site)
        return self.split(self.draw(count))[site].movedim(1 + axis, 1)

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """Values by site as the story samples them, from (..., N, q)."""
        return {name: as_sampled(z[..., a:b], block) for (name, a, b), block in zip(self.blocks, locals_of(self.joint))}


def by_row(moment: Tensor, rows: int, block: Block) -> Tensor:
    """A moment of one local, with or without dimensions of states before its own, averaged over these: (rows, width)."""
    size = [rows if i == block.axis else n for i, n in enumerate(block.shape)]
    whole = moment.expand(torch.broadcast_shapes(moment.shape, size))
    return whole.movedim(block.axis - len(size), -len(size)).reshape(-1, rows, block.free_width).mean(0)


def as_sampled(z: Tensor, block: Block) -> Tensor:
    """The value of one local from what each row has of it, (..., N, width): rows lie along the block's axis."""
    inner = [n for i, n in enumerate(block.shape) if i != block.axis]
    lead = z.dim() - 2
    return z.reshape(*z.shape[:-1], *inner).movedim(lead, lead + block.axis)


def row_count(joint: LogJoint, kwargs: Mapping[str, Any]) -> int:
    """Rows among the arguments."""
    rows = joint.structure.row_arguments
    return len(kwargs[rows[0]]) if rows else int(joint.structure.num_rows or 1)


def take_some(joint: LogJoint, kwargs: Mapping[str, Any], most: int) -> dict[str, Any]:
    """At most `most` rows from all over the data."""
    rows, n = joint.structure.row_arguments, row_count(joint, kwargs)
    if not rows or n <= most:
        return dict(kwargs)
    return take_rows(kwargs, rows, torch.linspace(0, n - 1, most).round().long())


def is_linear_gaussian(problem: Problem) -> bool:
    """Whether every row's log joint is quadratic in its continuous locals: read off the families, then tested.

    Along random lines third differences vanish for a quadratic, and the curvature is negative.
    """
    from .joint import LogJoint

    structure = problem.structure
    found = structure.continuous_locals
    if not found or structure.uncountable or any(s.family not in FAMILIES for s in found):
        return False
    if not structure.row_arguments or structure.has_modules:
        return False
    joint = LogJoint(problem.thumbnail)
    few = take_some(joint, joint.problem.kwargs, TRIAL_ROWS)
    width = sum(b.free_width for b in locals_of(joint))
    # a finite latent in a plate inside the row has states of its own for every member: too many to list together
    if width > WIDEST or any(structure[n].plates != (structure.data_plate,) for n in joint.finite):
        return False
    if math.prod(structure[n].states or 1 for n in joint.finite) > STATES:
        return False
    try:
        with torch.no_grad():
            return all(lines_are_parabolas(RowTable(joint, joint.prior_draw(), few)) for _ in range(2))
    except (ValueError, RuntimeError, NotImplementedError, IndexError):
        return False


def lines_are_parabolas(rows: RowTable) -> bool:
    """Third differences of the log joint along random lines through z vanish, and second ones are negative."""
    dtype = rows.joint.problem.dtype
    centre, way = torch.randn(rows.n, rows.width, dtype=dtype), torch.randn(rows.n, rows.width, dtype=dtype)
    f = [rows.table(centre + t * way) for t in (-3.0, -1.0, 1.0, 3.0)]
    size = 1e-9 * (1 + torch.stack(f).abs().amax(0))
    third = (f[3] - 3 * f[2] + 3 * f[1] - f[0]).abs()
    bend = f[0] - f[1] - f[2] + f[3]
    return bool((third <= size).all() and (bend < size).all())
