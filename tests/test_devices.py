"""The device of a fit: which one is taken and why, with clocks and cards that are made up."""

import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from inference import EM, HMC, NUTS, SVI, Gibbs, devices, fit
from inference.devices import available, fastest, only_here, settled, step_of
from inference.problem import prepare, settle
from zoo import GMM, LDA, load_corpus

ROOT = Path(__file__).parents[1]


class Clock:
    """Seconds that pass only when a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def choose(seconds, names=("cpu", "cuda")):
    """`fastest` of devices on which a step takes so long; an exception is raised there."""
    clock, made, waited = Clock(), [], []

    def factory(device):
        made.append(device)

        def step():
            if isinstance(seconds[device], Exception):
                raise seconds[device]
            clock.now += seconds[device]

        return step

    return fastest(names, factory, clock=clock, wait=waited.append), made, waited


def test_one_device_is_taken_without_a_step():
    """Nothing is made, nothing is timed: the answer cannot depend on a clock."""
    choice, made, waited = choose({"cpu": 1.0}, ("cpu",))
    assert (choice.device, choice.trials, made, waited) == ("cpu", (), [], [])
    assert str(choice) == 'cpu ("auto": no CUDA device was found)' and choice.timings == {}


@pytest.mark.parametrize(
    ("cpu", "cuda", "wanted"), [(1.0, 0.1, "cuda"), (0.1, 1.0, "cpu"), (1.0, 0.95, "cpu"), (1.0, 0.85, "cuda")]
)
def test_the_faster_device_is_taken_where_it_pays(cpu, cuda, wanted):
    """A few per cent do not pay for the way there; every time is told, and every step was waited for."""
    choice, made, waited = choose({"cpu": cpu, "cuda": cuda})
    assert choice.device == wanted and made == ["cpu", "cuda"]
    assert choice.timings == pytest.approx({"step_cpu": cpu, "step_cuda": cuda})
    assert str(choice).startswith(f'{wanted} ("auto": cpu {1e3 * cpu:.3g} ms a step; cuda')
    assert min(waited.count("cuda"), waited.count("cpu")) >= 2 * devices.WARM + 2


def test_a_device_that_cannot_is_passed_over():
    """With what it said; and where the first cannot, another one serves."""
    choice, _, _ = choose({"cpu": 1.0, "cuda": RuntimeError("'lgamma' not implemented\nmore")})
    assert choice.device == "cpu" and "cuda cannot run it ('lgamma' not implemented)" in str(choice)
    choice, _, _ = choose({"cpu": ValueError("no"), "cuda": 2.0})
    assert choice.device == "cuda" and choice.timings == {"step_cuda": 2.0}


def test_slow_steps_are_few():
    """Of a step of ten seconds only those are made that are needed to know one."""
    clock, calls = Clock(), []

    def step():
        calls.append(1)
        clock.now += 10.0

    fastest(("cpu", "other"), lambda device: step, clock=clock, wait=lambda device: None)
    assert len(calls) == 2 * (devices.WARM + 1)


X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def story(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("method", [EM(), SVI(), SVI(batch_size=20), HMC()], ids=["em", "svi", "batches", "hmc"])
def test_a_step_of_every_method_can_be_timed(method):
    """It runs, and moves neither random streams nor parameters."""
    problem = prepare(GMM(2) if method.name == "em" else story, X, seed=1)
    before = torch.get_rng_state()
    step = step_of(problem, method)
    step()
    step()
    assert torch.equal(torch.get_rng_state(), before) and not pyro.get_param_store().keys()


def test_auto_takes_the_faster_of_two(monkeypatch):
    """A card that is made up, on the processor: the fit runs on it, and says so in why() and in its timings."""
    monkeypatch.setattr(devices, "available", lambda: ["cpu", "other"])
    real, slow = devices.step_of, {"cpu": 3, "other": 1}

    def counted(problem, method):
        step, name = real(problem, method), "cpu" if problem.asked == "auto" else "other"
        return lambda: [step() for _ in range(slow[name])]

    monkeypatch.setattr(devices, "step_of", counted)
    problem = prepare(story, X, seed=1)
    found, choice = settled(problem, SVI(mode="eager"), lambda device: prepare(story, X, seed=1, device="cpu"))
    assert choice.device == "other" and set(choice.timings) == {"step_cpu", "step_other"}
    assert found is not problem and found.asked == "auto"


@pytest.mark.parametrize("method", [EM(), EM(driver="batch"), SVI()], ids=["em", "batch", "svi"])
def test_topic_models_are_timed_on_both(monkeypatch, method):
    """A pass over documents on each device, and the faster one taken; the card is made up."""
    monkeypatch.setattr(devices, "available", lambda: ["cpu", "other"])
    real, made = devices.step_of, []

    def counted(problem, chosen):
        step = real(problem, chosen)
        made.append(step)
        return step if len(made) == 2 else lambda: [step() for _ in range(12)]

    monkeypatch.setattr(devices, "step_of", counted)
    corpus = load_corpus()[:60]
    problem = prepare(LDA(3), corpus, seed=0)
    found, choice = settled(problem, method, lambda device: prepare(LDA(3), corpus, seed=0))
    assert choice.device == "other" and found is not problem and set(choice.timings) == {"step_cpu", "step_other"}


def test_what_runs_on_the_processor_is_not_tried_elsewhere(monkeypatch):
    monkeypatch.setattr(devices, "available", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(devices, "step_of", lambda *a: pytest.fail("a step was made"))
    topics = prepare(LDA(3), load_corpus()[:60], seed=0)
    assert not only_here(topics, EM()) and not only_here(topics, SVI()) and "gibbs" in only_here(topics, Gibbs())
    found, choice = settled(topics, Gibbs(), lambda device: pytest.fail("data were moved"))
    assert found is topics and str(choice).startswith('cpu ("auto": gibbs')
    posterior = fit(story, X, NUTS(chains=2, warmup=20, draws=10, backend="eager"), seed=0)
    assert 'device: cpu ("auto": the chains of nuts run in machine code' in posterior.why()


@pytest.mark.processor
def test_one_processor_says_so_and_times_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    posterior = fit(GMM(2), X, EM(restarts=1, max_iter=3), seed=0)
    assert available() == ["cpu"] and 'device: cpu ("auto": no CUDA device was found)' in posterior.why().splitlines()
    assert not [n for n in posterior.timings if n.startswith("step_")]
    named = fit(GMM(2), X, EM(restarts=1, max_iter=3), seed=0, device="cpu")
    assert "device: cpu" in named.why().splitlines()
    assert all(torch.equal(posterior.draws[n], named.draws[n]) for n in named.draws)


def test_the_option_of_the_tests_moves_every_fit_that_names_no_device(monkeypatch):
    """`pytest --device cuda`: here with a name that says where it was asked for."""
    import conftest

    asked = []
    front = sys.modules[fit.__module__]
    monkeypatch.setattr(front, "prepare", lambda *args, **kw: asked.append(kw["device"]) or prepare(story, X, seed=0))
    conftest.everything_on("elsewhere", monkeypatch)
    for named in ({}, {"device": "auto"}, {"device": "cpu"}):
        fit(story, X, SVI(steps=3, starts=1, mode="eager"), seed=0, **named)
    assert asked == ["elsewhere", "elsewhere", "cpu"]
    monkeypatch.undo()
    assert step_of(prepare(story, X, seed=1, device="cpu"), EM())() is not None
    posterior = fit(story, X, SVI(steps=3, starts=1, mode="eager"), seed=0, device="cpu")
    assert "device: cpu" in posterior.why().splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_card_the_option_skips_with_the_reason():
    """Nothing passes that did not run."""
    import conftest

    class Item:
        def __init__(self):
            self.markers = []

        def add_marker(self, marker):
            self.markers.append(marker)

    class Config:
        def getoption(self, name):
            return "cuda"

    items = [Item(), Item()]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(conftest.fault_table, "tag", lambda found: None)
    try:
        conftest.pytest_collection_modifyitems(Config(), items)
    finally:
        monkey.undo()
    assert all("no CUDA device" in i.markers[0].kwargs["reason"] for i in items)


def test_networks_go_where_the_data_are():
    """Of the private copy only."""

    class Story:
        def __init__(self):
            self.net = nn.Linear(2, 2)

    own = Story()
    settle(own, None, torch.device("meta"))
    assert own.net.weight.device.type == "meta"


#: What a user may have told PyTorch before, in the older way and in the newer.
TOLD = {
    "nothing": "",
    "high": "torch.set_float32_matmul_precision('high')",
    "newer: products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer: all": "torch.backends.fp32_precision = 'tf32'",
}
#: In a process of its own, as PyTorch does not forget that it was told in the newer way.
PRECISION = """
import sys, torch
from inference.devices import full_precision
exec(sys.argv[1])
old = ("torch.backends.cuda.matmul.allow_tf32", "torch.get_float32_matmul_precision()", "torch.backends.cudnn.allow_tf32")
new = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul")
new = [f"torch.backends.{n}.fp32_precision" for n in new if hasattr(torch.backends.cuda.matmul, "fp32_precision")]

def look(names):
    found = []
    for name in names:
        try:
            found.append(eval(name))
        except RuntimeError:
            found.append("parted")
    return found

def state():
    return look(old), look(new)

before = state()
try:
    with full_precision():
        within = state()
        raise ValueError
except ValueError:
    pass
assert state() == before, (before, state())
assert set(within[1]) <= {"none", "ieee"}, within
for told, then in zip(*(s[0] for s in (before, within))):
    assert then in (False, "highest") or told == "parted" or "backends.fp32" in sys.argv[1], (before, within)
"""


@pytest.mark.parametrize("told", TOLD)
def test_float32_is_multiplied_as_float32(told):
    """TF32 keeps ten bits; who asked for it gets it back, also after an error, and no kernel finds two answers."""
    if "newer" in told and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("an older PyTorch")
    done = subprocess.run([sys.executable, "-c", PRECISION, TOLD[told]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_fit_multiplies_float32_as_float32():
    """Whatever the user has asked for outside."""
    before, seen = torch.get_float32_matmul_precision(), set()

    def watching(x):
        seen.add(torch.get_float32_matmul_precision())
        story(x)

    torch.set_float32_matmul_precision("high")
    try:
        fit(watching, X, SVI(steps=3, starts=1, mode="eager"), seed=0)
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
