"""Guides that read rows: what they say of new rows, against quadrature and exact Gaussian posteriors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference import SVI, Amortised, fit, load


def counts(x=None, num_data=300):
    """One latent a row, and a count that hangs on it through an exponential."""
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Poisson((1.0 + 0.8 * z).exp()), obs=x)


def by_quadrature(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(x), posterior mean and sd of z for every count."""
    z = np.linspace(-7, 7, 4001)
    joint = stats.norm.pdf(z) * stats.poisson.pmf(x[:, None], np.exp(1.0 + 0.8 * z))
    total = joint.sum(1) * (z[1] - z[0])
    mean = (joint * z).sum(1) / joint.sum(1)
    return np.log(total), mean, np.sqrt((joint * z**2).sum(1) / joint.sum(1) - mean**2)


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.poisson(np.exp(1.0 + 0.8 * rng.normal(size=400))), dtype=torch.float64)
    method = SVI(guide=Amortised((32,)), steps=2000, starts=1, lr=0.04)
    return fit(counts, x, method, seed=0), torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 12.0])


def test_new_rows_are_answered_by_the_encoder(fitted):
    """Catches prior draws for posterior ones, rows in the wrong order, and a guide run on the fitted rows."""
    posterior, new = fitted
    _, mean, sd = by_quadrature(new.numpy())
    z = posterior.local("z", new, draws=4000)
    assert z.shape == (4000, 6)
    assert np.abs(z.mean(0).numpy() - mean).max() < 0.15
    assert np.abs(z.std(0).numpy() / sd - 1).max() < 0.2


def test_density_of_new_rows_is_that_of_quadrature(fitted):
    """Catches a guide's log density left out of the weights, or counted for all rows together."""
    posterior, new = fitted
    exact, _, _ = by_quadrature(new.numpy())
    score = posterior.score(new, draws=2000)
    assert "guide" in score.estimator
    assert np.abs(score.rows.numpy() - exact).max() < 0.03


def test_ladder_rises_to_the_exact_density(fitted):
    """Catches a bound on the wrong side."""
    posterior, new = fitted
    exact, _, _ = by_quadrature(new.numpy())
    ladder = posterior.ladder(new, draws=2000, k=20)
    assert bool((ladder.elbo <= ladder.iwae).all() and (ladder.iwae <= ladder.evidence).all())
    assert bool((ladder.elbo.numpy() < exact + 1e-3).all())
    assert np.abs(ladder.evidence.numpy() - exact).max() < 0.03


def test_refinement_closes_the_amortisation_gap(fitted):
    """Catches a climb that leaves the row's own normal below the guide's, or lifts it above the evidence."""
    posterior, new = fitted
    exact, mean, _ = by_quadrature(new.numpy())
    found = posterior.refine(new, progress=False)
    assert bool((found.gap > -4 * found.error - 1e-3).all())
    assert bool((found.elbo.numpy() < exact + 4 * found.error.numpy()).all())
    assert np.abs(found.elbo.numpy() - exact).max() < 0.05
    assert np.abs(found.local("z", 2000).mean(0).numpy() - mean).max() < 0.1


def test_saved_encoder_says_the_same(fitted, tmp_path):
    """Catches weights that stay behind when a fit is saved."""
    posterior, new = fitted
    path = posterior.save(tmp_path / "counts.st")
    again = load(path, counts, guide=Amortised((32,)))
    torch.testing.assert_close(again.log_prob(new), posterior.log_prob(new), rtol=0, atol=0)
    assert path.stat().st_size < 8e6


def two_causes(x=None, num_data=200):
    """Two latents that explain one number: given it they are strongly dependent."""
    with pyro.plate("data", num_data if x is None else len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)


@pytest.mark.parametrize(("family", "share"), [("mean_field", 0.0), ("full_rank", 1.0), ("low_rank", 1.0)])
def test_families_keep_the_dependence_that_they_can(family, share):
    """Catches a conditional whose earlier site is forgotten: exact correlation is -0.8."""
    x = torch.linspace(-3, 3, 60)
    posterior = fit(two_causes, x, SVI(guide=Amortised((16,), family), steps=1500, starts=1, lr=0.04), seed=0)
    a, b = posterior.local("a"), posterior.local("b")
    covariance = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) / 0.25 + torch.eye(2)
    exact = torch.linalg.inv(covariance)
    rho = float(exact[0, 1] / exact[0, 0])
    found = torch.stack([torch.corrcoef(torch.stack([a[:, n], b[:, n]]))[0, 1] for n in range(60)]).mean()
    assert abs(float(found) - share * rho) < 0.1
    wide = torch.diagonal(exact) if share else 1 / torch.diagonal(covariance)
    assert abs(float(a.std(0).mean()) / math.sqrt(float(wide[0])) - 1) < 0.12
    assert abs(float((a.mean(0) - x / 2.25).abs().max())) < 0.2


def shapes(x=None, num_data=80):
    """A shared positive matrix in a plate, and latents of several supports in the rows."""
    with pyro.plate("parts", 3):
        rate = pyro.sample("rate", dist.Gamma(torch.full((2,), 4.0), 2.0).to_event(1))
    with pyro.plate("data", num_data if x is None else len(x)):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        size = pyro.sample("size", dist.LogNormal(0.0, 0.5))
        lift = pyro.sample("lift", dist.Normal(torch.zeros(1, 2), 0.3).to_event(2))
        mean = (share @ rate) * size.unsqueeze(-1) * lift.squeeze(-2).exp()
        return pyro.sample("x", dist.Poisson(mean).to_event(1), obs=x)


@pytest.mark.parametrize("family", ["mean_field", "full_rank", "low_rank"])
def test_any_support_and_shape(family):
    """Catches event shapes that are not those of the story, and values outside the support."""
    x = torch.poisson(torch.full((80, 2), 2.0, dtype=torch.float64), generator=torch.Generator().manual_seed(0))
    posterior = fit(shapes, x, SVI(guide=Amortised((16,), family), steps=100, starts=1), seed=0)
    assert posterior.draws["rate"].shape[1:] == (3, 2) and bool((posterior.draws["rate"] > 0).all())
    share = posterior.local("share", x[:5], draws=40)
    assert share.shape[1:] == (5, 3)
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]))
    assert posterior.local("lift", x[:5], draws=40).shape[1:] == (5, 1, 2)
    assert bool(posterior.log_prob(x[:5]).isfinite().all())


def pairs(x=None, num_data=300):
    """Two noisy looks at one latent."""
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(z.sinh().unsqueeze(-1).expand(-1, 2), 0.5).to_event(1), obs=x)


def test_holes_are_shown_to_the_encoder():
    """A row with one look is less certain than one with two; catches holes that pass for means."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=400)
    x = torch.tensor(np.sinh(z)[:, None] + 0.5 * rng.normal(size=(400, 2)))
    x[::2, 1] = torch.nan
    posterior = fit(pairs, x, SVI(guide=Amortised((32, 32)), steps=2000, starts=1), seed=0)
    new = torch.tensor([[1.5, 1.5], [1.5, torch.nan]])
    sd = posterior.local("z", new, draws=3000).std(0)
    grid = np.linspace(-5, 5, 4001)
    for k, looks in enumerate((2, 1)):
        log = stats.norm.logpdf(grid) + looks * stats.norm.logpdf(1.5, np.sinh(grid), 0.5)
        p = np.exp(log - log.max())
        mean = (p * grid).sum() / p.sum()
        exact = math.sqrt((p * grid**2).sum() / p.sum() - mean**2)
        assert abs(float(sd[k]) / exact - 1) < 0.2


def no_locals(x=None, num_data=10):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", num_data if x is None else len(x)):
        return pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_mistakes_are_named():
    """Before any work."""
    with pytest.raises(ValueError, match="family='rank'"):
        Amortised((8,), "rank")
    with pytest.raises(ValueError, match="encoder"):
        Amortised((8, 0))
    with pytest.raises(TypeError, match="hidden layers"):
        Amortised(8)  # type: ignore[arg-type]
    x = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="no continuous latents"):
        fit(no_locals, x, SVI(guide=Amortised()))
    posterior = fit(no_locals, x, SVI(steps=20, starts=1), seed=0)
    with pytest.raises(ValueError, match="guide that reads rows"):
        posterior.refine()
    with pytest.raises(ValueError, match="no continuous latents"):
        posterior.ladder()
