"""Which site and which latent are at fault where a density, or its gradient, is not a number."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..joint import LogJoint


def listed(names: list[str], most: int = 4) -> str:
    """a, b, c, d, ..."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def impossibility(site: str, index: tuple[int, ...], value: str) -> str:
    """What `impossible` found, in words."""
    where = f"[{', '.join(map(str, index))}]" if index else ""
    return (
        f"site {site!r} gives its observed value {site}{where} = {value} no density under any of them; the value is "
        f"impossible under the story, correct one or the other"
    )


def culprit(joint: LogJoint, flat: torch.Tensor) -> str | None:
    """The first site whose log density, or its gradient, is not finite at one point (dim,)."""
    from ..joint import Unconstrained

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pyro's about the very NaN that is looked for
            flat = flat.detach().clone().requires_grad_()
            for factor in joint.factors(Unconstrained(joint.blocks, flat)):
                if not bool(factor.value.isfinite().all()):
                    return factor.name
                if factor.value.requires_grad:
                    (slope,) = torch.autograd.grad(factor.value.sum(), flat, retain_graph=True)
                    if not bool(slope.isfinite().all()):
                        return factor.name
    except (RuntimeError, ValueError):
        return None  # the story fails at such values
    return None


def steepness(joint: LogJoint, flat: torch.Tensor, gradients: NDArray) -> str:
    """A finite density whose gradients (..., dim) are no numbers, in words: with latents and site."""
    bad = ~np.isfinite(gradients.reshape(-1, gradients.shape[-1])).all(0)
    names = [b.name for b in joint.blocks if bad[b.start : b.stop].any()]
    site = culprit(joint, flat)
    return (
        f"the density is finite and its gradient with respect to {listed([repr(n) for n in names])} is not a number"
        f"{f', first at site {site!r}' if site else ''}; look for a square root at 0, a division by 0 or 0 * inf in what "
        f"depends on {names[0] if names else 'the latents'}"
    )


def impossible(joint: LogJoint, flat: torch.Tensor) -> tuple[str, tuple[int, ...], str] | None:
    """The first observed site, index and value without finite density in any state of the finite latents."""
    with torch.no_grad():
        try:
            trace, names = joint.trace(joint.constrain(flat))
            factors = joint.factors_of(trace, names)
        except (torch.linalg.LinAlgError, ValueError):
            return None
    for factor in factors:
        if joint.structure[factor.name].kind != "observed":
            continue
        plates = [d for d in factor.dims if d in factor.plates]
        states = tuple(i for i, d in enumerate(factor.dims) if d not in factor.plates)
        best = factor.value.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        best = best.amax(states) if states else best
        bad = ~best.isfinite()
        if bad.any():
            node = trace.nodes[factor.name]
            index = dict(zip(plates, bad.nonzero()[0].tolist(), strict=True))
            frames = {f.name: f.dim - node["fn"].event_dim for f in node["cond_indep_stack"] if f.vectorized}
            value, places = node["value"], {frames[p]: i for p, i in index.items() if -frames[p] <= node["value"].ndim}
            for dim, i in sorted(places.items()):
                value = value.select(dim, i if value.shape[dim] > 1 else 0).unsqueeze(dim)
            return factor.name, tuple(index.values()), described(value.squeeze())
    return None


def described(value: torch.Tensor) -> str:
    """A number, or the first few of several."""
    if value.ndim == 0:
        return f"{value.item():g}"
    shown = [f"{v:g}" for v in value.flatten()[:6].tolist()]
    return f"[{', '.join(shown)}{', ...' if value.numel() > 6 else ''}]"
