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
# # Writing your own story and guide
#
# **The question.** Bicycles on a bridge are counted on 120 days. The counts grow, and they scatter more than chance alone
# would make them. How does one get from this sentence to a story, to an answer, and to a guide that answers fast and for
# new days too?

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch.distributions import constraints

from inference import NUTS, SVI, check, choose, draw_plates, fit, inspect, load, simulate

t = torch.linspace(-1, 1, 120).double()  # time, from the first day to the last

# %% [markdown]
# ## Step 1: the least that could be true
#
# A count wants a Poisson; a rate is positive, so its logarithm grows with time:
# $x_n \sim \mathrm{Poisson}(e^{a + b t_n})$. Say it as a program. Data are arguments; `x=None` lets the story dream.


# %%
def steady(t, x=None):
    a = pyro.sample("a", dist.Normal(3.0, 1.0))  # about 20 bicycles a day
    b = pyro.sample("b", dist.Normal(0.0, 0.5))  # growth, on the scale of the logarithm
    with pyro.plate("data", len(t)):
        return pyro.sample("x", dist.Poisson((a + b * t).exp()), obs=x)


# %% [markdown]
# **Before any data, let it dream.** Priors are claims. Does the story dream of bridges, or of a million bicycles?

# %%
dreams = torch.stack([simulate(steady, t=t, seed=s)["x"] for s in range(200)])
print(
    f"mean counts of 200 dreams: 5 % below {dreams.mean(1).quantile(0.05):.0f}, 5 % above {dreams.mean(1).quantile(0.95):.0f}"
)
assert 1 < dreams.mean(1).median() < 100 and dreams.max() < 10_000

# %% [markdown]
# ## Step 2: ask the story about itself
#
# `inspect` runs it and reads its structure; `choose` says which inference is valid, and why. The data, by the way, come
# from a story that we shall reach in step 4.

# %%
secret = {"a": 3.0, "b": 0.5, "s": 0.4}
generator = torch.Generator().manual_seed(0)
noise = 0.4 * torch.randn(120, generator=generator).double()
x = torch.poisson((3.0 + 0.5 * t + noise).exp(), generator=generator)
print(inspect(steady, {"t": t, "x": x}))
print(choose(inspect(steady, {"t": t, "x": x})))
assert inspect(steady, {"t": t, "x": x}).num_rows == 120

# %% [markdown]
# ## Step 3: fit, and hold its dreams against the data
#
# A good model's new data look like the old data. A Poisson's variance is its mean; these counts scatter more.

# %%
first = fit(steady, {"t": t, "x": x}, NUTS(chains=2, warmup=300, draws=300), seed=0)


def scatter(counts):
    """Variance of the counts around their trend, in units of the Poisson's own."""
    rate = (first.draws["a"].mean() + first.draws["b"].mean() * t).exp()
    return ((counts - rate).square() / rate).mean(-1)


again = scatter(first.predict({"t": t}, seed=0)["x"])
print(
    f"scatter: seen {scatter(x):.2f}, in new data of the fitted story {again.mean():.2f}, never above {again.max():.2f}"
)
assert scatter(x) > 1.5 * again.max()

# %% [markdown]
# ## Step 4: tell what is missing
#
# Days differ: weather, holidays. Each day gets a push of its own, $\varepsilon_n \sim \mathcal N(0, s)$. A story with a
# guide to come is best a small class.


# %%
class Bridge:
    """Counts that grow, with days of their own."""

    def model(self, t, x=None):
        a = pyro.sample("a", dist.Normal(3.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
        s = pyro.sample("s", dist.HalfNormal(0.5))
        with pyro.plate("data", len(t)):
            e = pyro.sample("e", dist.Normal(0.0, s))
            return pyro.sample("x", dist.Poisson((a + b * t + e).exp()), obs=x)


data = {"t": t, "x": x}
figure = draw_plates(Bridge(), t, x, title="Bicycles on a bridge")
nuts = fit(Bridge(), data, NUTS(chains=4, warmup=500, draws=500), seed=0)
print({name: f"{nuts.draws[name].mean():.2f} ± {nuts.draws[name].std():.2f}" for name in "abs"}, "truth", secret)
for name, value in secret.items():
    assert (nuts.draws[name].mean() - value).abs() < 3 * nuts.draws[name].std()
again = scatter(nuts.predict({"t": t}, seed=0)["x"])
print(f"scatter: seen {scatter(x):.2f}, in new data between {again.quantile(0.05):.2f} and {again.quantile(0.95):.2f}")
assert again.quantile(0.025) < scatter(x) < again.quantile(0.975)
figure

# %% [markdown]
# ## Step 5: is the inference right?
#
# Truth from the prior, data from the story, draws from the method: then the truth's rank among the draws is uniform.
# `check` does this, here with few simulations on twenty days.

# %%
calibration = check(
    Bridge(), {"t": t[::6], "x": x[::6]}, NUTS(chains=1, warmup=200, draws=200), simulations=20, seed=0, progress=False
)
print(calibration)
assert calibration.passed

# %% [markdown]
# ## Step 6: a guide
#
# SVI fits a distribution $q$. Without a guide it takes one that holds for any story, and here is not good: it thinks that the
# pushes of the days and the trend are independent, though together they must explain each count.

# %%
plain = fit(Bridge(), data, SVI(guide="mean_field"), seed=0)
print(f"mean field: b ± {plain.draws['b'].std():.3f}, NUTS: b ± {nuts.draws['b'].std():.3f}")
assert plain.draws["b"].std() < 0.7 * nuts.draws["b"].std()

# %% [markdown]
# A guide is a second program with the same arguments. It samples every latent once, under the same name and in the same
# plates, from a distribution with parameters (`pyro.param`) that SVI learns. It may use what it has sampled so far, *and
# the data*.
#
# Here we know a good guess for a day, given the trend. The count says that the log rate is about $\log x_n$, with variance
# about $1/x_n$; the prior says $0$ with variance $s^2$. Two normals multiply:
#
# $$q(\varepsilon_n \mid a, b, s, x_n) =
# \mathcal N\Bigl(\frac{x_n\,(\log x_n - a - b t_n)}{x_n + 1/s^2},\; \frac1{x_n + 1/s^2}\Bigr).$$


# %%
class GuidedBridge(Bridge):
    """The same story, with an educated guess."""

    def guide(self, t, x=None):
        loc = pyro.param("ab.loc", lambda: torch.tensor([3.0, 0.0]))
        scale = pyro.param("ab.scale", lambda: torch.tensor([0.1, 0.1]), constraint=constraints.positive)
        a = pyro.sample("a", dist.Normal(loc[0], scale[0]))
        b = pyro.sample("b", dist.Normal(loc[1], scale[1]))
        s_loc = pyro.param("s.loc", lambda: torch.tensor(-1.0))
        s_scale = pyro.param("s.scale", lambda: torch.tensor(0.1), constraint=constraints.positive)
        s = pyro.sample("s", dist.LogNormal(s_loc, s_scale))  # s is positive, and so is its guess
        with pyro.plate("data", len(t)):
            seen = x + 0.5  # log 0 would be minus infinity
            precision = seen + 1 / s**2
            pyro.sample("e", dist.Normal((seen.log() - a - b * t) * seen / precision, precision.rsqrt()))


guided = fit(GuidedBridge(), data, SVI(guide="story"), seed=0)
print(f"{'':<12}{'b':>16}{'s':>16}")
for name, p in {"NUTS": nuts, "guide": guided, "mean field": plain}.items():
    print(f"{name:<12}" + "".join(f"{p.draws[v].mean():9.3f} ± {p.draws[v].std():.3f}" for v in "bs"))
for name in "abs":
    assert (guided.draws[name].mean() - nuts.draws[name].mean()).abs() < 0.5 * nuts.draws[name].std()
    assert 0.75 < guided.draws[name].std() / nuts.draws[name].std() < 1.25

# %% [markdown]
# Eight numbers instead of two for each day: the guess for a day is *computed* from its count. That is amortisation, and it
# is why the guide knows days that it has never seen.

# %%
new = {"t": torch.tensor([0.0, 0.0]).double(), "x": torch.tensor([5.0, 60.0]).double()}
push = guided.local("e", new)
print("push of a day with 5 bicycles and of one with 60:", push.mean(0).numpy().round(2))
assert push.mean(0)[0] < -0.4 and push.mean(0)[1] > 0.4

figure = Figure(figsize=(6, 3), layout="constrained")
ax = figure.subplots()
band = guided.predict({"t": t}, seed=0)["x"].double().quantile(torch.tensor([0.05, 0.95]).double(), dim=0)
ax.fill_between(t, *band, alpha=0.25, label="90 % of new days")
ax.plot(t, x, ".", ms=4, color="black", label="seen")
ax.set(xlabel="time", ylabel="bicycles")
ax.legend(frameon=False)
inside = ((band[0] <= x) & (x <= band[1])).double().mean()
print(f"{inside:.0%} of the days lie in the band")
assert 0.83 < inside < 0.99
figure

# %% [markdown]
# **A guide that forgets or invents is refused**, by name.


# %%
class Inventive(GuidedBridge):
    def guide(self, t, x=None):
        super().guide(t, x)
        pyro.sample("weather", dist.Normal(0.0, 1.0))


try:
    fit(Inventive(), data, SVI(guide="story"), seed=0)
except ValueError as error:
    print(error)
    assert "'weather'" in str(error)

# %% [markdown]
# ## Step 7: keep it
#
# One file, with a checksum and without code in it; the story is given again when it is loaded.

# %%
file = guided.save(Path(tempfile.mkdtemp()) / "bridge.fit")
loaded = load(file, GuidedBridge())
assert torch.equal(loaded.draws["b"], guided.draws["b"])
print(f"{file.stat().st_size / 1024:.0f} kB")

# %% [markdown]
# ## Exercises
#
# 1. Weekends: give the story a covariate `weekend` (0 or 1) with an effect of its own, and find it again in simulated data.
# 2. The pushes may be *given* a heavy tail: replace their normal by a Student's t. Which part of the guide may stay?
# 3. What does the steady story (step 1) answer for the growth $b$, and how sure is it? Why is that dangerous?
#
# ### Solutions


# %%
# 1. One more line in the story, one more argument.
def weekends(t, weekend, x=None):
    a = pyro.sample("a", dist.Normal(3.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 0.5))
    c = pyro.sample("c", dist.Normal(0.0, 0.5))
    with pyro.plate("data", len(t)):
        return pyro.sample("x", dist.Poisson((a + b * t + c * weekend).exp()), obs=x)


weekend = (torch.arange(120) % 7 > 4).double()
ridden = simulate(weekends, given={"a": 3.0, "b": 0.5, "c": -0.7}, t=t, weekend=weekend, seed=0)["x"]
effect = fit(weekends, {"t": t, "weekend": weekend, "x": ridden}, NUTS(chains=2, warmup=300, draws=300), seed=0).draws[
    "c"
]
print(f"effect of the weekend {effect.mean():.2f} ± {effect.std():.2f}, truth -0.7")
assert (effect.mean() + 0.7).abs() < 3 * effect.std()


# 2. All of it: a guide need not know the prior, it is corrected by what it learns, and k-hat says whether that was enough.
class Heavy(GuidedBridge):
    def model(self, t, x=None):
        a = pyro.sample("a", dist.Normal(3.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
        s = pyro.sample("s", dist.HalfNormal(0.5))
        with pyro.plate("data", len(t)):
            e = pyro.sample("e", dist.StudentT(4.0, 0.0, s))
            return pyro.sample("x", dist.Poisson((a + b * t + e).exp()), obs=x)


heavy = fit(Heavy(), data, SVI(guide="story"), seed=0)
print(f"b {heavy.draws['b'].mean():.2f} ± {heavy.draws['b'].std():.2f}, k-hat {heavy.diagnostics['khat']:.2f}")
assert (heavy.draws["b"].mean() - nuts.draws["b"].mean()).abs() < 2 * nuts.draws["b"].std()

# 3. Much too sure: it takes every scatter for a signal.
print(f"steady story: b ± {first.draws['b'].std():.3f}; with days of their own ± {nuts.draws['b'].std():.3f}")
assert first.draws["b"].std() < 0.7 * nuts.draws["b"].std()
