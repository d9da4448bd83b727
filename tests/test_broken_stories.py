"""Broken stories are told what is wrong in their own words: plates, the dimension that does not fit, the mending line."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import SVI, fit, simulate
from inference.mending import StoryError

N, D = 50, 3


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def no_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def one_number_a_row(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def no_event(x):
    with pyro.plate("features", D):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def whole_table_as_event(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(D), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu.expand(len(x), D), 1.0).to_event(2), obs=x)


def event_of_a_vector(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(D), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mu, torch.eye(D)).to_event(1), obs=x)


def other_columns(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


def loadings_first(x):
    W = pyro.sample("W", dist.Normal(torch.zeros(D, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(W @ z, 1.0).to_event(1), obs=x)


def loadings_not_turned(x):
    W = pyro.sample("W", dist.Normal(torch.zeros(D, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)


def column_of_coefficients(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(D, 1), 5.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def plates_on_one_dimension(y):
    with pyro.plate("people", 10):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("items", 5):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", 10):
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=y)


def crossed(y):
    with pyro.plate("people", 10, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 5, dim=-1):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def plate_made_twice(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def plate_in_itself(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def if_on_a_latent(y):
    z = pyro.sample("z", dist.Bernoulli(0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(3.0 if z else 0.0, 1.0), obs=y)


def int_of_rows(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(torch.tensor([0.0, 3.0])[int(z)], 1.0), obs=y)


def index_of_floats(y):
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def one_centre_for_all(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(4) / 4))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def too_few_centres(y):
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(4) / 4))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def negative_spread(y):
    s = pyro.sample("s", dist.Normal(-5.0, 0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, s), obs=y)


def same_name(y):
    for _ in range(2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def three_classes(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


TABLE, COLUMN = rows(N, D), rows(N)
CASES = [
    (no_plate, COLUMN, ["'y'", "50 values lie outside a plate", 'with pyro.plate("data", 50):', ".to_event(1)"]),
    (one_number_a_row, COLUMN[:, None], ["'data' of size 50", "dimension 1 of the data, 1 long", "y.squeeze(-1)"]),
    (no_event, TABLE, ["'x' holds 3 values inside plate 'data' of size 50", "dimension -1", "append `.to_event(1)`"]),
    (whole_table_as_event, TABLE, ["'data' of size 50", "have 2 dimensions and need 3", "`.to_event(1)` instead of 2"]),
    (event_of_a_vector, TABLE, ["site 'x'", "`.to_event(1)` binds 1 dimensions", "leave `.to_event` out"]),
    (other_columns, TABLE, ["dimension 1 of the data is 3 long and should be 4", "give its parameters shape (3,)"]),
    (
        loadings_first,
        TABLE,
        ["site 'x'", "W (3, 2) is 2, the first of z (50, 2) is 50", "mend: rows come first: z @ W.mT"],
    ),
    (loadings_not_turned, TABLE, ["'data' of size 50, one event (2,)", "the first of W (3, 2) is 3", "mend: z @ W.mT"]),
    (
        column_of_coefficients,
        {"x": TABLE, "y": COLUMN},
        ["dim -2", "a column (50, 1) has met a row (50,)", ".squeeze(-1)"],
    ),
    (plates_on_one_dimension, rows(10), ["dimension 0 has 10 entries", "'people' and 'items' cross", "dim=-2"]),
    (
        crossed,
        rows(5, 10),
        ["'people' of size 10, plate 'items' of size 5", "is 5 long and should be 10", "observe y.mT"],
    ),
    (
        plate_made_twice,
        COLUMN,
        ["plate 'data' of size 50 is made twice", 'data = pyro.plate("data", 50)', "with data:"],
    ),
    (plate_in_itself, COLUMN, ["after site 'z'", "duplicate plate 'data'", "one plate stands inside another"]),
    (if_on_a_latent, COLUMN, ["site 'y'", "3.0 if z else 0.0", "all its states", "torch.where(z > 0, a, b)"]),
    (int_of_rows, COLUMN, ["int(z)", "one a row of", "table[z.long()]"]),
    (index_of_floats, COLUMN, ["mu[z]", "'components' of size 2", "Bernoulli and Poisson draw floats", "z.long()"]),
    (one_centre_for_all, COLUMN, ["mu[z]", "has 0 dimensions", 'with pyro.plate("components", K):']),
    (too_few_centres, COLUMN, ["mu[z]", "beyond the end of the table", "the same number K"]),
    (negative_spread, COLUMN, ["scale of Normal must satisfy GreaterThan", "mend: draw scale from a positive"]),
    (same_name, COLUMN, ["two sites are called 'mu'", 'with pyro.plate("components", K):']),
    (three_classes, torch.arange(N) % 3 + 1, ["Labels run from 1 to 3", "use y - 1"]),
    (counts, COLUMN.abs(), ["'y'", "Counts are whole numbers", "Normal"]),
    (one_number_a_row, {"z": COLUMN}, ["data has ['z']", "arguments are ['y']"]),
]


@pytest.mark.parametrize(("story", "data", "words"), CASES, ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)])
def test_message_has_plates_dimension_and_mending_line(story, data, words, untouched):
    """A message of PyTorch's own ("mat1 and mat2 shapes cannot be multiplied") names no site, plate or remedy."""
    with pytest.raises((ValueError, TypeError)) as error:
        fit(story, data, seed=0)
    for word in words:
        assert word in str(error.value)


def mended_loadings(x):
    W = pyro.sample("W", dist.Normal(torch.zeros(D, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.mT, 1.0).to_event(1), obs=x)


def mended_plates(y):
    people, items = pyro.plate("people", 10, dim=-2), pyro.plate("items", 5, dim=-1)
    with people:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with items:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with people, items:
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=y)


def mended_if(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    z = pyro.sample("z", dist.Bernoulli(0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu + torch.where(z > 0, 3.0, 0.0), 1.0), obs=y)


def mended_column(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(D, 1), 5.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ beta).squeeze(-1), 1.0), obs=y)


@pytest.mark.parametrize(
    ("story", "data"),
    [
        (mended_loadings, TABLE),
        (mended_plates, rows(10, 5)),
        (mended_if, COLUMN),
        (mended_column, {"x": TABLE, "y": COLUMN}),
    ],
)
def test_the_mending_line_mends(story, data):
    """Advice that does not run is worse than none."""
    fit(story, data, SVI(guide="mean_field", steps=3, starts=1, draws=5), seed=0)


def test_what_a_story_raises_itself_passes_through():
    """A story's own check must not be dressed up as an error of shape, whatever its type."""

    def careful(y):
        if len(y) < 100:
            raise RuntimeError("a hundred rows at least")
        pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)

    with pytest.raises(RuntimeError, match=r"^a hundred rows at least$") as error:
        fit(careful, COLUMN)
    assert not isinstance(error.value, StoryError)


def test_retold_error_keeps_its_cause_and_its_line():
    """The line shown is the story's, also where the error comes from a function that the story calls."""

    def decode(z, W):
        return torch.matmul(z, W)

    def story(x):
        W = pyro.sample("W", dist.Normal(torch.zeros(D, 2), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z, W), 1.0).to_event(1), obs=x)

    with pytest.raises(StoryError, match=r"return torch.matmul\(z, W\)") as error:
        fit(story, TABLE)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_a_story_that_stops_while_it_dreams_is_told_in_the_same_words(untouched):
    """PyTorch's words and Pyro's table of shapes instead of the line that mends it, where no data are given."""

    def broken(num_data=7):
        spread = pyro.sample("spread", dist.Uniform(-2.0, -1.0))
        with pyro.plate("data", num_data):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, spread))

    with pytest.raises(StoryError) as caught:
        simulate(broken, seed=0)
    told = str(caught.value)
    assert "stops at site 'x'" in told and "z       (7,)  in plate 'data' of size 7" in told
    assert "mend: draw scale from a positive distribution" in told and "Trace Shapes" not in told
