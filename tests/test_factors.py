"""PPCA, factor analysis and their mixtures: exact integrals and EM against scipy, scikit-learn and algebra."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as Peer

from inference import EM, choose, fit, inspect
from inference.choose import NoMethodError
from inference.joint import LogJoint
from inference.linear_gaussian import GaussianRows
from zoo import PPCA, FactorAnalysis, MixtureOfFactorAnalysers, load

SCORES, RODS = load("two_factors").x, load("two_rods").x


def covariance(d, component=None):
    W = d["W"] if component is None else d["W"][component]
    return (W @ W.T + torch.diag(d["psi"].expand(len(W)))).numpy()


def angle(A, B):
    """Largest principal angle between two subspaces, in radians."""
    a, b = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    return float(torch.linalg.svdvals(a.T @ b).clamp(max=1).min().acos())


def with_holes(x, share=0.3, seed=0):
    x = x.clone()
    x[torch.from_numpy(np.random.RandomState(seed).rand(*x.shape) < share)] = math.nan
    return x[~x.isnan().all(1)]


# Exact integrals


def test_row_densities_are_those_of_the_marginal_normal():
    """z integrated out of the story as written equals Normal(mu, W W^T + psi), to 1e-10."""
    posterior = fit(FactorAnalysis(2), SCORES, EM(restarts=1, max_iter=20), seed=0)
    d = posterior.draw(0)
    expected = multivariate_normal.logpdf(SCORES.numpy(), d["mu"].numpy(), covariance(d))
    np.testing.assert_allclose(posterior.log_prob(), expected, atol=1e-10)
    assert posterior.score().bound == "plug-in" and "exact" in posterior.score().estimator


def test_row_densities_with_missing_cells_are_those_of_the_seen_ones():
    x = with_holes(SCORES[:60])
    posterior = fit(FactorAnalysis(2), x, EM(restarts=1, max_iter=20), seed=0)
    d, expected = posterior.draw(0), []
    for row in x.numpy():
        seen = ~np.isnan(row)
        cov = covariance(d)[np.ix_(seen, seen)]
        expected.append(multivariate_normal.logpdf(row[seen], d["mu"].numpy()[seen], cov))
    np.testing.assert_allclose(posterior.log_prob(), expected, atol=1e-9)
    assert math.isclose(posterior.diagnostics["log_likelihood"], sum(expected), abs_tol=1e-7)


def test_factors_have_the_posterior_of_the_formula():
    """Bishop 2006, equation 12.42, for new rows: mean within 4 Monte Carlo errors, covariance within 10 %."""
    posterior = fit(FactorAnalysis(2), SCORES, EM(restarts=1), seed=0)
    d = posterior.draw(0)
    M = torch.eye(2) + d["W"].T @ (d["W"] / d["psi"][:, None])
    mean = (SCORES[:5] - d["mu"]) / d["psi"] @ d["W"] @ torch.linalg.inv(M)
    z = posterior.local("z", SCORES[:5], draws=4000)
    assert z.shape == (4000, 5, 2)
    torch.testing.assert_close(z.mean(0), mean, atol=4 * float(torch.linalg.inv(M).max()) ** 0.5 / 4000**0.5, rtol=0)
    torch.testing.assert_close(torch.cov(z[:, 0].T), torch.linalg.inv(M), rtol=0.1, atol=0.02)


def test_a_mixtures_rows_equal_the_sum_over_components():
    posterior = fit(MixtureOfFactorAnalysers(2, 1, scale=2.0), RODS, EM(restarts=2, max_iter=60), seed=0)
    d = posterior.draw(0)
    terms = [
        math.log(d["pi"][c]) + multivariate_normal.logpdf(RODS.numpy(), d["mu"][c].numpy(), covariance(d, c))
        for c in range(2)
    ]
    np.testing.assert_allclose(posterior.log_prob(), logsumexp(terms, axis=0), atol=1e-9)
    p = np.exp(terms - logsumexp(terms, axis=0)).T
    np.testing.assert_allclose(posterior.local("c"), p, atol=1e-9)
    assert (posterior.local("c").argmax(1) == load("two_rods").labels).double().mean() > 0.97


def test_a_bent_decoder_is_no_linear_gaussian_story():
    def bent(x):
        W = pyro.sample("W", dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(torch.tanh(z @ W.T), 0.5).to_event(1), obs=x)

    structure = inspect(bent, SCORES[:, :2])
    assert not structure.linear_gaussian
    with pytest.raises(NoMethodError, match="not linear-Gaussian"):
        fit(bent, SCORES[:, :2], "em")
    assert choose(structure, "point").method.name != "em"


# EM


def test_ppca_without_priors_is_the_eigendecomposition():
    """Tipping and Bishop's maximum: likelihood of scikit-learn's PCA (whose variances divide by N - 1), same subspace."""
    posterior = fit(PPCA(2), SCORES, EM(estimate="mle"), seed=0)
    d, peer = posterior.draw(0), PCA(2).fit(SCORES.numpy())
    n = len(SCORES)
    values = torch.linalg.eigvalsh(torch.cov(SCORES.T, correction=0))
    assert math.isclose(float(d["psi"]), float(values[:-2].mean()), rel_tol=1e-8)
    torch.testing.assert_close(torch.linalg.eigvalsh(d["W"] @ d["W"].T)[-2:], values[-2:] - d["psi"], rtol=1e-7, atol=0)
    assert angle(d["W"], torch.from_numpy(peer.components_.T)) < 1e-6
    assert peer.score(SCORES.numpy()) < posterior.diagnostics["log_likelihood"] / n < peer.score(SCORES.numpy()) + 1e-3


@pytest.mark.parametrize("method", ["lapack", "randomized"])
def test_factor_analysis_is_not_below_scikit_learn(method):
    posterior = fit(FactorAnalysis(2), SCORES, EM(estimate="mle", tol=1e-12, ridge=0.0), seed=0)
    peer = Peer(2, tol=1e-10, max_iter=5000, svd_method=method, random_state=0).fit(SCORES.numpy())
    assert posterior.diagnostics["log_likelihood"] / len(SCORES) > peer.score(SCORES.numpy()) - 1e-8
    assert angle(posterior.draw(0)["W"], torch.from_numpy(peer.components_.T)) < 1e-3
    np.testing.assert_allclose(posterior.draw(0)["psi"], peer.noise_variance_, rtol=1e-3)


def test_factor_analysis_becomes_ppca_when_noise_is_spherical():
    """The same rows, noise tied by the story: EM on one regression each finds PPCA's maximum."""

    def tied(x):
        D = x.shape[1]
        W = pyro.param("W", torch.randn(D, 2))
        mu = pyro.param("mu", torch.zeros(D))
        psi = pyro.param("psi", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
            pyro.sample("x", dist.Normal(z @ W.T + mu, psi.sqrt().expand(D)).to_event(1), obs=x)

    one = fit(tied, SCORES, EM(estimate="mle"), seed=0)
    two = fit(PPCA(2), SCORES, EM(estimate="mle"), seed=0)
    assert math.isclose(one.diagnostics["log_likelihood"], two.diagnostics["log_likelihood"], abs_tol=1e-6)
    assert angle(one.draw(0)["W"], two.draw(0)["W"]) < 1e-6


def turned(x):
    """Loadings kept as (K, D), no mean, noise as a scale."""
    D = x.shape[1]
    loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([2, D]).to_event(2))
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings, 1 / tau.sqrt()).to_event(1), obs=x)


@pytest.mark.parametrize("story", [FactorAnalysis(2), PPCA(2), turned])
@pytest.mark.parametrize("holes", [False, True])
def test_sums_and_the_storys_own_marginal_climb_to_the_same_mode(story, holes):
    """Recognised sums against L-BFGS on exact integrals of the story as written, and no step down."""
    x = with_holes(SCORES[:120]) if holes else SCORES[:120]
    fast = fit(story, x, EM(restarts=1, tol=1e-10, max_iter=3000), seed=0)
    slow = fit(story, x, EM(restarts=1, tol=1e-10, kernels=False), seed=0)
    assert "not recognised" in slow.diagnostics["plan"] and "not recognised" not in fast.diagnostics["plan"]
    assert np.diff(fast.history).min() > -1e-8 and fast.converged
    assert math.isclose(fast.diagnostics["objective"], slow.diagnostics["objective"], abs_tol=1e-4)
    with fast.problem.scope(0):
        rows = GaussianRows(LogJoint(fast.problem), fast.draw(0), fast.problem.kwargs)
    assert math.isclose(float(rows.log_rows.sum()), fast.diagnostics["log_likelihood"], abs_tol=1e-7)


def test_complete_rows_through_the_code_for_missing_cells_give_the_same_sums():
    """Row by row, by component and from the scatter: the same sums to 1e-8."""
    from inference.methods.em.linear_sums import by_component, by_row, from_scatter, scatter_of

    mean, S = scatter_of(SCORES, torch.float64)
    torch.testing.assert_close(S / (len(SCORES) - 1), torch.cov(SCORES.T))
    W, c, psi = torch.randn(1, 6, 2).double(), torch.randn(1, 6).double(), torch.rand(1, 6).double() + 0.2
    none = torch.zeros(1, dtype=torch.float64)
    a = from_scatter(S, len(SCORES), W[0], c[0], psi[0])
    for b in (by_component(SCORES, mean, W, c, psi, none), by_row(SCORES, mean, W, c, psi, none)):
        torch.testing.assert_close(b.log_likelihood, a.log_likelihood, rtol=1e-10, atol=1e-8)
        for name, value in a.parts().items():
            torch.testing.assert_close(b.parts()[name], value, rtol=1e-8, atol=1e-8)


def test_one_component_is_factor_analysis():
    """C = 1: the mixture's answer is factor analysis's, with the same priors."""

    def one(x):
        D = x.shape[1]
        W = pyro.sample("W", dist.Normal(0.0, 1.0).expand([D, 2]).to_event(2))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0).expand([D]).to_event(1))
        psi = pyro.sample("psi", dist.InverseGamma(2.0, 0.25).expand([D]).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T + mu, psi.sqrt()).to_event(1), obs=x)

    method = EM(restarts=1, tol=1e-11, max_iter=3000)
    a, b = (fit(story, SCORES, method, seed=0, device="cpu") for story in (one, MixtureOfFactorAnalysers(1, 2)))
    assert math.isclose(a.diagnostics["log_likelihood"], b.diagnostics["log_likelihood"], abs_tol=1e-4)
    for seed in range(3):  # whatever the start, the one maximum of the log joint
        a, b = (fit(story, SCORES, method, seed=seed) for story in (one, MixtureOfFactorAnalysers(1, 2)))
        assert a.converged and b.converged
        assert math.isclose(a.diagnostics["objective"], b.diagnostics["objective"], abs_tol=2e-6)


def test_mixture_climbs_and_beats_one_analyser_on_clusters():
    mixture = fit(MixtureOfFactorAnalysers(2, 1, scale=2.0), RODS, EM(restarts=3), seed=0)
    single = fit(FactorAnalysis(1, scale=2.0), RODS, EM(restarts=1), seed=0)
    assert np.diff(mixture.history).min() > -1e-8
    assert mixture.log_prob().mean() > single.log_prob().mean() + 0.5
    holes = fit(MixtureOfFactorAnalysers(2, 1, scale=2.0), with_holes(RODS), EM(restarts=2), seed=0)
    assert np.diff(holes.history).min() > -1e-8


def test_missing_cells_are_imputed_nearly_as_well_as_by_the_truth():
    """Against conditional means under the parameters that drew the rows; intervals hold what they promise."""
    x = with_holes(SCORES, 0.25)
    kept = SCORES[~torch.from_numpy(np.random.RandomState(0).rand(*SCORES.shape) < 0.25).all(1)]
    imputed = fit(FactorAnalysis(2), x, EM(restarts=1), seed=0).impute(draws=200, seed=0)
    truth = load("two_factors").truth
    cov, best = truth["W"] @ truth["W"].T + torch.diag(truth["psi"]), x.clone()
    for row in best:
        m = row.isnan()
        row[m] = cov[m][:, ~m] @ torch.linalg.solve(cov[~m][:, ~m], row[~m])
    index = tuple(imputed.index.T)
    errors = [
        (guess - kept[index]).square().mean().sqrt() for guess in (imputed.mean, best[index], x.nanmean(0)[index[1]])
    ]
    assert errors[0] < 1.05 * errors[1] < 0.85 * errors[2]
    inside = ((imputed.lower <= kept[index]) & (kept[index] <= imputed.upper)).double().mean()
    assert 0.85 < inside < 0.95


def test_other_linear_gaussian_stories_are_integrated_exactly_too():
    """A random intercept with a covariate: EM's mode is that of the closed marginal (statsmodels' mixed model, by hand)."""

    def intercepts(y, X):
        beta = pyro.param("beta", torch.zeros(2))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(0.0, 1.5))
            pyro.sample("y", dist.Normal((X @ beta + u).unsqueeze(-1), 1.0).expand([len(y), 3]).to_event(1), obs=y)

    X = torch.randn(40, 2, dtype=torch.float64)
    y = (X @ torch.tensor([1.0, -2.0]).double())[:, None] + torch.randn(40, 1) * 1.5 + torch.randn(40, 3)
    posterior = fit(intercepts, {"y": y, "X": X}, EM(restarts=1, tol=1e-12), seed=0)
    means = y.mean(1)  # each row counts alike, so generalised least squares is least squares on row means
    beta = torch.linalg.lstsq(X, means.double().unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(posterior.draw(0)["beta"], beta, atol=1e-5, rtol=0)
    cov = np.eye(3) + 1.5**2
    expected = [
        multivariate_normal.logpdf(r, [m] * 3, cov) for r, m in zip(y.numpy(), (X @ posterior.draw(0)["beta"]).numpy())
    ]
    np.testing.assert_allclose(posterior.log_prob(), expected, atol=1e-9)


def test_rotations_are_found_and_left_out_of_comparisons():
    """W turns and its product does not; a mixture of clusters has nothing to turn."""
    from inference.rotations import invariants
    from zoo import GMM

    for story, x in ((FactorAnalysis(2), SCORES), (PPCA(3), SCORES), (MixtureOfFactorAnalysers(2, 1), RODS)):
        assert fit(story, x, EM(restarts=1, max_iter=3), seed=0).diagnostics["rotating"] == {"W": -1}
    assert fit(turned, SCORES, EM(restarts=1, max_iter=3), seed=0).diagnostics["rotating"] == {"loadings": -2}
    assert "rotating" not in fit(GMM(2), SCORES, EM(restarts=1, max_iter=3), seed=0).diagnostics
    W, R = torch.randn(5, 6, 2).double(), torch.linalg.qr(torch.randn(2, 2).double())[0]
    a, b = (invariants({"W": v, "z": W}, {"W": -1}, {"z"}) for v in (W, W @ R))
    assert set(a) == {"W W^T"}
    torch.testing.assert_close(a["W W^T"], b["W W^T"])


@pytest.mark.slow
def test_nuts_and_svi_agree_with_the_mode_on_what_rotations_leave_alone():
    """W W^T + psi: the mode within 3 posterior sd of NUTS's mean, SVI's mean too."""
    x = SCORES[:80]
    from inference import NUTS

    em, nuts, svi = (fit(FactorAnalysis(2), x, m, seed=0) for m in (EM(), NUTS(warmup=400, draws=400), "svi"))

    def invariant(p):
        W, psi = p.draws["W"], p.draws["psi"]
        return W @ W.mT + torch.diag_embed(psi)

    mean, sd = invariant(nuts).mean(0), invariant(nuts).std(0)
    assert ((invariant(em)[0] - mean).abs() < 3 * sd).all()
    assert ((invariant(svi).mean(0) - mean).abs() < 3 * sd).all()


@pytest.mark.parametrize("name", ["PPCA", "FactorAnalysis", "MixtureOfFactorAnalysers"])
def test_examples_recover_their_truth(name):
    """The covariance that the truth implies, within sampling error."""
    from zoo.catalog import get

    story, data = get(name).example()
    posterior = fit(story, data, EM(restarts=3), seed=0)
    if name == "MixtureOfFactorAnalysers":
        truth = load("two_rods").truth
        for c in range(2):
            wanted = truth["W"][c] @ truth["W"][c].T + torch.diag(truth["psi"])
            np.testing.assert_allclose(covariance(posterior.draw(0), c), wanted, atol=0.6)
        return
    np.testing.assert_allclose(covariance(posterior.draw(0)), np.cov(SCORES.T.numpy()), atol=0.15)
    wanted = load("two_factors").truth["W"]
    assert angle(posterior.draw(0)["W"], wanted) < 0.35
    simulated = story.model(num_data=7, num_features=4)
    assert simulated.shape == (7, 4)
