"""Which linear-Gaussian story is this? Loadings, centres and noise as copies of unknowns, found by probing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from ...handlers import unwrap
from ...joint import LogJoint
from ...linear_gaussian import locals_of, take_some
from ...local import RowsFree, Stacked
from .families import variance
from .plan import prior_dependencies
from .priors import Conjugate, conjugate
from .recognise import Gather, recognise
from .terms import complete, in_role, make_term, named

#: Rows on which a story is probed: all must have the same loadings, centre and noise.
PROBES = 5


@dataclass
class Form:
    """x_n ~ Normal(W[k] z_n + b[k], psi[k]) with z_n ~ Normal(0, I) and component k.

    Attributes
    ----------
    observed, argument, latent, component
        Names of x, of the argument it observes, of z, and of the component (None for one).
    states, columns, width
        K, D and q.
    loading, centre, noise
        Which entries of which unknown W (K, D, q), b (K, D) and psi (K, D) copy; `centre` is None where b is `fixed`.
    role
        How the unknown tells the noise: "variance", "precision" or "scale".
    weights
        Unknown of the mixing weights, `weights_prior` its pseudo-counts.
    priors, densities, reasons
        Unknown -> conjugate pseudo-statistics, prior distribution, and why its update is closed.
    pattern, entries
        Regressions: which of a column's unknowns each component's (W, b) is, (K, q + 1), and these unknowns' numbers (D, U).
    """

    observed: str
    argument: str
    latent: str
    component: str | None
    states: int
    columns: int
    width: int
    loading: Gather
    centre: Gather | None
    fixed: Tensor | None
    noise: Gather
    role: str
    weights: str | None = None
    weights_prior: Tensor | float = 0.0
    priors: dict[str, Conjugate] = field(default_factory=dict)
    densities: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    pattern: Tensor = field(default_factory=lambda: torch.zeros(0))
    entries: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def free(self) -> bool:
        """Whether every entry of W is an unknown of its own."""
        return len(self.loading.index.unique()) == self.states * self.columns * self.width

    def flat(self, name: str) -> bool:
        """Whether an unknown has no prior."""
        return self.priors[name].text in ("no prior", "flat prior")

    # -- between unknowns and (W, b, psi) ----------------------------------------------------------------------------

    def read(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W (K, D, q), b (K, D), psi (K, D) and log weights (K,) at one theta."""
        K, D, q = self.states, self.columns, self.width
        W = self.loading.push(theta[self.loading.theta][None])[0].expand(K, D, q)
        if self.centre is not None:
            b = self.centre.push(theta[self.centre.theta][None])[0].expand(K, D)
        else:
            assert self.fixed is not None
            b = self.fixed.expand(K, D)
        psi = variance(self.role, self.noise.push(theta[self.noise.theta][None])[0]).expand(K, D)
        if self.weights is None:
            return W, b, psi, torch.zeros(1, dtype=W.dtype, device=W.device)
        return W, b, psi, theta[self.weights].clamp_min(1e-300).log()

    def write(
        self, theta: dict[str, Tensor], W: Tensor, b: Tensor, psi: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """theta with these values in the places they come from; shared places take the mean."""
        new = dict(theta)
        K, D, q = self.states, self.columns, self.width
        new[self.loading.theta] = put(self.loading, new[self.loading.theta], W.expand(K, D, q))
        if self.centre is not None:
            new[self.centre.theta] = put(self.centre, new[self.centre.theta], b.expand(K, D))
        spread = {"variance": lambda: psi, "precision": lambda: 1 / psi, "scale": psi.sqrt}[self.role]()
        new[self.noise.theta] = put(self.noise, new[self.noise.theta], spread.expand(K, D))
        if self.weights is not None and weights is not None:
            new[self.weights] = weights
        return new

    def noise_variance(self, theta: dict[str, Tensor]) -> Tensor:
        """The noise unknown as a variance, in its own shape."""
        return variance(self.role, theta[self.noise.theta])

    def log_prior(self, theta: dict[str, Tensor]) -> Tensor | float:
        """Log prior density of the unknowns."""
        return sum((fn.log_prob(theta[name]).sum() for name, fn in self.densities.items()), 0.0)

    # -- regression --------------------------------------------------------------------------------------------------

    def regression(self, s: Any, W: Tensor, c: Tensor, psi: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """W (K, D, q) and c (K, D) that maximise the expected log joint given the noise, column by column."""
        G, h = s.normal_equations()
        K, D, q = self.states, self.columns, self.width
        U = self.entries.shape[1]
        A, y = G.new_zeros(D, U, U), G.new_zeros(D, U)
        for k in range(K):
            used = self.pattern[k] >= 0
            at = self.pattern[k][used]
            Gk, hk = G[k] / psi[k][:, None, None], h[k] / psi[k][:, None]
            if not bool(used.all()):  # b is fixed: its part moves to the other side
                hk = hk - Gk[:, :, -1] * c[k][:, None]
            A[:, at[:, None], at[None, :]] += Gk[:, used][:, :, used]
            y[:, at] += hk[:, used]
        precision, pseudo = self.prior_of_entries(mean)
        A = A + torch.diag_embed(precision)
        L, bad = torch.linalg.cholesky_ex(A)
        if bool((bad > 0).any()):
            lift = 1e-10 * A.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)
            L = torch.linalg.cholesky(A + torch.diag_embed(lift.unsqueeze(-1).expand(D, U)))
        solution = torch.cholesky_solve((y + pseudo).unsqueeze(-1), L).squeeze(-1)
        index = self.pattern.clamp_min(0)
        v = solution[:, index].permute(1, 0, 2)  # (K, D, q + 1)
        new = torch.where(self.pattern[:, -1:] >= 0, v[..., -1], c)
        return v[..., :q], new

    def prior_of_entries(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Precision of every regression unknown's prior, and that times its mean (of the centred x), (D, U)."""
        total, pseudo = (
            torch.zeros_like(self.entries, dtype=mean.dtype),
            torch.zeros_like(self.entries, dtype=mean.dtype),
        )
        sizes = 0
        for gather, offset in ((self.loading, torch.zeros_like(mean)), (self.centre, mean)):
            if gather is None:
                continue
            prior, size = self.priors[gather.theta], math.prod(gather.batch)
            mine = (self.entries >= sizes) & (self.entries < sizes + size)
            if prior.precision is not None and prior.mean is not None:
                at = (self.entries - sizes).clamp(0, size - 1)
                precision = torch.as_tensor(prior.precision).reshape(-1)[at]
                centre = torch.as_tensor(prior.mean).reshape(-1)[at] - offset[:, None]
                total = torch.where(mine, precision, total)
                pseudo = torch.where(mine, precision * centre, pseudo)
            sizes += size
        return total, pseudo


def put(gather: Gather, value: Tensor, entries: Tensor) -> Tensor:
    """An unknown with the given entries where `gather` takes them from."""
    index = gather.index.expand(entries.shape).reshape(-1)
    flat = value.reshape(-1).clone()
    count = torch.bincount(index, minlength=len(flat))
    total = torch.zeros_like(flat).index_add_(0, index, entries.reshape(-1).to(flat))
    return torch.where(count > 0, total / count.clamp_min(1), flat).reshape(value.shape)


def recognise_form(joint: LogJoint, estimate: str) -> Form | None:
    """The form of a story, or None."""
    structure = joint.structure
    locals_, seen = locals_of(joint), structure.observed
    component = joint.finite[0] if len(joint.finite) == 1 else None
    if len(locals_) != 1 or len(seen) != 1 or len(joint.finite) > 1 or seen[0].family != "Normal":
        return None
    site, plate = seen[0], structure.data_plate
    x = joint.problem.kwargs.get(site.argument or "")
    if site.plates != (plate,) or not isinstance(x, Tensor) or x.dim() != 2 or tuple(x.shape[1:]) != site.shape[1:]:
        return None
    if structure[locals_[0].name].plates != (plate,):
        return None
    if component and (structure[component].family != "Categorical" or structure[component].plates != (plate,)):
        return None
    return probe(joint, estimate, locals_[0].name, site.name, site.argument or "", component)


def probe(
    joint: LogJoint, estimate: str, latent: str, observed: str, argument: str, component: str | None
) -> Form | None:
    """Run the story at z = 0 and at the axes, and read W, b and psi as functions of the unknowns."""
    values = joint.prior_draw()
    leaves = {b.name: values[b.name].detach().clone().requires_grad_() for b in joint.blocks if not b.local}
    few = take_some(joint, joint.problem.kwargs, PROBES)
    block = locals_of(joint)[0]
    q, n = math.prod(block.shape[1:]), len(few[argument])
    K = joint.structure[component].states or 1 if component else 1
    D = joint.problem.kwargs[argument].shape[1]
    kind: dict[str, Any] = {"dtype": joint.problem.dtype, "device": joint.problem.device}
    with torch.enable_grad():
        locs: list[Tensor] = []
        nodes: Any = {}
        names: dict[str, str] = {}
        for z in [torch.zeros(q, **kind), *torch.eye(q, **kind)]:
            rows = RowsFree([(latent, 0, q)], z.expand(n, q), joint.structure.data_plate)
            trace, names = joint.trace(Stacked(leaves, rows), few)
            nodes = trace.nodes
            loc = location(nodes[observed], names, joint.structure.data_plate or "", component)
            if loc is None:
                return None
            locs.append(loc)
        if not standard(nodes[latent]) or not straight(nodes[observed], few[argument]):
            return None
        A = torch.stack([loc - locs[0] for loc in locs[1:]], -1)  # (K?, D, q)
        loading = any_copy(A, leaves)
        centre = any_copy(locs[0], leaves)
        noise, role = spread_copy(nodes[observed], names, leaves, component)
        if loading is None or noise is None or (centre is None and moves(locs[0], leaves)):
            return None
        used = [loading.theta, noise.theta, *([centre.theta] if centre else [])]
        weights, prior = None, None
        if component:
            term = make_term(component, nodes[component], names, leaves, joint)
            gather = term.gathers.get("probs")
            if gather is None or term.dims or term.depends != {gather.theta} or gather.event != (K,):
                return None
            weights = gather.theta
            used.append(weights)
        users = prior_dependencies(trace, leaves)
        if sorted(used) != sorted(leaves) or any(users.get(name) for name in leaves):
            return None
    fixed = None if centre else locs[0].detach()
    form = Form(observed, argument, latent, component, K, D, q, loading, centre, fixed, noise, role, weights)
    fns = {name: nodes[name]["fn"] for name in leaves if nodes[name]["type"] == "sample"} if estimate == "map" else {}
    if not conjugate_priors(form, fns, leaves):
        return None
    if weights:
        prior = conjugate(fns.get(weights), "probs", "probs", leaves[weights])
        if prior is None:
            return None
        form.weights_prior, form.priors[weights] = prior.total, prior
        form.reasons[weights] = f"shares of {component}, {prior.text}"
    form.densities = fns
    return form if lay_out(form) else None


def location(node: dict, names: dict[str, str], plate: str, component: str | None) -> Tensor | None:
    """The mean of x as (K?, D), if it is that of all rows."""
    fn = unwrap(node["fn"])
    if type(fn).__name__ != "Normal":
        return None
    loc, dims = named(fn.loc, 1, node, names)
    if plate in dims:
        at = dims.index(plate)
        first = loc.narrow(at, 0, 1)
        if not torch.allclose(loc, first.expand_as(loc), rtol=1e-10, atol=1e-12):
            return None
        loc, dims = first.squeeze(at), tuple(d for d in dims if d != plate)
    if not set(dims) <= ({component} if component else set()):
        return None
    return loc


def spread_copy(
    node: dict, names: dict[str, str], leaves: dict[str, Tensor], component: str | None
) -> tuple[Gather | None, str]:
    """The unknown that the noise copies, and in which role."""
    fn = unwrap(node["fn"])
    scale, dims = named(fn.scale, 1, node, names)
    for d in [d for d in dims if d != component]:  # Pyro repeats it for every row
        at = dims.index(d)
        scale, dims = scale.narrow(at, 0, 1).squeeze(at), tuple(k for k in dims if k != d)
    for role in ("variance", "precision", "scale"):
        found = any_copy(in_role(scale, "scale", role), leaves)
        if found is not None:
            return found, role
    return None, ""


def any_copy(y: Tensor, leaves: dict[str, Tensor]) -> Gather | None:
    """Which unknown's entries y copies, entry by entry."""
    for name, theta in leaves.items():
        gather = recognise(y, name, theta, 0, simplex=False)
        if gather is not None and gather.scale is None:
            return gather
    return None


def moves(y: Tensor, leaves: dict[str, Tensor]) -> bool:
    """Whether y changes with any unknown."""
    if not y.requires_grad:
        return False
    grads = torch.autograd.grad(
        (y * torch.rand_like(y)).sum(), list(leaves.values()), retain_graph=True, allow_unused=True
    )
    return any(g is not None and bool((g != 0).any()) for g in grads)


def standard(node: dict) -> bool:
    """Whether z is standard normal."""
    fn = complete(node)
    if type(fn).__name__ == "Normal":
        return bool((fn.loc == 0).all() and (fn.scale == 1).all()) and not fn.scale.requires_grad
    if isinstance(fn, td.MultivariateNormal):
        eye = torch.eye(fn.event_shape[0], dtype=fn.loc.dtype, device=fn.loc.device)
        return bool((fn.loc == 0).all() and torch.equal(fn.covariance_matrix, eye.expand_as(fn.covariance_matrix)))
    return False


def straight(node: dict, given: Tensor) -> bool:
    """Whether x observes its argument as it is, unscaled."""
    value = node["value"].reshape(node["value"].shape[-2:]) if node["value"].dim() >= 2 else node["value"]
    if value.shape != given.shape or not (isinstance(node["scale"], (int, float)) and node["scale"] == 1.0):
        return False
    return node["mask"] is None and torch.equal(torch.where(given.isnan(), value, given), value)


def conjugate_priors(form: Form, fns: dict[str, Any], leaves: dict[str, Tensor]) -> bool:
    """Fill in priors and reasons; False where one is not conjugate."""
    wanted = [
        (form.loading.theta, "loc", "loc", "loadings"),
        (form.noise.theta, "spread", form.role, f"noise {form.role}"),
    ]
    if form.centre is not None:
        wanted.append((form.centre.theta, "loc", "loc", "centre"))
    for name, slot, role, what in wanted:
        found = conjugate(fns.get(name), slot, role, leaves[name])
        if found is None or (found.precision is not None and found.precision.shape != leaves[name].shape):
            return False
        form.priors[name], form.reasons[name] = found, f"{what} of {form.observed}, {found.text}"
    return True


def lay_out(form: Form) -> bool:
    """Which unknowns each column's regression has; False where columns share some."""
    K, D, q = form.states, form.columns, form.width
    ids = form.loading.index.expand(K, D, q)
    if form.centre is not None:
        ids = torch.cat([ids, form.centre.index.expand(K, D).unsqueeze(-1) + math.prod(form.loading.batch)], -1)
    else:
        ids = torch.cat([ids, torch.full((K, D, 1), -1, dtype=torch.long, device=ids.device)], -1)
    first = ids[:, 0].reshape(-1)
    known = first[first >= 0].unique()
    place = {int(v): i for i, v in enumerate(known)}
    pattern = torch.tensor([place.get(int(v), -1) for v in first], device=ids.device).reshape(K, q + 1)
    entries = torch.zeros(D, len(known), dtype=torch.long, device=ids.device)
    for k in range(K):
        for j in range(q + 1):
            if pattern[k, j] >= 0:
                entries[:, pattern[k, j]] = ids[k, :, j]
    rebuilt = torch.where(pattern[:, None] >= 0, entries[:, pattern.clamp_min(0)].permute(1, 0, 2), -1)
    if not torch.equal(rebuilt, ids) or len(entries.unique()) != entries.numel():
        return False
    form.pattern, form.entries = pattern, entries
    return True
