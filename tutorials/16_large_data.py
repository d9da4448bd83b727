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
# # Large data: from disk, in blocks, on whatever device there is
#
# **The question.** A table does not fit into memory, or new rows come every day, or there is a graphics card. What changes
# in the story? Nothing. What changes in the call? Very little.

# %%
# %matplotlib inline
import tempfile
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from inference import EM, SVI, draw_plates, fit
from zoo import GMM

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A file that is not read
#
# 240,000 rows of eight columns, written block by block, as a measuring device would. `np.memmap` makes an array of the
# file: the operating system reads a page when it is looked at, and forgets it when memory is short. Nothing here depends on
# the number of rows; take 240 million and go for a walk.

# %%
N, D, K = 240_000, 8, 4
rng = np.random.default_rng(0)
centres = 1.2 * rng.standard_normal((K, D))
shares = np.array([0.4, 0.3, 0.2, 0.1])
big = np.memmap(folder / "big.f32", dtype="float32", mode="w+", shape=(N, D))
for start in range(0, N, 40_000):
    z = rng.choice(K, size=40_000, p=shares)
    big[start : start + 40_000] = centres[z] + rng.standard_normal((40_000, D))
big.flush()
rows = np.memmap(folder / "big.f32", dtype="float32", mode="r", shape=(N, D))
print(f"{rows.nbytes / 1e6:.0f} MB on disk")

# %% [markdown]
# ## The same story, the same call
#
# EM walks over the rows in blocks. What it keeps of a block are sums: how many rows each component has, and the sums of
# $r_{nk} x_n$ and $r_{nk} x_n x_n^\top$. Sums of blocks add up to the sums of all rows, so the blocks change nothing.

# %%
story = GMM(K, covariance="diag", scale=2.0)
figure = draw_plates(story, np.array(rows[:1000]), title="A mixture does not care how many rows there are")
begin = time.perf_counter()
posterior = fit(story, rows, EM(restarts=1), seed=0)
seconds = time.perf_counter() - begin
print(posterior)
print(f"{seconds:.1f} s, {N * posterior.diagnostics['iterations'] / seconds / 1e6:.1f} million rows a second")
found = posterior.draws["mu"][0]
order = torch.cdist(torch.from_numpy(centres), found).argmin(1)
error = (found[order] - torch.from_numpy(centres)).abs().max()
print(f"largest error of a centre: {error:.3f}")
assert error < 0.05 and torch.allclose(posterior.draws["pi"][0][order], torch.from_numpy(shares), atol=0.01)
figure

# %% [markdown]
# **From disk or from memory: one answer.** And float32 rows stay float32; only the sums are made in double precision.

# %%
small = 20_000
by_disk = fit(story, rows[:small], EM(restarts=1), seed=0)
by_memory = fit(story, torch.from_numpy(np.array(rows[:small])), EM(restarts=1), seed=0)
gap = abs(by_disk.diagnostics["log_likelihood"] - by_memory.diagnostics["log_likelihood"])
print(f"log-likelihoods differ by {gap:.1e} of {abs(by_disk.diagnostics['log_likelihood']):.0f}")
assert gap < 1e-6 * abs(by_disk.diagnostics["log_likelihood"])

# %% [markdown]
# Why double sums? A float32 has seven digits. Adding a million ones to sixteen million in steps of one changes nothing at
# all.

# %%
total = np.float32(2**24)
for _ in range(1000):
    total += np.float32(1.0)
print(f"16,777,216 + 1,000 in single precision: {int(total):,}")
assert total == 2**24

# %% [markdown]
# ## Steps after each block
#
# A pass over all rows for one step is a waste where rows are many: the first block already knows the direction.
# *Incremental* EM takes an M-step after each block and still never descends; it is what `EM()` does by itself from 200,000
# rows on.

# %%
half = np.array(rows[:60_000])
kinds = {
    name: fit(story, half, EM(restarts=1, driver=name, batch_size=6_000), seed=0) for name in ("batch", "incremental")
}
for name, p in kinds.items():
    print(f"{name:<12} {p.diagnostics['iterations']:>3} passes, log-likelihood {p.diagnostics['log_likelihood']:.1f}")
assert kinds["incremental"].diagnostics["iterations"] <= kinds["batch"].diagnostics["iterations"]
likelihoods = [p.diagnostics["log_likelihood"] for p in kinds.values()]
assert abs(likelihoods[0] - likelihoods[1]) < 1e-4 * abs(likelihoods[0])

# %% [markdown]
# ## Rows that keep coming
#
# *Stepwise* EM keeps running averages instead of the rows. Yesterday's answer is where today starts, and yesterday's rows
# may be thrown away.

# %%
first = fit(story, half[:30_000], EM(driver="stepwise", restarts=1), seed=0)
second = fit(story, half[30_000:], EM(driver="stepwise", start=first), seed=0)
fresh = torch.from_numpy(np.array(rows[100_000:110_000]))
density = [float(p.log_prob(fresh).mean()) for p in (first, second, posterior)]
print("log density of new rows: day one {:.4f}, day two {:.4f}, all rows at once {:.4f}".format(*density))
assert density[1] > density[2] - 0.01

# %% [markdown]
# ## Devices
#
# `device="auto"` is the default and always works. With a CUDA card, `device="cuda"` moves rows and sums there; without one
# it is refused, in words, and before any work.

# %%
if torch.cuda.is_available():
    on_card = fit(story, rows, EM(restarts=1), seed=0, device="cuda")
    assert abs(on_card.diagnostics["log_likelihood"] / posterior.diagnostics["log_likelihood"] - 1) < 1e-6
else:
    try:
        fit(story, rows, device="cuda")
    except ValueError as error:
        print(error)
        assert "device='cpu'" in str(error)
anywhere = fit(story, half, EM(restarts=1), seed=0, device="auto")
assert anywhere.converged

# %% [markdown]
# ## When there is no sum to keep: SVI on batches
#
# A logistic regression has no sufficient statistics. SVI looks at a few rows a step and weighs them up,
#
# $$\widehat{\mathrm{ELBO}} = \frac NB \sum_{n \in \text{batch}} \log p(y_n \mid \beta) - \mathrm{KL}(q \,\|\, p),$$
#
# which is right on average. `batch_size` is all that is said.

# %%
X = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)).double()
truth = torch.tensor([1.0, -2.0, 0.5]).double()
y = (torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(X @ truth)).double()


def clicks(X, y=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(X)):
        return pyro.sample("y", dist.Bernoulli(logits=X @ beta), obs=y)


batched = fit(clicks, {"X": X, "y": y}, SVI(batch_size=500, steps=1500), seed=0)
mode = fit(clicks, {"X": X, "y": y}, EM(), seed=0).draws["beta"][0]
curvature = (X.T * (torch.sigmoid(X @ mode) * torch.sigmoid(-X @ mode))) @ X
sd = curvature.inverse().diagonal().sqrt()
print(
    "500 rows a step:",
    batched.draws["beta"].mean(0).numpy().round(3),
    "±",
    batched.draws["beta"].std(0).numpy().round(3),
)
print("all rows, mode: ", mode.numpy().round(3), "±", sd.numpy().round(3), "by its curvature")
assert ((batched.draws["beta"].mean(0) - mode).abs() < 2 * sd).all()
assert torch.allclose(batched.draws["beta"].std(0), sd, rtol=0.35)

# %% [markdown]
# ## A long run that is interrupted
#
# `budget` is a limit in seconds; the best answer so far is returned, and says that it is not converged. A `checkpoint` lets
# the same fit go on from there, to the same bits as without the interruption.

# %%
state = folder / "climb.state"
cut = fit(story, half, EM(restarts=1, max_iter=2, tol=0.0, checkpoint=state), seed=0)
print(*cut.warnings, sep="\n")
resumed = fit(story, half, EM(restarts=1, max_iter=6, tol=0.0, checkpoint=state), seed=0)
whole = fit(story, half, EM(restarts=1, max_iter=6, tol=0.0), seed=0)
print(f"after 2 passes {cut.history[-1]:.2f}, resumed to 6 {resumed.history[-1]:.6f}, at once {whole.history[-1]:.6f}")
assert not cut.converged and cut.history[-1] < whole.history[-1] and resumed.history[-1] == whole.history[-1]

# %% [markdown]
# ## Exercises
#
# 1. How many rows are needed? Fit 1 % of them and compare the log density of new rows.
# 2. Show for a normal that the sums of two halves give the answer of the whole, and say which three numbers must be kept.
# 3. How much noise does a batch of $B$ rows put into the estimate of the ELBO? Check that its standard deviation falls as
#    $1/\sqrt B$.
#
# ### Solutions

# %%
# 1. Often far fewer than there are: the loss is about (number of parameters) / (2 rows) nats a row.
sample = np.array(rows[:: N // 2400])
hundredth = fit(story, sample, EM(restarts=3), seed=0)
loss = density[2] - float(hundredth.log_prob(fresh).mean())
parameters = K * 2 * D + K - 1
print(f"1 % of the rows: {loss:.4f} nats a row lost, expected about {parameters / (2 * len(sample)):.4f}")
assert 0 < loss < 5 * parameters / (2 * len(sample))

# 2. The count, the sum and the sum of squares.
a, b = half[:10_000, 0].astype(float), half[10_000:, 0].astype(float)
kept = [np.array([len(p), p.sum(), (p**2).sum()]) for p in (a, b)]
n, s, q = kept[0] + kept[1]
assert np.isclose(s / n, half[:, 0].mean(dtype=float)) and np.isclose(q / n - (s / n) ** 2, half[:, 0].var(dtype=float))

# 3. A sum of B independent terms, times N / B.
terms = torch.distributions.Bernoulli(logits=X @ mode).log_prob(y)
generator = torch.Generator().manual_seed(0)
noise = {
    B: torch.stack(
        [terms[torch.randint(20_000, (B,), generator=generator)].sum() * 20_000 / B for _ in range(300)]
    ).std()
    for B in (50, 800)
}
print({B: round(float(v)) for B, v in noise.items()})
assert abs(noise[50] / noise[800] - 4) < 0.8
