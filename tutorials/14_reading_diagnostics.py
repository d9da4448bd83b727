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
# # Reading diagnostics when inference fails
#
# **The question.** Every inference gives numbers. How does one see that they are wrong, which sign means what, and what
# helps?
#
# | sign | of | says | first remedy |
# | --- | --- | --- | --- |
# | R-hat > 1.01 | NUTS | chains tell different stories | longer chains; several modes? |
# | effective draws too few | NUTS | chains move slowly | more draws; rescale |
# | divergences, low E-BFMI | NUTS | a region is too narrow to enter | standardise the latents |
# | $\hat k$ > 0.7 | SVI | the guide misses a part | a richer guide; NUTS |
# | not converged | SVI, EM | stopped too early | more steps |
# | collapsed component | EM | an infinite likelihood | a prior |
# | replicated data look different | all | the *story* is wrong | another story |
#
# We break one thing at a time, in models whose right answer is known.

# %%
# %matplotlib inline
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from scipy import stats

from inference import EM, NUTS, SVI, check, fit
from zoo import GMM, load

generator = torch.Generator().manual_seed(0)


def told(posterior):
    """The warnings of an answer."""
    print(*posterior.warnings or ["no warnings"], sep="\n")
    return " ".join(posterior.warnings)


# %% [markdown]
# ## R-hat: chains that tell different stories
#
# Only the size of $\mu$ is seen, $y \sim \mathcal N(|\mu|, ½)$. The posterior has two equal peaks, near −3 and 3. A chain
# finds one of them and stays: the valley between is too deep.

# %%
y = 3.0 + 0.5 * torch.randn(40, generator=generator).double()


def sign(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.abs(), 0.5), obs=y)


split = fit(sign, y, NUTS(chains=4, warmup=300, draws=300), seed=0)
text = told(split)
assert "R-hat of mu" in text and split.diagnostics["rhat"] > 1.3
peaks = split.draws["mu"].reshape(4, -1).mean(1).sign()
assert len(peaks.unique()) == 2

# %%
figure = Figure(figsize=(6, 2.6), layout="constrained")
ax = figure.subplots()
for chain, draws in enumerate(split.draws["mu"].reshape(4, -1)):
    ax.plot(draws, lw=0.8, label=f"chain {chain + 1}")
ax.set(xlabel="draw", ylabel="mu", ylim=(-4, 5))
ax.legend(frameon=False, ncols=4, fontsize=8, loc="upper center")
figure

# %% [markdown]
# The message names the means by chain, and they are the story: three on one side, one on the other. Pooled, $\mu$ would be
# −1.5, a value that no chain believes in. Longer chains do not help. What helps is to ask for what is known:
# $|\mu|$, or a prior that knows the sign.


# %%
def size(y):
    mu = pyro.sample("mu", dist.HalfNormal(5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


whole = fit(size, y, NUTS(chains=4, warmup=300, draws=500), seed=0)
told(whole)
assert whole.diagnostics["rhat"] < 1.02 and (whole.draws["mu"].mean() - y.mean()).abs() < 0.05

# %% [markdown]
# **One chain would have been happy.** R-hat can only see what chains disagree about: that is why there are four, from
# different starts. And an approximation that sits on one peak sees nothing at all: all lights are green here, and half of
# the posterior is missing.

# %%
one_peak = fit(sign, y, SVI(), seed=0)
told(one_peak)
print(
    f"SVI: mu {one_peak.draws['mu'].mean():.2f} ± {one_peak.draws['mu'].std():.2f}, k-hat {one_peak.diagnostics['khat']:.2f}"
)
assert one_peak.diagnostics["khat"] < 0.7 and len(one_peak.draws["mu"].sign().unique()) == 1

# %% [markdown]
# ## Divergences: a neck too narrow to enter
#
# Nine groups with effects $\theta_g \sim \mathcal N(0, e^{v/2})$, seen through much noise. Where $v$ is small, all $\theta$
# must be small with it: a funnel whose neck needs tiny steps and whose mouth needs long ones. One step size fits only one
# of them.

# %%
noisy = 3.0 * torch.randn(9, generator=generator).double()


def funnel(y):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", 9):
        theta = pyro.sample("theta", dist.Normal(0.0, (v / 2).exp()))
        pyro.sample("y", dist.StudentT(5.0, theta, 10.0), obs=y)


stuck = fit(funnel, noisy, NUTS(chains=4, warmup=500, draws=500), seed=0)
text = told(stuck)
assert "diverged" in text and "non-centred" in text

# %% [markdown]
# The message says where the remedy lies: draw *standardised* effects, and scale them afterwards. The story is the same,
# with the same distribution of $v$ and $\theta$; its geometry is not.


# %%
def standardised(y):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", 9):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", raw * (v / 2).exp())
        pyro.sample("y", dist.StudentT(5.0, theta, 10.0), obs=y)


free = fit(standardised, noisy, NUTS(chains=4, warmup=500, draws=500), seed=0)
assert "diverged" not in told(free)

# %% [markdown]
# Which one is right? The effects can be integrated out by quadrature, one group at a time, so that $p(v \mid y)$ is known.

# %%
grid = np.linspace(-14, 8, 400)
nodes, node_weights = np.polynomial.hermite_e.hermegauss(60)
log_p = stats.norm.logpdf(grid, 0, 3)
for value in noisy.numpy():
    spread = np.exp(grid / 2)[:, None] * nodes
    log_p += np.log((node_weights * stats.t.pdf(value, 5, spread, 10)).sum(1))
density = np.exp(log_p - log_p.max())
density /= density.sum()
low = float(density[grid < -5].sum())
share = {
    name: float((p.draws["v"] < -5).double().mean()) for name, p in {"funnel": stuck, "standardised": free}.items()
}
print(f"p(v < -5): exactly {low:.3f},", {name: round(s, 3) for name, s in share.items()})
assert abs(share["standardised"] - low) < 0.03 and share["funnel"] < 0.6 * low

figure = Figure(figsize=(7, 3), layout="constrained")
theta = {"funnel": stuck.draws["theta"][:, 0], "standardised": free.draws["raw"][:, 0] * (free.draws["v"] / 2).exp()}
for ax, (name, p) in zip(
    figure.subplots(1, 2, sharex=True, sharey=True), {"funnel": stuck, "standardised": free}.items()
):
    ax.scatter(theta[name], p.draws["v"], s=3, lw=0, alpha=0.5)
    ax.set_title(name, loc="left", fontsize=10)
    ax.set(xlabel="effect of the first group", ylabel="v", xlim=(-20, 20), ylim=(-14, 8))
    ax.label_outer()
figure

# %% [markdown]
# *Divergences are not a nuisance to be tuned away.* The draws that are missing are the ones that would have mattered.
#
# ## EM: stopped early, and collapsed
#
# Four steps are not enough, and it says so. Twelve components for sixty points, and no prior: one component shrinks onto a
# few points, where the likelihood is infinite.

# %%
x = load("three_clusters").x
early = fit(GMM(3, scale=2.0), x, EM(max_iter=4), seed=0)
assert not early.converged and "did not converge" in told(early)
collapsed = fit(GMM(12, scale=2.0), x[:60], EM(estimate="mle", restarts=1), seed=0)
assert "collapsed" in told(collapsed)
held_out = collapsed.log_prob(x[60:]).mean()
kept = fit(GMM(12, scale=2.0), x[:60], EM(), seed=0)  # with the story's priors
told(kept)
with_priors = kept.log_prob(x[60:]).mean()
print(
    f"log density: fitted points {collapsed.log_prob().mean():.1f}, others {held_out:.1f}; with priors {with_priors:.1f}"
)
assert with_priors > held_out + 1

# %% [markdown]
# ## SVI: the spread that k-hat distrusts
#
# Independent normals for two slopes that are anything but (see the tutorial on the three methods).

# %%
height = torch.randn(60, generator=generator).double()
X = torch.stack([height, height + 0.2 * torch.randn(60, generator=generator).double()], -1)
weight = X.sum(-1) + torch.randn(60, generator=generator).double()


def rulers(X, y=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(X)):
        return pyro.sample("y", dist.Normal(X @ beta, 1.0), obs=y)


independent = fit(rulers, {"X": X, "y": weight}, SVI(guide="mean_field"), seed=0)
assert "k-hat" in told(independent)

# %% [markdown]
# ## Calibration: is the *method* right for this story?
#
# Draw the truth from the prior, data from the story, and rank the truth among the draws of the answer: where a method is
# right, ranks are uniform. Draws that are too narrow put the truth at the ends too often.

# %%
right = check(
    rulers, {"X": X, "y": weight}, NUTS(chains=1, warmup=150, draws=150), simulations=60, seed=0, progress=False
)
wrong = check(
    rulers,
    {"X": X, "y": weight},
    SVI(guide="mean_field", steps=150, starts=1, draws=100),
    simulations=50,
    seed=0,
    progress=False,
)
print(right, wrong, sep="\n\n")
assert right.passed and not wrong.passed
figure = wrong.plot()
figure

# %% [markdown]
# ## All lights green, and the story is wrong
#
# No diagnostic above asks whether the *story* is true. These rows have heavy tails, and a normal is fitted to them. The
# inference is perfect. What gives it away are new data: if the story were true, data like ours would come out of it.

# %%
tails = torch.from_numpy(stats.t.rvs(2.0, size=200, random_state=3))


def normal(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.HalfNormal(5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, s), obs=x)


def heavy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.HalfNormal(5.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.StudentT(df, mu, s), obs=x)


extremes = {}
for story in (normal, heavy):
    answer = fit(story, tails, NUTS(chains=4, warmup=500, draws=500), seed=0)
    again = answer.predict(tails, seed=0)["x"]
    extremes[story.__name__] = float((again.abs().amax(-1) >= tails.abs().max()).double().mean())
    print(
        f"{story.__name__:<7} R-hat {answer.diagnostics['rhat']:.3f}, {answer.diagnostics['divergences']} divergences; ",
        end="",
    )
    print(f"new data reach the largest seen value in {extremes[story.__name__]:.0%} of the cases")
    assert answer.diagnostics["rhat"] < 1.02 and answer.diagnostics["divergences"] == 0
assert extremes["normal"] < 0.02 and 0.05 < extremes["heavy"] < 0.95

# %% [markdown]
# ## Exercises
#
# 1. Two chains, three chains, four: with what probability do all chains of the two-peaked story start on the same side, so
#    that R-hat sees nothing?
# 2. Raise `target_accept` of the funnel to 0.99. Do the divergences go, and is the answer right?
# 3. Which statistic of replicated data would *not* have found the heavy tails?
#
# ### Solutions

# %%
# 1. Each side is as likely as the other: 2 / 2^chains.
for chains in (2, 3, 4, 8):
    print(f"{chains} chains: {2 / 2**chains:.1%}")
alone = fit(sign, y, NUTS(chains=1, warmup=300, draws=300), seed=0)
assert alone.diagnostics["rhat"] < 1.1  # one chain agrees with itself

# 2. Fewer divergences, and the neck may be reached; but chains crawl, and R-hat and E-BFMI say so: the geometry is the same.
careful = fit(funnel, noisy, NUTS(chains=4, warmup=500, draws=500, target_accept=0.99), seed=0)
print(f"divergences: {stuck.diagnostics['divergences']}, then {careful.diagnostics['divergences']}")
reached, energy = float((careful.draws["v"] < -5).double().mean()), min(careful.diagnostics["ebfmi"])
print(f"p(v < -5): {reached:.3f}, exactly {low:.3f}; E-BFMI {energy:.2f}, R-hat {careful.diagnostics['rhat']:.2f}")
assert careful.diagnostics["divergences"] <= stuck.diagnostics["divergences"]
assert energy < 0.3 and careful.diagnostics["rhat"] > 1.01

# 3. One that the story was fitted to: mean and variance come out right in every story with a location and a scale.
answer = fit(normal, tails, "em", seed=0)
again = answer.predict(tails, draws=400, seed=0)["x"]
p_value = float((again.var(-1) >= tails.var()).double().mean())
print(f"replicated variances exceed the seen one in {p_value:.0%} of the cases")
assert 0.2 < p_value < 0.8
