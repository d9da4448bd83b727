"""Counts of which most are zero: mixtures multiply what occurred only, and find what dense tables give."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch

from inference import EM, SVI, fit, lazy_rows
from inference.handlers import Multinomial
from inference.lazy_rows import LazyRows
from inference.methods.em import counted
from inference.methods.em.counted import Counted, back, times
from inference.methods.em.families import FAMILIES
from zoo import BernoulliMixture, Corpus, MultinomialMixture, PoissonMixture, store_corpus


@pytest.fixture(scope="module")
def counts():
    """600 rows over 80 columns from two groups; 6 percent are not zero, row 5 and column 3 are empty."""
    random = np.random.default_rng(0)
    rate = np.where(np.arange(600)[:, None] < 250, np.linspace(0.01, 0.2, 80), np.linspace(0.15, 0.0, 80)) * 0.6
    table = random.poisson(rate)
    table[5], table[:, 3] = 0, 0
    return table


STORIES = {
    "multinomial": (MultinomialMixture(2), lambda x: x),
    "poisson": (PoissonMixture(2), lambda x: x),
    "bernoulli": (BernoulliMixture(2), lambda x: (x > 0).astype(int)),
}


@pytest.mark.processor  # a card multiplies dense blocks
@pytest.mark.parametrize("driver", ["batch", "incremental", "stepwise"])
@pytest.mark.parametrize("name", STORIES)
def test_compressed_rows_give_the_answer_of_the_dense_table(counts, monkeypatch, name, driver):
    """Parameters, objective and base measure to 1e-9; a lost entry, a wrong row or a constant left out shows."""
    story, form = STORIES[name]
    table, method = form(counts), EM(restarts=2, max_iter=12, driver=driver)
    dense = fit(story, table, method, seed=0)
    monkeypatch.setattr(counted, "ENTRIES", 40)
    monkeypatch.setattr(counted, "LARGE", 10)
    calls = []
    monkeypatch.setattr("inference.methods.em.mixture.times", lambda x, t: calls.append(x.shape) or times(x, t))
    sparse = fit(story, table, method, seed=0)
    assert calls and max(n for n, _ in calls[4:]) < 40
    for site, value in dense.draws.items():
        torch.testing.assert_close(sparse.draws[site], value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sparse.history, dense.history, rtol=1e-9)


def test_counts_beside_labels(counts, monkeypatch):
    """A site of another kind in the same story keeps its dense features, wherever it stands."""

    def story(x=None, y=None):
        pi = pyro.sample("pi", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            phi = pyro.sample("phi", dist.Dirichlet(torch.full((80,), 1.1)))
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            s = pyro.sample("s", dist.InverseGamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi))
            pyro.sample("x", dist.Multinomial(9, probs=phi[z], validate_args=False), obs=x)
            pyro.sample("y", dist.Normal(mu[z], s[z].sqrt()), obs=y)

    y = torch.randn(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[250:] += 3.0
    data, method = {"x": counts, "y": y}, EM(restarts=2, max_iter=10)
    dense = fit(story, data, method, seed=0)
    monkeypatch.setattr(counted, "LARGE", 10)
    sparse = fit(story, data, method, seed=0)
    for site, value in dense.draws.items():
        torch.testing.assert_close(sparse.draws[site], value, rtol=1e-9, atol=1e-12)


def test_products_and_base_measures(counts):
    """X t', w X and the sum of log h(x), by dense algebra; blocks are cut where they have many entries."""
    x = torch.from_numpy(counts).double()
    found = Counted.of(x, torch.float64)
    random = torch.Generator().manual_seed(0)
    table, weights = (torch.rand(3, n, generator=random, dtype=torch.float64) for n in (80, 600))
    block = found.block(slice(0, 600))
    torch.testing.assert_close(times(block, table), table @ x.T)
    torch.testing.assert_close(back(block, weights), weights @ x)
    rows = np.array([7, 5, 599, 7])
    assert (found.block(rows).toarray() == counts[rows]).all()
    for family in (f for f in FAMILIES.values() if f.linear and f.base):
        assert found.base(family, [slice(0, 7), slice(7, 600)]) == pytest.approx(float(family.base(x).sum()), rel=1e-12)
    zero = torch.zeros(4, dtype=torch.float64)
    for kind, family in FAMILIES.items():  # what `linear` promises: a zero adds nothing
        if family.linear and not family.event_dims:
            fn = kind(torch.full((4,), 0.3, dtype=torch.float64))
            assert set(family.statistics(zero, fn)) <= {"n", family.linear}
            assert not family.statistics(zero, fn)[family.linear].any()
            assert family.base is None or not family.base(zero).any()


def test_dense_tables_stay_dense_where_much_is_not_zero(counts, monkeypatch):
    """Nor are tables with missing cells compressed, nor statistics that a zero moves."""
    family = FAMILIES[torch.distributions.Poisson]
    monkeypatch.setattr(counted, "LARGE", 10)
    x = torch.from_numpy(counts).double()
    assert counted.suits(x, family) and not counted.suits(x + 1, family)
    assert not counted.suits(torch.where(x == 2, torch.nan, x), family)
    assert not counted.suits(x, FAMILIES[torch.distributions.Normal])


def test_a_wide_corpus_in_memory_is_not_made_dense(monkeypatch):
    """Nor are parts of it that are picked out: no table is made of more than a few hundred documents."""
    monkeypatch.setattr("zoo.data.text.DENSE", 1_000_000)
    monkeypatch.setattr(lazy_rows, "CELLS", 300_000)
    monkeypatch.setattr("inference.methods.em.features.CELLS", 300_000)
    monkeypatch.setattr("inference.methods.em.mixture.KEEP", 300_000)
    monkeypatch.setattr("inference.sparse_rows.CELLS", 300_000)
    random, n = np.random.default_rng(0), 1200
    words = (random.exponential(20.0, (n, 30)) + 600 * (np.arange(n)[:, None] % 2)).astype(int).clip(max=1199)
    m = sp.csr_matrix((np.ones(words.size, int), (np.repeat(np.arange(n), 30), words.ravel())), shape=(n, 1200))
    dense = m.toarray()
    monkeypatch.setattr(sp.csr_matrix, "toarray", lambda *_, **__: pytest.fail("made dense"))
    monkeypatch.setattr(lazy_rows, "WHOLE", 1)
    monkeypatch.setattr("inference.rehearsal.MANY_ROWS", 100)
    posterior = fit(MultinomialMixture(2), Corpus(m), EM(restarts=1, max_iter=3), seed=0)
    z = posterior.local("z").argmax(1)
    agree = float((z == torch.arange(n) % 2).double().mean())
    assert max(agree, 1 - agree) > 0.99
    x, rows = posterior.problem.kwargs["x"], np.random.default_rng(1).permutation(n)[:500]
    some = x[rows]  # as for a comparison: rows apart, still compressed
    assert isinstance(some, LazyRows) and some.shape == (500, 1200)
    assert (some[torch.arange(40)].numpy() == dense[rows[:40]]).all()


@pytest.mark.parametrize("guide", ["story", "mean_field"])
def test_steps_on_batches_of_counts_are_recorded(counts, tmp_path, guide):
    """Nothing of a batch is looked at: the step is a graph, on disk too, and its losses are those of the program."""
    stored = store_corpus(tmp_path / "counts", [sp.csr_matrix(counts)])
    histories = []
    for mode in ("graph", "eager") if guide == "story" else ("graph",):
        svi = SVI(guide=guide, steps=8, starts=1, batch_size=100, draws=5, mode=mode, particles=1)
        posterior = fit(MultinomialMixture(2), stored, svi, seed=0)
        assert (posterior.diagnostics["mode"] == "eager") == (mode == "eager"), posterior.diagnostics["reason"]
        histories.append(posterior.history)
    if guide == "story":
        np.testing.assert_allclose(histories[0], histories[1], rtol=1e-8)


def test_numbers_that_a_guide_draws_and_does_not_use_move_the_stream():
    """A start drawn anew at every call is recorded with the step: without it the graph would draw other numbers."""

    def story(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("mu.loc", torch.rand(()))
        pyro.sample("mu", dist.Normal(loc, 0.5))

    x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    svi = {m: SVI(guide="story", steps=15, starts=1, draws=5, mode=m, particles=1) for m in ("graph", "eager")}
    found = {m: fit(story, x, s, guide=guide, seed=0) for m, s in svi.items()}
    assert found["graph"].diagnostics["mode"] == "graph", found["graph"].diagnostics["reason"]
    np.testing.assert_allclose(found["graph"].history, found["eager"].history, rtol=1e-10)


def test_the_density_of_counts_is_that_of_pytorch():
    """One product instead of a table states x rows x words: value, shape and gradient, wherever states and rows lie."""
    random = torch.Generator().manual_seed(0)
    phi = torch.rand(3, 5, generator=random, dtype=torch.float64).requires_grad_()
    x = torch.randint(0, 4, (7, 5), generator=random).double()
    for p, batch, value in (
        (phi[:, None], (3, 7), x),  # enumerated states, expanded by the plate of rows
        (phi[0], (), x),
        (phi[0], (7,), x),
        (phi[[0, 1, 2, 0, 1, 2, 0]], (7,), x),  # a row has its own
        (phi[:, None, None], (3, 2, 7), x),
        (phi, (3,), x[0]),
    ):
        told = dist.Multinomial(9, probs=p, validate_args=False).expand(batch)
        ours = copy.copy(told)
        ours.__class__ = Multinomial
        a, b = told.log_prob(value), ours.log_prob(value)
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        weight = torch.rand(a.shape, generator=random, dtype=torch.float64)
        first, second = (torch.autograd.grad((v * weight).sum(), phi, retain_graph=True)[0] for v in (a, b))
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
    logits = torch.tensor([0.0, -torch.inf, 1.0])
    told = dist.Multinomial(9, logits=logits)
    ours = copy.copy(told)
    ours.__class__ = Multinomial
    assert torch.equal(ours.log_prob(torch.tensor([1.0, 0.0, 2.0])), told.log_prob(torch.tensor([1.0, 0.0, 2.0])))


def test_whole_numbers_are_taken_by_bernoulli_sites():
    """PyTorch's density of 0 and 1 asks for floats; the data need not."""

    def story(x):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    x = np.array([1, 0, 1, 1, 0, 1])
    found = fit(story, x, "exact", seed=0).draws["p"]
    assert abs(float(found.mean()) - 5 / 8) < 0.02
