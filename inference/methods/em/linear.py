r"""EM for linear-Gaussian rows: probabilistic PCA, factor analysis, and mixtures of factor analysers.

A story is recognised when, given a component k (or none), :math:`x_n \sim \mathcal N(W_k z_n + b_k, \Psi_k)` with
:math:`z_n \sim \mathcal N(0, I)`, diagonal :math:`\Psi`, and W, b and Psi copies of unknowns, in whatever shape the user
keeps them.  All updates are weighted regressions of the columns of x on (z, 1), written in expected sums:

complete rows, one component   everything from the D x D scatter, whatever N (Rubin and Thayer, Psychometrika 1982); without
                               priors, PPCA in closed form (Tipping and Bishop, JRSS B 1999) and factor analysis by alternating
                               an eigendecomposition with the noise (Joereskog, Psychometrika 1967)
components                     responsibilities by Woodbury (Ghahramani and Hinton 1996)
missing cells                  a posterior of z for every row from the cells that are seen
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data import some_rows
from ...joint import LogJoint
from .estep import Expectation
from .linear_form import Form, recognise_form
from .linear_sums import Sums, by_component, by_row, from_scatter, scatter_of
from .priors import Conjugate
from .terms import ground

Theta = dict[str, Tensor]

#: Turns of eigendecomposition and noise in one iteration of factor analysis.
TURNS = 10


class LinearGaussian:
    """Engine for one recognised story and its data; one run at a time."""

    together = False

    def __init__(self, joint: LogJoint, form: Form, kwargs: Mapping[str, Any], estimate: str, ridge: float) -> None:
        self.joint, self.form, self.estimate, self.ridge = joint, form, estimate, ridge
        self.x: Tensor = kwargs[form.argument]
        self.missing = bool(joint.structure[form.observed].missing)
        self.kind: dict[str, Any] = {"dtype": joint.problem.dtype, "device": joint.problem.device}
        self.ranks = joint.problem.ranks
        self.count = self.ranks.total(len(self.x))
        # of the complete rows of all ranks, or pairwise
        self.mean, self.scatter = scatter_of(self.x, self.kind["dtype"], self.ranks)
        self.variance = self.scatter.diagonal() / self.count
        self.unit, _ = ground(self.variance, self.mean)  # what the ridge is a share of
        self.simple = form.states == 1 and not self.missing
        self.plan_text = self.describe()

    @classmethod
    def recognise(
        cls, joint: LogJoint, kwargs: Mapping[str, Any], estimate: str, ridge: float
    ) -> LinearGaussian | None:
        """The engine for a story that has this structure, or None."""
        form = recognise_form(joint, estimate)
        return None if form is None else cls(joint, form, kwargs, estimate, ridge)

    # -- the plan ----------------------------------------------------------------------------------------------------

    @property
    def direct(self) -> bool:
        """Whether the maximum is found by eigendecompositions: one component, complete rows, no priors."""
        f = self.form
        flat = all(
            f.flat(name) for name in (f.loading.theta, f.noise.theta, f.centre.theta if f.centre else None) if name
        )
        ids = f.noise.index.expand(f.states, f.columns)[0]
        return self.simple and flat and f.free and (self.isotropic or len(ids.unique()) == f.columns)

    @property
    def isotropic(self) -> bool:
        """One noise variance for all columns."""
        return len(self.form.noise.index.unique()) == 1

    def describe(self) -> str:
        """The plan in words."""
        f, n = self.form, self.count
        if self.simple:
            how = f"Gaussian integral; everything from the {f.columns} x {f.columns} scatter of {n:,} rows"
        elif self.missing:
            how = f"Gaussian integral given the seen cells, {n:,} posteriors of {f.width} numbers"
        else:
            how = f"Gaussian integral by Woodbury, {n:,} rows x {f.states} components"
        lines = [f"EM plan ({self.estimate.upper()})", f"  {f.latent:<12} integrated out: {how}"]
        if f.component:
            lines.append(f"  {f.component:<12} summed out: softmax over {f.states} states")
        if self.direct:
            update = "closed form (PPCA)" if self.isotropic else "eigendecomposition and noise in turn"
            lines += [
                f"  {n:<12} {update}" for n in (f.loading.theta, f.noise.theta, f.centre.theta if f.centre else "") if n
            ]
        else:
            lines += [f"  {name:<12} closed form: {reason}" for name, reason in f.reasons.items()]
        return "\n".join(lines)

    # -- starts ------------------------------------------------------------------------------------------------------

    def start(self, seeds: Sequence[int], offset: int) -> Theta:
        """Principal axes of k-means++ clusters (of all rows where there is one component), turned at random."""
        starts = [self.start_one(seed) for seed in seeds]
        return {n: torch.stack([s[n] for s in starts]) for n in starts[0]}

    def start_one(self, seed: int) -> dict[str, Tensor]:
        """One start."""
        f, generator = self.form, torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        theta = self.ranks.first(self.joint.guide_draw() or self.joint.prior_draw())
        theta = {b.name: theta[b.name] for b in self.joint.blocks if not b.local}
        W, b, psi, share = [], [], [], []
        for mean, covariance, count in self.clusters(generator):
            values, vectors = torch.linalg.eigh(covariance)
            rest = values[: f.columns - f.width].clamp_min(0).mean() if f.columns > f.width else values[0] * 0
            rest = torch.maximum(rest, 1e-3 * self.variance.mean() + 1e-12)
            axes = vectors[:, -f.width :] * (values[-f.width :] - rest).clamp_min(1e-3 * rest).sqrt()
            turn = torch.linalg.qr(torch.randn(f.width, f.width, generator=generator, dtype=mean.dtype, device="cpu"))[
                0
            ]
            W.append(axes @ turn.to(axes.device))
            b.append(mean)
            psi.append(covariance.diagonal().sub((W[-1] ** 2).sum(1)).clamp_min(0.1 * rest))
            share.append(max(count, 1))
        weights = torch.tensor(share, **self.kind)
        return f.write(theta, torch.stack(W), torch.stack(b), torch.stack(psi), weights / weights.sum())

    def clusters(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Mean, covariance and size of every k-means++ cluster of some rows; of all rows for one component."""
        from .start import SAMPLE, lloyd, nearest, plus_plus

        if self.form.states == 1:
            yield self.mean, self.scatter / self.count, self.count
            return
        some = some_rows(self.count, SAMPLE, generator)
        x = self.ranks.rows({"x": self.x}, ("x",), some)["x"].to(**self.kind)
        x = torch.where(x.isnan(), self.mean, x)
        unit = ((x - self.mean) / self.variance.sqrt().clamp_min(1e-12)).cpu()
        labels = nearest(unit, lloyd(unit, plus_plus(unit, self.form.states, 1, generator)))[0].to(x.device)
        for k in range(self.form.states):
            mine = x[labels == k]
            rows = mine if len(mine) > self.form.width else x
            gap = rows - rows.mean(0)
            # A cluster of few rows has no axes of its own, but a place: components that start alike stay alike.
            centre = mine.mean(0) if len(mine) else x[int(torch.randint(len(x), (), generator=generator, device="cpu"))]
            yield centre, gap.T @ gap / len(rows), len(mine)

    # -- one iteration -----------------------------------------------------------------------------------------------

    def expectation(self, theta: Theta) -> Expectation:
        """Expected sums and log-likelihood at theta (R = 1)."""
        one = {n: v[0] for n, v in theta.items()}
        W, b, psi, log_pi = self.form.read(one)
        c = b - self.mean
        with torch.no_grad():
            if self.simple:
                sums = from_scatter(self.scatter, self.count, W[0], c[0], psi[0])
            else:
                sums = (by_row if self.missing else by_component)(self.x, self.mean, W, c, psi, log_pi)
                names = list(vars(sums))
                sums = Sums(**dict(zip(names, self.ranks.add(*(getattr(sums, n) for n in names)), strict=True)))
            prior = self.form.log_prior(one) if self.estimate == "map" else 0.0
        likelihood = sums.log_likelihood.reshape(1)
        return Expectation(
            likelihood + prior, likelihood, {"sums": {k: v[None] for k, v in sums.parts().items()}}, {}, []
        )

    def maximise(self, theta: Theta, e: Expectation) -> Theta:
        """Regressions of the columns on (z, 1), then the noise around them, then the weights."""
        one = {n: v[0] for n, v in theta.items()}
        if self.direct:
            new = self.eigen(one)
        else:
            new = self.regress(
                one, Sums(**{k: v[0] for k, v in e.stats["sums"].items()}, log_likelihood=e.log_likelihood[0])
            )
        return {n: v[None] for n, v in new.items()}

    def eigen(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        """PPCA: the maximum. Factor analysis: loadings given the noise, then the noise given the loadings."""
        f, n = self.form, self.count
        _, b, psi, _ = f.read(theta)
        gap = self.mean - b[0]
        if f.centre is not None:
            b, S = self.mean[None], self.scatter / n
        else:
            S = self.scatter / n + gap[:, None] * gap
        q, floor = f.width, self.ridge * self.unit
        if self.isotropic:
            values, vectors = torch.linalg.eigh(S)
            rest = values[:-q].clamp_min(0).mean() if q < len(values) else values[0] * 0
            rest = rest.clamp_min(float(floor.mean()))
            W = vectors[:, -q:] * (values[-q:] - rest).clamp_min(0).sqrt()
            return f.write(theta, W[None], b, rest.expand(1, f.columns), None)
        noise, W = psi[0], S
        for _ in range(TURNS):  # each costs nothing in rows
            root = noise.clamp_min(1e-300).sqrt()
            values, vectors = torch.linalg.eigh(S / root[:, None] / root)
            W = root[:, None] * vectors[:, -q:] * (values[-q:] - 1).clamp_min(0).sqrt()
            noise = torch.maximum((S.diagonal() - (W * W).sum(1)).clamp_min(0), floor)
        return f.write(theta, W[None], b, noise[None], None)

    def regress(self, theta: dict[str, Tensor], s: Sums) -> dict[str, Tensor]:
        """One M-step from the sums."""
        f = self.form
        W, b, psi, _ = f.read(theta)
        W, c = f.regression(s, W, b - self.mean, psi, self.mean)
        v = torch.cat([W, c.unsqueeze(-1)], -1)
        G, h = s.normal_equations()
        around = s.sxx - 2 * (v * h).sum(-1) + ((G @ v.unsqueeze(-1)).squeeze(-1) * v).sum(-1)
        prior: Conjugate = f.priors[f.noise.theta]
        index = f.noise.index.expand(f.states, f.columns)
        total = f.noise.pull(around.clamp_min(0)[None], index)[0] + prior.total
        count = f.noise.pull(s.n[None], index)[0] + prior.count
        value = total / count.clamp_min(1e-300)
        if f.flat(f.noise.theta):
            wide = f.noise.pull((s.n * self.unit)[None], index)[0] / count.clamp_min(1e-300)
            value = value + self.ridge * wide
        old = f.noise_variance(theta)
        value = torch.where(count > 1e-12, value.clamp_min(1e-300), old)
        psi = value.reshape(-1)[index]
        return f.write(theta, W, c + self.mean, psi, s.weights(f, theta) if f.component else None)


def engine_for(joint: LogJoint, kwargs: Mapping[str, Any], estimate: str, ridge: float, kernels: bool) -> Any:
    """The engine for rows with continuous locals: recognised sums, else ascent on the exact marginal likelihood."""
    found = LinearGaussian.recognise(joint, kwargs, estimate, ridge) if kernels else None
    if found is not None:
        return found
    from ...marginal import MarginalJoint
    from .marginal import MarginalAscent

    return MarginalAscent(MarginalJoint(joint.problem.over(dict(kwargs))), estimate)
