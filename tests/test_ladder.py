"""ELBO <= IWAE(k) <= importance sampling, against a linear-Gaussian evidence in closed form."""

import math

import pytest
import torch
from test_svi_step import X, small_vae
from torch.distributions import Normal, kl_divergence

from inference import SVI, fit
from inference.score import active_units, kl_per_unit, ladder

ROWS = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)


def log_weights(scale, count=20_000):
    """z ~ N(0, 1), x ~ N(z, 1): the posterior is N(x / 2, 1 / 2) and the evidence N(x; 0, 2)."""
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = Normal(ROWS / 2, scale * math.sqrt(0.5))
    z = q.loc + q.scale * noise
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    return Normal(zero, one).log_prob(z) + Normal(z, 1.0).log_prob(ROWS) - q.log_prob(z)


EXACT = Normal(torch.zeros(3).double(), math.sqrt(2.0)).log_prob(ROWS)


def test_the_evidence_and_the_elbo_are_exact():
    """A wide guide: importance sampling finds log p(x), the ELBO lies below it by the closed-form KL."""
    found = ladder(log_weights(1.5), 50)
    assert ((found.evidence - EXACT).abs() < 4 * found.error).all() and (found.error < 0.01).all()
    post = Normal(ROWS / 2, math.sqrt(0.5))
    gap = kl_divergence(Normal(ROWS / 2, 1.5 * math.sqrt(0.5)), post)
    assert (found.elbo - (EXACT - gap)).abs().max() < 0.03
    assert (found.elbo < found.iwae).all() and (found.iwae < found.evidence).all()
    assert (found.khat < 0.7).all() and (found.ess < 20_000).all()


def test_the_posterior_itself_has_no_gap():
    """q = p(z | x): all three agree, every draw counts."""
    found = ladder(log_weights(1.0, 1000), 10)
    for rung in (found.elbo, found.iwae, found.evidence):
        torch.testing.assert_close(rung, EXACT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.ess, torch.full((3,), 1000.0).double())


def test_order_holds_where_k_does_not_divide():
    """Jensen holds draw for draw only if all rungs use the same draws."""
    for count in (7, 53, 99):
        found = ladder(log_weights(2.0, count), 5)
        assert found.draws == 5 * (count // 5)
        assert (found.elbo <= found.iwae + 1e-12).all() and (found.iwae <= found.evidence + 1e-12).all()


def test_a_fit_reports_the_ladder():
    """Rows with latents of their own get it in the diagnostics."""
    p = fit(small_vae(), X, SVI(steps=20, starts=1, draws=50), seed=0)
    assert "IWAE(50)" in p.diagnostics["ladder"]


def test_collapsed_units_are_found():
    """KL per unit equals torch's, a collapsed unit has none and is not active."""
    loc = torch.stack([torch.linspace(-2, 2, 50), torch.zeros(50)], 1).double()
    scale = torch.stack([torch.full((50,), 0.3), torch.ones(50)], 1).double()
    wanted = kl_divergence(Normal(loc, scale), Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(kl_per_unit(loc, scale), wanted)
    assert wanted[1] == 0 and active_units(loc).tolist() == [True, False]


def test_what_is_no_table_is_refused():
    """Argument and shape are named."""
    with pytest.raises(ValueError, match="draws, rows"):
        ladder(torch.zeros(5))
    with pytest.raises(ValueError, match="k=6"):
        ladder(torch.zeros(5, 2), 6)
    with pytest.raises(ValueError, match="rows, units"):
        active_units(torch.zeros(5))
