"""Posteriors of local latents, for fitted and for new rows.

Finite latents: exact, by enumeration, averaged over draws of the globals.  Continuous ones: the method's own draws for
fitted rows; for new rows the fitted guide where it reads rows, else a Laplace proposal for each row, corrected by importance
weights (multivariate t with five degrees of freedom around the mode; Tierney and Kadane, JASA 1986, and Owen, *Monte Carlo
theory, methods and examples*, chapter 9).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .amortised import GuideRows
from .doubtful import RowWeights, warning
from .handlers import Substitute
from .joint import Block, LogJoint
from .linear_gaussian import GaussianRows
from .score import ROW_DRAWS, fewer, told
from .transforms import unconstrain_to

if TYPE_CHECKING:
    from .posterior import Posterior
    from .score import Ladder, Score

#: Draws of the globals for which continuous locals are integrated.
GLOBAL_DRAWS = 20
#: Importance draws a row for each of them, and for a point.
PROPOSALS, POINT_PROPOSALS = 100, 1000
#: Numbers of rows' latents and data that are looked at together, and of latents that are drawn together.
TOGETHER, DRAWN = 2_000_000, 20_000_000


def local_posterior(posterior: Posterior, site: str, data: Any, asked: int | None) -> Tensor:
    """See `Posterior.local`."""
    structure, draws = posterior.structure, ROW_DRAWS if asked is None else asked
    chain = [s.name for s in structure.finite if re.fullmatch(rf"{re.escape(site)}_?\d+", s.name)]
    if site not in structure and chain:
        return torch.stack([local_posterior(posterior, name, data, asked) for name in chain], dim=1)
    locals_ = [s.name for s in structure.latents if s.local or s.name in posterior.joint.finite]
    if site not in locals_:
        what = (
            "is global: posterior.draws[...] has it"
            if site in posterior.draws
            else "is no latent inside the data plate"
        )
        raise ValueError(f"{site!r} {what}; the local latents are {locals_}")
    kept = data is None and site in posterior.draws and posterior.kind != "point"
    if structure.admixture and not kept and (posterior.kind != "samples" or data is not None):
        from .topics.answers import local

        return local(posterior, site, data, draws)
    kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
    drawn = data is None and all(s.name in posterior.draws for s in structure.continuous_locals)
    if not structure[site].enumerable:
        if data is None and site in posterior.draws and posterior.kind != "point":
            axis = next((b.axis for b in posterior.joint.blocks if b.name == site), 0)  # counts are no block
            return posterior.draws[site].movedim(1 + axis, 1)
        with posterior.problem.scope(posterior.seed):
            chosen = draws_of_globals(posterior, min(draws, GLOBAL_DRAWS))
            count = max(1, math.ceil(draws / len(chosen)))
            found = [row_integral(posterior, i, kwargs).resample(site, count) for i in chosen]
        return torch.cat(found)[:draws]
    if structure.continuous_locals:
        return _beside_continuous(posterior, site, kwargs, draws, fitted=drawn)
    with posterior.problem.scope(posterior.seed):
        indices = posterior.some_draws(fewer(asked, posterior, kwargs))
        values = [posterior.draw(i) for i in indices]
        pieces = posterior.joint.pieces(kwargs) if structure[site].local else [kwargs]
        found = []
        for piece in told(posterior, pieces, site):
            total = sum(posterior.joint.local_probabilities(site, v, piece) for v in values)
            found.append(total / len(indices))
    return found[0] if len(found) == 1 else torch.cat(found)  # type: ignore[call-overload, return-value]


def draws_of_globals(posterior: Posterior, most: int) -> list[int]:
    """Indices of draws that differ in what rows share; one where only rows have latents."""
    shared = any(s.continuous and not s.local for s in posterior.structure.latents)
    return posterior.some_draws(most if shared else 1)


def row_integral(posterior: Posterior, index: int, kwargs: dict[str, Any], proposals: int = PROPOSALS) -> Any:
    """The integral over the rows' continuous locals at one draw of the globals.

    Exact where the story is linear-Gaussian; with a guide that reads rows as the proposal; else with one made row by row.
    """
    if posterior.structure.linear_gaussian:
        return GaussianRows(posterior.joint, posterior.draw(index), kwargs)
    if posterior.recogniser is not None:
        return GuideRows(posterior.recogniser, posterior.joint, posterior.draw(index), kwargs, proposals)
    return RowIntegral(posterior.joint, posterior.draw(index), kwargs, proposals)


def _beside_continuous(posterior: Posterior, site: str, kwargs: dict[str, Any], draws: int, fitted: bool) -> Tensor:
    """A finite latent whose row also has continuous ones: average over draws of those as well."""
    joint, total, count = posterior.joint, torch.zeros(()), 0
    if posterior.structure.linear_gaussian:
        with posterior.problem.scope(posterior.seed):
            indices = posterior.some_draws(draws)
            exact = (GaussianRows(joint, posterior.draw(i), kwargs).state_probabilities(site) for i in indices)
            return sum(exact) / len(indices)  # type: ignore[return-value]
    with posterior.problem.scope(posterior.seed):
        indices = posterior.some_draws(draws if fitted else min(draws, GLOBAL_DRAWS))
        each = 1 if fitted else math.ceil(draws / len(indices))
        for i in indices:
            drawn = {} if fitted else row_integral(posterior, i, kwargs).resample_jointly(each)
            for k in range(each):
                values = {**posterior.draw(i), **{n: v[k] for n, v in drawn.items()}}
                total = total + joint.local_probabilities(site, values, kwargs)
                count += 1
    return total / count


class RowsFree(Messenger):
    """Feed local continuous latents from one free vector a row, keeping each row's log-Jacobian.

    A row's vector holds all that the latent has in the plates inside the row; the rows may lie along any dimension.
    """

    def __init__(self, blocks: list[tuple[str, int, int]], free: Tensor, plate: str | None) -> None:
        super().__init__()
        self.places = {name: (a, b) for name, a, b in blocks}
        self.free, self.plate = free, plate
        self.values: dict[str, Tensor] = {}
        self.log_det: Tensor = free.new_zeros(len(free))

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self.places or msg["is_observed"]:
            return
        a, b = self.places[msg["name"]]
        fn, frames = msg["fn"], [f for f in msg["cond_indep_stack"] if f.vectorized]
        batch = [1] * max((-f.dim for f in frames), default=0)  # without dimensions that summed-out latents bring
        for frame in frames:
            batch[frame.dim] = frame.size
        axis = next((len(batch) + f.dim for f in frames if f.name == self.plate), 0)
        transform = unconstrain_to(fn.support)
        shape = list(transform.inverse_shape(torch.Size(batch) + fn.event_shape))
        shape.insert(0, shape.pop(axis))
        free = self.free[:, a:b].reshape(shape).movedim(0, axis)
        value = transform(free)
        log_det = transform.log_abs_det_jacobian(free, value)
        self.log_det = self.log_det + log_det.movedim(axis, 0).reshape(len(self.free), -1).sum(-1)
        self.values[msg["name"]] = msg["value"] = value  # not marked as done: see `Substitute`
        msg["infer"] = {**(msg["infer"] or {}), "enumerate": None}


class Stacked(Substitute):
    """Globals held fixed, locals from their free vectors."""

    def __init__(self, values: dict[str, Tensor], rows: RowsFree) -> None:
        super().__init__(values)
        self.rows = rows

    def _pyro_sample(self, msg: dict) -> None:
        super()._pyro_sample(msg)
        self.rows._pyro_sample(msg)


@dataclass
class FreeRows:
    """The continuous locals of every row as one unconstrained vector a row, at one draw of the globals.

    What lies in plates of its own inside the row is part of the vector.

    Parameters
    ----------
    joint, values, kwargs
        The story, a draw (local entries are ignored), and the rows.
    """

    joint: LogJoint
    values: dict[str, Tensor]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        locals_: list[Block] = [b for b in self.joint.blocks if b.local and not b.param]
        self.axes = {b.name: b.axis for b in locals_}
        self.globals = {b.name: self.values[b.name] for b in self.joint.blocks if not b.local and "$$$" not in b.name}
        rows = self.joint.structure.row_arguments
        self.n = len(self.kwargs[rows[0]]) if rows else int(self.joint.structure.num_rows or 1)
        self.blocks, start = [], 0
        for block in locals_:
            self.blocks.append((block.name, start, start + block.free_width))
            start += block.free_width
        self.width = start

    def log_rows(self, free: Tensor, kwargs: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x_n, z_n | globals) + log-Jacobian of every row at its free vector, (N,), and the latents as sampled."""
        handler = RowsFree(self.blocks, free, self.joint.structure.data_plate)
        rows = self.joint.rows(Stacked(self.globals, handler), self.kwargs if kwargs is None else kwargs)
        return rows + handler.log_det, handler.values

    def log_many(self, points: Tensor) -> Tensor:
        """`log_rows` at many free vectors of every row, (S, N, width): (S, N); side by side where the story allows."""
        structure = self.joint.structure
        cells = self.width + sum(math.prod(s.shape) for s in structure.observed) / max(1, structure.num_rows or 1)
        most = min(len(points), 64, int(TOGETHER / (self.n * cells)))
        if most > 1:
            try:
                return torch.vmap(lambda free: self.log_rows(free)[0], chunk_size=most)(points)
            except (RuntimeError, ValueError, NotImplementedError):
                pass  # the story uses an operation that has no batching rule
        return torch.stack([self.log_rows(free)[0] for free in points])


@dataclass
class RowIntegral(FreeRows):
    """Integral over the continuous locals of every row, at one draw of the globals.

    Parameters
    ----------
    proposals
        Importance draws a row.
    """

    proposals: int = PROPOSALS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mode, self.factor = self.laplace()
        self.points, self.weights = self.importance()

    def log_weights(self) -> Tensor:
        """log p(x_n, z) - log q(z) at the proposals, (S, N)."""
        return self.weights

    def laplace(self) -> tuple[Tensor, Tensor]:
        """Mode of every row, and a Cholesky factor of the inverse Hessian there."""
        free = torch.zeros(self.n, self.width, dtype=self.joint.problem.dtype).requires_grad_()
        optimiser = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = -self.log_rows(free)[0].sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)
            gradient = torch.autograd.grad(self.log_rows(free)[0].sum(), free, create_graph=True)[0]
            columns = []
            for j in range(self.width):
                column = torch.autograd.grad(gradient[:, j].sum(), free, retain_graph=True, allow_unused=True)[0]
                columns.append(torch.zeros_like(free) if column is None else column)
        precision = -torch.stack(columns, -1).detach()
        values, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
        scale = values.clamp_min(1e-4).rsqrt()
        return free.detach(), vectors * scale.unsqueeze(-2)

    def importance(self) -> tuple[Tensor, Tensor]:
        """Proposals (S, N, width) and their log weights (S, N)."""
        t = torch.distributions.StudentT(torch.tensor(5.0, dtype=self.mode.dtype))
        normal = torch.randn(self.proposals, self.n, self.width, dtype=self.mode.dtype)
        chi = torch.distributions.Chi2(t.df).sample((self.proposals, self.n))
        eps = normal * (t.df / chi).sqrt().unsqueeze(-1)
        points = self.mode + torch.einsum("nij,snj->sni", self.factor, eps)  # a batched product copies factors S times
        d, df = self.width, 5.0
        log_det = torch.linalg.slogdet(self.factor)[1]
        constant = math.lgamma((df + d) / 2) - math.lgamma(df / 2) - d / 2 * math.log(df * math.pi)
        log_q = constant - log_det - (df + d) / 2 * torch.log1p((eps**2).sum(-1) / df)
        with torch.no_grad():
            log_p = self.log_many(points)
        return points, log_p - log_q

    def log_evidence(self) -> tuple[Tensor, Tensor]:
        """log p(x_n | globals) and the variance of the estimated density relative to its square: (N,) each."""
        return evidence(self.weights)

    def resample(self, site: str, count: int = 10) -> Tensor:
        """Draws of a local from its posterior: (count, N, ...)."""
        return self.resample_jointly(count)[site].movedim(1 + self.axes[site], 1)

    def resample_jointly(self, count: int) -> dict[str, Tensor]:
        """Draws of all latents of every row together: (count, ...shape) each, as the story samples them."""
        chosen = torch.distributions.Categorical(logits=self.weights.T).sample((count,))
        with torch.no_grad():
            draws = [self.log_rows(self.points[c, torch.arange(self.n)])[1] for c in chosen]
        return {n: torch.stack([d[n] for d in draws]) for n, _, _ in self.blocks}


def integrated_rows(posterior: Posterior, kwargs: dict[str, Any], draws: int) -> Score:
    """log p(x_n | fitted data) with continuous locals integrated out row by row."""
    from .score import Score

    exact, guided = posterior.structure.linear_gaussian, posterior.recogniser is not None
    values, relative, watch = [], [], RowWeights()
    with posterior.problem.scope(posterior.seed):
        indices = draws_of_globals(posterior, draws if exact else min(draws, GLOBAL_DRAWS))
        alone = max(draws, POINT_PROPOSALS) if guided else POINT_PROPOSALS
        proposals = PROPOSALS if len(indices) > 1 else alone
        for i in indices:
            found = row_integral(posterior, i, kwargs, proposals)
            value, error = found.log_evidence() if exact else evidence(watch(found.log_weights()))
            values.append(value)
            relative.append(error)
    table, errors = torch.stack(values), torch.stack(relative)
    rows = table.logsumexp(0) - math.log(len(table))
    ratio = (table - rows).exp()
    between = ratio.var(0) / len(table) if len(table) > 1 else torch.zeros_like(rows)
    within = (ratio**2 * errors).sum(0) / len(table) ** 2
    plug_in = len(table) == 1
    if exact:
        name = "exact Gaussian integral over the local latents" + ("" if plug_in else f", mean over {len(table)} draws")
        rule = "plug-in" if plug_in else "estimate under q" if posterior.kind == "variational" else "estimate"
        return Score(rows, name, between.sqrt(), rule)
    what = "draws of the guide" if guided else "Laplace-t proposals"
    name = f"importance sampling of the local latents ({proposals} {what} a row)"
    name += "" if plug_in else f", mean over {len(table)} draws"
    rule = "plug-in estimate" if plug_in else "estimate"
    error, doubts = (between + within).sqrt(), watch.doubts()
    listed = () if doubts is None else tuple(doubts.rows.tolist())
    return Score(rows, name, error, rule, warning(doubts, rows, error, guided), listed)


def evidence(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean weight of every row (S, N), and its variance relative to its square: (N,) each."""
    value = log_weights.logsumexp(0) - math.log(len(log_weights))
    return value, (log_weights - value).exp().var(0) / len(log_weights)


def shared_locals(posterior: Posterior, kwargs: dict[str, Any], count: int) -> list[dict[str, Tensor]] | None:
    """`count` joint draws of rows' locals at once, where all draws share the same globals; else None."""
    one = len(draws_of_globals(posterior, 2)) == 1
    if not one or not posterior.structure.continuous_locals:
        return None
    integral = row_integral(posterior, 0, kwargs, POINT_PROPOSALS // 4)
    exact = posterior.structure.linear_gaussian
    if exact and count * integral.n * integral.width > DRAWN:
        return None
    found = integral.split(integral.draw(count)) if exact else integral.resample_jointly(count)
    return [{n: v[i] for n, v in found.items()} for i in range(count)]


def row_ladder(posterior: Posterior, data: Any, draws: int, k: int) -> Ladder:
    """See `Posterior.ladder`; every draw of the globals among those used gets its share of the proposals."""
    from .score import ladder, without_density

    if reason := without_density(posterior):
        raise ValueError(reason)
    if not posterior.structure.continuous_locals or posterior.structure.admixture:
        raise ValueError(
            "rows of this story have no continuous latents to integrate over: log_prob(data) has their density"
        )
    if posterior.structure.linear_gaussian:
        raise ValueError(
            "the integral over the rows' latents is exact here: log_prob(data) has it, and no bound is needed"
        )
    kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
    with posterior.problem.scope(posterior.seed):
        indices = draws_of_globals(posterior, min(draws, GLOBAL_DRAWS))
        found = [row_integral(posterior, i, kwargs, max(1, draws // len(indices))) for i in indices]
        table = torch.cat([f.log_weights() for f in found])
    return ladder(table, min(k, len(table)))
