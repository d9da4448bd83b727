"""Dream up data: run a story forward."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .handlers import FlatStart, unwrap
from .problem import story_dtype
from .session import isolated
from .structure import pair


def simulate(
    story: Any, given: Mapping[str, Any] | None = None, *, seed: int | None = None, **arguments: Any
) -> dict[str, Tensor]:
    """One draw of every site, those in `given` held fixed.

    Parameters
    ----------
    story
        A Pyro program, or an object with `model`.
    given
        Site -> value.
    seed
        Same seed, same draw; None continues torch's stream (and leaves it where it was).
    **arguments
        Of the story: sizes, covariates.

    Raises
    ------
    ValueError
        `given` names a site that the story does not have, or a prior is improper and has no draws.
    """
    model, _ = pair(story)
    fixed = {name: torch.as_tensor(value) for name, value in (given or {}).items()}
    inputs = {
        n: torch.as_tensor(v) if hasattr(v, "__array__") and not isinstance(v, Tensor) else v
        for n, v in arguments.items()
    }
    with isolated(seed, story_dtype(story)), torch.no_grad(), poutine.block(), FlatStart():
        fixed, inputs = in_default_dtype(fixed), in_default_dtype(inputs)
        try:
            trace: Any = poutine.trace(pyro.condition(model, fixed)).get_trace(**inputs)
        except NotImplementedError as error:
            raise ValueError(
                f"a prior of the story has no draws ({str(error).splitlines()[0]}); hold that site fixed with given={{...}}"
            ) from None
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"}
    if unknown := set(fixed) - set(sites):
        raise ValueError(f"given has {sorted(unknown)}, which are no sites of the story; it has {list(sites)}")
    improper = [n for n, s in sites.items() if isinstance(unwrap(s["fn"]), dist.ImproperUniform) and n not in fixed]
    if improper:
        raise ValueError(f"the prior of {improper} is improper and has no draws; hold it fixed with given={{...}}")
    return {name: site["value"].detach() for name, site in sites.items()}


def in_default_dtype(values: dict[str, Any]) -> dict[str, Any]:
    """Floating tensors in the dtype in which the story draws."""
    kind = torch.get_default_dtype()
    return {n: v.to(kind) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in values.items()}
