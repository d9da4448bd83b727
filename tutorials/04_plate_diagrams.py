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
# # Reading plate diagrams, and writing them
#
# **The question.** A circle, an arrow, a box: how much does such a picture say about a model, and how does one get from a
# picture to a program and back?

# %%
# %matplotlib inline
import math

import pyro
import pyro.distributions as dist
import torch

from inference import NUTS, choose, draw_plates, fit, inspect, simulate, story_text
from zoo import GMM, GaussianHMM, NaiveBayes, TokenLDA, load

# %% [markdown]
# ## Four signs
#
# 1. A **circle** is a random variable. *Shaded*: somebody has seen it. *White*: latent. *Dashed*: computed, not drawn.
# 2. A **dot** is a number that was given or is learned as a point: it has no distribution.
# 3. An **arrow** from $a$ to $b$: the distribution of $b$ is written with $a$.
# 4. A **plate** is a box with a size: everything in it exists that many times, independently given what lies outside.
#
# Somebody tosses bent coins, each ten times:


# %%
def coins(heads=None, num_coins=20):
    a = pyro.sample("a", dist.Gamma(4.0, 2.0))  # how much the coins differ: shared by all of them
    with pyro.plate("coins", num_coins if heads is None else len(heads)):
        p = pyro.sample("p", dist.Beta(a, a))  # this coin's bias
        return pyro.sample("heads", dist.Binomial(10, p), obs=heads)


heads = simulate(coins, seed=0)["heads"]
figure = draw_plates(coins, heads, title="Bent coins")
figure

# %% [markdown]
# Beside the picture stands the same story in mathematics, and `inspect` has it as a table: plates and arrows in words.

# %%
print(story_text(coins, heads))
print(inspect(coins, heads))
structure = inspect(coins, heads)
assert structure["heads"].parents == ("p",) and structure["p"].parents == ("a",)
assert structure["p"].plates == ("coins",) and structure["a"].plates == ()

# %% [markdown]
# ## The picture is a product
#
# Each circle contributes one factor, its distribution given its parents, as often as its plates say:
#
# $$p(a, p, h) = p(a) \prod_{n=1}^{20} p(p_n \mid a)\; p(h_n \mid p_n).$$
#
# That is all the picture says, and it can be checked: the sum of the log factors is the log joint of the program.

# %%
dream = simulate(coins, seed=1)
factors = [
    dist.Gamma(4.0, 2.0).log_prob(dream["a"]),
    dist.Beta(dream["a"], dream["a"]).log_prob(dream["p"]).sum(),
    dist.Binomial(10, dream["p"]).log_prob(dream["heads"]).sum(),
]
trace = pyro.poutine.trace(pyro.condition(coins, dream)).get_trace()
print(f"product of the factors {float(sum(factors)):.6f}, the program {float(trace.log_prob_sum()):.6f}")
assert math.isclose(float(sum(factors)), float(trace.log_prob_sum()), rel_tol=1e-9)

# %% [markdown]
# ## Shading is a question
#
# The same program with other things seen is the same picture with other circles shaded, and another inference problem. Naive
# Bayes with the class seen is counting; with the class hidden it is a mixture.

# %%
survey = load("survey")
print(survey)
x = survey.x.long()
levels = tuple(int(v) + 1 for v in x.max(0).values)
figure = draw_plates(NaiveBayes(levels, num_classes=2), x, title="The class is hidden")
print(choose(inspect(NaiveBayes(levels, num_classes=2), x)))
figure

# %% [markdown]
# ## Plates in plates
#
# Topic models have words in documents. Read from the outside in: there are $K$ topics $\phi_k$; for each document, shares
# $\theta_d$; for each word of it, a topic $z_{dn}$ and a word $w_{dn}$.

# %%
topics, documents = TokenLDA.example()
figure = draw_plates(topics, **documents, title="Latent Dirichlet allocation")
structure = inspect(topics, documents)
assert structure["z"].plates[0] == structure["theta"].plates[0] and len(structure["z"].plates) == 2
assert set(structure["w"].parents) == {"phi", "z"}
figure

# %% [markdown]
# ## Plates that cross
#
# People answer questions. Each answer belongs to a person *and* to a question: two plates that overlap. The program has the
# two plates on two dimensions.


# %%
def exam(y=None, num_people=30, num_questions=8):
    people = pyro.plate("people", num_people if y is None else len(y), dim=-2)
    questions = pyro.plate("questions", num_questions if y is None else y.shape[1], dim=-1)
    with people:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))  # ability
    with questions:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))  # difficulty
    with people, questions:
        return pyro.sample("y", dist.Bernoulli(logits=a - b), obs=y)


y = simulate(exam, seed=2)["y"]
figure = draw_plates(exam, y, title="Who knows what")
assert inspect(exam, y)["y"].plates == ("people", "questions")
figure

# %% [markdown]
# ## Chains
#
# Inside a plate nothing depends on its neighbour: that is what the box means. A chain is therefore drawn as it is, with time
# running to the right and an ellipsis for what goes on.

# %%
chain, weather = GaussianHMM.example()
figure = draw_plates(chain, **weather, title="A hidden Markov model")
figure

# %% [markdown]
# ## What arrows do not say: explaining away
#
# Two causes without an arrow between them are independent, until their common effect is seen. Rain and a sprinkler each wet
# the grass. Seeing wet grass makes both more likely, and then hearing of rain makes the sprinkler less likely again.


# %%
def lawn(wet=None):
    rain = pyro.sample("rain", dist.Bernoulli(0.2))
    sprinkler = pyro.sample("sprinkler", dist.Bernoulli(0.2))
    dry = (1 - 0.9 * rain) * (1 - 0.9 * sprinkler) * 0.99
    return pyro.sample("wet", dist.Bernoulli(1 - dry), obs=wet)


table = {(r, s): 0.2**r * 0.8 ** (1 - r) * 0.2**s * 0.8 ** (1 - s) for r in (0, 1) for s in (0, 1)}
wet = {(r, s): p * (1 - 0.99 * (1 - 0.9 * r) * (1 - 0.9 * s)) for (r, s), p in table.items()}
given_wet = (wet[0, 1] + wet[1, 1]) / sum(wet.values())
given_both = wet[1, 1] / (wet[1, 0] + wet[1, 1])
print(f"p(sprinkler) = 0.2, given wet grass {given_wet:.2f}, given wet grass and rain {given_both:.2f}")
assert given_wet > 0.5 and given_both < 0.25
figure = draw_plates(lawn, torch.tensor(1.0), title="Two causes of one effect")
figure

# %% [markdown]
# ## From a sentence to a program
#
# *"In each of eight schools coaching had an effect; the effects scatter around a common mean; of each we have an estimate
# with a known error."* Ask of every noun: how often does it exist? That is its plate. Was it seen? That is its shade. What
# would one need to know to draw it? Those are its arrows.


# %%
def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))  # once
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))  # once
    with pyro.plate("schools", len(y)):  # eight times
        theta = pyro.sample("theta", dist.Normal(mu, tau))  # not seen; needs mu and tau
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)  # seen; needs theta and the known error


data = {
    "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    "sigma": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
}
figure = draw_plates(schools, **data, title="Eight schools")  # the dot: an error that was given
structure = inspect(schools, data)
assert structure["theta"].parents == ("mu", "tau") and structure.num_rows == 8
figure

# %% [markdown]
# ## Exercises
#
# 1. Draw the Gaussian mixture on paper, then let `draw_plates` draw it. How many circles does it stand for with $K = 3$
#    components and $N = 300$ rows?
# 2. Write the program for this picture: a circle $\lambda_d$ in a plate of 7 days, and in a plate of $N$ hours inside of each
#    day a shaded circle $c$ with an arrow from $\lambda_d$.
# 3. Take the arrow from `a` to `p` out of the coins: what is inferred for a coin that was never tossed, with and without it?
#
# ### Solutions

# %%
# 1. pi once, mu and Lambda 3 times each, z and x 300 times each.
clusters = load("three_clusters").x
structure = inspect(GMM(3), clusters)
circles = sum(math.prod(structure.plates[p] for p in site.plates) for site in structure.sites)
print(f"{circles} circles")
assert circles == 1 + 2 * 3 + 2 * 300


# %%
# 2. The outer plate is the left dimension.
def week(c=None, num_hours=24):
    days = pyro.plate("days", 7, dim=-2)
    hours = pyro.plate("hours", num_hours if c is None else c.shape[1], dim=-1)
    with days:
        rate = pyro.sample("lambda", dist.Gamma(2.0, 1.0))
        with hours:
            return pyro.sample("c", dist.Poisson(rate), obs=c)


counts = simulate(week, seed=0)["c"]
structure = inspect(week, counts)
assert counts.shape == (7, 24) and structure["c"].plates == ("days", "hours") and structure["c"].parents == ("lambda",)
figure = draw_plates(week, counts, title="Counts by the hour")
figure


# %%
# 3. Without the arrow nothing is shared, and a new coin knows only its prior. With it, what the other coins are like counts.
def strangers(heads=None, num_coins=20):
    with pyro.plate("coins", num_coins if heads is None else len(heads)):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        return pyro.sample("heads", dist.Binomial(10, p), obs=heads)


fair = torch.full((30,), 5.0)  # thirty coins, each five heads in ten tosses
alike = fit(coins, fair, NUTS(chains=2, warmup=300, draws=500), seed=0).sample(4000, seed=0)["p"]
alone = simulate(strangers, num_coins=4000, seed=0)[
    "p"
]  # a coin that was not tossed has its prior, whatever the others did
print(f"spread of a new coin's bias: {alike.std():.3f} with the arrow, {alone.std():.3f} without")
assert alike.std() < 0.23 and abs(alone.std() - 1 / math.sqrt(12)) < 0.02
