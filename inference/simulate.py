"""Dream up data: run a story forward."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .handlers import FlatStart, unwrap
from .mending import MISTAKES, retold
from .problem import story_dtype
from .session import isolated
from .shapes import Record
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
        `given` names a site that the story does not have, or a prior is improper and has no draws. A mistake in the
        story: where it stops, what had been drawn, and the line that mends it.
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
            tracer = poutine.trace(pyro.condition(model, fixed))
            trace: Any = tracer.get_trace(**inputs)
        except NotImplementedError as error:
            raise ValueError(
                f"a prior of the story has no draws ({str(error).splitlines()[0]}); hold that site fixed with given={{...}}"
            ) from None
        except MISTAKES as error:
            told = retold(error, _so_far(tracer.msngr.trace), inputs)
            if told is None:
                raise
            raise told from error
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"}
    if unknown := set(fixed) - set(sites):
        raise ValueError(f"given has {sorted(unknown)}, which are no sites of the story; it has {list(sites)}")
    improper = [n for n, s in sites.items() if isinstance(unwrap(s["fn"]), dist.ImproperUniform) and n not in fixed]
    if improper:
        raise ValueError(f"the prior of {improper} is improper and has no draws; hold it fixed with given={{...}}")
    return {name: site["value"].detach() for name, site in sites.items()}


def _so_far(trace: Any) -> dict[str, Record]:
    """What had been drawn before the story stopped."""
    found: dict[str, Record] = {}
    for name, site in trace.nodes.items():
        value, fn = site.get("value"), site.get("fn")
        if site["type"] == "sample" and isinstance(value, Tensor) and type(fn).__name__ != "_Subsample":
            kind = "observed" if site["is_observed"] else "latent"
            frames = site["cond_indep_stack"]
            plates, sizes = tuple(f.name for f in frames), tuple(f.size for f in frames)
            found[name] = Record(name, kind, "", tuple(value.shape), tuple(fn.event_shape), plates, sizes)
    return found


def in_default_dtype(values: dict[str, Any]) -> dict[str, Any]:
    """Floating tensors in the dtype in which the story draws."""
    kind = torch.get_default_dtype()
    return {n: v.to(kind) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in values.items()}
