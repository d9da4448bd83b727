"""An answer held against one that is known to be right: draws of a long run, of another program, or from a data base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .crosscheck import CrossCheck, held

if TYPE_CHECKING:
    from .posterior import Posterior


def against(posterior: Posterior, reference: Posterior | Mapping[str, Any]) -> CrossCheck:
    """See `Posterior.against`.

    Raises
    ------
    TypeError
        The reference is neither a posterior nor a mapping.
    ValueError
        It shares no unknown with the answer, or one has another shape.
    """
    if isinstance(reference, Mapping):
        theirs, name = told(posterior, reference), "the reference"
    elif hasattr(reference, "draws") and hasattr(reference, "joint"):
        theirs, name = reference, f"{reference.method.name.upper()} (reference)"
    else:
        raise TypeError(
            f"against() takes a Posterior or a mapping from sites to draws (draws, ...shape), got {type(reference).__name__}"
        )
    rows = posterior.structure.num_rows if posterior.structure.row_arguments else None
    kept = CrossCheck(posterior.method.name.upper(), name, "as given", rows, rows)
    check = held(kept, posterior, theirs)
    if check.refused:
        raise ValueError(
            f"the reference has {sorted(theirs.draws)} and the answer {sorted(posterior.draws)}: {check.refused}"
        )
    return check


def told(posterior: Posterior, reference: Mapping[str, Any]) -> Posterior:
    """Independent draws of a user's as a posterior of the same problem."""
    draws = {}
    for site, value in reference.items():
        tensor = torch.as_tensor(value).double()
        if site not in posterior.draws:
            raise ValueError(f"the reference has {site!r}; the continuous unknowns are {list(posterior.draws)}")
        if tensor.ndim == 0 or tuple(tensor.shape[1:]) != tuple(posterior.draws[site].shape[1:]) or len(tensor) < 2:
            raise ValueError(
                f"reference draws of {site!r} have shape {tuple(tensor.shape)}; (draws, "
                f"{', '.join(map(str, posterior.draws[site].shape[1:]))}) with two draws or more are needed"
            )
        draws[site] = tensor
    counts = {n: len(v) for n, v in draws.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the reference has different numbers of draws: {counts}")
    symmetric: dict[str, Any] = {
        n: posterior.diagnostics[n] for n in ("exchangeable", "rotating") if n in posterior.diagnostics
    }
    return replace(posterior, draws=draws, kind="exact", chains=1, sample_stats={}, diagnostics=symmetric, extra={})
