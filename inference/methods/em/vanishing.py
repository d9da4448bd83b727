"""Points at which a spread has vanished: there the joint density of a hierarchy is infinite, and no maximum exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...handlers import unwrap
from ...session import streams_kept

if TYPE_CHECKING:
    from ...joint import LogJoint

#: Share of the spread that the prior leads one to expect, below which a spread counts as gone; prior draws that tell it.
GONE, DRAWS = 1e-3, 20


def vanished(joint: LogJoint, theta: dict[str, Tensor]) -> list[str]:
    """Latents whose spread, set by other latents, is gone at a point.

    With the spread of many unknowns unknown too, the density of all of them together grows without bound as the spread goes
    to 0 and they to their mean (Gelman et al., *Bayesian Data Analysis*, 2013, section 5.4): a maximum that EM reports there
    says nothing about the data.  Where the unknowns lie in the rows and were integrated out the density is finite there, but a
    maximum at the edge 0 still says nothing about how wide they spread.

    Parameters
    ----------
    joint, theta
        The story, and the values of its globals.

    Returns
    -------
    Names of such latents, in the order of the story.
    """
    structure = joint.structure
    hidden = {s.name for s in structure.latents if s.continuous}
    below = [s.name for s in structure.latents if s.continuous and hidden.intersection(s.parents)]
    if not below:
        return []
    with streams_kept(), torch.no_grad():
        here = spreads(joint, theta, below)
        usual = [spreads(joint, joint.prior_draw(), below) for _ in range(DRAWS)]
    found = []
    for name in below:
        if name in here and all(name in u for u in usual):
            expected = torch.stack([u[name] for u in usual]).median(0).values
            if bool((here[name] < GONE * expected).any()):
                found.append(name)
    return found


def spreads(joint: LogJoint, values: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Standard deviations of these sites given what comes before them, where they have any."""
    nodes = joint.trace(values)[0].nodes
    found = {}
    for name in names:
        try:
            found[name] = unwrap(nodes[name]["fn"]).variance.sqrt()
        except NotImplementedError:
            continue
    return found
