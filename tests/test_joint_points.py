"""The highest point of a joint density of many unknowns: where it lies far from the mass, EM and `choose` say so."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from inference import EM, choose, fit, inspect
from inference.methods.em.displaced import shift


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def of_mass(found):
    """Warnings that the point lies far from the mass."""
    return [w for w in found.warnings if "at once" in w or "the spread of" in w]


def wide_regression(y, X):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([X.shape[1]]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ w, s), obs=y)


def regression_data(columns, rows=60):
    X = normals(1, rows, columns)
    return X @ normals(2, columns) + normals(3, rows), X


def exact_noise(y, X):
    """The log scale at which the exact marginal density is highest, and its sd by curvature."""

    def minus(t):
        cov = np.exp(2 * t) * np.eye(len(y)) + 4.0 * X @ X.T
        return 0.5 * np.linalg.slogdet(cov)[1] + 0.5 * y @ np.linalg.solve(cov, y) + 0.5 * t**2 + t

    best = minimize_scalar(minus, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).x
    bend = (minus(best + 1e-3) - 2 * minus(best) + minus(best - 1e-3)) / 1e-6
    return best, bend**-0.5


def test_noise_of_a_wide_regression_is_off_by_what_algebra_says():
    """40 slopes and 60 rows: the joint point took half the noise for signal without a word."""
    y, X = regression_data(40)
    found = fit(wide_regression, (y, X), EM(restarts=1), seed=0)
    point = float(found.draws["s"][0].log())
    exact, sd = exact_noise(y, X)
    assert exact - point > 2 * sd
    (told,) = of_mass(found)
    assert "41 unknowns" in told and "s is off by" in told and "too low" in told
    with found.problem.scope(0):
        from inference.methods.em.displaced import curvature

        flat = found.joint.flatten(found.draw(0))
        H = curvature(found.joint, flat)
        got = shift(found.joint, flat, H, 0)
    # with slopes integrated out, log|H_ww| has this slope in log s; along the profile nothing else of it moves
    A = X.T @ X / np.exp(2 * point)
    slope = -2 * np.trace(np.linalg.solve(A + np.eye(40) / 4, A))
    assert got == pytest.approx(-0.5 * slope * np.linalg.inv(H.numpy())[0, 0] ** 0.5, rel=1e-4)


def test_few_slopes_are_left_in_peace():
    """Three slopes and 60 rows: a warning would be a false alarm, since the exact mode is within half an sd."""
    y, X = regression_data(3)
    found = fit(wide_regression, (y, X), EM(restarts=1), seed=0)
    exact, sd = exact_noise(y, X)
    assert abs(float(found.draws["s"][0].log()) - exact) < 0.5 * sd
    assert not of_mass(found) and choose(found.structure, "point").method.name == "em"


def volatility(y):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    e = pyro.sample("e", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(0.0, (sigma * e.cumsum(0) / 2).exp()), obs=y)


def test_standardised_volatility_is_told():
    """Stochastic volatility, steps standardised: sigma came out at 5 where draws say 0.2 +- 0.1."""
    y = normals(5, 80) * np.exp(normals(6, 80).cumsum() * 0.125)
    found = fit(volatility, y, EM(restarts=1), seed=0)
    assert float(found.draws["sigma"][0]) > 2.0
    (told,) = of_mass(found)
    assert "sigma is off by" in told and "too high" in told and "NUTS" in told


def steps(y):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    h = pyro.sample("h_0", dist.Normal(0.0, 1.0))
    for t in range(len(y)):
        h = pyro.sample(f"h_{t + 1}", dist.Normal(h, sigma))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=y[t])


def areas(y, edges):
    tau, level = pyro.sample("tau", dist.Gamma(1.0, 1.0)), pyro.sample("level", dist.Normal(0.0, 5.0))
    n = len(y)
    phi = pyro.sample("phi", dist.Normal(0.0, 10.0).expand([n]).to_event(1))
    rough = (phi[edges[:, 0]] - phi[edges[:, 1]]).square().sum()
    pyro.factor("icar", 0.5 * (n - 1) * tau.log() - 0.5 * tau * rough - 0.5 * (phi.sum() / (0.01 * n)) ** 2)
    with pyro.plate("data", n):
        pyro.sample("y", dist.Poisson((level + phi).exp()), obs=y)


def schools(y, sd):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def nested_schools(y, sd):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def funnel(y):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    x = pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))
    with pyro.plate("data", 9):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


EIGHT = (np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18]))
LINE = np.stack([np.arange(29), np.arange(1, 30)], 1)
COUNTS = np.random.default_rng(3).poisson(np.exp(1 + np.sin(np.arange(30) / 5))).astype(float)


@pytest.mark.parametrize(
    ("story", "data", "told", "crowded"),
    [
        (steps, normals(5, 12), "the spread of h_1", True),
        (areas, (COUNTS, LINE), "tau is off by", True),
        (schools, EIGHT, "the spread of theta fell to 0", True),
        (nested_schools, EIGHT, "the spread of theta lies at the edge", False),
        (funnel, normals(9, 9), "the spread of x fell to 0", True),
    ],
)
def test_scales_of_many_unknowns_are_told(story, data, told, crowded):
    """Walks, areas and hierarchies of unknown scale: their highest point was handed out as any other."""
    found = fit(story, data, EM(restarts=1), seed=0)
    assert len(of_mass(found)) == 1 and told in of_mass(found)[0]
    choice = choose(inspect(story, data), "point")
    assert (choice.method.name == "nuts" and "numbers of" in choice.rule) == crowded


def test_groups_with_many_rows_are_climbed_and_left_in_peace():
    """Means copied group by group beside a noise without closed form: EM failed from 81 rows on in PyTorch's words."""
    group = np.arange(200) % 10
    y = normals(4, 10)[group] + normals(5, 200)

    def groups(y, group):
        tau, s = pyro.sample("tau", dist.HalfNormal(2.0)), pyro.sample("s", dist.HalfNormal(2.0))
        with pyro.plate("groups", 10):
            a = pyro.sample("a", dist.Normal(0.0, tau))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a[group], s), obs=y)

    found = fit(groups, (y, group), EM(restarts=1, tol=1e-12), seed=0)
    mean, inside = np.array([y[group == k].mean() for k in range(10)]), 20

    def minus(free):
        t, s = np.exp(free)
        a = mean * t**2 / (t**2 + s**2 / inside)
        return (
            t**2 / 8
            + s**2 / 8
            + 10 * np.log(t)
            + 200 * np.log(s)
            + (a**2).sum() / (2 * t**2)
            + ((y - a[group]) ** 2).sum() / (2 * s**2)
        )

    best = np.exp(minimize(minus, [0.0, 0.0], tol=1e-12).x)
    assert [float(found.draws[n][0]) for n in ("tau", "s")] == pytest.approx(best, rel=1e-3)
    assert not of_mass(found)


def test_a_table_of_many_cells_alone_is_no_crowd():
    """Shares of 100 cells from 50 counts: many unknowns, and nothing that they share; EM is exact there."""

    def table(x):
        p = pyro.sample("p", dist.Dirichlet(torch.full((100,), 2.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(p), obs=x)

    x = torch.arange(50) % 7
    assert choose(inspect(table, x), "point").method.name == "em"
    assert not of_mass(fit(table, x, EM(restarts=1), seed=0))
