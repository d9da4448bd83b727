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
# # From counting to factors
#
# **The question.** What is the least a generative model can be, and what does every step beyond it buy? We begin with
# a box and a table of fifty cartoon faces, count, and arrive at mixtures, factors and chains. One method, expectation
# maximisation, answers nearly all of them, and says each time how.

# %%
# %matplotlib inline
import math

import torch
from matplotlib.figure import Figure

from inference import EM, draw_plates, fit
from zoo import (
    GMM,
    PPCA,
    BernoulliMixture,
    Box,
    CellTable,
    FactorAnalysis,
    GaussianHMM,
    KMeans,
    MixedMixture,
    NaiveBayes,
    load,
)
from zoo.data.faces import LEVELS, SIZES

# %% [markdown]
# ## A box
#
# The least there is: a uniform density on a rectangle, four numbers. The likelihood of a box that holds all points is one
# over its area for each of them, so the smallest such box is the likeliest; and the truth is certainly larger. Two rules
# for every model to come: what it dreams up looks like the data, and is no copy of them.

# %%
points = load("rectangle").x
box = fit(Box(), points, seed=0)
print(box.why().splitlines()[0])
new = box.sample(200, seed=0)["x"]
low, size = (box.draws[name].mean(0) for name in ("low", "size"))
print("corner at", low.numpy().round(2), "size", size.numpy().round(2), "seen from", points.amin(0).numpy().round(2))
assert (low < points.amin(0)).all() and (low + size > points.amax(0)).all()
assert (torch.cdist(new, points).amin(1) > 0).all()  # no copies

# %% [markdown]
# Its likelihood jumps to zero at the edge. Gradients do not see a jump, and the methods that follow them are refused:

# %%
try:
    fit(Box(), points, "nuts")
except ValueError as error:
    print(error)
    assert "gradients do not see" in str(error)

# %% [markdown]
# ## Every combination a cell
#
# Now a table of fifty cartoon faces. Seven tops, six hair colours, three kinds of glasses, four clothes in eight colours:
# 4,032 faces could be drawn, and fifty were. Counting gives the estimate of greatest likelihood, and calls every face
# impossible that nobody has seen.

# %%
faces = load("faces")
print(faces)
table = CellTable(SIZES)
cells = table.cells(faces.x)
share = fit(table, cells, EM(estimate="mle"), seed=0).draws["theta"][0]
times = torch.bincount(cells, minlength=table.num_cells)
twice, never = int((times == 2).nonzero()[0]), int((times == 0).nonzero()[0])
print(f"{table.num_cells:,} cells; seen twice: {share[twice]:.3f}; never seen: {share[never]:.3f}")
assert table.num_cells == 4032 and math.isclose(share[twice], 2 / 50) and share[never] == 0

# %% [markdown]
# One pseudo-count a cell makes nothing impossible: $(n_j + 1)/(N + d)$. *A slip of slides:* this is sometimes called a
# maximum likelihood estimate. That was $n_j/N$, above. The pseudo-count belongs to a prior: it is the posterior *mean*
# under Dirichlet(1), and the posterior *mode* under Dirichlet(2) (exercise 1). Nor can one cell, as on some slides, both
# occur twice and not at all: 3/4082 is for a cell seen twice, 1/4082 for one never seen. Nothing is latent, so `fit` knows
# the posterior in closed form.

# %%
exact = fit(table, cells, seed=0)
print(exact.why().splitlines()[0])
mean = exact.diagnostics["mean"]["theta"]
print(f"seen twice: 3/4082 = {mean[twice]:.6f}; never seen: 1/4082 = {mean[never]:.6f}")
assert exact.kind == "exact"
assert math.isclose(mean[twice], 3 / 4082) and math.isclose(mean[never], 1 / 4082)

# %% [markdown]
# ## Every feature for itself
#
# All unseen faces are equally likely so far. Independence spreads what was seen: a face is as likely as the product of
# the shares of its features. Straight red hair, round glasses, a white scoop neck: 0.46 · 0.16 · 0.44 · 0.38 · 0.44.

# %%
naive = fit(NaiveBayes(SIZES), faces.x.long(), EM(estimate="mle"), seed=0)
row = [["LongHairStraight", "Red", "Round", "ShirtScoopNeck", "White"]]
codes = torch.tensor([[levels.index(name) for levels, name in zip(LEVELS.values(), r)] for r in row])
probability = float(naive.log_prob(codes).exp())
print(f"p(face) = {probability:.4f}")
assert round(probability, 4) == 0.0054

# %% [markdown]
# *Another slip:* this is often called naive Bayes. Naive Bayes has a *class*, and its features are independent *given the
# class*: $p(y) \prod_j p(x_j \mid y)$. Without a class there is nothing for Bayes to do; it is feature independence.
#
# ## Why pixels break it
#
# Handwritten digits, 64 pixels, black or white. If pixels were independent, noise with the right shares of black would be
# digits. Ten rows of each: digits, independent pixels, and a mixture of forty kinds of pictures, in each of which pixels
# are independent again.

# %%
digits = load("binary_digits").x
train, test = digits[:1400], digits[1400:]
pictures = {"digits": test, "independent": None, "mixture": None}
density = {}
for name, kinds in {"independent": 1, "mixture": 40}.items():
    answer = fit(BernoulliMixture(kinds), train, EM(restarts=1), seed=0)
    density[name], pictures[name] = float(answer.log_prob(test).mean()), answer.sample(10, seed=0)["x"]
print("held-out log density of a picture:", {name: round(v, 1) for name, v in density.items()})
assert density["mixture"] > density["independent"] + 4

figure = Figure(figsize=(6, 2.1), layout="constrained")
for row, (name, images) in zip(figure.subplots(3, 10), pictures.items()):
    for ax, image in zip(row, images):
        ax.imshow(image.reshape(8, 8), cmap="Greys")
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=7, rotation=0, ha="right")
figure

# %% [markdown]
# ## A latent variable
#
# Columns that depend on each other need a common cause. A mixture gives every row one: its component. Given the
# component the columns are independent again, whatever they are: measurements, counts, yes or no, categories.

# %%
story, patients = MixedMixture.example()
print(EM().plan(story, patients))
mixture = fit(story, patients, seed=0)
truth = load("patients").labels
found = mixture.local("z").argmax(1)
right = max(float((found == truth).double().mean()), float((found != truth).double().mean()))
print(f"kind of patient right for {right:.0%}")
assert right > 0.9

# %% [markdown]
# ## k-means is a limit
#
# Shrink the spread of a Gaussian mixture to nothing, and doubt goes with it: every row belongs to its nearest centre.

# %%
clusters = load("three_clusters").x
soft = fit(GMM(3, scale=2.0), clusters, seed=0).local("z").max(1).values
hard = fit(KMeans(3), clusters, seed=0).local("z").max(1).values
print(f"rows in doubt (less than 90 % sure): mixture {(soft < 0.9).sum()}, k-means {(hard < 0.9).sum()}")
assert (soft < 0.9).sum() > 10 and (hard < 0.9).sum() == 0

# %% [markdown]
# ## Factors: numbers instead of labels
#
# The hidden cause may be a few numbers. Six test scores, two abilities: `x ~ Normal(W z + mu, psi)`. The sum over `z`
# becomes an integral, and for normals it is exact. Nothing is left of the rows but a 6 × 6 scatter.

# %%
scores = load("two_factors").x
figure = draw_plates(FactorAnalysis(2), scores, title="Two abilities")
print(EM().plan(FactorAnalysis(2), scores))
factors = fit(FactorAnalysis(2), scores, EM(), seed=0)
d = factors.draw(0)
covariance = d["W"] @ d["W"].T + torch.diag(d["psi"])
print("largest error of the covariance:", round(float((covariance - torch.cov(scores.T)).abs().max()), 3))
assert (covariance - torch.cov(scores.T)).abs().max() < 0.15
figure

# %% [markdown]
# W itself is known up to a rotation of the factors: `W R` explains the rows as well. Compare products, or the plane that
# W spans.

# %%
sine, cosine = math.sin(0.7), math.cos(0.7)
turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
assert torch.allclose(d["W"] @ turn @ (d["W"] @ turn).T, d["W"] @ d["W"].T)

# %% [markdown]
# ## Missing cells
#
# A story knows how its columns hang together, so it can fill in what is missing, and say how sure it is.

# %%
holes = scores.clone()
generator = torch.Generator().manual_seed(0)
holes[torch.rand(holes.shape, generator=generator) < 0.2] = math.nan
holes, kept = holes[~holes.isnan().all(1)], scores[~holes.isnan().all(1)]
filled = fit(FactorAnalysis(2), holes, EM(), seed=0).impute(seed=0)
truth = kept[tuple(filled.index.T)]
inside = ((filled.lower <= truth) & (truth <= filled.upper)).double().mean()
print(filled)
print(f"{inside:.0%} of the hidden scores lie in their 90 % intervals")
assert 0.85 < inside < 0.95

# %% [markdown]
# ## Chains
#
# Rows that come one after another: the component of a step depends on the one before. Summing over all paths would take
# 3²⁰ terms a sequence; passing messages forward and backward takes 20 · 3².

# %%
chain, data = GaussianHMM.example()
regimes = fit(chain, data, seed=0)
print(regimes.diagnostics["plan"].splitlines()[1])
z = regimes.local("z").argmax(-1)
order = regimes.draws["mu"][0].argsort().argsort()
accuracy = (order[z] == load("regimes").truth["z"]).double().mean()
print(f"regime right for {accuracy:.0%} of the steps")
assert accuracy > 0.95

# %% [markdown]
# ## Exercises
#
# 1. Give `CellTable` a concentration of 2 and ask EM for the mode. Which numbers come out, and why?
# 2. How much better than independent features is a mixture of two classes on the faces? Hold ten rows out.
# 3. Let the noise of all columns be one: `PPCA(2)`. Which of the two stories has the higher likelihood, and must it?
#
# ### Solutions

# %%
# 1. The mode under Dirichlet(2) is the mean under Dirichlet(1).
mode = fit(CellTable(SIZES, concentration=2.0), cells, EM(), seed=0).draws["theta"][0]
assert torch.allclose(mode, mean)

# 2. Fifty rows are few: the classes do not pay.
one = fit(NaiveBayes(SIZES, pseudo_count=2.0), faces.x[:40].long(), EM(), seed=0)
two = fit(NaiveBayes(SIZES, num_classes=2, pseudo_count=2.0), faces.x[:40].long(), EM(), seed=0)
rows = faces.x[40:].long()
print(f"held-out log density: independent {one.log_prob(rows).mean():.2f}, two classes {two.log_prob(rows).mean():.2f}")

# 3. Factor analysis contains PPCA, so its greatest likelihood cannot be lower.
a, b = (fit(s, scores, EM(estimate="mle"), seed=0).diagnostics["log_likelihood"] for s in (FactorAnalysis(2), PPCA(2)))
print(f"log-likelihood: factor analysis {a:.1f}, PPCA {b:.1f}")
assert a >= b
