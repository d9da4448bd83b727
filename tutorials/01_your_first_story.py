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
# # Your first story
#
# **The question.** A bus stop is watched for 200 quarters of an hour, and the people who arrive are counted. Some
# quarters are quiet and some are busy, but nobody wrote down which. How many people arrive in a quiet and in a busy
# quarter, and which quarters were busy?
#
# We tell how the counts could have come about, and let inference run the story backwards.

# %%
# %matplotlib inline
import pyro
import pyro.distributions as dist
import torch

from inference import NUTS, choose, compare, draw_plates, fit, inspect, simulate, story_text

# %% [markdown]
# ## A story is a function
#
# Every line that samples is one line of the story. What is shared by all quarters is said once; what belongs to one
# quarter stands inside the plate `"data"`: a plate means *and so on for every one of them, independently*.

# %%
K = 2


def bus_stop(x=None, num_data=200):
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))  # how common each kind of quarter is
    with pyro.plate("components", K):
        lam = pyro.sample("lam", dist.Gamma(2.0, 0.2))  # arrivals in a quarter of this kind
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Categorical(pi))  # the kind of quarter n
        return pyro.sample("x", dist.Poisson(lam[z]), obs=x)  # the people counted in it


# %% [markdown]
# With nothing observed the story dreams. Let it dream a bus stop whose truth we know.

# %%
truth = {"pi": torch.tensor([0.7, 0.3]), "lam": torch.tensor([3.0, 12.0])}
dream = simulate(bus_stop, given=truth, num_data=200, seed=1)
x, busy = dream["x"], dream["z"]
print("first counts:", x[:10].int().tolist())
print("busy quarters:", int(busy.sum()), "of", len(busy))

# %% [markdown]
# ## The plate diagram
#
# Circles are the random variables, a shaded one is observed, arrows say who depends on whom, and the box is the plate.

# %%
figure = draw_plates(bus_stop, x, title="People at a bus stop")
print(story_text(bus_stop, x))
figure

# %% [markdown]
# ## What the layer reads off the story
#
# `inspect` runs it and tells what is local (inside the data plate), what is global, and what can be summed out. `z` has
# two states in every quarter, so all its possibilities can be added up: a table of 2 × 200 numbers.

# %%
structure = inspect(bus_stop, x)
print(structure)
assert structure["z"].local and structure["z"].states == 2
assert not structure["lam"].local

# %% [markdown]
# ## Which inference, and why
#
# Three methods could answer. The choice comes with the premise behind it, and so do the others.

# %%
print(choose(structure))
posterior = fit(bus_stop, x, seed=0)
print()
print(posterior)
assert posterior.kind == "point"  # expectation maximisation: exact for z, a point for pi and lam

# %% [markdown]
# The two rates come out near the truth (3 and 12). Components have no names, so they are listed by weight: rates are
# compared in ascending order.

# %%
rates = posterior.draws["lam"][0].sort().values
print("rates:", [round(v, 2) for v in rates.tolist()])
assert abs(rates[0] - 3.0) < 0.5 and abs(rates[1] - 12.0) < 1.5

# %% [markdown]
# ## Which quarters were busy?
#
# `posterior.local("z")` is the posterior $p(z_n = k \mid x)$ of every quarter: soft clustering. A count of 1 is a quiet
# quarter for sure, a count of 7 is undecided. The same call answers for counts that were never seen.

# %%
probabilities = posterior.local("z")
busiest = int(posterior.draws["lam"][0].argmax())
guess = probabilities.argmax(-1) == busiest
accuracy = (guess == busy.bool()).double().mean()
print(f"right for {accuracy:.0%} of the quarters")
assert accuracy > 0.9

new = posterior.local("z", torch.tensor([1.0, 7.0, 20.0]))[:, busiest]
print("busy with probability", [round(p, 3) for p in new.tolist()], "after counting 1, 7 and 20")
assert new[0] < 0.01 and 0.05 < new[1] < 0.95 and new[2] > 0.99

# %% [markdown]
# ## The same question by three methods
#
# `compare` keeps a fifth of the quarters back, fits with each method and puts the answers side by side. NUTS draws from
# the whole posterior, SVI fits a distribution to it, EM finds its mode: for 160 counts they should agree.

# %%
comparison = compare(bus_stop, x, methods=["em", "svi", NUTS(chains=4, warmup=200, draws=250)], seed=0)
print(comparison)
figure = comparison.plot()
assert set(comparison.posteriors) == {"em", "svi", "nuts"}
figure

# %% [markdown]
# The draws say how sure we may be: an interval for the busy rate instead of one number.

# %%
draws = comparison.posteriors["nuts"].draws["lam"].max(-1).values
low, high = torch.quantile(draws, torch.tensor([0.05, 0.95], dtype=draws.dtype)).tolist()
print(f"busy quarters see {low:.1f} to {high:.1f} people with probability 0.9")
assert low < 12.0 < high + 1.0
assert comparison.posteriors["nuts"].diagnostics["rhat"] < 1.02

# %% [markdown]
# ## Exercises
#
# 1. Tell the story with three kinds of quarters (`K = 3`) and compare its held-out log density with that of two.
# 2. What does the layer say if `z` is drawn from `dist.Poisson(1.0)` instead? Read `choose(inspect(...))`.
# 3. Forget the plate: what happens to `pyro.sample("x", dist.Poisson(5.0), obs=x)` outside of `pyro.plate`?
#
# ### Solutions

# %%
# 1. A third kind is not needed: the held-out log density hardly moves.
K = 3
three = fit(bus_stop, x[:160], seed=0).log_prob(x[160:]).mean()
K = 2
two = fit(bus_stop, x[:160], seed=0).log_prob(x[160:]).mean()
print(f"held-out log density a quarter: two kinds {two:.3f}, three kinds {three:.3f}")
assert abs(two - three) < 0.1


# 2. A count without an upper end cannot be summed out: every method is refused, with the reason.
def endless(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Poisson(1.0))
        pyro.sample("x", dist.Poisson(1.0 + z), obs=x)


try:
    choose(inspect(endless, x))
except ValueError as error:
    print(error)
    assert "infinitely many" in str(error)


# 3. Two hundred numbers outside a plate: are they one vector or independent? The error asks, and gives both lines.
def no_plate(x):
    pyro.sample("x", dist.Poisson(5.0), obs=x)


try:
    fit(no_plate, x)
except ValueError as error:
    print(error)
    assert "pyro.plate" in str(error) and "to_event" in str(error)
