"""Noticing that another rank has ended while no message is due: while chains move apart, perhaps for hours.

Every rank listens to the one before it, in a thread of its own, for a word that is sent when all have come to the end of their
work.  The connection to a rank that ends closes, and its listener hears that at once; it ends too, and so on round the ring.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from .distributed import Ranks, lost
from .errors import RankError

#: A talk that may take as long as chains do.
FOREVER = timedelta(days=3650)
#: What ranks that are all there need to open the lines: one that dies just then is not waited for any longer.
MEETING = timedelta(seconds=20)


class Lifeline:
    """Work that ranks do apart: `with Lifeline(ranks) as line`, asking `line()` now and then; leaving waits for all.

    Parameters
    ----------
    ranks
        All of them enter and leave together, however long that takes: long work is no silence.

    Raises
    ------
    RankError
        Another rank has ended.
    """

    _group: Any = None
    _count = 0

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lifeline:
        if self.ranks.several:
            import torch.distributed as dist

            if Lifeline._group is None:
                self.ranks.gather(None)  # however late the others come; from then on all are there
                self.ranks.exchange(
                    lambda: setattr(Lifeline, "_group", dist.new_group(timeout=MEETING, backend="gloo"))
                )
            Lifeline._count += 1
            self._thread = threading.Thread(target=self._listen, name="lifeline", daemon=True)
            self._thread.start()
        return self

    def __call__(self) -> bool:
        """False; an error where a rank has ended."""
        if self._error is not None:
            raise lost(self.ranks, self._error) from self._error
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None or isinstance(error, RankError):
            return
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        store, name, pause = _get_default_store(), f"zoo/wait/{Lifeline._count}", 0.005
        try:
            count = store.add(name, 1)
            while count < self.ranks.size:
                self()
                time.sleep(pause)
                pause = min(1.0, 1.2 * pause)
                count = store.add(name, 0)
            after = (self.ranks.rank + 1) % self.ranks.size
            dist.send(torch.zeros(1), after, group=Lifeline._group, tag=Lifeline._count)
        except RankError:
            raise
        except RuntimeError as closed:  # the one that kept the store is gone
            raise lost(self.ranks, closed) from closed
        self._thread.join()
        self()

    def _listen(self) -> None:
        import torch.distributed as dist

        before = (self.ranks.rank - 1) % self.ranks.size
        try:
            word: Any = dist.irecv(torch.zeros(1), before, group=Lifeline._group, tag=Lifeline._count)
            word.wait(FOREVER)
        except Exception as error:  # told by the rank itself, not by its listener
            self._error = error
