"""Fits on a card that is pretended: the answers of the processor, nothing left behind, and the refusals of a real card."""

import gc
import shutil
import threading
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pretended_card import pretended
from torch import nn

from inference import EM, HMC, NUTS, SVI, DivergenceError, devices, fit
from inference.joint import isolated_run
from inference.lazy_rows import LazyRows
from inference.methods import cuda_graphs, hmc
from inference.methods.ascent import Ascent
from inference.methods.climb_file import ClimbFile
from inference.methods.cuda_graphs import GraphedStep, OnCard, graphed
from inference.methods.holdout import Holdout
from inference.problem import prepare
from inference.recorder import pure_graph
from inference.streaming import Stream
from zoo import GMM, PPCA, GaussianHMM

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(CUDA, reason="a CUDA device is here: pytest --device cuda"),
    pytest.mark.processor,  # each test says itself when there is a card
]


def clusters(n=300, d=3):
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(3, d, generator=generator, dtype=torch.float64)
    z = torch.randint(3, (n,), generator=generator)
    return centres[z] + torch.randn(n, d, generator=generator, dtype=torch.float64)


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


# -- fits ------------------------------------------------------------------------------------------------------------------


def bare(x):
    """Knows nothing of devices: every tensor it makes must be made where the data are."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0 * torch.ones(2)).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mu[z], torch.tensor([1.0, 1.0])).to_event(1), obs=x)


def regression(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 3.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, noise), obs=y)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.encoder = nn.Linear(3, 4).double()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), torch.tensor(0.5)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


X = clusters()
PAIR = {"X": X[:, :2].contiguous(), "y": X[:, 2].contiguous()}
WALK = torch.randn(20, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
QUICK = {"steps": 40, "starts": 1, "draws": 20}
CASES = {
    "em": (GMM(3), X, EM(restarts=2)),
    "em of a bare story": (bare, X[:, :2].contiguous(), EM(restarts=2)),
    "incremental em": (GMM(3), X, EM(restarts=1, driver="incremental", batch_size=100)),
    "em of rows with gaps": (GMM(2), X.masked_fill(torch.rand(X.shape) < 0.1, torch.nan), EM(restarts=1, max_iter=5)),
    "em of PPCA": (PPCA(1), X, EM()),
    "em of a chain": (GaussianHMM(2), WALK, EM(restarts=1, max_iter=5)),
    "em by gradient": (regression, PAIR, EM(restarts=1)),
    "svi": (regression, PAIR, SVI(guide="full_rank", **QUICK)),
    "svi in batches": (regression, PAIR, SVI(guide="mean_field", batch_size=50, **QUICK)),
    "svi, latents summed out": (bare, X[:, :2].contiguous(), SVI(guide="mean_field", **QUICK)),
    "svi of networks": (Autoencoder, X, SVI(guide="story", batch_size=50, **QUICK)),
    "svi, eager": (regression, PAIR, SVI(guide="mean_field", mode="eager", **QUICK)),
    "svi, recorded": (regression, PAIR, SVI(guide="mean_field", mode="cudagraph", batch_size=50, **QUICK)),
    "svi of networks, recorded": (Autoencoder, X, SVI(guide="story", mode="cudagraph", **QUICK)),
    "hmc": (regression, PAIR, HMC(chains=4, warmup=60, draws=30, backend="graph")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_card_answers_as_the_processor_does(case):
    """The same draws, in the processor's memory; nothing stays on the card, and the seed and the random state are kept."""
    story, data, method = CASES[case]
    made = (lambda: story()) if isinstance(story, type) else (lambda: story)
    plain = "graph" if getattr(method, "mode", "") == "cudagraph" else getattr(method, "mode", None)
    wanted_method = SVI(**{**vars(method), "mode": plain}) if isinstance(method, SVI) else method
    wanted = fit(made(), data, wanted_method, seed=1, device="cpu")
    state = torch.get_rng_state()
    with pretended() as card:
        found = fit(made(), data, method, seed=1, device="cuda")
        assert found.diagnostics["device"].startswith("cuda")
        if isinstance(method, SVI) and method.mode == "cudagraph":
            assert found.diagnostics["mode"] == "cudagraph", found.diagnostics["reason"]
        if isinstance(method, HMC):
            assert found.diagnostics["leapfrog"] == "cudagraph"
        gc.collect()
        assert card.used() == 0
        assert not card.races  # the same seed gives the same bits
        assert found.problem.device.type == "cpu"
        assert all(not v.is_cuda for v in (*found.draws.values(), *found.problem.kwargs.values()))
        rows = found.log_prob()
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-6)
    for name, value in wanted.draws.items():
        torch.testing.assert_close(found.draws[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows, wanted.log_prob(), rtol=1e-5, atol=1e-5)


def test_chains_of_nuts_stay_on_the_processor():
    """Their machine code cannot see a card; whoever asked for one is told."""
    with pretended():
        found = fit(regression, PAIR, NUTS(chains=1, warmup=20, draws=10), seed=1, device="cuda")
    assert found.diagnostics["device"].startswith('cpu ("cuda": the chains of nuts run in machine code')


@pytest.mark.parametrize("method", [EM(restarts=1, max_iter=8), SVI(guide="mean_field", batch_size=64, **QUICK)])
def test_rows_that_do_not_fit_the_card_travel(method):
    """Half of the card's free memory is not enough for them: blocks and batches come one by one, to the same answer."""
    story, x = (GMM(3), clusters(4000)) if method.name == "em" else (regression, clusters(4000))
    data = x if method.name == "em" else {"X": x[:, :2].contiguous(), "y": x[:, 2].contiguous()}
    wanted = fit(story, data, method, seed=1, device="cpu")
    with pretended() as card, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (x.numel() * 8, 1 << 30))
        patch.setattr("inference.methods.em.features.FEATURES", 5000)
        patch.setattr("inference.methods.em.mixture.KEEP", 0)
        found = fit(story, data, method, seed=1, device="cuda")
        assert any(isinstance(v, LazyRows) for v in found.problem.kwargs.values())
        gc.collect()
        assert card.used() == 0
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-6)


def test_a_full_card_is_told_with_a_smaller_batch():
    """And gives back what the fit held."""
    x = clusters(4000)
    with pretended(limit=x.numel() * 8 * 1.5) as card:
        with pytest.raises(MemoryError, match=r"out of memory.*saw 4000 of 4000 rows: try SVI\(batch_size=\d+\)"):
            fit(
                regression, {"X": x[:, :2].contiguous(), "y": x[:, 2].contiguous()}, SVI(**QUICK), seed=0, device="cuda"
            )
        gc.collect()
        assert card.used() == 0


def test_a_run_that_diverges_brings_its_last_state_home():
    """And holds nothing on the card, though the error is kept."""

    def story(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.exp().exp().exp(), 1.0), obs=x)

    with pretended() as card:
        with pytest.raises(DivergenceError) as caught:
            fit(story, X[:, 0].contiguous(), SVI(guide="mean_field", lr=30.0, **QUICK), seed=0, device="cuda")
        state = caught.value.state
        gc.collect()
        assert state and not any(v.is_cuda for v in state.values())
        assert card.used() == 0


def test_a_story_with_a_tensor_of_the_processor_is_told():
    """Both devices are named, and what to do."""
    kept = torch.ones(len(X), dtype=torch.float64)

    def story(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu * kept[:, None], 1.0).to_event(1), obs=x)

    with (
        pretended(),
        pytest.raises(ValueError, match=r"data are on device 'cuda'.*holds tensors on 'cpu'.*device='cpu'"),
    ):
        fit(story, X, SVI(**QUICK), seed=0, device="cuda")


@pytest.mark.parametrize("device", ["mps", "meta", "cpu:3", None, 3, "gpu"])
def test_names_that_are_no_device_of_fits_are_told(device):
    """Not in PyTorch's words, and not after work has begun."""
    with pytest.raises(ValueError, match="use 'auto', 'cpu', 'cuda' or 'cuda:0'"):
        fit(GMM(2), X, EM(), device=device)


def test_a_card_that_is_not_there_is_told(card):
    with pytest.raises(ValueError, match="device='cuda:1': there is no such card; here is only 'cuda:0'"):
        fit(GMM(2), X, EM(), device="cuda:1")


@pytest.mark.parametrize("mode", ["graph", "cudagraph"])
def test_a_climb_of_svi_goes_on_where_it_was(mode, tmp_path):
    """Parameters were read into the processor's memory, where a card's step cannot take them."""
    options = {"guide": "mean_field", "steps": 30, "starts": 1, "draws": 5, "batch_size": 50, "mode": mode}
    with pretended():
        wanted = fit(regression, PAIR, SVI(**options), seed=1, device="cuda")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClimbFile, "every", 0.0)
            step, made = Ascent.step, iter(range(12))
            patch.setattr(Ascent, "step", lambda ascent: step(ascent) if next(made, None) is not None else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fit(regression, PAIR, SVI(**options, checkpoint=tmp_path / "climb"), seed=1, device="cuda")
        found = fit(regression, PAIR, SVI(**options, checkpoint=tmp_path / "climb"), seed=1, device="cuda")
    assert found.history == wanted.history
    assert torch.equal(found.draws["w"], wanted.draws["w"])


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_climb_goes_on_on_another_device(first, tmp_path):
    """A checkpoint of a card is continued on the processor, and the other way round, to the answer of one run."""
    second = "cuda" if first == "cpu" else "cpu"
    options = {"restarts": 1, "tol": 0.0, "checkpoint": tmp_path / "climb"}
    with pretended():
        fit(GMM(3), X, EM(max_iter=5, **options), seed=1, device=first)
        found = fit(GMM(3), X, EM(max_iter=12, **options), seed=1, device=second)
    wanted = fit(GMM(3), X, EM(max_iter=12, restarts=1, tol=0.0), seed=1)
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-9)


def test_chains_of_a_card_search_alone_in_machine_code(card, monkeypatch):
    """From the recording of the card, on the processor, as there each would wait for its own gradients; what is large stays."""
    moved, run = [], hmc.Run.go
    monkeypatch.setattr(hmc.Run, "go", lambda self, watch: moved.append(self.backend.name) or run(self, watch))
    method = HMC(chains=4, warmup=60, draws=20)
    found = fit(regression, PAIR, method, seed=1, device="cuda")
    monkeypatch.setattr(hmc, "ASKED", 0.0)
    fit(regression, PAIR, method, seed=1, device="cuda")
    assert moved[0] == ("compiled" if shutil.which("cc") else "graph") and moved[-1] == "graph"
    assert found.diagnostics["leapfrog"] == "cudagraph" and found.diagnostics["backend"].startswith("graph")


def test_a_recording_of_a_card_runs_on_the_processor(card):
    """Constants and devices that it names come along."""

    def density(q):
        return (q * y + torch.arange(3, device="cuda")).square().sum() + q.new_zeros(3).sum()

    y, q = torch.linspace(-1, 1, 3, device="cuda"), torch.ones(3, device="cuda")
    here = pure_graph(density, (q,)).at_home()
    assert not here.constants[0].is_cuda
    assert float(here(torch.ones(3))) == pytest.approx(float(density(q)))


@pytest.mark.parametrize(
    "method",
    [HMC(chains=4, warmup=20, draws=10), SVI(guide="mean_field", **QUICK), EM(restarts=1, max_iter=3)],
    ids=["hmc", "svi", "em"],
)
def test_devices_are_timed_on_what_they_will_do(card, method):
    """On the card, too: a trial that fails there passes it over; recorded steps are timed as such."""
    made, once = [], cuda_graphs.GraphedStep.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs.GraphedStep, "__init__", lambda self, *a: made.append(self) or once(self, *a))
        patch.setattr(devices, "PAYS", 0.0)
        found = fit(GMM(2) if method.name == "em" else regression, X if method.name == "em" else PAIR, method, seed=0)
    assert {"step_cpu", "step_cuda"} <= set(found.timings) and found.diagnostics["device"].startswith("cpu")
    assert len(made) == (method.name != "em")
