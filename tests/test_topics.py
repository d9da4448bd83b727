"""Topic stories: one density however it is told, sums over all assignments, guides that reach every latent."""

import itertools

import numpy as np
import pyro
import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

from zoo import DTM, LDA, Corpus, TokenLDA, load
from zoo.catalog import get
from zoo.topics import RandomWalk, topic_counts


@pytest.fixture(autouse=True)
def own_world():
    """Float64 and a fixed seed for each test, and nothing of it for the next."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)


def corpus_of(D=6, V=5, most=7, seed=0):
    rng = np.random.default_rng(seed)
    return Corpus.from_sequences([rng.integers(V, size=n) for n in [0, *rng.integers(1, most, D - 1)]], V)


def globals_of(K, V, D):
    phi = torch.distributions.Dirichlet(torch.full((V,), 0.5)).sample((K,))
    return phi, torch.distributions.Dirichlet(torch.full((K,), 0.5)).sample((D,))


def log_joint(model, values, enumerate_at=None, **arguments):
    """Log density of all sites at `values`; latents that are not given are summed out."""
    story = poutine.condition(model, values)
    if enumerate_at is not None:
        elbo = TraceEnum_ELBO(max_plate_nesting=-1 - enumerate_at)
        return -elbo.loss(config_enumerate(story), lambda **kwargs: None, **arguments)
    return poutine.trace(story).get_trace(**arguments).log_prob_sum().item()


# Densities


def test_token_form_and_count_form_are_one_density():
    """A word of the padding counted, a multinomial coefficient too many, topics and words transposed; also empty documents."""
    corpus, K = corpus_of(), 3
    phi, theta = globals_of(K, corpus.num_words, len(corpus))
    words, counts = (torch.from_numpy(a) for a in corpus.padded())
    dense = torch.from_numpy(corpus.counts.toarray())
    tokens = torch.from_numpy(corpus.padded_tokens())
    by_count = log_joint(LDA(K).model, {"phi": phi, "theta": theta}, w=dense)
    sparse = log_joint(LDA(K).model, {"phi": phi, "theta": theta}, w=counts, words=words, num_words=corpus.num_words)
    by_token = log_joint(
        TokenLDA(K).model, {"phi": phi, "theta": theta[:, None]}, enumerate_at=-3, w=tokens, num_words=corpus.num_words
    )
    assert by_count == pytest.approx(sparse, abs=1e-10) and by_count == pytest.approx(by_token, abs=1e-8)


def test_count_form_equals_the_sum_over_all_assignments():
    """K^N assignments by brute force, with scipy's Dirichlet densities."""
    K, V, ids = 2, 4, [0, 3, 3, 1]
    phi, theta = globals_of(K, V, 1)
    total = sum(
        np.prod([theta[0, z] * phi[z, v] for z, v in zip(zs, ids)]) for zs in itertools.product(range(K), repeat=4)
    )
    prior = scipy.stats.dirichlet([0.05] * V).logpdf(phi.T.numpy()).sum() + scipy.stats.dirichlet([0.1] * K).logpdf(
        theta[0]
    )
    found = log_joint(LDA(K).model, {"phi": phi, "theta": theta}, w=torch.tensor([[1, 1, 0, 2]]))
    assert found == pytest.approx(float(np.log(total) + prior), abs=1e-10)


def test_the_walk_is_made_of_normals():
    """A variance for a standard deviation, or a first step taken from the wrong place."""
    m, walk = torch.randn(4), torch.randn(3, 5, 4)
    found = RandomWalk(m, torch.tensor(1.5), torch.tensor(0.3), 5, (3,)).log_prob(walk)
    for k in range(3):
        expected = scipy.stats.norm(m, 1.5).logpdf(walk[k, 0]).sum()
        expected += sum(scipy.stats.norm(walk[k, t - 1], 0.3).logpdf(walk[k, t]).sum() for t in range(1, 5))
        assert found[k].item() == pytest.approx(expected, rel=1e-12)
    draws = RandomWalk(m, torch.tensor(1.5), torch.tensor(0.3), 5, (2000,)).rsample()
    torch.testing.assert_close(draws[:, -1].var(0), torch.full((4,), 1.5**2 + 4 * 0.3**2), rtol=0.15, atol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_documents_of_a_dynamic_model_see_their_own_slice(sparse):
    """The topics of another slice; the same density from all words and from those that occur, an empty slice among them."""
    corpus, K = corpus_of(), 2
    times = torch.tensor([0, 0, 1, 3, 3, 3])
    story, V = DTM(K, drift=0.5), corpus.num_words
    m, beta = torch.randn(V), torch.randn(K, 4, V)
    _, theta = globals_of(K, V, len(corpus))
    words, counts = (torch.from_numpy(a) for a in corpus.padded())
    data = {"w": counts, "words": words} if sparse else {"w": torch.from_numpy(corpus.counts.toarray())}
    found = log_joint(
        story.model, {"m": m, "beta": beta, "theta": theta}, **data, times=times, num_words=V, num_slices=4
    )
    expected = scipy.stats.norm(0, 5).logpdf(m).sum() + scipy.stats.norm(m, 1.0).logpdf(beta[:, 0]).sum()
    expected += scipy.stats.norm(0, 0.5).logpdf(beta[:, 1:] - beta[:, :-1]).sum()
    phi = scipy.special.softmax(beta.numpy(), -1)
    for d, c in enumerate(corpus.counts.toarray()):
        expected += scipy.stats.dirichlet([0.1] * K).logpdf(theta[d].numpy())
        expected += (c * np.log(theta[d].numpy() @ phi[:, int(times[d])])).sum()
    assert found == pytest.approx(float(expected), rel=1e-10)


# Guides


@pytest.mark.parametrize("name", ["LDA", "TokenLDA", "DTM"])
def test_guides_guess_every_latent_and_feel_the_bound(name):
    """A latent that the guide forgets, a parameter that no gradient reaches, a bound that starts out infinite."""
    story, data = get(name).example()
    nodes = poutine.trace(story.guide).get_trace(**data).nodes
    guessed = {n for n, s in nodes.items() if s["type"] == "sample" and "plate" not in str(s["fn"]).lower()}
    assert guessed >= {"theta", "beta" if name == "DTM" else "phi"}
    elbo = TraceEnum_ELBO(max_plate_nesting=2) if name == "TokenLDA" else Trace_ELBO()
    model = config_enumerate(story.model) if name == "TokenLDA" else story.model
    loss = elbo.differentiable_loss(model, story.guide, **data)
    assert loss.isfinite()
    loss.backward()
    for parameter, value in pyro.get_param_store().named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and (value.grad != 0).any(), parameter


def test_the_guides_shares_are_the_best_for_their_topics():
    """Any change of gamma lowers the bound of a document: the guide's theta is a maximum, not a heuristic."""
    K, V = 3, 6
    b = torch.rand(1, V, K)
    c, alpha = torch.tensor([[3.0, 0, 1, 2, 0, 5]]), torch.full((K,), 0.4)
    gamma = topic_counts(b, c, alpha, rounds=500)

    def bound(g):
        elog = g.digamma() - g.sum(-1, keepdim=True).digamma()
        kl = torch.distributions.kl_divergence(
            torch.distributions.Dirichlet(g), torch.distributions.Dirichlet(alpha.expand_as(g))
        )
        return ((c * (b * elog.exp()[:, None]).sum(-1).log()).sum() - kl.sum()).item()

    best = bound(gamma)
    assert all(bound(gamma * (1 + 0.05 * torch.randn(1, K))) < best for _ in range(50))
    assert gamma.sum().item() == pytest.approx(c.sum().item() + alpha.sum().item())


# Settings and data


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda: LDA(0), ["num_topics", "0"]),
        (lambda: LDA(2, concentration=-1.0), ["concentration", "positive"]),
        (lambda: LDA(2).model(torch.ones(3)), ["(3,)", "(D, V)"]),
        (
            lambda: LDA(2).model(torch.ones(2, 3), torch.tensor([[0, 1, 2], [0, 9, 1]]), 5),
            ["document 1", "9", "num_words=5"],
        ),
        (lambda: LDA(2).model(None, torch.zeros(2, 3)), ["pass w"]),
        (lambda: LDA(2).model(torch.ones(2, 3), torch.zeros(2, 2)), ["(2, 2)", "(2, 3)"]),
        (lambda: TokenLDA(2).model(torch.tensor([[0, 1], [7, -1]]), 5), ["document 1", "7", "num_words=5"]),
        (lambda: TokenLDA(2).model(torch.ones(2, 2)), ["word ids"]),
        (lambda: DTM(2, drift=0.0), ["drift", "positive"]),
        (lambda: DTM(2).model(torch.ones(2, 3), times=torch.tensor([0, 3]), num_slices=2), ["times", "0 to 1", "3"]),
        (lambda: DTM(2).model(torch.ones(2, 3), times=torch.tensor([0]), num_slices=1), ["times", "(1,)", "(2,)"]),
        (lambda: DTM(2).model(torch.ones(2, 3), times=torch.tensor([0, 1])), ["num_slices"]),
        (lambda: DTM(2).model(torch.ones(2, 3), times=torch.tensor([0.0, 1.5]), num_slices=3), ["whole numbers"]),
    ],
)
def test_what_is_wrong_is_named(make, texts):
    """A setting or an id that fails later, inside a distribution."""
    with pytest.raises(ValueError) as error:
        make()
    assert all(text in str(error.value) for text in texts), error.value


@pytest.mark.parametrize("story", [LDA(4), TokenLDA(4), DTM(4, drift=0.3)], ids=["LDA", "TokenLDA", "DTM"])
def test_stories_dream_documents(story):
    """Shapes of dreams, and a guide that dreams without data."""
    w = story.model(num_documents=7, num_words=11, length=13)
    story.guide(num_documents=7, num_words=11, length=13)
    if isinstance(story, TokenLDA):
        assert w.shape == (7, 13) and int(w.max()) < 11 and int(w.min()) >= 0
    else:
        assert w.shape == (7, 11) and (w.sum(1) == 13).all()


def test_dreams_follow_the_topics():
    """Words drawn from another topic: frequencies within 5 standard errors of theta phi."""
    phi = load("bars").truth["phi"]
    for story in (LDA(6), TokenLDA(6)):
        shape = (1, 6) if isinstance(story, LDA) else (1, 1, 6)
        theta = torch.tensor([0.5, 0, 0, 0.5, 0, 0]).reshape(shape)
        model = poutine.condition(story.model, {"phi": phi, "theta": theta})
        w = model(num_documents=1, num_words=9, length=4000)[0]
        seen = w / w.sum() if isinstance(story, LDA) else torch.bincount(w, minlength=9) / 4000
        p = 0.5 * phi[0] + 0.5 * phi[3]
        assert ((seen - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-12).all()
