r"""What the rotation of factors leaves alone.

Where z is standard normal, :math:`W z = (WR)(R^\top z)` for every rotation R: loadings are known up to one.  Chains and
methods end in different rotations, so that averages and R-hat of W mean nothing; those of :math:`WW^\top` do.  Whether a
story has this symmetry is tested on its own density, not guessed from names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .linear_gaussian import RowTable, locals_of, take_some

if TYPE_CHECKING:
    from .joint import LogJoint

#: Site -> axis of its value (counted from the end) that rotates.
Axes = dict[str, int]


def rotating_axes(joint: LogJoint) -> Axes:
    """Globals whose density and whose rows' densities stay the same when an axis is rotated; {} where none does."""
    blocks = locals_of(joint)
    if not joint.structure.linear_gaussian or len(blocks) != 1 or len(blocks[0].shape) != 2:
        return {}
    if len(joint.structure[blocks[0].name].plates) != 1:  # members of a plate are no axes
        return {}
    q, few = blocks[0].shape[1], take_some(joint, joint.problem.kwargs, 12)
    values = joint.prior_draw()
    turn = torch.linalg.qr(torch.randn(q, q, dtype=joint.problem.dtype))[0] if q > 1 else -torch.ones(1, 1)
    turn = turn.to(joint.problem.dtype)
    rows = RowTable(joint, values, few)
    z = torch.randn(rows.n, q, dtype=joint.problem.dtype)
    before, prior = rows.table(z), height(joint, values, few, z)
    found: Axes = {}
    for b in joint.blocks:
        if b.local or b.param:
            continue
        for axis in (-1, -2):
            if len(b.shape) < 2 or b.shape[axis] != q:
                continue
            turned = {**values, b.name: values[b.name] @ turn if axis == -1 else turn.T @ values[b.name]}
            after = RowTable(joint, turned, few).table(z @ turn)
            same = torch.allclose(after, before, rtol=1e-8, atol=1e-8)
            if same and abs(height(joint, turned, few, z) - prior) <= 1e-8 * (1 + abs(prior)):
                found[b.name] = axis
                break
    return found


def height(joint: LogJoint, values: Mapping[str, Tensor], kwargs: Mapping, z: Tensor) -> float:
    """Log prior density of the globals."""
    with torch.no_grad():
        local = {b.name: z.reshape(len(z), *b.shape[1:]) for b in locals_of(joint)}
        trace, _ = joint.trace({**{n: v for n, v in values.items() if n not in local}, **local}, dict(kwargs))
        names = [b.name for b in joint.blocks if not b.local and not b.param]
        return sum(float(trace.nodes[n]["fn"].log_prob(values[n]).sum()) for n in names)


def invariants(draws: Mapping[str, Tensor], axes: Axes, latents: set[str]) -> dict[str, Tensor]:
    """Draws with rotating sites W replaced by W W^T, and without the locals that turn with them."""
    if not axes:
        return dict(draws)
    result = {}
    for name, value in draws.items():
        if name in axes:
            wide = value if axes[name] == -1 else value.mT
            result[f"{name} {name}^T"] = wide @ wide.mT
        elif name not in latents:
            result[name] = value
    return result
