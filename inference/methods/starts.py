"""Where chains begin: draws from the story's guide and prior, points of the user, and what is wrong where none will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .blame import impossibility, impossible, listed, steepness

if TYPE_CHECKING:
    from ..joint import LogJoint

#: Words for where chains begin.
WORDS = ("auto", "tries", "prior")


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
        return ValueError(f"{what}: {steepness(joint, points[int(finite.argmax())], gradients[finite])}")
    found = [impossible(joint, p) for p in points]
    always = [cause for cause in dict.fromkeys(found) if cause and found.count(cause) == len(found)]
    if not always:
        sites = list(dict.fromkeys(c[0] for c in found if c))
        at = f" at {listed(sites)}" if sites else ""
        return ValueError(
            f"{what}: the log density is infinite or not a number{at}; tighten the priors or standardise the data"
        )
    return ValueError(f"{what}: {impossibility(*always[0])}")
