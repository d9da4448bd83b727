"""A guard: observed categories whose probabilities are picked by a latent that is summed out build a table of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .handlers import unwrap
from .shapes import Record
from .structure import Structure, format_bytes

#: Bytes of such a table that are worth a word.
WIDE = 256 * 2**20


def wide_tables(records: Mapping[str, Record], structure: Structure) -> list[str]:
    """A sentence for every site whose gradient builds a table of states x observations x categories, with its size.

    `Categorical(phi[z])` with z summed out copies a row of phi for every state and observation on the way back: 17 seconds and
    19 GB a step where picking single entries takes 0.02.
    """
    found = []
    states = {s.name: s.states or 1 for s in structure.finite}
    for name, r in records.items():
        fn = unwrap(r.fn)
        parents = [p for p in structure[name].parents if p in states] if name in structure else []
        if r.kind != "observed" or not isinstance(fn, torch.distributions.Categorical) or not parents:
            continue
        categories = fn.logits.shape[-1] if "logits" in fn.__dict__ else fn.probs.shape[-1]
        size = math.prod(states[p] for p in parents) * math.prod(r.shape) * categories * structure.itemsize
        if size > WIDE:
            table = " x ".join([*(str(states[p]) for p in parents), *map(str, r.shape), str(categories)])
            found.append(
                f"site {name!r}: with {', '.join(parents)} summed out, gradients of Categorical build a table of {table} "
                f"numbers, {format_bytes(size)}; observe counts given theta @ phi, or a "
                f"distribution whose log_prob picks single entries: Vindex(phi)[..., z, x].log()"
            )
    return found
