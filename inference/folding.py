r"""Long chains of finite latents summed out in few operations: neighbours are folded in pairs, all pairs at once.

Between two steps of a chain stands a table :math:`M_t[i,j]`; the sum over all states is the product of these matrices, which
is associative: :math:`\lceil\log_2 T\rceil` batched products take the place of T small ones (Särkkä and García-Fernández,
*Temporal parallelization of Bayesian smoothers*, IEEE TAC 2021; Obermeyer and others, *Functional tensors for probabilistic
programming*, 2019).  A program of few operations on long tensors is recorded, differentiated and compiled in little time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Named = tuple[Tensor, tuple[str, ...]]

#: Latents from which a chain is long; states up to which products of matrices cost little more than those with vectors; numbers
#: that one product may make.
LONG, STATES, NUMBERS = 8, 8, 1_000_000


def fold_chains(group: list[Named], latents: set[str], sizes: Mapping[str, int]) -> tuple[list[Named], set[str]]:
    """Sum the long chains among `latents` out of a product of factors.

    Parameters
    ----------
    group
        Named log-factors.
    latents
        Names that may be summed out here.
    sizes
        Of every dimension.

    Returns
    -------
    The factors that are left, and the latents that were summed out.
    """
    if len(latents) < LONG:
        return group, set()
    done: set[str] = set()
    for path in paths(group, latents):
        own = set(path)
        inside = [f for f in group if own.intersection(f[1])]
        extra = tuple(dict.fromkeys(d for _, dims in inside for d in dims if d not in own))
        states = sizes[path[0]]
        numbers = len(path) * math.prod(sizes[d] for d in extra) * states**3
        if states > STATES or numbers > NUMBERS or any(sizes[n] != states for n in path):
            continue
        group = [f for f in group if not own.intersection(f[1])]
        group.append((folded(path, inside, extra, sizes), extra))
        done |= own
    return group, done


def paths(group: list[Named], latents: set[str]) -> list[list[str]]:
    """Long chains: latents each of which meets one or two others, in order, and no three of which meet in a factor."""
    beside: defaultdict[str, set[str]] = defaultdict(set)
    crowded: set[str] = set()
    for _, dims in group:
        own = [d for d in dims if d in latents]
        if len(own) > 2:
            crowded.update(own)
        for name in own:
            beside[name].update(n for n in own if n != name)
    found, seen = [], set()
    for name in beside:  # in the order of the factors
        if name in seen or len(beside[name]) != 1:
            continue
        path, before = [name], ""
        while True:
            after = [n for n in beside[path[-1]] if n != before]
            if len(after) != 1:
                break
            before = path[-1]
            path.append(after[0])
        seen.update(path)
        straight = all(len(beside[n]) <= 2 for n in path) and len(beside[path[-1]]) == 1
        if len(path) >= LONG and straight and not crowded.intersection(path):
            found.append(path)
    return found


def folded(path: list[str], factors: list[Named], extra: tuple[str, ...], sizes: Mapping[str, int]) -> Tensor:
    """log of the sum over all states of one chain, with the dimensions `extra`."""
    from .enumeration import align, log_sum, multiply

    place = {name: t for t, name in enumerate(path)}
    alone: list[list[Named]] = [[] for _ in path]
    moves: list[list[Named]] = [[] for _ in path]
    for value, dims in factors:
        at = sorted(place[d] for d in dims if d in place)
        (alone if len(at) == 1 else moves)[at[-1]].append((value, dims))

    def stacked(tables: list[list[Named]], ends: Sequence[tuple[str, ...]]) -> Named:
        """Products side by side, the steps first, with all other dimensions that any of them has."""
        products = [multiply(t) for t in tables]
        own = {d for end in ends for d in end}
        more = tuple(d for d in extra if any(d in dims for _, dims in products))
        shape = [sizes[d] for d in more] + [sizes[path[0]]] * len(ends[0])
        whole = [align(v, dims, more + end).expand(shape) for (v, dims), end in zip(products, ends, strict=True)]
        return torch.stack(whole), tuple(d for d in more if d not in own)

    zero = factors[0][0].new_zeros(())
    ends = [(name,) for name in path]
    points, dims = stacked([t or [(zero, ())] for t in alone], ends)
    points = align(points, ("*step", *dims, "*to"), ("*step", *extra, "*to"))
    links, dims = stacked(moves[1:], list(pairwise(path)))
    links = align(links, ("*step", *dims, "*from", "*to"), ("*step", *extra, "*from", "*to"))
    chain = links + points[1:].unsqueeze(-2)
    while len(chain) > 1:
        half = len(chain) // 2
        pair = chain[0 : 2 * half : 2].unsqueeze(-1) + chain[1 : 2 * half : 2].unsqueeze(-3)  # (..., from, middle, to)
        product = log_sum(pair, pair.dim() - 2)
        chain = torch.cat([product, chain[2 * half :]]) if len(chain) % 2 else product
    total = chain[0] + points[0].unsqueeze(-1)
    total = log_sum(total.flatten(-2), total.dim() - 2)
    return total.expand([sizes[d] for d in extra])
