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
# # Flows and the change of variables
#
# **The question.** Take noise whose density is known, bend it, and read off the density of what comes out. How much must the
# bending cost, and how rich do the densities become?

# %%
# %matplotlib inline
import math

import torch
from matplotlib.figure import Figure

from inference import SVI, draw_plates, fit
from zoo import GMM, PlanarFlow, RealNVP, load

generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## One dimension
#
# Let $z$ be uniform on $[0, 1]$ and $x = 2z + 1$. Then $x$ is uniform on $[1, 3]$: twice as long, so half as high. In general
#
# $$x = f(z) \quad\Longrightarrow\quad p(x) = p(z)\,\Bigl|\frac{\mathrm df}{\mathrm dz}\Bigr|^{-1}.$$
#
# What is stretched becomes thin.

# %%
z = torch.rand(200_000, generator=generator).double()
x = 2 * z + 1
share = float(((x > 2.0) & (x < 2.1)).double().mean()) / 0.1
print(f"density of x near 2: {share:.3f}")
assert abs(share - 0.5) < 0.02

# %% [markdown]
# The stretching may differ from place to place. $x = e^z$ of a normal is the log-normal distribution; its formula is
# nothing else.

# %%
grid = torch.linspace(0.1, 5, 50).double()
by_rule = torch.distributions.Normal(0.0, 1.0).log_prob(grid.log()) - grid.log()  # log |df/dz| = z = log x
assert torch.allclose(by_rule, torch.distributions.LogNormal(0.0, 1.0).log_prob(grid))

# %% [markdown]
# ## Many dimensions
#
# A small cube becomes a small parallelepiped, and its volume is a determinant:
#
# $$\log p(x) = \log p(z) - \log\Bigl|\det \frac{\partial f}{\partial z}\Bigr|.$$
#
# A determinant of $D \times D$ costs $D^3$. Flows are the art of bending in ways whose determinant costs $D$.
#
# **Planar flows** (Rezende and Mohamed, 2015) stretch along one direction: $f(z) = z + u\,\tanh(w^\top z + b)$. The *matrix
# determinant lemma*, $\det(I + u v^\top) = 1 + v^\top u$, makes the determinant one dot product:
#
# $$\det\frac{\partial f}{\partial z} = 1 + (1 - \tanh^2(w^\top z + b))\; u^\top w.$$

# %%
D = 20
u, w, b = (torch.randn(D, generator=generator).double() / D**0.5 for _ in range(3))
b = b[0]
point = torch.randn(D, generator=generator).double()
jacobian = torch.autograd.functional.jacobian(lambda z: z + u * torch.tanh(w @ z + b), point)
slow = float(torch.linalg.det(jacobian))
fast = float(1 + (1 - torch.tanh(w @ point + b) ** 2) * (u @ w))
print(f"determinant of a 20 x 20 matrix {slow:.10f}, one dot product {fast:.10f}")
assert math.isclose(slow, fast, rel_tol=1e-9)

# %% [markdown]
# *A condition that slides like to leave out:* $f$ must be invertible, and that holds where $u^\top w \ge -1$. Otherwise the
# map folds: several $z$ land on one $x$, the rule counts only one of them, and the "density" no longer is one. In one
# dimension:

# %%
line = torch.linspace(-6, 6, 20_001).double()
turns = {}
for uw in (-0.9, -3.0):
    slope = 1 + uw * (1 - torch.tanh(line) ** 2)
    turns[uw] = int((slope[1:] * slope[:-1] < 0).sum())
    one, two = (z + uw * math.tanh(z) for z in (0.5, 2.0))
    print(f"u w = {uw}: the map turns around {turns[uw]} times; 0.5 goes to {one:.2f}, and 2.0 to {two:.2f}")
assert turns == {-0.9: 0, -3.0: 2}

# %% [markdown]
# The layers of the zoo cannot violate it: $u$ is moved along $w$ until $u^\top w > -1$.
#
# ## Two moons
#
# Layers on top of each other: the logarithms of the determinants add up. The parameters are points, climbed by gradients of
# the exact likelihood, and `fit` does with a flow what it does with any story.

# %%
moons = load("two_moons").x
train, test = moons[::2], moons[1::2]
flow = RealNVP.example()[0]
figure = draw_plates(flow, train, title="A flow is a story with one line")
found = fit(flow, train, SVI(steps=400, mode="graph"), seed=0)
print(found.kind, "of", len(train), "rows;", found.score(test))
figure

# %% [markdown]
# **The density is exact, and it is one.** No bound, no integral; the sum over a grid is one.

# %%
side = torch.linspace(-4, 4, 121)
plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2).to(train)
cell = float((plane[1, 0] - plane[0, 0]) ** 2)
density = found.log_prob(plane).exp()
print(f"integral over the plane: {float(density.sum()) * cell:.3f}")
assert abs(float(density.sum()) * cell - 1) < 0.05

gauss = fit(GMM(1), train, "em", seed=0)
scores = {"one Gaussian": gauss.log_prob(test).mean(), "flow": found.log_prob(test).mean()}
print({name: round(float(v), 3) for name, v in scores.items()})
assert scores["flow"] > scores["one Gaussian"] + 0.2

# %%
figure = Figure(figsize=(8, 2.8), layout="constrained")
axes = figure.subplots(1, 3, sharex=True, sharey=True)
reach = float(plane.max())
axes[0].scatter(*train.T, s=3, lw=0)
axes[1].imshow(density.reshape(121, 121), origin="lower", extent=(-reach, reach, -reach, reach), cmap="Blues")
axes[2].scatter(*found.sample(500, seed=0)["x"].T, s=3, lw=0)
for ax, title in zip(axes, ("rows", "density", "new rows")):
    ax.set_title(title, fontsize=10, loc="left")
    ax.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
figure

# %% [markdown]
# **And it runs both ways.** A density needs $f^{-1}$, a draw needs $f$. Coupling layers (RealNVP) have both at the same
# price: one half of the columns is shifted and scaled by numbers computed from the other half, which stays, so that the
# Jacobian is triangular. Planar layers draw at once and must search for the inverse.

# %%
again = found.sample(5, seed=1)["x"]
assert torch.equal(again, found.sample(5, seed=1)["x"]) and torch.isfinite(found.log_prob(again)).all()

# %% [markdown]
# ## What the price buys, and what not
#
# - Exact likelihood, easy draws.
# - $z$ has as many dimensions as $x$: nothing is compressed. A mixture or a VAE has small latents and pays with a sum or a
#   bound.
# - The map is continuous: two moons stay joined by a thin thread. A mixture can cut.

# %%
between = torch.zeros(1, 2).to(train) + train.mean(0)
print(
    f"log density between the moons: {float(found.log_prob(between)):.2f}, on a moon {float(found.log_prob(train[:1])):.2f}"
)
assert found.log_prob(between) < found.log_prob(train).median()

# %% [markdown]
# ## Exercises
#
# 1. Show that $n$ planar layers cost $n$ dot products, and that their log determinants add up (chain rule).
# 2. Which normal is the flow $x = \mu + L z$ with a triangular $L$? Check the density.
# 3. Fit a `PlanarFlow` to the moons. Why does it climb more slowly than a coupling flow?
#
# ### Solutions

# %%
# 1. det of a product is the product of dets.
layers = [tuple(torch.randn(D, generator=generator).double() / D**0.5 for _ in range(2)) for _ in range(3)]


def forward(z):
    for u, w in layers:
        z = z + u * torch.tanh(w @ z)
    return z


value, total = point, 0.0
for u, w in layers:
    total += float((1 + (1 - torch.tanh(w @ value) ** 2) * (u @ w)).abs().log())
    value = value + u * torch.tanh(w @ value)
assert math.isclose(
    total, float(torch.linalg.slogdet(torch.autograd.functional.jacobian(forward, point))[1]), rel_tol=1e-8
)

# 2. N(mu, L L'); the determinant is the product of the diagonal.
L = torch.tensor([[2.0, 0.0], [0.7, 0.5]]).double()
rows = torch.randn(10, 2, generator=generator).double()
noise = torch.linalg.solve_triangular(L, rows.T, upper=False).T
by_flow = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1) - L.diagonal().log().sum()
assert torch.allclose(
    by_flow, torch.distributions.MultivariateNormal(torch.zeros(2).double(), scale_tril=L).log_prob(rows)
)

# 3. Each layer bends along one line only; it takes many of them, and each density needs a search for the inverse.
planar = fit(PlanarFlow.example()[0], train, SVI(steps=150, mode="graph"), seed=0)
print(f"held-out log density: planar {planar.log_prob(test).mean():.3f}, coupling {scores['flow']:.3f}")
assert planar.log_prob(test).mean() < scores["flow"]
