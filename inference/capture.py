"""Run a Pyro program a few times, keep its arithmetic: one pure graph of tensor operations serves from then on.

The log density is recorded once (`recorder.py`), its gradient is recorded from that graph, and the gradient of many
vectors at once from the same graph under `vmap`. A graph is trusted only after it agrees with the program that it came
from; where that fails, the program itself serves, with the reason kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .recorder import CaptureError, PureGraph, pure_graph
from .session import isolated

if TYPE_CHECKING:
    from .joint import LogJoint

#: Agreement that is asked of a graph: relative error of every output, by precision.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True)
class Captured:
    """A function of tensors, as a graph where that is possible.

    Attributes
    ----------
    call
        What runs.
    mode
        "graph", or "eager" where the function itself serves.
    reason
        Why it is not a graph; empty otherwise.
    """

    call: Callable[..., Any]
    mode: str
    reason: str = ""

    def __call__(self, *args: Tensor) -> Any:
        return self.call(*args)


def capture(
    fn: Callable[..., Any],
    example: tuple[Tensor, ...],
    *,
    points: Iterable[tuple[Tensor, ...]] = (),
    random: bool = False,
) -> Captured:
    """The pure graph of `fn`, or `fn` itself with the reason why there is none.

    Parameters
    ----------
    fn
        Tensors to a tensor or a tuple of tensors. It may call `torch.autograd.grad` inside; the graph itself runs
        without gradients. Tensors that it closes over are constants: they must not change afterwards.
    example
        Inputs of the shapes and types that it will be called with.
    points
        More inputs at which graph and function must agree, beside `example`.
    random
        Whether it may draw random numbers: then they come from torch's global generator at every call.
    """
    try:
        graph = pure_graph(fn, example, random=random)
        for seed, point in enumerate((example, *points)):
            check_agreement(graph, fn, point, seed)
    except Exception as error:  # any operation of anybody's program may refuse to be traced, in any way
        return Captured(fn, "eager", reason_of(error))
    return Captured(graph, "graph")


def reason_of(error: Exception) -> str:
    """An error's text, short; Pyro appends tables to it."""
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else "no further text"
    return text if isinstance(error, CaptureError) else f"{type(error).__name__}: {text}"


def check_agreement(
    graph: Callable[..., Any], fn: Callable[..., Any], point: tuple[Tensor, ...], seed: int = 0
) -> None:
    """Refuse a graph that computes something else than its function."""
    with isolated(seed, torch.get_default_dtype()):
        wanted = tree_leaves(fn(*point))
    with isolated(seed, torch.get_default_dtype()):
        found = tree_leaves(graph(*point))
    for a, b in zip(wanted, found, strict=True):
        if not close(a, b):
            raise CaptureError(
                "the graph disagrees with the program: it depends on values in a way that cannot be traced"
            )


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, relative to the largest entry; NaN and inf in the same places."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.detach(), b.detach()
    tolerance = TOLERANCE.get(a.dtype, 1e-3)
    finite = a.abs().masked_fill(~a.isfinite(), 0.0)
    scale = float(finite.max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * min(1.0, scale) + 1e-300, equal_nan=True)


# -- the log joint -----------------------------------------------------------------------------------------------------


def with_gradient(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Value and gradient of a function of one vector, or of each of many vectors that do not meet."""

    def run(flat: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            flat = flat.detach().requires_grad_()
            value = fn(flat)
            if not value.requires_grad:
                return value, torch.zeros_like(flat)
            (gradient,) = torch.autograd.grad(value.sum(), flat, allow_unused=True, materialize_grads=True)
        return value.detach(), gradient

    return run


@dataclass
class ValueAndGrad:
    """log density of one flat unconstrained vector, or of many at once, and its gradient.

    Attributes
    ----------
    single
        Value and gradient at one vector.
    density
        The log density alone as a graph that can be differentiated and vectorised; None where there is none.
    points
        Vectors of finite density (where there are any) at which graphs are compared with the story.
    random
        Whether the log density differs from call to call at the same point.
    notice
        Why many vectors are evaluated one after another; empty where they are one batch.
    """

    single: Captured
    density: Callable[[Tensor], Tensor] | None
    points: list[Tensor]
    random: bool = False
    notice: str = ""
    _wide: dict[int, Callable[..., Any] | None] = field(default_factory=dict, repr=False)

    @property
    def mode(self) -> str:
        """ "graph" or "eager"."""
        return self.single.mode

    @property
    def reason(self) -> str:
        """Why it is not a graph; empty otherwise."""
        return self.single.reason

    def __call__(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(dim,) -> ((), (dim,)); (C, dim) -> ((C,), (C, dim)). NaN where a factorisation fails."""
        if flat.ndim == 1:
            return self._one(flat)
        wide = self._batch(len(flat))
        if wide is not None:
            try:
                return wide(flat)
            except torch.linalg.LinAlgError:
                pass  # one vector spoils the batch
        values, gradients = zip(*(self._one(row) for row in flat))
        return torch.stack(values), torch.stack(gradients)

    def _one(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.single(flat)
        except torch.linalg.LinAlgError:
            return flat.new_full((), torch.nan), torch.full_like(flat, torch.nan)

    def _batch(self, width: int) -> Callable[..., Any] | None:
        """The graph for this many vectors, made at the first call and compared with the single one."""
        if width not in self._wide:
            self._wide[width] = self._widen(width) if self.density is not None else None
        return self._wide[width]

    def _widen(self, width: int) -> Callable[..., Any] | None:
        rows = torch.stack([self.points[i % len(self.points)] for i in range(width)])
        values, gradients = zip(*(self._one(row) for row in rows))
        wanted = torch.stack(values), torch.stack(gradients)
        density: Any = self.density
        # The second is slower, and right where a derivative under vmap is not (select_scatter in torch 2.13).
        for fn in (with_gradient(torch.vmap(density)), torch.vmap(self.single.call)):
            try:
                wide = pure_graph(fn, (rows,))
                if all(close(a, b) for a, b in zip(wanted, wide(rows), strict=True)):
                    self.notice = ""
                    return wide
                self.notice = "the batched graph disagrees with the single one: vectors are evaluated one by one"
            except Exception as error:  # as for `capture`
                self.notice = f"vectors are evaluated one by one: {reason_of(error)}"
        return None

    def at_home(self) -> ValueAndGrad:
        """The same density on the processor, from the same recording: vectors one by one; itself where it is none."""
        if not isinstance(self.single.call, PureGraph):
            return self
        return ValueAndGrad(Captured(self.single.call.at_home(), "graph"), None, [p.cpu() for p in self.points])

    def numpy(self, flat: NDArray) -> tuple[NDArray, NDArray]:
        """The same for arrays, in float64."""
        with torch.inference_mode(self.mode == "graph"):
            value, gradient = self(torch.from_numpy(flat).to(self.points[0]))
        return value.double().cpu().numpy(), gradient.double().cpu().numpy()


def density_of(joint: LogJoint) -> Callable[[Tensor], Tensor]:
    """The log density as the story itself computes it."""

    def density(flat: Tensor) -> Tensor:
        with pyro.validation_enabled(False):
            return joint.unconstrained(flat)

    return density


def eager_potential(joint: LogJoint) -> ValueAndGrad:
    """Log density and gradient by running the story every time: the reference that graphs are held against."""
    eager = with_gradient(density_of(joint))
    with isolated(joint.problem.seed, joint.problem.dtype):
        points = test_points(joint, eager)
        random = is_random(eager, points[0])
    return ValueAndGrad(Captured(eager, "eager", "as wanted"), None, points, random)


def value_and_grad(joint: LogJoint) -> ValueAndGrad:
    """Log density and gradient of the flat unconstrained vector, captured where the graph agrees with the story.

    Agreement is asked at four random points, half of them from the prior: value and gradient to a relative 1e-8 in
    float64. A story that draws random numbers outside its sample sites, or looks at values of latents, is run as it is.
    """

    eager_density = density_of(joint)
    problem, eager = joint.problem, with_gradient(eager_density)
    with isolated(problem.seed, problem.dtype):
        points = test_points(joint, eager)
        if is_random(eager, points[0]):
            reason = "the log density draws random numbers: it differs at the same point"
            return ValueAndGrad(Captured(eager, "eager", reason), None, points, random=True)
        try:
            density = pure_graph(eager_density, (points[0],), differentiable=True)
            single = pure_graph(with_gradient(density), (points[0],))
            for point in points:
                check_agreement(single, eager, (point,))
        except Exception as error:  # any operation of anybody's program may refuse to be traced, in any way
            return ValueAndGrad(Captured(eager, "eager", reason_of(error)), None, points)
    return ValueAndGrad(Captured(single, "graph"), density, points)


def test_points(joint: LogJoint, eager: Callable[[Tensor], tuple[Tensor, Tensor]], count: int = 4) -> list[Tensor]:
    """Random vectors of finite density and gradient, as far as 20 tries find them."""
    finite: list[Tensor] = []
    other: list[Tensor] = []
    for i in range(20):
        if i % 2:
            point = 4.0 * torch.rand(joint.dim, dtype=joint.problem.dtype, device=joint.problem.device) - 2.0
        else:
            point = joint.flatten(joint.prior_draw())
        try:
            value, gradient = eager(point)
        except torch.linalg.LinAlgError:
            continue
        (finite if value.isfinite() and gradient.isfinite().all() else other).append(point)
        if len(finite) == count:
            break
    return finite + other[: count - len(finite)] or [torch.zeros(joint.dim, dtype=joint.problem.dtype)]


def is_random(fn: Callable[..., tuple[Tensor, ...]], point: Tensor) -> bool:
    """Whether two seeds give two answers at one point."""
    answers = []
    for seed in (1, 2):
        with isolated(seed, torch.get_default_dtype()):
            try:
                answers.append(fn(point))
            except torch.linalg.LinAlgError:
                return False
    return not all(close(a, b) for a, b in zip(*answers))


def constrain_many(joint: LogJoint, flat: Tensor, chunk: int = 256) -> dict[str, Tensor]:
    """Values of every block at many flat vectors: (S, dim) -> (S, ...shape) each; `LogJoint.constrain`, vectorised."""
    from .joint import Unconstrained

    names = [b.name for b in joint.blocks]

    def values(one: Tensor) -> tuple[Tensor, ...]:
        handler = Unconstrained(joint.blocks, one)
        joint.trace(handler)
        return tuple(handler.values[n] for n in names)

    if len(flat) > 8 and names:
        with torch.no_grad():
            single = capture(values, (flat[0],), points=[(flat[len(flat) // 2],), (flat[-1],)])
            if single.mode == "graph":
                try:
                    many = torch.vmap(single.call, chunk_size=chunk)(flat)
                except (RuntimeError, NotImplementedError):
                    return joint.constrain(flat)  # an operation without a batching rule
                return {n: v.clone() for n, v in zip(names, many)}
    return joint.constrain(flat)


__all__: Sequence[str] = [
    "CaptureError",
    "Captured",
    "ValueAndGrad",
    "capture",
    "constrain_many",
    "value_and_grad",
    "with_gradient",
]
