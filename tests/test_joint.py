"""The log joint against Pyro's own, against sums by hand, and its flat form against the change of variables."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
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

from inference.joint import LogJoint
from inference.problem import prepare
from inference.session import isolated

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CASES = {
    "mixture": (gaussian_mixture, X),
    "one dimension": (normal_mixture, X[:, 0]),
    "chain": (hidden_markov, X),
    "columns": (mixed_columns, mixed_columns_data(12)),
    "schools": (eight_schools, SCHOOLS),
    "PPCA": (ppca, X),
}


@pytest.fixture(params=CASES)
def joint(request):
    story, data = CASES[request.param]
    with isolated(0, torch.float64):
        yield LogJoint(prepare(story, data, seed=0))


def test_flat_vectors_come_back(joint):
    for _ in range(3):
        values = joint.prior_draw()
        back = joint.constrain(joint.flatten(values))
        assert all(torch.allclose(values[n], back[n], rtol=1e-6, atol=1e-9) for n in values)


def test_jacobian_is_the_difference_of_the_two_densities(joint):
    """log density in free space = log density in constrained space + log |det|, by autograd."""
    values = joint.prior_draw()
    flat = joint.flatten(values)
    found = joint.unconstrained(flat) - joint.density(joint.constrain(flat))

    def free_entries(q):
        handler_values = []
        from inference.joint import Unconstrained

        handler = Unconstrained(joint.blocks, q)
        handler(joint.problem.model)(**joint.problem.kwargs)
        for block in joint.blocks:
            value = handler.values[block.name]
            if value.shape[-2:] and value.dim() > 1 and block.name == "precision":
                rows, cols = torch.tril_indices(*value.shape[-2:])
                value = value[..., rows, cols]
            elif block.name in ("pi", "phi", "A"):
                value = value[..., :-1]
            handler_values.append(value.reshape(-1))
        return torch.cat(handler_values)

    jacobian = torch.autograd.functional.jacobian(free_entries, flat)
    assert math.isclose(found.item(), torch.linalg.slogdet(jacobian)[1].item(), rel_tol=1e-7, abs_tol=1e-7)


@pytest.mark.parametrize("name", ["one dimension", "chain", "columns", "schools", "PPCA"])
def test_equals_pyros_own_potential(name):
    """Pyro's potential energy (TraceEinsum over enumerated sites) at the same free point."""
    story, data = CASES[name]
    with isolated(0, torch.float64):
        problem = prepare(story, data, seed=0)
        joint = LogJoint(problem)
        nesting = problem.structure.max_plate_nesting
        _, potential, transforms, _ = initialize_model(problem.model, (), problem.kwargs, max_plate_nesting=nesting)
        values = joint.prior_draw()
        free = {n: transforms[n](v) for n, v in values.items()}
        assert math.isclose(-potential(free).item(), joint.unconstrained(joint.flatten(values)).item(), rel_tol=1e-9)


def test_rows_add_up_to_the_likelihood(joint):
    """Sum over rows + log prior of the globals = log joint; catches a global factor inside the plate."""
    values = joint.prior_draw()
    plate = joint.structure.data_plate
    prior = sum(f.value.sum() for f in joint.factors(values) if plate not in f.plates)
    assert math.isclose((joint.rows(values).sum() + prior).item(), joint.density(values).item(), rel_tol=1e-10)


def test_scaled_batches_average_to_the_whole(joint):
    """A batch of B rows weighed by N / B speaks for all N: the mean over a partition is the full density."""
    values = joint.prior_draw()
    if any(b.local for b in joint.blocks):
        pytest.skip("continuous locals have rows of their own")
    kwargs, rows = joint.problem.kwargs, joint.structure.row_arguments
    n = joint.structure.num_rows
    size = n // 3
    parts = [{k: v[i : i + size] if k in rows else v for k, v in kwargs.items()} for i in range(0, size * 3, size)]
    mean = sum(joint.density(values, p, scale=n / size) for p in parts) / 3
    assert math.isclose(mean.item(), joint.density(values).item(), rel_tol=1e-9)


def test_local_probabilities_equal_bayes_rule():
    with isolated(0, torch.float64):
        joint = LogJoint(prepare(normal_mixture, X[:, 0], seed=0))
        v = joint.prior_draw()
        found = joint.local_probabilities("z", v)
        terms = v["pi"].log() + torch.distributions.Normal(v["mu"], v["sigma"]).log_prob(X[:, :1])
    torch.testing.assert_close(found, terms.softmax(-1), atol=1e-12, rtol=0)


def test_a_finite_latent_shared_by_all_rows():
    """One coin for all rows: its posterior multiplies over rows, and new rows use it."""

    def story(x):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(0.9 - 0.4 * fair), obs=x)

    x = torch.tensor([1.0, 1, 0, 1])
    with isolated(0, torch.float64):
        joint = LogJoint(prepare(story, x, seed=0))
        likelihood = torch.tensor([0.9**3 * 0.1, 0.5**4], dtype=torch.float64)
        posterior = likelihood / likelihood.sum()
        torch.testing.assert_close(joint.local_probabilities("fair", {}), posterior, atol=1e-12, rtol=0)
        row = joint.rows({}, {"x": torch.tensor([1.0, 0.0], dtype=torch.float64)})
    expected = torch.stack([posterior @ torch.tensor(p, dtype=torch.float64) for p in ([0.9, 0.5], [0.1, 0.5])])
    torch.testing.assert_close(row.exp(), expected, atol=1e-12, rtol=0)


def test_nothing_is_left_behind(untouched):
    prepare(gaussian_mixture, X, seed=1)
    with pytest.raises(RuntimeError, match="mine"), isolated(0, torch.float64), poutine.block():
        pyro.param("left", torch.zeros(1))
        raise RuntimeError("mine")
