r"""Gaussian hidden Markov model: a state that moves from step to step, and a normal observation of it at each.

Story
-----
::

    pi             ~ Dirichlet(a, ..., a)             (K,)    where sequences begin
    for k = 1..K   "states"
        A_k        ~ Dirichlet(a, ..., a)             (K,)    where state k moves
        mu_k       ~ Normal(m, 5 s)                   (D,)    what state k looks like
        tau_k      ~ Gamma(2, 2 (s/3)^2)              (D,)    and how precisely
    for n = 1..N   "data"
        for t = 1..T
            z_nt   ~ Categorical(A[z_n(t-1)])         ()      the state, from Categorical(pi) at first
            x_nt   ~ Normal(mu[z_nt], 1/tau[z_nt])    (D,)    what we see

a is `concentration`, m and s are `loc` and `scale`.  Sequences of one column, x (N, T), have D = 1 and no last
dimension; `lengths` (N,) tells where shorter sequences end.

Summing z out needs no sum over K^T paths: :math:`\alpha_t(k) = p(x_{nt} \mid k)\sum_j \alpha_{t-1}(j)A_{jk}` adds them up
step by step, in O(T K^2).

Rabiner, *A tutorial on hidden Markov models and selected applications in speech recognition* (Proc. IEEE 77, 1989).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..mixtures import Setting, count_setting, filled, setting, cluster_means
from . import check_lengths


@dataclass(frozen=True)
class GaussianHMM:
    """Hidden Markov model with `num_states` states and normal observations.

    Parameters
    ----------
    num_states
        K.
    concentration
        a, the pseudo-count of every first state and every move.
    loc, scale
        m and s, where the data lie and how widely: one number, or one a column (D,).

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> GaussianHMM(num_states=2, scale=3.0)
    GaussianHMM(num_states=2, concentration=1.0, loc=0.0, scale=3.0)
    """

    num_states: int
    concentration: float = 1.0
    loc: Setting = 0.0
    scale: Setting = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_states", count_setting("num_states", self.num_states))
        concentration = setting("concentration", self.concentration, positive=True)
        if isinstance(concentration, tuple):
            raise ValueError(f"concentration must be one number, got {len(concentration)}")
        object.__setattr__(self, "concentration", concentration)
        object.__setattr__(self, "loc", setting("loc", self.loc))
        object.__setattr__(self, "scale", setting("scale", self.scale, positive=True))

    def model(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        num_data: int = 100,
        num_steps: int = 20,
        num_features: int = 1,
    ) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, T) or (N, T, D), what was seen; None dreams up `num_data` sequences.
        lengths
            (N,), steps of every sequence that count; None for all T.
        num_data, num_steps, num_features
            N, T and D where there is no `x`.

        Returns
        -------
        x, (N, T) or (N, T, D).
        """
        K, N, T = self.num_states, *self._sizes(x, num_data, num_steps)
        check_lengths(lengths, N, T)
        a, m, s = self._prior(x, num_features)
        pi = pyro.sample("pi", dist.Dirichlet(a))
        with pyro.plate("states", K):
            A = pyro.sample("A", dist.Dirichlet(a))
            mu = pyro.sample("mu", dist.Normal(m, 5.0 * s).to_event(m.dim()))
            tau = pyro.sample("tau", dist.Gamma(2.0, 2.0 * (s / 3) ** 2).to_event(m.dim()))
        seen = []
        with pyro.plate("data", N):
            z = None
            for t in pyro.markov(range(T)):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                fn = dist.Normal(mu[z], tau[z].rsqrt()).to_event(m.dim())
                if lengths is not None:
                    fn = fn.mask(t < lengths)
                seen.append(pyro.sample(f"x_{t}", fn, obs=None if x is None else x[:, t]))
        return torch.stack(seen, 1)

    def guide(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        num_data: int = 100,
        num_steps: int = 20,
        num_features: int = 1,
    ) -> None:
        """q(pi) q(A) q(mu) q(tau), each in its prior's family; z is summed out, not guessed."""
        K, N, T = self.num_states, *self._sizes(x, num_data, num_steps)
        a, m, s = self._prior(x, num_features)
        rows = N * T / K
        start = pyro.param("pi.concentration", a + N / K, constraint=constraints.positive)
        moves = pyro.param(
            "A.concentration", lambda: a + rows / K * (1 + torch.eye(K).to(a)), constraint=constraints.positive
        )
        loc = pyro.param("mu.loc", lambda: self._centres(x, m, s))
        scale = pyro.param(
            "mu.scale", lambda: (s / 3 / rows**0.5).expand(loc.shape).clone(), constraint=constraints.positive
        )
        shape = torch.full_like(loc, 2 + rows / 2)
        concentration = pyro.param("tau.concentration", shape, constraint=constraints.positive)
        rate = pyro.param("tau.rate", shape * (s / 3) ** 2, constraint=constraints.positive)
        pyro.sample("pi", dist.Dirichlet(start))
        with pyro.plate("states", K):
            pyro.sample("A", dist.Dirichlet(moves))
            pyro.sample("mu", dist.Normal(loc, scale).to_event(m.dim()))
            pyro.sample("tau", dist.Gamma(concentration, rate).to_event(m.dim()))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Sequences that switch between three regimes."""
        from ..data import load

        return cls(num_states=3, scale=3.0), {"x": load("regimes").x}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """One sequence of four numbers, few enough for an exact answer."""
        return cls(num_states=2, concentration=2.0), {"x": torch.tensor([[-0.8, -1.1, 0.9, 0.7]])}

    def _sizes(self, x: Tensor | None, num_data: int, num_steps: int) -> tuple[int, int]:
        if x is None:
            return num_data, num_steps
        if x.ndim not in (2, 3):
            raise ValueError(f"x has shape {tuple(x.shape)}, expected sequences (N, T) or (N, T, D)")
        return x.shape[0], x.shape[1]

    def _prior(self, x: Tensor | None, num_features: int) -> tuple[Tensor, Tensor, Tensor]:
        """a (K,), and m and s: () for one column, else (D,)."""
        shape: tuple[int, ...] = ()
        if x is not None and x.ndim == 3:
            shape = (x.shape[2],)
        elif x is None and (num_features > 1 or isinstance(self.loc, tuple) or isinstance(self.scale, tuple)):
            shape = (next((len(v) for v in (self.loc, self.scale) if isinstance(v, tuple)), num_features),)
        a = filled(self.concentration, (self.num_states,), x)
        return a, filled(self.loc, shape, x), filled(self.scale, shape, x)

    def _centres(self, x: Tensor | None, m: Tensor, s: Tensor) -> Tensor:
        """Where the states start: observations that lie apart."""
        K = self.num_states
        if x is None:
            return torch.normal(m.expand(K, *m.shape), s)
        rows = x.reshape(-1, x.shape[2] if x.ndim == 3 else 1)
        return cluster_means(rows[~rows.isnan().any(1)], K).reshape(K, *m.shape).to(m)
