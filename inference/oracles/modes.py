"""The highest point of a tiny story's density, with the other latents summed and integrated out by brute force."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .density import Density

#: Starts, and iterations of each climb.
STARTS, CLIMB = 10, 40


@dataclass(frozen=True)
class Mode:
    """The highest point.

    Attributes
    ----------
    estimate
        "map" or "mle".
    values
        By site.
    height
        log p(data, values) or log p(data | values), the other latents summed and integrated out.
    slope
        Largest entry of the gradient in unconstrained coordinates: how near to 0 the climb came.
    """

    estimate: str
    values: dict[str, Tensor]
    height: float
    slope: float

    def __str__(self) -> str:
        told = ", ".join(f"{n} = {[round(x, 4) for x in v.flatten().tolist()]}" for n, v in self.values.items())
        return f"{self.estimate}: log density {self.height:.8f} at {told} (slope {self.slope:.0e})"


class Heights:
    """log p(data, points) or log p(data | points) as a function of the points' unconstrained coordinates.

    Raises
    ------
    ValueError
        A point is no continuous latent of the story, or too many of the other latents stay together.
    """

    def __init__(self, density: Density, estimate: str, points: tuple[str, ...] | None = None) -> None:
        self.density, self.estimate = density, estimate
        names = shared(density) if points is None else tuple(n for n in points if n in density.places)
        if points is not None and (
            wrong := [n for n in points if n not in density.places and n not in density.learned]
        ):
            raise ValueError(f"{wrong} are no continuous latents; the story has {list(density.places)}")
        self.points = [density.places[n] for n in names]
        self.free = [i for p in self.points for i in p.coordinates]
        self.rest = tuple(i for i in range(density.dim) if i not in self.free)
        self.grids = self._grids()

    def _grids(self) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        """Coordinates, nodes and log weights of what is left, where that is not Gaussian given the points."""
        from .plan import Group, Plan, Quadratic, components, couplings
        from .ranges import find_box, trapezoid

        if not self.rest or Quadratic(self.density).holds(self.rest):
            return None
        groups = components(couplings(self.density)[0], list(self.rest))
        if max(map(len, groups)) > 2:
            others = [p.name for p in self.density.places.values() if p not in self.points]
            raise ValueError(
                f"{others} are neither discrete nor Gaussian given {[p.name for p in self.points]}, and "
                f"{max(map(len, groups))} of their coordinates stay together: a height would be an integral over all of them. "
                f"Name some in points, too"
            )
        box = find_box(self.density, Plan(tuple(self.free), tuple(Group(tuple(g)) for g in groups)))
        found = []
        for g in groups:
            nodes, weights = trapezoid(box, tuple(g), 160 if len(g) == 1 else 60, 0.05)
            found.append((torch.tensor(g), nodes, weights))
        return found

    def __call__(self, u: Tensor) -> Tensor:
        """At one vector of all coordinates, of which the others' count as a start only: ()."""
        return self.by_state(u).logsumexp(0)

    def by_state(self, u: Tensor) -> Tensor:
        """The same for every joint state of the discrete latents, (S,)."""
        density = self.density
        flat = tuple(p.name for p in self.points) if self.estimate == "mle" else ()
        index = torch.tensor(self.rest, dtype=torch.long)

        def state(s: Mapping[str, Tensor]) -> Tensor:
            def f(part: Tensor) -> Tensor:
                full = u.index_copy(0, index, part) if self.rest else u
                total = density.tell(full, s, flat)[0]
                return total if flat else total - self._log_dets(full, s)

            if not self.rest:
                return f(u.new_zeros(0))
            if self.grids is not None:
                base = f(u[index])
                total = base
                for where, nodes, weights in self.grids:
                    terms = torch.func.vmap(lambda place, w=where: f(u.index_copy(0, w, place)[index]))(nodes)
                    total = total + (terms + weights).logsumexp(0) - base
                return total
            start = u[index]
            slope, precision = torch.func.grad(f)(start), -torch.func.hessian(f)(start)
            move = torch.linalg.solve(precision, slope)
            constant = 0.5 * len(self.rest) * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(precision)[1]
            return f(start) + 0.5 * slope @ move + constant

        if not density.states:
            return state({})[None]
        if density.batched:
            return torch.func.vmap(state)(dict(density.states))
        return torch.stack([state({n: v[i] for n, v in density.states.items()}) for i in range(density.num_states)])

    def _log_dets(self, u: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """Jacobians of the points' sites, which a density of their values leaves out."""
        return self.density.log_dets(u, s, tuple(p.name for p in self.points))

    def states_at(self, values: Mapping[str, Tensor]) -> Tensor:
        """log p(data, state, values), (S,)."""
        return self.by_state(self.density.free_vector(values))

    def at(self, values: Mapping[str, Tensor]) -> float:
        """The height of given values of the points."""
        u = self.density.free_vector(values)
        return float(self(u))


def shared(density: Density) -> tuple[str, ...]:
    """Continuous latents that no plate of an observed site holds."""
    seen = [n for n in density.plates if n not in density.places and n not in density.states]
    rows = {plate for n in seen for plate in density.plates[n]}
    return tuple(n for n in density.places if not rows.intersection(density.plates[n]))


def find_mode(density: Density, estimate: str, points: tuple[str, ...] | None = None) -> Mode:
    """The best of many climbs from draws of the prior, finished by Newton's method.

    Raises
    ------
    ValueError
        As `Heights`, and where the density has no highest point: it rises for ever.
    """
    height = Heights(density, estimate, points)
    if not height.free:
        raise ValueError("the story has no continuous latents that all rows share: there is no point to find")
    best: tuple[float, Tensor] | None = None
    for seed in range(STARTS):
        start = density.draw(seed)
        if start is None:
            continue
        found = climb(height, start)
        if math.isfinite(found[0]) and (best is None or found[0] > best[0] + 1e-12):
            best = found
    if best is None:
        raise ValueError("no draw of the prior gives the data a density to climb from")
    value, u = newton(height, best[1])
    index = torch.tensor(height.free)
    slope = float(torch.func.grad(lambda a: height(u.index_copy(0, index, a)))(u[index]).abs().max())
    if slope > 1e-4 or float(u[index].abs().max()) > 1e4:
        raise ValueError(
            f"the density of {[p.name for p in height.points]} ({estimate}) has no highest point: it rises by {slope:.1g} "
            f"a unit at coordinates of size {float(u[index].abs().max()):.3g}. Counts of 0 under a flat prior, or a component "
            f"that shrinks onto one row, do that"
        )
    flat = density.values(u[None])[0]
    return Mode(estimate, {p.name: flat[p.entries].reshape(p.shape) for p in height.points}, value, slope)


def climb(height: Heights, start: Tensor) -> tuple[float, Tensor]:
    """L-BFGS from one start."""
    index = torch.tensor(height.free)
    part = start[index].clone().requires_grad_()
    with torch.enable_grad():
        optimiser = torch.optim.LBFGS([part], max_iter=CLIMB, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -height(start.index_copy(0, index, part))
            loss.backward()
            return loss

        optimiser.step(closure)  # type: ignore[arg-type]
    u = start.index_copy(0, index, part.detach())
    return float(height(u)), u


def newton(height: Heights, u: Tensor, rounds: int = 12) -> tuple[float, Tensor]:
    """Steps of Newton's method, each taken where it rises."""
    index = torch.tensor(height.free)

    def f(part: Tensor) -> Tensor:
        return height(u.index_copy(0, index, part))

    value = float(height(u))
    for _ in range(rounds):
        slope, curve = torch.func.grad(f)(u[index]), torch.func.hessian(f)(u[index])
        values, vectors = torch.linalg.eigh(-curve)
        step = vectors @ ((vectors.T @ slope) / values.abs().clamp_min(1e-9))
        for shrink in (1.0, 0.3, 0.05):
            tried = u.index_copy(0, index, u[index] + shrink * step)
            level = float(height(tried))
            if level >= value:
                break
        else:
            break
        done = level - value < 1e-15 * (1 + abs(value))
        value, u = level, tried
        if done:
            break
    return value, u
