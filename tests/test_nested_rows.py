"""Rows with a plate of their own inside (schools and their pupils): what is said of one row integrates all it holds."""

import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize

from inference import EM, NUTS, SVI, fit, simulate
from inference.local import FreeRows, RowIntegral
from inference.methods.encoders import Amortised
from inference.score import ScoreNotice

WITHIN, NOISE, BETWEEN, CENTRE = 1.0, 0.5, 1.5, 2.0


def schools(y=None, N=30, P=3):
    N, P = (N, P) if y is None else y.shape
    with pyro.plate("schools", N, dim=-2):
        a = pyro.sample("a", dist.Normal(CENTRE, BETWEEN))
        with pyro.plate("pupils", P, dim=-1):
            b = pyro.sample("b", dist.Normal(a, WITHIN))
            return pyro.sample("y", dist.Normal(b, NOISE), obs=y)


def turned(y=None, N=30, P=3):
    """The same where the rows' plate is the rightmost dimension, as Pyro counts them if nobody says."""
    N, P = (N, P) if y is None else y.shape
    with pyro.plate("schools", N):
        a = pyro.sample("a", dist.Normal(CENTRE, BETWEEN))
        with pyro.plate("pupils", P):
            b = pyro.sample("b", dist.Normal(a, WITHIN))
            pyro.sample("y", dist.Normal(b, NOISE), obs=None if y is None else y.T)


def told_by_logs(y=None, N=30, P=3):
    """The schools' density of y, with pupils' latents on another scale: rows are no longer quadratic in them."""
    N, P = (N, P) if y is None else y.shape
    with pyro.plate("schools", N, dim=-2):
        a = pyro.sample("a", dist.Normal(CENTRE, BETWEEN))
        with pyro.plate("pupils", P, dim=-1):
            b = pyro.sample("b", dist.LogNormal(a, WITHIN))
            return pyro.sample("y", dist.Normal(b.log(), NOISE), obs=y)


def turned_logs(y=None, N=30, P=3):
    N, P = (N, P) if y is None else y.shape
    with pyro.plate("schools", N):
        a = pyro.sample("a", dist.Normal(CENTRE, BETWEEN))
        with pyro.plate("pupils", P):
            b = pyro.sample("b", dist.LogNormal(a, WITHIN))
            pyro.sample("y", dist.Normal(b.log(), NOISE), obs=None if y is None else y.T)


def scores(y=None, N=30, P=3):
    """Counts, with a finite latent of every pupil beside the continuous ones."""
    N, P = (N, P) if y is None else y.shape
    with pyro.plate("schools", N, dim=-2):
        a = pyro.sample("a", dist.Normal(0.5, 1.0))
        with pyro.plate("pupils", P, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Normal(a + z, 0.5))
            return pyro.sample("y", dist.Poisson(b.exp()), obs=y)


def covariance(P=3):
    return BETWEEN**2 * np.ones((P, P)) + (WITHIN**2 + NOISE**2) * np.eye(P)


@pytest.fixture(scope="module")
def y():
    return simulate(schools, seed=0)["y"]


def exact_rows(new):
    return stats.multivariate_normal(np.full(3, CENTRE), covariance()).logpdf(new.numpy())


@pytest.mark.parametrize("story", [told_by_logs, turned_logs])
def test_density_and_latents_of_nested_rows_are_sampled(story, y):
    """Refused before: log p of a school, and its pupils' latents, by importance sampling where there is no closed form."""
    posterior = fit(story, y, SVI(steps=20), seed=0)
    new = y[:4] + 0.3
    score = posterior.score(new)
    exact = exact_rows(new)
    assert np.abs(score.rows.numpy() - exact).max() < 0.15
    assert (np.abs(score.rows.numpy() - exact) < 4 * score.monte_carlo_error.numpy()).all()
    close_to_the_normal_ones(posterior, new, posterior.local("b", new, draws=1000).log())
    assert posterior.ladder(new).evidence.shape == (4,)


def close_to_the_normal_ones(posterior, new, b):
    """Draws of the pupils' latents have the mean and spread of the conditional normal."""
    assert b.shape == (1000, 4, 3)
    joint = BETWEEN**2 + WITHIN**2 * np.eye(3)
    mean = CENTRE + (new.numpy() - CENTRE) @ np.linalg.solve(covariance(), joint)
    sd = np.sqrt(np.diag(joint - joint @ np.linalg.solve(covariance(), joint)))
    assert np.abs((b.mean(0).numpy() - mean) / sd).max() < 0.2
    assert np.abs(b.std(0).numpy() / sd - 1).max() < 0.25
    assert posterior.local("b").shape[1:] == (30, 3)
    assert posterior.sample(7)["b"].shape == (7, 3)


@pytest.mark.parametrize("story", [schools, turned])
def test_normal_rows_with_a_plate_inside_are_integrated_exactly(story, y):
    """Sampled before, and refused by EM: the density of a school is that of one multivariate normal, to the last digits."""
    posterior = fit(story, y, SVI(steps=20), seed=0)
    new = y[:4] + 0.3
    score = posterior.score(new)
    assert "exact Gaussian integral" in score.estimator
    np.testing.assert_allclose(score.rows.numpy(), exact_rows(new), rtol=1e-10)
    close_to_the_normal_ones(posterior, new, posterior.local("b", new, draws=1000))
    a = posterior.local("a", new, draws=1000)
    share = BETWEEN**2 * np.linalg.solve(covariance(), np.ones(3))
    sd = BETWEEN * math.sqrt(1 - share.sum())
    assert a.shape[:2] == (1000, 4)
    assert np.abs(a.mean(0).flatten().numpy() - CENTRE - (new.numpy() - CENTRE) @ share).max() < 0.2 * sd


def unknown_spreads(y=None, N=30, P=12):
    N, P = (N, P) if y is None else y.shape
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(3.0))
    w = pyro.sample("w", dist.HalfNormal(3.0))
    with pyro.plate("schools", N, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("pupils", P, dim=-1):
            b = pyro.sample("b", dist.Normal(a, w))
            return pyro.sample("y", dist.Normal(b, NOISE), obs=y)


def test_em_finds_the_spreads_of_nested_normal_rows():
    """Refused before ("the rows are not linear-Gaussian"); the point is the mode of the exact marginal density."""
    truth = {n: torch.tensor(v) for n, v in (("mu", 2.0), ("tau", 1.5), ("w", 1.0))}
    y = simulate(unknown_spreads, truth, seed=1)["y"]
    found = fit(unknown_spreads, y, EM(restarts=1, tol=1e-10), seed=0)

    def minus(free):
        t, w = np.exp(free[1:])
        C = t**2 * np.ones((12, 12)) + (w**2 + NOISE**2) * np.eye(12)
        own = stats.multivariate_normal(np.full(12, free[0]), C).logpdf(y.numpy()).sum()
        return -own + free[0] ** 2 / 50 + t**2 / 18 + w**2 / 18

    best = minimize(minus, [0.0, 0.0, 0.0], tol=1e-10).x
    exact = [best[0], *np.exp(best[1:])]
    assert [float(found.draws[n][0]) for n in ("mu", "tau", "w")] == pytest.approx(exact, rel=1e-4)
    draws = fit(unknown_spreads, y, NUTS(chains=1, warmup=150, draws=100), seed=0)
    assert draws.draws["b"].shape == (100, 30, 12) and draws.draws["a"].shape[:2] == (100, 30)
    assert abs(float(draws.draws["w"].mean()) - exact[2]) < 3 * float(draws.draws["w"].std())


def test_states_inside_a_row_are_not_taken_for_one_state():
    """A hidden state of every pupil beside a school's normal effect: an "exact" density that let all pupils share one."""

    def story(y=None, N=20, P=3):
        N, P = (N, P) if y is None else y.shape
        with pyro.plate("schools", N, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("pupils", P, dim=-1):
                k = pyro.sample("k", dist.Bernoulli(0.4))
                return pyro.sample("y", dist.Normal(a + 3 * k, 0.5), obs=y)

    y = simulate(story, seed=0)["y"]
    score = fit(story, y, SVI(steps=5), seed=0).score(y[:4])
    states = np.array(list(itertools.product((0, 1), repeat=3)))
    weights = np.where(states, 0.4, 0.6).prod(1)
    C = np.ones((3, 3)) + 0.25 * np.eye(3)
    each = np.stack([stats.multivariate_normal(3 * k, C).pdf(y[:4].numpy()) for k in states])
    assert np.abs(score.rows.numpy() - np.log(weights @ each)).max() < 0.1  # was off by 11 nats


def test_a_missing_pupil_is_filled_in_from_its_school(y):
    """One cell of one row: its draws are those of the conditional normal."""
    posterior = fit(schools, y, SVI(steps=20), seed=0)
    hole = y[:2].clone()
    hole[0, 1] = math.nan
    C = covariance()
    w = np.linalg.solve(C[np.ix_([0, 2], [0, 2])], C[1, [0, 2]])
    found = posterior.impute(hole, draws=400)
    mean, sd = CENTRE + w @ (y[0, [0, 2]].numpy() - CENTRE), math.sqrt(C[1, 1] - w @ C[1, [0, 2]])
    assert abs(float(found.mean[0]) - mean) < 0.25 * sd
    assert float(found.sd[0]) == pytest.approx(sd, rel=0.2)


def test_counts_with_finite_latents_inside_are_quadrature():
    """log p of a row and p(z) of its pupils, by Gauss-Hermite in both layers and a sum over z."""
    y = simulate(scores, seed=1, N=12)["y"]
    posterior = fit(scores, y, SVI(steps=20), seed=0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights /= weights.sum()
    a = 0.5 + nodes[:, None]
    new = y[:4]
    pupil = np.stack(
        [p * stats.poisson.pmf(new.numpy()[..., None, None], np.exp(a + z + 0.5 * nodes)) @ weights
         for z, p in ((0, 0.7), (1, 0.3))], -1,
    )  # (rows, pupils, nodes of a, z)  # fmt: skip
    each = pupil.sum(-1)
    row = each.prod(1) @ weights
    score = posterior.score(new)
    assert np.abs(score.rows.numpy() - np.log(row)).max() < 0.15
    p_z = ((pupil / each[..., None]) * (each.prod(1) / row[:, None])[:, None, :, None] * weights[:, None]).sum(2)
    found = posterior.local("z", new, draws=400)
    assert found.shape == (4, 3, 2)
    assert np.abs(found.numpy() - p_z).max() < 0.06
    hole = new.clone()
    hole[0, 0] = math.nan
    assert posterior.impute(hole, draws=20).draws.shape == (20, 1)


def test_finite_latents_of_an_inner_plate_are_imputed_where_they_lie():
    """States (rows, pupils) were turned into Pyro's default dimensions, whatever the story's plates said."""

    def story(y=None, N=40, P=3):
        N, P = (N, P) if y is None else y.shape
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", N, dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            with pyro.plate("pupils", P, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                return pyro.sample("y", dist.Normal(mu + 10 * k + 30 * z, 0.1), obs=y)

    y = simulate(story, {"mu": torch.tensor(1.0)}, seed=0)["y"]
    hole = y.clone()
    hole[:5, 0] = math.nan
    filled = fit(story, hole, EM(restarts=1), seed=0).impute(draws=50)
    school = (y[:5, 1] + 4) % 30 - 5  # 0 or 10: what the pupils who were seen say of theirs
    low = (filled.draws + 4) % 30 - 5
    assert (low - school).abs().max() < 1.5


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_a_network_reads_rows_with_a_plate_inside(family, y):
    """Amortised guides were refused; the importance-sampled density is the normal one, and rows can be refined."""
    posterior = fit(told_by_logs, y, SVI(guide=Amortised((16,), family), steps=400), seed=0)
    exact = exact_rows(y[:5])
    ladder = posterior.ladder(y[:5], draws=400)
    assert np.abs(ladder.evidence.numpy() - exact).max() < 0.2
    assert posterior.local("b", y[:5], draws=10).shape == (10, 5, 3)
    refined = posterior.refine(y[:5], steps=20)
    assert refined.local("b", draws=10).shape == (10, 5, 3)


def test_rows_that_a_network_cannot_read_are_told(y):
    """The rows' dimension is not the leftmost: the message gives the line that mends it."""
    with pytest.raises(ValueError, match=r"'b' lie along dimension 1 of its shape \(3, 30\).*dim=-2"):
        fit(turned, y, SVI(guide=Amortised((8,)), steps=10), seed=0)


def test_rows_too_wide_for_importance_sampling_are_told():
    """Two hundred skewed latents in a row: the weights of few proposals are all there is, and log_prob says so."""

    def wide(y=None, N=6, P=200):
        N, P = (N, P) if y is None else y.shape
        with pyro.plate("rows", N, dim=-2), pyro.plate("cells", P, dim=-1):
            b = pyro.sample("b", dist.Normal(0.0, 2.0))
            return pyro.sample("y", dist.Poisson(b.exp()), obs=y)

    y = simulate(wide, seed=0)["y"]
    posterior = fit(wide, y, SVI(steps=10), seed=0)
    with pytest.warns(ScoreNotice, match=r"row \d has k-hat .* effective draws of 1000"):
        posterior.log_prob(y[:2])
    assert repr(posterior.score(y[:2])).startswith("warning: ")


def spread_out(y=None, scale=None, P=80):
    """Rows of counts whose cells' log rates spread narrowly (normal around the mode) or widely (skewed)."""
    with pyro.plate("rows", len(scale), dim=-2), pyro.plate("cells", P, dim=-1):
        b = pyro.sample("b", dist.Normal(0.0, scale.unsqueeze(-1)))
        return pyro.sample("y", dist.Poisson(b.exp()), obs=y)


def of_spreads(wide, rows):
    scale = torch.full((rows,), 0.05, dtype=torch.float64)
    scale[:wide] = 2.0
    y = simulate(spread_out, scale=scale, seed=0)["y"]
    return fit(spread_out, {"y": y, "scale": scale}, SVI(steps=3), seed=0)


def quadrature(y, scale):
    """Exact log density of every row, by the trapezoidal rule for every count that occurs."""
    total, t = np.zeros(y.shape[0]), np.linspace(-9, 9, 6001)
    for s in np.unique(scale):
        counts, where = np.unique(y[scale == s], return_inverse=True)
        table = np.log(np.trapezoid(stats.poisson.pmf(counts[:, None], np.exp(s * t)) * stats.norm.pdf(t), t))
        total[scale == s] = table[where].reshape(-1, y.shape[1]).sum(1)
    return total


def test_one_bad_row_among_many_is_listed_and_no_alarm():
    """One row of 100 spoiled nothing and yet warned; it is named, and the sum is right to a tenth of its error over rows."""
    posterior = of_spreads(1, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScoreNotice)
        posterior.log_prob()
    score = posterior.score()
    assert score.doubtful == (0,) and not score.warning and "1 unreliable, see doubtful" in repr(score)
    exact = quadrature(*(posterior.problem.kwargs[n].numpy() for n in ("y", "scale")))
    assert abs(float(score.rows.sum()) - exact.sum()) < 0.1 * exact.std() * math.sqrt(100)


def test_many_bad_rows_are_counted_and_told():
    """Fifteen rows of 40: their sum is off by more than sampling of rows explains, and the warning counts them."""
    posterior = of_spreads(15, 40)
    with pytest.warns(ScoreNotice, match=r"latents of 1\d of 40 rows are not .* may be off by"):
        posterior.log_prob()
    assert set(posterior.score().doubtful) <= set(range(15)) and len(posterior.score().doubtful) >= 10


def test_proposals_side_by_side_are_those_one_by_one(y):
    """Proposals are scored under one vmap: every log weight is that of the row alone."""
    posterior = fit(scores, simulate(scores, seed=1, N=5)["y"], SVI(steps=5), seed=0)
    with posterior.problem.scope(0):
        rows = FreeRows(posterior.joint, posterior.draw(0), posterior.problem.kwargs)
        points = torch.randn(6, rows.n, rows.width, dtype=torch.float64)
        together = torch.vmap(lambda free: rows.log_rows(free)[0])(points)
        torch.testing.assert_close(together, torch.stack([rows.log_rows(p)[0] for p in points]))
        torch.testing.assert_close(together, rows.log_many(points))


def test_draws_of_nested_rows_carry_their_likelihood(y):
    """ArviZ's pointwise likelihood of schools whose rows are the last dimension: prior terms were summed along pupils."""
    posterior = fit(turned, y, NUTS(chains=1, warmup=50, draws=20), seed=0)
    found = posterior.to_arviz()["log_likelihood"]["y"].values[0]
    exact = stats.norm(posterior.draws["b"].mT.numpy(), NOISE).logpdf(y.numpy()).sum(-1)
    np.testing.assert_allclose(found, exact, rtol=1e-8)


def test_the_integral_of_one_row_knows_its_error(y):
    """`RowIntegral` with many proposals is within four of its standard errors of the truth."""
    posterior = fit(turned, y, SVI(steps=5), seed=0)
    with posterior.problem.scope(0):
        value, relative = RowIntegral(posterior.joint, posterior.draw(0), posterior.problem.kwargs, 4000).log_evidence()
    exact = stats.multivariate_normal(np.full(3, CENTRE), covariance()).logpdf(y.numpy())
    assert (np.abs(value.numpy() - exact) < 4 * relative.sqrt().numpy() + 1e-9).all()
    assert relative.sqrt().max() < 0.03
