"""Pictures of rows that are images: places of pixels, colours of holes, refusals, nothing left behind."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from inference import SVI, fit
from inference.image_plots import (
    UNSEEN,
    expected,
    grid,
    plot_codes,
    plot_reconstructions,
    plot_samples,
    plot_traversals,
)
from zoo import VAE, DeepLatentGaussian, load


@pytest.fixture(scope="module")
def fitted():
    x = load("binary_digits").x
    return fit(VAE(64, 3, hidden=(24,), missing=True), x[:300], SVI(steps=120, starts=1, particles=1), seed=0)


def canvas_of(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def test_grid_puts_every_pixel_where_it_belongs():
    """Rows and columns swapped, channels taken for images, a hole drawn as white."""
    images = torch.arange(12.0).reshape(2, 6)
    images[1, 5] = torch.nan
    canvas = grid(images, (2, 3), columns=2)
    assert canvas.shape == (2, 7, 3)
    assert canvas[0, 0, 0] == 1.0 and canvas[1, 2, 0] == pytest.approx(1 - 5 / 10)  # 0 is white, the largest black
    assert canvas[0, 4, 0] == pytest.approx(1 - 6 / 10) and tuple(canvas[1, 6]) == to_rgb(UNSEEN)
    colours = grid(torch.tensor([[0.0, 1.0, 0.25, 0.5, 1.0, 0.0]]), (3, 1, 2), columns=1)
    assert colours[0, 0].tolist() == [0.0, 0.25, 1.0] and colours[0, 1].tolist() == [1.0, 0.5, 0.0]


def test_expected_images_are_the_decoders(fitted):
    """Codes in another order than their images; an image that is drawn where its mean is asked for."""
    z = torch.randn(5, 3)
    with torch.no_grad():
        own = torch.sigmoid(fitted.problem.story.decoder(z))
    torch.testing.assert_close(expected(fitted, {"z": z}), own)


def test_pictures_have_the_size_they_say(fitted):
    """A walk whose middle is another row's image; reconstructions beside other rows; a random state that pictures move."""
    x = load("binary_digits").x[300:320].clone()
    x[2, :8] = torch.nan
    state = torch.get_rng_state()
    assert canvas_of(plot_samples(fitted, (8, 8), 9)).shape == (3 * 9 - 1, 3 * 9 - 1, 3)
    drawn = canvas_of(plot_samples(fitted, (8, 8), 4, mean=False))
    assert set(np.unique(drawn).round(2)) == {0.0, 0.86, 1.0}
    strip = canvas_of(plot_reconstructions(fitted, x, (8, 8), num=5))
    assert strip.shape == (17, 44, 3) and (strip[0, 18:26] == np.asarray(to_rgb(UNSEEN))).all()
    walk = canvas_of(plot_traversals(fitted, x, (8, 8), units=[1], steps=5, row=3))
    assert walk.shape == (8, 44, 3)
    loc = fitted.local("z", x, draws=50).mean(0)
    spread = torch.linspace(-2.5, 2.5, 5)
    z = loc[3].repeat(5, 1)
    z[:, 1] = spread
    images = expected(fitted, {"z": z})
    np.testing.assert_allclose(walk, grid(images, (8, 8), 5))
    figure = plot_codes(fitted, x, labels=[0] * 10 + [1] * 10)
    assert [len(c.get_offsets()) for c in figure.axes[0].collections] == [10, 10]
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_refuse_with_what_would_do(fitted):
    """A reshape error from torch; a silent choice among several codes."""
    x = load("binary_digits").x[300:310]
    with pytest.raises(ValueError, match="hold 64 cells"):
        plot_samples(fitted, (7, 8))
    with pytest.raises(ValueError, match=r"\[7\] are not among the 3 units"):
        plot_traversals(fitted, x, (8, 8), units=[7])
    with pytest.raises(ValueError, match="2 entries and there are 10 rows"):
        plot_codes(fitted, x, labels=[0, 1])
    deep = fit(DeepLatentGaussian(64, (3, 2), hidden=8), x, SVI(steps=10, starts=1, particles=1), seed=0)
    with pytest.raises(ValueError, match=r"\['z2', 'z1'\]"):
        plot_codes(deep, x)
    assert canvas_of(plot_traversals(deep, x, (8, 8), site="z2", steps=3)).shape == (17, 26, 3)
