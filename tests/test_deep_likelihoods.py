"""Likelihoods of columns: against scipy, sums and integrals of one, draws with the right means, columns of mixed kinds."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.functional import softplus

from zoo import VAE
from zoo.deep import (
    Bernoulli,
    Binomial,
    Categorical,
    Columns,
    DiscretisedLogistic,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    columns,
)
from zoo.deep.likelihoods import LEAST

KINDS = (
    Bernoulli(),
    Binomial(5),
    Categorical(4),
    Normal(),
    Normal(0.7),
    StudentT(3.0),
    Poisson(),
    NegativeBinomial(),
    DiscretisedLogistic(8),
)


@pytest.fixture(autouse=True)
def own_stream():
    """A fixed seed for each test, and nothing of it for the next."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def outputs(kind, rows=3, width=1):
    return torch.randn(rows, kind.outputs, width, dtype=torch.float64)


def values(kind, width):
    """All values of a finite or countable support, as far as there is mass."""
    top = {Bernoulli: 1, Binomial: 5, Categorical: 3, DiscretisedLogistic: 7}.get(type(kind), 400)
    return torch.arange(top + 1, dtype=torch.float64).reshape(-1, 1, 1).expand(-1, 3, width)


# Likelihoods


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_likelihoods_sum_or_integrate_to_one(kind):
    """A missing normaliser, a tail that is cut off, a level too many."""
    fn = kind(outputs(kind))
    assert fn.batch_shape == (3, 1) and fn.event_shape == ()
    if kind.support.is_discrete:
        total = fn.log_prob(values(kind, 1)).exp().sum(0)
    else:
        grid = torch.sinh(torch.linspace(-12, 12, 200_001, dtype=torch.float64)).reshape(-1, 1, 1)
        total = torch.trapezoid(fn.log_prob(grid).exp(), grid.expand(-1, 3, 1), dim=0)
    torch.testing.assert_close(total, torch.ones(3, 1, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_likelihoods_are_scipys():
    """Successes and failures mixed up, a rate for a scale, mean and dispersion swapped."""
    out = {kind: outputs(kind) for kind in KINDS}
    part = {kind: [v.squeeze(-1).numpy() for v in o.unbind(-2)] for kind, o in out.items()}
    raw = {kind: [softplus(v).squeeze(-1).numpy() + LEAST for v in o.unbind(-2)] for kind, o in out.items()}
    x = np.array([0.0, 1.0, 1.0])
    share = {kind: scipy.special.expit(p[0]) for kind, p in part.items()}
    m, r = raw[NegativeBinomial()]
    loc, scale = 3.5 * (1 + part[DiscretisedLogistic(8)][0]), 3.5 * raw[DiscretisedLogistic(8)][1]
    logistic = scipy.stats.logistic(loc, scale)
    lower = np.where(x == 0, 0.0, logistic.cdf(x - 0.5))
    expected = {
        Bernoulli(): scipy.stats.bernoulli(share[Bernoulli()]).logpmf(x),
        Binomial(5): scipy.stats.binom(5, share[Binomial(5)]).logpmf(x),
        Categorical(4): torch.stack([torch.tensor(v) for v in part[Categorical(4)]], -1)
        .log_softmax(-1)[range(3), x.astype(int)]
        .numpy(),
        Normal(): scipy.stats.norm(part[Normal()][0], raw[Normal()][1]).logpdf(x),
        Normal(0.7): scipy.stats.norm(part[Normal(0.7)][0], 0.7).logpdf(x),
        StudentT(3.0): scipy.stats.t(3.0, part[StudentT(3.0)][0], raw[StudentT(3.0)][1]).logpdf(x),
        Poisson(): scipy.stats.poisson(raw[Poisson()][0]).logpmf(x),
        NegativeBinomial(): scipy.stats.nbinom(r, r / (r + m)).logpmf(x),
        DiscretisedLogistic(8): np.log(logistic.cdf(x + 0.5) - lower),
    }
    for kind, log_p in expected.items():
        ours = kind(out[kind]).log_prob(torch.tensor(x).unsqueeze(-1)).squeeze(-1)
        np.testing.assert_allclose(ours.numpy(), log_p, rtol=1e-9, err_msg=repr(kind))


def test_tails_of_the_discretised_logistic_do_not_cancel():
    """log(0) for a grey value far from its place: the difference of two cdfs that are both 1."""
    fn = DiscretisedLogistic(256)(torch.tensor([[-1.0], [-8.0]]))
    assert fn.log_prob(torch.tensor([[200.0]])).isfinite().all() and fn.log_prob(torch.tensor([[0.0]])) > -1.0


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_draws_have_the_mean_of_their_likelihood(kind):
    """A sampler that does not belong to its density: mean over 20,000 draws within 5 standard errors."""
    fn = kind(0.5 * outputs(kind))
    draws = fn.sample((20_000,)).double()
    assert kind.support.check(draws).all()
    if kind.support.is_discrete:
        x = values(kind, 1)
        mean = (fn.log_prob(x).exp() * x).sum(0)
    else:
        mean = fn.mean
    assert ((draws.mean(0) - mean).abs() <= 5 * draws.std(0) / len(draws) ** 0.5).all()


def test_columns_of_mixed_kinds_are_each_scored_by_their_own():
    """Outputs that go to another column's likelihood; columns put back in another order."""
    kinds = columns(5, real=[3], counts=[0], binary=[4, 1], categories={2: 3})
    assert kinds == (NegativeBinomial(), Bernoulli(), Categorical(3), Normal(), Bernoulli())
    together = Columns(5, kinds)
    assert together.outputs == 2 + 1 + 3 + 2 + 1 and together.inputs == 7
    out = torch.randn(6, together.outputs, dtype=torch.float64)
    fn = together(out)
    x = fn.sample()
    assert x.shape == fn.batch_shape == (6, 5) and fn.support.check(x).all() and fn.mean.shape == (6, 5)
    # outputs lie group by group, in the order in which kinds first come
    alone = [(out[:, 0:2], 0), (out[:, 2:3], 1), (out[:, 4:7], 2), (out[:, 7:9], 3), (out[:, 3:4], 4)]
    for part, j in alone:
        log_p = kinds[j](part.unsqueeze(-1)).log_prob(x[:, j : j + 1])
        torch.testing.assert_close(fn.log_prob(x)[:, j : j + 1], log_p)
    assert not fn.support.check(x + 0.5)[:, [0, 1, 2, 4]].any() and fn.support.check(x + 0.5)[:, 3].all()
    wide = fn.expand((2, 6, 5))
    assert wide.sample().shape == (2, 6, 5)
    torch.testing.assert_close(wide.log_prob(x), fn.log_prob(x).expand(2, 6, 5))
    assert (together.encode(torch.full((2, 5), torch.nan)) == 0).all()


def test_likelihoods_refuse_with_what_would_do():
    """A misspelt name without the list; a size that is missing; a column of no kind or of two."""
    with pytest.raises(ValueError, match=r"'bernuolli'.*'bernoulli'.*mean 'bernoulli'"):
        VAE(4, 2, likelihood="bernuolli")
    with pytest.raises(ValueError, match=r"levels=\.\.\."):
        VAE(4, 2, likelihood="categorical")
    with pytest.raises(ValueError, match="2 entries and there are 4 columns"):
        VAE(4, 2, likelihood=["normal", "poisson"])
    with pytest.raises(TypeError, match="one of"):
        VAE(4, 2, likelihood=3)
    with pytest.raises(ValueError, match=r"columns \[1\] are of no kind"):
        columns(2, real=[0])
    with pytest.raises(ValueError, match="column 0 is both"):
        columns(1, real=[0], binary=[0])
    with pytest.raises(ValueError, match="no column 5"):
        columns(2, real=[5, 0])
