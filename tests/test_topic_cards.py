"""Topic models as a card works on them (large blocks, ordered sums, counts that stay or are streamed), on the processor.

`pytest --device cuda` runs them on a real one.
"""

import itertools

import numpy as np
import pytest
import torch
from card_cases import a_card
from scipy.optimize import minimize

from inference import EM, SVI, fit
from inference import load as load_posterior
from inference.topics import cards, streamed, visits, ways
from inference.topics.cards import SortedSums
from inference.topics.documents import Documents, blocks, plan
from inference.topics.expected import ExpectedCounts, climb, settle
from inference.topics.perplexity import complete
from inference.topics.streamed import StreamedCounts
from inference.topics.variational import VariationalBayes
from inference.topics.words import CALM, WordByWord, library
from zoo import LDA, load_corpus


@pytest.fixture(scope="module")
def corpus():
    """Passages of Python's manual: some 500, as this Python has them."""
    return load_corpus()


@pytest.fixture(scope="module")
def documents(corpus):
    return Documents.of(corpus)


@pytest.fixture
def card(monkeypatch):
    """Where the processor is worked with as a card is."""
    monkeypatch.setattr(cards, "on_card", lambda device: True)


def prior(documents, K=6, alpha=0.1, eta=0.05):
    return torch.full((K,), alpha), torch.full((documents.num_words, 1), eta)


def joint(state, documents):
    """log p(words, shares, topics) a word at posterior means, by the definition, in double precision."""
    phi = state.phi.double()
    n, total = state.n.double(), 0.0
    theta = (n + state.alpha) / (n + state.alpha).sum(1, keepdim=True)
    rows = torch.from_numpy(np.repeat(np.arange(len(documents)), np.diff(documents.starts)))
    p = (theta[rows] * phi.T[torch.from_numpy(documents.words)]).sum(1)
    total += float((torch.from_numpy(documents.counts) * p.log()).sum())
    total += float(((state.alpha.double() - 1) * theta.log()).sum() + ((state.eta.double().T - 1) * phi.log()).sum())
    return total / documents.num_tokens


# -- sums and blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "keys"), [(0, 3), (5, 4), (1000, 7), (20_000, 3), (9000, 9000)])
def test_sums_by_word_are_those_of_a_table(rows, keys):
    """A chunk lost, or added to its neighbour: keys that never occur, and one that fills four levels of chunks."""
    random = torch.Generator().manual_seed(0)
    key = (torch.rand(rows, generator=random) ** 4 * keys).long()
    values = torch.randn(rows, 3, generator=random)
    start = torch.randn(keys, 3, generator=random, dtype=torch.float64)
    wanted, found = start.clone(), start.clone()
    wanted.index_add_(0, key, values.double())
    SortedSums(key, keys).add(found, values)
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-6)


def test_sums_do_not_drift():
    """Three million equal numbers: single precision all the way would be off by a thousandth."""
    table = torch.zeros(2, 1, dtype=torch.float64)
    SortedSums(torch.ones(3_000_000, dtype=torch.long), 2).add(table, torch.full((3_000_000, 1), 0.1))
    assert abs(float(table[1]) / 3e5 - 1) < 1e-6 and table[0] == 0


@pytest.mark.parametrize("cells", [1, 700, 10**9])
def test_blocks_of_a_card_hold_every_word_once(card, documents, cells):
    """A word lost at the seam of two blocks, or padding that counts."""
    found = blocks(documents, torch.float64, cells)
    table = torch.zeros(len(documents), documents.num_words, dtype=torch.float64)
    for block in found:
        for row, words, counts in zip(block.rows, block.words, block.counts, strict=True):
            table[row].index_add_(0, words, counts)
    np.testing.assert_array_equal(table.numpy(), load_corpus().counts.toarray())
    assert all(b.sums is not None and (len(b.rows) == 1 or b.words.numel() <= cells) for b in found)


@pytest.mark.parametrize("card_like", [False, True])
def test_a_block_holds_what_it_may_and_no_more(card_like):
    """Against a search one by one: short blocks waste launches, long ones memory."""
    widths = np.random.default_rng(0).integers(0, 90, 400)
    found = list(plan(widths, 1000, card_like))
    np.testing.assert_array_equal(np.concatenate(found), np.argsort(widths, kind="stable"))
    for rows, after in itertools.pairwise(found):
        size = len(rows) * widths[rows[-1]]
        assert size <= 1000 and (len(rows) + 1) * widths[after[0]] > (1000 if not card_like else 1000 * cards.LARGE)
        if card_like and size > 1000 * cards.LARGE:
            assert widths[rows[-1]] <= max(cards.SIMILAR * widths[rows[0]], widths[rows[0]] + cards.ALIKE)


def test_a_document_chooses_as_all_assignments_say(card):
    """One E-step over a document of five words against the sum over all 3^5 assignments, and its end against an optimiser."""
    K, V = 3, 4
    table = np.array([[0.0, 2.0, 1.0, 2.0]])
    phi = np.random.default_rng(1).dirichlet(np.ones(V), K)
    alpha, theta = np.array([0.5, 0.8, 0.3]), np.array([0.2, 0.5, 0.3])
    words = [1, 1, 2, 3, 3]
    total, wanted = 0.0, np.zeros((V, K))
    for z in itertools.product(range(K), repeat=len(words)):
        p = np.prod([theta[k] * phi[k, v] for k, v in zip(z, words, strict=True)])
        total += p
        for k, v in zip(z, words, strict=True):
            wanted[v, k] += p
    [block] = blocks(Documents.from_table(table), torch.float64)
    W = torch.from_numpy(phi.T)[block.flat].view(1, -1, K)
    prior, S = torch.from_numpy(alpha), torch.zeros(V, K, dtype=torch.float64)
    _, r = settle(W, block.counts, torch.from_numpy(10 * theta - alpha)[None], prior, 0)
    block.add(S, r)
    np.testing.assert_allclose(S.numpy(), wanted / total, atol=1e-12)

    def loss(free):
        share = np.exp(free) / np.exp(free).sum()
        return -(table[0] @ np.log(share @ phi) + alpha @ np.log(share))

    n, _ = settle(W, block.counts, torch.ones(1, K, dtype=torch.float64), prior, 5000)
    best = minimize(loss, np.zeros(K), tol=1e-14)
    end = ((n + prior) / (n + prior).sum()).numpy()[0]
    assert abs(loss(np.log(end)) - best.fun) < 1e-9


# -- the same answers as the processor's ------------------------------------------------------------------------------


@pytest.mark.parametrize(("learned", "close"), [(False, 1e-6), (True, 1e-6)])
def test_full_passes_of_a_card_are_those_of_the_processor(documents, monkeypatch, learned, close):
    """Same start, same number of passes: the log joint a word and the log-likelihood agree to 1e-6; a stochastic pass too."""
    alpha, eta = prior(documents)
    first = climb(documents.take(np.arange(100)), alpha, eta, max_iter=10, seed=1).state

    def ends():
        run = StreamedCounts(documents, first, learn_alpha=learned, learn_eta=learned, seed=2)
        run.stochastic_pass()
        history = [run.full_pass() / run.tokens for _ in range(6)]
        return run, history

    here, history = ends()
    monkeypatch.setattr(cards, "on_card", lambda device: True)
    there, again = ends()
    assert here.visits.card is False and there.visits.stays and there.visits._laid
    np.testing.assert_allclose(again, history, atol=close, rtol=0)
    for run in (here, there):
        run.state.n = torch.from_numpy(documents.lengths)[:, None] * run.state.alpha / run.state.alpha.sum()
    assert abs(joint(here.state, documents) - joint(there.state, documents)) < close
    torch.testing.assert_close(there.state.alpha, here.state.alpha, rtol=1e-5, atol=0)


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_where_machine_code_settles_a_card_stands_still(documents, card):
    """The fixed points are the same: from the end of the climb word by word a pass over large blocks changes nothing."""
    documents, (alpha, eta) = documents.take(np.arange(120)), prior(documents)
    run = WordByWord(documents, alpha, eta, seed=0)
    run.begin()
    for _ in range(30):
        run.sweep()
    run.calm()
    assert run.relax == CALM
    for _ in range(800):
        value = run.sweep()
    same = ExpectedCounts(documents, alpha, eta)
    same.state.N, same.state.Nk = run.state.N.double(), run.state.Nk.double()
    same.state.n, starts = run.state.n.clone(), documents.starts
    for block in same.blocks:
        kept = torch.zeros(*block.words.shape, len(alpha))
        for i, d in enumerate(block.rows.tolist()):
            kept[i, : starts[d + 1] - starts[d]] = run.r[starts[d] : starts[d + 1], : len(alpha)]
        same.state.kept.append(kept)
    before = joint(run.state, documents)
    again = [same.sweep() for _ in range(3)]
    assert abs(again[-1] - value) / documents.num_tokens < 1e-5
    assert abs(joint(same.state, documents) - before) < 1e-5
    assert (same.state.N - run.state.N).abs().max() < 0.02


def test_large_blocks_end_where_small_ones_do(documents, monkeypatch):
    """A climb of a card from its own start explains held-out words as well as the processor's."""
    train, held = (documents.take(np.arange(first, len(documents), 2)) for first in (0, 1))
    alpha, eta = prior(documents)

    def score():
        end = climb(train, alpha, eta, restarts=3, max_iter=80, seed=0)
        halves = held.halves(np.random.default_rng(0))
        value = complete(end.state.phi.double(), alpha.double(), *halves)
        return float(np.exp(-float(value.sum()) / halves[1].num_tokens))

    here = score()
    monkeypatch.setattr(cards, "on_card", lambda device: True)
    assert score() < 1.03 * here


def test_the_bound_of_a_card_is_the_processors(documents, monkeypatch):
    """Variational Bayes: same start, same full sweeps, the same bound to 1e-6; documents kept or let go."""
    part = documents.take(np.arange(80))
    alpha, eta = torch.full((4,), 0.1), torch.full((4, documents.num_words), 0.05)

    def bounds(kind):
        run = kind(part, alpha, eta, seed=3)
        for _ in range(8):
            run.sweep()
        run.widen()
        return run.bound() / part.num_tokens

    here = bounds(VariationalBayes)
    monkeypatch.setattr(cards, "on_card", lambda device: True)
    assert abs(bounds(VariationalBayes) - here) < 1e-6
    assert abs(bounds(streamed.StreamedBayes) - here) < 1e-4  # documents are inferred anew


@pytest.mark.parametrize("learned", [False, True])
def test_streamed_is_resident(documents, card, monkeypatch, learned):
    """Counts that do not fit travel run by run; a run lost, or one visited twice, would show."""
    alpha, eta = prior(documents)
    first = climb(documents.take(np.arange(100)), alpha, eta, max_iter=5, seed=1).state

    def ends():
        run = StreamedCounts(documents, first, learn_alpha=learned, learn_eta=learned, seed=2)
        run.stochastic_pass()
        return run, [run.full_pass() / run.tokens for _ in range(4)]

    kept, history = ends()
    monkeypatch.setattr(cards, "keeps", lambda *a: False)
    monkeypatch.setattr(visits, "WIDE", 64)
    let_go, again = ends()
    assert kept.visits.stays and not let_go.visits.stays and let_go.visits._held is None
    np.testing.assert_allclose(again, history, atol=1e-7, rtol=0)
    torch.testing.assert_close(let_go.state.N, kept.state.N, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stays", [True, False])
def test_documents_left_out_count_nothing_on_a_card(documents, card, monkeypatch, stays):
    """Passes are those of the other documents alone, whether counts lie there or are streamed; later all come back."""
    monkeypatch.setattr(cards, "keeps", lambda *a: stays)
    monkeypatch.setattr(visits, "WIDE", 64)
    aside, (alpha, eta) = np.array([0, 63, 64, 200, len(documents) - 1]), prior(documents)
    first = climb(documents.take(np.arange(100)), alpha, eta, max_iter=5, seed=1).state
    rest = documents.take(np.delete(np.arange(len(documents)), aside))
    runs = [StreamedCounts(d, first, learn_alpha=True) for d in (documents, rest)]
    runs[0].state = runs[1].state.copy()
    runs[0].leave_out(aside)
    for _ in range(4):
        values = [run.full_pass() for run in runs]
    assert values[0] == pytest.approx(values[1], rel=1e-7)
    torch.testing.assert_close(runs[0].state.N, runs[1].state.N, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(runs[0].state.alpha, runs[1].state.alpha, rtol=1e-5, atol=0)
    runs[0].leave_out(np.zeros(0, np.int64))
    runs[0].full_pass()
    assert float(runs[0].state.N.sum()) == pytest.approx(documents.num_tokens, rel=1e-6)


# -- whole fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [EM(restarts=2, max_iter=30), EM(driver="batch", max_iter=10), SVI(steps=10, starts=1)]
)
def test_a_fit_repeats_says_what_ran_and_is_saved(corpus, card, method, tmp_path):
    """Same seed, same bits; the plan names the card's way; the file answers as the posterior does."""
    part = corpus[:120]
    first, again = (fit(LDA(4), part, method, seed=5) for _ in range(2))
    assert torch.equal(first.draws["phi"], again.draws["phi"]) and first.history == again.history
    assert "ran: large blocks of documents at once on " in first.why()
    assert ("whose counts stay there" in first.why()) == (getattr(method, "driver", "") == "batch")
    assert all(v.device.type == "cpu" for v in first.draws.values())
    back = load_posterior(first.save(tmp_path / "topics.pt"), LDA(4))
    assert torch.equal(back.local("theta"), first.local("theta"))
    assert first.local("theta").shape[1] == 120


def test_what_does_not_fit_a_card_is_let_go(corpus, card, monkeypatch):
    """`auto` streams and keeps no shares; asked to keep every word's topic it says what to do, before any work."""
    monkeypatch.setattr(cards, "keeps", lambda *a: False)
    posterior = fit(LDA(3), corpus[:100], EM(restarts=1, max_iter=4), seed=0)
    assert "log_likelihood_a_word" in posterior.diagnostics and posterior.local("theta").shape[1] == 100
    with pytest.raises(ValueError, match="driver='stepwise'"):
        fit(LDA(3), corpus[:100], EM(driver="incremental"), seed=0)
    bound = fit(LDA(3), corpus[:100], SVI(steps=3, starts=1), seed=0)
    assert "theta.concentration" not in bound.extra["topics"]


@pytest.mark.parametrize("method", [EM(), EM(driver="batch"), SVI()], ids=["em", "batch", "svi"])
def test_a_pass_can_be_timed(corpus, method, monkeypatch):
    """On the first documents only, and without a trace in the random streams."""
    from inference.devices import step_of
    from inference.problem import prepare

    monkeypatch.setattr(ways, "TRIED", 2000)
    problem, before = prepare(LDA(3), corpus, seed=1), torch.get_rng_state()
    step = step_of(problem, method)
    step()
    assert np.isfinite(step()) and torch.equal(torch.get_rng_state(), before)


def test_too_little_memory_is_told_for_sparse_counts(corpus):
    """A sparse matrix has no len(): the advice must not end in another error."""
    from inference.guard import smaller

    assert f"{len(corpus)} rows" in smaller(EM(), corpus.counts.tocsr())


# -- on a card that is pretended --------------------------------------------------------------------------------------


def on_and_off(story, data, method, tmp_path):
    """The same fit on a card, pretended or not, and on the processor; the first also saved there and read here."""
    with a_card():
        there = fit(story, data, method, seed=3, device="cuda")
        path = there.save(tmp_path / "topics.pt")
    here, back = fit(story, data, method, seed=3, device="cpu"), load_posterior(path, story)
    kept = [*there.draws.values(), *(v for v in there.extra["topics"].values() if isinstance(v, torch.Tensor))]
    assert all(v.device.type == "cpu" for v in kept)
    for name in there.draws:
        assert torch.equal(back.draws[name], there.draws[name])
    assert torch.equal(back.local("theta"), there.local("theta"))
    return there, here


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("driver", ["batch", "stepwise"])
def test_passes_on_a_card_end_where_those_of_the_processor_do(corpus, tmp_path, driver, learned):
    """Operands on two devices, a look by NumPy, or another start would show; log likelihoods agree to 1e-6 a word."""
    story = LDA(3, None, None) if learned else LDA(3)
    there, here = on_and_off(story, corpus[:90], EM(driver=driver, max_iter=5), tmp_path)
    np.testing.assert_allclose(
        np.array(there.history) / corpus[:90].num_tokens,
        np.array(here.history) / corpus[:90].num_tokens,
        atol=1e-6,
        rtol=0,
    )
    torch.testing.assert_close(there.draws["phi"], here.draws["phi"], rtol=1e-3, atol=1e-6)
    assert "device: cuda" in there.why() and "whose counts stay there" in there.why()


def test_a_climb_on_a_card_is_as_good(corpus, tmp_path):
    """Other steps to the same kind of end: the log-likelihood a word is not lower by more than two hundredths."""
    there, here = on_and_off(LDA(3), corpus[:90], EM(restarts=2, max_iter=25), tmp_path)
    assert there.diagnostics["leave_one_out"] > here.diagnostics["leave_one_out"] - 0.02
    assert "theta.concentration" in there.extra["topics"]


def test_the_bound_on_a_card_is_that_of_the_processor(corpus, tmp_path):
    """Natural gradients from the same start: the same sweeps give the same bounds."""
    there, here = on_and_off(LDA(3), corpus[:90], SVI(steps=6, starts=1, draws=30), tmp_path)
    np.testing.assert_allclose(there.history, here.history, rtol=1e-6)
    assert there.diagnostics["elbo"] == pytest.approx(here.diagnostics["elbo"], rel=1e-6)


def test_counts_that_are_streamed_to_a_card(corpus, tmp_path, monkeypatch):
    """Where the card has no room they travel run by run, and the passes are the same."""
    monkeypatch.setattr(cards, "keeps", lambda *a: False)
    there, here = on_and_off(LDA(3), corpus.counts.tocsr()[:90], EM(driver="batch", max_iter=4), tmp_path)
    np.testing.assert_allclose(there.history, here.history, rtol=1e-6)
    assert "read ahead and copied" in there.why()


def test_full_passes_on_a_card_wait_for_it_once(documents):
    """A number looked at in every block would keep the card idle; one look a pass, at the log-likelihood, is enough."""
    pretended = pytest.importorskip("pretended_card").pretended
    alpha, eta = prior(documents, K=3)
    first = climb(documents.take(np.arange(60)), alpha, eta, max_iter=3, seed=1).state
    with pretended() as card:
        run = StreamedCounts(documents, first.to(torch.device("cuda")))
        run.full_pass()
        before = card.waits
        run.full_pass()
        assert card.waits - before == 1


@pytest.mark.parametrize("cut", [1, 6, 12])
@pytest.mark.parametrize("learned", [False, True])
def test_a_climb_that_died_goes_on_from_its_file(corpus, card, monkeypatch, tmp_path, learned, cut):
    """Before and after documents set aside come back: the answer of the run that nobody disturbed, to the last bit."""
    monkeypatch.setattr("inference.topics.pass_file.EVERY", 0.0)
    story, part, path = (LDA(3, None, None) if learned else LDA(3)), corpus[:120], tmp_path / "climb"
    whole = fit(story, part, EM(driver="stepwise", max_iter=14, tol=0.0), seed=4)
    passes, real = [], StreamedCounts.full_pass

    def dies(run):
        passes.append(1)
        if len(passes) > cut:
            raise KeyboardInterrupt
        return real(run)

    method = EM(driver="stepwise", max_iter=14, tol=0.0, checkpoint=path)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(StreamedCounts, "full_pass", dies)
        fit(story, part, method, seed=4)
    assert path.exists()
    again = fit(story, part, method, seed=4)
    assert again.history == whole.history and not path.exists()
    for name, value in whole.draws.items():
        assert torch.equal(again.draws[name], value), name
