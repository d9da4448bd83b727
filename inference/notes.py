"""What is unusual about data or story, though not wrong: told with the structure and with every answer."""

from __future__ import annotations

import torch
from torch import Tensor

from .looks import column_ends, ends, where
from .rehearsal import FEW_ROWS
from .session import Part
from .shapes import Record


def value_notes(records: dict[str, Record]) -> list[str]:
    """What is unusual about the observed values, though not wrong."""
    notes = []
    for r in records.values():
        if r.kind != "observed" or not isinstance(r.value, Tensor) or not r.value.is_floating_point():
            continue
        if r.missing:
            cells = "cell" if r.missing == 1 else "cells"
            _, index = where(r.value, torch.isnan)
            notes.append(
                f"{r.missing} {cells} of {r.argument or r.name} missing (NaN), the first at index "
                f"{index[0] if len(index) == 1 else index}: integrated out"
            )
        rows = r.value if r.value.ndim else r.value.reshape(1)
        if not r.discrete and len(rows) > 1:
            low, high = column_ends(rows[:: max(1, len(rows) // FEW_ROWS)])
            if bool((low >= high).any()):  # of some rows; where none of these differ, all are looked at
                low, high = column_ends(rows)
            if flat := (low >= high).nonzero().flatten().tolist():
                notes.append(
                    f"columns {flat[:8]} of {r.argument or r.name} are constant: a learned scale there has only its prior"
                )
        if len(rows) == 1 and set(r.plates) - r.loops:  # members of a loop are sites of their own
            notes.append(f"one row only: what {r.name} says about scales is the prior")
        least, most = ends(rows)
        top = max(-least, most)
        if top > 1e6 and not r.discrete:
            notes.append(f"the scale of {r.argument or r.name} is {top:.0e}; standardise it")
    return notes


def part_notes(parts: dict[str, Part], records: dict[str, Record]) -> list[str]:
    """What becomes of plates that ask for a part of their members."""
    sizes = {p: n for r in records.values() for p, n in zip(r.plates, r.plate_sizes)}
    notes = []
    for name, part in parts.items():
        total = part.size if part.given else sizes.get(name, part.size)
        if part.wanted >= total:
            continue
        if part.given:
            notes.append(
                f"plate {name!r} is given {part.wanted} of its {total} members (subsample=...), each of which counts "
                f"{total / part.wanted:.3g} times: the posterior is as narrow as if all had been seen; for what these say "
                f"give them alone, and for batches leave subsample out and take SVI(batch_size={part.wanted})"
            )
        else:
            notes.append(
                f"plate {name!r} asks for {part.wanted} of its {total} members at random (subsample_size), which is not "
                f"followed: methods use all {total}, or batches of their own, SVI(batch_size={part.wanted})"
            )
    return notes
