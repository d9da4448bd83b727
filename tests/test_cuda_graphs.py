"""Steps that are recorded for a card: what must hold of buffers, random numbers and Adam, with a card that is made up.

The stand-in repeats the work on the same buffers, as a launch would; what `OnCard` asks of PyTorch is logged.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import SVI, fit
from inference.methods import ascent, cuda_graphs, svi_step
from inference.methods.cuda_graphs import GraphedAdam, GraphedStep, OnCard, graphed, set_rate

CUDA = torch.cuda.is_available()


def repeated(work):
    """A recording: the work runs while it is made, and once a launch."""
    work()
    return work


def squares(x, n):
    return (x * x).sum() * n, 2 * x * n


def test_a_step_answers_for_what_it_is_given():
    """Inputs are copied into buffers that stay where they are, whole numbers too; given tensors are left alone."""
    step = GraphedStep(squares, (torch.ones(3), torch.tensor(1)), repeated)
    places = [t.data_ptr() for t in step.inputs]
    for scale in (2.0, 3.0):
        x, n = torch.full((3,), scale), torch.tensor(5)
        value, slope = step(x, n)
        assert float(value) == 15 * scale**2 and torch.equal(slope, 10 * x) and float(x[0]) == scale
    assert [t.data_ptr() for t in step.inputs] == places
    step.inputs[0].fill_(7.0)
    assert float(step(step.inputs[0], torch.tensor(1))[0]) == 147.0  # a buffer that is given is not copied


def test_a_recording_leaves_the_random_stream_where_it_was():
    """And every launch draws on."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step = GraphedStep(lambda x: (x + torch.randn(3),), (torch.zeros(3),), repeated)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = step(torch.zeros(3))[0].clone(), step(torch.zeros(3))[0].clone()
    torch.manual_seed(0)
    assert torch.equal(a, torch.randn(3)) and torch.equal(b, torch.randn(3))


def test_a_step_is_trusted_only_where_it_agrees():
    """A recording that forgets its inputs, or cannot be made, is passed over with the reason."""
    example, moved = (torch.ones(3), torch.tensor(2)), (torch.full((3,), 2.0), torch.tensor(3))
    assert graphed(squares, example, [moved], repeated).mode == "cudagraph"

    def forgetful(work):
        work()
        return lambda: None

    found = graphed(squares, example, [moved], forgetful)
    assert found.mode == "graph" and found.reason.startswith("CUDA graph:") and found.call is squares

    def impossible(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    assert "capturing" in graphed(squares, example, [moved], impossible).reason


class Log:
    """Stands for torch.cuda and everything that it makes."""

    def __init__(self):
        self.seen = []
        self.default_generators = {self: self}

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.seen.append(f"{name}({', '.join(kwargs)})" if kwargs else name)
            return self

        return call

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.seen.append("end")


def test_work_is_warmed_up_beside_the_main_stream_and_then_recorded_once():
    """In this order: side stream waits, warm-up, main stream waits, card is idle, recording."""
    cuda = Log()
    launch = OnCard(torch.device("cuda:0"), cuda)(lambda: cuda.seen.append("work"))
    text = " ".join(cuda.seen)
    assert text == (
        "device Stream current_stream wait_stream stream work work get_sync_debug_mode set_sync_debug_mode work "
        "set_sync_debug_mode end current_stream wait_stream synchronize current_stream CUDAGraph current_device clone_state "
        "graph(capture_error_mode, stream) work end set_stream end"
    )
    launch()
    assert cuda.seen[-1] == "replay"


@pytest.mark.parametrize("rates", [(0.1,), (0.1, 0.02)])
def test_a_recorded_adam_is_adam(rates):
    """Step by step, also where gradients come in other tensors than before, and the rate moves."""
    g = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(4, generator=g) for _ in rates] for _ in range(9)]
    kept = []

    def record(work):
        def launch():
            work()

        kept.append(launch)
        return launch

    ends = []
    for made in ("plain", "recorded"):
        parameters = [torch.zeros(4) for _ in rates]
        groups = [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)]
        adam = (
            GraphedAdam(groups, record, maximize=True)
            if made == "recorded"
            else torch.optim.Adam(groups, maximize=True)
        )
        for i, part in enumerate(gradients):
            for parameter, gradient in zip(parameters, part, strict=True):
                parameter.grad = gradient.clone()
            for group, rate in zip(adam.param_groups, rates, strict=True):
                set_rate(group, rate / (1 + i))
            adam.step()
        ends.append(parameters)
    assert len(kept) == 1
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


X = torch.randn(80, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def story(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


def guide(x):
    loc = pyro.param("loc", x.new_zeros(2))
    scale = pyro.param("scale", x.new_full((2,), 0.3), constraint=dist.constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("own", [True, False], ids=["story's guide", "derived"])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_fit_by_recorded_steps_is_the_fit_by_the_graph(own, batch_size, monkeypatch):
    """Losses and draws: buffers that are stale, or noise that is drawn twice, would show in the second step."""
    options = {"steps": 60, "starts": 2, "draws": 40, "batch_size": batch_size, "particles": 2}
    options |= {"guide": "story" if own else "mean_field"}
    wanted = fit(story, X, SVI(mode="graph", **options), guide=guide if own else None, seed=3)
    monkeypatch.setattr(cuda_graphs, "refuse", lambda mode, device: None)
    monkeypatch.setattr("inference.methods.svi.refuse", lambda mode, device: None)
    monkeypatch.setattr(svi_step, "graphed", lambda step, example, points: graphed(step, example, points, repeated))

    class Adam(GraphedAdam):
        def __init__(self, groups, **rest):
            super().__init__(groups, lambda work: work, **rest)

    monkeypatch.setattr(ascent, "GraphedAdam", Adam)
    found = fit(story, X, SVI(mode="cudagraph", **options), guide=guide if own else None, seed=3)
    assert found.diagnostics["mode"] == "cudagraph" and not found.diagnostics["reason"]
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-5)
    torch.testing.assert_close(found.draws["mu"], wanted.draws["mu"], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(CUDA, reason="a CUDA device is here")
@pytest.mark.processor
def test_without_a_card_cuda_graphs_are_refused():
    """Before any step, with what to use instead."""
    with pytest.raises(ValueError, match=r"mode='cudagraph'.*on 'cpu'.*no CUDA device was found.*mode='graph'"):
        fit(story, X, SVI(mode="cudagraph"), seed=0)
    with pytest.raises(ValueError, match="'cudagraph'"):
        SVI(mode="cuda graph")


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("batch_size", [None, 16])
def test_on_a_card_recorded_steps_are_the_graphs(batch_size):
    """The same losses, random numbers included."""
    options = {"steps": 60, "starts": 1, "draws": 40, "batch_size": batch_size, "guide": "mean_field"}
    found, wanted = (fit(story, X, SVI(mode=m, **options), seed=3, device="cuda") for m in ("cudagraph", "graph"))
    assert found.diagnostics["mode"] == "cudagraph", found.diagnostics["reason"]
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-5)
