"""EM's drivers, restarts, missing cells, hierarchical priors and large data, against algebra and against each other."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal, wishart
from sklearn.datasets import load_iris, load_wine
from stories import gaussian_mixture

from inference import EM, fit
from inference.methods.em.missing import sums
from inference.methods.em.start import lloyd, plus_plus
from zoo import GMM, BernoulliMixture, PoissonMixture

IRIS = load_iris().data
WINE = (load_wine().data - load_wine().data.mean(0)) / load_wine().data.std(0)


def tied_prior(x, K=3, kappa=0.1):
    """Normal-inverse-Wishart prior: the spread of the means is that of their component."""
    D = x.shape[1]
    pi = pyro.sample("pi", dist.Dirichlet(2.0 * torch.ones(K)))
    with pyro.plate("components", K):
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(D + 2.0), precision_matrix=0.2 * torch.eye(D)))
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(D), precision_matrix=kappa * precision))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.MultivariateNormal(mu[z], precision_matrix=precision[z]), obs=x)


def clusters(n=6000, seed=0):
    rng = np.random.RandomState(seed)
    z = rng.randint(3, size=n)
    return np.array([[-3.0, 0.0], [0.0, 2.0], [2.0, -2.0]])[z] + rng.randn(n, 2)


# Closed forms


def test_means_whose_prior_shares_the_components_spread_are_in_closed_form():
    """A fixed point of the textbook update (Murphy 2012, section 11.4.2.8), and the objective by scipy."""
    x = IRIS - IRIS.mean(0)
    posterior = fit(tied_prior, x, EM(restarts=2, tol=1e-12), seed=0)
    plan = posterior.diagnostics["plan"]
    assert "L-BFGS" not in plan and np.diff(posterior.history).min() > -1e-8
    d = {n: v.numpy() for n, v in posterior.draw(0).items()}
    joint = np.stack(
        [
            np.log(d["pi"][k]) + multivariate_normal.logpdf(x, d["mu"][k], np.linalg.inv(d["precision"][k]))
            for k in range(3)
        ]
    )
    r = np.exp(joint - np.logaddexp.reduce(joint))
    n, kappa, D = r.sum(1), 0.1, 4
    means = (r @ x) / (n + kappa)[:, None]
    np.testing.assert_allclose(d["mu"], means, atol=1e-4)
    for k in range(3):
        gap = x - d["mu"][k]
        scatter = (r[k][:, None] * gap).T @ gap + kappa * np.outer(d["mu"][k], d["mu"][k]) + 0.2 * np.eye(D)
        np.testing.assert_allclose(np.linalg.inv(d["precision"][k]), scatter / (n[k] + 1 + 1), rtol=1e-3)
    prior = math.lgamma(6) - 3 * math.lgamma(2) + np.log(d["pi"]).sum()
    for k in range(3):
        prior += wishart.logpdf(d["precision"][k], D + 2, np.eye(D) / 0.2)
        prior += multivariate_normal.logpdf(d["mu"][k], np.zeros(D), np.linalg.inv(kappa * d["precision"][k]))
    expected = np.logaddexp.reduce(joint).sum() + prior
    assert math.isclose(posterior.diagnostics["objective"], expected, abs_tol=1e-6)


def test_a_mean_of_means_is_in_closed_form():
    """Three levels: the top mean is the shrunken average of the groups' means, themselves shrunken (normal equations)."""

    def groups(y, g):
        top = pyro.sample("top", dist.Normal(0.0, 10.0))
        with pyro.plate("groups", 3):
            mean = pyro.sample("mean", dist.Normal(top, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean[g], 1.0), obs=y)

    y, g = torch.randn(30, dtype=torch.float64) + 5, torch.arange(30) % 3
    posterior = fit(groups, {"y": y, "g": g}, EM(tol=1e-14), seed=0)
    H = torch.zeros(4, 4, dtype=torch.float64)
    H[0, 0] = 1 / 100 + 3 / 4
    H[0, 1:] = H[1:, 0] = -1 / 4
    H[1:, 1:] = torch.eye(3) * (10 + 1 / 4)
    b = torch.cat([torch.zeros(1), torch.stack([y[g == k].sum() for k in range(3)])])
    mode = torch.linalg.solve(H, b)
    d = posterior.draw(0)
    torch.testing.assert_close(torch.cat([d["top"].reshape(1), d["mean"]]), mode, atol=1e-4, rtol=0)


# Missing cells


def test_expected_statistics_with_every_cell_seen_are_plain_sums():
    x, r = torch.randn(20, 3, dtype=torch.float64), torch.rand(20, 2, dtype=torch.float64)
    loc, cov = torch.randn(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    n, sx, sxx = sums(x, r, loc, cov)
    torch.testing.assert_close(n, r.sum(0))
    torch.testing.assert_close(sx, r.T @ x)
    torch.testing.assert_close(sxx, torch.einsum("ns,nd,ne->sde", r, x, x))


def test_expected_statistics_equal_conditional_normals():
    """Mean and covariance of the missing cells by the partitioned inverse, row by row."""
    x = torch.randn(12, 3, dtype=torch.float64)
    x[torch.rand(12, 3) < 0.4] = math.nan
    A = torch.randn(3, 3, dtype=torch.float64)
    loc, cov, r = torch.randn(1, 3, dtype=torch.float64), (A @ A.T + torch.eye(3))[None], torch.rand(12, 1).double()
    _, sx, sxx = sums(x, r, loc, cov)
    wanted_x, wanted_xx = torch.zeros(3).double(), torch.zeros(3, 3).double()
    precision = torch.linalg.inv(cov[0])
    for row, weight in zip(x, r[:, 0]):
        m = row.isnan()
        full, left = row.clone(), torch.zeros(3, 3).double()
        if m.any():
            inner = torch.linalg.inv(precision[m][:, m])
            gap = precision[m][:, ~m] @ (row[~m] - loc[0, ~m])
            full[m] = loc[0, m] - inner @ gap
            left[m.nonzero(), m.nonzero().T] = inner
        wanted_x += weight * full
        wanted_xx += weight * (full[:, None] * full + left)
    torch.testing.assert_close(sx[0], wanted_x)
    torch.testing.assert_close(sxx[0], wanted_xx)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_missing_cells_have_closed_updates_that_climb(covariance):
    """The mode reached is a mode of the exact likelihood of the seen cells: small moves only lower it."""
    x = (IRIS - IRIS.mean(0)).copy()
    x[np.random.RandomState(0).rand(*x.shape) < 0.25] = np.nan
    x = x[~np.isnan(x).all(1)]
    posterior = fit(GMM(2, covariance=covariance), x, EM(restarts=1, tol=1e-11, max_iter=2000), seed=1)
    assert "L-BFGS" not in posterior.diagnostics["plan"] and np.diff(posterior.history).min() > -1e-8
    joint = posterior.joint
    with posterior.problem.scope(0):
        best = posterior.draw(0)
        top = float(joint.density(best))
        assert math.isclose(top, posterior.diagnostics["objective"], abs_tol=1e-6)
        for step in (0.02, -0.02):
            for k in range(4):
                moved = {n: v.clone() for n, v in best.items()}
                moved["mu"][0, k] += step
                assert float(joint.density(moved)) < top
            site = "Lambda" if "Lambda" in best else "tau"
            assert float(joint.density({**best, site: best[site] * (1 + step)})) < top


def test_one_hidden_cell_moves_the_answer_little_and_is_imputed_near_its_value():
    x = IRIS.copy()
    hidden, x[7, 2] = x[7, 2], np.nan
    complete = fit(GMM(1), IRIS, "em", seed=0).draw(0)
    posterior = fit(GMM(1), x, EM(tol=1e-12), seed=0)
    torch.testing.assert_close(posterior.draw(0)["mu"], complete["mu"], atol=0.02, rtol=0)
    imputed = posterior.impute(draws=400, seed=0)
    assert abs(float(imputed.mean[0]) - hidden) < 3 * float(imputed.sd[0])


# Restarts


def test_restarts_as_one_batch_equal_restarts_one_by_one():
    """Climbing together changes no run: each ends where it ends alone, to rounding."""
    seen = []
    together = fit(GMM(3), WINE, EM(restarts=4, tol=1e-9), seed=3)
    from inference.joint import LogJoint
    from inference.problem import prepare

    problem = prepare(GMM(3), WINE, seed=3)
    with problem.scope(3):
        engine = EM(restarts=4).engine(LogJoint(problem), None, problem.kwargs)
        starts = engine.start([3, 4, 5, 6], 0)
    for r in range(4):
        one = EM(start={n: v[r] for n, v in starts.items()}, tol=1e-9)
        seen.append(fit(GMM(3), WINE, one, seed=3).diagnostics["objective"])
    np.testing.assert_allclose(sorted(together.diagnostics["restart_objectives"]), sorted(seen), atol=1e-5)


def test_collapsed_components_do_not_win():
    """Full covariances on 178 wines: unbounded likelihoods at -11.0 a row and above lose to the best sound one."""
    posterior = fit(GMM(3), WINE, EM(restarts=20, estimate="mle", tol=1e-5), seed=0)
    d = posterior.diagnostics
    assert d["restarts_collapsed"] >= 1
    assert max(d["restart_objectives"]) > d["objective"] + 10
    covariances = torch.linalg.inv(posterior.draws["Lambda"][0])
    assert torch.linalg.eigvalsh(covariances).min() > 1e-4


def test_every_restart_collapsed_is_said():
    x = np.random.RandomState(0).randn(12, 6)
    posterior = fit(GMM(4), x, EM(restarts=2, estimate="mle"), seed=0)
    assert any("collapsed" in w for w in posterior.warnings)


def test_an_empty_component_is_put_to_use():
    """A component started far from all rows would stay empty: after reseeding all three hold rows."""
    from inference.methods.em.repair import EMPTY

    x = clusters(600)
    start = {"pi": [0.5, 0.5 - 1e-9, 1e-9], "mu": [[-3.0, 0.0], [1.0, 0.0], [90.0, 90.0]], "tau": np.ones((3, 2))}
    alone = fit(GMM(3, covariance="diag"), x, EM(start=start, estimate="mle"), seed=0)
    assert float(alone.local("z").sum(0).min()) < EMPTY
    from inference.joint import LogJoint
    from inference.methods.em.climb import begin
    from inference.methods.em.contest import Contest
    from inference.problem import prepare

    em = EM(restarts=2, estimate="mle")
    problem = prepare(GMM(3, covariance="diag"), x, seed=0)
    with problem.scope(0):
        joint = LogJoint(problem)
        theta = {n: torch.as_tensor(np.array(v))[None].repeat(2, *[1] * np.ndim(v)) for n, v in start.items()}
        contest = Contest(em, em.engine(joint, theta, problem.kwargs), joint, problem, 2)
        contest.climb(begin(theta, 2), {})
    assert min(r.objective for r in contest.runs) > alone.diagnostics["objective"] + 10


def test_batched_k_means_reaches_scikit_learns_inertia():
    """Ten runs at once: the best is as good as scikit-learn's best of ten."""
    from sklearn.cluster import KMeans

    x = torch.from_numpy(WINE)
    centres = lloyd(x, plus_plus(x, 3, 10, torch.Generator().manual_seed(0)))
    inertia = ((x[None, :, None] - centres[:, None]) ** 2).sum(-1).amin(-1).sum(-1)
    best = KMeans(3, n_init=10, random_state=0).fit(WINE).inertia_
    assert float(inertia.min()) <= best * 1.001


# Drivers


def test_incremental_free_energy_never_falls_and_ends_at_batchs_optimum():
    x = clusters(20_000)
    options = {"restarts": 2, "tol": 1e-9, "batch_size": 2000}
    batch = fit(GMM(3), x, EM(driver="batch", **options), seed=0)
    blocks = fit(GMM(3), x, EM(driver="incremental", **options), seed=0)
    assert np.diff(blocks.history).min() > -1e-6
    assert len(blocks.history) < len(batch.history)
    assert abs(blocks.diagnostics["objective"] - batch.diagnostics["objective"]) < 1e-3


def test_stepwise_comes_close_and_goes_on_with_new_rows():
    """Two halves of a stream, the second continuing from the first's running averages, come to the whole's optimum."""
    x = clusters(20_000)
    whole = fit(GMM(3), x, EM(driver="batch", restarts=2), seed=0)
    first = fit(GMM(3), x[:10_000], EM(driver="stepwise", restarts=2, batch_size=1000, max_iter=2), seed=0)
    second = fit(GMM(3), x[10_000:], EM(driver="stepwise", start=first, batch_size=1000, max_iter=1), seed=0)
    assert second.extra["stepwise"]["step"] > first.extra["stepwise"]["step"]
    gap = float(whole.log_prob(x).mean() - second.log_prob(x).mean())
    assert 0 <= gap < 2e-3


def test_drivers_that_need_blocks_are_refused_elsewhere():
    with pytest.raises(ValueError, match=r"driver='incremental'.*closed"):
        fit(gaussian_mixture, IRIS, EM(driver="incremental", kernels=False))
    with pytest.raises(ValueError, match="'stepwise'"):
        EM(driver="online")


@pytest.mark.parametrize("driver", ["batch", "incremental", "stepwise"])
def test_a_climb_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, driver):
    """Interrupted by an exception of the callback's, and by the iteration limit; then asked for again."""
    x = clusters(9000)
    options = {"restarts": 3, "driver": driver, "batch_size": 3000, "tol": 1e-10, "max_iter": 40}
    whole = fit(GMM(3), x, EM(**options), seed=1)
    path = tmp_path / "climb"
    from inference.methods.em import climb, resume

    calls = []

    def stop(self, state):
        write(self, state)
        calls.append(state.iteration)
        if len(calls) == 7:
            raise KeyError("power cut")

    write = resume.Saved.write
    resume.Saved.write = stop
    try:
        with pytest.raises(KeyError, match="power cut"):
            fit(GMM(3), x, EM(checkpoint=path, **options), seed=1)
    finally:
        resume.Saved.write = write
    assert path.exists() and climb is not None
    again = fit(GMM(3), x, EM(checkpoint=path, **options), seed=1)
    assert again.history == whole.history
    assert all(torch.equal(again.draws[n], whole.draws[n]) for n in whole.draws)


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    path = tmp_path / "climb"
    fit(GMM(2), IRIS, EM(checkpoint=path, max_iter=30, tol=0.0), seed=1)
    with pytest.raises(ValueError, match="another fit"):
        fit(GMM(2), IRIS[:100], EM(checkpoint=path), seed=1)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no checkpoint"):
        fit(GMM(2), IRIS, EM(checkpoint=path), seed=1)
    with pytest.raises(ValueError, match="folder"):
        fit(GMM(2), IRIS, EM(checkpoint=tmp_path / "nowhere" / "climb"), seed=1)


# Large data


def test_single_precision_data_are_kept_and_lose_little():
    """Features in float32, sums and unknowns in float64: the log-likelihood within 1e-5 a row."""
    x = clusters(500_000)
    start = {"pi": np.ones(3) / 3, "mu": [[-2.0, 0.0], [0.0, 1.0], [1.0, -1.0]], "Lambda": np.stack([np.eye(2)] * 3)}
    em = EM(start=start, driver="batch", max_iter=5, tol=0.0)
    wide, narrow = (fit(GMM(3), d, em, seed=0) for d in (x, x.astype(np.float32)))
    assert narrow.problem.kwargs["x"].dtype == torch.float32 and narrow.draws["mu"].dtype == torch.float64
    assert abs(narrow.diagnostics["log_likelihood"] - wide.diagnostics["log_likelihood"]) < 1e-5 * len(x)


@pytest.mark.processor
def test_a_memory_map_is_read_in_place(tmp_path):
    """The same numbers as from memory, and no copy of the file."""
    x = clusters(30_000)
    disk = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float64, shape=x.shape)
    disk[:] = x
    disk.flush()
    table = np.load(tmp_path / "x.npy", mmap_mode="r")
    a, b = (fit(GMM(3), d, EM(restarts=1, max_iter=10), seed=0) for d in (x, table))
    assert a.history == b.history
    assert b.problem.kwargs["x"].data_ptr() == table.ctypes.data


def test_the_plan_says_how_every_latent_is_summed_out():
    text = EM().plan(GMM(3), IRIS)
    assert "softmax over 3 states" in text and "closed form" in text
    assert "contraction" in EM(kernels=False).plan(gaussian_mixture, IRIS)


@pytest.mark.parametrize("story", [BernoulliMixture(3), PoissonMixture(3)], ids=repr)
def test_counts_and_bits_in_single_precision_are_fitted(story):
    """A million numbers stay float32: densities that come back in single precision met sums in double, and fell over."""
    x = np.random.default_rng(0).integers(0, 2, (25_000, 42)).astype(np.float64)
    em = EM(restarts=1, max_iter=4)
    wide, narrow = (fit(story, d, em, seed=0) for d in (x, x.astype(np.float32)))
    assert narrow.problem.kwargs["x"].dtype == torch.float32
    assert abs(wide.history[-1] - narrow.history[-1]) < 1e-4 * len(x)
