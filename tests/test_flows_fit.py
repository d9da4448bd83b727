"""Flows through `fit`: densities with mass one, maxima that are known, contexts, images, saved answers, figures."""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from stories import recorded_mode
from test_flows import STORIES, doubles  # noqa: F401

from inference import SVI, fit
from inference import load as read_answer
from zoo import MAF, Glow, NeuralSplineFlow, RealNVP, load
from zoo.flows.pictures import draw_layers

# Through fit


@pytest.mark.parametrize("name", STORIES)
def test_fitted_densities_integrate_to_one(name):
    """A density of another measure: by quadrature over the plane, after training through `fit`, as a recorded graph."""
    x = load("two_moons", num_data=500).x
    posterior = fit(STORIES[name](2), x, SVI(steps=100, lr=0.04), seed=0, progress=False)
    assert posterior.kind == "point"
    assert posterior.diagnostics["mode"] == recorded_mode(posterior), posterior.diagnostics["reason"]
    assert posterior.log_prob().mean() > scipy.stats.norm.logpdf(x.numpy()).sum(1).mean() + 0.02
    side = torch.linspace(-6, 6, 401)
    grid = torch.cartesian_prod(side, side)
    total = posterior.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert total == pytest.approx(1.0, abs=0.01)


def test_fit_reaches_the_maximum_of_the_likelihood():
    """One column and one layer are a normal distribution, whose maximum is known: mean and standard deviation."""
    x = 3.0 + 0.5 * torch.randn(400, 1)
    posterior = fit(MAF(1, 1, (4,)), x, SVI(steps=3000, lr=0.1), seed=0, progress=False)
    best = dist.Normal(x.mean(), x.std(correction=0)).log_prob(x).sum()
    assert posterior.log_prob().sum() == pytest.approx(float(best), abs=1e-3)
    assert posterior.diagnostics["elbo"] == pytest.approx(float(best), abs=1e-3)
    drawn = posterior.sample(5000, seed=1)["x"]
    assert drawn.shape == (5000, 1) and abs(drawn.mean() - x.mean()) < 0.03 and abs(drawn.std() - x.std()) < 0.02
    new = torch.randn(7, 1)
    torch.testing.assert_close(
        posterior.log_prob(new), dist.Normal(x.mean(), x.std(correction=0)).log_prob(new[:, 0]), rtol=1e-2, atol=1e-2
    )


def test_fit_repeats_itself_and_leaves_the_story_alone():
    """Weights of the user's story that training moved; a seed that does not fix the batches."""
    story, x = RealNVP(2, 2, (8,)), load("two_moons", num_data=300).x
    before = [p.clone() for p in story.parameters()]
    first, second = (fit(story, x, SVI(steps=30, batch_size=64), seed=3, progress=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, story.parameters()))
    assert torch.equal(first.log_prob(), second.log_prob()) and first.history == second.history


def test_a_saved_flow_has_its_weights(tmp_path):
    """An answer read back with the weights that the story was made with: permutations and scales are settings, not numbers."""
    x = load("two_rods").x
    posterior = fit(MAF(3, 2, (8,), loc=[0.1, 0.2, 0.3]), x, SVI(steps=40, lr=0.1), seed=0, progress=False)
    path = posterior.save(tmp_path / "flow.post")
    again = read_answer(path, MAF(3, 2, (8,), loc=[0.1, 0.2, 0.3], seed=5))
    torch.testing.assert_close(again.log_prob(), posterior.log_prob(), rtol=0, atol=0)
    assert (again.log_prob(x) - MAF(3, 2, (8,)).distribution().log_prob(x)).abs().max() > 0.1


def test_conditional_density_is_one_for_every_context():
    """Context mixed between rows: labels of the moons, known, are worth about log 2, and each density has mass 1."""
    moons = load("two_moons", num_data=600)
    context = moons.labels[:, None].double()
    method = SVI(steps=200, lr=0.04)
    posterior = fit(
        NeuralSplineFlow(2, 2, (32,), num_context=1), {"x": moons.x, "given": context}, method, seed=0, progress=False
    )
    wrong = posterior.log_prob({"x": moons.x, "given": 1 - context})
    assert posterior.log_prob().mean() > wrong.mean() + 2
    side = torch.linspace(-6, 6, 301)
    grid = torch.cartesian_prod(side, side)
    for label in (0.0, 1.0):
        rows = {"x": grid, "given": torch.full((len(grid), 1), label)}
        assert posterior.log_prob(rows).exp().sum() * (side[1] - side[0]) ** 2 == pytest.approx(1.0, abs=0.01)
    drawn = posterior.predict({"given": torch.zeros(200, 1)}, draws=1)["x"][0]
    nearest = torch.cdist(drawn, moons.x).argmin(1)
    assert (moons.labels[nearest] == 0).double().mean() > 0.95


def test_glow_starts_with_channels_of_unit_scale_and_learns_digits():
    """ActNorm set inside a recorded step, or not at all; a flow of images that does not train."""
    story, data = Glow.example()
    x = data["x"][:400]
    story.initialise(x)
    level = story.flow.transforms[1].levels[0]
    seen = story.flow.transforms[0](x)[0]
    after, _ = level.transforms[1](level.transforms[0](seen)[0])
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-10)
    torch.testing.assert_close(after.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-10)
    story, _ = Glow.example()
    posterior = fit(story, x, SVI(steps=60, batch_size=128), seed=0, progress=False)
    assert posterior.diagnostics["mode"] == recorded_mode(posterior), posterior.diagnostics["reason"]
    gaussian = scipy.stats.norm.logpdf(x.numpy(), x.mean(0).numpy(), x.std(0).clamp_min(0.02).numpy()).sum((1, 2, 3))
    assert posterior.log_prob().mean() > gaussian.mean() + 10
    assert posterior.sample(3)["x"].shape == (3, 1, 8, 8)


@pytest.mark.parametrize("name", STORIES)
def test_round_trip_of_trained_flows_in_single_precision(name):
    """An inverse that cancels digits: 1e-4 in float32, from noise and from data."""
    x = load("two_moons", num_data=500).x
    method = SVI(steps=100, lr=0.04)
    posterior = fit(STORIES[name](2).float(), x, method, seed=0, progress=False)
    flow = posterior.problem.story.flow
    there, back = flow.forward, flow.inverse
    if posterior.problem.story.direction == "to_data":
        there, back = back, there
    x, z = x.float(), torch.randn(500, 2, dtype=torch.float32)
    assert (back(there(x)[0])[0] - x).abs().max() < 1e-4
    assert (there(back(z)[0])[0] - z).abs().max() < 1e-4


# Pictures


def test_figures_of_the_plane_and_of_layers(untouched):
    """A density drawn along the wrong axis, or off the data; a figure that touches pyplot or the random state."""
    x = load("two_moons", num_data=300).x * torch.tensor([1.0, 0.2])
    posterior = fit(MAF(2, 1, (4,)), x, SVI(steps=20, lr=0.1), seed=0, progress=False)
    figure = posterior.plot_plane(points=60)
    shown = figure.axes[0].images[0]
    low, high = x.amin(0), x.amax(0)
    assert shown.get_extent()[0] == pytest.approx(float(low[0] - 0.25 * (high - low)[0]))
    first = torch.linspace(*shown.get_extent()[:2], 60)
    second = torch.linspace(*shown.get_extent()[2:], 60)
    at = posterior.log_prob(torch.stack((first[40], second[7]))[None]).exp()
    assert shown.get_array()[7, 40] == pytest.approx(float(at), rel=1e-6)
    assert "mass on the grid" in figure.axes[0].get_title(loc="left")
    layers = draw_layers(posterior.problem.story)
    assert len(layers.axes) == 2 and np.isfinite(layers.axes[1].collections[0].get_offsets()).all()
    with pytest.raises(ValueError, match="two columns without context"):
        draw_layers(RealNVP(3))
    with pytest.raises(ValueError, match=r"needs rows \(N, 2\)"):
        fit(MAF(1, 1, (4,)), x[:, :1], SVI(steps=1), seed=0, progress=False).plot_plane()


# Bars


@pytest.mark.slow
def test_two_moons_within_three_hundredths_of_their_entropy():
    """scikit-learn's moons, noise 0.07, standardised: at most 1.51 nats a row after 600 steps (their entropy is 1.48)."""
    from sklearn.datasets import make_moons

    train, test = (
        torch.from_numpy(make_moons(n, noise=0.07, random_state=s)[0]) for n, s in ((10_000, 0), (10_000, 1))
    )
    mean, scale = train.mean(0), train.std(0)
    method = SVI(steps=600, batch_size=512)
    posterior = fit(NeuralSplineFlow(2).float(), (train - mean) / scale, method, seed=0, progress=False)
    assert -posterior.log_prob((test - mean) / scale).mean() <= 1.51
