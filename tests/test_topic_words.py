"""Topic models word by word in machine code, held against the same equations in tensors, and against sums by hand."""

import numpy as np
import pytest
import torch

from inference.topics import expected
from inference.topics.documents import Documents
from inference.topics.expected import ExpectedCounts, climb, concentration_terms
from inference.topics.expected import settle as settled
from inference.topics.words import CALM, Places, WordByWord, library, padded, settle

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

K, V, D = 5, 40, 60


@pytest.fixture
def documents():
    """Documents of 0 to 60 words from five topics."""
    rng = np.random.default_rng(0)
    phi = rng.dirichlet(np.full(V, 0.1), K)
    lengths = rng.integers(0, 60, D)
    table = np.stack([rng.multinomial(n, t @ phi) for n, t in zip(lengths, rng.dirichlet(np.full(K, 0.3), D))])
    return Documents.from_table(table.astype(float))


def run_of(documents, wide=False, seed=0, **kwargs):
    eta = torch.full((V, K if wide else 1), 0.2)
    run = WordByWord(documents, torch.linspace(0.1, 0.5, K), eta, seed=seed, **kwargs)
    run.begin()
    return run


@pytest.mark.parametrize("wide", [False, True])
def test_every_count_is_the_sum_of_its_places(documents, wide):
    """A contribution taken out of one table and not of the other, or lost in the padding."""
    run = run_of(documents, wide)
    for _ in range(12):
        run.sweep()
        words = torch.zeros_like(run.N).index_add_(0, run.places.words.long(), run.r)
        torch.testing.assert_close(words, run.N, atol=1e-3, rtol=0)
        places = torch.repeat_interleave(torch.arange(D), run.places.starts.diff())
        torch.testing.assert_close(torch.zeros_like(run.n).index_add_(0, places, run.r), run.n, atol=1e-3, rtol=0)
        torch.testing.assert_close(run.r.sum(1), run.places.counts, atol=1e-4, rtol=0)
    assert run.N[:, K:].abs().max() == 0 and run.n[:, K:].abs().max() == 0


@pytest.mark.parametrize("wide", [False, True])
def test_one_place_chooses_by_the_equation(wide):
    """One pass over two documents of one distinct word each, by hand in double precision, with what was chosen before."""
    documents = Documents(np.array([0, 1, 2]), np.array([3, 3]), np.array([2.0, 1.0]), V)
    run = run_of(documents, wide)
    run.relax = 0.0
    run.r[:, :K] = torch.tensor([[0.8, 0.6, 0.2, 0.3, 0.1], [0.1, 0.2, 0.3, 0.2, 0.2]])
    run.N.zero_()[3] = run.r.sum(0)
    run.n.copy_(run.r)
    run.state.Nk = run.state.N.sum(0)
    r, alpha, eta = run.r[:, :K].double().numpy(), np.linspace(0.1, 0.5, K), 0.2
    N, Nk, c = r.sum(0), r.sum(0), np.array([2.0, 1.0])
    order = torch.randperm(2, generator=torch.Generator().set_state(run.random.get_state())).tolist()
    total, wanted = 0.0, r.copy()
    for d in order:
        own = wanted[d] / c[d]
        p = (N - own + eta) * (wanted[d] - own + alpha) / (Nk + V * eta)
        total += c[d] * np.log(p.sum() / (c[d] - 1 + alpha.sum()))
        fresh = c[d] * p / p.sum()
        N, Nk, wanted[d] = N + fresh - wanted[d], Nk + fresh - wanted[d], fresh
    value = run.sweep()
    assert np.abs(run.r[:, :K].numpy() - wanted).max() < 1e-5
    assert abs(value - total) < 1e-4


def test_where_it_settles_the_tensors_stand_still(documents):
    """Going beyond the step moves no fixed point: blocks of documents at once find nothing to change there."""
    run = run_of(documents)
    for _ in range(30):
        run.sweep()
    assert run.calm() and not run.calm() and run.relax == CALM
    for _ in range(600):
        run.sweep()
    same = ExpectedCounts(documents, run.state.alpha, run.state.eta)
    same.state.N, same.state.Nk = run.state.N.clone(), run.state.Nk.clone()
    same.state.n = run.state.n.clone()
    starts = documents.starts
    for block in same.blocks:
        kept = torch.zeros(*block.words.shape, K)
        for i, d in enumerate(block.rows.tolist()):
            kept[i, : starts[d + 1] - starts[d]] = run.r[starts[d] : starts[d + 1], :K]
        same.state.kept.append(kept)
    same.sweep()
    assert (same.state.N - run.state.N).abs().max() < 0.02
    assert (same.state.n - run.state.n).abs().max() < 0.02


def test_shares_at_given_topics_are_those_of_the_tensors(documents):
    """A wrong table, a round too many, or a likelihood at other shares; documents of two slices have tables of their own."""
    generator = torch.Generator().manual_seed(1)
    phi = torch.rand(2, V, K, generator=generator)
    phi /= phi.sum(1, keepdim=True)
    alpha, which = torch.linspace(0.1, 0.5, K), torch.arange(D) % 2
    n = padded(torch.full((D, K), 2.0))
    S, r, none = torch.zeros(2, V, 8), torch.zeros(len(documents.words), 8), torch.zeros(D, 8)
    built = library()
    value = settle(built, Places(documents), padded(phi), n, padded(alpha), 3, S, r, none, which)
    total, gain = 0.0, torch.zeros(K)
    some = 1.0 - none[:, :K]
    for d in range(D):
        part = slice(int(documents.starts[d]), int(documents.starts[d + 1]))
        if part.start == part.stop:
            continue
        words = torch.from_numpy(documents.words[part])
        counts = torch.from_numpy(documents.counts[part]).float()[None]
        W = phi[which[d], words][None]
        wanted_n, wanted_r = settled(W, counts, torch.full((1, K), 2.0), alpha, 3)
        torch.testing.assert_close(n[d : d + 1, :K], wanted_r.sum(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(r[part, :K][None], wanted_r, rtol=1e-4, atol=1e-5)
        theta = (wanted_n + alpha) / (wanted_n + alpha).sum()
        total += float((counts * (W @ theta[0]).log()).sum())
        g, _ = concentration_terms(wanted_r, counts, alpha)
        if_any = n[d, :K] / some[d].clamp_min(1e-9)
        gain = some[d] * ((alpha + if_any).digamma() - alpha.digamma())
        torch.testing.assert_close(gain, g, rtol=1e-4, atol=1e-4)
    assert abs(value / total - 1) < 1e-5
    torch.testing.assert_close(S.sum((0, 1))[:K], r.sum(0)[:K], rtol=1e-4, atol=1e-3)


def test_counts_need_not_be_whole(documents):
    """Weighted words: half of every count under half of the words' total gives probabilities, not NaN."""
    half = Documents(documents.starts, documents.words, documents.counts * 0.37, V)
    run = run_of(half, learn_alpha=True)
    for _ in range(12):
        assert np.isfinite(run.sweep())
    assert abs(float(run.N.sum()) / half.num_tokens - 1) < 1e-4 and run.state.alpha.isfinite().all()


def test_same_seed_same_bits_and_without_a_compiler_the_tensors_serve(documents, monkeypatch):
    """Order and start come from the seed; both ways explain words alike."""
    alpha, eta = torch.full((K,), 0.3), torch.full((V, 1), 0.2)

    def ends(seed):
        return climb(documents, alpha, eta, restarts=4, max_iter=150, seed=seed)

    first, again = ends(3), ends(3)
    assert torch.equal(first.state.N, again.state.N) and first.history == again.history
    assert not torch.equal(first.state.N, ends(4).state.N)
    monkeypatch.setattr("inference.topics.words.library", lambda: None)
    slow = ends(3)
    assert isinstance(first.state, expected.Counts)
    assert abs(first.history[-1] - slow.history[-1]) < 0.02 * documents.num_tokens
