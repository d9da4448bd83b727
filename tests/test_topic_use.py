"""What is asked of topic models: perplexity against brute force, new documents, coherence, pictures, comparisons, faults."""

import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import gammaln

from inference import EM, SVI, Gibbs, compare, fit, inspect, load
from inference import topics as tm
from inference.topics.documents import Documents
from inference.topics.perplexity import annealed, exact, left_to_right
from zoo import LDA, Corpus, MultinomialMixture, load_corpus
from zoo import load as load_data
from zoo.catalog import get


@pytest.fixture(autouse=True)
def own_world():
    """Float64 and a fixed seed for each test, and nothing of it for the next."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)


# Perplexity


PHI = torch.from_numpy(np.random.default_rng(5).dirichlet(np.full(6, 0.7), 3))
ALPHA = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64)


def test_quadrature_equals_the_sum_over_assignments():
    """The wrong weight function: exact for two topics and up to ten words to ten digits."""
    corpus = Corpus.from_sequences([[0], [1, 1, 4, 5], [0, 2, 2, 3, 3, 3, 5, 5, 1, 1]], 6)
    phi, alpha = PHI[:2], ALPHA[:2]
    found = exact(phi, alpha, Documents.of(corpus))
    for value, ids in zip(found, corpus.tokens()):
        total = 0.0
        for z in itertools.product(range(2), repeat=len(ids)):
            n = np.bincount(z, minlength=2)
            prior = gammaln(n + alpha.numpy()).sum() - gammaln(alpha.numpy()).sum()
            prior += gammaln(float(alpha.sum())) - gammaln(len(ids) + float(alpha.sum()))
            total += math.exp(prior) * np.prod([float(phi[k, v]) for k, v in zip(z, ids)])
        assert float(value) == pytest.approx(math.log(total), abs=1e-10)


@pytest.mark.parametrize("which", ["left-to-right", "ais"])
def test_estimators_are_unbiased(which):
    """Weights that are right in logarithm only: the mean estimate is p(w) within four standard errors."""
    documents = Documents.of(Corpus.from_sequences([[0, 2, 2, 5, 1], [4, 4, 3]], 6))
    truth = exact(PHI, ALPHA, documents).exp()
    random = torch.Generator().manual_seed(0)
    if which == "ais":
        table = annealed(PHI, ALPHA, documents, 8000, 5, random).exp()
    else:
        table = left_to_right(PHI, ALPHA, documents, 8000, random).exp()
    error = table.std(0) / math.sqrt(len(table))
    assert ((table.mean(0) - truth).abs() < 4 * error).all() and (error < 0.06 * truth).all()


def test_bounds_bracket_brute_force_and_say_their_side():
    """The two directions of annealing mixed up: on / left-to-right err above the exact perplexity, back below."""
    documents = Corpus.from_sequences([[0, 2, 2, 5, 1, 1], [4, 4, 3, 0], [5, 5, 5, 2, 1]], 6)
    model = (PHI, ALPHA)
    truth = tm.perplexity(model, documents, "exact")
    assert truth.bound == "exact" and truth.value == pytest.approx(math.exp(-truth.rows.sum() / 15))
    upper = [tm.perplexity(model, documents, "ais", particles=4, temperatures=3, seed=s).value for s in range(40)]
    lower = [
        tm.perplexity(model, documents, "ais", particles=4, temperatures=3, reverse=True, seed=s).value
        for s in range(40)
    ]
    assert np.mean(lower) < truth.value < np.mean(upper)
    close = tm.perplexity(model, documents, "left-to-right", particles=3000)
    assert close.bound == "upper" and abs(close.value - truth.value) < 4 * close.error < 0.05 * truth.value
    tight = tm.perplexity(model, documents, "ais", particles=400, temperatures=200, reverse=True)
    assert tight.bound == "lower" and tight.value == pytest.approx(truth.value, rel=0.01)


def test_rows_of_a_posterior_are_the_integral_over_shares():
    """The prior left out of importance weights: within 4 errors of the exact value, and exact for two topics."""
    bars = load_data("bars")
    two = fit(LDA(2, 0.5, 0.1), bars.x, EM(restarts=1), seed=0)
    rows = two.score(bars.x[:5])
    assert "exact" in rows.estimator and rows.bound == "plug-in"
    phi = two.draws["phi"][0]
    torch.testing.assert_close(rows.rows, exact(phi, torch.full((2,), 0.5), Documents.of(bars.x[:5])))
    few = Corpus.from_sequences([[0, 1, 1, 5], [8, 2], []], 9)
    three = fit(LDA(3, 0.5, 0.1), bars.x, EM(restarts=1), seed=0)
    found = three.score(few)
    truth = exact(three.draws["phi"][0], torch.full((3,), 0.5), Documents.of(few))
    assert ((found.rows - truth).abs() <= 4 * found.monte_carlo_error + 1e-12).all()
    assert float(found.rows[2]) == pytest.approx(0.0, abs=0.2)


def test_one_topic_a_document_is_too_strict():
    """The lecture's limitation: on documents of several topics the mixture foretells new documents worse than LDA."""
    x = load_data("bars").x
    train, test = x[:200], x[200:]
    lda = fit(LDA(6, 0.5, 0.1), train, EM(), seed=0)
    mixture = fit(MultinomialMixture(6), train, EM(), seed=0)
    coefficient = torch.lgamma(test.sum(1) + 1) - torch.lgamma(test + 1).sum(1)
    ours, theirs = (
        math.exp(-float(v.sum() / test.sum())) for v in (lda.log_prob(test), mixture.log_prob(test) - coefficient)
    )
    assert ours < 0.97 * theirs


# Use


@pytest.fixture(scope="module")
def manual():
    corpus = load_corpus()
    return corpus, fit(LDA(5), corpus, EM(restarts=1), seed=0)


def test_new_documents_may_be_longer_and_empty_ones_have_the_prior(manual):
    """New documents with more words than any fitted one refused; a division by no words."""
    corpus, posterior = manual
    long = Corpus.from_sequences([list(range(400)) * 2, []], corpus.num_words)
    theta = posterior.local("theta", long, draws=4000)
    torch.testing.assert_close(theta[:, 1].mean(0), torch.full((5,), 0.2), atol=0.03, rtol=0)
    assert theta.shape == (4000, 2, 5) and tm.shares(posterior, long)[0].sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"2000 words.*topics are over"):
        posterior.local("theta", Corpus(np.ones((1, 2000), dtype=int)))


def test_answers_survive_a_file(manual, tmp_path):
    """Shares of the fitted documents lost between save and load."""
    _, posterior = manual
    again = load(posterior.save(tmp_path / "topics.fit"), LDA(5))
    torch.testing.assert_close(tm.shares(again), tm.shares(posterior))
    torch.testing.assert_close(again.draws["phi"], posterior.draws["phi"])


def test_methods_are_compared_on_documents_held_out():
    """A method that `compare` cannot ask; scores of one that are not those of the others' question."""
    found = compare(LDA(3, 0.5, 0.1), load_data("bars").x[:80], [EM(), SVI(), Gibbs(chains=2, warmup=50, draws=30)])
    assert list(found.table.index) == ["em", "svi", "gibbs"] and not found.refused
    assert found.table["held-out log p"].astype(float).std() < 2.0 and found.verdict


def test_a_fit_repeats_itself_and_leaves_nothing_behind():
    """Seeds that reach one engine only; a generator of the user's that moves."""
    x = load_data("bars").x[:60]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for method in (EM(restarts=2), SVI(starts=2), Gibbs(chains=1, warmup=5, draws=5)):
        a, b = (fit(LDA(3), x, method, seed=7) for _ in range(2))
        assert torch.equal(a.draws["phi"], b.draws["phi"])
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda: fit(LDA(2), load_data("bars").x, EM(estimate="mle")), ["mle", "rare words"]),
        (lambda: fit(LDA(2), load_data("bars").x, EM(kernels=False)), ["kernels=False", "expected counts"]),
        (lambda: fit(LDA(2, None), load_data("bars").x, Gibbs()), ["alpha", "learned"]),
        (lambda: Gibbs(chains=0), ["chains"]),
        (lambda: tm.perplexity((PHI, 0.1), np.eye(6, dtype=int), "bound"), ["estimator", "'completion'", "'bound'"]),
        (lambda: tm.perplexity((PHI, 0.1), np.full((1, 6), 9), "exact"), ["3^54", "left-to-right"]),
        (lambda: tm.perplexity((PHI, 0.1), np.ones((1, 7), dtype=int)), ["6 words"]),
        (lambda: tm.top_words(PHI, rank="best"), ["'probability', 'lift', 'frex'", "'best'"]),
        (lambda: tm.top_words(PHI, ["a"]), ["1 words", "6"]),
    ],
)
def test_what_is_wrong_is_named(make, texts):
    with pytest.raises(ValueError) as error:
        make()
    assert all(text in str(error.value) for text in texts), error.value


def test_coherence_diversity_and_ranks_by_hand():
    """NPMI without its normaliser; lift over the wrong axis."""
    x = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    phi = np.array([[0.5, 0.4, 0.05, 0.05], [0.0, 0.4, 0.3, 0.3]])
    found = tm.coherence(phi, x, num=2)
    p01, p12 = 2 / 4, 1 / 4
    assert found[0] == pytest.approx(math.log(p01 / (2 / 4 * 3 / 4)) / -math.log(p01))
    assert found[1] == pytest.approx(math.log(p12 / (3 / 4 * 2 / 4)) / -math.log(p12))
    assert tm.diversity(phi, 2) == 0.75
    words = ("a", "b", "c", "d")
    assert tm.top_words(phi, words, 2)["word"].tolist() == ["a", "b", "b", "c"]
    assert tm.top_words(phi, words, 1, "lift")["word"].tolist() == ["a", "c"]
    assert tm.top_words(phi, words, 1, "frex")["word"].tolist() == ["a", "c"]
    order, similarity = tm.match_topics(phi, phi[::-1])
    assert order.tolist() == [1, 0] and similarity == pytest.approx([1.0, 1.0], abs=1e-6)


def test_shares_through_time_weigh_documents_by_their_words(manual):
    corpus, posterior = manual
    times = np.arange(len(corpus)) % 3
    steps, share = tm.topic_share(posterior, times)
    theta = tm.shares(posterior).numpy()
    inside = times == 1
    wanted = (theta[inside] * corpus.lengths[inside, None]).sum(0) / corpus.lengths[inside].sum()
    assert steps.tolist() == [0, 1, 2] and share[1] == pytest.approx(wanted)


def test_pictures_are_drawn_without_touching_the_backend(manual, tmp_path):
    import matplotlib

    corpus, posterior = manual
    before = dict(matplotlib.rcParams)
    drifting = fit(*get("DTM").example(), SVI(draws=25), seed=0)
    figures = [
        tm.plot_top_words(posterior, corpus), tm.plot_topic_map(posterior, corpus),
        tm.plot_topic_share(posterior, np.arange(len(corpus)) % 4, corpus), tm.plot_streams(drifting),
    ]  # fmt: skip
    for i, made in enumerate(figures):
        made.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
    assert dict(matplotlib.rcParams) == before


def test_tables_of_topics_by_words_by_vocabulary_are_announced():
    """Gigabytes that a foreign story takes without a word; and nothing said where they are not built."""

    def naive(w, K=50, V=5000):
        with pyro.plate("topics", K):
            phi = pyro.sample("phi", dist.Dirichlet(torch.ones(V)))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(K)))
        with pyro.plate("words", len(w)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("w", dist.Categorical(phi[z]), obs=w)

    w = torch.randint(5000, (1000,))
    with pytest.warns(UserWarning, match=r"site 'w'.*50 x 1000 x 5000 numbers, 1\.9 GiB") as told:
        notes = inspect(naive, w).notes
    assert len(told) == 1 and any("theta @ phi" in note for note in notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspect(naive, w[:20])
        inspect(LDA(50), torch.ones(100, 5000))


@pytest.mark.parametrize(("wrong", "text"), [(-1.0, "-1"), (0.5, "0.5")])
def test_counts_that_are_none_are_refused_before_any_work(wrong, text):
    """A negative or broken count that a fit runs on with for minutes."""
    x = load_data("bars").x[:12].clone()
    x[3, 0] = wrong
    with pytest.raises(ValueError, match=rf"site 'w': 1 of 12 .*outside the support.*\[{text}") as error:
        fit(LDA(2), x)
    assert "index 3" in str(error.value)


def test_poor_corpora_are_answered():
    """No words at all, one document, more topics than words: priors, and nothing that is not finite."""
    for x, K in (
        (torch.zeros(5, 4), 3),
        (torch.tensor([[3.0, 0, 1]]), 2),
        (torch.tensor([[1.0, 0, 0], [0, 1, 0]]), 20),
    ):
        for method in (EM(restarts=1), SVI(starts=1), Gibbs(chains=1, warmup=5, draws=5)):
            posterior = fit(LDA(K), x, method, seed=0)
            assert posterior.draws["phi"].isfinite().all() and posterior.local("theta").isfinite().all()


def test_labels_of_the_map_do_not_lie_on_each_other():
    """Places that coincide are moved apart, others stay in their order."""
    from inference.topics.plots import apart

    place = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.98, 1.0], [0.5, 0.2]])
    found = apart(place)
    gap = np.abs(found[:, None] - found[None]) + np.eye(5)[..., None]
    assert ((gap[..., 0] >= 0.15 - 1e-5) | (gap[..., 1] >= 0.11 - 1e-5)).all()
    assert found[0, 0] < found[4, 0] < found[2, 0]
