# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Ten broken stories
#
# **The question.** Almost every new story fails at first, and almost always over a shape. What do the ten classic mistakes
# look like, what does each get told, and which line mends it?
#
# One sum explains all of them. A value has the shape
#
# $$\text{plates} + \text{one event},$$
#
# plates on the left, the event on the right. Fifty rows of three numbers are `(50, 3)`: a plate `data` of size 50, and an
# event `(3,)` if a row is one vector. Every dimension of every value has to be accounted for, once.

# %%
# %matplotlib inline
import pyro
import pyro.distributions as dist
import torch

from inference import draw_plates, fit, inspect

generator = torch.Generator().manual_seed(0)
x = torch.randn(50, 3, generator=generator) + 2.0  # fifty rows, three columns
y = torch.randn(50, generator=generator)  # fifty numbers
told = {}


def show(number, story, data):
    """Try to fit a broken story, and print what it is told."""
    try:
        fit(story, data, seed=0)
    except ValueError as error:
        told[number] = str(error)
        print(error)
    else:
        raise AssertionError(f"story {number} is not broken")


def whole(story, data):
    """A mended story's sites, every dimension explained."""
    structure = inspect(story, data)
    print(structure)
    return structure


# %% [markdown]
# ## 1. No plate
#
# Fifty numbers, and nobody said whether they are fifty independent ones or one vector of fifty. Both are stories, and they
# are different ones.


# %%
def no_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


show(1, no_plate, y)
assert 'with pyro.plate("data", 50):' in told[1]


# %%
def heights(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


assert whole(heights, y)["y"].plates == ("data",)

# %% [markdown]
# ## 2. A column instead of a row
#
# Data frames and matrices like columns, (50, 1). The plate explains 50, and nobody explains the 1. Plain Pyro accepts this
# under NUTS, spreads (50,) against (50, 1) to (50, 50), and counts each row fifty times: an answer far too sure of itself.

# %%
show(2, heights, y[:, None])
assert "dimension 1 of the data, 1 long, belongs to no plate" in told[2] and "y.squeeze(-1)" in told[2]

# %% [markdown]
# ## 3. A vector that was not told to be one
#
# Three columns a row, and `Normal(mu, 1)` with three values of `mu`. The rightmost dimension of length 3 now stands where
# the plate of 50 has its place.


# %%
def measurements(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


show(3, measurements, x)
assert "'x' holds 3 values inside plate 'data' of size 50" in told[3] and ".to_event(1)" in told[3]


# %%
def measurements(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


assert whole(measurements, x)["x"].event_shape == (3,)

# %% [markdown]
# The diagram says the same without a number: what is in the plate is repeated, what is outside is shared.

# %%
figure = draw_plates(measurements, x, title="Fifty rows of three measurements")
figure

# %% [markdown]
# ## 4. A vector twice over
#
# A `MultivariateNormal` is a distribution of vectors already. `.to_event(1)` would bind a dimension that it does not have.


# %%
def correlated(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mu, torch.eye(3)).to_event(1), obs=x)


show(4, correlated, x)
assert "leave `.to_event` out" in told[4]

# %% [markdown]
# ## 5. Rows that do not line up
#
# Covariates of fifty rows, and forty answers.


# %%
def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


show(5, regression, {"x": x, "y": y[:40]})
assert "dimension 0 of the data is 40 long and should be 50" in told[5]

# %% [markdown]
# ## 6. A product the wrong way round
#
# On paper it is $W z_n$. In code the rows of the plate come first, so that it is `z @ W.mT` for all rows at once. The message
# shows the line, what was sampled so far, and the two lengths that should have been one.


# %%
def factors(x):
    W = pyro.sample("W", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(W @ z, 1.0).to_event(1), obs=x)


show(6, factors, x)
assert "mend: rows come first: z @ W.mT" in told[6]

# %% [markdown]
# ## 7. A column of coefficients
#
# `beta` of shape (3, 1) makes `x @ beta` a column (50, 1). It meets the plate's (50,), and becomes a table of 50 × 50.


# %%
def column(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, 1), 5.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


show(7, column, {"x": x, "y": y})
assert "a column (50, 1) has met a row (50,)" in told[7]

# %% [markdown]
# ## 8. Two plates on one dimension
#
# Ten people answer five questions; ability less difficulty decides. Both plates took the last dimension, and 10 does not fit
# 5. Plates that cross need a dimension each, and each plate is made once and entered wherever it is needed.


# %%
def test(y):
    with pyro.plate("people", 10):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("items", 5):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", 10):
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=y)


answers = torch.randn(10, 5, generator=generator)
show(8, test, answers)
assert "plates 'people' and 'items' cross" in told[8] and "dim=-2" in told[8]


# %%
def test(y):
    people, items = pyro.plate("people", 10, dim=-2), pyro.plate("items", 5, dim=-1)
    with people:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with items:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with people, items:
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=y)


assert whole(test, answers)["y"].plates == ("people", "items")
figure = draw_plates(test, answers, title="Ability and difficulty")
figure

# %% [markdown]
# ## 9. `if` on a latent
#
# Python's `if` wants one yes or no. A latent in a plate is fifty of them, and a latent that is summed out is all its states
# at once. Nothing is decided in a story: both branches are told, and `torch.where` or an index joins them.


# %%
def switch(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(3.0 if z else 0.0, 1.0), obs=y)


show(9, switch, y)
assert "torch.where(z > 0, a, b)" in told[9]

# %% [markdown]
# ## 10. Labels that count from one
#
# Not a shape, but as common: 1, 2, 3 instead of 0, 1, 2. The support of the distribution knows.


# %%
def ballot(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


show(10, ballot, torch.arange(50) % 3 + 1)
assert "they must count from 0" in told[10] and "use y - 1" in told[10]

# %% [markdown]
# ## What to remember
#
# Read a shape from the right: the event first, then the plates from the innermost out. If a message names a dimension, ask
# which plate it belongs to; if there is none, either a plate or a `.to_event` is missing, or the dimension should go.
#
# ## Exercises
#
# Mend the stories 4, 6, 7 and 9. Then find out what this one means, which no message can complain of: `mu` is sampled
# *inside* the plate.
#
# ### Solutions


# %%
def correlated(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mu, torch.eye(3)), obs=x)


def factors(x):
    W = pyro.sample("W", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.mT, 1.0).to_event(1), obs=x)


def column(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, 1), 5.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ beta).squeeze(-1), 1.0), obs=y)


def switch(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(torch.where(z > 0, 3.0, 0.0), 1.0), obs=y)


assert whole(correlated, x)["x"].event_shape == (3,)
assert whole(factors, x)["z"].local
assert whole(column, {"x": x, "y": y})["y"].plates == ("data",)
assert whole(switch, y)["z"].states == 2


# %% [markdown]
# The last one is a story, only another than was meant: every row has a mean of its own. What is written inside the plate is
# drawn again for each row, nothing is shared, and each `mu` follows its row: $\mathbb E[\mu_n \mid y_n] = y_n \cdot 25/26$.


# %%
def alone(y):
    with pyro.plate("data", len(y)):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


structure = whole(alone, y)
assert structure["mu"].local and structure["mu"].shape == (50,)
together = fit(heights, y, seed=0).diagnostics["mean"]["mu"]
print(f"one mean for all: {float(together):.3f}, the average {float(y.mean()):.3f}")
assert abs(float(together) - float(y.mean())) < 0.01
