"""Enumeration EM against scikit-learn, Baum-Welch, brute force and algebra."""

import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_iris, load_wine
from sklearn.mixture import GaussianMixture
from stories import gaussian_mixture, hidden_markov, mixed_columns, mixed_columns_data, normal_mixture, regression

from inference import EM, fit
from zoo import GMM

WINE = load_wine().data
DATA = {"iris": load_iris().data, "wine": (WINE - WINE.mean(0)) / WINE.std(0)}


def sklearn_trajectory(x, covariance, start, iterations):
    """Mean log-likelihood after 0, 1, 2, ... iterations of scikit-learn from the same start."""
    weights, means, precisions = start
    model = GaussianMixture(
        len(weights),
        covariance_type=covariance,
        reg_covar=0.0,
        tol=0.0,
        max_iter=1,
        warm_start=True,
        weights_init=weights,
        means_init=means,
        precisions_init=precisions,
    )
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model._initialize_parameters(x, np.random.RandomState(0))
        model.weights_, model.means_ = weights, means
        for _ in range(iterations):
            log_prob = model._e_step(x)[0]
            scores.append(log_prob)
            model._m_step(x, model._e_step(x)[1])
    return np.array(scores)


def start_for(x, covariance, k=3):
    """Weights, means and precisions from random rows, in scikit-learn's shapes and in the story's."""
    rng = np.random.RandomState(1)
    means, d, spread = x[rng.choice(len(x), k, replace=False)], x.shape[1], 1 / x.var(0)
    weights = np.array([0.2, 0.3, 0.5])
    precisions = {
        "full": np.stack([np.diag(spread)] * k),
        "tied": np.diag(spread),
        "diag": np.stack([spread] * k),
        "spherical": np.full(k, spread.mean()),
    }[covariance]
    site = "Lambda" if covariance in ("full", "tied") else "tau"
    assert d == means.shape[1]
    return (weights, means, precisions), {"pi": weights, "mu": means, site: precisions}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("covariance", ["full", "diag", "tied", "spherical"])
def test_follows_scikit_learn(name, covariance):
    """The same start gives the same log-likelihood at every iteration, to 1e-6 a point; catches any wrong update."""
    x = DATA[name]
    theirs, ours = start_for(x, covariance)
    expected = sklearn_trajectory(x, covariance, theirs, 25)
    em = EM(estimate="mle", start=ours, ridge=0.0, tol=0.0, max_iter=25)
    found = np.array(fit(GMM(3, covariance=covariance), x, em, seed=0).diagnostics["log_likelihoods"]) / len(x)
    assert len(found) == 25 and found[-1] > found[0] + 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_bare_mixture_finds_the_same_optimum_as_scikit_learn():
    """A user's own story, from its own starts: not below scikit-learn's best of ten."""
    x = DATA["iris"]
    best = GaussianMixture(3, n_init=10, reg_covar=1e-6, tol=1e-7, max_iter=500, random_state=0).fit(x).score(x)
    found = fit(gaussian_mixture, x, EM(estimate="mle"), seed=0).diagnostics["log_likelihood"] / len(x)
    assert found > best - 1e-3


def brute_force_mixed(values, data):
    """log p(row, z) of every row and state, by scipy-free arithmetic."""
    b, c, k = (data[n].double().numpy() for n in "bck")
    pi, p, rate, phi = (values[n].numpy() for n in ("pi", "p", "rate", "phi"))
    log_c = c[:, None] * np.log(rate) - rate - np.array([math.lgamma(v + 1) for v in c])[:, None]
    return np.log(pi) + np.where(b[:, None] == 1, np.log(p), np.log(1 - p)) + log_c + np.log(phi[:, k.astype(int)]).T


def test_mixed_columns_equal_brute_force():
    """Bernoulli, Poisson and categorical columns: one EM step by hand, with Beta, Gamma and Dirichlet modes."""
    data = mixed_columns_data(60)
    start = {"pi": [0.4, 0.6], "p": [0.3, 0.6], "rate": [3.0, 6.0], "phi": [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]]}
    seen = []
    em = EM(start=start, max_iter=2, tol=0.0, callback=lambda i, objective, theta: seen.append(theta))
    posterior = fit(mixed_columns, data, em, seed=0)
    joint = brute_force_mixed(seen[0], data)
    r = np.exp(joint - logsumexp(joint, 1, keepdims=True))
    n, b, c = r.sum(0), data["b"].numpy(), data["c"].numpy()
    hot = np.eye(4)[data["k"].numpy()]
    np.testing.assert_allclose(posterior.diagnostics["log_likelihoods"][0], logsumexp(joint, 1).sum(), atol=1e-8)
    np.testing.assert_allclose(seen[1]["pi"], n / n.sum(), atol=1e-10)
    np.testing.assert_allclose(seen[1]["p"], (r.T @ b + 1) / (n + 2), atol=1e-10)
    np.testing.assert_allclose(seen[1]["rate"], (r.T @ c + 1) / (n + 0.5), atol=1e-10)
    np.testing.assert_allclose(seen[1]["phi"], r.T @ hot / n[:, None], atol=1e-10)
    probabilities = brute_force_mixed(seen[1], data)
    probabilities = np.exp(probabilities - logsumexp(probabilities, 1, keepdims=True))
    np.testing.assert_allclose(posterior.local("z"), probabilities, atol=1e-8)


def baum_welch(x, pi, A, mu, iterations):
    """Textbook scaled forward-backward (Rabiner 1989) with the story's normal prior on the means."""
    n, T = x.shape
    history = []
    for _ in range(iterations):
        e = norm.pdf(x[..., None], mu, 1.0)
        alpha, scale = np.zeros((n, T, len(pi))), np.zeros((n, T))
        for t in range(T):
            a = (pi if t == 0 else alpha[:, t - 1] @ A) * e[:, t]
            scale[:, t] = a.sum(1)
            alpha[:, t] = a / scale[:, t, None]
        beta = np.ones((n, T, len(pi)))
        for t in range(T - 2, -1, -1):
            beta[:, t] = (beta[:, t + 1] * e[:, t + 1]) @ A.T / scale[:, t + 1, None]
        gamma = alpha * beta
        xi = sum(
            alpha[:, t, :, None] * A * (e[:, t + 1] * beta[:, t + 1] / scale[:, t + 1, None])[:, None, :]
            for t in range(T - 1)
        )
        history.append((np.log(scale).sum(), pi, A, mu, gamma))
        pi = gamma[:, 0].sum(0) / n
        A = xi.sum(0) / xi.sum((0, 2))[:, None]
        mu = (gamma * x[..., None]).sum((0, 1)) / (gamma.sum((0, 1)) + 1 / 100.0)
    return history


def test_hmm_equals_baum_welch():
    """Likelihood, updates and state probabilities of a chain, to 1e-8 over ten iterations."""
    x = np.random.RandomState(0).randn(15, 7) + 3 * (np.random.RandomState(1).rand(15, 7) > 0.6)
    start = {"pi": [0.5, 0.5], "A": [[0.7, 0.3], [0.4, 0.6]], "mu": [-1.0, 2.0]}
    expected = baum_welch(x, *(np.array(start[n]) for n in ("pi", "A", "mu")), 10)
    posterior = fit(hidden_markov, x, EM(start=start, max_iter=10, tol=0.0), seed=0)
    np.testing.assert_allclose(posterior.diagnostics["log_likelihoods"], [h[0] for h in expected], atol=1e-8)
    for site, value in zip(("pi", "A", "mu"), expected[-1][1:4]):
        np.testing.assert_allclose(posterior.draws[site][0], value, atol=1e-8)
    np.testing.assert_allclose(posterior.local("z_3"), expected[-1][4][:, 3], atol=1e-8)


def test_hmm_likelihood_equals_all_paths():
    x = torch.randn(3, 5, dtype=torch.float64)
    posterior = fit(hidden_markov, x, EM(max_iter=3), seed=0)
    d = posterior.draw(0)
    paths = list(itertools.product(range(2), repeat=5))
    total = 0.0
    for row in x.numpy():
        terms = []
        for path in paths:
            value = math.log(d["pi"][path[0]]) + sum(math.log(d["A"][a, b]) for a, b in itertools.pairwise(path))
            terms.append(value + norm.logpdf(row, d["mu"].numpy()[list(path)], 1.0).sum())
        total += logsumexp(terms)
    assert math.isclose(posterior.log_prob().sum().item(), total, abs_tol=1e-10)


@pytest.mark.parametrize("story", [gaussian_mixture, normal_mixture])
def test_objective_never_falls(story):
    """Monotone in closed form and with L-BFGS on statistics (the half-normal scale has no closed form)."""
    x = torch.cat([torch.randn(60, 2) - 3, torch.randn(40, 2) * 0.5 + 2])
    posterior = fit(story, x if story is gaussian_mixture else x[:, 0], EM(restarts=1, tol=1e-10), seed=3)
    steps = np.diff(posterior.history)
    assert len(steps) >= 1 and steps.min() > -1e-8 and posterior.converged


def test_statistics_and_data_tiers_agree():
    """The same mixture through sufficient statistics and through its rows (a weight hides the family)."""

    def weighted(x):
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            with pyro.poutine.scale(scale=torch.tensor(1.0)):
                pyro.sample("x", dist.Normal(mu[z], sigma[z]), obs=x)

    def plain(x):
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(mu[z], sigma[z]), obs=x)

    x = torch.cat([torch.randn(60) - 3, torch.randn(40) * 0.5 + 2])
    start = {"mu": [-1.0, 1.0], "sigma": [1.0, 1.0]}
    by_rows, by_sums = (fit(s, x, EM(start=start, tol=1e-12), seed=0) for s in (weighted, plain))
    assert "on data" in by_rows.diagnostics["plan"] and "on statistics" in by_sums.diagnostics["plan"]
    for site in ("mu", "sigma"):
        torch.testing.assert_close(by_rows.draws[site], by_sums.draws[site], atol=1e-5, rtol=0)


def test_map_of_a_regression_is_ridge():
    """No finite latent: one M-step, the mode; weights satisfy the normal equations at the fitted noise."""
    X = torch.randn(80, 3, dtype=torch.float64)
    y = X @ torch.tensor([1.0, 2.0, -1.0]).double() + 0.3 * torch.randn(80)
    d = fit(regression, {"X": X, "y": y}, "em", seed=0).draw(0)
    ridge = torch.linalg.solve(X.T @ X + d["sigma"] ** 2 * torch.eye(3), X.T @ y)
    torch.testing.assert_close(d["w"], ridge, atol=1e-5, rtol=0)


@pytest.mark.parametrize("covariance", ["full", "diag", "tied", "spherical"])
def test_kernel_equals_contraction(covariance):
    """Two matrix products give what the generic contraction gives, to 1e-8, iteration by iteration."""
    _, start = start_for(DATA["wine"], covariance)
    options = {"start": start, "max_iter": 15, "tol": 0.0}
    fast, slow = (
        fit(GMM(3, covariance=covariance), DATA["wine"], EM(kernels=k, **options), seed=0) for k in (True, False)
    )
    np.testing.assert_allclose(fast.history, slow.history, rtol=0, atol=1e-8)


def test_kernel_equals_contraction_for_mixed_columns():
    data = mixed_columns_data(80)
    fast, slow = (
        fit(mixed_columns, data, EM(restarts=1, kernels=k, max_iter=15, tol=0.0), seed=0) for k in (True, False)
    )
    np.testing.assert_allclose(fast.history, slow.history, rtol=0, atol=1e-8)


def test_chunks_change_nothing(monkeypatch):
    """Rows in chunks give the same sums as all at once."""
    from inference.methods.em import estep

    x = DATA["iris"]
    whole = fit(gaussian_mixture, x, EM(restarts=1, max_iter=5, tol=0, kernels=False), seed=0)
    monkeypatch.setattr(estep, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(estep, "CHUNK_ROWS", 37)
    parts = fit(gaussian_mixture, x, EM(restarts=1, max_iter=5, tol=0, kernels=False), seed=0)
    np.testing.assert_allclose(parts.history, whole.history, rtol=1e-12)


def test_missing_cells_leave_the_likelihood():
    """NaN cells: the log-likelihood at the answer is that of the seen cells' marginals (scipy)."""
    from scipy.stats import multivariate_normal

    x = DATA["iris"][::3].copy()
    x[4, 1] = x[7, 3] = x[7, 0] = np.nan
    posterior = fit(gaussian_mixture, x, EM(restarts=1, max_iter=20), seed=0)
    d = posterior.draw(0)
    rows = []
    for row in x:
        seen = ~np.isnan(row)
        terms = [
            math.log(d["pi"][k])
            + multivariate_normal.logpdf(
                row[seen], d["mu"][k].numpy()[seen], np.linalg.inv(d["precision"][k].numpy())[np.ix_(seen, seen)]
            )
            for k in range(3)
        ]
        rows.append(logsumexp(terms))
    np.testing.assert_allclose(posterior.log_prob(), rows, atol=1e-8)
    assert np.diff(posterior.history).min() > -1e-8


def test_one_component_is_the_posterior_mode_of_a_normal():
    """K = 1: the only weight is 1, and the precision is the mode under its Wishart prior."""
    x = DATA["iris"]
    d = fit(GMM(1), x, "em", seed=0).draw(0)
    scatter = (x - d["mu"][0].numpy()).T @ (x - d["mu"][0].numpy()) + 2 / 9 * np.eye(4)
    assert abs(float(d["pi"][0]) - 1.0) < 1e-12
    np.testing.assert_allclose(np.linalg.inv(d["Lambda"][0].numpy()), scatter / (len(x) + 1), rtol=1e-6)


@pytest.mark.parametrize("estimate", ["map", "mle"])
def test_more_components_than_rows_and_equal_rows(estimate):
    """K > N and rows that are all equal run without division by zero or NaN."""
    for x in (torch.randn(6, 2), torch.ones(20, 2)):
        posterior = fit(GMM(10, covariance="diag"), x, EM(restarts=2, estimate=estimate, max_iter=30), seed=0)
        assert all(v.isfinite().all() for v in posterior.draws.values())


def test_same_seed_same_bits_and_other_seeds_differ(untouched):
    x = DATA["iris"]
    runs = [fit(gaussian_mixture, x, EM(restarts=1), seed=s) for s in (4, 4, 6)]
    assert all(torch.equal(runs[0].draws[n], runs[1].draws[n]) for n in runs[0].draws)
    assert runs[0].history != runs[2].history


def test_learned_parameters_are_maximised():
    """`pyro.param` has no prior: its value is the maximum likelihood estimate."""

    def story(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = torch.randn(50, dtype=torch.float64) * 2 + 1
    d = fit(story, x, EM(ridge=0.0), seed=0).draw(0)
    torch.testing.assert_close(torch.stack([d["loc"], d["scale"]]), torch.stack([x.mean(), x.std(correction=0)]))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"restarts": 0}, "restarts"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"tol": math.nan}, "tol"),
        ({"estimate": "mean"}, "'mle'"),
        ({"ridge": -1e-3}, "ridge"),
    ],
)
def test_options_are_checked(options, word):
    with pytest.raises(ValueError, match=word):
        EM(**options)


def test_a_wrong_start_is_named():
    with pytest.raises(ValueError, match="precision"):
        fit(gaussian_mixture, DATA["iris"], EM(start={"pi": [1.0]}))
    wrong = {"pi": np.ones(3) / 3, "mu": np.zeros((2, 4)), "precision": np.stack([np.eye(4)] * 3)}
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\)"):
        fit(gaussian_mixture, DATA["iris"], EM(start=wrong))
