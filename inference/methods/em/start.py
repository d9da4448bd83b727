"""Where EM starts: k-means++ clusters where latents have observed children, else the story's guide or its prior."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import one_hot

from ...joint import LogJoint
from .estep import Expectation, Part, accumulate
from .plan import Plan, slots_of

Clusters = dict[str, Tensor]


def clusters(joint: LogJoint, seed: int, smooth: float = 0.0) -> Clusters | None:
    """Soft labels (rows, states) for every finite local latent from k-means on its observed children, or None.

    Latents with the same number of states and children of the same width (the steps of a chain) share one clustering.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    structure = joint.structure
    n = structure.num_rows
    finite = set(joint.finite)
    if (
        not n
        or n < 2
        or not finite
        or any(len(structure[name].plates) != 1 or not structure[name].local for name in finite)
    ):
        return None
    with poutine.block(), pyro.validation_enabled(False):
        trace: Any = poutine.trace(poutine.condition(joint.problem.model, data=joint.prior_draw())).get_trace(
            **joint.problem.kwargs
        )
    groups: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}
    for name in joint.finite:
        children = [
            s.name
            for s in structure.observed
            if finite.intersection(s.parents) == {name} and s.plates == structure[name].plates
        ]
        if not children:
            return None
        parts = [trace.nodes[c]["value"].reshape(n, -1).double().cpu().numpy() for c in children]
        table = np.concatenate(parts, 1)
        groups.setdefault((structure[name].states or 1, table.shape[1]), []).append((name, table))
    labels: Clusters = {}
    for (states, _), members in groups.items():
        table = np.concatenate([t for _, t in members])
        table = np.where(np.isnan(table), np.nanmean(table, 0), table)
        table = (table - table.mean(0)) / np.maximum(table.std(0), 1e-12)
        count = min(states, len(np.unique(table, axis=0)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = KMeans(count, n_init=1, random_state=seed).fit(table).labels_
        soft = one_hot(torch.from_numpy(found.astype(np.int64)), states).to(joint.problem.dtype)
        soft = (soft + smooth) / (1 + smooth * states)
        for i, (name, _) in enumerate(members):
            labels[name] = soft[i * n : (i + 1) * n]
    return labels


def expectation_at(
    joint: LogJoint, plan: Plan, theta: dict[str, Tensor], parts: list[Part], labels: Clusters
) -> Expectation:
    """Statistics as if the latents' posteriors were `labels`, independent of each other."""
    plate = joint.structure.data_plate
    stats: dict[str, Any] = {}
    slots: dict[str, Any] = {}
    first = 0
    with torch.no_grad():
        for i, part in enumerate(parts):
            trace, names = joint.trace(theta, part.kwargs)
            inside = [f for f in joint.factors_of(trace, names) if f.name not in theta]
            if i == 0:
                for term in plan.terms.values():
                    if term.family is not None:
                        slots[term.name] = slots_of(term, trace.nodes[term.name], names)
            rows = next((f.value.shape[f.dims.index(plate)] for f in inside if plate in f.dims), 1)
            weights = [weight_of(f.value, f.dims, labels, plate or "", first, rows) for f in inside]
            first += rows
            accumulate(plan, part, trace, names, inside, weights, stats)
    return Expectation(-np.inf, -np.inf, stats, slots, parts)


def weight_of(like: Tensor, dims: tuple[str, ...], labels: Clusters, plate: str, first: int, rows: int) -> Tensor:
    """Product of the labels of the latents that a factor involves, over the factor's own dimensions."""
    weight = torch.ones_like(like)
    for name in dims:
        if name in labels:
            soft = labels[name][first : first + rows]
            shape = [1] * len(dims)
            shape[dims.index(name)] = soft.shape[1]
            if plate in dims:
                shape[dims.index(plate)] = rows
                soft = soft if dims.index(plate) < dims.index(name) else soft.T
            else:
                soft = soft.mean(0)
            weight = weight * soft.reshape(shape)
    return weight
