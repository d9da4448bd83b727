"""The ELBO of a Gaussian guide that is derived from the story: over the flat unconstrained vector of its log joint.

Kucukelbir, Tran, Ranganath, Gelman and Blei, *Automatic differentiation variational inference*, JMLR 2017. Finite latents
are summed out by the log joint; parameters of the story are points without a guide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from scipy.optimize import minimize
from torch import Tensor

from ..capture import constrain_many
from ..data import take_rows
from ..joint import Block, LogJoint
from ..problem import Problem
from .batches import Batches, Density
from .blame import culprit, impossibility, impossible, steepness
from .flow_guide import FLOW
from .gaussian import FAMILIES, Leaves, noise_for
from .shared import SharedDensity, own_noise

#: Draws from the prior, and points near the origin of the unconstrained space, that every start chooses from.
TRIES = (8, 4)
#: Unknowns up to which a start measures the curvature of the log density.
CURVATURE = 200


class DerivedTarget:
    """q(latents) and points for the parameters.

    Parameters
    ----------
    family
        A key of `FAMILIES`, or "flow".
    particles
        Draws a step.
    batch_size
        Rows a step; None for all.

    Raises
    ------
    ValueError
        Batches, and a story or a family that cannot be cut by rows.
    """

    def __init__(
        self,
        problem: Problem,
        family: str,
        particles: int,
        batch_size: int | None,
        mode: str = "auto",
        steps: int = 1,
    ) -> None:
        self.problem, self.family = problem, FLOW if family == "flow" else FAMILIES[family]
        self.joint = LogJoint(problem)
        self.batches = Batches(problem, batch_size)
        self.part = self.joint if self.batches.size is None else self.batch_joint()
        self.axes = {
            b.name: axis for b, p in zip(self.joint.blocks, self.part.blocks) if (axis := cut(b, p)) is not None
        }
        shared = [
            n for n in self.axes if self.problem.structure[n].kind == "latent" and not self.problem.structure[n].local
        ]
        if shared:
            raise ValueError(
                f"SVI(batch_size={batch_size}): the size of {', '.join(shared)} changes with the rows that are shown, outside "
                f"plate {problem.structure.data_plate!r}: a batch would tell another story. Use batch_size=None, or give that "
                f"size to the story as a number"
            )
        if self.axes and family != "mean_field":
            raise ValueError(
                f"SVI(guide={family!r}, batch_size={batch_size}): {', '.join(self.axes)} have a value a row, which are "
                f"dependent in this guide and cannot be cut; use guide='mean_field', a guide of the story's own, or "
                f"batch_size=None"
            )
        self.latent_at, self.point_at = positions(self.joint.blocks, problem.device)
        place = torch.empty(self.joint.dim, dtype=torch.long, device=problem.device)
        place[self.latent_at] = torch.arange(len(self.latent_at), device=problem.device)
        place[self.point_at] = torch.arange(len(self.point_at), device=problem.device)
        self.place = place  # position in the flat vector -> index among latents or points
        latents, points = positions(self.part.blocks, problem.device)
        self.order = torch.argsort(torch.cat([latents, points]))
        local = [b.name in self.axes for b in self.part.blocks if not b.param for _ in range(b.stop - b.start)]
        self.weights = torch.where(
            torch.tensor(local, dtype=torch.bool, device=problem.device), self.batches.scale, 1.0
        )
        self.size = len(self.latent_at)
        self.particles = particles if self.size else 1
        own = Density(self.single, self.examples(), self.particles, mode, steps)
        self.density = SharedDensity(own, problem.ranks) if problem.ranks.shares_rows else own
        self.mode, self.reason = self.density.mode, self.density.reason

    # -- the log density ---------------------------------------------------------------------------------------------

    def batch_joint(self) -> LogJoint:
        """Log joint of as many rows as a batch has."""
        size, structure = self.batches.size, self.problem.structure
        finite = [s.name for s in structure.finite if not s.local]
        if finite:
            raise ValueError(
                f"SVI(batch_size={size}): rows share the finite latents {finite}, which are summed out over all rows at "
                f"once; use batch_size=None"
            )
        kwargs = take_rows(self.problem.kwargs, self.batches.names, slice(0, size))
        try:
            joint = LogJoint(replace(self.problem, kwargs=kwargs, few={}))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"SVI(batch_size={size}): the story cannot be told with {size} of its {self.batches.rows} rows ({error}); "
                f"use batch_size=None"
            ) from error
        joint.holes = {s.name: s.missing > 0 for s in structure.observed}
        return joint

    def single(self, z: Tensor, points: Tensor, *rows: Tensor) -> Tensor:
        """log density of latents z and points, of all rows or of a batch that speaks for all."""
        flat = torch.cat([z, points])[self.order]
        kwargs = {**self.part.problem.kwargs, **dict(zip(self.batches.names, rows))}
        return self.part.unconstrained(flat, kwargs, self.batches.scale)

    def rows(self, indices: Tensor | None) -> tuple[Tensor, ...]:
        """What `single` takes after the points."""
        return () if self.batches.size is None or indices is None else self.batches.take(indices)

    def examples(self) -> list[tuple[Tensor, ...]]:
        """Points at which a graph of the density must agree with the story."""
        found = []
        for i in range(4):
            z, points = self.prior_draw() if i % 2 == 0 else self.near_origin()
            rows = self.batches.first(i * (self.batches.size or 0))
            where = self.gathered(rows)
            found.append((z[where[0]], points[where[1]], *self.rows(rows)))
        return found

    def gathered(self, rows: Tensor) -> tuple[Any, Any]:
        """Which latents and points belong to a batch; all of them where none is local."""
        if not self.axes:
            return slice(None), slice(None)
        found: dict[bool, list[Tensor]] = {False: [], True: []}
        for block in self.joint.blocks:
            at = torch.arange(block.start, block.stop, device=rows.device)
            if block.name in self.axes:
                at = at.reshape(block.free_shape).index_select(self.axes[block.name], rows).reshape(-1)
            found[block.param].append(self.place[at])
        empty = [torch.empty(0, dtype=torch.long, device=rows.device)]
        return torch.cat(found[False] or empty), torch.cat(found[True] or empty)

    # -- starts ------------------------------------------------------------------------------------------------------

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and points of a flat vector."""
        return flat[self.latent_at], flat[self.point_at]

    def flat(self, z: Tensor, points: Tensor) -> Tensor:
        """The flat vector (..., dim) of latents (..., L) and points (M,)."""
        flat = z.new_empty(*z.shape[:-1], self.joint.dim)
        flat[..., self.latent_at] = z
        flat[..., self.point_at] = points
        return flat

    def prior_draw(self) -> tuple[Tensor, Tensor]:
        """Latents from the prior, parameters as the story starts them."""
        pyro.clear_param_store()
        return self.split(self.joint.flatten(self.joint.prior_draw()))

    def near_origin(self) -> tuple[Tensor, Tensor]:
        """Latents uniform on (-1, 1)."""
        z, points = self.prior_draw()
        return 2.0 * torch.rand_like(z) - 1.0, points

    def start(self) -> Leaves:
        """The guide of highest ELBO around several points: the best of some tries, and points uphill from it.

        Raises
        ------
        ValueError
            The data are impossible at every try.
        """
        rows = self.rows(None if self.batches.size is None else self.batches.next())
        z, points = self.best_try()
        candidates: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = [(z, points, torch.full_like(z, 0.1), None)]
        if not self.axes:
            candidates += [(*at, *self.curvature(*at, *rows)) for at in self.uphill(z, points, *rows)]
        guides = []
        for at, fixed, scale, factor in candidates:
            leaves = self.family.start(at, scale, factor) if self.size else {}
            leaves |= {"points": fixed.clone()} if len(fixed) else {}
            guides.append(leaves)
        elbos = [
            float(torch.stack([self.objective(q)[0] for _ in range(4)]).mean().nan_to_num(-math.inf)) for q in guides
        ]
        return {n: coarse(v) for n, v in guides[int(np.argmax(elbos))].items()}

    def best_try(self) -> tuple[Tensor, Tensor]:
        """The try of highest log density among those with a finite gradient."""
        tries = [self.prior_draw() for _ in range(TRIES[0])] + [self.near_origin() for _ in range(TRIES[1])]
        if self.problem.ranks.shares_rows:
            tries = self.problem.ranks.first(tries)
            own_noise(self.problem)
        rows = self.batches.next() if self.batches.size is not None else None
        best, top = None, -math.inf
        for z, points in tries:
            where = self.gathered(rows) if rows is not None else (slice(None), slice(None))
            value, by_z, by_points = self.density.at(z[where[0]], points[where[1]], *self.rows(rows))
            if value.isfinite() and by_z.isfinite().all() and by_points.isfinite().all() and value > top:
                best, top = (z, points), float(value)
        if best is None:
            raise ValueError(self.impossible(*tries[0]))
        return best

    def uphill(self, z: Tensor, points: Tensor, *rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Points along an ascent of the log density by L-BFGS (the idea of Pathfinder: Zhang et al., JMLR 2022)."""
        like, size, path = torch.cat([z, points]), len(z), []

        def negative(q: np.ndarray) -> tuple[float, np.ndarray]:
            at = torch.from_numpy(q).to(like)
            value, by_z, by_points = self.density.at(at[:size], at[size:], *rows)
            gradient = torch.cat([by_z, by_points])
            if not (value.isfinite() and gradient.isfinite().all()):
                return 1e300, np.zeros_like(q)
            return -float(value), -gradient.double().cpu().numpy()

        def keep(q: np.ndarray) -> None:
            path.append(q.copy())

        begin = like.double().cpu().numpy()
        options = {"maxiter": 200, "maxcor": 20, "ftol": 1e-14}  # to an end that does not hang on the way there
        minimize(negative, begin, jac=True, method="L-BFGS-B", callback=keep, options=options)
        chosen = {min(i, len(path) - 1) for i in (10, 40, len(path) - 1)} if path else set()
        found = [torch.from_numpy(path[i]).to(like) for i in sorted(chosen)]
        return [(q[:size], q[size:]) for q in found]

    def curvature(self, z: Tensor, points: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and Cholesky factor of the Gaussian with the curvature of the log density at z."""
        plain = torch.full_like(z, 0.1)
        if not 0 < self.size <= CURVATURE:
            return plain, None
        step = 1e-4 if z.dtype == torch.float64 else 1e-2
        moved = step * torch.eye(self.size, dtype=z.dtype, device=z.device)
        ends = [torch.stack([self.density.at(z + sign * m, points, *rows)[1] for m in moved]) for sign in (1.0, -1.0)]
        precision = -(ends[0] - ends[1]) / (2 * step)
        if not bool(precision.isfinite().all()):
            return plain, None
        values, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
        values = values.clamp(0.25, 1e12)  # where the log density is flat or convex, no wider than 2
        covariance = (vectors / values) @ vectors.mT
        factor, info = torch.linalg.cholesky_ex(covariance)
        narrow = ((vectors * values) @ vectors.mT).diagonal().rsqrt()
        return narrow, None if bool(info) else factor

    # -- the ELBO ----------------------------------------------------------------------------------------------------

    def objective(self, leaves: Leaves) -> tuple[Tensor, Leaves]:
        """An estimate of the ELBO on a batch, and its gradient."""
        rows = None if self.batches.size is None else self.batches.next()
        return self.estimate(leaves, rows, None)

    def estimate(self, leaves: Leaves, rows: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Leaves]:
        """The same for given rows and noise (P, width of the family)."""
        where = self.gathered(rows) if rows is not None else (slice(None), slice(None))
        q = {n: v[where[0]] for n, v in leaves.items() if n != "points"} if self.axes else leaves
        points = leaves["points"][where[1]] if "points" in leaves else self.empty()
        if not self.size:
            value, _, by_points = self.density.at(self.empty(), points, *self.rows(rows))
            return value, {"points": self.scattered(by_points, leaves["points"], where[1])}
        if noise is None:
            noise = noise_for(self.family, self.particles, len(q["loc"]), q["loc"])
        draws = self.family.place(q, noise)
        values, by_z, by_points = self.density(draws.z, points, *self.rows(rows))
        log_q = (self.weights * draws.log_q).sum(-1) if draws.log_q.ndim == 2 else draws.log_q
        found = self.family.gradients(q, draws, by_z + self.weights * draws.pull)
        gradients = {n: self.scattered(g, leaves[n], where[0]) for n, g in found.items()}
        if "points" in leaves:
            gradients["points"] = self.scattered(by_points / len(values), leaves["points"], where[1])
        return (values - log_q).mean(), gradients

    def empty(self) -> Tensor:
        return torch.empty(0, dtype=self.problem.dtype, device=self.problem.device)

    def scattered(self, gradient: Tensor, like: Tensor, where: Any) -> Tensor:
        """The gradient with zeros for what the batch did not touch."""
        if isinstance(where, slice):
            return gradient
        return torch.zeros_like(like).index_copy_(0, where, gradient)

    def rate(self, name: str) -> float:
        """One step size for all."""
        return 1.0

    def whole_norm(self, norm: Tensor, gradients: Leaves) -> Tensor:
        """Ranks hold the same parameters, all of them."""
        return norm

    # -- answers -----------------------------------------------------------------------------------------------------

    def values(self, leaves: Leaves) -> dict[str, Tensor]:
        """Sites at the centre of the guide."""
        return self.joint.constrain(self.centre(leaves))

    def centre(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """The flat vector at the centre of the guide."""
        return self.flat(leaves.get("loc", self.empty()), leaves.get("points", self.empty()))

    def draws(self, leaves: Leaves, count: int, seconds: float) -> tuple[Tensor, dict[str, Tensor]]:
        """log p - log q (S,) and draws (S, ...) of the continuous latents, on all rows (on some of very many, in batches).

        S is `count`, or fewer where the story has to be run for each and `seconds` are over.
        """
        points = leaves.get("points", self.empty())
        if not self.size:
            only = self.joint.unconstrained(self.flat(self.empty(), points), None, self.batches.whole).detach()
            return self.problem.ranks.mean(only.reshape(1))[0], {}
        if self.problem.ranks.shares_rows:
            own_noise(self.problem)
        found = self.family.place(leaves, noise_for(self.family, count, self.size, leaves["loc"], antithetic=False))
        log_q = found.log_q.sum(-1) if found.log_q.ndim == 2 else found.log_q
        density = self.density
        if self.batches.size is not None:
            examples = [(z, points) for z in found.z[:3]]
            kwargs, scale = self.batches.judged()
            density = Density(lambda z, m: self.joint.unconstrained(self.flat(z, m), kwargs, scale), examples, 2)
        values, began = [], time.perf_counter()
        chunk = max(1, min(128, int(2e7 / max(1, self.problem.structure.data_bytes))))
        for part in found.z.split(chunk):
            values.append(density.values(part, points))
            if time.perf_counter() - began > seconds and len(values) * chunk >= 100:
                break
        ratio, ranks = torch.cat(values), self.problem.ranks
        if ranks.shares_rows:
            ratio = ranks.mean(ratio[: min(ranks.gather(len(ratio)))])[0]
        constrained = constrain_many(self.joint, self.flat(found.z[: len(ratio)], points))
        latents = [b.name for b in self.joint.blocks if not b.param]
        return ratio - log_q[: len(ratio)], {n: constrained[n] for n in latents}

    def outside(self, leaves: Leaves) -> str | None:
        """A parameter of the guide that is not finite."""
        return next((n for n, v in leaves.items() if not bool(v.isfinite().all())), None)

    def blame(self, leaves: Leaves, gradients: Leaves) -> tuple[str | None, str]:
        """The latent whose part of the guide is not finite, and the site that made it so."""
        latent, text = None, ""
        for key, gradient in gradients.items():
            bad = (~gradient.isfinite()).reshape(len(gradient), -1).any(1).nonzero().flatten()
            if len(bad):
                at = int((self.point_at if key == "points" else self.latent_at)[bad[0]])
                latent = next(b.name for b in self.joint.blocks if b.start <= at < b.stop)
                text = f"first at parameter {key!r} of the guide, for {latent!r}"
                break
        site = self.culprit(leaves)
        if site is not None:
            text += f"{', from' if text else 'first at'} site {site!r}"
        return latent or site, text or "no single site is at fault"

    def culprit(self, leaves: Leaves) -> str | None:
        """The site whose log density, or its gradient, is not finite at the centre of the guide."""
        return culprit(self.joint, self.centre(leaves))

    def impossible(self, z: Tensor, points: Tensor) -> str:
        """Why no try has a finite log density."""
        leaves = {"loc": z, "points": points} if self.size else {"points": points}
        flat, what = self.centre(leaves), f"no start was found in {sum(TRIES)} tries"
        if (found := impossible(self.joint, flat)) is not None:
            return f"{what}: {impossibility(*found)}"
        with torch.enable_grad():
            here = flat.detach().clone().requires_grad_()
            value = self.joint.unconstrained(here)
            slope = torch.autograd.grad(value, here)[0] if value.requires_grad else torch.zeros_like(here)
        if bool(value.isfinite()) and not bool(slope.isfinite().all()):
            return f"{what}: {steepness(self.joint, flat, slope.cpu().numpy())}"
        site = self.culprit(leaves)
        where = f"site {site!r} has no finite log density" if site else "the log density is not finite"
        return f"{what}: {where} at any of them; look for a prior far from the data's scale"


def coarse(value: Tensor) -> Tensor:
    """The value to five digits: what rounding did on the way to a start, on so many threads or ranks, ends here."""
    mantissa, exponent = torch.frexp(value)
    return torch.ldexp((mantissa * 2.0**17).round() / 2.0**17, exponent)


def cut(whole: Block, part: Block) -> int | None:
    """The axis over which a batch holds fewer values than all rows do, or None where they are the same."""
    if whole.free_shape == part.free_shape:
        return None
    return next(i for i, (a, b) in enumerate(zip(whole.free_shape, part.free_shape)) if a != b)


def positions(blocks: tuple[Block, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where latents and where parameters lie in the flat vector."""
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for block in blocks:
        found[block.param].append(torch.arange(block.start, block.stop, device=device))
    empty = [torch.empty(0, dtype=torch.long, device=device)]
    return torch.cat(found[False] or empty), torch.cat(found[True] or empty)
