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
# # EM, SVI and NUTS on one story
#
# **The question.** Three methods answer the same question. Where do they agree, where must they differ, and which one
# should be believed?

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

from inference import EM, NUTS, SVI, compare, draw_plates, fit, simulate
from zoo import PoissonMixture

generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## A story whose answer is known
#
# Weight is foretold from height, and somebody measured height twice, with two rulers that hardly differ. Which of the two
# slopes is how large? The data know their sum well, and their difference hardly at all.

# %%
height = torch.randn(60, generator=generator).double()
X = torch.stack([height, height + 0.25 * torch.randn(60, generator=generator).double()], -1)
y = X.sum(-1) + torch.randn(60, generator=generator).double()


def weight(X, y=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(X)):
        return pyro.sample("y", dist.Normal(X @ beta, 1.0), obs=y)


figure = draw_plates(weight, X, y, title="Two rulers, one height")
figure

# %% [markdown]
# With normal noise and a normal prior the posterior is normal, with precision $P = X^\top X + I/9$ and mean
# $P^{-1} X^\top y$. This is the truth that the three are held against.

# %%
P = X.T @ X + torch.eye(2) / 9
mean, sd = torch.linalg.solve(P, X.T @ y), P.inverse().diagonal().sqrt()
correlation = float(P.inverse()[0, 1] / sd.prod())
print(f"truth: mean {mean.numpy().round(3)}, sd {sd.numpy().round(3)}, correlation of the slopes {correlation:.2f}")
assert correlation < -0.9

# %% [markdown]
# - **EM** climbs to the top of the posterior, and says where that is: a point.
# - **SVI** fits a distribution that is easy to handle. *Mean field* takes the slopes for independent; *full rank* does not.
# - **NUTS** walks through the posterior and leaves draws, with the right frequencies if it walks long enough.

# %%
methods = {
    "em": EM(),
    "mean field": SVI(guide="mean_field"),
    "full rank": SVI(guide="full_rank"),
    "nuts": NUTS(chains=4, warmup=300, draws=500),
}
answers = {name: fit(weight, {"X": X, "y": y}, method, seed=0) for name, method in methods.items()}
for name, answer in answers.items():
    beta = answer.draws["beta"]
    spread = beta.std(0) if len(beta) > 1 else torch.zeros(2)
    print(f"{name:<10} {answer.kind:<12} mean {beta.mean(0).numpy().round(3)}, sd {spread.numpy().round(3)}")

# %% [markdown]
# **They agree on the middle.** For a posterior with one round peak the mode is the mean, and all find it.

# %%
for answer in answers.values():
    assert ((answer.draws["beta"].mean(0) - mean).abs() < 0.15 * sd).all()

# %% [markdown]
# **They differ in the spread, and the difference has a formula.** The best independent normals have the variances
# $1/P_{kk}$: the spread of one slope *if the other were known*. The truth is $(P^{-1})_{kk}$. The stronger the correlation,
# the more mean field boasts.

# %%
narrow = P.diagonal().rsqrt()
found = answers["mean field"].draws["beta"].std(0)
print(f"mean field: sd {found.numpy().round(3)}, formula {narrow.numpy().round(3)}, truth {sd.numpy().round(3)}")
assert torch.allclose(found, narrow, rtol=0.15) and (found < 0.5 * sd).all()
for name in ("full rank", "nuts"):
    assert torch.allclose(answers[name].draws["beta"].std(0), sd, rtol=0.15)

# %%
figure = Figure(figsize=(8, 2.9), layout="constrained")
for ax, name in zip(figure.subplots(1, 3, sharex=True, sharey=True), ("mean field", "full rank", "nuts")):
    draws = answers[name].draws["beta"][:1000]
    ax.scatter(*draws.T, s=4, lw=0, alpha=0.6)
    ax.plot(*answers["em"].draws["beta"][0], "x", color="black", ms=8)
    ax.set_title(name, loc="left", fontsize=10)
    ax.set(xlabel="slope of the first ruler")
figure.axes[0].set_ylabel("of the second")
figure

# %% [markdown]
# **And mean field knows.** $\hat k$ looks at the weights that would turn its draws into the posterior's. Above 0.7 they
# cannot.

# %%
print(*answers["mean field"].warnings, sep="\n")
assert answers["mean field"].diagnostics["khat"] > 0.7 > answers["full rank"].diagnostics["khat"]

# %% [markdown]
# ## `compare` does all of this
#
# It holds rows back, fits each method to the others, and judges: how dense the held-out rows are, how far the means lie
# apart in posterior standard deviations (`gap`), how the spreads compare, whether each method converged, and what it cost.

# %%
comparison = compare(weight, {"X": X, "y": y}, methods, seed=0)
print(comparison)
table = comparison.table
assert (table["gap (sd)"].drop("nuts") < 0.2).all() and table.loc["mean field", "sd ratio"] < 0.5
assert "mean field" in comparison.verdict
figure = comparison.plot()
figure

# %% [markdown]
# Held-out densities hardly differ here: a prediction needs the sum of the slopes only, and all know that. *Whether an
# answer is good depends on the question.* "How sure are we of the first slope?" gets a wrong answer from mean field, and
# none from EM.

# %%
total = {name: float(answer.draws["beta"].sum(-1).std()) for name, answer in answers.items() if name != "em"}
true_total = float(P.inverse().sum().sqrt())
print(f"sd of the sum of the slopes: truth {true_total:.3f},", {name: round(v, 3) for name, v in total.items()})
assert abs(total["nuts"] / true_total - 1) < 0.1

# %% [markdown]
# As a page to pass on, with plate, mathematics, table and figures:

# %%
page = comparison.report(Path(tempfile.mkdtemp()) / "rulers.html")
print(f"{page.name}: {page.stat().st_size / 1024:.0f} kB")
assert "<svg" in page.read_text() or "data:image" in page.read_text()

# %% [markdown]
# ## Latents that can be summed out
#
# The same three on a mixture: EM needs its E-step for the component of each row; NUTS and SVI cannot move a label, so it is
# summed out for them. All have the same posterior for the rows.

# %%
counts = simulate(PoissonMixture(2), given={"pi": [0.7, 0.3], "lam": [3.0, 12.0]}, num_data=150, seed=1)["x"]
mixture = compare(PoissonMixture(2), counts, ["em", "svi", NUTS(chains=4, warmup=300, draws=300)], test=None, seed=0)
print(mixture.table_text())
labels = {name: p.local("z", torch.tensor([2.0, 7.0, 15.0]).double()) for name, p in mixture.posteriors.items()}
large = {name: p[:, int(mixture.posteriors[name].draws["lam"].mean(0).argmax())] for name, p in labels.items()}
for name, p in large.items():
    print(f"{name:<5} probability of the busy component for counts of 2, 7 and 15: {p.numpy().round(3)}")
assert all(torch.allclose(p, large["nuts"], atol=0.08) for p in large.values())

# %% [markdown]
# ## Which one?
#
# - Points enough, rows many, latents finite or Gaussian: **EM**. Its E-step is exact.
# - How sure are we, and the data are not huge: **NUTS**. Believe it when R-hat is at most 1.01.
# - Networks, or too many rows for NUTS: **SVI**. Look at $\hat k$, and compare with NUTS on a part of the data.
#
# `fit(story, data)` follows these rules, and `why()` tells which applied.
#
# ## Exercises
#
# 1. Let the rulers become better: differences of 1, 0.25 and 0.05. Predict the ratio of the spreads of mean field and
#    truth, and check one of them.
# 2. EM's point has no spread. What is lost in prediction with five rows, if the mean of a normal is unknown? Compare the
#    plug-in density with the exact predictive density.
# 3. Run SVI for twenty steps only. What does the answer say of itself?
#
# ### Solutions

# %%
# 1. The ratio is sqrt(1 - correlation²) of the posterior.
for difference in (1.0, 0.25, 0.05):
    Z = torch.stack([height, height + difference * torch.randn(60, generator=generator).double()], -1)
    Q = Z.T @ Z + torch.eye(2) / 9
    ratio = Q.diagonal().rsqrt() / Q.inverse().diagonal().sqrt()
    rho = Q.inverse()[0, 1] / Q.inverse().diagonal().sqrt().prod()
    print(
        f"rulers that differ by {difference:<4}: spread {float(ratio[0]):.3f} of the truth, correlation {float(rho):.4f}"
    )
    assert torch.isclose(ratio[0], (1 - rho**2).sqrt())

# 2. The plug-in forgets that the mean was estimated: it takes the variance 1 instead of 1 + 1/5.
rows = torch.randn(20_000, 6, generator=generator).double()
centre, new = rows[:, :5].mean(1), rows[:, 5]
plug_in = torch.distributions.Normal(centre, 1.0).log_prob(new).mean()
predictive = torch.distributions.Normal(centre, (1 + 1 / 5) ** 0.5).log_prob(new).mean()
expected = 0.1 - 0.5 * torch.tensor(1.2).log()  # E of the difference: 1.2 / 2 - 1 / 2 - log(1.2) / 2
print(
    f"mean log density of the next row: plug-in {plug_in:.4f}, predictive {predictive:.4f}, expected gain {expected:.4f}"
)
assert torch.isclose(predictive - plug_in, expected.double(), atol=0.005)

# 3. It says that it has not converged, and what to raise.
short = fit(weight, {"X": X, "y": y}, SVI(guide="mean_field", steps=20), seed=0)
print(*short.warnings, sep="\n")
assert not short.converged and any("steps" in w for w in short.warnings)
