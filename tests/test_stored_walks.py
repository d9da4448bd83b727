"""Dynamic topic models of documents on disk: the passes of memory, and nothing of any document kept."""

import dataclasses

import numpy as np
import pytest
import torch

from inference import EM, SVI, fit
from inference.topics import (
    dynamic_streamed,
    forecast_concentration,
    perplexity,
    shares,
    streamed,
    topic_share,
    visits,
    weights,
)
from inference.topics.documents import Documents
from zoo import DTM, LDA, Corpus
from zoo.data import load


@pytest.fixture(scope="module")
def corpus():
    """480 short documents of two topics whose words drift over six slices, slices mixed; one document is empty."""
    data = load("drifting_words", num_data=480)
    counts = data.x.numpy().astype(int)
    counts[7] = 0
    return Corpus(counts, times=data.labels.numpy())


@pytest.fixture
def on_disk(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(visits, "FEWEST", 50)
    monkeypatch.setattr("inference.sparse_rows.FEW", 0)
    monkeypatch.setattr("inference.rehearsal.MANY_ROWS", 100)
    return corpus.save(tmp_path / "corpus")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("concentration", [0.5, None])
def test_walks_of_documents_on_disk(corpus, on_disk, monkeypatch, concentration, native):
    """The same passes in memory give the same walks, to the last bit; no more than one run of documents is held."""
    if not native:
        monkeypatch.setattr("inference.topics.dynamic.library", lambda: None)
    story, method = DTM(2, drift=0.4, concentration=concentration), EM(driver="batch", max_iter=8)
    monkeypatch.setattr(streamed, "SAMPLE", 100)
    monkeypatch.setattr(dynamic_streamed, "SOME", 100)
    first = fit(story, corpus, method, seed=0)
    taken, cut, take = [], Documents.cut, Documents.take
    monkeypatch.setattr(Documents, "cut", lambda self, a, b: taken.append(b - a) or cut(self, a, b))
    monkeypatch.setattr(Documents, "take", lambda self, d: taken.append(len(d)) or take(self, d))
    second = fit(story, on_disk, EM(max_iter=8), seed=0)
    assert max(taken) <= 100 and "theta.concentration" not in second.extra["topics"]
    for name, value in first.draws.items():
        assert torch.equal(second.draws[name], value), name
    assert first.history == second.history


@pytest.mark.parametrize("method", [EM(), SVI(draws=30)], ids=["em", "svi"])
def test_drifting_topics_on_disk_are_followed(corpus, on_disk, method):
    """As those of memory: words of every slice within 0.08 of the truth, and new documents foretold as well."""
    test = load("drifting_words", num_data=240)
    kept, streams = (fit(DTM(2, concentration=0.5), data, method, seed=0) for data in (corpus, on_disk))
    truth = load("drifting_words", num_data=480).truth["phi"]
    phi = streams.draws["beta"].softmax(-1).mean(0)
    assert min((phi - truth).abs().max(), (phi.flip(0) - truth).abs().max()) < 0.08
    new = {"w": test.x, "times": test.labels, "num_slices": 6}
    values = [perplexity(p, new).value for p in (kept, streams)]
    assert values[1] < 1.01 * values[0], values


def test_questions_about_documents_on_disk(corpus, on_disk, tmp_path, monkeypatch):
    """Shares, shares by time, densities and forecasts are those of the same documents in memory."""
    monkeypatch.setattr("inference.topics.answers.WRITTEN", 97)
    monkeypatch.setattr("inference.topics.documents.PART", 97)
    posterior = fit(DTM(2, drift=0.4, concentration=0.5), on_disk, EM(max_iter=6), seed=0)
    whole = shares(posterior)
    np.testing.assert_allclose(shares(posterior, corpus), whole, atol=1e-5)
    written = shares(posterior, path=tmp_path / "theta.npy")
    np.testing.assert_allclose(written.numpy(), whole.numpy(), atol=1e-4)
    steps, share = topic_share(posterior)
    _, again = topic_share(posterior, data=corpus)
    assert steps.tolist() == list(range(6))
    np.testing.assert_allclose(share, again, atol=1e-5)
    assert posterior.log_prob().shape == (480,) and bool(posterior.log_prob().isfinite().all())
    assert forecast_concentration(posterior).sum() == pytest.approx(1.0)


def test_times_that_do_not_fit_are_told(corpus, on_disk):
    """Before any pass over the documents."""
    with pytest.raises(ValueError, match="times"):
        fit(DTM(2), {**on_disk.as_arguments(["w", "words", "times", "num_words", "num_slices"]), "num_slices": 3}, EM())
    with pytest.raises(ValueError, match="the documents have no times"):
        fit(DTM(2), dataclasses.replace(on_disk, times=None), EM())


def test_runs_of_documents_word_by_word_are_those_in_blocks(monkeypatch):
    """Machine code and matrix products give the same counts, log-likelihood and terms for the concentrations."""
    random = np.random.default_rng(0)
    documents = Documents.of(random.poisson(0.5, (300, 40)))
    start = streamed.climb_in_memory(documents, torch.full((4,), 0.3), torch.full((40, 1), 0.1), max_iter=3).state
    ends = []
    for built in (streamed.library(), None):
        monkeypatch.setattr(streamed, "library", lambda built=built: built)
        run = streamed.StreamedCounts(documents, start, learn_alpha=True)
        S = torch.zeros(40, 4, dtype=torch.float64)
        ends.append((S, *run.visit(run.table(), documents, S, learn=True)))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=2e-5, atol=2e-5)


def test_documents_that_are_left_out_are_not_counted(monkeypatch):
    """While concentrations are learned: the counts of a pass are those of the others, document by document."""
    monkeypatch.setattr(visits, "FEWEST", 7)
    table = np.random.default_rng(0).poisson(0.5, (100, 20))
    aside = np.array([0, 6, 7, 41, 99])
    start = streamed.climb_in_memory(Documents.of(table), torch.full((3,), 0.3), torch.full((20, 1), 0.1), max_iter=2)
    runs = [streamed.StreamedCounts(Documents.of(x), start.state) for x in (table, np.delete(table, aside, 0))]
    runs[0].state = runs[1].state.copy()
    runs[0].leave_out(aside)
    values = [run.full_pass() for run in runs]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    torch.testing.assert_close(runs[0].state.N, runs[1].state.N, rtol=1e-5, atol=1e-5)
    assert float(runs[0].state.N.sum()) == pytest.approx(np.delete(table, aside, 0).sum(), rel=1e-5)


def test_concentrations_learned_on_disk_are_watched(tmp_path, monkeypatch):
    """Documents set aside are looked at while concentrations move, come back, and the passes stay within max_iter."""
    monkeypatch.setattr("inference.sparse_rows.FEW", 0)
    monkeypatch.setattr("inference.rehearsal.MANY_ROWS", 100)
    corpus = Corpus(load("bars", num_data=400).x.numpy().astype(int)).save(tmp_path / "bars")
    posterior = fit(LDA(4, None, None), corpus, EM(restarts=1, max_iter=17), seed=0)
    assert len(posterior.diagnostics["validation_perplexity"]) >= 1 and len(posterior.history) <= 17
    assert posterior.draws["alpha"].shape == (1, 4)


def test_weights_of_documents_read_again_are_those_of_all_at_once(tmp_path, monkeypatch):
    """The k-hat of q(phi) q(theta) on disk: with shares at their means, sums over runs are the sum over all documents."""
    monkeypatch.setattr(visits, "FEWEST", 7)
    corpus = Corpus(np.random.default_rng(0).poisson(0.5, (60, 12))).save(tmp_path / "corpus")
    documents = Documents.of(corpus)
    run = streamed.StreamedBayes(documents, torch.full((3,), 0.3), torch.full((3, 12), 0.1), seed=0)
    run.sweep()
    run.widen()
    monkeypatch.setattr(
        weights, "dirichlet_draws", lambda g, count, seed: (g / g.sum(1, keepdim=True)).expand(count, -1, -1)
    )
    monkeypatch.setattr("inference.diagnostics.pareto_khat", lambda w: w)
    phi = torch.distributions.Dirichlet(run.lam).sample((5,))
    found = weights.weighed(documents, phi, run.lam, run, 0)["khat"]
    gamma = weights.shares_given(weights.mean_log(run.lam).exp().T.contiguous(), run.alpha, documents)
    theta = gamma / gamma.sum(1, keepdim=True)
    x, dirichlet = torch.from_numpy(corpus.counts.toarray()), torch.distributions.Dirichlet
    for s in range(5):
        wanted = torch.xlogy(x, theta @ phi[s]).sum()
        wanted += (dirichlet(run.alpha).log_prob(theta) - dirichlet(gamma).log_prob(theta)).sum()
        wanted += (dirichlet(run.eta).log_prob(phi[s]) - dirichlet(run.lam).log_prob(phi[s])).sum()
        assert float(wanted) == pytest.approx(found[s], rel=1e-4)
