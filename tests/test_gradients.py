"""What samplers are given, for every story of the zoo: gradients against central differences of the story's own density."""

import importlib.util

import numpy as np
import pyro
import pytest
import torch
from test_capture import joint_of

from inference.capture import value_and_grad
from inference.compiled import NotCompiled, build
from inference.marginal import density_of_globals
from inference.methods import NUTS
from inference.session import isolated
from zoo.catalog import catalog

JAX = importlib.util.find_spec("jax") is not None
STORIES = [entry.name for entry in catalog()]


def differences(density, point, direction, step=1e-4):
    """Slope of `density` along `direction` by central differences of fourth order."""
    f = [float(density(point + k * step * direction)) for k in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)


@pytest.mark.parametrize("name", STORIES)
def test_gradients_are_those_of_the_story(name, untouched):
    """Relative 1e-6 at five points, by graph and by machine code: catches a dropped Jacobian, plate or latent."""
    story, data = next(e for e in catalog() if e.name == name).example()
    problem = joint_of(story, data).problem
    if not NUTS().check(problem.structure).applies:
        pytest.skip("no method takes gradients of this story")
    generator = torch.Generator().manual_seed(3)
    with isolated(0, torch.float64), torch.no_grad(), pyro.validation_enabled(False):
        joint = density_of_globals(problem)
        potential = value_and_grad(joint)
        assert potential.mode == "graph", potential.reason
        try:
            code = build(potential)
        except NotCompiled as error:
            assert "compiler" in str(error)
            code = None
        near = joint.flatten(joint.prior_draw()).clamp(-3.0, 3.0)  # far out sticks are broken at the last digit
        for _ in range(5):
            point = near + 0.3 * torch.randn(joint.dim, generator=generator, dtype=torch.float64)
            direction = torch.randn(joint.dim, generator=generator, dtype=torch.float64)
            direction /= direction.norm()
            value, gradient = potential(point)
            slope = float(gradient @ direction)
            expected = differences(joint.unconstrained, point, direction)
            scale = max(abs(expected), 1e-3 * float(gradient.norm()), 1.0)
            assert abs(slope - expected) <= 1e-6 * scale
            if JAX:
                from inference.jax_graph import sixty_four_bits, value_and_grad_in_jax

                with sixty_four_bits():
                    found, other = value_and_grad_in_jax(potential)(point.numpy())
                np.testing.assert_allclose(other, gradient.numpy(), rtol=1e-7, atol=1e-8 * float(gradient.norm()))
            if code is not None:
                found, machine = code(point.numpy())
                np.testing.assert_allclose(found, float(value), rtol=1e-10)
                np.testing.assert_allclose(machine, gradient.numpy(), rtol=1e-8, atol=1e-9 * float(gradient.norm()))
