"""Deep stories: likelihoods against scipy, shapes, what a fit answers about new rows, files, missing pixels, refusals."""

import math

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import nn
from torch.nn.functional import softplus

from inference import SVI, compare, fit, load, simulate
from inference.local import row_integral
from zoo import VAE, Autoencoder, DeepLatentGaussian, LinearVAE
from zoo import load as data_set
from zoo.catalog import get
from zoo.deep import (
    Bernoulli,
    Binomial,
    Categorical,
    Columns,
    ConvDecoder,
    ConvEncoder,
    DiscretisedLogistic,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    columns,
)
from zoo.deep.likelihoods import LEAST
from zoo.mixtures import count_setting

KINDS = (
    Bernoulli(),
    Binomial(5),
    Categorical(4),
    Normal(),
    Normal(0.7),
    StudentT(3.0),
    Poisson(),
    NegativeBinomial(),
    DiscretisedLogistic(8),
)
STORIES = {
    "VAE": VAE(64, 3, hidden=(20,)),
    "convolutions": VAE(64, 3, hidden=(16,), conv=(8, 8)),
    "skip": VAE(64, 3, hidden=(20, 20), skip=True),
    "fixed scale": VAE(64, 3, hidden=(20,), guide_scale=0.5),
    "missing": VAE(64, 3, hidden=(20,), missing=True),
    "linear": LinearVAE(64, 3),
    "deep": DeepLatentGaussian(64, (4, 3, 2), hidden=12),
}


@pytest.fixture(autouse=True)
def own_world():
    """A fixed seed for each test, and nothing of it for the next."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def digits():
    return data_set("binary_digits").x


@pytest.fixture(scope="module")
def fitted(digits):
    """A small VAE after a few hundred steps."""
    return fit(
        VAE(64, 5, hidden=(64,)), digits[:1500], SVI(steps=400, batch_size=200, starts=1, lr=0.01, particles=1), seed=0
    )


def outputs(kind, rows=3, width=1):
    return torch.randn(rows, kind.outputs, width, dtype=torch.float64)


def values(kind, width):
    """All values of a finite or countable support, as far as there is mass."""
    top = {Bernoulli: 1, Binomial: 5, Categorical: 3, DiscretisedLogistic: 7}.get(type(kind), 400)
    return torch.arange(top + 1, dtype=torch.float64).reshape(-1, 1, 1).expand(-1, 3, width)


# Likelihoods


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_likelihoods_sum_or_integrate_to_one(kind):
    """A missing normaliser, a tail that is cut off, a level too many."""
    fn = kind(outputs(kind))
    assert fn.batch_shape == (3, 1) and fn.event_shape == ()
    if kind.support.is_discrete:
        total = fn.log_prob(values(kind, 1)).exp().sum(0)
    else:
        grid = torch.sinh(torch.linspace(-12, 12, 200_001, dtype=torch.float64)).reshape(-1, 1, 1)
        total = torch.trapezoid(fn.log_prob(grid).exp(), grid.expand(-1, 3, 1), dim=0)
    torch.testing.assert_close(total, torch.ones(3, 1, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_likelihoods_are_scipys():
    """Successes and failures mixed up, a rate for a scale, mean and dispersion swapped."""
    out = {kind: outputs(kind) for kind in KINDS}
    part = {kind: [v.squeeze(-1).numpy() for v in o.unbind(-2)] for kind, o in out.items()}
    raw = {kind: [softplus(v).squeeze(-1).numpy() + LEAST for v in o.unbind(-2)] for kind, o in out.items()}
    x = np.array([0.0, 1.0, 1.0])
    share = {kind: scipy.special.expit(p[0]) for kind, p in part.items()}
    m, r = raw[NegativeBinomial()]
    loc, scale = 3.5 * (1 + part[DiscretisedLogistic(8)][0]), 3.5 * raw[DiscretisedLogistic(8)][1]
    logistic = scipy.stats.logistic(loc, scale)
    lower = np.where(x == 0, 0.0, logistic.cdf(x - 0.5))
    expected = {
        Bernoulli(): scipy.stats.bernoulli(share[Bernoulli()]).logpmf(x),
        Binomial(5): scipy.stats.binom(5, share[Binomial(5)]).logpmf(x),
        Categorical(4): torch.stack([torch.tensor(v) for v in part[Categorical(4)]], -1)
        .log_softmax(-1)[range(3), x.astype(int)]
        .numpy(),
        Normal(): scipy.stats.norm(part[Normal()][0], raw[Normal()][1]).logpdf(x),
        Normal(0.7): scipy.stats.norm(part[Normal(0.7)][0], 0.7).logpdf(x),
        StudentT(3.0): scipy.stats.t(3.0, part[StudentT(3.0)][0], raw[StudentT(3.0)][1]).logpdf(x),
        Poisson(): scipy.stats.poisson(raw[Poisson()][0]).logpmf(x),
        NegativeBinomial(): scipy.stats.nbinom(r, r / (r + m)).logpmf(x),
        DiscretisedLogistic(8): np.log(logistic.cdf(x + 0.5) - lower),
    }
    for kind, log_p in expected.items():
        ours = kind(out[kind]).log_prob(torch.tensor(x).unsqueeze(-1)).squeeze(-1)
        np.testing.assert_allclose(ours.numpy(), log_p, rtol=1e-9, err_msg=repr(kind))


def test_tails_of_the_discretised_logistic_do_not_cancel():
    """log(0) for a grey value far from its place: the difference of two cdfs that are both 1."""
    fn = DiscretisedLogistic(256)(torch.tensor([[-1.0], [-8.0]]))
    assert fn.log_prob(torch.tensor([[200.0]])).isfinite().all() and fn.log_prob(torch.tensor([[0.0]])) > -1.0


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_draws_have_the_mean_of_their_likelihood(kind):
    """A sampler that does not belong to its density: mean over 20,000 draws within 5 standard errors."""
    fn = kind(0.5 * outputs(kind))
    draws = fn.sample((20_000,)).double()
    assert kind.support.check(draws).all()
    if kind.support.is_discrete:
        x = values(kind, 1)
        mean = (fn.log_prob(x).exp() * x).sum(0)
    else:
        mean = fn.mean
    assert ((draws.mean(0) - mean).abs() <= 5 * draws.std(0) / len(draws) ** 0.5).all()


def test_columns_of_mixed_kinds_are_each_scored_by_their_own():
    """Outputs that go to another column's likelihood; columns put back in another order."""
    kinds = columns(5, real=[3], counts=[0], binary=[4, 1], categories={2: 3})
    assert kinds == (NegativeBinomial(), Bernoulli(), Categorical(3), Normal(), Bernoulli())
    together = Columns(5, kinds)
    assert together.outputs == 2 + 1 + 3 + 2 + 1 and together.inputs == 7
    out = torch.randn(6, together.outputs, dtype=torch.float64)
    fn = together(out)
    x = fn.sample()
    assert x.shape == fn.batch_shape == (6, 5) and fn.support.check(x).all() and fn.mean.shape == (6, 5)
    # outputs lie group by group, in the order in which kinds first come
    alone = [(out[:, 0:2], 0), (out[:, 2:3], 1), (out[:, 4:7], 2), (out[:, 7:9], 3), (out[:, 3:4], 4)]
    for part, j in alone:
        log_p = kinds[j](part.unsqueeze(-1)).log_prob(x[:, j : j + 1])
        torch.testing.assert_close(fn.log_prob(x)[:, j : j + 1], log_p)
    assert not fn.support.check(x + 0.5)[:, [0, 1, 2, 4]].any() and fn.support.check(x + 0.5)[:, 3].all()
    wide = fn.expand((2, 6, 5))
    assert wide.sample().shape == (2, 6, 5)
    torch.testing.assert_close(wide.log_prob(x), fn.log_prob(x).expand(2, 6, 5))
    assert (together.encode(torch.full((2, 5), torch.nan)) == 0).all()


def test_likelihoods_refuse_with_what_would_do():
    """A misspelt name without the list; a size that is missing; a column of no kind or of two."""
    with pytest.raises(ValueError, match=r"'bernuolli'.*'bernoulli'.*mean 'bernoulli'"):
        VAE(4, 2, likelihood="bernuolli")
    with pytest.raises(ValueError, match=r"levels=\.\.\."):
        VAE(4, 2, likelihood="categorical")
    with pytest.raises(ValueError, match="2 entries and there are 4 columns"):
        VAE(4, 2, likelihood=["normal", "poisson"])
    with pytest.raises(TypeError, match="one of"):
        VAE(4, 2, likelihood=3)
    with pytest.raises(ValueError, match=r"columns \[1\] are of no kind"):
        columns(2, real=[0])
    with pytest.raises(ValueError, match="column 0 is both"):
        columns(1, real=[0], binary=[0])
    with pytest.raises(ValueError, match="no column 5"):
        columns(2, real=[5, 0])


# Shapes and settings


@pytest.mark.parametrize("name", STORIES)
def test_stories_dream_and_guess_in_the_same_shapes(name, digits):
    """Sites outside the data plate, codes that model and guide shape differently, a guide that needs data."""
    story = STORIES[name]
    x = digits[:7].float()
    for arguments, N in (({"x": x}, 7), ({"num_data": 5}, 5)):
        model = poutine.trace(story.model).get_trace(**arguments)
        guide = poutine.trace(story.guide).get_trace(**arguments)
        model.compute_log_prob()
        guide.compute_log_prob()
        codes = [n for n in guide.nodes if n[0] == "z"]
        assert codes and model.nodes["x"]["value"].shape == (N, 64) and model.nodes["x"]["log_prob"].shape == (N,)
        for code in codes:
            one, other = model.nodes[code], guide.nodes[code]
            assert one["value"].shape == other["value"].shape and one["log_prob"].shape == other["log_prob"].shape == (
                N,
            )


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_images_have_any_likelihood(kind):
    """Channels of outputs and of pixels mixed up: odd sides, three colours."""
    story = VAE(3 * 5 * 7, 2, hidden=(16,), conv=(3, 5, 7), likelihood=kind)
    x = story.model(num_data=4)
    loc, scale = story.encode(x.float())
    assert x.shape == (4, 105) and loc.shape == scale.shape == (4, 2)
    dense = VAE(6, 2, hidden=(8,), likelihood=kind)
    assert dense.encode(dense.model(num_data=3).float())[0].shape == (3, 2)


def test_convolutions_halve_and_double_pictures():
    """A picture of odd size that comes back larger or smaller."""
    for image in ((1, 8, 8), (3, 7, 5), (1, 28, 28)):
        x = torch.randn(2, math.prod(image))
        assert ConvEncoder(image, 5)(x).shape == (2, 5)
        assert ConvDecoder(image, 4)(torch.randn(2, 4)).shape == x.shape


def test_weights_depend_on_the_seed_alone():
    """Weights that the caller's random state decides; a random state that making a story moves."""
    before = torch.get_rng_state()
    one = VAE(6, 2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    same, other = VAE(6, 2, seed=3), VAE(6, 2, seed=4)
    weights = [torch.cat([p.flatten() for p in s.parameters()]) for s in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_settings_are_refused_before_any_work():
    """A setting that fails deep inside torch, or does nothing."""
    for wrong, text in (
        ({"num_codes": 0}, "num_codes must be a whole number"),
        ({"hidden": (10, 0)}, "hidden must be a whole number"),
        ({"guide_scale": 1.5}, "between 0 and 1"),
        ({"activation": "sine"}, "'relu'"),
        ({"conv": (3, 3)}, "with 8 cells"),
        ({"conv": (2, 4), "skip": True}, "skip=True"),
        ({"conv": (2, 4), "likelihood": ["normal"] * 7 + ["poisson"]}, "one kind"),
    ):
        with pytest.raises(ValueError, match=text):
            VAE(**{"num_features": 8, "num_codes": 2, **wrong})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        VAE(8, 2, encoder=count_setting)
    with pytest.raises(ValueError, match="2 widths or more"):
        DeepLatentGaussian(8, (3,))
    with pytest.raises(ValueError, match="3 widths and 2 layers"):
        DeepLatentGaussian(8, (3, 2), hidden=(4, 4, 4))
    with pytest.raises(ValueError, match="6 columns and the networks were made for num_features=8"):
        VAE(8, 2).model(torch.zeros(3, 6))


def test_own_networks_take_the_place_of_the_storys(digits):
    """Networks of the user that are copied, or not trained."""
    story = VAE(64, 2, encoder=nn.Linear(64, 4), decoder=nn.Linear(2, 64))
    before = story.decoder.weight.clone()
    p = fit(story, digits[:300], SVI(steps=30, starts=1, particles=1), seed=0)
    assert torch.equal(story.decoder.weight, before)  # a fit works on a copy
    assert not torch.equal(p.problem.story.decoder.weight, before)
    assert not torch.equal(p.problem.story.encoder.weight, story.encoder.weight)


def test_grey_values_and_holes_are_refused_with_the_way_out(digits):
    """Pixels in 0..255 for a yes or no; missing cells that an encoder would take for zeros."""
    with pytest.raises(ValueError, match="divide by 255"):
        fit(VAE(64, 2), 255 * digits, SVI(steps=5))
    x = digits[:50].clone()
    x[3, 4] = torch.nan
    with pytest.raises(ValueError, match="missing=True"):
        fit(VAE(64, 2), x, SVI(steps=5))


# What a fit answers


def test_posterior_answers_about_rows_it_has_not_seen(fitted, digits):
    """Draws that need the fitted number of rows; densities that are those of the prior; new rows without structure."""
    new = digits[1500:1600]
    z = fitted.local("z", new, draws=40)
    assert z.shape == (40, 100, 5)
    loc, scale = fitted.problem.story.encode(new.float())
    assert ((z.mean(0) - loc).abs() < 6 * scale).all()
    log_p = fitted.log_prob(new)
    shares = digits[:1500].mean(0).clamp(1e-3, 1 - 1e-3)
    alone = torch.distributions.Bernoulli(shares).log_prob(new).sum(-1)
    assert log_p.shape == (100,) and log_p.mean() > alone.mean() + 4
    drawn = fitted.sample(500)
    assert drawn["x"].shape == (500, 64) and drawn["z"].shape == (500, 5)
    assert (drawn["x"].mean(0) - digits.mean(0)).abs().mean() < 0.08
    score = fitted.score(new)
    assert "draws of the guide" in score.estimator and score.bound == "plug-in estimate"


def test_encoder_and_laplace_proposals_agree(fitted, digits):
    """Importance weights without the guide's density, or with another row's: two proposals, one log p(x)."""
    from inference.local import RowIntegral

    new = digits[1500:1540]
    ours = fitted.log_prob(new)
    with fitted.problem.scope(0):
        laplace, relative = RowIntegral(
            fitted.joint, fitted.draw(0), fitted.problem.with_data(new), 1000
        ).log_evidence()
    error = fitted.score(new).monte_carlo_error.mean() + relative.sqrt().mean()
    assert (ours - laplace).mean().abs() < 4 * error / len(new) ** 0.5


def test_a_saved_vae_answers_as_before(fitted, digits, tmp_path):
    """Networks left out of the file; weights written to the user's story; a thousand copies of every weight."""
    path = fitted.save(tmp_path / "vae.safetensors")
    story = VAE(64, 5, hidden=(64,))
    before = story.decoder.layers[0].weight.clone()
    again = load(path, story)
    new = digits[1500:1550]
    assert torch.equal(again.log_prob(new), fitted.log_prob(new))
    assert torch.equal(again.local("z", new), fitted.local("z", new))
    assert torch.equal(again.sample(9)["x"], fitted.sample(9)["x"])
    assert torch.equal(story.decoder.layers[0].weight, before)
    assert path.stat().st_size < 8 * (sum(p.numel() for p in story.parameters()) + fitted.draws["z"].numel()) + 4e6
    with pytest.raises(ValueError, match="hidden=\\(63,\\)"):
        load(path, VAE(64, 5, hidden=(63,)))


def test_bounds_climb_the_ladder(fitted, digits):
    """Blocks of draws averaged outside the logarithm."""
    ladder = fitted.ladder(digits[1500:1600], draws=400, k=20)
    assert ladder.elbo.mean() < ladder.iwae.mean() < ladder.evidence.mean()
    assert abs(float(ladder.evidence.mean()) - float(fitted.log_prob(digits[1500:1600]).mean())) < 0.1


def test_deep_codes_are_drawn_together(digits):
    """Codes of two layers that come from different draws: z1 must lie where its own z2 puts it."""
    story = DeepLatentGaussian(64, (4, 2), hidden=32)
    p = fit(story, digits[:600], SVI(steps=150, starts=1, particles=1, lr=0.01), seed=0)
    new = digits[600:650]
    assert p.local("z1", new).shape[1:] == (50, 4) and p.local("z2", new).shape[1:] == (50, 2)
    ladder = p.ladder(new, draws=200, k=20)
    assert ladder.elbo.mean() < ladder.iwae.mean() < ladder.evidence.mean()
    with p.problem.scope(0):
        rows = row_integral(p, 0, p.problem.with_data(new), 50)
        values = rows.all_draws(50)
    with p.problem.scope(0):  # the same draws again, then five chosen among them
        chosen = rows.resample_jointly(5)
    for s in range(5):
        match = (values["z1"] == chosen["z1"][s]).all(-1)  # which of the 50 draws it was, row by row
        assert match.any(0).all() and (values["z2"][match.int().argmax(0), range(50)] == chosen["z2"][s]).all()


def test_missing_pixels_are_filled_better_than_by_means(digits):
    """Holes read as zeros by the likelihood, or the encoder: rmse at least 15 % below that of the columns' means."""
    torch.manual_seed(1)
    holes = torch.rand_like(digits) < 0.3
    x = digits.masked_fill(holes, torch.nan)
    story = VAE(64, 8, hidden=(96,), missing=True)
    p = fit(story, x[:1400], SVI(steps=1200, batch_size=200, starts=1, lr=0.012, particles=1), seed=0)
    mean = x[:1400].nanmean(0).expand_as(x)
    for rows, data in ((slice(0, 1400), None), (slice(1400, None), x[1400:])):
        found = p.impute(data).values
        h, truth = holes[rows], digits[rows]
        assert torch.equal(found[~h], truth[~h].to(found))
        ours, naive = ((v[h] - truth[h]).square().mean().sqrt() for v in (found, mean[rows]))
        assert ours < 0.85 * naive


def test_an_encoder_sees_which_cells_are_missing():
    """A zero that was seen and one that was not are different things."""
    story = VAE(4, 2, hidden=(8,), missing=True)
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0], [torch.nan, 1.0, 0.0, 1.0]])
    loc, _ = story.encode(x)
    assert loc.isfinite().all() and not torch.allclose(loc[0], loc[1])


# The autoencoder


def test_an_autoencoder_has_codes_and_no_density():
    """A squared error that poses as a log density."""
    story, data = Autoencoder.example()
    x = data["x"]
    p = fit(story, x[:1500], SVI(steps=400, batch_size=200, starts=1, lr=0.01, particles=1), seed=0)
    new = x[1500:]
    assert p.kind == "point" and p.local("z", new, draws=1).shape == (1, 297, 10)
    own = p.problem.story
    torch.testing.assert_close(p.local("z", new, draws=1)[0], own.encoder(new.to(own.decoder.layers[0].weight)))
    assert (own.reconstruct(new) - new).square().mean() < 0.5 * new.var(0).mean()
    squared = (own.reconstruct(x[:1500]) - x[:1500]).square().sum()
    constant = -1500 * 64 * 0.5 * math.log(math.pi)
    assert p.diagnostics["elbo"] == pytest.approx(constant - float(squared), rel=1e-5)
    for ask in (lambda: p.log_prob(new), lambda: p.score(), lambda: p.sample(3), lambda: p.ladder(new)):
        with pytest.raises(ValueError, match=r"n/a \(no density\)"):
            ask()
    with pytest.raises(ValueError, match="no draws"):
        simulate(story, num_data=3)


def test_comparing_an_autoencoder_says_that_it_has_no_density():
    """A crash where a cell of the table belongs."""
    story, data = Autoencoder.example()
    found = compare(story, data, methods=[SVI(steps=20, starts=1)], seed=0, progress=False)
    assert found.table.loc["svi", "held-out log p"] == "n/a (no density)" and "n/a (no density)" in str(found)


@pytest.mark.parametrize("name", ["VAE", "LinearVAE", "DeepLatentGaussian", "Autoencoder"])
def test_examples_are_fitted_by_svi_without_being_asked(name):
    """A story that no method admits, or that prints like a bare torch module."""
    story, data = get(name).example()
    p = fit(story, {n: v[:200] for n, v in data.items()}, SVI(steps=20, starts=1), seed=0)
    assert p.diagnostics["mode"] == "graph" and repr(story).startswith(f"{name}(num_features=")
