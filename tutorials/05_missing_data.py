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
# # Missing data
#
# **The question.** A table has holes. May rows with holes be dropped, may holes be filled with the column's mean, and what
# does a generative story do instead?
#
# It does nothing special. A cell that nobody saw is one more latent variable, and a story knows what to do with those:
#
# $$p(x_{\text{seen}}) = \int p(x_{\text{seen}}, x_{\text{hidden}})\, \mathrm d x_{\text{hidden}}.$$

# %%
# %matplotlib inline
import math

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

from inference import EM, NUTS, draw_plates, fit
from zoo import GMM, FactorAnalysis, MixedMixture, load


def punched(x, share, seed=0):
    """The table with a share of its cells hidden, at random."""
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(hidden, torch.nan, x), hidden


# %% [markdown]
# ## Two habits that cost
#
# Six test scores of 300 people, which two abilities explain. A third of the cells is lost, at random.

# %%
scores = load("two_factors").x
holes, hidden = punched(scores, 1 / 3)
complete = ~hidden.any(1)
print(f"{hidden.sum()} cells of {hidden.numel()} are hidden; {complete.sum()} of {len(scores)} rows are complete")
assert abs(complete.double().mean() - (2 / 3) ** 6) < 0.03

# %% [markdown]
# *Dropping rows* keeps $(2/3)^6 = 9\,\%$ of them. *Filling with the mean* keeps all rows, and pulls every hidden cell to the
# middle: variances shrink by a third, covariances by more. Factor analysis sums the hidden cells out.

# %%
truth = torch.cov(scores.T)
dropped = torch.cov(scores[complete].T)
mean_filled = torch.cov(torch.where(hidden, holes.nanmean(0), scores).T)
factors = fit(FactorAnalysis(2), holes, EM(), seed=0)
d = factors.draw(0)
by_story = d["W"] @ d["W"].T + torch.diag(d["psi"])
error = {
    "rows dropped": (dropped - truth).abs().mean(),
    "filled with means": (mean_filled - truth).abs().mean(),
    "summed out": (by_story - truth).abs().mean(),
}
for name, value in error.items():
    print(f"{name:<18} mean error of a covariance {value:.3f}")
assert error["summed out"] < error["rows dropped"] / 2 and error["summed out"] < error["filled with means"] / 2
assert abs(mean_filled.diagonal().mean() / truth.diagonal().mean() - 2 / 3) < 0.05

# %% [markdown]
# In the diagram nothing has changed: some of the shaded circles of some rows are white now, that is all.

# %%
figure = draw_plates(FactorAnalysis(2), scores, title="Two abilities, six scores")
figure

# %% [markdown]
# ## What stood there?
#
# `impute` answers with a distribution for every hidden cell: a mean, an interval and draws. Nine of ten intervals should hold
# the truth, and we can count. (EM gives one point for the loadings; that they are uncertain is not in
# the intervals, which are a little narrow.)

# %%
filled = factors.impute(seed=0)
print(filled)
where = tuple(filled.index.T)
inside = ((filled.lower <= scores[where]) & (scores[where] <= filled.upper)).double().mean()
rmse = (filled.mean - scores[where]).square().mean().sqrt()
by_mean = (holes.nanmean(0)[where[1]] - scores[where]).square().mean().sqrt()
print(f"{inside:.0%} of the 90 % intervals hold the truth; error {rmse:.2f}, of the column's mean {by_mean:.2f}")
assert 0.83 < inside < 0.94 and rmse < 0.85 * by_mean

# %% [markdown]
# ## Half a digit
#
# The same with pictures: the lower half of some digits is covered. A mixture of Gaussians has seen how digits hang together.

# %%
digits = load("digits").x / 16
train, test = digits[:1500], digits[1500:1510]
posterior = fit(GMM(20, covariance="tied", scale=0.5, loc=0.3), train, EM(restarts=1), seed=0)
covered = test.clone()
covered[:, 32:] = math.nan
guess = posterior.impute(covered, seed=0)
restored = covered.clone()
restored[tuple(guess.index.T)] = guess.mean

figure = Figure(figsize=(8, 2.6), layout="constrained")
axes = figure.subplots(3, 10)
for row, (name, images) in enumerate({"true": test, "seen": covered, "guessed": restored}.items()):
    for ax, image in zip(axes[row], images):
        ax.imshow(image.reshape(8, 8), cmap="Greys", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(name, fontsize=8)
below = (restored - test)[:, 32:].square().mean().sqrt()
average = (train.mean(0) - test)[:, 32:].square().mean().sqrt()
print(f"error of the covered pixels: {below:.3f}, of the average digit {average:.3f}")
assert below < 0.85 * average
figure

# %% [markdown]
# ## Why is it missing?
#
# So far holes were punched *completely at random*. Rubin's three cases:
#
# - **Completely at random**: whether a cell is hidden depends on nothing. Dropping rows is wasteful but not wrong.
# - **At random**: it depends on what *was* seen. Dropping rows is wrong; a story of all columns is right.
# - **Not at random**: it depends on the hidden value itself. Then the hiding belongs in the story.
#
# The second case: the second column is hidden wherever the first is positive.

# %%
generator = torch.Generator().manual_seed(1)
first = torch.randn(2000, generator=generator).double()
second = 0.8 * first + 0.6 * torch.randn(2000, generator=generator).double()
table = torch.stack([first, torch.where(first > 0, torch.nan, second)], -1)
one = fit(GMM(1), table, EM(estimate="mle"), seed=0)
of_seen, of_story = float(table[:, 1].nanmean()), float(one.draws["mu"][0, 0, 1])
print(f"mean of the second column: true 0, of the seen rows {of_seen:.2f}, by the story {of_story:.2f}")
assert of_seen < -0.5 and abs(of_story) < 0.1

# %% [markdown]
# The third case: people are asked for a number, and the higher it is, the rarer they tell it. The seen ones are too low,
# and no story of the numbers alone can know. So we tell how they came to be missing: $m_n \sim \mathrm{Bernoulli}(\sigma(2
# x_n))$, one for *not told*.

# %%
value = torch.randn(300, generator=generator).double() + 1.0
missing = torch.rand(300, generator=generator).double() < torch.sigmoid(2 * (value - 1.0))
seen = value[~missing]


def asked(x, num_missing):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("told", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        pyro.sample("m", dist.Bernoulli(logits=2 * (x - 1.0)), obs=torch.zeros_like(x))
    with pyro.plate("silent", num_missing):
        hidden = pyro.sample("hidden", dist.Normal(mu, 1.0))
        pyro.sample("n", dist.Bernoulli(logits=2 * (hidden - 1.0)), obs=torch.ones(num_missing))


figure = draw_plates(asked, seen, int(missing.sum()), title="The silence belongs to the story")
answer = fit(asked, {"x": seen, "num_missing": int(missing.sum())}, NUTS(chains=2, warmup=300, draws=500), seed=0)
low, high = torch.quantile(answer.draws["mu"], torch.tensor([0.05, 0.95]).double()).tolist()
print(f"mean of those who told {seen.mean():.2f}; by the story {low:.2f} to {high:.2f}; true 1")
assert seen.mean() < 0.7 and low < value.mean() < high
figure

# %% [markdown]
# The price: the answer depends on what was said about the silence, and the data cannot check it. That is so for every answer;
# a story says it aloud.
#
# ## Exercises
#
# 1. A colleague fills holes by their conditional means, and then computes the variance of the columns. Too large or too
#    small? What do *draws* of the hidden cells give?
# 2. Two kinds of patients with real, count, binary and categorical columns: hide a fifth of the measurements, and compare the
#    diagnoses.
# 3. Half of the rows of an iris have no petals in the table. How sure is the mixture of the kind of flower with and without?
#
# ### Solutions

# %%
# 1. Conditional means have no noise of their own: too small. Draws have.
by_means, by_draws = scores.clone(), scores.clone()
by_means[where], by_draws[where] = filled.mean, filled.draws[0]
ratios = [float((t.var(0) / scores.var(0)).mean()) for t in (by_means, by_draws)]
print(f"variance against the true one: means {ratios[0]:.2f}, draws {ratios[1]:.2f}")
assert ratios[0] < 0.93 and abs(ratios[1] - 1) < 0.06

# 2. The diagnosis loses little: the other columns still speak.
story, arguments = MixedMixture.example()
labels = load("patients").labels
full = fit(story, arguments, seed=0)
thin = {name: punched(v, 0.2)[0] if name == "x" else v for name, v in arguments.items()}
partial = fit(story, thin, seed=0)


def right(posterior):
    hits = (posterior.local("z").argmax(1) == labels).double().mean()
    return float(torch.maximum(hits, 1 - hits))


print(f"diagnosis right: {right(full):.0%} with all cells, {right(partial):.0%} with a fifth missing")
assert right(full) >= right(partial) - 0.02 > 0.85

# 3. Without petals two of the kinds look alike.
iris = load("iris")
kinds = fit(GMM(3), iris.x, seed=0)
short = iris.x.clone()
short[:, 2:] = math.nan
sure = [float(kinds.local("z", t).max(1).values.mean()) for t in (iris.x, short)]
print(f"mean certainty: {sure[0]:.0%} with petals, {sure[1]:.0%} without")
assert sure[0] > 0.95 and sure[1] < sure[0] - 0.08
