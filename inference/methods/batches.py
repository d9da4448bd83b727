"""Rows a batch at a time, and the density of a batch as one graph with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..capture import check_agreement, reason_of
from ..data import LISTED, take_rows
from ..lazy_rows import LazyRows, affordable, has_lazy
from ..mapped_files import still_there
from ..problem import Problem
from ..recorder import pure_graph
from ..streaming import Stream
from .svi_step import ASKED, faster

#: Rows of a run of neighbours, and runs that are shuffled together, of tables too long to list.
RUN, RUNS = 256, 256
#: Rows up to which a finished fit in batches is judged on all of them.
JUDGED = 50_000

Single = Callable[..., Tensor]


class Batches:
    """Random rows without replacement, epoch after epoch; an incomplete last batch is left out of its epoch.

    Of several ranks, each cuts its share of a batch from its own rows, with random numbers of its own.

    Attributes
    ----------
    size
        Rows a batch, or None for all rows at once.
    scale
        N / size: a batch speaks for all.
    whole
        The same of all rows of this rank: 1 where there is one.
    names
        Arguments that are cut.
    pool
        Rows to draw from, or None for all.
    streams
        Whether batches are read ahead: data that are not on the device, or tables so long that they come from a disk.
    """

    def __init__(self, problem: Problem, size: int | None, pool: Tensor | None = None) -> None:
        rows = problem.structure.num_rows if pool is None else len(pool)
        self.names = problem.structure.row_arguments
        self.kwargs, self.rows, self.device = problem.kwargs, rows or 1, problem.device
        # Rows that are not on the card are numbered where they are: comparing numbers there would wait for the card.
        self.where = torch.device("cpu") if has_lazy(problem.kwargs) else problem.device
        self.pool = None if pool is None else pool.to(self.where)
        if size is not None and not self.names:
            raise ValueError(
                f"SVI(batch_size={size}): no argument of the story has one entry a row on its first axis, so there is "
                f"nothing to cut; use batch_size=None"
            )
        self.size = None if size is None or rows is None or size >= rows else size
        if pool is not None:
            self.size = min(size or self.rows, self.rows)
        self.scale = 1.0 if self.size is None else self.rows / self.size
        self.ranks, self.whole = problem.ranks, 1.0
        self.streams = has_lazy(problem.kwargs) or (self.rows > LISTED and self.device.type == "cpu")
        self.stream: Stream | None = None
        self.generator: torch.Generator | None = None
        if problem.ranks.shares_rows:
            self.share_out(problem, size)
        self.order = self.runs = torch.empty(0, dtype=torch.long, device=self.where)

    def share_out(self, problem: Problem, size: int | None) -> None:
        """This rank's part of a batch; all of its rows where there are no batches."""
        total = problem.all_rows
        part = self.rows if size is None or size >= total else round(size * self.rows / total)
        self.size = max(1, min(part, self.rows))
        self.scale, self.whole = total / self.size, total / self.rows
        self.generator = torch.Generator()
        self.generator.manual_seed(problem.seed * 1_000_003 + self.ranks.rank)

    def first(self, offset: int = 0) -> Tensor:
        """Some rows, always the same, without touching the random stream."""
        return self.among((torch.arange(self.size or self.rows, device=self.where) + offset) % self.rows)

    def among(self, rows: Tensor) -> Tensor:
        """Indices into the pool as indices into the data."""
        return rows if self.pool is None else self.pool[rows]

    def next(self) -> Tensor:
        """Indices of the next batch, whose rows are still there."""
        still_there(*(self.kwargs[name] for name in self.names))
        size = self.size or self.rows
        if self.ranks.shares_rows and size == self.rows:
            return self.first()
        if len(self.order) < size:
            self.order = self.epoch() if self.rows <= LISTED else torch.cat([self.order, self.stretch(size)])
        rows, self.order = self.order[:size], self.order[size:]
        return self.among(rows)

    def shuffled(self, count: int) -> Tensor:
        """The first numbers in random order, drawn on the processor: a seed means the same batches on every device."""
        return torch.randperm(count, generator=self.generator, device="cpu").to(self.where)

    def epoch(self) -> Tensor:
        """All rows in a new order."""
        return self.shuffled(self.rows)

    def stretch(self, size: int) -> Tensor:
        """The next rows of tables too long to list: some runs of neighbours from all over the table, shuffled together.

        Rows that lie beside each other on the disk are read together, and nothing here grows with the number of rows.
        """
        need = max(RUNS, -(-size // RUN))
        if len(self.runs) < need:
            self.runs = self.shuffled(-(-self.rows // RUN))
        starts, self.runs = RUN * self.runs[:need], self.runs[need:]
        rows = (starts[:, None] + torch.arange(RUN, device=self.where)).reshape(-1)
        rows = rows[rows < self.rows]
        return rows[self.shuffled(len(rows))]

    def judged_rows(self) -> tuple[Tensor | None, float]:
        """Rows on which a finished fit is judged, and their weight: None for all rows, or some of very many."""
        count = affordable(self.kwargs, JUDGED)
        if (self.rows <= count and not self.streams) or not self.names:
            return None, self.whole
        count = min(count, self.rows)
        some = torch.linspace(0, self.rows - 1, count, dtype=torch.float64).round().long().to(self.where)
        return some, self.whole * self.rows / count

    def judged(self) -> tuple[dict[str, Any], float]:
        """Arguments on which a finished fit is judged, and the weight of their rows."""
        some, weight = self.judged_rows()
        return (self.kwargs if some is None else take_rows(self.kwargs, self.names, some)), weight

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """These rows of every argument that is cut; the batch after them is read ahead."""
        if not self.streams:
            return tuple(self.kwargs[name][rows] for name in self.names)
        if self.stream is None:
            self.stream = Stream(self.read, self.device)
        found = self.stream.take(rows)
        size = self.size or self.rows
        if len(self.order) >= size:  # beyond the end of an epoch nothing is known: looking would move the random stream
            self.stream.expect(self.among(self.order[:size]))
        return found

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The same in the processor's memory."""
        index = rows.cpu()
        given = [self.kwargs[name] for name in self.names]
        still_there(*given)
        return tuple(v.host(v.numbers(index)) if isinstance(v, LazyRows) else v[index] for v in given)


def with_gradients(fn: Single) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(z, points, *rows) -> values, and the gradient of their sum with respect to z and points."""

    def run(z: Tensor, points: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            z, points = z.detach().requires_grad_(), points.detach().requires_grad_()
            values = fn(z, points, *rows)
            by_z, by_points = torch.autograd.grad(values.sum(), (z, points), allow_unused=True, materialize_grads=True)
        return values.detach(), by_z, by_points

    return run


class Density:
    """log density of latents z (L,) and points (M,) given rows; many z at once where the story allows.

    Attributes
    ----------
    mode
        "graph", or "eager" where the story itself serves.
    reason
        Why it is not a graph; empty otherwise.
    """

    def __init__(
        self,
        single: Single,
        examples: Sequence[tuple[Tensor, ...]],
        width: int,
        mode: str = "auto",
        steps: int = 1,
    ) -> None:
        self.single, self.width = single, width
        self.mode, self.reason = "eager", ""
        self.one: Callable[..., tuple[Tensor, Tensor, Tensor]] = with_gradients(single)
        self.many: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
        self.graph: Single | None = None
        if mode == "eager":
            self.reason = ASKED
            return
        try:
            self._capture(examples)
        except Exception as error:  # any operation of anybody's program may refuse to be traced, in any way
            self.reason = reason_of(error)
        if self.mode == "graph":
            self._compile(examples, mode, steps)

    def _compile(self, examples: Sequence[tuple[Tensor, ...]], mode: str, steps: int) -> None:
        """What runs in every step, compiled where that is asked for or pays."""
        if self.many is not None:
            wide = [(torch.stack([e[0]] * self.width), *examples[0][1:2], *e[2:]) for e in (examples[0], examples[-1])]
            built = faster(self.many, wide[0], wide[1:], mode, steps)
            self.many = built.call
        else:
            built = faster(self.one, examples[0], examples[1:], mode, steps * self.width)
            self.one = built.call
        self.mode, self.reason = built.mode, "; ".join(filter(None, (self.reason, built.reason)))

    def _capture(self, examples: Sequence[tuple[Tensor, ...]]) -> None:
        graph = pure_graph(self.single, examples[0], differentiable=True)
        one = pure_graph(with_gradients(graph), examples[0])
        for example in examples:
            check_agreement(one, self.one, example)
        self.one, self.mode, self.graph = one, "graph", graph
        others = examples[0][1:]
        wide = with_gradients(self._vmap(graph, len(others)))
        stacked = (torch.stack([e[0] for e in examples])[torch.arange(self.width) % len(examples)], *others)
        try:
            many = pure_graph(wide, stacked)
            check_agreement(many, self._loop, stacked)
            self.many = many
        except Exception as error:  # as above
            self.reason = f"draws are evaluated one by one: {reason_of(error)}"
            self.graph = None

    def _vmap(self, graph: Single, others: int) -> Single:
        return torch.vmap(graph, in_dims=(0, *[None] * others))

    def __call__(self, z: Tensor, points: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, L) -> values (P,), gradient (P, L), gradient of the sum with respect to the points (M,)."""
        if self.many is not None and len(z) == self.width:
            return self.many(z, points, *rows)
        return self._loop(z, points, *rows)

    def _loop(self, z: Tensor, points: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, by_z, by_points = zip(*(self.at(one, points, *rows) for one in z))
        return torch.stack(values), torch.stack(by_z), torch.stack(by_points).sum(0)

    def at(self, z: Tensor, points: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for one z; NaN where a factorisation fails."""
        try:
            return self.one(z, points, *rows)
        except torch.linalg.LinAlgError:
            return z.new_full((), torch.nan), torch.full_like(z, torch.nan), torch.full_like(points, torch.nan)

    def values(self, z: Tensor, points: Tensor, *rows: Tensor, chunk: int = 128) -> Tensor:
        """Values alone, for any number of z."""
        with torch.no_grad():
            if self.graph is not None:
                many = self._vmap(self.graph, 1 + len(rows))
                return torch.cat([many(part, points, *rows) for part in z.split(chunk)])
            return torch.stack([self._value(one, points, *rows) for one in z])

    def _value(self, z: Tensor, points: Tensor, *rows: Tensor) -> Tensor:
        if self.mode != "eager":
            return self.at(z, points, *rows)[0]
        try:
            return self.single(z, points, *rows)
        except torch.linalg.LinAlgError:
            return z.new_full((), torch.nan)


def side_by_side(call: Callable[..., tuple[Tensor, ...]], width: int, count: int) -> Callable[..., tuple[Tensor, ...]]:
    """`width` independent calls of a random function of `count` tensors at once: every output has them on its first axis.

    The function must be a graph. Each call has random numbers of its own.
    """
    lanes = torch.zeros(width)
    many = torch.vmap(lambda _, *inputs: call(*inputs), in_dims=(0, *[None] * count), randomness="different")

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with quiet_vmap(), torch.no_grad():
            return many(lanes, *inputs)

    return run


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Without PyTorch's remark that gradients of gamma and Dirichlet draws are batched by a loop."""
    switch = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda on: None)
    switch(False)
    try:
        yield
    finally:
        switch(True)


def is_latent(site: Any) -> bool:
    """A draw of the guide, as opposed to parameters, plates and deterministic sites."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    )


def by_row(log_prob: Tensor, site: dict, plate: str | None) -> Tensor:
    """Log density of a site summed over everything but the rows."""
    axis = next(f.dim for f in site["cond_indep_stack"] if f.name == plate)
    rest = [i for i in range(-log_prob.ndim, 0) if i != axis]
    return log_prob.sum(rest) if rest else log_prob
