"""Several processes, one fit: rows, gradients or chains are shared out over the ranks that `torchrun` started.

The contract is short.  Every rank calls the same `fit` with the same arguments; what the ranks do together they do inside,
and every rank gets the same answer.  Rows are numbered through: rank 0 holds the first ones, rank 1 those after them, and so
on, so that a row has one number however many ranks there are.  Sums over rows are all-reduced in double precision; whatever
belongs to no row (a global prior) is counted once.

Without `torchrun` nothing here does anything: `ALONE` answers every question about the others.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .data import take_rows
from .errors import RankError

if TYPE_CHECKING:
    from .methods.base import Method
    from .problem import Problem
    from .structure import Site, Structure

T = TypeVar("T")

#: How data are given to several ranks.
SHARES = ("split", "own", "alone")
#: What torchrun tells every process.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Seconds that a rank waits for the others in one exchange; a dead rank is noticed at once, only a silent one takes as long.
PATIENCE = 1800.0
#: Rows of a table that tell whether two ranks hold the same.
PRINT_ROWS = 64


@dataclass(frozen=True)
class Ranks:
    """The processes of one fit, as one of them sees them.

    Attributes
    ----------
    rank, size
        Number of this process, and how many there are.
    counts
        Rows of every rank; empty where rows are not shared out.
    share
        "split", "own" or "alone", as in `fit`.
    """

    rank: int = 0
    size: int = 1
    counts: tuple[int, ...] = ()
    share: str = "alone"

    @property
    def several(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.size > 1

    @property
    def shares_rows(self) -> bool:
        """Whether each rank holds some of the rows only."""
        return self.several and bool(self.counts)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all: bars, notes, files."""
        return self.rank == 0

    @property
    def offset(self) -> int:
        """Number of this rank's first row."""
        return sum(self.counts[: self.rank])

    def total(self, own: int) -> int:
        """Rows of all ranks, given one's own."""
        return sum(self.counts) if self.shares_rows else own

    @property
    def weight(self) -> float:
        """Share of all rows that this rank holds: what its average counts for in that of all."""
        return self.counts[self.rank] / max(1, sum(self.counts)) if self.shares_rows else 1.0

    # -- exchanges ---------------------------------------------------------------------------------------------------

    def add(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors summed over the ranks that share the rows: one message, in double precision."""
        return self.total_of(*tensors) if self.shares_rows and tensors else tensors

    def total_of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors summed over all ranks, whatever they share."""
        if not self.several:
            return tensors
        import torch.distributed as dist

        flat = torch.cat([t.detach().reshape(-1).to(torch.float64) for t in tensors])
        self.exchange(lambda: dist.all_reduce(flat))
        parts = flat.split([t.numel() for t in tensors])
        return tuple(p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True))

    def mean(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors averaged over the ranks, each weighing as much as it has rows.

        Where a rank's tensor is G + (N / n) R, with its part R of a sum over rows that n of all N rows make, the mean is
        G + the whole sum: what belongs to no row counts once, however unequal the shards are.
        """
        return self.add(*(self.weight * t for t in tensors)) if self.shares_rows else tensors

    def before(self, deadline: float) -> bool:
        """Whether there is time left: on the clock of the first rank, so that all stop at the same step."""
        return deadline == math.inf or self.first(time.perf_counter() < deadline)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order (any object)."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        self.exchange(lambda: dist.all_gather_object(found, value))
        return found

    def first(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if not self.several:
            return value
        import torch.distributed as dist

        found = [value if self.leads else None]
        self.exchange(lambda: dist.broadcast_object_list(found, src=0))
        return found[0]  # type: ignore[return-value]

    def every(self, flag: bool) -> bool:
        """Whether it holds on every rank."""
        return all(self.gather(bool(flag)))

    def some(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.gather(bool(flag)))

    def exchange(self, call: Callable[[], Any]) -> None:
        """One talk with the others.

        Raises
        ------
        RankError
            A rank has ended or fallen silent.
        """
        try:
            call()
        except RuntimeError as error:
            _Group.lost = True
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank: one of them ended or fell silent, so that the fit "
                f"cannot go on ({line[:160]}). What a checkpoint held stays; start again with it, with as many ranks as "
                f"you like",
                rank=self.rank,
                size=self.size,
            ) from error

    def together(self, call: Callable[[], T]) -> T:
        """The call's value, or on every rank the first error that any rank met: nobody waits for one who has left.

        Raises
        ------
        Exception
            The rank's own, or a RuntimeError that tells another rank's.
        """
        if not self.several:
            return call()
        value, error = None, None
        try:
            value = call()
        except Exception as caught:  # whatever it is, the others must hear of it
            error = caught
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        bad = next((r for r, text in enumerate(told) if text), None)
        if bad is not None:
            raise RuntimeError(f"rank {bad} of {self.size} failed, so that the others stop: {told[bad]}")
        return value  # type: ignore[return-value]

    # -- rows --------------------------------------------------------------------------------------------------------

    def mine(self, index: Tensor) -> Tensor:
        """Which of these row numbers are this rank's: places in `index`."""
        low = self.offset
        return ((index >= low) & (index < low + self.counts[self.rank])).nonzero().flatten()

    def rows(self, kwargs: dict[str, Any], names: Sequence[str], index: Tensor) -> dict[str, Any]:
        """Arguments with these rows of all ranks, on every rank; `index` counts through all of them."""
        if not self.shares_rows:
            return take_rows(kwargs, tuple(names), index)
        places = self.mine(index)
        own = {n: kwargs[n][(index[places] - self.offset).to(kwargs[n].device)].cpu() for n in names}
        found = self.gather((places, own))
        result = dict(kwargs)
        for name in names:
            some = torch.cat([part[name] for _, part in found])
            rows = torch.empty((len(index), *some.shape[1:]), dtype=some.dtype)
            rows[torch.cat([at for at, _ in found])] = some
            result[name] = rows.to(kwargs[name].device)
        return result


#: A process by itself.
ALONE = Ranks()


@dataclass
class _Group:
    """What this process knows of its group."""

    lost: bool = False
    ours: bool = field(default=False)


def start(share: str) -> Ranks:
    """The ranks that torchrun started, joined at the first call; `ALONE` where there is one process only.

    Raises
    ------
    RankError
        The others did not come.
    ValueError
        The environment is incomplete.
    """
    if share == "alone":
        return ALONE
    import torch.distributed as dist

    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return ALONE
        if missing := [n for n in ENVIRONMENT if n not in os.environ]:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several processes, and {', '.join(missing)} "
                f"is not set: start them with torchrun, or pass ranks='alone'"
            )
        cuda = torch.cuda.is_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=PATIENCE))
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the ranks did not find each other: {str(error).splitlines()[0]}") from error
        atexit.register(leave)
    if dist.get_world_size() < 2:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), (), share)


def leave() -> None:
    """Part from the others in good order, at the end of the process."""
    import torch.distributed as dist

    if dist.is_initialized() and not _Group.lost:
        dist.destroy_process_group()


def tells_first() -> bool:
    """Whether this process is the first of its group to ask: the one that tells of an error which others may have met too."""
    from torch.distributed import TCPStore, is_initialized
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        if is_initialized():
            store: Any = _get_default_store()
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        else:
            return os.environ.get("RANK", "0") == "0"
        return store.add(f"zoo/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except RuntimeError:  # the one that kept the store is gone
        return True


def own_device(device: str | torch.device) -> str | torch.device:
    """ "cuda" means the card that torchrun meant for this rank."""
    if str(device) != "cuda" or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    chosen = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    torch.cuda.set_device(chosen)
    return chosen


# -- sharing out -----------------------------------------------------------------------------------------------------


def shared_out(problem: Problem, ranks: Ranks, method: Method) -> Problem:
    """The same problem as one rank works on it.

    Parameters
    ----------
    method
        What it shares out is its `spreads`: "rows", "chains", or "nothing". `unshareable(structure)`, if it has that, tells why
        it cannot.

    Raises
    ------
    ValueError
        ranks="split", and the ranks were given different data; ranks="own", and rows cannot be shared or do not fit.
    """
    if not ranks.several:
        return problem
    against = unshareable(problem, method)
    if ranks.share == "own":
        if against:
            raise ValueError(
                f"ranks='own': {against}; give every rank the same data and pass ranks='split', or ranks='alone'"
            )
        return own_rows(problem, ranks)
    prints = ranks.gather(table_print(problem))
    if any(p != prints[0] for p in prints):
        raise ValueError(
            f"the ranks were given different data (shapes {[p[0] for p in prints]}): with ranks='split' every rank is given "
            f"the whole table and works on its share; where each brings rows of its own, pass ranks='own'"
        )
    rows = problem.structure.num_rows or 0
    if getattr(method, "spreads", "nothing") == "chains":
        return replace(problem, ranks=ranks)
    if against or rows < ranks.size:
        return problem  # every rank does the same work
    base, more = divmod(rows, ranks.size)
    ranks = replace(ranks, counts=tuple(base + (r < more) for r in range(ranks.size)))
    mine = slice(ranks.offset, ranks.offset + ranks.counts[ranks.rank])
    cut = problem.over(take_rows(problem.kwargs, problem.structure.row_arguments, mine))
    sites = tuple(fewer_rows(s, cut.structure, rows) for s in cut.structure.sites)
    return replace(cut, structure=replace(cut.structure, sites=sites, _by_name={}), ranks=ranks)


def fewer_rows(site: Site, structure: Structure, rows: int) -> Site:
    """A site of a story of `rows` rows as it is where `structure` has fewer."""
    if structure.data_plate not in site.plates:
        return site
    batch = list(site.shape[: len(site.shape) - len(site.event_shape)])
    at = site.plates.index(structure.data_plate)
    at = at if len(batch) == len(site.plates) else batch.index(rows) if rows in batch else -1
    if at < 0 or not batch or batch[at] != rows:
        return site
    batch[at] = structure.num_rows or 1
    return replace(site, shape=(*batch, *site.shape[len(batch) :]))


def unshareable(problem: Problem, method: Method) -> str:
    """Why ranks cannot hold rows apart; empty where they can."""
    structure = problem.structure
    if getattr(method, "spreads", "nothing") != "rows":
        return f"{method.name} does not share out rows"
    if text := getattr(method, "unshareable", lambda structure: "")(structure):
        return text
    if not structure.row_arguments or not structure.num_rows:
        return "no argument of the story has one entry a row on its first axis"
    if shared := [s.name for s in structure.finite if not s.local]:
        return f"rows share the finite latent {shared[0]!r}, which is summed out over all of them at once"
    outside = [s.name for s in (*structure.observed, *structure.unnormalised) if structure.data_plate not in s.plates]
    if outside:
        return f"site {outside[0]!r} is seen outside the rows"
    if by_row := [s.name for s in structure.learned if s.local]:
        return f"the parameter {by_row[0]!r} has a value a row"
    if problem.admixture is not None:
        return "topic models are fitted on the expected counts of all documents"
    return ""


def own_rows(problem: Problem, ranks: Ranks) -> Problem:
    """The problem of a rank that brought its own rows, in step with the others."""
    structure = problem.structure
    names, rows = structure.row_arguments, structure.num_rows
    sites = tuple((s.name, s.kind, s.family, s.plates) for s in structure.sites)
    shapes = {n: tuple(problem.kwargs[n].shape[1:]) for n in names}
    cards = ranks.gather((sites, shapes, rows))
    for r, card in enumerate(cards):
        if card[:2] != cards[0][:2]:
            raise ValueError(
                f"ranks='own': the rows of rank {r} do not fit those of rank 0: columns {card[1]} against {cards[0][1]}"
                + ("" if card[0] == cards[0][0] else "; the story has other sites there")
            )
    kinds = ranks.gather({n: problem.kwargs[n].dtype for n in names})
    kwargs = dict(problem.kwargs)
    for name in names:
        if len({k[name] for k in kinds}) > 1:
            kwargs[name] = kwargs[name].to(problem.dtype)
    holes = ranks.gather({s.name: s.missing for s in structure.sites})
    missing = {name: sum(h[name] for h in holes) for name in holes[0]}
    merged = replace(structure, sites=tuple(replace(s, missing=missing[s.name]) for s in structure.sites), _by_name={})
    counts = tuple(card[2] or 0 for card in cards)
    few = ranks.first({n: v.cpu() if isinstance(v, Tensor) else v for n, v in (problem.few or {}).items()})
    few = {n: v.to(problem.device) if isinstance(v, Tensor) else v for n, v in few.items()}
    return replace(problem, kwargs=kwargs, structure=merged, few=few, ranks=replace(ranks, counts=counts))


def table_print(problem: Problem) -> tuple[Any, ...]:
    """What tells one table from another: shapes, and some rows."""
    shapes, values = {}, []
    for name, value in problem.kwargs.items():
        if isinstance(value, Tensor):
            shapes[name] = tuple(value.shape)
            at = torch.linspace(0, len(value) - 1, min(PRINT_ROWS, len(value))).long() if value.ndim else None
            values.append((value if at is None else value[at.to(value.device)]).cpu().numpy().tobytes())
        else:
            values.append(repr(value).encode())
    return shapes, b"".join(values)


def wait_for_all(ranks: Ranks, every: float = 0.05) -> None:
    """Wait until every rank has come here, however long that takes: long work is no silence.

    An exchange gives up after `PATIENCE`; this asks the ranks' common store instead.
    """
    if not ranks.several:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    _Waits.number += 1
    name = f"zoo/wait/{_Waits.number}"
    try:
        count = store.add(name, 1)
        while count < ranks.size:
            time.sleep(every)
            every = min(1.0, 1.2 * every)
            count = store.add(name, 0)
    except RuntimeError as error:
        _Group.lost = True
        raise RankError(
            f"rank {ranks.rank} of {ranks.size} lost another rank while it waited: {str(error).splitlines()[0][:160]}",
            rank=ranks.rank,
            size=ranks.size,
        ) from error


@dataclass
class _Waits:
    """How often this process has waited for all."""

    number: int = 0
