"""Dream up data: run a story forward."""

import inspect as signatures
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .handlers import FlatStart, unwrap
from .mending import MISTAKES, retold
from .problem import story_dtype
from .rehearsal import is_dtype_error
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
    TypeError
        Arguments that the story needs are missing, or it does not take one.
    ValueError
        `given` names a site that the story does not have, or a prior is improper and has no draws. A mistake in the
        story: where it stops, what had been drawn, and the line that mends it.
    """
    model, _ = pair(story)
    _check_arguments(model, given or {}, arguments)
    fixed = {name: torch.as_tensor(value) for name, value in (given or {}).items()}
    inputs = {
        n: torch.as_tensor(v)
        if hasattr(v, "__array__") and not isinstance(v, Tensor) and not hasattr(v, "columns")
        else v
        for n, v in arguments.items()
    }
    try:
        return _told(model, fixed, inputs, seed, story_dtype(story))
    except RuntimeError as error:
        if not is_dtype_error(error):
            raise
        return _told(
            model, fixed, inputs, seed, torch.float32
        )  # the story holds single numbers, as `fit` finds out too


def _check_arguments(model: Callable, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """What the story cannot be told without, or does not know."""
    parameters = signatures.signature(model).parameters
    kinds = (signatures.Parameter.POSITIONAL_OR_KEYWORD, signatures.Parameter.KEYWORD_ONLY)
    names = [n for n, p in parameters.items() if p.kind in kinds]
    needed = [n for n in names if parameters[n].default is signatures.Parameter.empty and n not in arguments]
    if needed:
        text = f"the story needs {needed} and takes {names}: simulate(story, {', '.join(f'{n}=...' for n in needed)})"
        raise TypeError(text + ("; given={...} holds sites fixed, not arguments" if set(needed) & set(given) else ""))
    if any(p.kind == signatures.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := [n for n in arguments if n not in names]:
        raise TypeError(f"the story does not take {unknown}; its arguments are {names}")


def _told(
    model: Callable, fixed: dict[str, Tensor], inputs: dict[str, Any], seed: int | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """One draw of every site in this precision."""
    with isolated(seed, dtype), torch.no_grad(), poutine.block(), FlatStart():
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
