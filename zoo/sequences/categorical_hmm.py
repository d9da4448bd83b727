r"""Categorical hidden Markov model: a state that moves from step to step, and a symbol that it emits at each.

Story
-----
::

    pi             ~ Dirichlet(a, ..., a)             (K,)    where sequences begin
    for k = 1..K   "states"
        A_k        ~ Dirichlet(a, ..., a)             (K,)    where state k moves
        B_k        ~ Dirichlet(b, ..., b)             (V,)    which symbols state k emits
    for n = 1..N   "data"
        for t = 1..T
            z_nt   ~ Categorical(A[z_n(t-1)])         ()      the state, from Categorical(pi) at first
            x_nt   ~ Categorical(B[z_nt])             ()      the symbol that we see, 0..V-1

a is `concentration`, b is `symbol_concentration`; `lengths` (N,) tells where shorter sequences end.

EM on this story is the algorithm of Baum and Welch: expected moves and emissions by forward and backward passes, then
their shares.

Rabiner, *A tutorial on hidden Markov models and selected applications in speech recognition* (Proc. IEEE 77, 1989).
"""

from dataclasses import dataclass
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..mixtures import count_setting, setting
from . import check_lengths


@dataclass(frozen=True)
class CategoricalHMM:
    """Hidden Markov model with `num_states` states and `num_symbols` symbols.

    Parameters
    ----------
    num_states, num_symbols
        K and V.
    concentration, symbol_concentration
        a and b, the pseudo-counts of every first state and move, and of every symbol.

    Raises
    ------
    ValueError
        A value outside its range.

    Examples
    --------
    >>> CategoricalHMM(num_states=2, num_symbols=3)
    CategoricalHMM(num_states=2, num_symbols=3, concentration=1.0, symbol_concentration=1.0)
    """

    num_states: int
    num_symbols: int
    concentration: float = 1.0
    symbol_concentration: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_states", "num_symbols"):
            object.__setattr__(self, name, count_setting(name, getattr(self, name)))
        for name in ("concentration", "symbol_concentration"):
            value = setting(name, getattr(self, name), positive=True)
            if isinstance(value, tuple):
                raise ValueError(f"{name} must be one number, got {len(value)}")
            object.__setattr__(self, name, value)

    def model(
        self, x: Tensor | None = None, lengths: Tensor | None = None, num_data: int = 100, num_steps: int = 20
    ) -> Tensor:
        """Tell the story.

        Parameters
        ----------
        x
            (N, T), symbols 0..V-1; None dreams up `num_data` sequences.
        lengths
            (N,), steps of every sequence that count; None for all T.
        num_data, num_steps
            N and T where there is no `x`.

        Returns
        -------
        x, (N, T).
        """
        K, V = self.num_states, self.num_symbols
        N, T = (num_data, num_steps) if x is None else x.shape
        check_lengths(lengths, N, T)
        pi = pyro.sample("pi", dist.Dirichlet(torch.full((K,), self.concentration)))
        with pyro.plate("states", K):
            A = pyro.sample("A", dist.Dirichlet(torch.full((K,), self.concentration)))
            B = pyro.sample("B", dist.Dirichlet(torch.full((V,), self.symbol_concentration)))
        seen = []
        with pyro.plate("data", N):
            z = None
            for t in pyro.markov(range(T)):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                fn = dist.Categorical(B[z])
                if lengths is not None:
                    fn = fn.mask(t < lengths)
                seen.append(pyro.sample(f"x_{t}", fn, obs=None if x is None else x[:, t]))
        return torch.stack(seen, 1)

    def guide(
        self, x: Tensor | None = None, lengths: Tensor | None = None, num_data: int = 100, num_steps: int = 20
    ) -> None:
        """q(pi) q(A) q(B) as Dirichlets; z is summed out, not guessed."""
        K, V = self.num_states, self.num_symbols
        N, T = (num_data, num_steps) if x is None else x.shape
        # Not all alike: states that start the same stay the same.
        rows = {"pi": N / K * torch.ones(K), "A": N * T / K**2 * (0.5 + torch.rand(K, K))}
        rows["B"] = N * T / (K * V) * (0.5 + torch.rand(K, V))
        prior = {"pi": self.concentration, "A": self.concentration, "B": self.symbol_concentration}
        counts = {
            name: pyro.param(f"{name}.concentration", prior[name] + rows[name], constraint=constraints.positive)
            for name in rows
        }
        pyro.sample("pi", dist.Dirichlet(counts["pi"]))
        with pyro.plate("states", K):
            pyro.sample("A", dist.Dirichlet(counts["A"]))
            pyro.sample("B", dist.Dirichlet(counts["B"]))

    @classmethod
    def example(cls) -> tuple[Self, dict[str, Tensor]]:
        """Days on which somebody walks, shops or cleans, as the hidden weather has it."""
        from ..data import load

        return cls(num_states=2, num_symbols=3), {"x": load("weather").x.long()}

    @classmethod
    def tiny(cls) -> tuple[Self, dict[str, Tensor]]:
        """Two sequences of three symbols, few enough for an exact answer."""
        x = torch.tensor([[0, 0, 1], [1, 1, 1]])
        return cls(num_states=2, num_symbols=2, concentration=2.0, symbol_concentration=2.0), {"x": x}
