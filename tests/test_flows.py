"""Normalizing flows: Jacobians, inverses, integrals, and densities that are never stale."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.distributions.transforms.spline import _monotonic_rational_spline

from inference import inspect
from zoo import IAF, MAF, NICE, Glow, NeuralSplineFlow, PlanarFlow, RealNVP
from zoo.flows.autoregressive import Autoregressive
from zoo.flows.base import Chain, FlowDistribution, Inverse, Permute, Standardise
from zoo.flows.coupling import Coupling, ShiftScale, Stretch
from zoo.flows.glow import ActNorm, ImageCoupling, MultiScale, Squeeze, Turn
from zoo.flows.networks import MADE
from zoo.flows.planar import Planar, root
from zoo.flows.spline import LEAST, RationalQuadratic

STORIES = {
    "NICE": lambda D, **more: NICE(D, 4, (16,), **more),
    "RealNVP": lambda D, **more: RealNVP(D, 4, (16,), **more),
    "MAF": lambda D, **more: MAF(D, 3, (16,), **more),
    "IAF": lambda D, **more: IAF(D, 3, (16,), **more),
    "spline": lambda D, **more: NeuralSplineFlow(D, 4, (16,), **more),
    "spline in turns": lambda D, **more: NeuralSplineFlow(D, 2, (16,), coupling=False, **more),
    "planar": lambda D, **more: PlanarFlow(D, 4, **more),
}
IMAGES = {
    "ActNorm": lambda: ActNorm(4),
    "Turn": lambda: Turn(4, layer=3),
    "ImageCoupling": lambda: ImageCoupling(4, 8, num_context=2),
    "Squeeze": Squeeze,
    "MultiScale": lambda: MultiScale((4, 4, 4), 2, 1, 8, num_context=2),
}
VECTORS = {
    "Standardise": lambda: Standardise(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.1, 30.0])),
    "Permute": lambda: Permute([2, 0, 1]),
    "Stretch": lambda: Stretch(3),
    "Coupling": lambda: Coupling(3, ShiftScale(), (8,), num_context=2, second=False),
    "Autoregressive": lambda: Autoregressive([1, 0, 2], RationalQuadratic(), (8, 8), num_context=2),
    "Planar": lambda: Planar(3, num_context=2),
    "Chain": lambda: Chain([Planar(3), Inverse(Planar(3)), Permute([1, 2, 0]), Stretch(3)]),
    "Chain of nothing": lambda: Chain([]),
}


@pytest.fixture(autouse=True)
def doubles():
    """Float64 within a test."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def shaken(module, scale=0.2):
    """The module with weights at which no layer is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module


def check_bijection(transform, x, context=None):
    """Both directions: the inverse undoes the map, and log-determinants are those of autograd's Jacobian."""
    size = x[0].numel()
    for way, back in ((transform.forward, transform.inverse), (transform.inverse, transform.forward)):
        y, log_det = way(x, context)
        again, other = back(y, context)
        assert log_det.shape == (len(x),)
        torch.testing.assert_close(again, x, rtol=0, atol=1e-8)
        torch.testing.assert_close(other, -log_det, rtol=0, atol=1e-8)
        for n in range(len(x)):
            given = None if context is None else context[n : n + 1]
            jacobian = torch.autograd.functional.jacobian(lambda v, c=given, f=way: f(v[None], c)[0][0], x[n])
            expected = torch.linalg.slogdet(jacobian.reshape(size, size))[1]
            torch.testing.assert_close(log_det[n], expected, rtol=0, atol=1e-8)


# Jacobians and inverses


@pytest.mark.parametrize("D", [2, 5])
@pytest.mark.parametrize("name", STORIES)
def test_log_determinants_are_those_of_autograds_jacobian(name, D):
    """A slope left out, a mask the wrong way round, an inverse of other columns."""
    check_bijection(shaken(STORIES[name](D, loc=0.3, scale=2.0)).flow, 2 * torch.randn(4, D))


@pytest.mark.parametrize("name", STORIES)
def test_log_determinants_with_context(name):
    """Context that only one direction sees."""
    flow = shaken(STORIES[name](3, num_context=2)).flow
    x, context = torch.randn(3, 3), torch.randn(3, 2)
    check_bijection(flow, x, context)
    assert (flow(x, context)[0] - flow(x, context + 1)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", VECTORS)
def test_each_transform_is_a_bijection(name):
    transform = shaken(VECTORS[name]())
    check_bijection(transform, torch.randn(3, 3), torch.randn(3, 2) if has_context(transform) else None)


@pytest.mark.parametrize("name", IMAGES)
def test_each_image_transform_is_a_bijection(name):
    """Pixels counted once too often or too rarely, channels of the squeeze in another order on the way back."""
    transform = shaken(IMAGES[name]())
    check_bijection(transform, torch.randn(2, 4, 4, 4), torch.randn(2, 2) if has_context(transform) else None)


def has_context(transform):
    return any(getattr(m, "network", None) is not None for m in transform.modules())


def test_any_leading_dimensions():
    """Rows that know their place in a batch: (S, N, D) and (S, N, C, H, W) are scored as their rows are."""
    for story, shape in ((shaken(RealNVP(3)), (3,)), (shaken(Glow((2, 4, 4), 1, 1, 8), 0.1), (2, 4, 4))):
        fn, x = story.distribution(), torch.randn(2, 3, *shape)
        torch.testing.assert_close(fn.log_prob(x), torch.stack([fn.log_prob(part) for part in x]))
        assert fn.rsample((2, 3)).shape == x.shape and fn.expand((4,)).sample((2,)).shape == (2, 4, *shape)


# Networks and functions


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [0]])
def test_made_parameters_depend_on_earlier_columns_and_on_all_of_them(order):
    """Masks off by one (a column that sees itself: no density), or so tight that a column never speaks."""
    D = len(order)
    network = shaken(MADE(order, 2, (16, 16), num_context=1), 1.0)
    slopes = torch.autograd.functional.jacobian(lambda x: network(x, torch.ones(1)), torch.randn(D))  # (D, 2, D)
    place = torch.tensor(order)
    earlier = place[None, :] < place[:, None]
    assert (slopes.abs().amax(1)[~earlier] == 0).all()
    many = torch.randn(50, D)
    reach = torch.stack([torch.autograd.functional.jacobian(lambda x: network(x, torch.ones(1)), row) for row in many])
    assert (reach.abs().amax((0, 2))[earlier] > 0).all()
    about = torch.autograd.functional.jacobian(lambda c: network(torch.ones(D), c), torch.ones(1))
    assert (about.abs().amax((1, 2)) > 0).all() or D == 1


def test_splines_are_pyros():
    """Durkan's formulas against another implementation of them: knots, slopes at the ends, both directions."""
    K, bound, N = 6, 3.0, 200
    spline, raw = RationalQuadratic(K, bound), torch.randn(N, 3 * K - 1)
    x = 2.0 * torch.randn(N)
    w, h, d = raw.split((K, K, K - 1), -1)
    slopes = LEAST + torch.nn.functional.softplus(d + spline.offset)
    least = {"min_bin_width": LEAST / K, "min_bin_height": LEAST / K, "min_derivative": 0.0}
    for way, inverse in ((spline.forward, False), (spline.inverse, True)):
        theirs = _monotonic_rational_spline(
            x, w.softmax(-1), h.softmax(-1), slopes, inverse=inverse, bound=bound, eps=0.0, **least
        )
        inside = x.abs() < bound
        for ours, other in zip(way(x, raw), theirs):
            torch.testing.assert_close(ours[inside], other[inside], rtol=1e-9, atol=1e-9)


def test_splines_of_zeros_are_the_identity_and_have_linear_tails():
    """Tails whose gradient is lost or NaN; a start that is not the identity."""
    spline = RationalQuadratic(8, 2.0)
    x = torch.tensor([-100.0, -2.0, -1.3, 0.0, 0.4, 2.0, 7.0], requires_grad=True)
    y, slope = spline.forward(x, torch.zeros(7, 23))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(slope, torch.zeros(7))
    y, slope = spline.forward(x, torch.randn(7, 23))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, slope.exp())


def test_planar_root_is_scipys_and_u_stays_where_the_layer_is_invertible():
    """u . w > -1 for any weights; the root where the slope nearly vanishes."""
    from scipy.optimize import brentq

    layer = Planar(3)
    with torch.no_grad():
        for scale in (1.0, 10.0, 100.0):
            layer.free_u.copy_(-scale * layer.w)
            assert layer.read(None)[1] > -1
    for product in (-0.999, -0.5, 0.0, 3.0, 50.0):
        target = torch.linspace(-4, 4, 9)
        found = root(target, torch.tensor(product), torch.tensor(0.7))
        for t, a in zip(target.tolist(), found.tolist()):
            expected = brentq(lambda v, t=t, p=product: v + p * math.tanh(v + 0.7) - t, t - 60, t + 60, xtol=1e-14)
            assert a == pytest.approx(expected, abs=1e-7 if product < -0.9 else 1e-10)


def test_planar_scores_what_it_draws_and_its_gradient_is_that_of_the_density():
    """Density of x = f(z) is that of z over |det|; the implicit function's gradient against central differences."""
    story = shaken(PlanarFlow(2, 3), 0.5)
    z = torch.randn(50, 2)
    x, log_det = story.flow(z)
    fn = story.distribution()
    torch.testing.assert_close(fn.log_prob(x), story.noise().log_prob(z) - log_det, rtol=0, atol=1e-9)
    x = x.detach()
    story.zero_grad()
    fn.log_prob(x).sum().backward()
    for p in story.parameters():
        step = 1e-5 * torch.ones_like(p)
        with torch.no_grad():
            p.add_(step)
            high = fn.log_prob(x).sum()
            p.sub_(2 * step)
            low = fn.log_prob(x).sum()
            p.add_(step)
        torch.testing.assert_close(p.grad.sum(), (high - low) / 2e-5, rtol=1e-5, atol=1e-5)


# Distributions


@pytest.mark.parametrize("name", STORIES)
def test_density_is_fresh_after_every_optimiser_step(name):
    """A cache keyed by the tensor: the density of the same object with old weights."""
    story = shaken(STORIES[name](2))
    x = torch.randn(50, 2)
    optimiser = torch.optim.Adam(story.parameters(), lr=0.05)
    fn, before = story.distribution(), None
    for _ in range(5):
        optimiser.zero_grad()
        value = fn.log_prob(x)
        torch.testing.assert_close(value, fn.log_prob(x.clone()), rtol=0, atol=0)
        torch.testing.assert_close(value, story.distribution().log_prob(x), rtol=0, atol=0)
        assert before is None or (value - before).abs().max() > 1e-4
        before = value.detach()
        (-value.mean()).backward()
        optimiser.step()


def test_untrained_flows_are_their_noise():
    """Heavy tails in the density but not in the draws; loc and scale without their Jacobian."""
    story = RealNVP(2, base="student_t", df=3.0, loc=[1.0, -1.0], scale=[2.0, 0.5])
    x = torch.randn(20, 2)
    expected = scipy.stats.t(3.0, loc=[1.0, -1.0], scale=[2.0, 0.5]).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(story.distribution().log_prob(x).detach().numpy(), expected, rtol=1e-12)
    draws = ((story.distribution().sample((4000,)) - torch.tensor([1.0, -1.0])) / torch.tensor([2.0, 0.5])).numpy()
    assert scipy.stats.kstest(draws.flatten(), scipy.stats.t(3.0).cdf).pvalue > 0.01


@pytest.mark.parametrize("forward", ["to_noise", "to_data"])
def test_direction_says_what_forward_does(forward):
    """The inverse taken for the map: x = 2 z + 1 with normal z has the density Normal(1, 2)."""
    double = Standardise(torch.tensor([1.0]), torch.tensor([2.0]))
    transform = double if forward == "to_noise" else Inverse(double)
    fn = FlowDistribution(dist.Normal(torch.zeros(1), 1.0).to_event(1), transform, forward=forward)
    x = torch.randn(5, 1)
    torch.testing.assert_close(fn.log_prob(x), dist.Normal(1.0, 2.0).log_prob(x[:, 0]))
    assert abs(fn.sample((20_000,)).mean() - 1) < 0.06


# Words for mistakes


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RealNVP(1), "num_features must be 2 or more"),
        (lambda: NICE(2, num_layers=0), "num_layers must be a whole number from 1"),
        (lambda: MAF(2, hidden=()), "hidden must be the widths"),
        (lambda: MAF(2, base="cauchy"), "'normal', 'student_t'"),
        (lambda: IAF(2, loc=[0.0, 1.0, 2.0]), "loc has 3 numbers"),
        (lambda: PlanarFlow(2, num_context=-1), "num_context must be a whole number from 0"),
        (lambda: NeuralSplineFlow(2, num_bins=1), "num_bins must be 2 or more"),
        (lambda: Glow((1, 6, 6), num_levels=2), "cannot be halved 2 times"),
        (lambda: Glow((8, 8)), r"\(C, H, W\)"),
        (lambda: Permute([0, 0]), "each of 0 to 1 once"),
        (lambda: RealNVP(2).model(torch.zeros(4, 3)), r"rows of shape \(N, 2\)"),
        (lambda: RealNVP(2).model(torch.zeros(4, 2), torch.zeros(4, 1)), "takes no context"),
        (lambda: RealNVP(2, num_context=1).model(torch.zeros(4, 2)), "given is missing"),
        (lambda: FlowDistribution(dist.Normal(0.0, 1.0), Permute([0]), forward="to_noise"), "to_event"),
        (lambda: FlowDistribution(RealNVP(2).noise(), Permute([0, 1]), forward="up"), "'to_noise', 'to_data'"),
    ],
)
def test_mistakes_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_structure_and_random_state(untouched):
    """A story that draws from the caller's generator, or whose networks are not seen."""
    story, data = PlanarFlow.example()
    structure = inspect(story, data)
    assert structure.guideless and structure.has_modules and structure.num_rows == 1000
