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

from inference import EM, SVI, draw_plates, fit, topics
from zoo import LDA, MultinomialMixture, TokenLDA, load_corpus

corpus = load_corpus()
train, validation, test = corpus.split(validation=0.2, test=0.2, seed=0)
print(corpus)

# %% [markdown]
# Passages of Python's own manual. Three parts: topics are learned on the first, decisions are made on the second, and the third
# is looked at once, at the end.
#
# ## The story
#
# There are $K$ topics, each a distribution over words. A document has shares of the topics. Each of its words first picks a topic
# by these shares, then a word of that topic:
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
# What is one document about? Its shares, for new documents too.

# %%
shares = posterior.local("theta", test)
main = shares.max(1).values
print(
    f"the largest share of a test document is {main.mean():.0%} on average; {(main > 0.9).double().mean():.0%} have one topic only"
)
assert torch.allclose(shares.sum(1), torch.ones(len(test)).double()) and 0.3 < main.mean() < 0.9

# %% [markdown]
# ## Perplexity
#
# $$\text{perplexity} = \exp\Bigl(-\sum_d \log p(w_d) \Big/ \sum_d N_d\Bigr)$$
#
# is the number of words among which the model is undecided, on average: guessing blindly among $V$ words has perplexity $V$.
# The trouble is $p(w_d) = \int p(\theta)\, \prod_n \sum_k \theta_k \phi_{k w_n}\, \mathrm d\theta$, an integral without a closed
# form. Where there are two topics it can be done by quadrature, and estimators can be put to the test.

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
for name, found in estimates.items():
    print(f"{name:<16} {found.value:.2f} ± {found.error:.2f}  errs to the {found.bound}")
for name in ("left-to-right", "annealed", "annealed, back"):
    assert abs(estimates[name].value - exact) < 0.01 * exact
assert abs(estimates["completion"].value - exact) > 0.01 * exact

# %% [markdown]
# The first three estimate $p(w_d)$. *Completion* answers another question: given one half of a document, how well is the other
# half foretold? Both are honest. They are different numbers, and only equal ones may be compared.
#
# ## Three ways to fool oneself
#
# **1. Peeking.** Fit the shares $\theta_d$ to the test document, then ask how likely its words are under these shares. The words
# have been used twice.

# %%
phi = posterior.draws["phi"][0]
counts = torch.as_tensor(test.counts.toarray()).double()
peeked = math.exp(-float((counts * (shares @ phi).log()).sum() / counts.sum()))
honest = topics.perplexity(posterior, test, "left-to-right", seed=0).value
print(f"peeking {peeked:.0f}, honest {honest:.0f}")
assert peeked < 0.9 * honest

# %% [markdown]
# And the more topics, the more there is to peek with. The honest numbers stop falling, the others do not.

# %%
peeked_by, honest_by = {}, {}
held = torch.as_tensor(validation.counts.toarray()).double()
for K in (1, 3, 12, 50):
    found = fit(LDA(K), train, seed=0)
    plug = found.local("theta", validation) @ found.draws["phi"][0]
    peeked_by[K] = math.exp(-float((held * plug.log()).sum() / held.sum()))
    honest_by[K] = topics.perplexity(found, validation, "left-to-right", seed=0).value
    print(f"{K:>3} topics: peeking {peeked_by[K]:4.0f}, honest {honest_by[K]:4.0f}")
assert peeked_by[50] / peeked_by[12] < honest_by[50] / honest_by[12] and honest_by[12] < honest_by[1]
assert peeked_by[50] < 0.8 * honest_by[50]

# %% [markdown]
# **2. Comparing a bound with an estimate.** What several libraries print as perplexity is the exponential of a variational bound.
# It is larger than the perplexity, by an unknown amount, and another amount for another library.

# %%
bounded = fit(LDA(12), train, SVI(), seed=0)
bound_a_word = math.exp(-bounded.diagnostics["elbo"] / train.num_tokens)
estimate_a_word = topics.perplexity(bounded, train, "left-to-right", seed=0).value
print(f"training rows: exp(-bound a word) {bound_a_word:.0f}, perplexity {estimate_a_word:.0f}")
assert bound_a_word > 1.05 * estimate_a_word

# %% [markdown]
# **3. Another vocabulary.** Leave out rare words and perplexity falls, since there is less to foretell. Without any topic at all:

# %%
falls = {}
for least in (1, 5, 10):
    pruned = corpus.pruned(least)
    share = np.asarray(pruned.counts.sum(0)).ravel()
    share = share / share.sum()
    falls[least] = float(np.exp(-(share * np.log(share)).sum()))
    print(
        f"words in at least {least:>2} documents: {pruned.num_words:>5} words, perplexity of the plain frequencies {falls[least]:.0f}"
    )
assert falls[1] >= falls[5] > falls[10]

# %% [markdown]
# ## One topic a document is too strict
#
# Let each document have *one* topic: a mixture of multinomials. Its $p(w_d) = \sum_k \pi_k \prod_n \phi_{k w_n}$ is exact, and
# the same perplexity can be computed. Mixing topics pays.

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
# 2. For two topics, draw $\theta$ from its prior and average $p(w_d \mid \theta)$: naive Monte Carlo. How many draws does it need
#    on a document of 40 words?
# 3. The mean assignment $\bar z_d$ is another summary of a document. How far is it from the shares $\theta_d$?
#
# ### Solutions

# %%
# 1. Coherent topics consist of words that meet in documents.
coherence = topics.coherence(posterior, train)
for k in np.argsort(-coherence)[[0, 1, -2, -1]]:
    print(f"{coherence[k]:.2f}  " + ", ".join(words[words["topic"] == k]["word"]))
assert coherence.max() > 0.1 and coherence.max() > coherence.min() + 0.05

# 2. The estimate is unbiased; its logarithm lies too low until there are enough draws.
phi2 = two.draws["phi"][0]
alpha = 0.1 if "alpha" not in two.draws else two.draws["alpha"][0]
row = few[:1]
truth = float(topics.perplexity(two, row, "exact").rows[0])
print(f"log p(w) of the first document: {truth:.2f}")
