"""Mistakes in a story: each is an error that names the site, for every method, instead of a wrong answer."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from fault_stories import (
    ALL,
    COUNTS,
    DENSITY,
    GRADIENT,
    QUICK,
    SAMPLING,
    X,
    answer,
    location,
    real,
    refused,
    series,
    sound,
)
from fault_table import row
from pyro.poutine.runtime import _PYRO_STACK
from stories import bits, coupled_bits, poisson_latent

from inference import SVI, DivergenceError, fit, simulate

pytestmark = pytest.mark.usefixtures("untouched")


@row("nothing is observed", ALL)
def test_a_story_without_observations_is_refused(method):
    def story(x=None):
        pyro.sample("a", dist.Normal(0.0, 1.0))

    refused(ValueError, ["no site is observed", "obs="], story, torch.zeros(3), method)


@row("nothing is observed", ALL)
def test_data_of_none_are_refused(method):
    story = real(method)[0]
    refused(ValueError, ["data is None", "simulate"], story, None, method)


@row("two sites of one name", DENSITY)
def test_two_sites_of_one_name_are_refused(method):
    def story(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    refused(ValueError, ["two sites are called 'a'", "name of its own"], story, X[:, 0], method)


@row("a vector observed outside a plate", DENSITY)
def test_a_forgotten_plate_is_refused(method):
    """Pyro's own NUTS takes it in silence."""

    def story(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    refused(ValueError, ["site 'x'", "30 values", "pyro.plate", "to_event"], story, X[:, 0], method)


@row("a latent with 2**40 joint states", DENSITY, one=bits, forty=coupled_bits)
def test_a_table_too_large_for_memory_is_refused_before_it_is_made(method, case):
    text = refused(ValueError, ["plate", "markov"], case, X[:, 0], method)
    assert "1.1e+12" in text or "TB" in text or "TiB" in text, text


@row("a latent with infinitely many states", GRADIENT)
def test_infinitely_many_states_are_refused_and_methods_told(method):
    refused(
        ValueError,
        ["'n'", "Poisson", "infinitely many states", "cannot be enumerated", "admissible|no method"],
        poisson_latent,
        X[:, 0],
        method,
    )


@row("a guide that lacks a latent", ("svi",))
def test_a_guide_without_a_latent_is_refused(method):
    """Pyro warns, and its loss is then no bound on the evidence."""

    def story(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("a.loc", torch.tensor(0.0))
        pyro.sample("a", dist.Normal(loc, 1.0))

    refused(ValueError, ["guide", "'b'"], story, X[:, 0], method, guide=guide, at_once=False)


@row("sites that come and go", DENSITY)
def test_a_branch_on_a_draw_is_named(method):
    def story(x):
        coin = pyro.sample("coin", dist.Normal(0.0, 1.0))
        loc = pyro.sample("extra", dist.Normal(0.0, 1.0)) if coin > 0 else torch.tensor(0.0)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    refused(ValueError, ["'extra'", "come and go", "torch.where"], story, X[:, 0], method)


@row("an observation of density zero", GRADIENT)
def test_an_impossible_observation_names_site_and_value(method):
    def story(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(torch.zeros(()) * loc), obs=x)

    data = torch.zeros(10)
    data[4] = 3.0
    refused(ValueError, ["'x'", r"\b3\b", r"index 4|x\[4\]"], story, data, method, at_once=False)


@row("an observation of density zero", GRADIENT)
def test_an_impossible_observation_under_every_state_names_site_and_value(method):
    def story(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Poisson((0.0 * a).expand(2)[z]), obs=x)

    data = torch.zeros(10)
    data[4] = 3.0
    refused(ValueError, ["'x'", r"\b3\b", r"index 4|x\[4\]"], story, data, method, at_once=False)


def flawed(x):
    """sqrt(v - v) is 0, and its slope infinity minus infinity."""
    v = pyro.sample("v", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((v - v).sqrt() + w, 1.0), obs=x)


@row("a finite loss whose gradient is NaN", GRADIENT)
def test_a_gradient_of_nan_names_parameter_and_site(method):
    with pytest.raises((ValueError, DivergenceError)) as error:
        answer(flawed, X[:, 0], method)
    text = str(error.value)
    assert "gradient" in text and "'v'" in text and "'x'" in text, text


class Slip(Exception):
    """The user's own."""


@pytest.mark.processor  # a card is told the story more often, and what a call is for differs
@row("an exception of the story's own", DENSITY, first=1, later=4, late=15, rows=-1)
def test_the_users_exception_comes_through(method, case):
    """At whatever call it is raised: type, text and line are the user's, and Pyro's stack is empty afterwards."""
    comes_through(method, case, lambda call: call == case)


@row("an exception of the story's own", DENSITY, first=1, later=4, late=15)
def test_a_story_that_fails_from_some_call_on_is_told(method, case):
    """Wherever it runs, though a call that only looks at the story may let one failure pass."""
    comes_through(method, case, lambda call: call >= case)


def comes_through(method, case, fails):
    """Fit a story that raises an exception of the user's own at some calls."""
    calls = [0]

    def story(x):
        calls[0] += 1
        if fails(calls[0]) or (case == -1 and len(x) == 30):
            raise Slip("mine")
        location(x)

    try:
        posterior = answer(story, X, method)
        assert calls[0] < case, "the exception was swallowed"
        sound(posterior)
    except Slip as error:
        assert str(error) == "mine"
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        assert frames[-1] == "story"
    assert not _PYRO_STACK and not pyro.get_param_store().keys()
    sound(answer(location, X, method))


@row(
    "an exception of the story's own",
    DENSITY,
    key=KeyError("mine"),
    value=ValueError("mine"),
    runtime=RuntimeError("mine"),
    index=IndexError("mine"),
    none=AttributeError("mine"),
)
def test_ordinary_exceptions_of_the_story_come_through(method, case):
    def story(x):
        raise case

    with pytest.raises(type(case)) as error:
        answer(story, X, method)
    assert error.value is case or "mine" in str(error.value)
    assert not _PYRO_STACK


@row("a flat prior", (*SAMPLING, "svi"))
def test_a_flat_prior_runs_and_is_told(method):
    """Pyro's own initialisation of NUTS cannot draw from it."""

    def story(x):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    options = SVI(steps=600, starts=1, draws=200) if method == "svi" else QUICK[method]
    posterior = sound(fit(story, X[:, 0] + 3, options, seed=0))
    assert float(posterior.draws["loc"].mean()) == pytest.approx(float(X[:, 0].mean()) + 3, abs=0.25)
    if method == "svi":
        assert any("improper" in w for w in posterior.warnings)


@row("a flat prior", ("em",))
def test_a_flat_prior_is_maximum_likelihood(method):
    def story(x):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    found = answer(story, X[:, 0], method).draws["loc"]
    assert float(found) == pytest.approx(float(X[:, 0].mean()), abs=1e-6)


@row("a flat prior", SAMPLING)
def test_calibration_says_that_a_flat_prior_cannot_be_drawn_from(method):
    from inference import check

    def story(x=None, num_data=5):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", num_data if x is None else len(x)):
            return pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'loc'.*improper"):
        check(story, None, method, simulations=5, seed=0)
    with pytest.raises(ValueError, match=r"'loc'.*improper"):
        simulate(story, seed=0)


@row("an observation of density zero", ("em",))
def test_rates_of_counts_stay_positive(method):
    """All counts zero: the rate's posterior lies near 0 and its logarithm must not be -inf."""

    def story(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    rate = sound(answer(story, COUNTS * 0, method)).draws["rate"]
    assert 0 < float(rate) < 1 and math.isfinite(math.log(float(rate)))


@row("nothing is observed", ("svi",))
def test_a_class_or_a_number_is_no_story(method):
    with pytest.raises(TypeError, match="make one first"):
        fit(dict, X, method)
    with pytest.raises(TypeError, match="got int"):
        fit(3, X, method)
    with pytest.raises(TypeError, match="guide must be"):
        fit(series, X[:, 0], method, guide=3)
