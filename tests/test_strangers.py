"""Stories as people write them who have read no code of ours: what they met when they tried, held so that it stays mended."""

import math
import sys

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import EM, NUTS, SVI, fit, inspect, simulate, story_lines
from inference.joint import LogJoint
from inference.mending import StoryError
from inference.problem import prepare


def counted_groups(g, y=None):
    with pyro.plate("groups", int(g.max()) + 1):
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(g)):
        return pyro.sample("y", dist.Normal(b[g], 1.0), obs=y)


def along_the_rows(y=None, T=100):
    T = T if y is None else len(y)
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([T]).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    level = torch.cumsum(z, 0)
    with pyro.plate("time", T):
        return pyro.sample("y", dist.Normal(s * level, 0.5), obs=y)


@pytest.mark.parametrize("rows", [12, 60, 100])
def test_groups_counted_in_the_data_are_all_there(rows):
    """Rows sorted by group: the first forty rows know one group, or of 2,000 rows two; EM gives every group's shrunken mean."""
    g = torch.arange(20).repeat_interleave(rows)
    y = torch.randn(len(g), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + g / 10
    structure = inspect(counted_groups, {"g": g, "y": y})
    assert structure["b"].shape == (20,)
    found = fit(counted_groups, {"g": g, "y": y}, EM(), seed=0).draws["b"][0]
    exact = torch.stack([y[g == k].sum() / (rows + 1 / 9) for k in range(20)])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [100, 1500])
def test_a_latent_that_runs_along_the_rows_keeps_its_length(rows):
    """A random walk outside the data plate was cut to forty steps: the density of all rows is asked here, and by hand."""
    y = simulate(along_the_rows, T=rows, seed=1)["y"]
    problem = prepare(along_the_rows, y, seed=0)
    assert problem.structure["z"].shape == (rows,)
    with problem.scope(0):
        joint = LogJoint(problem)
        draw = joint.prior_draw()
        by_hand = dist.Normal(0.0, 1.0).log_prob(draw["z"]).sum() + dist.HalfNormal(1.0).log_prob(draw["s"])
        by_hand += dist.Normal(draw["s"] * draw["z"].cumsum(0), 0.5).log_prob(y).sum()
        torch.testing.assert_close(joint.density(draw), by_hand)


def test_rows_that_are_no_rows_are_not_cut_into_batches():
    """Batches of a random walk would tell another story: SVI answered from them in silence. Nor are new rows made up."""
    y = simulate(along_the_rows, seed=1)["y"]
    for guide in ("mean_field", "full_rank"):
        with pytest.raises(ValueError, match="size of z changes with the rows"):
            fit(along_the_rows, y, SVI(batch_size=20, guide=guide, steps=20), seed=0)
    posterior = fit(along_the_rows, y, EM(restarts=1), seed=0)
    for ask in (lambda: posterior.log_prob(y[:50]), lambda: posterior.predict(y[:50]), lambda: posterior.sample(5)):
        with pytest.raises(ValueError, match=r"'z' has shape .*read off the data"):
            ask()
    assert posterior.log_prob(y).shape == (100,)


def experts(x, y=None, K=2):
    v = pyro.sample("v", dist.Normal(0.0, 2.0).expand([K, 2]).to_event(2))
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([K, 2]).to_event(2))
    s = pyro.sample("s", dist.HalfNormal(0.5))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(logits=x[:, None] * v[:, 1] + v[:, 0]))
        return pyro.sample("y", dist.Normal(w[k, 0] + w[k, 1] * x, s), obs=y)


def test_crossing_lines_are_found():
    """k-means on y alone always cuts high from low: every restart of EM ended 120 nats below the truth, and said 'one mode'."""
    x = torch.tensor(np.random.default_rng(0).uniform(-2, 2, 150))
    given = {
        "v": torch.tensor([[1.0, 0.0], [0.0, 0.5]]),
        "w": torch.tensor([[0.1, -2.7], [0.7, 2.0]]),
        "s": torch.tensor(0.6),
    }
    truth = simulate(experts, given, x=x, seed=3)
    data = {"x": x, "y": truth["y"]}
    problem = prepare(experts, data, seed=0)
    with problem.scope(0):
        at_truth = LogJoint(problem).density({n: truth[n] for n in ("v", "w", "s")})
    found = fit(experts, data, EM(restarts=2), seed=0)
    assert found.diagnostics["objective"] > float(at_truth)
    slopes = found.draws["w"][0, :, 1].sort().values
    torch.testing.assert_close(slopes, torch.tensor([-2.7, 2.0], dtype=torch.float64), rtol=0.0, atol=0.25)


def survival(x, time, event):
    shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
    scale = torch.exp(beta * x)
    with pyro.plate("data", len(x)):
        with pyro.poutine.mask(mask=event):
            pyro.sample("t", dist.Weibull(scale, shape), obs=time)
        with pyro.poutine.mask(mask=~event):
            pyro.sample("survived", dist.Bernoulli(torch.exp(-((time / scale) ** shape))), obs=torch.ones(len(x)))


def test_truth_values_are_masks():
    """Censored survival: `event` must arrive as bool, else ~event has no meaning; the density is the textbook's."""
    generator = np.random.default_rng(0)
    x, time, event = generator.normal(size=30), generator.weibull(1.5, 30), generator.random(30) < 0.7
    problem = prepare(survival, {"x": x, "time": time, "event": event}, seed=0)
    k, b = 1.3, 0.4
    with problem.scope(0):
        found = LogJoint(problem).density({"shape": torch.tensor(k), "beta": torch.tensor(b)})
    scale = np.exp(b * x)
    hazard = np.log(k / scale) + (k - 1) * np.log(time / scale)
    exact = (event * hazard - (time / scale) ** k).sum()
    exact += float(dist.Gamma(2.0, 1.0).log_prob(torch.tensor(k, dtype=torch.float64)))
    exact += float(dist.Normal(0.0, 2.0).log_prob(torch.tensor(b, dtype=torch.float64)))
    assert float(found) == pytest.approx(exact, abs=1e-6)
    assert problem.kwargs["event"].dtype == torch.bool


def test_an_observed_truth_value_says_what_it_counts_as():
    """Shown to a site, True has no density; the mask beside it is no reason to complain."""

    def coin(seen, x):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    seen = torch.tensor([True, False, True])
    with pytest.raises(TypeError, match=r"^x has dtype bool"):
        inspect(coin, {"seen": seen, "x": seen.clone()})
    inspect(coin, {"seen": seen, "x": seen.double()})


@pytest.mark.parametrize("method", ["nuts", "em", "svi"])
def test_whole_numbers_of_a_frame_are_answers_of_a_logistic_regression(method):
    """A column of 0 and 1 that pandas reads as int64 stopped in PyTorch's words, since its Bernoulli wants floats."""

    def trial(dose, arm, cured=None):
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("arms", 2):
            a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("patients", len(dose)):
            pyro.sample("cured", dist.Bernoulli(logits=a[arm] + b * dose), obs=cured)

    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"dose": generator.normal(size=60), "arm": generator.integers(0, 2, 60)})
    frame["cured"] = generator.binomial(1, 1 / (1 + np.exp(-frame.dose)))
    small = {"nuts": NUTS(chains=2, warmup=100, draws=100), "em": EM(), "svi": SVI(steps=200)}[method]
    found = fit(trial, frame, small, seed=0)
    floats = fit(trial, frame.assign(cured=frame.cured.astype(float)), small, seed=0)
    torch.testing.assert_close(found.draws["b"], floats.draws["b"])
    assert not any("converted" in w for w in found.warnings)


def test_moved_states_are_told_and_never_mixed():
    """`s.unsqueeze(-1)` puts the states of one summed-out latent where nothing, or another latent, belongs."""

    def change(y):
        s = pyro.sample("s", dist.Categorical(torch.ones(len(y)) / len(y)))
        a = pyro.sample("a", dist.Gamma(2.0, 0.5))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Poisson(torch.where(torch.arange(len(y)) < s.unsqueeze(-1), a, 2 * a)), obs=y)

    def two(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        a, _ = pyro.sample("a", dist.Bernoulli(p)), pyro.sample("b", dist.Bernoulli(p))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a.unsqueeze(-1) * 2 - 1.0, 1.0), obs=y)

    y = torch.tensor([3.0, 1, 2, 4, 0, 7, 9, 6])
    for method in ("auto", "em", "svi", "nuts"):
        with pytest.raises(StoryError, match=r"dimension -3 of it belongs to no plate(.|\n)*unsqueeze"):
            fit(change, y, method, seed=0)
        with pytest.raises(StoryError, match="belongs to 'b', which it does not depend on"):
            fit(two, y, method, seed=0)


def test_a_switch_point_is_found_as_by_hand():
    """The right way to write it: p(s | y) at the fitted rates is the prefix sum's softmax."""

    def change(y):
        n = len(y)
        s = pyro.sample("s", dist.Categorical(torch.ones(n) / n))
        early, late = pyro.sample("early", dist.Gamma(2.0, 0.5)), pyro.sample("late", dist.Gamma(2.0, 0.5))
        with pyro.plate("time", n):
            pyro.sample("y", dist.Poisson(torch.where(torch.arange(n) < s, early, late)), obs=y)

    y = torch.tensor([5.0, 4, 6, 5, 3, 1, 0, 2, 1, 1, 0, 1])
    found = fit(change, y, "em", seed=0)
    early, late = (found.draws[n][0] for n in ("early", "late"))
    a, b = dist.Poisson(early).log_prob(y.double()), dist.Poisson(late).log_prob(y.double())
    exact = torch.stack([a[:s].sum() + b[s:].sum() for s in range(len(y))]).softmax(0)
    torch.testing.assert_close(found.local("s").reshape(-1), exact, rtol=1e-6, atol=1e-9)


def league(home, away, won=None):
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("teams", 6):
        skill = pyro.sample("skill", dist.Normal(0.0, spread))
    with pyro.plate("games", len(home)):
        return pyro.sample("won", dist.Bernoulli(logits=skill[home] - skill[away]), obs=won)


def test_a_hierarchy_without_a_highest_point_is_told():
    """EM put spread at 1e-16 and all skills at 0, with the highest density of all, and had nothing to say about it."""
    generator = torch.Generator().manual_seed(0)
    home = torch.randint(0, 6, (80,), generator=generator)
    away = (home + torch.randint(1, 6, (80,), generator=generator)) % 6
    data = {"home": home, "away": away, "won": simulate(league, home=home, away=away, seed=1)["won"]}
    found = fit(league, data, EM(restarts=2), seed=0)
    assert any("spread of skill fell to 0" in w for w in found.warnings)

    def scaled(home, away, won=None):  # the same with a scale that is known has a highest point
        with pyro.poutine.condition(data={"spread": torch.tensor(1.0)}):
            return league(home, away, won)

    assert not any("fell to 0" in w for w in fit(scaled, (home, away, data["won"]), EM(restarts=1), seed=0).warnings)


def test_simulate_says_what_it_lacks_and_follows_single_numbers():
    """Missing covariates were a TypeError of Python's; a network of float32 priors stopped at its first product."""
    with pytest.raises(TypeError, match=r"the story needs \['home', 'away'\].*home=\.\.\., away="):
        simulate(league)
    with pytest.raises(TypeError, match="holds sites fixed, not arguments"):
        simulate(league, {"home": torch.zeros(3)}, away=torch.zeros(3))
    with pytest.raises(TypeError, match=r"does not take \['guest'\]"):
        simulate(league, home=torch.zeros(3), away=torch.zeros(3), guest=1)
    weight = dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1)

    def line(X, y=None):
        with pyro.plate("data", len(X)):
            return pyro.sample("y", dist.Normal(X @ pyro.sample("w", weight), 1.0), obs=y)

    def story(X, y=None):
        w = pyro.sample("w", weight)
        with pyro.plate("data", len(X)):
            return pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    assert simulate(story, X=torch.randn(5, 2), seed=0)["y"].shape == (5,)


@pytest.mark.processor  # the line of the story is told from PyTorch's lines, not from those of a pretended card
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_columns_by_name_and_labels_beyond_a_table_are_told():
    """A frame arrives as one tensor: the message speaks of columns, not of components; labels from 1 are told as such."""

    def table(df):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(df)):
            pyro.sample("y", dist.Normal(a * df["x"], 1.0), obs=df["y"])

    def arms(arm, y):
        with pyro.plate("arms", 2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[arm], 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'df', now of shape .* has no columns by name"):
        fit(table, {"df": pd.DataFrame({"x": [1.0, 2.0], "y": [1.0, 2.0]})})
    with pytest.raises(ValueError, match="'arm' goes up to 2"):
        fit(arms, (torch.tensor([1, 2, 1]), torch.randn(3)))


def test_two_arms_are_listed_though_they_are_rows():
    """A trial of two arms has no globals: its summary showed an empty table."""

    def trial(cured, treated):
        with pyro.plate("arms", 2):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            pyro.sample("cured", dist.Binomial(treated, p), obs=cured)

    data = {"cured": torch.tensor([30.0, 45.0]), "treated": torch.tensor([400.0, 410.0])}
    summary = fit(trial, data, NUTS(chains=2, warmup=300, draws=500), seed=0).summary()
    assert list(summary.table.index) == ["p[0]", "p[1]"]
    exact = np.array([31 / 402, 46 / 412])
    assert np.abs(summary.table["mean"].to_numpy() - exact).max() < 0.003


def test_a_likelihood_told_by_factors_has_rows():
    """Censored survival by pyro.factor: one log density a row, where there was one number with '± nan'."""

    def story(time, event):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("patients", len(time)):
            pyro.factor("ll", event * torch.log(rate) - rate * time)

    time, event = torch.tensor([1.0, 0.5, 2.0, 3.0]), torch.tensor([1.0, 1, 0, 1])
    found = fit(story, (time, event), EM(), seed=0)
    mode = float((1 + event.sum()) / (1 + time.sum()))
    assert float(found.draws["rate"][0]) == pytest.approx(mode, rel=1e-5)
    exact = event * math.log(mode) - mode * time
    torch.testing.assert_close(found.log_prob(), exact.double(), rtol=1e-4, atol=1e-5)
    assert "nan" not in repr(found.score())
    assert inspect(story, (time, event))["ll"].shape == (4,)
    with pytest.raises(ValueError, match=r"pyro\.factor alone"):
        found.sample(3)


def test_a_story_says_a_family_in_one_way():
    """Categorical(softmax(f), logits = g) and TransformedDistribution() were read off what PyTorch keeps inside."""

    def story(x, k=None):
        v = pyro.sample("v", dist.Normal(0.0, 2.0).expand([2, 2]).to_event(2))
        cuts = pyro.sample(
            "cuts",
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.transforms.OrderedTransform()
            ),
        )
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x[:, None] * v[:, 1] + v[:, 0]))
            pyro.sample("k", dist.OrderedLogistic(z - 0.5, cuts), obs=k)

    lines = "\n".join(story_lines(story, torch.randn(5), torch.tensor([0, 1, 2, 1, 0])))
    assert "softmax" not in lines
    assert "logits" in lines
    assert r"\mathrm{Ordered-Normal}(0, 1)" in lines


def walk(y=None, T=25):
    T = T if y is None else len(y)
    scale, level = pyro.sample("scale", dist.HalfNormal(1.0)), 0.0
    for t in pyro.markov(range(T)):
        level = pyro.sample(f"level_{t}", dist.Normal(level, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(level, scale), obs=None if y is None else y[t])


def test_python_time_does_not_rule_out_nuts(monkeypatch):
    """A walk written step by step: auto called NUTS too slow by the gradient in Python, which NUTS does not take."""
    front = sys.modules["inference.fit"]
    problem = prepare(walk, torch.randn(25, generator=torch.Generator().manual_seed(0)), seed=0)
    # half a millisecond a gradient: fifty statements in Python take far longer
    monkeypatch.setattr(front, "PATIENCE", 16_000 * 5e-4)
    assert front.decide(problem, "auto").method.name == "nuts"
    monkeypatch.setattr(front, "captured", lambda problem: math.inf)
    assert front.decide(problem, "auto").method.name == "svi"


def test_long_series_are_cut_short():
    """The table of a story of a hundred steps listed each of them."""
    text = str(inspect(walk, torch.randn(25)))
    assert "level_1 " in text
    assert "level_24" in text
    assert "level_7" not in text
    assert "44 more steps" in text
