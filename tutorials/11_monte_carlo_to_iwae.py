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
# # From naive Monte Carlo to importance sampling to IWAE
#
# **The question.** A latent-variable model gives $p(x) = \sum_z p(z)\,p(x \mid z)$, a sum over everything that could have
# been behind $x$. How is such a sum estimated, why is the obvious way useless, and what do ELBO and IWAE have to do with
# it? We ask models whose exact answer is known, so that every claim can be checked.

# %%
# %matplotlib inline
import math

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch.distributions import constraints

from inference import SVI, draw_plates, fit, simulate

generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## Fourteen switches
#
# Each of $K = 14$ switches is on or off with probability ½, and each that is on adds its column of $W$ to what we see:
#
# $$z_k \sim \mathrm{Bernoulli}(\tfrac12), \qquad x \sim \mathcal N(W z, 1.5^2 I).$$
#
# There are $2^{14} = 16{,}384$ settings: few enough to add up. With thirty switches there would be $2^{30}$, with a hundred
# nobody would try.

# %%
K, D = 14, 20
W = torch.randn(D, K, generator=generator).double()
states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * K)
secret = (torch.rand(K, generator=generator) < 0.5).double()
x = W @ secret + 1.5 * torch.randn(D, generator=generator).double()


def log_likelihood(z):
    """log p(x | z) for settings z (..., K)."""
    return torch.distributions.Normal(z @ W.T, 1.5).log_prob(x).sum(-1)


joint = log_likelihood(states) - K * math.log(2)
exact = float(joint.logsumexp(0))
posterior = (joint - exact).exp().sort(descending=True).values
print(
    f"log p(x) = {exact:.2f}; of {len(states):,} settings the likeliest {int((posterior.cumsum(0) < 0.99).sum()) + 1} hold 99 %"
)
assert posterior[:50].sum() > 0.99

# %% [markdown]
# ## Naive Monte Carlo: unbiased and useless
#
# Draw $z$ from its prior, and average $p(x \mid z)$. The average of the average is right. But nearly all settings explain
# nothing, the few that matter are hardly ever drawn, and what is seen is an estimate that is far too small, almost always.


# %%
def naive(draws, times):
    """log of the averaged likelihood, `times` times over."""
    z = (torch.rand(times, draws, K, generator=generator) < 0.5).double()
    return log_likelihood(z).logsumexp(-1) - math.log(draws)


low = naive(100, 500)
off, under = float(low.median() - exact), float((low < exact).double().mean())
print(f"100 draws: in the median {off:.1f} nats off; too low {under:.0%} of the time")
assert low.median() < exact - 5 and under > 0.9
expectation = float((log_likelihood(states) - K * math.log(2)).exp().sum())
assert math.isclose(math.log(expectation), exact)  # the expectation of one draw is p(x) itself: unbiased

# %% [markdown]
# ## Importance sampling: look where it matters
#
# Draw $z$ from a proposal $q$ that favours good explanations, and divide by how much it favours them:
#
# $$p(x) = \mathbb E_{q}\Bigl[\frac{p(z)\,p(x \mid z)}{q(z)}\Bigr].$$
#
# Any $q$ that is nowhere zero is right. The best is $q(z) = p(z \mid x)$, whose weights are all the same number, $p(x)$. We
# take a cheap relative: each switch for itself, with its own posterior probability, and never surer than 99 %.

# %%
weights = (joint - exact).exp()
on = (weights @ states).clamp(0.01, 0.99)


def importance(draws, times):
    """log of the mean weight, and the effective number of draws, `times` times over."""
    z = (torch.rand(times, draws, K, generator=generator).double() < on).double()
    log_q = torch.distributions.Bernoulli(on).log_prob(z).sum(-1)
    log_w = log_likelihood(z) - K * math.log(2) - log_q
    return log_w.logsumexp(-1) - math.log(draws), log_w.softmax(-1).square().sum(-1).reciprocal()


found, effective = importance(100, 500)
off, worth = float((found - exact).abs().median()), float(effective.median())
print(f"100 draws: {off:.3f} nats off in the median; worth {worth:.0f} draws")
assert (found - exact).abs().median() < 0.3 and effective.median() > 10

# %%
figure = Figure(figsize=(6, 2.4), layout="constrained")
ax = figure.subplots()
for height, values in enumerate((found, low)):
    jitter = 0.6 * (torch.rand(len(values), generator=generator) - 0.5)
    ax.scatter(values - exact, height + jitter, s=5, lw=0, alpha=0.6)
ax.axvline(0, color="black", lw=1)
ax.set(xlabel="estimate of log p(x), less the exact one, in nats", yticks=[0, 1])
ax.set_yticklabels(["importance\nsampling", "naive"])
ax.spines[["top", "right"]].set_visible(False)
figure

# %% [markdown]
# ## From one observation to many: amortise
#
# For each $x$ we would need another $q$. An *encoder* $q(z \mid x)$ serves all rows. The second model is linear and
# Gaussian, so its evidence is known, and so is the best encoder of a given form:
#
# $$z_n \sim \mathcal N(0, I_2), \quad x_n \sim \mathcal N(W z_n, 0.7^2 I), \quad
# q(z \mid x) = \mathcal N(A x, \mathrm{diag}(s^2)).$$
#
# The two columns of $W$ are nearly parallel, so the true posterior is a thin slanted ellipse, and $q$, told to lie along
# the axes, cannot be it.


# %%
class Factors:
    """Two latent factors; an encoder that cannot be quite right."""

    W = torch.tensor([[1.0, 0.9], [0.8, 1.0], [1.0, 0.8], [0.9, 1.0], [1.0, 1.0], [0.7, 0.9]]).double()

    def model(self, x=None, num_data=60):
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z @ self.W.T.to(z), 0.7).to_event(1), obs=x)

    def guide(self, x=None, num_data=60):
        A = pyro.param("A", lambda: torch.zeros(6, 2))
        s = pyro.param("s", lambda: torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", num_data if x is None else len(x)):
            pyro.sample("z", dist.Normal(x @ A, s).to_event(1))


story = Factors()
rows = simulate(story, num_data=60, seed=0)["x"]
figure = draw_plates(story, rows, title="Two factors")
covariance = story.W @ story.W.T + 0.49 * torch.eye(6)
evidence = float(torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance).log_prob(rows).sum())
print(f"log p(x) of 60 rows: {evidence:.2f}")
figure

# %% [markdown]
# ## The ELBO is importance sampling with one draw, on the wrong side of the logarithm
#
# $\log \mathbb E_q[w] \ge \mathbb E_q[\log w]$: the right-hand side is the ELBO. It lies below by exactly
# $\mathrm{KL}(q \,\|\, p(z \mid x))$. Here the best axis-parallel $q$ is known: with the posterior's precision $P$ it has the
# variances $1/P_{kk}$, and
#
# $$\mathrm{KL} = \tfrac12\Bigl(\sum_k \log P_{kk} - \log\det P\Bigr) \text{ a row}.$$

# %%
P = torch.eye(2) + story.W.T @ story.W / 0.49
gap = float(len(rows) * (P.diagonal().log().sum() - P.logdet()) / 2)
elbo = fit(story, rows, SVI(guide="story", steps=1500), seed=0)
reached = elbo.diagnostics["elbo"]
print(f"ELBO {reached:.2f}; evidence less divergence {evidence - gap:.2f}")
assert abs(reached - (evidence - gap)) < 0.02 * abs(evidence)

# %% [markdown]
# ## IWAE: more draws inside of the logarithm
#
# $$\mathcal L_k = \mathbb E\Bigl[\log \frac1k \sum_{i=1}^k w_i\Bigr], \qquad
# \text{ELBO} = \mathcal L_1 \le \mathcal L_2 \le \dots \le \log p(x).$$
#
# `SVI(objective="iwae", particles=k)` climbs it. Each bound is the mean of the last steps of its run.

# %%
runs = {1: elbo}
for k in (5, 50):
    runs[k] = fit(story, rows, SVI(guide="story", steps=1200, objective="iwae", particles=k), seed=0)
bound = {k: sum(run.history[-200:]) / 200 for k, run in runs.items()}
for k, value in bound.items():
    print(f"k = {k:>2}: {value:.1f}, {evidence - value:.1f} nats below log p(x)")
assert bound[1] < bound[5] < bound[50] < evidence + 1 and evidence - bound[50] < 0.1 * (evidence - bound[1])

# %% [markdown]
# **A guide for weights is another guide.** The ELBO punishes a $q$ that is wide, the importance weights one that is narrow:
# what is never proposed is never found. Trained with fifty draws, $q$ grows until it covers the ellipse. As an
# approximation of the posterior by itself it is worse; as a proposal it is better.

# %%
print("trained by the ELBO:   ", runs[1].diagnostics["ladder"])
print("trained with 50 draws: ", runs[50].diagnostics["ladder"])
true_spread = P.inverse().diagonal().sqrt()
spreads = {k: run.local("z").std(0).mean(0) for k, run in runs.items()}
print("true spread", true_spread.numpy().round(2), {k: s.numpy().round(2).tolist() for k, s in spreads.items()})
assert (spreads[1] < 0.6 * true_spread).all() and (spreads[50] > spreads[1]).all()
assert runs[50].diagnostics["elbo"] < runs[1].diagnostics["elbo"] - 50

# %% [markdown]
# **And the diagnostics know.** $\hat k$ is the shape of the tail of the weights: above 0.7 their mean cannot be trusted,
# and the answer says so in a warning.

# %%
print("k-hat bad in", {k: f"{run.diagnostics['khat_bad_rows']:.0%} of the rows" for k, run in runs.items()})
print(*runs[1].warnings, sep="\n")
assert runs[1].diagnostics["khat_bad_rows"] > 0.1 and runs[50].diagnostics["khat_bad_rows"] < 0.05

# %% [markdown]
# ## Exercises
#
# 1. How many naive draws does the model with switches need until its median error is below one nat? Count without simulating.
# 2. Let the proposal for the switches never be surer than 60 %. What happens to the effective number of draws?
# 3. The mean weight is unbiased, its logarithm is not: show with the second model that $\log \hat p$ lies too low by about
#    half of its variance.
#
# ### Solutions

# %%
# 1. About one over the probability of hitting a state that matters: the likeliest ones, each at 2^-K.
needed = 2**K / int((posterior > 0.1 * posterior[0]).sum())
print(f"about {needed:,.0f} draws for one hit, while adding up everything takes {2**K:,}")
assert needed > 500

# 2. A timid proposal is nearly the prior.
on = on.clamp(0.4, 0.6)
timid, worth = importance(100, 200)
print(
    f"timid: worth {float(worth.median()):.1f} of 100 draws, {float((timid - exact).median()):.0f} nats off in the median"
)
assert worth.median() < 3 and timid.median() < exact - 1

# 3. With weights of small relative variance v / S: E[log p_hat] is about log p - v / (2 S), and its variance is v / S.
mean, spread = rows @ (story.W @ P.inverse() / 0.49), P.inverse() * 1.5
q = torch.distributions.MultivariateNormal(mean, spread)
# 2,000 repetitions of 20 draws for 60 rows
z = mean + torch.randn(2000, 20, 60, 2, generator=generator).double() @ torch.linalg.cholesky(spread).T
prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
log_w = prior + torch.distributions.Normal(z @ story.W.T, 0.7).log_prob(rows).sum(-1) - q.log_prob(z)
log_p = log_w.logsumexp(1) - math.log(20)
true = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance).log_prob(rows)
bias, half = float((log_p - true).mean()), float(-log_p.var(0).mean() / 2)
print(f"bias of log p {bias:.5f}, minus half of its variance {half:.5f}")
assert bias < 0 and math.isclose(bias, half, rel_tol=0.25)
