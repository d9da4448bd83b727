"""Trouble in a run: it stops with what was known, or it ends and says first what is wrong with the answer."""

import math
import os
import signal
import threading
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from fault_stories import QUICK, WORDS, X, answer, location, topics
from fault_table import row
from stories import SCHOOLS, beta_bernoulli, gaussian_mixture, ppca

from inference import EM, HMC, NUTS, SVI, DivergenceError, Gibbs, fit
from inference.meter import Meter, resident_megabytes
from zoo import LDA

pytestmark = pytest.mark.usefixtures("untouched")


def many_words(documents=1000, words=60, num_topics=20):
    """Counts that a topic model made: enough of them to keep an engine busy for a second."""
    generator = torch.Generator().manual_seed(5)

    def shares(*shape):
        gamma = torch._standard_gamma(torch.full(shape, 0.1), generator=generator) + 1e-9
        return gamma / gamma.sum(-1, keepdim=True)

    rates = 60 * shares(documents, num_topics) @ shares(num_topics, words)
    return torch.poisson(rates, generator=generator).double()


MANY_WORDS = many_words()
ENDLESS = {
    "em": (gaussian_mixture, X, EM(restarts=2, max_iter=10**7, tol=0.0)),
    "em_topics": (LDA(20, 0.1, 0.1), MANY_WORDS, EM(restarts=1, max_iter=10**7, tol=0.0)),
    "svi": (location, X, SVI(steps=10**7, schedule="constant")),
    "svi_topics": (LDA(20, 0.1, 0.1), MANY_WORDS, SVI(steps=10**7, tol=0.0, starts=1)),
    "nuts_graph": (location, X, NUTS(chains=2, warmup=100, draws=10**6, backend="graph")),
    "nuts_warmup": (location, X, NUTS(chains=2, warmup=10**7, draws=100, backend="graph")),
    "nuts_compiled": (location, X, NUTS(chains=2, warmup=100, draws=2 * 10**6)),
    "hmc": (location, X, HMC(chains=4, warmup=100, draws=10**6, backend="graph")),
    "gibbs": (topics(), WORDS, Gibbs(chains=2, warmup=10, draws=10**5)),
    "gibbs_warmup": (topics(), WORDS, Gibbs(chains=2, warmup=10**6, draws=10)),
}


def centred(y, sigma):
    """Eight schools as nobody should write them: a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def two_modes(x):
    """The data know the square only."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc**2, 0.3), obs=x)


class Guided:
    """A story with a guide of its own."""

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(self, x):
        loc = pyro.param("mu.loc", torch.zeros(()))
        scale = pyro.param("mu.scale", torch.ones(()), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))


@row(
    "a step size of 1e6",
    ("svi",),
    derived=(location, X),
    own=(Guided(), X[:, 0]),
    coin=(beta_bernoulli, (X[:, 0] > 0).double()),
)
def test_a_huge_step_diverges_with_the_last_finite_state(method, case):
    with pytest.raises(DivergenceError, match=r"step \d+.*lower lr") as caught:
        fit(*case, SVI(lr=1e6, schedule="constant"), seed=0)
    error = caught.value
    assert error.step is not None and error.site and error.site in str(error)
    assert error.state and all(v.isfinite().all() for v in error.state.values())


@row("a step size of 1e6", ("em", "nuts"))
def test_a_run_without_a_proper_posterior_stops_or_stays_finite(method):
    """Flat priors and data that say nothing: numbers may wander, but no NaN comes back."""

    def story(x):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0 * a, 1.0), obs=x)

    try:
        posterior = answer(story, X[:, 0], method)
        assert all(v.isfinite().all() for v in posterior.draws.values())
    except DivergenceError as error:
        assert error.state and error.step is not None


@row("a funnel", ("nuts", "hmc"))
def test_divergences_come_before_the_numbers(method):
    """Neal's funnel by steps that are too long for its neck: some 20 to 800 trajectories diverge, whatever the seed."""

    def funnel(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        theta = pyro.sample("theta", dist.Normal(0.0, (mu / 2).exp()).expand([9]).to_event(1))
        pyro.sample("y", dist.Normal(theta, 100.0).to_event(1), obs=y)

    long = {"warmup": 100, "target_accept": 0.4}
    options = {"nuts": NUTS(chains=2, draws=300, **long), "hmc": HMC(chains=16, draws=200, **long)}
    posterior = fit(funnel, torch.zeros(9), options[method], seed=0)
    count = posterior.diagnostics["divergences"]
    assert count > 0 and any("diverg" in w and str(count) in w for w in posterior.warnings)
    text = str(posterior.summary())
    assert text.startswith("warning") and text.index("diverg") < text.index("\nmu")


@pytest.mark.processor  # how many diverge hangs on what is drawn
@row("a funnel", ("nuts", "hmc"))
def test_divergences_of_eight_schools_come_first(method):
    options = {"nuts": NUTS(chains=2, warmup=200, draws=200), "hmc": HMC(chains=8, warmup=200, draws=100)}
    posterior = fit(centred, SCHOOLS, options[method], seed=0)
    count = posterior.diagnostics["divergences"]
    assert count > 0 and any("diverg" in w and str(count) in w for w in posterior.warnings)
    text = str(posterior.summary())
    assert text.startswith("warning") and text.index("diverg") < text.index("\nmu")


@row("chains in two modes", ("nuts", "hmc"))
def test_chains_that_disagree_are_shown_one_by_one(method):
    starts = {"loc": torch.tensor([-2.0, -2.0, 2.0, 2.0]).double()}
    options = {
        "nuts": NUTS(chains=4, warmup=100, draws=100, init=starts),
        "hmc": HMC(chains=4, warmup=100, draws=100, init=starts),
    }
    posterior = fit(two_modes, X[:, 0] + 4, options[method], seed=0)
    assert posterior.diagnostics["rhat"] > 1.01
    told = next(w for w in posterior.warnings if "R-hat" in w)
    assert "by chain" in told and "-" in told and "not to be trusted" in told
    assert str(posterior.summary()).startswith("warning")


@row("chains in two modes", ("gibbs",))
def test_short_chains_of_topics_are_not_pooled_in_silence(method):
    posterior = answer(topics(), WORDS, method)
    assert any("R-hat" in w and "by chain" in w for w in posterior.warnings)


@row("a mean-field guide on strong correlation", ("svi",))
def test_a_guide_that_cannot_hold_a_correlation_is_told(method):
    """Two regressors that are nearly one: the posterior's correlation is -0.99 and more."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(100, 1, generator=generator).double()
    second = first + 0.05 * torch.randn(100, 1, generator=generator).double()

    def story(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    data = {"X": torch.cat([first, second], 1), "y": first[:, 0]}
    narrow = fit(story, data, SVI(guide="mean_field", steps=1500, draws=4000), seed=0)
    assert narrow.diagnostics["khat"] > 0.7 and any("k-hat" in w for w in narrow.warnings)
    assert "k-hat" in str(narrow.summary())
    wide = fit(story, data, SVI(guide="full_rank", steps=1500), seed=0)
    assert wide.diagnostics["khat"] < 0.7 and not any("k-hat" in w for w in wide.warnings)


@row("a budget that is used up", ("any",), **ENDLESS)
def test_a_spent_budget_returns_what_there_is(method, case):
    story, data, options = case
    began = time.perf_counter()
    budget = 0.05 if data is MANY_WORDS else 1.0
    posterior = fit(story, data, options, seed=0, budget=budget)
    took = time.perf_counter() - began
    assert not posterior.converged and any("budget" in w and "used up" in w for w in posterior.warnings)
    assert posterior.draws and all(v.isfinite().all() for v in posterior.draws.values())
    assert took < 60, took


@row("a budget that is used up", ("any",), **{n: ENDLESS[n] for n in ("em", "svi", "nuts_graph", "hmc")})
def test_a_memory_budget_returns_what_there_is(method, case, monkeypatch):
    """Another thread takes 40 MB more twenty times a second, as a run that leaks would."""
    hoard, done, mark = [], threading.Event(), Meter.mark

    def leak():
        while not done.wait(0.05):
            hoard.append(torch.ones(10_000_000))

    def begun(self, phase):
        mark(self, phase)
        if phase == "setup":  # before that there is nothing to return
            threading.Timer(0.7, leak).start()

    story, data, options = case
    fit(story, data, options, seed=0, budget=0.2)  # libraries are loaded
    monkeypatch.setattr(Meter, "mark", begun)
    try:
        posterior = fit(story, data, options, seed=0, memory=resident_megabytes() + 300, budget=60.0)
    finally:
        done.set()
    assert not posterior.converged and any("memory" in w and "MB" in w for w in posterior.warnings)
    assert posterior.draws and all(v.isfinite().all() for v in posterior.draws.values())


@row("a budget that is used up", ("em",))
def test_a_memory_budget_that_is_spent_already_is_refused(method):
    with pytest.raises(ValueError, match=r"memory=1.*already holds"):
        fit(location, X, method, seed=0, memory=1)
    with pytest.raises(ValueError, match="memory"):
        fit(location, X, method, seed=0, memory=math.nan)


@row("a budget that is used up", ("any",), **ENDLESS)
def test_ctrl_c_returns_what_there_is(method, case, monkeypatch):
    story, data, options = case
    timer = threading.Timer(0.05 if data is MANY_WORDS else 0.7, os.kill, (os.getpid(), signal.SIGINT))
    mark = Meter.mark

    def begun(self, phase):
        mark(self, phase)
        if phase == "setup":  # before that there is nothing to return
            timer.start()

    monkeypatch.setattr(Meter, "mark", begun)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell ignores Ctrl-C
    try:
        posterior = fit(story, data, options, seed=0, budget=60.0)
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C threw the run away")
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, inherited)
    monkeypatch.undo()
    assert not posterior.converged and any("interrupted" in w for w in posterior.warnings), posterior.warnings
    assert posterior.draws and all(v.isfinite().all() for v in posterior.draws.values())
    again = [answer(location, X, "em").draws["loc"] for _ in range(2)]
    assert torch.equal(*again)


@row("a step size of 1e6", ("svi",))
def test_one_diverging_start_is_dropped_and_told(method):
    """A start that leaves the finite numbers must not take the others with it."""
    posterior = fit(ppca, X, SVI(steps=200, starts=2, draws=50), seed=0)
    assert all(v.isfinite().all() for v in posterior.draws.values()) and QUICK
