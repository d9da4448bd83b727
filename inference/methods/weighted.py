"""The ELBO with its divergences in the open: exact where a formula is known, weighed, and with a part that is free.

With beta = 1 and no free bits the expectation is the ELBO itself. Formulas have less noise far from the optimum; at a guide
that is the posterior, log p - log q of draws has none at all (Roeder, Wu and Duvenaud, *Sticking the landing*, NeurIPS 2017).
Beta other than 1 is Higgins et al., *beta-VAE* (ICLR 2017), a rising beta Bowman et al., *Generating sentences from a
continuous space* (CoNLL 2016), free bits Kingma et al., *Improving variational inference with inverse autoregressive flow*
(NeurIPS 2016), appendix C.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ..handlers import unwrap
from .batches import is_latent

if TYPE_CHECKING:
    from .ascent import Leaves
    from .paired import PairTarget


@dataclass(frozen=True)
class Weights:
    """What divergences count.

    Parameters
    ----------
    beta
        Weight of every divergence: a number, or (first, last, steps) for one that moves in a line and then stays.
    free_bits
        Nats of a latent's divergence, by dimension and on average over the rows, that cost as much as none.
    formula
        Whether divergences are taken from formulas where there are any; else from the draw.
    """

    beta: float | tuple[float, float, int] = 1.0
    free_bits: float = 0.0
    formula: bool = True

    @property
    def plain(self) -> bool:
        """Whether the objective is the ELBO."""
        return self.beta == 1.0 and not self.free_bits

    def at(self, step: int) -> float:
        """Weight at a step."""
        if not isinstance(self.beta, tuple):
            return float(self.beta)
        first, last, steps = self.beta
        return first + (last - first) * min(1.0, step / steps)

    def settled(self, step: int) -> bool:
        """Whether the weight no longer moves."""
        return not isinstance(self.beta, tuple) or step >= self.beta[2]


def check_beta(beta: Any) -> None:
    """Refuse what is no weight.

    Raises
    ------
    ValueError
        Neither a positive number, nor (first, last, steps) with first and last not negative and steps a positive whole number.
    """
    text = (
        f"SVI(beta={beta!r}): beta must be a positive number, or (first, last, steps) with two numbers >= 0, the last one "
        f"positive, and a whole number of steps"
    )
    numbers = (int, float)
    if isinstance(beta, bool):
        raise ValueError(text)
    if isinstance(beta, numbers):
        if not 0 < beta < float("inf"):
            raise ValueError(text)
        return
    if not isinstance(beta, Sequence) or len(beta) != 3 or not all(isinstance(b, numbers) for b in beta):
        raise ValueError(text)
    first, last, steps = beta
    if not (0 <= first < float("inf") and 0 < last < float("inf") and isinstance(steps, int) and steps >= 1):
        raise ValueError(text)


def divergence(guide: dict, model: dict, earlier: set[str], parents: Sequence[str]) -> Tensor | None:
    """KL(guide site, model site) element by element, or None where there is no formula.

    A prior whose own parents were guessed after this site does not stand still while the site is integrated out.
    """
    plain = all(
        site["mask"] is None and isinstance(site["scale"], (int, float)) and site["scale"] == 1.0
        for site in (guide, model)
    )
    if not plain or not set(parents) <= earlier:
        return None
    q, p = unwrap(guide["fn"]), unwrap(model["fn"])
    try:
        return kl_divergence(q, p)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def weighted_elbo(
    target: PairTarget, leaves: Leaves, rows: Tensor | None, beta: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective at one draw of the guide, and the draw.

    Raises
    ------
    ValueError
        A latent's prior hangs on a finite latent that is summed out, or free bits are asked for a divergence without a formula.
    """
    joint, structure, scale = target.joint, target.problem.structure, 1.0 if rows is None else target.batches.scale
    trace = target.scored_trace(leaves, rows)
    guessed = {n: s for n, s in trace.nodes.items() if is_latent(s)}
    values = {n: s["value"] for n, s in guessed.items()}
    given = {**values, **target.constrained(leaves, rows)}

    def model() -> tuple[Any, Any, Tensor]:
        told, names = joint.trace(given, target.arguments(rows))
        factors = joint.factors_of(told, names)
        return told, factors, joint.total(factors, scale)

    told, factors, total = target.networks.run(target.weights(leaves), model)
    latent_names = {s.name for s in structure.latents}
    earlier: set[str] = set()
    for name, site in guessed.items():
        inside = any(f.name == target.plate for f in site["cond_indep_stack"])
        weight = scale if inside else 1.0
        if name not in told.nodes:  # a draw that only the guide knows
            total = total - beta * weight * site["log_prob"].sum()
            continue
        mine = [f for f in factors if f.name == name]
        if any(d in joint.finite for f in mine for d in f.dims):
            raise ValueError(
                f"beta and free_bits need priors that stand alone; that of {name!r} depends on a summed-out latent"
            )
        prior = sum((f.value.sum() for f in mine), torch.zeros((), dtype=total.dtype, device=total.device))
        parents = [p for p in structure[name].parents if p in latent_names] if name in structure else []
        formula = target.weighing.formula or target.weighing.free_bits
        found = divergence(site, told.nodes[name], earlier, parents) if formula else None
        if found is None and target.weighing.free_bits and inside:
            raise ValueError(
                f"free_bits needs the divergence of {name!r} in a closed form, such as that of two normals"
            )
        if found is None:
            gain = prior - site["log_prob"].sum()
        elif target.weighing.free_bits and inside:
            gain = -paid(found, site, target)
        else:
            gain = -found.sum()
        total = total - weight * prior + beta * weight * gain
        earlier.add(name)
    return total, values


def paid(found: Tensor, site: dict, target: PairTarget) -> Tensor:
    """Divergence of a latent of the rows (rows, ...) beyond the free bits of every dimension."""
    events = found.ndim - site["log_prob"].ndim
    axis = next(f.dim for f in site["cond_indep_stack"] if f.name == target.plate) - events
    return found.mean(axis).clamp_min(target.weighing.free_bits).sum() * found.shape[axis]


#: The ELBO itself.
PLAIN = Weights()
