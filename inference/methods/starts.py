"""Where chains begin: draws from the story's guide and prior, points of the user, and what is wrong where none will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..joint import LogJoint

#: Words for where chains begin.
WORDS = ("auto", "tries", "prior")


def listed(names: list[str], most: int = 4) -> str:
    """a, b, c, d, ..."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def starts(
    joint: LogJoint,
    evaluate: Callable[[NDArray], tuple[NDArray, NDArray]],
    seeds: list[np.random.SeedSequence],
    generators: list[np.random.Generator],
    init: Any,
    tries: int,
) -> list[tuple[NDArray, float, NDArray]]:
    """Position, log density and gradient where each chain begins.

    Parameters
    ----------
    joint, evaluate
        The density, and values (C,) and gradients (C, dim) of it at points (C, dim).
    seeds, generators
        One a chain.
    init
        As `NUTS(init=...)`.
    tries
        Points that each chain may try.

    Raises
    ------
    ValueError
        No point of a chain has a finite density and gradient, or `init` does not fit the story.
    """
    given = None if isinstance(init, str) else given_values(joint, init, len(seeds))
    chosen = []
    for c, (seed, rng) in enumerate(zip(seeds, generators, strict=True)):
        torch.manual_seed(int(seed.generate_state(1)[0]))
        if given is None:
            points = starting_points(joint, tries, rng, prior_only=init == "prior")
        else:
            points = completed(joint, {n: v[c] for n, v in given.items()}, tries)
        values, gradients = evaluate(points)
        usable = np.isfinite(values) & np.isfinite(gradients).all(-1)
        if not usable.any():
            raise no_start(joint, points, values, gradients)
        best = int(usable.argmax() if init == "prior" else np.where(usable, values, -math.inf).argmax())
        chosen.append((points[best], float(values[best]), gradients[best]))
    return chosen


def starting_points(
    joint: LogJoint, count: int, rng: np.random.Generator, prior_only: bool = False
) -> NDArray[np.float64]:
    """Tries of one chain, (count, dim): from the guide, the prior and Uniform(-2, 2) in turn, or from the prior alone."""
    sources = [joint.prior_draw] if joint.problem.guide is None or prior_only else [joint.guide_draw, joint.prior_draw]
    points = []
    for i in range(count):
        point = rng.uniform(-2.0, 2.0, joint.dim)
        if prior_only or (turn := i % (len(sources) + 1)) < len(sources):
            try:
                drawn = sources[0 if prior_only else turn]()
                flat = joint.flatten(drawn).double().cpu().numpy() if drawn else point
                point = flat if np.isfinite(flat).all() else point
            except torch.linalg.LinAlgError:
                pass  # a draw of a covariance may be singular in rounding
        points.append(point)
    return np.stack(points)


def given_values(joint: LogJoint, init: Any, chains: int) -> dict[str, list[torch.Tensor]]:
    """A user's values of latents, one a chain: from a mapping, or spread over the draws of a posterior.

    Raises
    ------
    ValueError
        A name is no continuous latent of the story, or a shape is not its.
    """
    blocks = {b.name: b for b in joint.blocks}
    if isinstance(init, Mapping):
        if unknown := [n for n in init if n not in joint.names]:
            raise ValueError(
                f"NUTS(init=...) has {listed(unknown)}; the continuous latents are {listed(joint.names, 20)}"
            )
        known = {n: v for n, v in init.items() if n in blocks}
    else:
        known = {n: v for n, v in init.draws.items() if n in blocks}
        if not known:
            raise ValueError(
                f"NUTS(init=...) is a posterior of {listed(list(init.draws))}; the continuous latents are "
                f"{listed(list(blocks), 20)}"
            )
    found: dict[str, list[torch.Tensor]] = {}
    for name, value in known.items():
        tensor = torch.as_tensor(value).to(joint.problem.device, joint.problem.dtype)
        shape = blocks[name].shape
        if not isinstance(init, Mapping):
            found[name] = [tensor[len(tensor) * c // chains] for c in range(chains)]
        elif tuple(tensor.shape) == shape:
            found[name] = [tensor] * chains
        elif tuple(tensor.shape) == (chains, *shape):
            found[name] = list(tensor)
        else:
            raise ValueError(
                f"NUTS(init={{{name!r}: ...}}) has shape {tuple(tensor.shape)}; the site has {shape}, or "
                f"{(chains, *shape)} with a value for every chain"
            )
        if any(tuple(v.shape) != shape for v in found[name]):
            raise ValueError(
                f"NUTS(init=...): draws of {name} have shape {tuple(found[name][0].shape)}; the site has {shape}"
            )
    return found


def completed(joint: LogJoint, values: Mapping[str, torch.Tensor], tries: int) -> NDArray[np.float64]:
    """Tries (count, dim) with these values; latents without one come from the prior, anew in every try."""
    count = 1 if len(values) == len(joint.blocks) else tries
    try:
        flats = [joint.flatten({**joint.prior_draw(), **values}).double().cpu().numpy() for _ in range(count)]
    except ValueError as error:
        raise ValueError(f"NUTS(init=...) lies outside the support of a site: {str(error).splitlines()[0]}") from None
    return np.stack(flats)


def no_start(joint: LogJoint, tries: NDArray, values: NDArray, gradients: NDArray) -> ValueError:
    """Why no try can be started from: an impossible observation, or a latent whose gradient is not a number."""
    what = f"none of {len(tries)} starting points has a finite density and gradient"
    points = [torch.from_numpy(t).to(joint.problem.device, joint.problem.dtype) for t in tries]
    finite = np.isfinite(values)
    if finite.any():
        bad = ~np.isfinite(gradients[finite]).all(0)
        names = [b.name for b in joint.blocks if bad[b.start : b.stop].any()]
        return ValueError(
            f"{what}: the density is finite and its gradient with respect to {listed(names)} is not a number; look for a "
            f"square root at 0, a division by 0 or 0 * inf in what depends on {names[0]}"
        )
    found = [impossible(joint, p) for p in points]
    always = [cause for cause in dict.fromkeys(found) if cause and found.count(cause) == len(found)]
    if not always:
        sites = list(dict.fromkeys(c[0] for c in found if c))
        at = f" at {listed(sites)}" if sites else ""
        return ValueError(
            f"{what}: the log density is infinite or not a number{at}; tighten the priors or standardise the data"
        )
    site, index, value = always[0]
    where = f"[{', '.join(map(str, index))}]" if index else ""
    return ValueError(
        f"{what}: site {site!r} gives its observed value {site}{where} = {value} no density under any of them; the value is "
        f"impossible under the story, correct one or the other"
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
