"""More stories of strangers: what went wrong with kinds that people bring, held so that it stays mended."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference import EM, NUTS, fit
from inference.story_text import story_text


def rng(seed=0):
    return np.random.default_rng(seed)


def caught_animals(caught, visits=5):
    psi, p = pyro.sample("psi", dist.Beta(1.0, 1.0)), pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("animals", len(caught)):
        z = pyro.sample("z", dist.Bernoulli(psi))
        pyro.sample("caught", dist.Binomial(visits, z * p), obs=caught)


def test_trials_whose_probability_hangs_on_a_summed_out_latent():
    """Capture-recapture: EM ended in PyTorch's words, since the states of z spread the number of trials as well."""
    generator = rng(2)
    caught = np.r_[generator.binomial(5, 0.3, 90), np.zeros(60)]
    found = fit(caught_animals, caught, EM(restarts=2), seed=0)
    psi, p = (float(found.draws[n][0]) for n in ("psi", "p"))

    def density(psi, p):
        return np.log(psi * stats.binom.pmf(caught, 5, p) + (1 - psi) * (caught == 0)).sum()

    grid = max(density(a, b) for a in np.linspace(0.4, 0.8, 81) for b in np.linspace(0.2, 0.4, 81))
    assert density(psi, p) > grid - 1e-6
    exact = psi * 0.7**0 * stats.binom.pmf(0, 5, p) / (psi * stats.binom.pmf(0, 5, p) + 1 - psi)
    assert float(found.local("z")[-1, 1]) == pytest.approx(exact, abs=1e-9)


def answers(person, item, right=None):
    with pyro.plate("persons", int(person.max()) + 1):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("items", int(item.max()) + 1):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("answers", len(person)):
        return pyro.sample("right", dist.Bernoulli(logits=theta[person] - b[item]), obs=right)


def test_rows_that_name_fewer_groups_are_answered():
    """Groups counted in the data: three rows know fewer persons, and every question about them was refused."""
    person, item = (v.ravel() for v in np.meshgrid(np.arange(12), np.arange(6), indexing="ij"))
    right = (rng(1).random(72) < 0.6).astype(float)
    found = fit(answers, (person, item, right), NUTS(chains=1, warmup=100, draws=100), seed=0)
    few = [3, 40, 17]
    torch.testing.assert_close(found.log_prob((person[few], item[few], right[few])), found.log_prob()[few])
    assert found.predict({"person": person[few], "item": item[few]})["right"].shape == (200, 3)
    assert found.sample(5)["right"].shape == (5,)
    for bad in (np.array([3, 12, 1]), np.array([3, -1, 1])):
        with pytest.raises(ValueError, match=r"'theta' has shape|out of"):
            found.log_prob((bad, item[few], right[few]))


def test_states_that_are_counted_in_the_rows_are_told():
    """A switch point has as many states as rows: of three rows nothing is known, in the story's words."""

    def change(y):
        n = len(y)
        s = pyro.sample("s", dist.Categorical(torch.ones(n) / n))
        early, late = pyro.sample("early", dist.Gamma(2.0, 0.5)), pyro.sample("late", dist.Gamma(2.0, 0.5))
        with pyro.plate("time", n):
            pyro.sample("y", dist.Poisson(torch.where(torch.arange(n) < s, early, late)), obs=y)

    y = torch.tensor([5.0, 4, 6, 5, 3, 1, 0, 2, 1, 1, 0, 1])
    found = fit(change, y, EM(restarts=1), seed=0)
    with pytest.raises(ValueError, match=r"'s' has 12 states .* gives it 3 for 3 rows"):
        found.log_prob(y[:3])


def sticks(x, K=4, alpha=1.5):
    with pyro.plate("sticks", K - 1):
        v = pyro.sample("v", dist.Beta(1.0, alpha))
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    pad = torch.nn.functional.pad
    weights = pad(v, (0, 1), value=1.0) * pad((1 - v).cumprod(0), (1, 0), value=1.0)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        return pyro.sample("x", dist.Normal(mu[z], 0.6), obs=x)


def test_sticks_are_broken_in_closed_form():
    """EM climbed them by L-BFGS, thirty runs of the story a step; the fixed point is that of the textbook's counts."""
    x = torch.as_tensor(np.r_[rng(3).normal(-4, 0.6, 50), rng(4).normal(0, 0.6, 30), rng(5).normal(4, 0.6, 20)])
    assert "stick-breaking" in EM().plan(sticks, x)
    found = fit(sticks, x, EM(restarts=1, max_iter=400), seed=0)
    counts = found.local("z").sum(0)
    after = counts.flip(0).cumsum(0).flip(0)[1:]
    exact = counts[:-1] / (counts[:-1] + after + 0.5)  # Beta(1, 1.5): nothing added above, 1 + 1.5 - 2 below
    heavy = counts[:-1] > 0.5
    torch.testing.assert_close(found.draws["v"][0][heavy], exact[heavy], rtol=1e-3, atol=1e-4)


def test_what_only_looks_like_a_stick_is_climbed():
    """Half of the rest each time: the same shape, other weights."""

    def halves(x, K=4):
        with pyro.plate("sticks", K - 1):
            v = pyro.sample("v", dist.Beta(2.0, 2.0))
        pad = torch.nn.functional.pad
        weights = pad(v / 2, (0, 1), value=1.0) * pad((1 - v / 2).cumprod(0), (1, 0), value=1.0)
        mu = torch.arange(float(K))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(mu[z], 0.3), obs=x)

    assert "v            L-BFGS" in EM().plan(halves, torch.randn(30))


def test_a_stick_whose_prior_is_unknown_keeps_climbing_together():
    """Beta(1, alpha) with alpha unknown: EM never descends, and ends where the gradient of the joint density in v is 0."""

    def story(x, K=4):
        alpha = pyro.sample("alpha", dist.Gamma(2.0, 1.0))
        with pyro.plate("sticks", K - 1):
            v = pyro.sample("v", dist.Beta(2.0, 1.0 + alpha))
        pad = torch.nn.functional.pad
        weights = pad(v, (0, 1), value=1.0) * pad((1 - v).cumprod(0), (1, 0), value=1.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=x)

    x = torch.as_tensor(3.0 * rng(6).choice(4, p=[0.4, 0.3, 0.2, 0.1], size=60) + rng(7).normal(size=60))
    assert "stick-breaking" in EM().plan(story, x)
    found = fit(story, x, EM(restarts=1, max_iter=1000, tol=1e-12), seed=0)
    assert (np.diff(found.history) > -1e-9).all()
    values = {n: found.draws[n][0].double().requires_grad_() for n in ("alpha", "v")}
    with found.problem.scope(0), torch.enable_grad():
        slopes = torch.autograd.grad(found.joint.density(values), list(values.values()))
    assert max(float(s.abs().max()) for s in slopes) < 1e-3


def test_a_plate_that_asks_for_a_random_part_shows_all():
    """With subsample_size EM climbed another objective each time, NUTS refused; the density is that of all rows."""

    def line(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(w * x[rows], 1.0), obs=y[rows])

    x = torch.as_tensor(rng(1).normal(size=60))
    y = 1.5 * x + torch.as_tensor(rng(2).normal(size=60))
    found = fit(line, (x, y), EM(restarts=1), seed=0)
    exact = float((x * y).sum() / (x.square().sum() + 0.25))
    assert float(found.draws["w"][0]) == pytest.approx(exact, rel=1e-6)
    torch.testing.assert_close(found.log_prob(), dist.Normal(exact * x, 1.0).log_prob(y))
    assert found.log_prob((x[:7], y[:7])).shape == (7,)
    told = [w for w in found.warnings if "SVI(batch_size=10)" in w]
    assert len(told) == 1 and "asks for 10 of its 60 members" in told[0] and f"note: {told[0]}" in str(found.structure)
    assert not [
        w for w in fit(line, (x[:9], y[:9]), EM(restarts=1), seed=0).warnings if "subsample" in w
    ]  # all 9 fit in
    with pyro.plate("after", 60, subsample_size=10) as rows:  # outside, Pyro is as it was
        assert len(rows) == 10


def test_a_plate_that_is_given_its_part_tells_how_much_each_counts():
    """With subsample=... ten rows stand for sixty, as Pyro scales them; the sd of 1 / sqrt(60) was handed out in silence."""

    def mean(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x), subsample=torch.arange(10)) as rows:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])

    x = torch.as_tensor(rng(1).normal(size=60))
    found = fit(mean, x, NUTS(chains=1, warmup=300, draws=600), seed=0)
    assert float(found.draws["mu"].std()) == pytest.approx((60 + 0.01) ** -0.5, rel=0.15)
    assert any("given 10 of its 60 members" in w and "counts 6 times" in w for w in found.warnings)


def test_a_vector_of_all_rows_is_climbed_with_all_of_them():
    """A latent function beside its rows: EM read parameters off two rows, and blamed the story's shapes."""

    def function(x, y):
        f = pyro.sample(
            "f",
            dist.MultivariateNormal(torch.zeros(len(x)), (-(x[:, None] - x).square()).exp() + 0.1 * torch.eye(len(x))),
        )
        noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, noise), obs=y)

    x = torch.linspace(0, 3, 12, dtype=torch.float64)
    y = torch.sin(x)
    found = fit(function, (x, y), EM(restarts=1), seed=0)
    K = (-(x[:, None] - x).square()).exp() + 0.1 * torch.eye(12, dtype=torch.float64)
    noise = found.draws["noise"][0].double()
    exact = K @ torch.linalg.solve(K + noise**2 * torch.eye(12, dtype=torch.float64), y)
    torch.testing.assert_close(found.draws["f"][0], exact, rtol=0, atol=2e-3)
    for start in (found, fit(function, (x, y), EM(restarts=1), seed=1)):  # the function meets every y, and noise goes to 0
        assert not start.converged and "may have no maximum" in start.warnings[0]
        assert start.history[-1] == start.diagnostics["objective"] > start.history[0]


# -- formulas ----------------------------------------------------------------------------------------------------------


def told(story, *args):
    return story_text(story, *args).splitlines()


def test_vectors_that_meet_a_plate_carry_its_index():
    """phi of (n,), a deterministic rate, a function's values, and sites of a twin plate lost their index."""

    def areas(E, y=None):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([len(E)]).to_event(1))
        rate = pyro.deterministic("rate", E * phi.exp())
        with pyro.plate("areas", len(E)):
            pyro.sample("x", dist.Poisson(E * phi.exp()), obs=y)
            pyro.sample("y", dist.Poisson(rate), obs=y)

    lines = told(areas, torch.arange(1.0, 6.0), torch.ones(5))
    assert "    x_a ~ Poisson(E_a·exp(φ_a))" in "\n".join(lines).replace("E·", "E_a·")
    assert "    y_a ~ Poisson(rate_a)" in lines

    def votes(vote):
        with pyro.plate("members", 5, dim=-2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("bills", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.sample("vote", dist.Bernoulli(logits=b * x), obs=vote)

    line = next(s for s in told(votes, torch.ones(5, 4)) if "Bernoulli" in s)
    vote, logits = line.split(" ~ ")
    row, column = vote.strip()[-2:]
    assert f"b_{column}·x_{row}" in logits


def test_coefficients_of_a_plate_carry_no_index_of_the_rows():
    """As many coefficients as rows: X_n·w needs all of them, whatever their number."""

    def line(X, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    assert "    y_n ~ Normal(X_n·w, 1)" in told(line, torch.randn(4, 4), torch.zeros(4))


def test_rows_of_factors_and_of_hidden_rows_are_told():
    """Arguments of a factor had no index; a covariate of rows that the first row does not need had none either."""

    def censored(x, t):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("seen", -t * (b * x).exp())

    def inflated(x, y=None):
        gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(gate))
            pyro.sample("y", dist.Poisson((1 - z) * x.exp() + 1e-9), obs=y)

    text = "\n".join(told(censored, torch.randn(6), torch.rand(6)))
    assert "t_n" in text
    assert "x_n" in text
    assert "given x_n" in "\n".join(told(inflated, torch.randn(30), torch.ones(30)))


def test_functions_of_the_row_itself_say_so():
    """Poisson(f(s, early, late)) gave every year one rate; a Beta-binomial had lost both of its shapes."""

    def change(y):
        s, a = pyro.sample("s", dist.Uniform(0.0, 5.0)), pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(torch.where(torch.arange(len(y)) < s, a, 2 * a)), obs=y)

    def batting(n, hits):
        m, k = pyro.sample("m", dist.Uniform(0.0, 1.0)), pyro.sample("k", dist.Gamma(2.0, 1.0))
        with pyro.plate("players", len(n)):
            pyro.sample("hits", dist.BetaBinomial(m * k, (1 - m) * k, n), obs=hits)

    assert "    y_n ~ Poisson(f_n(s, a))" in told(change, torch.ones(5))
    hits = next(s for s in told(batting, torch.tensor([5.0, 6.0, 7.0]), torch.ones(3)) if "BetaBinomial" in s)
    assert hits.endswith("~ BetaBinomial(m·k, (1 - m)·k, n_p)")


def test_lengths_and_diagonals_have_signs():
    """‖u_i - u_j‖ of a latent space was f(i, j, u), diag(s) of a covariance was g(s)."""

    def space(i, j, y):
        with pyro.plate("actors", 4):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("pairs", len(i)):
            pyro.sample("y", dist.Bernoulli(logits=-(u[i] - u[j]).norm(dim=-1)), obs=y)

    def cloud(x):
        s = pyro.sample("s", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        L = pyro.sample("L", dist.LKJCholesky(2, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.diag(s) @ L), obs=x)

    i, j = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    assert "‖u[i_p] - u[j_p]‖" in "\n".join(told(space, i, j, torch.ones(3)))
    assert "diag(s)·L" in "\n".join(told(cloud, torch.zeros(3, 2)))


# -- structure ---------------------------------------------------------------------------------------------------------


def test_a_support_that_hangs_on_a_summed_out_count_is_no_moving_edge():
    """The N-mixture model of ecology: y up to n, and n is summed out; every method was refused for it."""

    def visits(y, most=25):
        lam, p = pyro.sample("lam", dist.Gamma(2.0, 0.3)), pyro.sample("p", dist.Beta(2.0, 2.0))
        k = torch.arange(most + 1.0)
        with pyro.plate("sites", len(y), dim=-2):
            n = pyro.sample("n", dist.Categorical(logits=k * lam.log() - lam - torch.lgamma(k + 1)))
            with pyro.plate("visits", y.shape[1], dim=-1):
                pyro.sample("y", dist.Binomial(n, p), obs=y)

    generator = rng(40)
    y = generator.binomial(generator.poisson(6, 30)[:, None], 0.4, (30, 3)).astype(float)
    found = fit(visits, y, EM(restarts=1), seed=0)
    lam, p = (float(found.draws[n][0]) for n in ("lam", "p"))
    k = np.arange(26)
    joint = stats.poisson.pmf(k, lam) / stats.poisson.cdf(25, lam) * stats.binom.pmf(y[:, :, None], k, p).prod(1)
    np.testing.assert_allclose(found.log_prob().numpy(), np.log(joint.sum(1)), rtol=1e-6)
    np.testing.assert_allclose(found.local("n").numpy().squeeze(), joint / joint.sum(1, keepdims=True), atol=1e-6)
    assert fit(visits, y, NUTS(chains=1, warmup=50, draws=50), seed=0).draws["p"].mean() > 0.2

    def edge(y):  # an edge that a continuous latent moves is still refused
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Uniform(0.0, b + z), obs=y)

    with pytest.raises(ValueError, match="depends on a latent"):
        fit(edge, torch.rand(20), EM(), seed=0)


@pytest.mark.processor  # the story holds tensors of its own there
def test_a_pyro_module_is_a_story():
    """Pyro's own way to write a Bayesian regression: its arguments are those of `forward`, and were found to be none."""

    class Line(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.w = pyro.nn.PyroSample(dist.Normal(0.0, 2.0).expand([2]).to_event(1))

        def forward(self, X, y=None):
            mean = X @ self.w
            with pyro.plate("data", len(X)):
                return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    X = torch.as_tensor(rng(1).normal(size=(40, 2)))
    y = X @ torch.tensor([1.0, -1.0], dtype=torch.float64) + torch.as_tensor(rng(2).normal(size=40))
    found = fit(Line(), {"X": X, "y": y}, EM(restarts=1), seed=0)
    exact = torch.linalg.solve(X.T @ X + 0.25 * torch.eye(2), X.T @ y)
    torch.testing.assert_close(found.draws["w"][0].double(), exact, rtol=1e-4, atol=1e-4)
    assert found.log_prob({"X": X[:3], "y": y[:3]}).shape == (3,)


def test_loops_over_a_plate_are_no_rows():
    """`for g in pyro.plate(...)`: members are sites of their own, and questions about rows ended in IndexErrors."""

    def groups(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        for g in pyro.plate("groups", 3):
            a = pyro.sample(f"a_{g}", dist.Normal(mu, 2.0))
            with pyro.plate(f"rows_{g}", y.shape[1]):
                pyro.sample(f"y_{g}", dist.Normal(a, 1.0), obs=y[g])

    y = torch.as_tensor(rng(3).normal(size=(3, 8)) + np.array([[0.0], [2.0], [4.0]]))
    found = fit(groups, y, EM(restarts=1), seed=0)
    mu, a = float(found.draws["mu"][0]), [float(found.draws[f"a_{g}"][0]) for g in range(3)]
    exact = stats.norm(a, 1).logpdf(y.numpy().T).sum()
    assert float(found.log_prob().sum()) == pytest.approx(exact, rel=1e-6)
    assert a[0] == pytest.approx((float(y[0].sum()) + mu / 4) / 8.25, abs=1e-4)


def test_a_site_that_is_seen_in_part_is_told_how():
    """obs_mask makes a latent without a density: EM ended in a KeyError, and finite ones counted their states twice."""

    def partly(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)

    with pytest.raises(ValueError, match=r"'x' is seen in part(.|\n)*NaN"):
        fit(partly, (torch.randn(6), torch.arange(6) % 2 == 0), EM(), seed=0)


@pytest.mark.processor  # the story holds tensors of its own there
def test_draws_of_a_story_in_single_precision_are_asked_in_it():
    """NUTS keeps float64 draws: log_prob of a float32 story stopped in PyTorch's words."""
    weight = dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1)

    def line(X, y=None):
        w = pyro.sample("w", weight)
        with pyro.plate("data", len(X)):
            return pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    X, y = torch.as_tensor(rng(1).normal(size=(20, 2))), torch.as_tensor(rng(2).normal(size=20))
    found = fit(line, {"X": X, "y": y}, NUTS(chains=1, warmup=50, draws=20), seed=0)
    exact = dist.Normal(found.draws["w"].double() @ X.T, 1.0).log_prob(y).logsumexp(0) - np.log(20)
    torch.testing.assert_close(found.log_prob().double(), exact, rtol=1e-4, atol=1e-4)
    assert found.predict({"X": X[:3]})["y"].shape[1:] == (3,)
