"""Deep stories: shapes, settings, what a fit answers about new rows, files, missing pixels, refusals."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from stories import recorded_mode
from test_deep_likelihoods import KINDS
from torch import nn

from inference import SVI, compare, fit, load, simulate
from inference.local import row_integral
from inference.score import active_units, kl_per_unit
from zoo import VAE, Autoencoder, DeepLatentGaussian, LinearVAE
from zoo import load as data_set
from zoo.catalog import get
from zoo.deep import (
    ConvDecoder,
    ConvEncoder,
    columns,
)
from zoo.mixtures import count_setting

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
    with pytest.raises(ValueError, match="Grey values between 0 and 1"):
        fit(VAE(64, 2), digits / 2, SVI(steps=5))
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


def test_units_say_what_a_code_tells(fitted, digits):
    """A divergence summed over the wrong axis; activity of the scale and not of the mean."""
    x = digits[:200]
    with torch.no_grad():
        loc, scale = fitted.problem.story.encode(x.float())
    found = fitted.units(x)["z"]
    torch.testing.assert_close(found.kl, kl_per_unit(loc, scale))
    assert torch.equal(found.active, active_units(loc)) and not found.collapsed
    assert "of 5 units active" in repr(found)


def test_deep_codes_are_drawn_together(digits):
    """Codes of two layers that come from different draws: z1 must lie where its own z2 puts it."""
    story = DeepLatentGaussian(64, (4, 2), hidden=32)
    p = fit(story, digits[:600], SVI(steps=150, starts=1, particles=1, lr=0.01), seed=0)
    new = digits[600:650]
    assert p.local("z1", new).shape[1:] == (50, 4) and p.local("z2", new).shape[1:] == (50, 2)
    ladder = p.ladder(new, draws=200, k=20)
    assert ladder.elbo.mean() < ladder.iwae.mean() < ladder.evidence.mean()
    assert {name: len(u.kl) for name, u in p.units(new).items()} == {"z1": 4, "z2": 2}
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
    assert p.diagnostics["mode"] == recorded_mode(p) and repr(story).startswith(f"{name}(num_features=")


def test_mixed_columns_with_holes_are_learned_and_filled():
    """A column's outputs or holes that reach another column: one network for five kinds, no worse than its columns' means."""
    x = data_set("patients").x.clone()
    x[:, :2] = (x[:, :2] - x[:, :2].mean(0)) / x[:, :2].std(0)
    torch.manual_seed(0)
    holes = torch.rand_like(x) < 0.15
    kinds = columns(5, real=[0, 1], counts=[2], binary=[3], categories={4: 3})
    story = VAE(5, 2, hidden=(32,), likelihood=kinds, missing=True)
    p = fit(story, x.masked_fill(holes, torch.nan), SVI(steps=300, starts=1, particles=2), seed=0)
    assert p.diagnostics["mode"] == recorded_mode(p)
    assert p.structure["x"].missing == int(holes.sum()) and p.log_prob().shape == (len(x),)
    found = p.impute()
    mean = x.masked_fill(holes, torch.nan).nanmean(0)
    for j in (0, 2, 3, 4):  # what the code of a patient decides most
        h = holes[:, j]
        assert (found.values[h, j] - x[h, j]).square().mean() < 0.9 * (mean[j] - x[h, j]).square().mean()
    drawn = p.sample(200)["x"]
    assert story.columns(torch.zeros(1, story.columns.outputs)).support.check(drawn).all()
