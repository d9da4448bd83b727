"""Bad data and broken stories: an error before any work that names the argument or site and says what to do."""

import concurrent.futures
import threading

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from stories import beta_bernoulli, gaussian_mixture, normal_mixture, regression

from inference import EM, fit, inspect

METHODS = ["em", "svi", "nuts"]
GOOD = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)).double()
QUICK = EM(restarts=1, max_iter=3)


def broken(index, value):
    x = GOOD.clone()
    x[index] = value
    return x


def poisson_rate(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def categorical(x):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(p), obs=x)


def student(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateStudentT(torch.tensor(5.0), loc, torch.eye(3)), obs=x)


VALUES = {
    "+inf": (gaussian_mixture, broken((3, 1), np.inf), ValueError, [r"x holds 1 infinite", r"\(3, 1\)"]),
    "-inf": (gaussian_mixture, broken((5, 0), -np.inf), ValueError, [r"-inf", r"\(5, 0\)"]),
    "NaN without a marginal": (
        student,
        broken((2, 1), np.nan),
        ValueError,
        ["x holds 1 NaN", r"\(2, 1\)", "MultivariateNormal"],
    ),
    "NaN in a covariate": (
        regression,
        {"X": broken((5, 2), np.nan), "y": GOOD[:, 0]},
        ValueError,
        ["X holds 1 NaN", r"\(5, 2\)", "covariate"],
    ),
    "column of NaN": (gaussian_mixture, broken((slice(None), 1), np.nan), ValueError, ["column 1 of x"]),
    "no rows": (gaussian_mixture, GOOD[:0], ValueError, ["x is empty"]),
    "huge": (gaussian_mixture, GOOD * 1e30, ValueError, ["scale of x", "standardise"]),
    "negative count": (poisson_rate, torch.tensor([1.0, -2.0]), ValueError, ["'x'", "-2", "index 1"]),
    "half a count": (poisson_rate, torch.tensor([1.0, 1.5]), ValueError, ["1.5", "index 1"]),
    "label K": (categorical, torch.tensor([0, 1, 3]), ValueError, ["'x'", "0 to 2", "index 2"]),
    "label -1": (categorical, torch.tensor([0, -1]), ValueError, ["-1"]),
    "pixels": (beta_bernoulli, torch.tensor([0.0, 255.0]), ValueError, ["/ 255"]),
    "bool": (beta_bernoulli, np.array([True, False]), TypeError, ["x has dtype", "bool"]),
    "complex": (gaussian_mixture, GOOD.numpy() + 1j, TypeError, ["x has dtype complex128"]),
    "text": (gaussian_mixture, np.array([["a", "b"]]), TypeError, ["x has dtype"]),
    "objects": (gaussian_mixture, np.array([[None, 1.0]], dtype=object), TypeError, ["object"]),
    "ragged": (gaussian_mixture, [[1.0, 2.0], [3.0]], TypeError, ["x is not a rectangular array"]),
    "sparse": (gaussian_mixture, scipy.sparse.csr_matrix(np.eye(3)), TypeError, ["toarray"]),
    "data frame with words": (gaussian_mixture, pd.DataFrame({"a": [1.0], "b": ["u"]}), TypeError, ["'b'"]),
    "unknown argument": (regression, {"X": GOOD, "z": GOOD}, TypeError, ["'z'", "'X', 'y'"]),
    "missing argument": (regression, {"X": GOOD}, TypeError, ["needs \\['y'\\]"]),
    "too many parts": (beta_bernoulli, (GOOD, GOOD), TypeError, ["2 parts"]),
    "no data": (beta_bernoulli, None, ValueError, ["data is None"]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VALUES)
def test_bad_data_are_named(name, method, untouched):
    """Every method raises the same error, before any work, and nothing global changes."""
    story, data, kind, words = VALUES[name]
    with pytest.raises(kind) as error:
        fit(story, data, method)
    import re

    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} not in: {error.value}"


@pytest.mark.parametrize(
    "data",
    [
        GOOD.numpy(),
        GOOD.tolist(),
        pd.DataFrame(GOOD.numpy(), columns=list("abc")),
        GOOD.float(),
        GOOD.numpy()[::-1],
        GOOD.numpy().T.copy().T,
    ],
    ids=["numpy", "list", "data frame", "float32", "negative strides", "Fortran order"],
)
def test_forms_of_data_are_taken(data):
    assert fit(gaussian_mixture, data, QUICK, seed=0).draws["mu"].shape == (1, 3, 3)


def test_a_data_frame_is_read_by_argument_names():
    frame = pd.DataFrame({"b": [0.0, 1.0], "a": [1.0, 2.0]})

    def story(a, b):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(a)):
            pyro.sample("b", dist.Normal(w * a, 1.0), obs=b)

    assert inspect(story, frame)["b"].argument == "b"


def test_whole_numbers_are_converted_with_a_notice():
    """int64 observations of a normal, and int64 covariates of a matrix product: the same answer as floats."""
    counts = torch.arange(12)
    as_int, as_float = (fit(normal_mixture, x, QUICK, seed=0) for x in (counts, counts.double()))
    assert torch.equal(as_int.draws["mu"], as_float.draws["mu"]) and any("converted" in w for w in as_int.warnings)
    X, y = torch.arange(12).reshape(4, 3), torch.randn(4)
    assert any("converted" in w for w in fit(regression, {"X": X, "y": y}, "em", seed=0).warnings)


@pytest.mark.processor  # the story holds a tensor of its own there
def test_a_story_with_float32_tensors_runs_in_float32():
    prior = torch.zeros(3)

    def story(X, y):
        w = pyro.sample("w", dist.Normal(prior, 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ (torch.eye(3, dtype=torch.float32) @ w.float()), 1.0), obs=y)

    posterior = fit(story, {"X": GOOD, "y": GOOD[:, 0]}, "em", seed=0)
    assert any("float32" in w for w in posterior.warnings)


def test_one_row_and_constant_columns_run_with_a_warning():
    one = fit(gaussian_mixture, GOOD[:1], QUICK, seed=0)
    assert any("one row" in w for w in one.warnings)
    flat = fit(gaussian_mixture, broken((slice(None), 2), 4.0), QUICK, seed=0)
    assert any("constant" in w for w in flat.warnings)
    assert all(v.isfinite().all() for p in (one, flat) for v in p.draws.values())


def test_no_observed_site_is_refused(untouched):
    def story(x=None):
        pyro.sample("a", dist.Normal(0.0, 1.0))

    for method in METHODS:
        with pytest.raises(ValueError, match="no site is observed"):
            fit(story, torch.zeros(3), method)


def test_an_impossible_observation_names_the_site():
    def story(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Poisson(torch.zeros(2)[z]), obs=x)

    with pytest.raises(ValueError, match="'x'"):
        fit(story, torch.tensor([3.0, 1.0]), "em")


def test_a_class_or_a_number_is_no_story():
    with pytest.raises(TypeError, match="make one first"):
        fit(dict, GOOD)
    with pytest.raises(TypeError, match="got int"):
        fit(3, GOOD)
    with pytest.raises(TypeError, match="guide must be"):
        fit(gaussian_mixture, GOOD, guide=3)


def test_other_threads_are_refused_at_once():
    """Pyro's handler stack belongs to the process: a second fit at the same time would tear it."""
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def slow(x):
        inside.set()
        go_on.wait(10)
        return beta_bernoulli(x)

    worker = threading.Thread(target=lambda: fit(slow, torch.ones(5), "em", seed=0))
    worker.start()
    inside.wait(10)
    try:
        fit(beta_bernoulli, torch.ones(5), "em")
    except RuntimeError as error:
        errors.append(str(error))
    go_on.set()
    worker.join()
    assert errors and "another thread" in errors[0]
    assert fit(beta_bernoulli, torch.ones(5), "em", seed=0).draws["p"].shape == (1,)


def _serial(seed):
    return fit(normal_mixture, GOOD[:, 0], EM(restarts=1), seed=seed).draws["mu"].tolist()


@pytest.mark.processor  # the processes run there, too
def test_processes_equal_serial_runs():
    import multiprocessing

    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(_serial, [0, 1])) == [_serial(0), _serial(1)]


def test_fits_start_cold_and_are_independent(untouched):
    """Parameters of one story with the same names do not leak into the next."""

    def story(x):
        w = pyro.param("w", lambda: torch.zeros(x.shape[1]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    first = fit(story, GOOD, "em", seed=0)
    fit(story, GOOD[:, :2], "em", seed=0)
    again = fit(story, GOOD, "em", seed=0)
    assert torch.equal(first.draws["w"], again.draws["w"]) and first.history == again.history
