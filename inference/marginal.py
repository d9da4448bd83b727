r"""The log joint of a linear-Gaussian story with its continuous locals integrated out: a density over the globals alone.

Samplers then move through a few numbers instead of q more for every row.  Where all rows share loadings, centre and noise,
:math:`\sum_n \log p(x_n \mid \theta)` is read off the columns' mean and scatter (Lawley and Maxwell, *Factor Analysis as a
Statistical Method*, 1971, chapter 2), whatever the number of rows; elsewhere every row is integrated as in
`linear_gaussian.py`.  Finite locals are summed out in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .handlers import Substitute
from .joint import Block, LogJoint, Unconstrained
from .linear_gaussian import TRIAL_ROWS, GaussianRows, as_sampled, row_count, take_some
from .session import streams_kept

if TYPE_CHECKING:
    from .problem import Problem

#: Numbers that draws of the locals may fill, and that are at work at once.
MOST_LOCALS, CHUNK = 20_000_000, 2_000_000
#: Numbers among the locals that are sampled like the others.
FEW_LOCALS = 50
#: Largest difference between the two forms of the likelihood, relative to its size, at which the fast one is trusted.
AGREEMENT = 1e-9


class MarginalJoint(LogJoint):
    """log p(data, globals) of a linear-Gaussian story.

    Parameters
    ----------
    problem
        A prepared story for which `structure.linear_gaussian` holds, with its data.

    Attributes
    ----------
    blocks, dim
        As for `LogJoint`, of the globals alone.
    how
        How the locals are integrated out, in words.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.full = LogJoint(problem)
        rows = row_count(self.full, problem.kwargs)
        self.few = take_some(self.full, problem.kwargs, 2 if rows > TRIAL_ROWS else rows)  # few may be all that will do
        rows = row_count(self.full, self.few)
        kind: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
        still = {b.name: as_sampled(torch.zeros(rows, b.free_width, **kind), b) for b in self.full.blocks if b.local}
        self.model = Substitute(still)(self.model)
        self._choose_form()

    @property
    def names(self) -> list[str]:
        """Every continuous latent, integrated out or not."""
        return self.full.names

    def _layout(self) -> tuple[Block, ...]:
        """Blocks of the globals, one after the other."""
        blocks, start = [], 0
        for b in super()._layout():
            if not b.local:
                size = b.stop - b.start
                blocks.append(replace(b, start=start, stop=start + size))
                start += size
        return tuple(blocks)

    def _choose_form(self) -> None:
        """The scatter where it gives what the rows give at a draw from the prior, else the rows."""
        from .methods.em.linear_form import recognise_form
        from .methods.em.linear_sums import scatter_of

        names = ", ".join(b.name for b in self.full.blocks if b.local)
        values = self.prior_draw()
        with torch.no_grad():
            exact = GaussianRows(self.full, values, self.problem.kwargs)
        self.shared = exact.shared
        self.how = f"{names} integrated out exactly, row by row"
        self.form = None
        if any(self.structure[s.name].missing for s in self.structure.observed):
            return
        with streams_kept():
            form = recognise_form(self.full, "mle")
        if form is None:
            return
        self.x = self.problem.kwargs[form.argument]
        self.mean, self.scatter = scatter_of(self.x, self.problem.dtype)
        self.form = form
        with torch.no_grad():
            fast, slow = self.likelihood(values), exact.log_rows.sum()
        if not bool((fast - slow).abs() <= AGREEMENT * (1 + slow.abs())):
            self.form = None
            return
        columns = form.columns
        source = f"from the {columns} x {columns} scatter" if form.states == 1 else "by Woodbury's identity"
        self.how = f"{names} integrated out exactly, {source}"

    def likelihood(self, values: Mapping[str, Tensor]) -> Tensor:
        """log p(data | globals), ()."""
        from .methods.em.linear_sums import by_component, from_scatter

        if self.form is None:
            return GaussianRows(self.full, values, self.problem.kwargs, self.shared).log_rows.sum()
        W, b, psi, log_pi = self.form.read(dict(values))
        c = b - self.mean
        if self.form.states == 1:
            return from_scatter(self.scatter, len(self.x), W[0], c[0], psi[0]).log_likelihood
        return by_component(self.x, self.mean, W, c, psi, log_pi).log_likelihood

    def prior(self, values: Mapping[str, Tensor] | Messenger) -> Tensor:
        """Log density of everything outside the data plate, ()."""
        plate = self.structure.data_plate
        outside = [f.value.sum() for f in self.factors(values) if plate not in f.plates]
        return sum(outside, torch.zeros((), dtype=self.problem.dtype, device=self.problem.device))

    # -- the locals again ---------------------------------------------------------------------------------------------

    def local_draws(self, flat: Tensor) -> dict[str, Tensor]:
        """A draw of the locals from their exact conditional for every draw (S, dim) of the globals: (S, N, ...event) each.

        Empty where they would fill too much memory; `Posterior.local` then draws them anew for some draws.
        """
        from .capture import capture

        first = self._moments(flat[0])
        rows, states, width = first[0].shape
        if len(flat) * rows * width > MOST_LOCALS:
            return {}
        chunk = max(1, CHUNK // (rows * states * width * width))
        single = capture(self._moments, (flat[0],), points=[(flat[len(flat) // 2],), (flat[-1],)])
        found = []
        for part in flat.split(chunk):
            if single.mode == "graph" and len(part) > 1:
                mean, factor, logits = torch.vmap(single.call)(part)
            else:
                mean, factor, logits = (torch.stack(v) for v in zip(*(self._moments(one) for one in part)))
            if states > 1:
                at = torch.distributions.Categorical(logits=logits).sample()  # (S, N)
                mean = mean.gather(2, at[..., None, None].expand(*at.shape, 1, width))
                wide = factor.expand(len(part), rows, *factor.shape[2:])
                factor = wide.gather(2, at[..., None, None, None].expand(*at.shape, 1, width, width))
            noise = torch.randn(len(part), rows, width, 1, dtype=mean.dtype, device=mean.device)
            solve = torch.linalg.solve_triangular(factor[:, :, 0].mT, noise, upper=True)
            found.append(mean[:, :, 0] + solve.squeeze(-1))
        z, draws, at = torch.cat(found), {}, 0
        for b in self.full.blocks:
            if b.local:
                draws[b.name] = as_sampled(z[..., at : at + b.free_width], b).double().cpu()
                at += b.free_width
        return draws

    def _moments(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Conditional means (N, states, q), factors of the precisions, and log weights of the finite locals' states."""
        handler = Unconstrained(self.blocks, flat)
        with torch.no_grad():
            self.trace(handler)
            if self.form is not None:
                return self._by_form(handler.values)
            rows = GaussianRows(self.full, handler.values, self.problem.kwargs, self.shared)
        return rows.mean, rows.factor, rows.log_states

    def _by_form(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The same by regression of z on x in every component, and Woodbury's identity for the components' densities."""
        assert self.form is not None
        W, b, psi, log_pi = self.form.read(dict(values))
        y = self.x.to(W) - b.unsqueeze(1)  # (K, N, D)
        weighted = W / psi.unsqueeze(-1)
        M = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device) + W.mT @ weighted
        factor, _ = torch.linalg.cholesky_ex(M)
        slope = y @ weighted  # (K, N, q)
        mean = torch.cholesky_solve(slope.mT, factor).mT
        if len(W) == 1:
            return mean.movedim(0, 1), factor.unsqueeze(0), torch.zeros(len(self.x), 1, dtype=W.dtype, device=W.device)
        log_det = psi.log().sum(1) + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        square = (y * y / psi.unsqueeze(1)).sum(-1) - (slope * mean).sum(-1)
        return mean.movedim(0, 1), factor.unsqueeze(0), log_pi - 0.5 * log_det - 0.5 * square.mT

    # -- in place of the full density --------------------------------------------------------------------------------

    def trace(
        self, values: Mapping[str, Tensor] | Messenger, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, str]]:
        """One run on the first rows, whose locals stand still: what lies outside the data plate does not see them."""
        return super().trace(values, self.few)

    def unconstrained(self, flat: Tensor, kwargs: Mapping[str, Any] | None = None, scale: float = 1.0) -> Tensor:
        """log density of the globals' flat unconstrained vector, Jacobian included: ()."""
        handler = Unconstrained(self.blocks, flat)
        return self.prior(handler) + handler.log_det + scale * self.likelihood(handler.values)

    def density(
        self, values: Mapping[str, Tensor], kwargs: Mapping[str, Any] | None = None, scale: float = 1.0
    ) -> Tensor:
        """log p(data, globals): ()."""
        return self.prior(values) + scale * self.likelihood(values)


def density_of_globals(problem: Problem) -> LogJoint:
    """What a sampler moves through: the globals alone where locals can be integrated out exactly, else everything.

    A few locals stay: they cost less than their integrals; those in plates inside a row, whose integrals cost the most;
    and all of them where there is nothing else to move through.
    """
    structure = problem.structure
    alone = not any(s.continuous and not s.local for s in structure.latents)
    if not structure.linear_gaussian or alone or any(len(s.plates) > 1 for s in structure.continuous_locals):
        return LogJoint(problem)
    few = sum(math.prod(s.shape) for s in structure.continuous_locals) <= FEW_LOCALS
    return LogJoint(problem) if few else MarginalJoint(problem)
