"""How much each unit of a code says of its row: a detector of posterior collapse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .handlers import unwrap
from .methods.batches import is_latent

if TYPE_CHECKING:
    from .posterior import Posterior


@dataclass(frozen=True, repr=False)
class Units:
    """How much each unit of a code says of its row.

    Attributes
    ----------
    site
        The latent.
    kl
        Mean over rows of the divergence of the guide from the prior, unit by unit, (K,), in nats: 0 says nothing.
    active
        Whether the guide's mean differs between rows, (K,) of bool: its variance exceeds 0.01 (Burda and others, 2016).
    """

    site: str
    kl: Tensor
    active: Tensor

    @property
    def collapsed(self) -> bool:
        """Whether no unit is active: the posterior is the prior, and codes say nothing."""
        return not bool(self.active.any())

    def __repr__(self) -> str:
        most = ", ".join(f"{v:.2g}" for v in self.kl.sort(descending=True).values[:10].tolist())
        text = f"{self.site}: {int(self.active.sum())} of {len(self.kl)} units active, {self.kl.sum():.3g} nats a row"
        return text + f" (by unit {most}{', ...' if len(self.kl) > 10 else ''})" + ("; collapsed" * self.collapsed)


def units(posterior: Posterior, data: Any = None) -> dict[str, Units]:
    """Divergence and activity of every unit of the codes that a fitted guide gives rows: a detector of posterior collapse.

    Where a code's prior depends on another code, the divergence is that at one draw of the other one a row.

    Parameters
    ----------
    posterior
        An answer by a guide that has a guess for any rows.
    data
        Rows, as for `fit`; None for the fitted ones.

    Raises
    ------
    ValueError
        The answer is no such guide, or a code's divergence has no closed form.
    """
    from .score import active_units

    recogniser = posterior.recogniser
    if recogniser is None:
        raise ValueError(
            "units() asks a guide that reads rows: fit with SVI and a story whose guide has an encoder, or with "
            "SVI(guide=Amortised(...))"
        )
    kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
    local = {s.name for s in posterior.structure.sites if s.local}
    with posterior.problem.scope(posterior.seed), torch.no_grad():
        shared = {n: v for n, v in posterior.draw(0).items() if n not in local}
        guide = recogniser.trace(shared, kwargs)
        values = {n: s["value"] for n, s in guide.nodes.items() if is_latent(s)}
        told, _ = posterior.joint.trace({**shared, **values}, kwargs)
    found = {}
    for site in posterior.structure.continuous_locals:
        q, p = unwrap(guide.nodes[site.name]["fn"]), unwrap(told.nodes[site.name]["fn"])
        try:
            kl = torch.distributions.kl_divergence(q, p)
        except NotImplementedError:
            raise ValueError(
                f"the divergence of {type(q).__name__} from {type(p).__name__} at {site.name!r} has no closed form"
            ) from None
        count = len(values[site.name])
        found[site.name] = Units(
            site.name,
            kl.expand(values[site.name].shape).reshape(count, -1).mean(0),
            active_units(q.mean.expand(values[site.name].shape).reshape(count, -1)),
        )
    return found
