"""What a pretended card refuses and takes, recorded steps on it, and random numbers of its own."""

import gc
import threading
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from card_cases import PAIR, X, regression
from pretended_card import pretended
from torch import nn

from inference import EM, SVI, fit
from inference.joint import isolated_run
from inference.methods.cuda_graphs import GraphedStep, OnCard, graphed
from inference.methods.holdout import Holdout
from inference.problem import prepare
from inference.recorder import pure_graph
from inference.streaming import Stream
from zoo import GMM

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(CUDA, reason="a CUDA device is here: pytest --device cuda"),
    pytest.mark.processor,  # each test says itself when there is a card
]


@pytest.fixture
def card():
    with pretended() as found:
        yield found


# -- the pretence ----------------------------------------------------------------------------------------------------------


def test_what_a_card_refuses_is_refused(card):
    """Two devices in one operation, NumPy's look, the wrong generator, also under vmap and in a backward pass."""
    x = torch.randn(5, 3, device="cuda", requires_grad=True)
    for work in (
        lambda: x + torch.ones(3),
        lambda: torch.stack([x[0], torch.ones(3)]),
        lambda: torch.vmap(lambda row: row * torch.ones(3))(x),
        lambda: torch.ones(5, 3)[torch.arange(2, device="cuda")],
        lambda: torch.ones(3).add_(x[0].detach()),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            work()
    with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
        np.asarray(x.detach())
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())

    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * torch.full((3,), 2.0)

    with pytest.raises(RuntimeError, match="same device"):
        Forgetful.apply(x).sum().backward()


def test_what_a_card_takes_is_taken(card):
    """Numbers without dimension, indices of the processor, copies, views, gradients; and it is known where each lies."""
    x = torch.randn(5, 3, device="cuda", requires_grad=True)
    for made in (
        x * torch.tensor(2.0),
        x[torch.arange(2)],
        x[0].T,
        x.double(),
        x.new_zeros(3),
        torch.zeros_like(x),
        torch.tensor([1.0], device="cuda"),
        torch.autograd.grad((x**2).sum(), x)[0],
        torch.vmap(lambda row: row * torch.ones(3, device=row.device))(x),
        torch.zeros(3).to(x),
        nn.Linear(3, 2).to("cuda")(x),
    ):
        assert made.is_cuda and made.device == torch.device("cuda:0")
    assert x.cpu().device.type == x.to("cpu").device.type == torch.zeros(3).device.type == "cpu"
    with torch.device("cuda"):
        assert torch.ones(2).is_cuda and torch.as_tensor(1.0).is_cuda and not torch.ones(2, device="cpu").is_cuda


def test_recorded_operations_are_repeated_in_their_memory(card):
    """And a look at a number, which a recording cannot hold, is refused."""
    y = torch.zeros(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = (y + 1).sum()
    y.fill_(3.0)
    assert np.isnan(total.item())  # recording runs nothing
    graph.replay()
    assert total.item() == 16.0
    with pytest.raises(RuntimeError, match="error during capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        total.item()


def some_of_them(y):
    """How many rows are taken is a number that the processor would wait for, were the mask counted at every step."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    taken = y > -0.5
    pyro.sample("y", dist.Normal(0.0, (scale * torch.ones(len(y)))[taken]).to_event(1), obs=y[taken])


def test_a_step_that_waits_for_the_card_is_not_recorded(card, monkeypatch):
    """It is found out before the recording, after which older versions of PyTorch draw no more random numbers."""
    y, quick = torch.linspace(-1, 2, 5, dtype=torch.float64), SVI(steps=60, starts=1)
    here = fit(some_of_them, y, replace(quick, mode="graph"), seed=1, device="cpu")
    for mode in ("cudagraph", "graph"):
        if mode == "graph":
            monkeypatch.setattr("inference.recorder._Recorder._numbered", lambda self, indices: indices)
        there = fit(some_of_them, y, quick, seed=1, device="cuda")
        assert there.diagnostics["mode"] == mode and not card.stuck and card.told == 0
        torch.testing.assert_close(there.draws["scale"], here.draws["scale"], rtol=1e-6, atol=1e-9)
    assert "synchronizing" in there.diagnostics["reason"]


def test_a_recording_that_breaks_off_leaves_random_numbers(card):
    """Where PyTorch does not say that work waits."""
    x = torch.ones(3, device="cuda")

    def work():
        card.told = 0
        float((x + torch.randn(3, device="cuda")).sum())

    with pytest.raises(RuntimeError, match="capture"):
        OnCard(torch.device("cuda"))(work)
    assert torch.randn(3, device="cuda").shape == (3,)


def test_what_spoils_a_recording_is_refused(card):
    """Copies from the processor, indices that lie there, draws that check their operands, another thread's demands."""
    x, i = torch.ones(4, device="cuda"), torch.arange(2)

    def elsewhere():
        errors = []

        def run():
            try:
                torch.zeros(3, device="cuda")
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return errors

    works = (
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: x.add_(torch.ones(4).to("cuda")),
        lambda: x[i],
        lambda: torch.multinomial(x, 1),
        lambda: torch.cuda.synchronize(),
        elsewhere,
    )
    before = torch.cuda.current_stream()
    for work in works:
        with pytest.raises(RuntimeError, match="error during capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
        torch.cuda.set_stream(before)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        assert not elsewhere()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[torch.tensor([5], device="cuda")],
        lambda x: x.gather(0, torch.tensor([5], device="cuda")),
        lambda x: torch.bernoulli(x * torch.nan),
        lambda x: torch.poisson(-x),
    ],
)
def test_what_goes_wrong_in_a_kernel_ends_all_work_of_a_card(card, work):
    """An index out of range and a probability that is none are found too late: there is no error to recover from."""
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="device-side assert"):
        work(x)
    with pytest.raises(RuntimeError, match="device-side assert"):
        x + 1


def test_a_number_of_the_processor_is_recorded_as_it_is(card):
    """Its later values are not seen; a dot product or a sum of rows does not take it at all."""
    x, n, graph = torch.ones(4, device="cuda"), torch.tensor(2.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = x * n
    n.fill_(5.0)
    graph.replay()
    assert twice.cpu().tolist() == [2.0] * 4
    with pytest.raises(RuntimeError, match="same device"):
        torch.searchsorted(x, n)


def test_the_pretence_ends():
    """Also after an error."""
    with pytest.raises(KeyError), pretended():
        assert torch.cuda.is_available()
        raise KeyError
    assert not torch.cuda.is_available() and torch.Generator().device.type == "cpu"


# -- recorded steps --------------------------------------------------------------------------------------------------------


def test_a_recorded_step_keeps_what_it_reads(card):
    """A graph keeps no memory alive: without the function that holds them its constants are given back."""

    def made():
        constant = torch.full((3,), 2.0, device="cuda")
        return lambda x: (x * constant,)

    call = graphed(made(), (torch.ones(3, device="cuda"),), []).call
    assert isinstance(call, GraphedStep)
    gc.collect()
    assert call(torch.full((3,), 3.0, device="cuda"))[0].tolist() == [6.0] * 3
    call.fn = None
    gc.collect()
    with pytest.raises(RuntimeError, match="given back"):
        call(torch.ones(3, device="cuda"))


def test_answers_of_a_recorded_step_are_kept_apart(card):
    """Draws that are evaluated one after the other were all the last one."""
    step = GraphedStep(lambda x: (x * 2,), (torch.ones(3, device="cuda"),), OnCard(torch.device("cuda")))
    found = [step(torch.full((3,), n, device="cuda"))[0] for n in (1.0, 2.0)]
    assert [f[0].item() for f in found] == [2.0, 4.0]
    assert step.once(torch.ones(3, device="cuda"))[0] is step.once(torch.zeros(3, device="cuda"))[0]


def test_a_recording_that_fails_leaves_no_trace(card):
    """The stream of the work is what it was, the step runs as before, and the reason is the first error, not the last."""
    before = torch.cuda.current_stream()

    def step(x):
        card.told = 0  # as for work that waits in a way that PyTorch does not know
        return (x * x.sum().item(),)

    found = graphed(step, (torch.ones(3, device="cuda"),), [])
    assert found.mode == "graph" and "not permitted when stream is capturing" in found.reason
    assert torch.cuda.current_stream() is before
    assert found.call(torch.ones(3, device="cuda"))[0].tolist() == [3.0] * 3


def test_rows_are_read_ahead_while_a_step_is_recorded(card):
    """The thread that reads takes memory of the card at any time, which spoils recordings of the default kind."""

    def work():
        stream.expect(0)
        stream._pending.wait()

    stream = Stream(lambda key: (torch.ones(3),), "cuda")
    OnCard(torch.device("cuda"))(work)
    assert stream.take(0)[0].tolist() == [1.0] * 3


# -- random numbers --------------------------------------------------------------------------------------------------------


def recorded_draws():
    return pure_graph(lambda x: x + torch.randn(3, device="cuda"), (torch.zeros(3, device="cuda"),), random=True)


def bookkeeping():
    problem = prepare(regression, PAIR, seed=5, device="cuda")
    with isolated_run(problem, seed=0):
        torch.randn(3, device="cuda")


def a_look_at_rows_held_out():
    class Plain(Holdout):
        def bound(self, leaves):
            return torch.randn((), device="cuda")

    watch = Plain(None, torch.arange(3), 100)
    watch.look(0, {})
    watch.look(1, {})
    assert watch.history[0][1] == watch.history[1][1]  # the same draws at every look


@pytest.mark.parametrize("work", [recorded_draws, bookkeeping, a_look_at_rows_held_out])
def test_what_draws_on_the_side_leaves_a_cards_random_numbers(work):
    """A card has numbers of its own: with the processor's alone put back, every fit went on from the same ones."""
    with pretended(own_stream=True):
        torch.cuda.manual_seed_all(7)
        before = torch.cuda.get_rng_state()
        work()
        assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("method", [SVI(guide="mean_field", steps=10, starts=1, draws=5), EM(restarts=1, max_iter=3)])
def test_a_seed_decides_what_a_card_draws(method):
    """The same bits again, other numbers with another seed, and the user's own stream goes on as if nothing had been."""
    story, data = (regression, PAIR) if method.name == "svi" else (GMM(3), X)
    with pretended(own_stream=True) as card:
        before = torch.cuda.get_rng_state()
        runs = [fit(story, data, method, seed=seed, device="cuda").history for seed in (1, 1, 2)]
        assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert runs[0] == runs[1] != runs[2]
        assert not card.races


def test_a_recording_of_a_card_runs_on_the_processor(card):
    """Constants and devices that it names come along."""

    def density(q):
        return (q * y + torch.arange(3, device="cuda")).square().sum() + q.new_zeros(3).sum()

    y, q = torch.linspace(-1, 1, 3, device="cuda"), torch.ones(3, device="cuda")
    here = pure_graph(density, (q,)).at_home()
    assert not here.constants[0].is_cuda
    assert float(here(torch.ones(3))) == pytest.approx(float(density(q)))
