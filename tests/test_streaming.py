"""Data that are read ahead, or lie in another memory than the device's: the same numbers, in order, and no thread is left."""

import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import recorded_mode
from torch import nn

import inference.data
from inference import EM, SVI, fit
from inference.lazy_rows import HostTable, LazyRows
from inference.methods import batches
from inference.methods.paired import PairTarget
from inference.problem import prepare
from inference.streaming import Stream, ToCard, free_bytes, same_key, stays
from zoo import GMM, PPCA


def table(n=700, d=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g, dtype=torch.float64) + 4.0 * torch.randint(2, (n, 1), generator=g)


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a card without room: every table stays in the processor's memory, and its rows are handed over."""
    monkeypatch.setattr(inference.data, "stays", lambda tensors, device: False)


# -- the stream ------------------------------------------------------------------------------------------------------


def test_pieces_come_in_order_while_the_next_is_read():
    """Each once; the next is being made while the present one is used."""
    begun, used = [], []

    def read(key):
        begun.append(key)
        return (torch.full((2,), float(key)),)

    for key, (piece,) in Stream(read).each(range(5)):
        deadline = time.monotonic() + 5
        while len(begun) < min(5, key + 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        used.append((key, float(piece[0]), begun[-1]))
    assert used == [(0, 0.0, 1), (1, 1.0, 2), (2, 2.0, 3), (3, 3.0, 4), (4, 4.0, 4)]


def test_what_was_not_expected_is_read_anyway():
    """A guess that was wrong costs time, never an answer."""
    stream = Stream(lambda rows: (torch.arange(10)[rows],))
    stream.expect(slice(0, 3))
    assert stream.take(slice(5, 7))[0].tolist() == [5, 6]
    index = torch.tensor([3, 1])
    stream.expect(index)
    assert stream.take(torch.tensor([3, 1]))[0].tolist() == [3, 1]
    assert not same_key(torch.tensor([1]), torch.tensor([1, 2])) and not same_key(slice(0, 1), 0)
    assert same_key(np.array([1, 2]), np.array([1, 2]))


def test_errors_of_the_reader_arrive_where_the_piece_is_taken():
    """With their own type, and the stream goes on with other pieces."""

    def read(key):
        if key == 1:
            raise OSError("the disk is gone")
        return (torch.tensor(key),)

    stream = Stream(read)
    stream.expect(1)
    with pytest.raises(OSError, match="the disk is gone"):
        stream.take(1)
    assert int(stream.take(2)[0]) == 2
    with pytest.raises(OSError, match="gone"):
        list(stream.each([0, 1, 2]))


def test_nothing_is_left_of_a_loop_that_was_left():
    """A pass that ends early waits for its reader, and every reader is a daemon: no exit hangs."""
    slow = threading.Event()

    def read(key):
        slow.wait(0.2)
        return (torch.tensor(key),)

    for key, _ in Stream(read).each(range(100)):
        if key == 1:
            break
    assert not [t for t in threading.enumerate() if t.name == "reads ahead"]


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, log):
        self.log = log

    def record(self, stream):
        self.log.append(("recorded", id(self), stream.name))

    def synchronize(self):
        self.log.append(("waited for", id(self)))


class Queue:
    """Stands for a stream."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        self.log.append(("work waits", id(event)))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


class Cuda:
    """What `ToCard` asks of torch.cuda."""

    def __init__(self):
        self.log = []
        self.main = Queue("main", self.log)

    def Stream(self, device):
        return Queue("side", self.log)

    def Event(self):
        return Event(self.log)

    def current_stream(self, device):
        return self.main

    def stream(self, queue):
        return queue

    def device(self, device):
        return self.main


def test_copies_to_a_card_go_by_two_buffers(monkeypatch):
    """A buffer is written again only after its copy is done, and the work waits for each copy; numbers stay what they are."""
    cuda, kept = Cuda(), []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: kept.append(stream.name), raising=False)
    made = []
    lane = ToCard(torch.device("cpu"), cuda, lambda n: made.append(torch.empty(n, dtype=torch.uint8)) or made[-1])
    pieces = [(torch.arange(5.0) + i, torch.arange(3) * i) for i in range(4)]
    stream = Stream(lambda i: pieces[i], lane=lane)
    seen = [tuple(p.clone() for p in found) for _, found in stream.each(range(4))]
    assert all(torch.equal(a, b) for x, y in zip(seen, pieces, strict=True) for a, b in zip(x, y, strict=True))
    assert len(made) == 2 and len(made[0]) == 128
    names = [e[0] for e in cuda.log]
    assert names.count("recorded") == names.count("work waits") == 4 and names.count("waited for") == 2
    events = [e[1] for e in cuda.log if e[0] == "recorded"]
    assert [e[1] for e in cuda.log if e[0] == "waited for"] == events[:2]
    assert all(e[2] == "side" for e in cuda.log if e[0] == "recorded") and set(kept) == {"main"}


def test_half_of_the_free_memory_is_the_limit(monkeypatch):
    """Of a card; the processor's own data always stay."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    x = torch.zeros(60, dtype=torch.float64)
    card = torch.device("cuda:0")
    assert stays([x[:62]], card) and not stays([x, x[:3]], card) and stays([x] * 1000, torch.device("cpu"))


def test_memory_that_a_fit_before_left_behind_is_free(monkeypatch):
    """PyTorch keeps what it once had: without it, the second of two equal fits would be told that its data do not fit."""
    for name, value in (("mem_get_info", (1000, 2000)), ("memory_reserved", 700), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 1400 and free_bytes(torch.device("cpu")) == float("inf")


# -- fits ------------------------------------------------------------------------------------------------------------


def regression(X, y):
    w = pyro.sample("w", dist.Normal(X.new_zeros(X.shape[1]), 3.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)


def same(a, b):
    return all(torch.equal(a.draws[n], b.draws[n]) for n in b.draws) and np.array_equal(a.history, b.history)


@pytest.mark.parametrize(
    "method",
    [EM(restarts=2), EM(restarts=2, driver="incremental", batch_size=100), EM(estimate="mle")],
    ids=["batch", "incremental", "scatter"],
)
def test_em_on_rows_that_are_handed_over(method, elsewhere, monkeypatch):
    """Bit by bit the answer of rows that are there, in blocks that are read ahead."""
    monkeypatch.setattr("inference.methods.em.features.FEATURES", 3000)
    monkeypatch.setattr("inference.methods.em.mixture.KEEP", 0)
    story = PPCA(1) if method.estimate == "mle" else GMM(2, scale=3.0)
    streamed = fit(story, table(1500), method, seed=0)
    assert isinstance(streamed.problem.kwargs["x"], LazyRows)
    monkeypatch.undo()
    monkeypatch.setattr("inference.methods.em.features.FEATURES", 3000)
    monkeypatch.setattr("inference.methods.em.mixture.KEEP", 0)
    assert same(streamed, fit(story, table(1500), method, seed=0))


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("guide", ["mean_field", "story"])
def test_batches_that_are_handed_over(guide, mode, elsewhere, monkeypatch):
    """The same batches in the same order, also across epochs: every step's ELBO is that of rows that are there."""
    X = table()
    data = {"X": X, "y": X.sum(1) + 0.1 * X[:, 0].sin()}

    def own(X, y):
        loc = pyro.param("loc", X.new_zeros(X.shape[1]))
        scale = pyro.param("scale", X.new_full((X.shape[1],), 0.1), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    method = SVI(guide=guide, batch_size=64, steps=40, starts=1, draws=20, mode=mode)
    begun = []
    expect = Stream.expect
    monkeypatch.setattr(Stream, "expect", lambda self, key: begun.append(key) or expect(self, key))
    streamed = fit(regression, data, method, guide=own if guide == "story" else None, seed=0)
    assert streamed.diagnostics["mode"] == mode and len([k for k in begun if isinstance(k, torch.Tensor)]) > 30
    monkeypatch.undo()
    resident = fit(regression, data, method, guide=own if guide == "story" else None, seed=0)
    assert np.array_equal(streamed.history, resident.history)
    assert torch.equal(streamed.draws["w"], resident.draws["w"]) or guide == "story"  # judged on rows from all over


class Encoder(nn.Module):
    """A linear VAE."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.decoder, self.encoder = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        scale = pyro.param("scale", x.new_full((2,), 0.3), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), scale).to_event(1))


def test_networks_on_rows_that_are_handed_over(elsewhere, monkeypatch):
    """Latents in the rows are guessed batch by batch, never for all rows at once; asked for, they are there."""
    method = SVI(batch_size=50, steps=300, lr=0.05, draws=20)
    monkeypatch.setattr(batches, "JUDGED", 100)
    monkeypatch.setattr("inference.lazy_rows.LEAST", 50)
    shown = []
    guide = Encoder.guide
    monkeypatch.setattr(Encoder, "guide", lambda self, x: shown.append(len(x)) or guide(self, x))
    streamed = fit(Encoder(), table(1200), method, seed=0)
    assert max(shown) <= 100 and streamed.diagnostics["mode"] == recorded_mode(streamed)
    monkeypatch.undo()
    resident = fit(Encoder(), table(1200), method, seed=0)
    a, b = streamed.diagnostics["elbo"] / 1200, resident.diagnostics["elbo"] / 1200
    assert abs(a - b) < 0.3, (a, b)
    z = streamed.local("z", table(1200)[:30])
    assert z.shape[1:] == (30, 2)


@pytest.mark.processor
def test_holes_of_rows_that_are_handed_over_are_filled_for_the_guide(elsewhere, monkeypatch):
    """With the means of all rows, as for rows that are there, whether a step holds them or asks for them."""
    x = table()
    x[::7, 1] = torch.nan
    found, rows = [], torch.arange(0, 50)
    for _ in range(2):
        problem = prepare(Encoder(), x, seed=0)
        with problem.scope(0):
            target = PairTarget(problem, 1, 50, "eager")
            target.held = {"x": x[rows]} if isinstance(problem.kwargs["x"], LazyRows) else {}
            found += [target.arguments(rows, filled=True)["x"]]
            target.held = {}
            found += [target.arguments(rows, filled=True)["x"], target.arguments(rows)["x"]]
        monkeypatch.undo()
    assert not found[0].isnan().any() and all(torch.equal(found[0], f) for f in (found[1], found[3], found[4]))
    assert torch.equal(found[2].isnan(), x[rows].isnan()) and torch.equal(found[5].isnan(), x[rows].isnan())


def test_long_tables_on_disk_are_read_ahead(tmp_path, monkeypatch):
    """Batches of a memory map come from a thread, and are those of the table in memory."""
    monkeypatch.setattr(batches, "LISTED", 300)
    monkeypatch.setattr(batches, "RUN", 8)
    monkeypatch.setattr(batches, "RUNS", 16)
    x = table().numpy()
    np.save(tmp_path / "x.npy", x)
    method = SVI(batch_size=32, steps=30, starts=1, draws=20, mode="eager")
    a, b = (fit(PPCA(1), d, method, seed=0) for d in (np.load(tmp_path / "x.npy", mmap_mode="r"), x))
    assert np.array_equal(a.history, b.history)


def test_rows_handed_over_are_views_of_one_table():
    """Reading a block copies that block only."""
    x = table()
    lazy = LazyRows(HostTable(x), torch.float64)
    assert lazy[10:20].data_ptr() == x[10:20].data_ptr()
    assert float(torch.aminmax(lazy).max) == float(x.max()) and torch.equal(lazy.isnan(), x.isnan())


def test_nothing_is_read_any_more_when_a_fit_has_ended(monkeypatch):
    """A thread that reads ahead would hold its rows, on a card too, after the answer is there, or the error."""
    stream = Stream(lambda key: (time.sleep(0.3), torch.zeros(3))[1:])

    def run(self, problem):
        stream.expect(1)
        raise RuntimeError("ended")

    monkeypatch.setattr(EM, "run", run)
    with pytest.raises(RuntimeError, match="ended"):
        fit(GMM(2), table(), EM(), seed=0)
    assert stream._pending is not None and not stream._pending._thread.is_alive()
