"""Engines of topic models against sums over all assignments, scikit-learn, Pyro's ELBO and dense linear algebra."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.optimize import minimize
from scipy.special import gammaln
from sklearn.decomposition import LatentDirichletAllocation

from inference import EM, SVI, Amortised, Gibbs, fit, inspect
from inference import topics as tm
from inference.topics.documents import Documents, blocks
from inference.topics.expected import concentration_terms
from inference.topics.variational import VariationalBayes
from inference.topics.walks import Chains, Walks
from inference.topics.walks import library as walk_library
from zoo import DTM, LDA, Corpus, TokenLDA, load_corpus
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


def tiny(D=3, V=4, N=3, seed=1):
    rng = np.random.default_rng(seed)
    return Corpus.from_sequences([rng.integers(V, size=n) for n in rng.integers(2, N + 1, D)], V)


def assignments(corpus, K, alpha, eta):
    """Every assignment of topics to all words, and its log joint with the words, topics and shares integrated out."""
    tokens = corpus.tokens()
    words, docs = np.concatenate(tokens), np.repeat(np.arange(len(tokens)), [len(t) for t in tokens])
    V, D = corpus.num_words, len(tokens)
    zs = np.array(list(itertools.product(range(K), repeat=len(words))))
    logs = []
    for z in zs:
        n, N = np.zeros((D, K)), np.zeros((K, V))
        np.add.at(n, (docs, z), 1)
        np.add.at(N, (z, words), 1)
        value = (
            (gammaln(n + alpha) - gammaln(alpha)).sum() + D * gammaln(K * alpha) - gammaln(n.sum(1) + K * alpha).sum()
        )
        value += (gammaln(N + eta) - gammaln(eta)).sum() + K * gammaln(V * eta) - gammaln(N.sum(1) + V * eta).sum()
        logs.append(value)
    return zs, np.array(logs), words, docs


# Recognition


def counted(x, K=3):
    """A user's own words: another order, other names, torch's Multinomial with its coefficient, uneven pseudo-counts."""
    with pyro.plate("themes", K):
        lexicon = pyro.sample("lexicon", dist.Dirichlet(torch.linspace(0.2, 0.6, x.shape[1])))
    with pyro.plate("texts", len(x)):
        mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([0.3, 0.4, 0.5])))
        pyro.sample("seen", dist.Multinomial(int(x.sum(-1).max()), probs=mix @ lexicon, validate_args=False), obs=x)


def flattened(x, K=3):
    """Nearly: shares are sharpened before they mix."""
    with pyro.plate("topics", K):
        phi = pyro.sample("phi", dist.Dirichlet(torch.ones(x.shape[1])))
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(K)))
        sharp = theta.square() / theta.square().sum(-1, keepdim=True)
        pyro.sample("x", dist.Multinomial(int(x.sum(-1).max()), probs=sharp @ phi, validate_args=False), obs=x)


def rates(x, K=3):
    """Nearly: Poisson counts, whose total tells something."""
    with pyro.plate("topics", K):
        phi = pyro.sample("phi", dist.Dirichlet(torch.ones(x.shape[1])))
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(K)))
        pyro.sample("x", dist.Poisson(10 * theta @ phi + 0.1).to_event(1), obs=x)


def test_users_own_stories_are_recognised_and_near_misses_are_not():
    """A story told in other names left to slow methods; another density answered as though it were LDA."""
    x = load_data("bars").x[:50]
    assert inspect(counted, x).admixture == "static"
    posterior = fit(counted, x, EM(restarts=2), seed=0)
    assert posterior.draws["lexicon"].shape == (1, 3, 9) and posterior.local("mix").shape[1:] == (50, 3)
    for story in (flattened, rates):
        assert inspect(story, x).admixture == ""
        assert not EM().check(inspect(story, x)).applies and not Gibbs().check(inspect(story, x)).applies


@pytest.mark.parametrize("name", ["LDA", "TokenLDA", "DTM"])
def test_every_topic_story_is_recognised_and_its_plan_told(name):
    story, data = get(name).example()
    assert inspect(story, data).admixture == ("dynamic" if name == "DTM" else "static")
    assert "Newton" in EM().plan(story, data) if name == "DTM" else "expected counts" in EM().plan(story, data)


def test_words_counted_or_told_one_by_one_give_the_same_answer():
    """Padding counted as a word; repeated words lost between the two forms."""
    corpus = load_corpus()[:60]
    em = EM(restarts=1, max_iter=20)
    a, b = (fit(kind(4), corpus, em, seed=3) for kind in (LDA, TokenLDA))
    torch.testing.assert_close(a.draws["phi"], b.draws["phi"], rtol=1e-6, atol=1e-9)
    c = fit(LDA(4), corpus.counts.toarray(), em, seed=3)
    torch.testing.assert_close(a.draws["phi"], c.draws["phi"], rtol=1e-6, atol=1e-9)


# Expected counts


@pytest.mark.parametrize("method", [EM(), SVI(), Gibbs(chains=1, warmup=200, draws=50)], ids=["em", "svi", "gibbs"])
def test_every_engine_finds_the_bars(method):
    """Topics merged or doubled by a poor start: the least similar topic is within 0.2 of its bar."""
    bars = load_data("bars")
    posterior = fit(LDA(6, 0.5, 0.1), bars.x, method, seed=0)
    order, similarity = tm.match_topics(bars.truth["phi"], posterior)
    assert sorted(order) == list(range(6)) and similarity.min() > 0.8


def test_concentrations_are_learned_from_counts_that_may_be_zero():
    """Expected counts taken for real ones, which inflates alpha: documents of one topic each give a small one."""
    rng = np.random.default_rng(0)
    phi = np.kron(np.eye(4), np.full(5, 0.2))
    one = Corpus(np.stack([rng.multinomial(60, phi[k]) for k in rng.integers(4, size=400)]))
    mixed = Corpus(np.stack([rng.multinomial(60, t @ phi) for t in rng.dirichlet([2.0] * 4, 400)]))
    found = [float(fit(LDA(4, None, 0.1), c, EM(restarts=3), seed=0).draws["alpha"].sum()) for c in (one, mixed)]
    assert found[0] < 0.4 and 3 < found[1] < 12


def test_fixed_point_of_alpha_is_the_maximum_for_certain_counts():
    """A digamma forgotten: with assignments that are certain, the fixed point maximises the Polya likelihood."""
    rng = np.random.default_rng(0)
    n = np.stack([rng.multinomial(30, t) for t in rng.dirichlet([0.8, 1.5, 0.5], 200)]).astype(float)
    p = torch.eye(3).expand(200, 3, 3)
    alpha = torch.ones(3)
    for _ in range(300):
        gain, weight = concentration_terms(p * torch.from_numpy(n).unsqueeze(2), torch.from_numpy(n), alpha)
        alpha = alpha * gain / weight

    def loss(a):
        a = np.exp(a)
        return -(gammaln(n + a) - gammaln(a)).sum() - len(n) * gammaln(a.sum()) + gammaln(n.sum(1) + a.sum()).sum()

    assert loss(alpha.log().numpy()) - minimize(loss, np.zeros(3)).fun < 1e-3


def test_blocks_hold_every_word_once():
    """A word lost at the seam of two blocks."""
    documents = Documents.of(load_corpus())
    table = torch.zeros(len(documents), documents.num_words)
    for b in blocks(documents, torch.float64, cells=500):
        for row, words, counts in zip(b.rows, b.words, b.counts):
            table[row].index_add_(0, words, counts)
    np.testing.assert_array_equal(table.numpy(), load_corpus().counts.toarray())


# Variational Bayes


def test_the_bound_is_scikit_learns():
    """A Dirichlet term left out: equal at the same lambda and gamma to ten digits, and not worse after a fit."""
    x = load_corpus().counts.toarray()[:80].astype(float)
    peer = LatentDirichletAllocation(
        5, doc_topic_prior=0.2, topic_word_prior=0.1, max_iter=30, evaluate_every=-1, mean_change_tol=1e-6,
        max_doc_update_iter=1000, random_state=0,
    ).fit(x)  # fmt: skip
    gamma = peer._unnormalized_transform(x)
    theirs = peer._approx_bound(x, gamma, sub_sampling=False)
    run = VariationalBayes(
        Documents.of(x),
        torch.full((5,), 0.2),
        torch.full((5, x.shape[1]), 0.1),
        torch.from_numpy(peer.components_),
        still=1e-9,
    )
    run.gamma = torch.from_numpy(gamma)  # a document may have several optima
    assert run.bound() == pytest.approx(theirs, rel=1e-8)


def test_the_bound_never_falls_and_stays_below_the_evidence():
    """A full natural-gradient step that is no coordinate ascent; a bound above the brute-force log evidence."""
    corpus, K, alpha, eta = tiny(), 2, 0.5, 0.4
    _, logs, *_ = assignments(corpus, K, alpha, eta)
    evidence = np.logaddexp.reduce(logs)
    run = VariationalBayes(
        Documents.of(corpus), torch.full((K,), alpha), torch.full((K, corpus.num_words), eta), still=1e-10, fresh=False
    )
    history = [run.sweep() for _ in range(60)]
    assert np.diff(history).min() > -1e-9 and evidence - 3 < history[-1] < evidence


def test_the_bound_is_pyros_elbo_of_the_same_guide():
    """Another guide's bound: 4,000 draws of Pyro's log p - log q average to it within four standard errors."""
    corpus, K = tiny(), 2
    story, V = TokenLDA(K, 0.5, 0.4), corpus.num_words
    run = VariationalBayes(
        Documents.of(corpus), torch.full((K,), 0.5), torch.full((K, V), 0.4), still=1e-10, fresh=False
    )
    for _ in range(20):
        run.sweep()
    bound, lam, gamma = run.bound(), run.lam, run.gamma
    w = torch.from_numpy(corpus.padded_tokens())
    elog = lambda c: c.digamma() - c.sum(-1, keepdim=True).digamma()  # noqa: E731
    r = (elog(gamma)[:, None] + elog(lam).T[w.clamp_min(0)]).softmax(-1)
    r = torch.where((w >= 0)[..., None], r, elog(gamma).softmax(-1)[:, None])

    def guide(w, num_words):
        with pyro.plate("topics", K):
            pyro.sample("phi", dist.Dirichlet(lam))
        with pyro.plate("documents", len(w), dim=-2):
            pyro.sample("theta", dist.Dirichlet(gamma[:, None]))
            with pyro.plate("words", w.shape[1], dim=-1), poutine.mask(mask=w >= 0):
                pyro.sample("z", dist.Categorical(r))

    values = []
    for _ in range(4000):
        q = poutine.trace(guide).get_trace(w, V)
        p = poutine.trace(poutine.replay(story.model, trace=q)).get_trace(w, V)
        padding = p.nodes["z"]["fn"].log_prob(p.nodes["z"]["value"])[w < 0].sum()
        values.append(float(p.log_prob_sum() - padding - q.log_prob_sum()))
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - bound) < 4 * error


# Gibbs


def test_gibbs_pairs_words_as_often_as_the_exact_posterior():
    """A count that is not taken out before a topic is drawn: P(z_i = z_j) within 0.03 of the sum over all assignments."""
    corpus, K, alpha, eta = tiny(), 2, 0.5, 0.4
    zs, logs, words, docs = assignments(corpus, K, alpha, eta)
    weight = np.exp(logs - np.logaddexp.reduce(logs))
    wanted = np.einsum("s,sij->ij", weight, zs[:, :, None] == zs[:, None, :])
    posterior = fit(LDA(K, alpha, eta), corpus, Gibbs(chains=4, warmup=200, draws=1500), seed=0)
    phi, theta = posterior.draws["phi"].numpy(), posterior.draws["theta"].numpy()
    p = theta[:, docs] * phi.transpose(0, 2, 1)[:, words]
    p /= p.sum(-1, keepdims=True)
    found = np.einsum("sik,sjk->ij", p, p) / len(p)
    off = ~np.eye(len(words), dtype=bool)
    assert np.abs(found - wanted)[off].max() < 0.03


# The dynamic model


@pytest.mark.parametrize("T", [1, 2, 7])
def test_chains_are_dense_linear_algebra(T):
    """An index of time off by one in the solution, the variances or the draws."""
    diagonal, off, b = 3 + torch.rand(T, 2), torch.tensor(-0.9), torch.randn(T, 2)
    chains = Chains.of(diagonal, off)
    x, (variance, between) = chains.solve(b), chains.spreads()
    for i in range(2):
        A = torch.diag(diagonal[:, i]) + off * (torch.diag(torch.ones(T - 1), 1) + torch.diag(torch.ones(T - 1), -1))
        inverse = torch.linalg.inv(A)
        torch.testing.assert_close(x[:, i], inverse @ b[:, i])
        torch.testing.assert_close(variance[:, i], inverse.diagonal())
        torch.testing.assert_close(between[:, i], inverse.diagonal(1))
    draws = torch.stack([chains.sample()[:, 0] for _ in range(4000)])
    torch.testing.assert_close(draws.var(0), variance[:, 0], rtol=0.15, atol=0)


def test_newton_steps_reach_the_maximum():
    """A curvature left out: the gradient of an independent formula vanishes, and L-BFGS finds nothing better."""
    T, K, V = 4, 2, 5
    S = torch.poisson(torch.full((T, K, V), 3.0))
    S[2] = 0  # a slice without documents
    walks = Walks(torch.zeros(T, K, V), torch.randn(V), 1.2, 0.4)
    walks.newton(S, steps=30, rounds=30)

    def loss(beta):
        b = torch.from_numpy(beta).view(T, K, V).requires_grad_()
        value = -(S * b.log_softmax(2)).sum()
        value = value - torch.distributions.Normal(walks.base, 1.2).log_prob(b[0]).sum()
        value = value - torch.distributions.Normal(0, 0.4).log_prob(b[1:] - b[:-1]).sum()
        value.backward()
        return value.item(), b.grad.flatten().numpy()

    value, gradient = loss(walks.beta.flatten().numpy())
    assert np.abs(gradient).max() < 1e-8
    assert minimize(loss, np.zeros(T * K * V), jac=True).fun > value - 1e-8


@pytest.mark.skipif(walk_library() is None, reason="no C compiler")
@pytest.mark.parametrize("shape", [(1, 2, 9), (2, 1, 300), (7, 3, 700)], ids=str)
def test_newton_steps_in_machine_code_are_those_of_tensors(shape, monkeypatch):
    """A neighbour of a block of words forgotten, the first or last slice: 4 rounds each way end at the same place."""
    generator = torch.Generator().manual_seed(0)
    S = torch.poisson(torch.full(shape, 2.0), generator=generator).float()
    start, base = torch.randn(shape, generator=generator).float(), torch.randn(shape[2], generator=generator).float()
    ends = []
    for built in (walk_library(), None):
        monkeypatch.setattr("inference.topics.walks.library", lambda built=built: built)
        walks = Walks(start.clone(), base, 1.2, 0.4)
        walks.newton(S, steps=2, rounds=4)
        ends.append(walks.beta)
    assert (ends[0] - start).abs().max() > 0.5
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [EM(), SVI(draws=50)], ids=["em", "svi"])
def test_drifting_topics_are_followed(method):
    """Topics glued to the pooled corpus: every slice's words within 0.08 of the truth, drift learned between bounds."""
    _, data = get("DTM").example()
    posterior = fit(DTM(2, concentration=0.5), data, method, seed=0)
    truth = load_data("drifting_words").truth["phi"]
    phi = posterior.draws["beta"].softmax(-1).mean(0)
    gap = min((phi - truth).abs().max(), (phi.flip(0) - truth).abs().max())
    assert gap < 0.08 and 0.1 < float(posterior.draws["sigma"][0]) < 1.0
    assert posterior.local("theta").shape[1:] == (240, 2) and posterior.log_prob().shape == (240,)
    ahead, last = tm.forecast(posterior), posterior.draws["beta"].mean(0)[:, -1].softmax(-1)
    assert (ahead - last).abs().max() < 0.05 and torch.allclose(ahead.sum(1), torch.ones(2).double())
    rare = last < 0.02  # what is hardly known may come up
    assert (ahead / last)[rare].mean() > 1.01
    assert tm.forecast(posterior, 3, draws=20).std(0).max() > 0
    assert tm.forecast_concentration(posterior).sum() == pytest.approx(1.0)  # alpha's own total: 2 x 0.5


def test_a_dynamic_model_foretells_better_than_a_static_one_where_words_drift():
    drifting = load_data("drifting_words", num_data=480)
    data = {"w": drifting.x, "times": drifting.labels, "num_slices": 6}
    parts = [{n: v[i::2] if n != "num_slices" else v for n, v in data.items()} for i in range(2)]
    dynamic = fit(DTM(2, concentration=0.5), parts[0], EM(), seed=0)
    static = fit(LDA(2, 0.5), parts[0]["w"], EM(), seed=0)
    assert tm.perplexity(dynamic, parts[1]).value < 0.95 * tm.perplexity(static, parts[1]["w"]).value


def test_a_network_that_reads_documents_bounds_the_evidence_and_finds_the_topics():
    """An amortised logistic normal: its density integrates to one, its bound lies above that of factors which guess the topic
    of every word too, and by little; new documents are answered."""
    from zoo.topics.amortised import LogisticNormal

    corpus = load_data("bars").x
    story = LDA(6, 0.5, 0.1)
    posterior = fit(story, corpus, SVI(guide=Amortised((40,)), steps=1500, lr=0.05, batch_size=None), seed=0)
    free = fit(story, corpus, SVI(), seed=0).diagnostics["elbo"]
    assert free < posterior.diagnostics["elbo"] < free + 0.015 * abs(free)
    found = posterior.local("theta", corpus[:7])
    assert found.shape[1:] == (7, 6) and torch.allclose(found.sum(-1), torch.ones(found.shape[:2]).to(found), atol=1e-5)
    q = LogisticNormal(torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 1.2]).double())
    grid = (torch.arange(400).double() + 0.5) / 400
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    rest = 1 - first - second
    inside = rest > 1e-9
    shares = torch.stack([first, second, rest], -1)[inside]
    assert q.log_prob(shares).exp().sum() / 400**2 == pytest.approx(1.0, abs=0.01)


def test_batches_of_sparse_documents_are_recorded():
    """A look at word ids in every step, which keeps a step from being recorded."""
    words, counts = torch.randint(9, (300, 5)), torch.ones(300, 5)
    guide = SVI(guide=Amortised((8,)), steps=30, batch_size=50, mode="graph")
    data = {"w": counts, "words": words, "num_words": 9}
    assert fit(LDA(3), data, guide, seed=0).diagnostics["mode"] == "graph"
    with pytest.raises(ValueError, match="word id 9"):
        fit(LDA(3), {**data, "words": words.clone().fill_(9)}, guide, seed=0)


def test_variational_topics_are_weighed():
    """Importance weights of a one-topic corpus, where the guide is the posterior itself, are equal; of two topics they are not.

    Catches a prior or guide density with the wrong concentration: then no weights would be equal.
    """
    counts = torch.tensor([[3, 1, 0, 2], [1, 4, 2, 0]])
    one = fit(LDA(1, 0.5, 0.7), {"w": counts}, SVI(), seed=0)
    assert one.diagnostics["khat"] < 0.1 and one.diagnostics["weight_ess"] > 0.99 and not one.warnings
    two = fit(LDA(2, 0.5, 0.7), {"w": counts}, SVI(), seed=0)
    assert two.diagnostics["khat"] > 0.7 and "k-hat" in two.warnings[0] and "Gibbs()" in two.warnings[0]
