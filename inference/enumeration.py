r"""Sum finite latents out of a product of factors, exactly, in log space.

A factor is a tensor whose dimensions have names: one per finite latent and one per plate.  Plates are products, latents
are sums; `sum_out` eliminates the latents plate by plate from the inside (Obermeyer et al., *Tensor Variable Elimination
for Plated Factor Graphs*, ICML 2019, algorithm 1).  A plate that is kept stays a batch dimension: with the data plate
kept, the answer is log p(x_n | globals) for every row at once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .folding import fold_chains


@dataclass(frozen=True, eq=False)
class LogFactor:
    """log-factor of one site: `value` has one dimension per name in `dims`; `plates` are the plates it lies in."""

    name: str
    value: Tensor
    dims: tuple[str, ...]
    plates: frozenset[str]


def align(value: Tensor, dims: tuple[str, ...], target: tuple[str, ...]) -> Tensor:
    """Permute and unsqueeze `value` so that its dimensions follow `target`, a superset of `dims`."""
    order = [dims.index(d) for d in target if d in dims]
    value = value.permute(order)
    index = tuple(slice(None) if d in dims else None for d in target)
    return value[index]


def multiply(factors: list[tuple[Tensor, tuple[str, ...]]]) -> tuple[Tensor, tuple[str, ...]]:
    """Product (a sum of logs) of named tensors over the union of their dimensions."""
    if len(factors) == 1:
        return factors[0]
    dims = tuple(dict.fromkeys(d for _, ds in sorted(factors, key=lambda f: -len(f[1])) for d in ds))
    total = align(*factors[0], dims)
    for value, ds in factors[1:]:
        total = total + align(value, ds, dims)
    return total, dims


def next_to_eliminate(scopes: list[tuple[str, ...]], candidates: Iterable[str], sizes: Mapping[str, int]) -> str:
    """The latent whose elimination builds the smallest table (min-size heuristic); ties go to the first name."""

    def cost(name: str) -> float:
        union = {d for scope in scopes if name in scope for d in scope}
        return math.prod(float(sizes[d]) for d in union)

    return min(sorted(candidates), key=cost)


def log_sum(value: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where every term is -inf."""
    top = value.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    total = (value - top).exp().sum(dim)
    tiny = torch.finfo(value.dtype).tiny
    dead = total < tiny
    return torch.where(dead, torch.full_like(total, -math.inf), total.clamp_min(tiny).log() + top.squeeze(dim))


def sum_out(factors: list[LogFactor], latents: set[str], keep: frozenset[str] = frozenset()) -> tuple[Tensor, tuple]:
    """Sum every latent out and multiply every plate not in `keep`.

    Returns
    -------
    (log value, its dimension names, all in `keep`).

    Raises
    ------
    ValueError
        Latents of one plate meet latents of another that does not contain it: the sum is not a tree of plates.
    """
    pending = [(f.value, f.dims, f.plates - keep) for f in factors]
    sizes = {d: n for value, dims, _ in pending for d, n in zip(dims, value.shape)}
    home: dict[str, frozenset[str]] = {}
    for _, dims, plates in pending:
        for d in latents.intersection(dims):
            home[d] = home.get(d, plates) & plates
    done: list[tuple[Tensor, tuple[str, ...]]] = []
    while pending:
        leaf = max((plates for _, _, plates in pending), key=lambda p: (len(p), sorted(p)))
        group = [(v, d) for v, d, plates in pending if plates == leaf]
        pending = [item for item in pending if item[2] != leaf]
        local = {d for _, dims in group for d in dims if home.get(d) == leaf}
        group, done_here = fold_chains(group, local, sizes)
        local -= done_here
        while local:
            name = next_to_eliminate([dims for _, dims in group], local, sizes)
            value, dims = multiply([f for f in group if name in f[1]])
            at = dims.index(name)
            group = [f for f in group if name not in f[1]]
            group.append((log_sum(value, at), dims[:at] + dims[at + 1 :]))
            local.discard(name)
        for value, dims in group:
            outer = [home[d] for d in dims if d in home]
            parent = frozenset().union(*outer) if outer else frozenset()
            if outer and not parent < leaf:
                raise ValueError(
                    f"finite latents of the plates {sorted(parent)} meet inside the plates {sorted(leaf)} and neither "
                    f"plate contains the other; make one of the plates sequential (`for i in pyro.plate(...)`)"
                )
            inner = tuple(dims.index(p) for p in leaf - parent if p in dims)
            value = value.sum(inner) if inner else value
            dims = tuple(d for i, d in enumerate(dims) if i not in inner)
            if outer:
                pending.append((value, dims, parent))
            else:
                done.append((value, dims))
    return multiply(done) if done else (torch.zeros(()), ())


def elimination_size(scopes: list[tuple[str, ...]], latents: set[str], sizes: Mapping[str, int]) -> float:
    """Elements of the largest table that `sum_out` would build, from names and sizes alone."""
    scopes, largest = [tuple(s) for s in scopes], 1.0
    for scope in scopes:
        largest = max(largest, math.prod(float(sizes[d]) for d in scope))
    left = {d for scope in scopes for d in scope} & latents
    while left:
        name = next_to_eliminate(scopes, left, sizes)
        union = tuple(sorted({d for scope in scopes if name in scope for d in scope}))
        largest = max(largest, math.prod(float(sizes[d]) for d in union))
        scopes = [s for s in scopes if name not in s] + [tuple(d for d in union if d != name)]
        left.discard(name)
    return largest
