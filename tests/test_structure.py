"""What `inspect` reads off a story, and the mistakes that it refuses for every method."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import (
    SCHOOLS,
    box,
    coupled_bits,
    eight_schools,
    gaussian_mixture,
    generator,
    hidden_markov,
    mixed_columns,
    mixed_columns_data,
    poisson_latent,
    ppca,
)

from inference import EM, NUTS, SVI, fit, inspect

METHODS = ["em", "svi", "nuts"]
ROWS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def test_mixture_structure(untouched):
    s = inspect(gaussian_mixture, ROWS)
    assert s.data_plate == "data" and s.num_rows == 20 and s.row_arguments == ("x",)
    assert [site.name for site in s.globals] == ["pi", "mu", "precision"]
    assert s["z"].local and s["z"].states == 3 and s["z"].enumerable and s["z"].parents == ("pi",)
    assert set(s["x"].parents) == {"mu", "precision", "z"} and s["x"].argument == "x"
    assert s.enumeration_elements() == 3 * 20 and s.enumeration_bytes() == 3 * 20 * 8
    assert "summing out z" in str(s)


def test_deterministic_sites_are_seen_through():
    s = inspect(eight_schools, SCHOOLS)
    assert s["theta"].kind == "deterministic" and set(s["theta"].parents) == {"mu", "tau", "raw"}
    assert set(s["y"].parents) == {"mu", "tau", "raw"} and set(s["y"].direct_parents) == {"theta"}
    assert s.data_plate == "schools" and s["raw"].local and not s["mu"].local


def test_chain_costs_little_and_a_clique_too_much():
    assert inspect(hidden_markov, torch.randn(5, 12)).enumeration_elements() == 5 * 2 * 2
    assert inspect(coupled_bits, torch.randn(3)).enumeration_elements() >= 3 * 2.0**40


def test_infinite_moving_implicit_and_missing():
    assert inspect(poisson_latent, torch.randn(4))["n"].states is None
    assert inspect(box, torch.rand(5))["x"].moving_support
    assert inspect(generator, torch.rand(5)).implicit
    x = torch.randn(6, 3)
    x[2, 1] = np.nan
    s = inspect(ppca, x)
    assert s["x"].missing == 1 and s["z"].local and s.continuous_locals


def test_factor_is_marked_unnormalised():
    def story(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(mu**2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    assert [s.name for s in inspect(story, torch.randn(3)).unnormalised] == ["penalty"]


def test_rows_are_found_whatever_the_plate_is_called():
    s = inspect(mixed_columns, mixed_columns_data(30))
    assert s.data_plate == "rows" and s.row_arguments == ("b", "c", "k")


def test_the_outermost_plate_holds_the_rows():
    """Documents x words with the words on the first axis: the rows are still the documents."""

    def topics(w):
        phi = pyro.sample("phi", dist.Dirichlet(torch.ones(2, 5)).to_event(1))
        with pyro.plate("documents", w.shape[1]):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", w.shape[0]):
                z = pyro.sample("z", dist.Categorical(theta))
                pyro.sample("w", dist.Categorical(phi[z]), obs=w)

    s = inspect(topics, torch.zeros(8, 6, dtype=torch.long))
    assert s.data_plate == "documents" and s["theta"].local and s.row_arguments == ()


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def outside(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def forgotten_plate(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.mean(), 1.0), obs=y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("story", "data", "words"),
    [
        (normal, torch.randn(5, 1), ["'y'", "'data'", "squeeze(-1)"]),
        (normal, torch.tensor(1.0), ["'y'", "'data'", "expand"]),
        (normal, torch.randn(7), ["'y'", "'data'", "lengths equal"]),
        (outside, torch.randn(5), ["'y'", 'pyro.plate("data", 5)', "to_event(1)"]),
        (forgotten_plate, torch.randn(5), ["'mu'", 'pyro.plate("components", 3)', "to_event(1)"]),
    ],
)
def test_shape_mistakes_name_site_plate_and_mending_line(story, data, words, method, untouched):
    """Plain Pyro accepts several of these in silence under NUTS and returns a wrong posterior."""
    with pytest.raises(ValueError) as error:
        fit(story, data, method)
    for word in words:
        assert word in str(error.value)


def test_lengths_of_two_arguments():
    def story(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"\(7,\).*\(5,\)"):
        inspect(story, {"X": torch.randn(5, 2), "y": torch.randn(7)})


def test_mismatch_inside_a_plate_is_translated():
    def story(x):
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'x' holds 3 values inside plate 'data' of size 4"):
        inspect(story, torch.zeros(3))


def test_two_sites_of_one_name():
    def story(x):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="two sites are called 'a'"):
        inspect(story, torch.tensor(0.0))


def test_a_branch_on_a_random_value(untouched):
    def story(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        if a > 0:
            pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    with pytest.raises(ValueError, match="'b'"):
        inspect(story, torch.tensor(0.0))


def test_the_users_exception_comes_through(untouched):
    def story(x):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(story, torch.zeros(3))


@pytest.mark.parametrize("method", [EM(), SVI(), NUTS()])
def test_methods_are_frozen_and_have_names(method):
    assert method.name in METHODS
    with pytest.raises(AttributeError):
        method.name2 = "x"
