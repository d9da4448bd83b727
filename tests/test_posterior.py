"""What an answer can be asked, against exact answers: locals, row densities, predictions, imputation, ArviZ."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal, norm, poisson
from stories import gaussian_mixture, hidden_markov, normal_mixture, regression

from inference import EM, NUTS, fit, simulate
from inference.arviz_io import elpd_loo
from inference.local import RowIntegral
from inference.posterior import Posterior
from inference.problem import prepare
from zoo import GMM, load

IRIS = load("iris").x


class ByHand:
    """A method that hands over draws made elsewhere."""

    name = "by hand"

    def __init__(self, draws, kind="samples", chains=1):
        self.draws, self.kind, self.chains = draws, kind, chains

    def check(self, structure):
        from inference import Verdict

        return Verdict(True, "by hand")

    def run(self, problem):
        return Posterior(self.kind, self, problem, self.draws, chains=self.chains, extra={"keep_labels": True})


def linear_gaussian(x):
    """Random intercepts: x_n | z_n ~ Normal(mu + z_n, 0.5), z_n ~ Normal(0, 1): p(x_n) = Normal(mu, sqrt(1.25))."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu + z, 0.5), obs=x)


def poisson_effects(x):
    """Counts with a normal random effect: the row density is a one-dimensional integral."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 0.7))
        pyro.sample("x", dist.Poisson((mu + z).exp()), obs=x)


def conjugate(x):
    """Normal mean with known variance."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def conjugate_posterior(x, count=4000):
    precision = 0.25 + len(x)
    mean, sd = x.sum() / precision, precision**-0.5
    draws = mean + sd * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return fit(conjugate, x, ByHand({"mu": draws}, chains=4), seed=0), float(mean), float(sd)


def test_local_of_new_rows_is_the_posterior_and_clusters_are_certain():
    """Setosa is far from the others: probability above 0.99, for fitted and for new rows, never the prior's."""
    posterior = fit(GMM(3), IRIS, "em", seed=0)
    for rows in (None, IRIS[:50] + 0.01):
        z = posterior.local("z", rows)
        torch.testing.assert_close(z.sum(-1), torch.ones(len(z), dtype=torch.float64))
        assert z[:50].max(-1).values.min() > 0.99
    assert len(set(posterior.local("z").argmax(-1)[:50].tolist())) == 1


def test_local_of_a_chain_by_its_base_name():
    x = torch.randn(6, 4)
    z = fit(hidden_markov, x, EM(restarts=1), seed=0).local("z")
    assert z.shape == (6, 4, 2) and torch.allclose(z.sum(-1), torch.ones(6, 4, dtype=torch.float64))


def test_wrong_locals_are_named():
    posterior = fit(GMM(2), IRIS, EM(restarts=1), seed=0)
    for name in ("mu", "x", "nothing"):
        with pytest.raises(ValueError, match=r"\['z'\]"):
            posterior.local(name)
    with pytest.raises(ValueError, match="shape"):
        posterior.log_prob(torch.randn(5, 3))


def test_gaussian_locals_are_integrated_exactly():
    """Against the closed form to rounding, and importance sampling of the same rows within its own error."""
    x = torch.randn(12, dtype=torch.float64)
    posterior = fit(
        linear_gaussian,
        x,
        ByHand({"mu": torch.tensor([0.3], dtype=torch.float64), "z": torch.zeros(1, 12).double()}, "point"),
        seed=0,
    )
    new = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    exact = norm.logpdf(new.numpy(), 0.3, math.sqrt(1.25))
    score = posterior.score(new)
    np.testing.assert_allclose(score.rows, exact, atol=1e-10)
    assert "exact Gaussian" in score.estimator and score.bound == "plug-in"
    z = posterior.local("z", new, draws=4000)
    assert z.shape == (4000, 3)
    np.testing.assert_allclose(z.mean(0), (new - 0.3) * 0.8, atol=0.04)
    np.testing.assert_allclose(z.std(0), math.sqrt(0.2), atol=0.03)
    with posterior.problem.scope(0):
        sampled = RowIntegral(posterior.joint, posterior.draw(0), {"x": new}, 1000)
        rows, error = sampled.log_evidence()
        draws = sampled.resample("z", 2000)
    gap = np.abs(rows.detach().numpy() - exact)
    assert gap.max() < 0.05 and (gap < 4 * error.sqrt().numpy()).all()
    np.testing.assert_allclose(draws.mean(0), (new - 0.3) * 0.8, atol=0.12)


def test_row_density_of_a_random_effect_equals_quadrature():
    x = torch.tensor([0.0, 2.0, 7.0])
    values = {"mu": torch.tensor([0.5], dtype=torch.float64), "z": torch.zeros(1, 3).double()}
    found = fit(poisson_effects, x, ByHand(values, "point"), seed=0).log_prob(x)
    z = np.linspace(-6, 6, 20001)
    exact = [np.log(np.trapezoid(poisson.pmf(k, np.exp(0.5 + z)) * norm.pdf(z, 0, 0.7), z)) for k in x.numpy()]
    np.testing.assert_allclose(found, exact, atol=0.05)


def test_posterior_predictive_density_is_that_of_the_conjugate_model():
    """log mean density over draws, not mean log density: against Normal(mean, 1 + sd^2)."""
    x = torch.randn(5, dtype=torch.float64)
    posterior, mean, sd = conjugate_posterior(x)
    new = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    score = posterior.score(new, draws=2000)
    gap = np.abs(score.rows.numpy() - norm.logpdf(new.numpy(), mean, math.sqrt(1 + sd**2)))
    assert (gap < 4 * score.monte_carlo_error.numpy()).all()
    assert score.bound == "estimate" and float(score.monte_carlo_error.max()) < 0.05


def test_leave_one_out_equals_the_exact_one():
    """PSIS-LOO from our DataTree against refitting without each row, within 0.1."""
    x = torch.randn(30, dtype=torch.float64) + 0.5
    posterior, _, _ = conjugate_posterior(x)
    exact = 0.0
    for i in range(len(x)):
        rest = torch.cat([x[:i], x[i + 1 :]])
        precision = 0.25 + len(rest)
        exact += norm.logpdf(float(x[i]), float(rest.sum() / precision), math.sqrt(1 + 1 / precision))
    elpd, error, worst = elpd_loo(posterior)
    assert abs(elpd - exact) < 0.1 and error > 0 and worst < 0.5


def test_pointwise_log_likelihood_of_an_enumerated_mixture():
    """Pyro's converter drops it; ours sums the latent out, and leave-one-out runs on it."""
    x = torch.cat([torch.randn(30) - 3, torch.randn(30) + 3]).double()
    base = torch.tensor([0.5, 0.5]).double(), torch.tensor([-3.0, 3.0]).double(), torch.tensor([1.0, 1.0]).double()
    g = torch.Generator().manual_seed(0)
    draws = {
        "pi": base[0].expand(100, 2).clone(),
        "mu": base[1] + 0.2 * torch.randn(100, 2, dtype=torch.float64, generator=g),
        "sigma": base[2].expand(100, 2).clone(),
    }
    posterior = fit(normal_mixture, x, ByHand(draws, chains=2), seed=0)
    tree = posterior.to_arviz()
    found = tree["log_likelihood"]["x"].values
    assert found.shape == (2, 50, 60) and tree["posterior"]["mu"].shape == (2, 50, 2)
    mu = draws["mu"][7].numpy()
    exact = np.log(0.5 * norm.pdf(x.numpy()[:, None], mu, 1.0).sum(1))
    np.testing.assert_allclose(found[0, 7], exact, atol=1e-10)
    assert elpd_loo(posterior)[0] < 0


def test_leave_one_out_integrates_the_rows_own_latents():
    """A row given its own latent says nothing of itself: LOO must be that of x ~ N(mu, 2), in closed form."""

    def noisy(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu + z, 1.0), obs=x)

    x = torch.linspace(-3, 4, 60).double()
    posterior = fit(noisy, x, NUTS(chains=4, warmup=200, draws=400), seed=2)
    precision = 1 / 100 + (len(x) - 1) / 2
    mean = (x.sum() - x) / 2 / precision
    exact = dist.Normal(mean, math.sqrt(2 + 1 / precision)).log_prob(x).sum()
    elpd, _, worst = elpd_loo(posterior)
    assert abs(elpd - float(exact)) < 0.2 and worst < 0.5  # given its latent, PSIS gives 5 nats more


def test_samples_look_like_the_data():
    posterior = fit(GMM(3), IRIS, "em", seed=0)
    rows = posterior.sample(4000)
    assert rows["x"].shape == (4000, 4) and rows["z"].shape == (4000,)
    np.testing.assert_allclose(rows["x"].mean(0), IRIS.mean(0), atol=0.1)
    np.testing.assert_allclose(rows["x"].std(0), IRIS.std(0), rtol=0.1)
    assert torch.equal(rows["x"], posterior.sample(4000)["x"])
    assert not torch.equal(rows["x"], posterior.sample(4000, seed=9)["x"])


def test_predictions_follow_new_covariates(untouched):
    """The response is not needed: only the covariates of the new rows are."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(80, 2, dtype=torch.float64, generator=g)
    y = X @ torch.tensor([2.0, -1.0]).double()
    posterior = fit(regression, {"X": X, "y": y}, "em", seed=0)
    new = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]).double()
    found = posterior.predict({"X": new}, draws=300)["y"]
    assert found.shape == (300, 3)
    np.testing.assert_allclose(found.mean(0), [2.0, -1.0, 3.0], atol=0.15)


def test_imputed_cells_follow_the_exact_conditional():
    """A missing cell of a Gaussian mixture: mixture of conditional normals, by scipy; the interval covers."""
    x = IRIS.clone()
    gone = torch.zeros_like(x, dtype=torch.bool)
    gone[::10, 2] = True
    truth = x[gone]
    x[gone] = math.nan
    posterior = fit(GMM(3), x, EM(restarts=1), seed=0)
    found = posterior.impute(draws=600)
    d = posterior.draw(0)
    for k, row in enumerate(found.index[:, 0].tolist()[:5]):
        seen, values = [0, 1, 3], x[row, [0, 1, 3]].numpy()
        weights, means = [], []
        for c in range(3):
            cov, mu = np.linalg.inv(d["Lambda"][c].numpy()), d["mu"][c].numpy()
            weights.append(float(d["pi"][c]) * multivariate_normal.pdf(values, mu[seen], cov[np.ix_(seen, seen)]))
            means.append(mu[2] + cov[2, seen] @ np.linalg.solve(cov[np.ix_(seen, seen)], values - mu[seen]))
        exact = np.dot(weights, means) / np.sum(weights)
        assert abs(float(found.mean[k]) - exact) < 4 * float(found.sd[k]) / math.sqrt(600) + 0.02
    inside = ((truth > found.lower) & (truth < found.upper)).double().mean()
    assert inside > 0.6 and not found.values.isnan().any() and "missing cells" in repr(found)
    nothing = fit(GMM(2), IRIS, EM(restarts=1), seed=0).impute()
    assert len(nothing.index) == 0 and torch.equal(nothing.values, IRIS)


def test_summary_says_warnings_first():
    posterior = fit(gaussian_mixture, IRIS[:1], EM(restarts=1), seed=0)
    text = str(posterior.summary())
    assert text.startswith("warning: one row") and "point by EM" in text and "value" in text
    assert repr(posterior).startswith("warning:")


def test_figures_are_made_without_pyplot(tmp_path, untouched):
    import sys

    posterior = fit(GMM(3, covariance="diag"), IRIS, EM(restarts=1), seed=0)
    for k, figure in enumerate((posterior.plot_history(), posterior.plot_density(), posterior.plot_data((2, 3)))):
        figure.savefig(tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").stat().st_size > 2000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    with pytest.raises(ValueError, match="columns"):
        posterior.plot_data((0, 9))


def test_simulate_holds_given_sites_and_repeats_by_seed(untouched):
    truth = {"pi": [0.5, 0.5], "lam": [1.0, 50.0]}
    from zoo import PoissonMixture

    a, b = (simulate(PoissonMixture(2), given=truth, seed=3, num_data=40) for _ in range(2))
    assert torch.equal(a["x"], b["x"]) and a["lam"].tolist() == [1.0, 50.0]
    with pytest.raises(ValueError, match="'nope'"):
        simulate(PoissonMixture(2), given={"nope": 1.0}, seed=0)


def test_problem_of_new_rows_checks_them():
    problem = prepare(gaussian_mixture, IRIS, seed=0)
    with pytest.raises(TypeError, match="'y'"):
        problem.with_data({"y": IRIS})


def test_one_new_row_may_lack_a_cell():
    """A single row with a hole is a table with a column of NaN: nothing to learn from, but something to be told about."""
    posterior = fit(GMM(1), IRIS, EM(estimate="mle"), seed=0)
    row = IRIS[:1].clone()
    row[0, 2:] = math.nan
    found = posterior.impute(row, draws=4000, seed=0)
    mu = posterior.draws["mu"][0, 0]
    cov = posterior.draws["Lambda"][0, 0].inverse()
    wanted = mu[2:] + cov[2:, :2] @ torch.linalg.solve(cov[:2, :2], row[0, :2] - mu[:2])
    assert torch.allclose(found.mean, wanted, atol=0.05)
    wanted = torch.distributions.MultivariateNormal(mu[:2], cov[:2, :2]).log_prob(row[:, :2])
    assert torch.allclose(posterior.log_prob(row), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="column 2 of x is NaN in every row"):
        fit(GMM(1), row, EM(), seed=0)
