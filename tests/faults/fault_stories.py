"""Small stories, one for every method and kind of data, and what it means to refuse bad input."""

import functools
import re
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import gaussian_mixture

from inference import EM, HMC, NUTS, SVI, Exact, Gibbs, fit
from zoo import LDA

ALL = ("em", "svi", "nuts", "hmc", "exact", "gibbs")
DENSITY = ("em", "svi", "nuts", "hmc", "exact")
GRADIENT = ("em", "svi", "nuts", "hmc")
SAMPLING = ("nuts", "hmc")

QUICK = {
    "em": EM(restarts=2, max_iter=30),
    "svi": SVI(steps=60, starts=1, draws=50),
    "nuts": NUTS(chains=2, warmup=30, draws=30, backend="graph"),
    "hmc": HMC(chains=4, warmup=30, draws=30, backend="graph"),
    "exact": Exact(draws=50),
    "gibbs": Gibbs(chains=2, warmup=10, draws=10),
}

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)).double()
COUNTS = torch.poisson(torch.full((30,), 3.0), generator=torch.Generator().manual_seed(2)).double()
LABELS = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(3))
WORDS = torch.randint(0, 4, (20, 6), generator=torch.Generator().manual_seed(4)).double()


def location(x):
    """Normal columns around unknown means: conjugate."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def series(x):
    """Numbers around an unknown mean: conjugate."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def rates(x):
    """Counts at an unknown rate: conjugate."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def classes(x):
    """Labels of three classes: conjugate."""
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(p), obs=x)


def line(X, y):
    """Linear regression with known noise: conjugate."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)


def topics():
    """Latent Dirichlet allocation of word counts."""
    return LDA(3, 0.5, 0.5)


def real(method):
    """A story about real rows (N, 3) that `method` can answer, and its data; word counts for Gibbs."""
    if method == "gibbs":
        return topics(), WORDS.clone(), "w"
    return (gaussian_mixture if method == "em" else location), X.clone(), "x"


def answer(story, data, method, **options):
    """A quick fit with seed 0."""
    return fit(story, data, QUICK.get(method, method), seed=0, **options)


@functools.cache
def good(method):
    """Draws of a good fit."""
    story, data, _ = real(method)
    return answer(story, data, method).draws


def refused(kind, words, story, data, method, *, at_once=True, **options):
    """Fitting raises `kind` with all `words` (patterns) before the method runs, and the next good fit has the same bits.

    Returns the text.
    """
    before = good(method if method in QUICK else "em")
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        if at_once and method in QUICK:
            original = type(QUICK[method]).run
            patch.setattr(type(QUICK[method]), "run", lambda self, problem: ran.append(1) or original(self, problem))
        with pytest.raises(kind) as error:
            answer(story, data, method, **options)
    text = str(error.value)
    for word in words:
        assert re.search(word, text), f"{word!r} not in: {text}"
    assert not ran, f"the method had begun its work when it was refused: {text}"
    again = answer(*real(method if method in QUICK else "em")[:2], method if method in QUICK else "em").draws
    assert all(torch.equal(before[n], again[n]) for n in before)
    return text


def sound(posterior):
    """Every number of the answer is finite."""
    assert posterior.draws and all(v.isfinite().all() for v in posterior.draws.values() if v.is_floating_point())
    assert all(v == v for v in posterior.history)
    return posterior


def seconds(call):
    """Processor time of a call that raises (the wall clock also measures the neighbours), and its error."""
    start = time.process_time()
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    return time.process_time() - start, str(error.value)
