"""Several processes, one fit: rows, gradients or chains are shared out over the ranks that `torchrun` started.

The contract is short.  Every rank calls the same `fit` with the same arguments; what the ranks do together they do inside,
and every rank gets the same answer.  Rows are numbered through: rank 0 holds the first ones, rank 1 those after them, and so
on, so that a row has one number however many ranks there are.  Sums over rows are all-reduced in double precision; whatever
belongs to no row (a global prior) is counted once.

Without `torchrun` nothing here does anything: `ALONE` answers every question about the others.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from .data import take_rows
from .errors import RankError

T = TypeVar("T")

#: How data are given to several ranks.
SHARES = ("split", "own", "alone")
#: What torchrun tells every process.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Seconds that a rank waits for the others in one exchange; a dead rank is noticed at once, only a silent one takes as long.
PATIENCE = 1800.0
#: Seconds that a rank waits for the others to come: machines do not start at the same moment.
JOINING = 300.0


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
    device
        Where this rank keeps what the others keep on their cards.
    """

    rank: int = 0
    size: int = 1
    counts: tuple[int, ...] = ()
    share: str = "alone"
    device: str | torch.device = "cpu"

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
        self.exchange(lambda: dist.all_gather_object(found, packed(value)))
        return [unpacked(v, self.device) for v in found]

    def first(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if not self.several:
            return value
        import torch.distributed as dist

        found: list[Any] = [packed(value) if self.leads else None]
        self.exchange(lambda: dist.broadcast_object_list(found, src=0))
        return unpacked(found[0], self.device)

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
            raise lost(self, error) from error

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
        except RankError:  # there is nobody to tell
            raise
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


@dataclass(frozen=True)
class OnCard:
    """A tensor of somebody's card on its way: it must not arrive on a card of the same number elsewhere."""

    value: Tensor


def packed(value: Any) -> Any:
    """The value with tensors of cards as `OnCard`, also in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return OnCard(value.cpu()) if value.is_cuda else value
    if type(value) in (list, tuple):
        return type(value)(packed(v) for v in value)
    return {k: packed(v) for k, v in value.items()} if type(value) is dict else value


def unpacked(value: Any, device: str | torch.device) -> Any:
    """The value with such tensors on this rank's device."""
    if isinstance(value, OnCard):
        return value.value.to(device)
    if type(value) in (list, tuple):
        return type(value)(unpacked(v, device) for v in value)
    return {k: unpacked(v, device) for k, v in value.items()} if type(value) is dict else value


#: A process by itself.
ALONE = Ranks()


class _Process:
    """What this process knows: whether another rank is lost."""

    lost = False


def lost(ranks: Ranks, error: BaseException) -> RankError:
    """What to raise where a talk with another rank has failed; from now on nothing is said to the others."""
    _Process.lost = True
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RankError(
        f"rank {ranks.rank} of {ranks.size} lost another rank: one of them ended or fell silent, so that the fit cannot go on "
        f"({line[:160]}). What a checkpoint held stays; start again with it, with as many ranks as you like",
        rank=ranks.rank,
        size=ranks.size,
    )


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
        if wrong := [n for n in ("RANK", "MASTER_PORT") if not os.environ[n].isdigit()]:
            raise ValueError(f"{wrong[0]}={os.environ[wrong[0]]!r} must be a whole number")
        join()
    if dist.get_world_size() < 2:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), (), share)


def join() -> None:
    """Find the others.

    Raises
    ------
    RankError
        They did not come, or cannot be reached.
    """
    import torch.distributed as dist

    kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=JOINING))))
        dist.init_process_group(
            kinds, store=dist.PrefixStore("zoo", store), rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
        )
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ[n] for n in ENVIRONMENT[2:])
        raise RankError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not find the others at {where} within {JOINING:g} s: "
            f"{str(error).splitlines()[0][:200]}. Start every rank, with the same MASTER_ADDR and MASTER_PORT, which all "
            f"machines can reach; where a machine has several networks or its name leads nowhere, set GLOO_SOCKET_IFNAME to "
            f"the network that the others see (ip addr lists them; lo where all ranks are on one machine)",
            rank=int(os.environ["RANK"]),
            size=int(os.environ["WORLD_SIZE"]),
        ) from error
    atexit.register(leave)


def leave() -> None:
    """Part from the others in good order, at the end of the process."""
    import torch.distributed as dist

    if dist.is_initialized() and not _Process.lost:
        dist.destroy_process_group()
        # Threads of the group may still hold tensors; letting go while the interpreter ends would abort the process.
        gc.collect()
        time.sleep(0.05)


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


@contextmanager
def first_warns(ranks: Ranks) -> Iterator[None]:
    """Warnings of the first rank only: the others would say the same."""
    with warnings.catch_warnings() if ranks.several and not ranks.leads else nullcontext():
        if ranks.several and not ranks.leads:
            warnings.simplefilter("ignore")
        yield


def own_device(device: str | torch.device) -> str | torch.device:
    """ "cuda" means the card that torchrun meant for this rank."""
    if str(device) != "cuda" or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    chosen = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    torch.cuda.set_device(chosen)
    return chosen
