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
# # Gaussian mixtures against k-means, and EM step by step
#
# **The question.** Points lie in three heaps that overlap. Which heap does each point belong to, how sure may we be, and what
# does the computer do, step by step, to find out?

# %%
# %matplotlib inline
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from inference import EM, draw_plates, fit, simulate
from zoo import GMM, KMeans, load

data = load("three_clusters")
x = data.x
print(data)
COLOURS = np.array([[0.12, 0.44, 0.55], [0.85, 0.45, 0.13], [0.45, 0.30, 0.60]])


def paint(ax, x, r=None, mu=None, Sigma=None, title=""):
    """Rows coloured by r (N, K), centres as crosses, and the ellipses that hold 86 % of each component."""
    ax.scatter(*x.T, c="0.6" if r is None else np.clip(r.numpy() @ COLOURS[: r.shape[1]], 0, 1), s=9, lw=0)
    for k in range(0 if mu is None else len(mu)):
        ax.plot(*mu[k], "x", color="black", ms=7)
        if Sigma is not None:
            lengths, axes = np.linalg.eigh(Sigma[k].numpy())
            angle = math.degrees(math.atan2(axes[1, 1], axes[0, 1]))
            width, height = 4 * np.sqrt(lengths[::-1])
            ax.add_patch(Ellipse(mu[k].numpy(), width, height, angle=angle, fill=False, color=COLOURS[k], lw=1.5))
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_aspect("equal")
    ax.set(xlim=(-4.5, 4.5), ylim=(-4, 4), xticks=[], yticks=[])


# %% [markdown]
# ## The story
#
# Every point first picks its component, then a place around that component's centre:
#
# $$z_n \sim \mathrm{Categorical}(\pi), \qquad x_n \sim \mathcal N(\mu_{z_n}, \Sigma_{z_n}).$$
#
# Nobody has seen $z$. Summed out, it leaves a density with three hills,
# $p(x) = \sum_k \pi_k\,\mathcal N(x \mid \mu_k, \Sigma_k)$.
# (The story of the zoo speaks of precisions, $\Lambda_k = \Sigma_k^{-1}$.)

# %%
story = GMM(num_components=3, scale=2.0)
figure = draw_plates(story, x, title="A mixture of three Gaussians")
figure

# %% [markdown]
# ## Why this is hard, and what EM does about it
#
# If $z$ were known we would average each heap for itself. If the heaps were known we could compute
#
# $$r_{nk} = p(z_n = k \mid x_n) = \frac{\pi_k\, p(x_n \mid z_n = k)}{\sum_j \pi_j\, p(x_n \mid z_n = j)}.$$
#
# *A slip that travels through lecture slides:* the numerator is $p(z = k)\,p(x \mid z = k)$, which is the joint
# $p(x, z = k)$. It is not $p(z = k)\,p(x, z = k)$: that would count the prior twice. We will see below what it costs.
#
# We know neither, and the logarithm stands outside of the sum, $\log p(x) = \sum_n \log \sum_k \pi_k\,p(x_n \mid z_n = k)$.
# So we guess the heaps, compute $r$, average with the weights $r$, and repeat:
#
# $$N_k = \sum_n r_{nk}, \quad \pi_k = \frac{N_k}{N}, \quad \mu_k = \frac1{N_k}\sum_n r_{nk}\,x_n, \quad
# \Sigma_k = \frac1{N_k}\sum_n r_{nk}\,(x_n - \mu_k)(x_n - \mu_k)^\top.$$


# %%
def e_step(pi, mu, Sigma):
    """Responsibilities (N, K) and the log-likelihood."""
    normals = torch.distributions.MultivariateNormal(mu, Sigma)
    joint = pi.log() + normals.log_prob(x[:, None])
    return joint.softmax(-1), joint.logsumexp(-1).sum()


def m_step(r):
    """Weighted shares, means and covariances."""
    count = r.sum(0)
    mu = r.T @ x / count[:, None]
    apart = x[:, None] - mu
    return count / len(x), mu, torch.einsum("nk,nki,nkj->kij", r, apart, apart) / count[:, None, None]


def climb_from(centres, num_steps=40):
    """Every step's parameters, responsibilities and log-likelihood."""
    theta, steps = (torch.ones(3).double() / 3, centres, torch.eye(2).double().expand(3, 2, 2)), []
    for _ in range(num_steps):
        r, likelihood = e_step(*theta)
        steps.append((*theta, r, float(likelihood)))
        theta = m_step(r)
    return steps


steps = climb_from(torch.tensor([[0.0, 1.5], [0.0, 0.0], [0.0, -1.5]]).double())

# %% [markdown]
# Six moments of the climb. The centres start in a column in the middle, where no heap is.

# %%
figure = Figure(figsize=(9, 5), layout="constrained")
for ax, i in zip(figure.subplots(2, 3).flat, [0, 1, 4, 8, 12, 39]):
    _, mu, Sigma, r, likelihood = steps[i]
    paint(ax, x, r, mu, Sigma, f"after {i} steps: {likelihood:.1f}")
figure

# %% [markdown]
# **EM never descends.** The likelihood rises with each step; it may seem to rest, and then find the way on.

# %%
climb = torch.tensor([s[-1] for s in steps], dtype=torch.float64)
print("log-likelihood:", [round(v, 2) for v in climb[[0, 1, 4, 8, 12, 16, 39]].tolist()])
assert (climb.diff() > -1e-9).all() and climb[39] - climb[38] < 1e-3

# %% [markdown]
# **But it climbs the hill it stands on.** From the first three points of the table, two of them in the same heap, it ends
# on a lower peak, where one component covers two heaps and two share the third. Nothing tells it so.

# %%
lower = climb_from(x[:3].clone(), 60)
print(f"from here {lower[-1][-1]:.1f}, from there {climb[-1]:.1f}")
assert lower[-1][-1] < climb[-1] - 50
figure = Figure(figsize=(6, 2.8), layout="constrained")
for ax, (name, end) in zip(figure.subplots(1, 2), {"another start": lower[-1], "the first one": steps[-1]}.items()):
    paint(ax, x, end[3], end[1], end[2], f"{name}: {end[4]:.1f}")
figure

# %% [markdown]
# As a film: one frame a step, written to a small file.


# %%
def frame(i):
    ax.clear()
    _, mu, Sigma, r, likelihood = steps[i]
    paint(ax, x, r, mu, Sigma, f"step {i}, log-likelihood {likelihood:.1f}")


figure = Figure(figsize=(3.6, 3.3), layout="constrained")
ax = figure.add_subplot()
film = Path(tempfile.mkdtemp()) / "em.gif"
FuncAnimation(figure, frame, frames=20).save(film, writer=PillowWriter(fps=3), dpi=72)
print(f"{film.name}: {film.stat().st_size / 1024:.0f} kB")
assert film.stat().st_size < 500 * 1024
figure

# %% [markdown]
# ## The same from the story
#
# `fit` derives these steps from the story: nobody told it the formulas. From the same start it takes the same path.

# %%
path = []
em = EM(
    estimate="mle",
    max_iter=40,
    tol=0.0,
    ridge=0.0,
    start={"pi": steps[0][0], "mu": steps[0][1], "Lambda": steps[0][2]},
    callback=lambda i, objective, values: path.append(objective),
)
by_story = fit(story, x, em, seed=0)
gap = max(abs(a - b) for a, b in zip(path, climb.tolist()))
print(f"{len(path)} steps, the largest difference of the two log-likelihoods is {gap:.1e}")
assert len(path) >= 40 and gap < 1e-6
assert torch.allclose(by_story.draws["mu"][0].sort(0).values, steps[-1][1].sort(0).values, atol=1e-3)

# %% [markdown]
# And the slip? With $p(z)\,p(x, z)$ for $p(z)\,p(x \mid z)$ each $\pi_k$ counts twice. Two heaps that overlap, 70 % and 30
# % of the points: the right numerator finds both, the wrong one lets the large heap eat the small one within ten steps.

# %%
two = {
    "pi": torch.tensor([0.7, 0.3]),
    "mu": torch.tensor([[0.0, 0.0], [2.0, 0.0]]),
    "Lambda": torch.eye(2).expand(2, 2, 2),
}
heaps = simulate(GMM(2), given=two, num_data=2000, seed=0)["x"]
shares = {}
for name, times in {"p(z) p(x | z)": 1, "p(z) p(x, z)": 2}.items():
    pi, mu, Sigma = (
        torch.tensor([0.5, 0.5]).double(),
        torch.tensor([[-0.5, 0.0], [2.5, 0.0]]).double(),
        torch.eye(2).double(),
    )
    for _ in range(10):
        normals = torch.distributions.MultivariateNormal(mu, Sigma).log_prob(heaps[:, None])
        r = (times * pi.log() + normals).softmax(-1)
        pi, mu = r.mean(0), r.T @ heaps / r.sum(0)[:, None]
    shares[name] = float(pi.min())
    print(f"{name:<14} leaves the small heap a share of {pi.min():.3f}")
assert 0.25 < shares["p(z) p(x | z)"] < 0.4 and shares["p(z) p(x, z)"] < 0.05

# %% [markdown]
# ## k-means is the limit without doubt
#
# Let all covariances be $\varepsilon I$ and $\varepsilon \to 0$: the softmax becomes a maximum, $r$ becomes 0 or 1, and EM
# becomes k-means. `KMeans` is that story.

# %%
soft = fit(story, x, seed=0)
hard = fit(KMeans(3), x, seed=0)
doubt = 1 - soft.local("z").max(-1).values
print(f"points in doubt (less than 90 % sure): mixture {(doubt > 0.1).sum()}, k-means 0")
assert (doubt > 0.1).sum() > 10 and hard.local("z").max(-1).values.min() > 0.999

# %% [markdown]
# The doubt is worth something: where the mixture says 70 %, about 70 % should be right. We know the truth and can count.

# %%
z, truth = soft.local("z"), data.truth
order = torch.cdist(soft.draws["mu"][0], truth["mu"]).argmin(
    -1
)  # components have no names: match them by their centres
right = order[z.argmax(-1)] == data.labels
print(f"right {right.double().mean():.1%}, and expected by the mixture itself {z.max(-1).values.mean():.1%}")
assert abs(right.double().mean() - z.max(-1).values.mean()) < 0.03

# %% [markdown]
# ## Where k-means fails
#
# k-means sees distances only: it likes balls of equal size. Two long heaps side by side are cut across.

# %%
rods = {
    "pi": torch.tensor([0.5, 0.5]),
    "mu": torch.tensor([[0.0, 0.8], [0.0, -0.8]]),
    "Lambda": torch.tensor([[0.4, 10.0], [0.4, 10.0]]).diag_embed(),
}
dream = simulate(GMM(2), given=rods, num_data=300, seed=3)
long = dream["x"]
answers = {"k-means": fit(KMeans(2), long, seed=0), "mixture": fit(GMM(2), long, seed=0)}
figure = Figure(figsize=(7, 2.9), layout="constrained")
agree = {}
for ax, (name, answer) in zip(figure.subplots(1, 2), answers.items()):
    r = answer.local("z")
    match = (r.argmax(-1) == dream["z"]).double().mean()
    agree[name] = float(max(match, 1 - match))
    paint(ax, long, r, answer.draws["mu"][0], title=f"{name}: {agree[name]:.0%} right")
print(agree)
assert agree["k-means"] < 0.65 and agree["mixture"] > 0.95
figure

# %% [markdown]
# ## A density, too
#
# k-means gives labels. The mixture is a density, so it can be asked how likely a new point is, and dream up more of them.

# %%
new = torch.tensor([[-2.0, 0.0], [0.0, 5.0]]).double()
print("log density in a heap and far away:", soft.log_prob(new).numpy().round(2))
assert soft.log_prob(new)[0] > soft.log_prob(new)[1] + 5
dreamed = soft.sample(2000, seed=0)["x"]
assert torch.allclose(dreamed.mean(0), x.mean(0), atol=0.2)

# %% [markdown]
# ## Exercises
#
# 1. The likelihood has many peaks. Start twenty times from three points of the table: how often is the highest one reached,
#    and what do the restarts of `fit` do about it?
# 2. How many heaps are there? Fit 1 to 5 components to 200 points and judge on the others.
# 3. Show with numbers that a shared, shrinking spherical covariance turns responsibilities into k-means labels.
#
# ### Solutions

# %%
# 1. Some starts end lower. `fit` starts at centres that lie apart (k-means++), five times, and keeps the best.
generator = torch.Generator().manual_seed(0)
ends = [climb_from(x[torch.randperm(len(x), generator=generator)[:3]])[-1][-1] for _ in range(20)]
top = fit(story, x, EM(estimate="mle"), seed=0).diagnostics["log_likelihood"]
reached = sum(end > top - 0.5 for end in ends)
print(f"{reached} of 20 starts reach the top, the worst ends at {min(ends):.1f}; fit ends at {top:.1f}")
assert 5 < reached < 20 and max(ends) < top + 1e-3

# 2. On points that were held out, three are best, and more do not help.
shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
held = [float(fit(GMM(k, scale=2.0), shuffled[:200], seed=0).log_prob(shuffled[200:]).mean()) for k in range(1, 6)]
print("held-out log density with 1 to 5 components:", [round(v, 3) for v in held])
assert max(held[:2]) < held[2] and held[2] > max(held) - 0.05

# 3. With covariance eps * I and equal shares the softmax is of -distance² / (2 eps).
centres = hard.draws["mu"][0]
distance = torch.cdist(x, centres).square()
labels = hard.local("z").argmax(-1)
softness = [float((-distance / (2 * eps)).softmax(-1).max(-1).values.min()) for eps in (1.0, 0.1, 1e-5)]
print("the least sure point, as the spread shrinks:", [round(v, 3) for v in softness])
assert softness[0] < softness[2] and softness[2] > 0.99
assert (distance.argmin(-1) == labels).all()
