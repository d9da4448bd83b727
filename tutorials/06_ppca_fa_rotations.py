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
# # PPCA, factor analysis, and rotations
#
# **The question.** Six test scores seem to come from two abilities. How are the abilities found, what has that to do with
# principal components, and why do two correct programs print different loadings?

# %%
# %matplotlib inline
import math

import torch
from matplotlib.figure import Figure

from inference import EM, NUTS, draw_plates, fit
from zoo import PPCA, FactorAnalysis, load

data = load("two_factors")
x = data.x
print(data)

# %% [markdown]
# ## The story
#
# Each person has $K$ numbers that nobody sees, and every score is a weighted sum of them, plus noise:
#
# $$z_n \sim \mathcal N(0, I_K), \qquad x_n \mid z_n \sim \mathcal N(W z_n + \mu, \Psi).$$
#
# With $\Psi = \psi I$, the same noise in all columns, it is probabilistic PCA; with a noise for each column it is factor
# analysis. Sums of normals are normal, so the hidden numbers integrate out: $x_n \sim \mathcal N(\mu,\; W W^\top + \Psi)$.
# *Few factors are few explanations of all covariances.*

# %%
figure = draw_plates(PPCA(2), x, title="Probabilistic PCA")
figure

# %% [markdown]
# ## PPCA knows its answer
#
# Tipping and Bishop: with the eigenvalues $\lambda_1 \ge \dots \ge \lambda_D$ and eigenvectors $U$ of the data's covariance,
# the likelihood is highest at
#
# $$\psi = \frac{1}{D-K} \sum_{j>K} \lambda_j, \qquad W = U_K (\Lambda_K - \psi I)^{1/2} R \quad\text{for any rotation } R.$$
#
# The noise is the average of what the factors leave over. EM gets there without knowing the formula.

# %%
K, D = 2, x.shape[1]
covariance = torch.cov(x.T, correction=0)
values, vectors = torch.linalg.eigh(covariance)
values, vectors = values.flip(0), vectors.flip(1)
psi = values[K:].mean()
W = vectors[:, :K] * (values[:K] - psi).sqrt()

ppca = fit(PPCA(K), x, EM(estimate="mle"), seed=0)
d = ppca.draw(0)
print(f"psi: formula {psi:.5f}, EM {d['psi']:.5f}")
assert math.isclose(psi, d["psi"], rel_tol=1e-4)
assert torch.allclose(d["W"] @ d["W"].T, W @ W.T, atol=1e-3)

# %% [markdown]
# $W$ spans the plane of the first two principal components: nothing of it sticks out. But its columns are *not* the
# components.

# %%
plane = vectors[:, :K] @ vectors[:, :K].T
outside = (d["W"] - plane @ d["W"]).norm() / d["W"].norm()
print(f"share of W outside of the principal plane: {outside:.1e}")
assert outside < 1e-3

# %% [markdown]
# ## What a factor is for one person
#
# The posterior of $z_n$ is normal, with mean $M^{-1} W^\top (x_n - \mu)$ and covariance $\psi M^{-1}$, where
# $M = W^\top W + \psi I$. PCA's projection is the limit $\psi \to 0$: without noise there is no doubt and no shrinking.

# %%
M = d["W"].T @ d["W"] + d["psi"] * torch.eye(K)
mean = (x - d["mu"]) @ d["W"] @ M.inverse()
z = ppca.local("z")  # 200 draws for each person
print("person 0:", mean[0].numpy().round(2), "±", (d["psi"] * M.inverse()).diagonal().sqrt().numpy().round(2))
assert torch.allclose(z.mean(0), mean, atol=0.25) and (z.mean(0) - mean).abs().mean() < 0.04

# %% [markdown]
# ## Nobody knows which way the factors point
#
# Turn the factors by any rotation $R$ and the loadings back: $W R\,(R^\top z) = W z$, and $(WR)(WR)^\top = W W^\top$. The
# rows are exactly as likely. So two right programs print different $W$, and no amount of data will change that.


# %%
def turned(W, angle):
    c, s = math.cos(angle), math.sin(angle)
    return W @ torch.tensor([[c, -s], [s, c]], dtype=W.dtype)


def log_density(W, psi):
    return torch.distributions.MultivariateNormal(d["mu"], W @ W.T + psi * torch.eye(D)).log_prob(x).sum()


before, after = log_density(d["W"], d["psi"]), log_density(turned(d["W"], 1.0), d["psi"])
print(f"log-likelihood {before:.6f}, and with the factors turned by one radian {after:.6f}")
assert math.isclose(before, after, rel_tol=1e-12) and not torch.allclose(turned(d["W"], 1.0), d["W"], atol=0.3)

# %% [markdown]
# A sampler that does its work visits all of them. Here are the draws of the loadings of one test: a ring. Its mean is zero
# and says nothing, and neither does the R-hat of a single loading. What is the same on the whole ring can be trusted: $W
# W^\top$, $\mu$, $\psi$. `fit` knows this, and judges convergence by them.

# %%
posterior = fit(PPCA(2), x, NUTS(chains=4, warmup=400, draws=400), seed=0)
draws = posterior.draws["W"]
length = draws[:, 0].norm(dim=-1)
print("judged by", list(posterior.diagnostics["rhat_by_site"]), f"R-hat at most {posterior.diagnostics['rhat']:.3f}")
centre = draws[:, 0].mean(0).numpy().round(2)
print(f"loadings of {data.feature_names[0]}: mean {centre}, length {length.mean():.2f} ± {length.std():.2f}")
assert "W W^T" in posterior.diagnostics["rhat_by_site"] and posterior.diagnostics["rhat"] < 1.03
assert draws[:, 0].mean(0).norm() < 0.3 * length.mean() and length.std() < 0.1

figure = Figure(figsize=(4, 3.8), layout="constrained")
ax = figure.subplots()
for chain in range(4):
    ax.scatter(*draws[400 * chain : 400 * (chain + 1), 0].T, s=4, label=f"chain {chain + 1}")
ax.set(xlabel=f"loading of {data.feature_names[0]} on the first factor", ylabel="on the second", aspect="equal")
ax.legend(frameon=False, fontsize=8, loc="center")
figure

# %% [markdown]
# ## Choosing a rotation to read
#
# If no direction is right, take one that reads well. *Varimax* turns the factors until each test loads on few of them: it
# maximises the variance of the squared loadings.


# %%
def varimax(W):
    """The angle, among all of two factors, at which squared loadings differ most."""
    angles = torch.linspace(0, math.pi / 2, 500).tolist()
    return turned(W, max(angles, key=lambda a: float(turned(W, a).square().var(0).sum())))


factors = fit(FactorAnalysis(2), x, EM(estimate="mle"), seed=0)
read = varimax(factors.draw(0)["W"])
order = read[0].abs().argsort(descending=True)  # the first test's own factor comes first
read = read[:, order] * read[:, order].sum(0).sign()
for name, row in zip(data.feature_names, read):
    print(f"{name:<11}" + "".join(f"{v:7.2f}" for v in row.tolist()))
assert (read[:3, 0] > 2 * read[:3, 1].abs()).all() and (read[3:, 1] > 2 * read[3:, 0].abs()).all()

# %% [markdown]
# Three tests of words, three of shapes: these are the abilities. Varimax added nothing to the likelihood; it is a way to
# read.
#
# ## PPCA or factor analysis?
#
# Measure the first score in other units, ten times as large. Factor analysis does not care: its first noise grows along, and
# the other loadings stay. PPCA has one noise for all columns, and the first column becomes the first component.

# %%
units = torch.tensor([10.0, 1, 1, 1, 1, 1]).double()
change = {}
for story in (FactorAnalysis(2), PPCA(2)):
    old = fit(story, x, EM(estimate="mle"), seed=0).draw(0)["W"]
    new = fit(story, x * units, EM(estimate="mle"), seed=0).draw(0)["W"] / units[:, None]
    change[type(story).__name__] = float((new @ new.T - old @ old.T).norm() / (old @ old.T).norm())
print("change of what the factors explain:", {name: round(v, 3) for name, v in change.items()})
assert change["FactorAnalysis"] < 0.02 and change["PPCA"] > 0.1

# %% [markdown]
# ## How many factors?
#
# A third factor always raises the likelihood of the rows it was fitted to. Rows that were held out are not impressed.

# %%
train, held = x[:200], x[200:]
scores = {K: fit(FactorAnalysis(K), train, EM(), seed=0).log_prob(held).mean() for K in (1, 2, 3, 4)}
print("held-out log density:", {K: round(float(v), 3) for K, v in scores.items()})
assert scores[2] > scores[1] + 0.3 and max(scores[3], scores[4]) < scores[2] + 0.03

# %% [markdown]
# ## Exercises
#
# 1. How many free numbers does $W$ really have? Count those of $W W^\top + \psi I$ for $D = 6$, $K = 2$.
# 2. Let the noise go to zero. Show that the posterior mean of $z$ becomes the projection of PCA, scaled.
# 3. Is the rotation still free if the factors have the prior Laplace(0, 1) instead of Normal(0, 1)? Ask the log joint.
#
# ### Solutions

# %%
# 1. D K loadings, less the K (K - 1) / 2 angles of a rotation: 11. The rank of the derivative of W W' counts them.
flat = d["W"].flatten().clone()
jacobian = torch.autograd.functional.jacobian(lambda w: (w.view(D, K) @ w.view(D, K).T).flatten(), flat)
print("free numbers of W:", int(torch.linalg.matrix_rank(jacobian)))
assert torch.linalg.matrix_rank(jacobian) == D * K - K * (K - 1) // 2

# 2. (W'W + psi I)^-1 W' becomes the pseudo-inverse: least squares, that is a projection onto the plane of W.
small = 1e-8
limit = torch.linalg.solve(d["W"].T @ d["W"] + small * torch.eye(K), d["W"].T)
assert torch.allclose(limit, torch.linalg.pinv(d["W"]), atol=1e-6)
assert torch.allclose(d["W"] @ limit, plane, atol=1e-3)

# 3. No: a Laplace prior has corners, and prefers factors along the axes. That is sparse coding and independent components.
z = torch.randn(1000, K, generator=torch.Generator().manual_seed(0)).double()
normal, laplace = (family(0.0, 1.0) for family in (torch.distributions.Normal, torch.distributions.Laplace))
assert torch.isclose(normal.log_prob(z).sum(), normal.log_prob(turned(z, 0.5)).sum())
assert (laplace.log_prob(z).sum() - laplace.log_prob(turned(z, 0.5)).sum()).abs() > 1
