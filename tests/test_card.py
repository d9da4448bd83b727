"""Fits on a card, a pretended one where no other is: the answers of the processor, and nothing left behind."""

import gc
import shutil

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from card_cases import CASES, CUDA, PAIR, QUICK, SAME, X, a_card, clusters, regression
from pretended_card import pretended

from inference import EM, HMC, NUTS, SVI, DivergenceError, devices, fit
from inference.lazy_rows import LazyRows
from inference.methods import cuda_graphs, hmc
from inference.methods.ascent import Ascent
from inference.methods.climb_file import ClimbFile
from zoo import GMM, MultinomialMixture, TokenLDA

pytestmark = pytest.mark.processor  # each test says itself when there is a card
only_pretended = pytest.mark.skipif(CUDA, reason="of a card that is pretended")


@pytest.fixture
def card():
    with a_card() as found:
        yield found


@pytest.mark.parametrize("case", CASES)
def test_a_card_answers_as_the_processor_does(case):
    """The same draws, in the processor's memory; nothing stays on the card, and the seed and the random state are kept.

    A real card has random numbers of its own: what hangs on them ends close by.
    """
    story, data, method = CASES[case]
    made = (lambda: story()) if isinstance(story, type) else (lambda: story)
    plain = "graph" if getattr(method, "mode", "") == "cudagraph" else getattr(method, "mode", None)
    wanted_method = SVI(**{**vars(method), "mode": plain}) if isinstance(method, SVI) else method
    wanted = fit(made(), data, wanted_method, seed=1, device="cpu")
    state = torch.get_rng_state()
    with a_card() as card:
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
    if CUDA and case not in SAME:
        assert rows.isfinite().all() and found.history[-1:] == pytest.approx(wanted.history[-1:], rel=0.1)
        return
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-6)
    for name, value in wanted.draws.items():
        torch.testing.assert_close(found.draws[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows, wanted.log_prob(), rtol=1e-5, atol=1e-5)


def test_chains_of_nuts_stay_on_the_processor():
    """Their machine code cannot see a card; whoever asked for one is told."""
    with a_card():
        found = fit(regression, PAIR, NUTS(chains=1, warmup=20, draws=10), seed=1, device="cuda")
    assert found.diagnostics["device"].startswith('cpu ("cuda": the chains of nuts run in machine code')


@pytest.mark.parametrize("method", [EM(restarts=1, max_iter=8), SVI(guide="mean_field", batch_size=64, **QUICK)])
def test_rows_that_do_not_fit_the_card_travel(method):
    """Half of the card's free memory is not enough for them: blocks and batches come one by one, to the same answer."""
    story, x = (GMM(3), clusters(4000)) if method.name == "em" else (regression, clusters(4000))
    data = x if method.name == "em" else {"X": x[:, :2].contiguous(), "y": x[:, 2].contiguous()}
    wanted = fit(story, data, method, seed=1, device="cpu")
    with a_card() as card, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (x.numel() * 8, 1 << 30))
        patch.setattr("inference.methods.em.features.FEATURES", 5000)
        patch.setattr("inference.methods.em.mixture.KEEP", 0)
        found = fit(story, data, method, seed=1, device="cuda")
        assert any(isinstance(v, LazyRows) for v in found.problem.kwargs.values())
        gc.collect()
        assert card.used() == 0
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-6)


def test_a_corpus_with_many_words_is_read_in_blocks_that_may_be_made():
    """A card multiplies dense blocks; one of 256 documents of very many words was more than is made at once."""
    random = np.random.default_rng(0)
    words = 300 * (np.arange(600) % 2)[:, None] + random.integers(300, size=(600, 20))
    table = sp.csr_matrix((np.ones(words.size, int), (np.repeat(np.arange(600), 20), words.ravel())), shape=(600, 600))
    method = EM(restarts=1, max_iter=3)
    wanted = fit(MultinomialMixture(2), table, method, seed=1, device="cpu")
    with a_card(), pytest.MonkeyPatch.context() as patch:
        for name in ("lazy_rows.CELLS", "sparse_rows.CELLS", "methods.em.features.CELLS", "methods.em.mixture.KEEP"):
            patch.setattr(f"inference.{name}", 60_000)
        found = fit(MultinomialMixture(2), table, method, seed=1, device="cuda")
    np.testing.assert_allclose(found.history, wanted.history, rtol=1e-9)


@pytest.mark.parametrize("method", [EM(max_iter=3), SVI(steps=3)], ids=["em", "svi"])
def test_the_form_of_a_topic_model_comes_home(method):
    """The answer's questions about documents met concentrations that were still on the card."""
    story, data = TokenLDA.example()
    with a_card() as card:
        found = fit(story, data, method, seed=0, device="cuda")
        gc.collect()
        assert card.used() == 0
        assert found.local("theta", data).isfinite().all()


@only_pretended
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

    with a_card() as card:
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
        a_card(),
        pytest.raises(ValueError, match=r"data are on device 'cuda'.*holds tensors on 'cpu'.*device='cpu'"),
    ):
        fit(story, X, SVI(**QUICK), seed=0, device="cuda")


def test_an_index_out_of_range_is_told_before_a_card_meets_it(card):
    """A card answers nothing more in the process where one was: the story is run on the processor first."""

    def story(x):
        with pyro.plate("components", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    with pytest.raises(ValueError, match=r"index 3 is out of bounds(.|\n)*the same number K"):
        fit(story, X[:, 0].contiguous(), EM(), seed=0, device="cuda")
    assert torch.ones(3, device="cuda").sum() == 3


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
    with a_card():
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
    with a_card():
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
