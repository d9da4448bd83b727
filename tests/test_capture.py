"""Captured graphs: their gradients against finite differences, and what must not be captured."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import (
    SCHOOLS,
    eight_schools,
    gaussian_mixture,
    hidden_markov,
    mixed_columns,
    mixed_columns_data,
    normal_mixture,
    ppca,
)

from inference.capture import capture, constrain_many, value_and_grad, with_gradient
from inference.joint import LogJoint
from inference.problem import prepare
from inference.recorder import CaptureError, pure_graph
from inference.session import isolated

X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def lower_triangle(x):
    """Writes latents into a buffer, cell by cell."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    L = torch.eye(3)
    L[1, 0] = a
    L[2, 2] = s
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=L), obs=x)


def moving_interval(x):
    """The support of one latent ends at another."""
    top = pyro.sample("top", dist.Gamma(3.0, 1.0))
    u = pyro.sample("u", dist.Uniform(0.0, top))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)


def correlation(x):
    """Not positive definite where |r| > 1, which the prior does not forbid."""
    r = pyro.sample("r", dist.Normal(0.0, 0.1))
    C = torch.eye(3) + r * torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), C), obs=x)


def joint_of(story, data):
    problem = prepare(story, data, seed=0)
    with isolated(0, problem.dtype):
        return LogJoint(problem)


STORIES = {
    "mixture": (normal_mixture, X[:, 0]),
    "Wishart mixture": (gaussian_mixture, X),
    "HMM": (hidden_markov, X),
    "hierarchical": (eight_schools, SCHOOLS),
    "counts and classes": (mixed_columns, mixed_columns_data(20)),
    "continuous locals": (ppca, X),
    "written into a buffer": (lower_triangle, X),
    "moving support": (moving_interval, X[:, 0]),
}


@pytest.mark.parametrize("name", STORIES)
def test_graph_gradients_are_central_differences(name, untouched):
    """The gradient of one and of five vectors at once, against (f(q + h) - f(q - h)) / 2h of the story itself."""
    joint = joint_of(*STORIES[name])
    with isolated(0, torch.float64):
        potential = value_and_grad(joint)
        assert (potential.mode, potential.reason) == ("graph", "")
        points = torch.rand(5, joint.dim) - 0.5
        values, gradients = potential(points)
        assert potential.notice == ""  # five at once, not one after another
        direction = torch.nn.functional.normalize(torch.randn(5, joint.dim), dim=1)
        step = 1e-5
        with torch.no_grad(), pyro.validation_enabled(False):
            up, here, down = (
                torch.stack([joint.unconstrained(p) for p in points + shift * direction])
                for shift in (step, 0.0, -step)
            )
        torch.testing.assert_close(values, here, rtol=1e-10, atol=1e-10)
        slope = (gradients * direction).sum(1)
        error = (slope - (up - down) / (2 * step)).abs()
        assert (error <= 1e-6 * (1 + gradients.norm(dim=1))).all()
        value, gradient = potential(points[3])
        torch.testing.assert_close((value, gradient), (values[3], gradients[3]), rtol=1e-10, atol=1e-10)


def test_every_entry_of_a_gradient():
    """Directional checks could miss an entry that is left at 0: here every entry by itself."""
    joint = joint_of(gaussian_mixture, X)
    with isolated(0, torch.float64), pyro.validation_enabled(False):
        potential, point, step = value_and_grad(joint), torch.rand(joint.dim) - 0.5, 1e-5
        moved = torch.eye(joint.dim) * step
        wanted = [(joint.unconstrained(point + m) - joint.unconstrained(point - m)) / (2 * step) for m in moved]
        torch.testing.assert_close(potential(point)[1], torch.stack(wanted), rtol=1e-6, atol=1e-5)


def branching(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    m = 2 * m if m > 0 else m
    pyro.sample("x", dist.Normal(m, 1.0).expand(x.shape).to_event(1), obs=x)


def noisy(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0)) + torch.randn(())
    pyro.sample("x", dist.Normal(m, 1.0).expand(x.shape).to_event(1), obs=x)


def through_numpy(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    shift = torch.from_numpy(np.tanh(m.detach().numpy())[None])[0]
    pyro.sample("x", dist.Normal(m + shift, 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("story", "reason"),
    [(branching, "looks at the value of a latent"), (noisy, "draws random numbers"), (through_numpy, "disagrees")],
)
def test_programs_that_are_no_fixed_graph_run_as_they_are(story, reason, untouched):
    """A wrong graph would be silent: it must be refused with the reason, and the answer be the story's own."""
    joint = joint_of(story, X[:, 0])
    with isolated(0, torch.float64):
        potential = value_and_grad(joint)
        assert potential.mode == "eager" and reason in potential.reason
        assert potential.random == (story is noisy)
        points = torch.tensor([[0.7], [-0.7]])
        with isolated(5, torch.float64):
            values, gradients = potential(points)
        with isolated(5, torch.float64):
            for point, value, gradient in zip(points, values, gradients, strict=True):
                q = point.clone().requires_grad_()
                wanted = joint.unconstrained(q)
                torch.testing.assert_close(value, wanted.detach())
                torch.testing.assert_close(gradient, torch.autograd.grad(wanted, q)[0])


def test_a_branch_on_the_data_is_captured():
    """Only latents change from call to call: `if x.mean() > 0` has one outcome."""

    def story(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0 if x.mean() > 0 else 2.0))
        pyro.sample("x", dist.Normal(m, 1.0).expand(x.shape).to_event(1), obs=x)

    assert value_and_grad(joint_of(story, X[:, 0])).mode == "graph"


def test_a_failed_factorisation_is_nan_in_its_own_row():
    """One chain off the positive-definite matrices neither raises nor touches the others."""
    joint = joint_of(correlation, X)
    with isolated(0, torch.float64):
        potential = value_and_grad(joint)
        values, _ = potential(torch.tensor([[0.3], [3.0], [-0.2]]))
        assert potential.mode == "graph" and values.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(values[0], joint.unconstrained(torch.tensor([0.3])))
        assert potential(torch.tensor([3.0]))[0].isnan()


@pytest.mark.parametrize("name", ["Wishart mixture", "moving support", "continuous locals"])
def test_values_of_many_vectors_are_those_of_each(name):
    joint = joint_of(*STORIES[name])
    with isolated(0, torch.float64):
        flat = torch.randn(20, joint.dim)
        for site, value in constrain_many(joint, flat).items():
            torch.testing.assert_close(value, joint.constrain(flat)[site])


def test_random_numbers_are_drawn_at_every_call_where_they_are_allowed():
    def program(x):
        return x + torch.randn(3, dtype=x.dtype)

    x = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(CaptureError, match="random"):
        pure_graph(program, (x,))
    graph = capture(program, (x,), random=True)
    assert graph.mode == "graph" and not torch.equal(graph(x), graph(x))
    torch.manual_seed(3)
    wanted = program(x)
    torch.manual_seed(3)
    assert torch.equal(graph(x), wanted)


def test_writes_into_shared_memory_are_seen_by_every_view():
    """A view taken before the write, a constant changed after its use, and an in-place update of an intermediate."""

    def program(x):
        buffer = torch.zeros(4, dtype=x.dtype)
        head = buffer[:2]
        before = x.sum() * buffer.sum()
        head += x
        buffer.mul_(2.0)
        y = x.exp()
        y.add_(1.0)
        return before, buffer, head, y

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    graph = capture(program, (x,))
    for point in (x, -x):
        for found, wanted in zip(graph(point), program(point), strict=True):
            assert torch.equal(found, wanted)
    assert graph.mode == "graph", graph.reason


def test_masks_of_constants_are_counted_once():
    """Reading and writing under masks of one, two and inner dimensions: no call counts them again; values and slopes."""
    rows, cells = torch.tensor([True, False, True, True]), torch.arange(12).reshape(4, 3) % 5 < 2

    def fn(x):
        table, part = torch.outer(x, torch.arange(3.0) + 1), x.clone()
        part[rows] = torch.stack([x.sum(), x.prod(), x[0]])
        inner = table[:, torch.tensor([True, False, True])]
        return table[rows].sum() ** 2 + (table[cells] ** 3).sum() + (part**2).sum() + inner.prod()

    x = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    density = pure_graph(fn, (x,), differentiable=True)
    graph = pure_graph(with_gradient(density), (x,))
    assert not any(c.dtype == torch.bool for c in (*density.constants, *graph.constants))
    for point in (x, 3 * x):
        wanted, slope = with_gradient(fn)(point)
        found, gradient = graph(point)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.vmap(density)(torch.stack([x, point]))[1], wanted, rtol=1e-12, atol=0)


def test_capture_takes_gradients_inside():
    """A function that differentiates itself becomes a graph of its gradient."""

    def program(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((x[x.new_tensor([0, 1, 1]).long()] ** 3).sum(), x)[0]

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    graph = capture(program, (x,))
    assert graph.mode == "graph", graph.reason
    assert torch.allclose(graph(2 * x), torch.tensor([12.0, 96.0], dtype=torch.float64))


def test_a_factor_does_not_look_at_latents():
    """`pyro.factor` observes a tensor of no numbers, made from the latents' density: that is no look at a value."""

    def story(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("x", -0.5 * (x - m) ** 2)

    joint = joint_of(story, X[:, 0])
    with isolated(0, torch.float64):
        potential = value_and_grad(joint)
        value, gradient = potential(torch.tensor([0.5]))
    assert potential.mode == "graph"
    x = X[:, 0]
    expected = -0.125 - 0.5 * np.log(2 * np.pi) - 0.5 * ((x - 0.5) ** 2).sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, (x - 0.5).sum().reshape(1) - 0.5)
