"""Devices that are not there, or too small. What needs a GPU is skipped without one; the rest stands in for it."""

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from fault_stories import ALL, GRADIENT, QUICK, X, answer, good, location, real, refused, series
from fault_table import row

from inference import SVI, fit, load

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.mark.processor
@row("CUDA is asked for and there is none", ALL, plain="cuda", numbered="cuda:0")
def test_a_missing_device_is_told(method, case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    story, data, _ = real(method)
    refused(ValueError, ["cuda", "no CUDA device was found", "device='cpu'"], story, data, method, device=case)


@pytest.mark.processor
@row("CUDA is asked for and there is none", ALL)
def test_auto_says_what_it_took(method, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    posterior = answer(*real(method)[:2], method)
    assert posterior.diagnostics["device"] == 'cpu ("auto": no CUDA device was found)'
    assert ", on cpu" in str(posterior.summary())


@row("CUDA runs out of memory", GRADIENT)
def test_too_little_memory_is_told_with_a_smaller_batch(method):
    """The error that a GPU raises, raised here by the story in the midst of the run."""
    held, calls = [], [0]

    def story(x):
        calls[0] += 1
        buffer = torch.ones(1000)
        held.append(weakref.ref(buffer))
        if calls[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + 0 * buffer[:3], 1.0).to_event(1), obs=x)

    with pytest.raises(MemoryError, match=r"CUDA out of memory.*30 of 30 rows.*SVI\(batch_size=7\)") as error:
        answer(story, X, method)
    assert "released" in str(error.value)
    gc.collect()
    assert not any(ref() is not None for ref in held), "the run's tensors are still held"
    wanted = good(method)
    assert all(torch.equal(v, wanted[n]) for n, v in answer(*real(method)[:2], method).draws.items())


@row("CUDA runs out of memory", ("svi",))
def test_the_batch_of_the_method_is_named(method):
    def story(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(MemoryError, match=r"svi saw 20 of 30 rows.*batch_size=5"):
        fit(story, X, SVI(batch_size=20), seed=0)


@row("CUDA runs out of memory", ("svi",))
def test_the_batch_that_is_named_has_room(method):
    """Half of what was free beside what was asked for; the seed, the store and later fits are untouched."""
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 512.00 MiB is free. "
        "Process 1 has 20.00 GiB memory in use."
    )

    def story(x):
        raise torch.OutOfMemoryError(text)

    before = torch.get_rng_state()
    with pytest.raises(MemoryError, match=r"svi saw 24 of 30 rows: try SVI\(batch_size=3\)"):
        fit(story, X, SVI(batch_size=24), seed=0)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32


@row("CUDA runs out of memory", ("em",))
def test_too_little_memory_of_the_processor_is_told_too(method):
    """A table of 10 TB: PyTorch says RuntimeError."""

    def story(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(10**13)[:3], 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pytest.raises(MemoryError, match=r"memory.*released"):
        answer(story, X, method)


@gpu
@row("CUDA runs out of memory", ("svi",))
def test_a_real_gpu_runs_out_of_memory(method):
    def story(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3, device=x.device), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + 0 * torch.ones(2**42, device=x.device)[:3], 1.0).to_event(1), obs=x)

    before = torch.cuda.memory_allocated()
    with pytest.raises(MemoryError, match="out of memory"):
        fit(story, X, QUICK[method], seed=0, device="cuda")
    assert torch.cuda.memory_allocated() == before


@row("an answer saved on CUDA, loaded without", ALL)
def test_an_answer_from_cuda_loads_on_the_processor(method, tmp_path):
    """The card says cuda:0, as it would; numbers are kept as the processor's."""
    from test_faults_files import rewritten

    story, data, _ = real(method)
    posterior = answer(story, data, method)
    path = rewritten(posterior.save(tmp_path / "a"), tmp_path / "b", device="cuda:0")
    again = load(path, story)
    assert all(torch.equal(v, again.draws[n]) and v.device.type == "cpu" for n, v in posterior.draws.items())


@gpu
@row("an answer saved on CUDA, loaded without", GRADIENT)
def test_an_answer_of_a_real_gpu_holds_no_cuda_tensors(method, tmp_path):
    posterior = fit(location, X, QUICK[method], seed=0, device="cuda")
    again = load(posterior.save(tmp_path / "a"), location)
    assert again.problem.device.type == "cpu"
    assert all(torch.equal(v.cpu(), again.draws[n]) for n, v in posterior.draws.items())
    assert series
