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
# # Topics in text, and honest perplexity
#
# **The question.** What is a pile of texts about, when no text is about one thing only? And how can we tell, without fooling
# ourselves, whether one topic model is better than another?

# %%
# %matplotlib inline
import math

import numpy as np
import torch

from inference import EM, SVI, draw_plates, fit, simulate, topics
from zoo import LDA, MultinomialMixture, TokenLDA, load_corpus

corpus = load_corpus()
train, validation, test = corpus.split(validation=0.2, test=0.2, seed=0)
print(corpus)

# %% [markdown]
# Passages of Python's own manual. Three parts: topics are learned on the first, decisions are made on the second, and the
# third is looked at once, at the end.
#
# ## The story
#
# There are $K$ topics, each a distribution over words. A document has shares of the topics. Each of its words first picks a
# topic by these shares, then a word of that topic:
#
# $$\phi_k \sim \mathrm{Dirichlet}(\eta), \quad \theta_d \sim \mathrm{Dirichlet}(\alpha), \quad
# z_{dn} \sim \mathrm{Categorical}(\theta_d), \quad w_{dn} \sim \mathrm{Categorical}(\phi_{z_{dn}}).$$

# %%
small, documents = TokenLDA.example()
figure = draw_plates(small, **documents, title="Latent Dirichlet allocation")
figure

# %% [markdown]
# The order of the words is not part of the story, so counts are enough. `LDA` is the same story told with counts, the
# assignments $z$ summed out, and `fit` takes the corpus as it is.

# %%
posterior = fit(LDA(12), train, seed=0)
words = topics.top_words(posterior, corpus, num=6, rank="frex")
for topic, group in words.groupby("topic"):
    print(f"{topic:>2}  " + ", ".join(group["word"]))
figure = topics.plot_top_words(posterior, corpus)
assert 0.5 < topics.diversity(posterior) <= 1
figure

# %% [markdown]
# What is one document about? The posterior mean of its shares says it, for new documents too. (`posterior.local("theta",
# test)` has draws of them.)

# %%
shares = topics.shares(posterior, test)
main = shares.max(1).values
print(
    f"the largest share of a test document is {main.mean():.0%} on average; one topic only: {(main > 0.9).sum()} documents"
)
assert torch.allclose(shares.sum(1), torch.ones(len(test)).double()) and 0.3 < main.mean() < 0.9

# %% [markdown]
# ## Perplexity
#
# $$\text{perplexity} = \exp\Bigl(-\sum_d \log p(w_d) \Big/ \sum_d N_d\Bigr)$$
#
# is the number of words among which the model is undecided, on average: guessing blindly among $V$ words has perplexity
# $V$. The trouble is $p(w_d) = \int p(\theta)\, \prod_n \sum_k \theta_k \phi_{k w_n}\, \mathrm d\theta$, an integral
# without a closed form. Where there are two topics it can be done by quadrature, and estimators can be put to the test.

# %%
two = fit(LDA(2), train, seed=0)
few = test[:30]
exact = topics.perplexity(two, few, "exact").value
estimates = {
    "left-to-right": topics.perplexity(two, few, "left-to-right", seed=0),
    "annealed": topics.perplexity(two, few, "ais", seed=0),
    "annealed, back": topics.perplexity(two, few, "ais", reverse=True, seed=0),
    "completion": topics.perplexity(two, few, "completion", seed=0),
}
print(f"{'exact':<16} {exact:.2f}")
side = {"upper": "errs upwards", "lower": "errs downwards", "completion": "another question"}
for name, found in estimates.items():
    print(f"{name:<16} {found.value:.2f} ± {found.error:.2f}  {side[found.bound]}")
above, below = estimates["annealed"], estimates["annealed, back"]
assert below.value - 3 * below.error < exact < above.value + 3 * above.error < 1.02 * exact
assert abs(estimates["left-to-right"].value - exact) < 0.01 * exact
assert abs(estimates["completion"].value - exact) > 0.01 * exact

# %% [markdown]
# The first three estimate $p(w_d)$; annealing there and back holds the truth between them, also where it cannot be computed.
# *Completion* answers another question: given one half of a document, how well is the other
# half foretold? Both are honest. They are different numbers, and only equal ones may be compared.
#
# ## Three ways to fool oneself
#
# **1. Peeking.** Fit the shares $\theta_d$ to the test document, then ask how likely its words are under these shares. The
# words have been used twice.

# %%
phi = posterior.draws["phi"][0]
counts = torch.as_tensor(test.counts.toarray()).double()
peeked = math.exp(-float((counts * (shares @ phi).log()).sum() / counts.sum()))
honest = topics.perplexity(posterior, test, "left-to-right", seed=0).value
print(f"peeking {peeked:.0f}, honest {honest:.0f}")
assert peeked < 0.9 * honest

# %% [markdown]
# And the more topics, the more there is to peek with: the gap between what is promised and what is kept grows.

# %%
peeked_by, honest_by = {}, {}
held = torch.as_tensor(validation.counts.toarray()).double()
for K in (1, 3, 12, 50):
    found = fit(LDA(K), train, seed=0)
    plug = topics.shares(found, validation) @ found.draws["phi"][0]
    peeked_by[K] = math.exp(-float((held * plug.log()).sum() / held.sum()))
    honest_by[K] = topics.perplexity(found, validation, "left-to-right", seed=0).value
    print(f"{K:>3} topics: peeking {peeked_by[K]:4.0f}, honest {honest_by[K]:4.0f}")
gaps = [honest_by[K] / peeked_by[K] for K in (1, 3, 12, 50)]
assert math.isclose(gaps[0], 1, rel_tol=1e-6) and gaps[1] < gaps[2] < gaps[3] and gaps[3] > 1.25
assert honest_by[12] < honest_by[1]

# %% [markdown]
# **2. Comparing a bound with an estimate.** What several libraries print as perplexity is the exponential of a variational
# bound. It is larger than the perplexity, by an unknown amount, and another amount for another library.

# %%
bounded = fit(LDA(12), train, SVI(), seed=0)
bound_a_word = math.exp(-bounded.diagnostics["elbo"] / train.num_tokens)
estimate_a_word = topics.perplexity(bounded, train, "left-to-right", seed=0).value
print(f"training rows: exp(-bound a word) {bound_a_word:.0f}, perplexity {estimate_a_word:.0f}")
assert bound_a_word > 1.05 * estimate_a_word

# %% [markdown]
# **3. Another vocabulary.** Leave out rare words and perplexity falls, since there is less to foretell. Without any topic
# at all:

# %%
falls = {}
for least in (1, 5, 10):
    pruned = corpus.pruned(least)
    share = np.asarray(pruned.counts.sum(0)).ravel()
    share = share / share.sum()
    falls[least] = float(np.exp(-(share * np.log(share)).sum()))
    print(
        f"words in at least {least:>2} documents: {pruned.num_words:>5}, perplexity of the plain frequencies {falls[least]:.0f}"
    )
assert falls[1] >= falls[5] > falls[10]

# %% [markdown]
# ## One topic a document is too strict
#
# Let each document have *one* topic: a mixture of multinomials. Its $p(w_d) = \sum_k \pi_k \prod_n \phi_{k w_n}$ is exact,
# and the same perplexity can be computed. Mixing topics pays.

# %%
table = torch.as_tensor(train.counts.toarray()).double()
mixture = fit(MultinomialMixture(12, word_concentration=1.1), table, EM(restarts=2), seed=0)
d = mixture.draw(0)
one = (d["pi"].log() + counts @ d["phi"].log().T).logsumexp(1)
one_topic = math.exp(-float(one.sum() / counts.sum()))
print(f"test perplexity: one topic a document {one_topic:.0f}, mixed topics {honest:.0f}")
assert honest < one_topic

# %% [markdown]
# ## Exercises
#
# 1. Perplexity is not what readers see. Compute the coherence of the topics, and sort them by it: do the best ones read well?
# 2. Draw $\theta$ from its prior and average $p(w_d \mid \theta)$: naive Monte Carlo. How many draws does it need on a long
#    document?
# 3. The mean assignment $\bar z_d$ is another summary of a document. How far is it from the shares $\theta_d$?
#
# ### Solutions

# %%
# 1. Coherent topics consist of words that meet in documents.
coherence = topics.coherence(posterior, train)
for k in np.argsort(-coherence)[[0, 1, -2, -1]]:
    print(f"{coherence[k]:.2f}  " + ", ".join(words[words["topic"] == k]["word"]))
assert coherence.max() > 0.1 and coherence.max() > coherence.min() + 0.05

# 2. The estimate is unbiased, and with few draws its logarithm lies far too low: most theta explain nothing.
row = test[int(test.lengths.argmax())]
reference = float(topics.perplexity(posterior, row, "left-to-right", particles=200, seed=0).rows[0])
w = torch.as_tensor(row.counts.toarray()[0]).double()
w, used = w[w > 0], phi[:, w > 0]  # words that do not occur count nothing
generator = torch.Generator().manual_seed(0)
error = {}
for draws in (10, 1000, 30_000):
    # Dirichlet(0.1, ..., 0.1) by way of gammas, five times over
    theta = torch._standard_gamma(torch.full((5, draws, 12), 0.1).double(), generator=generator)
    log_p = (theta @ used / theta.sum(-1, keepdim=True)).clamp_min(1e-300).log() @ w
    error[draws] = float((log_p.logsumexp(1) - math.log(draws)).mean()) - reference
    print(f"{draws:>6} draws: log p(w) is {error[draws]:+.1f} off")
assert error[10] < error[1000] < error[30_000] and error[10] < -5

# 3. A sum of N_d draws from theta_d: it scatters around it by at most sqrt(theta (1 - theta) / N_d).
mine = TokenLDA(4, concentration=0.5)
dream = simulate(mine, num_documents=300, length=100, num_words=30, seed=0)
z_bar = torch.nn.functional.one_hot(dream["z"], 4).double().mean(1)
theta = dream["theta"].squeeze(1)
apart, expected = (z_bar - theta).square().mean(0), (theta * (1 - theta) / 100).mean(0)
print("mean squared distance:", apart.numpy().round(5), "expected", expected.numpy().round(5))
assert torch.allclose(apart, expected, rtol=0.25)
