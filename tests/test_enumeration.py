"""Sums over finite latents against sums written out by hand."""

import itertools
import math

import pytest
import torch

from inference.enumeration import LogFactor, elimination_size, sum_out
from inference.transforms import PositiveDefiniteTransform, log_jacobian, unconstrain_to


def chain(length=5, states=3):
    """Random chain z_0 - z_1 - ...: factors and the brute-force log sum."""
    first, steps = torch.randn(states).double(), torch.randn(length - 1, states, states).double()
    factors = [LogFactor("z_0", first, ("z_0",), frozenset())]
    factors += [LogFactor(f"z_{t + 1}", steps[t], (f"z_{t}", f"z_{t + 1}"), frozenset()) for t in range(length - 1)]
    paths = itertools.product(range(states), repeat=length)
    terms = [first[p[0]] + sum(steps[t, p[t], p[t + 1]] for t in range(length - 1)) for p in paths]
    return factors, torch.stack(terms).logsumexp(0)


def test_chain_equals_brute_force():
    """Catches a wrong elimination order or a factor used twice."""
    factors, exact = chain()
    value, dims = sum_out(factors, {f"z_{t}" for t in range(5)})
    assert dims == ()
    assert math.isclose(value.item(), exact.item(), abs_tol=1e-12)


def test_plates_multiply_and_kept_plates_stay():
    """A latent shared by a plate, and one of its own per member: sum outside, product inside."""
    shared, own = torch.randn(2).double(), torch.randn(2, 4, 3).double()
    factors = [
        LogFactor("s", shared, ("s",), frozenset()),
        LogFactor("z", own, ("s", "rows", "z"), frozenset({"rows"})),
    ]
    value, dims = sum_out(factors, {"s", "z"})
    assert dims == () and math.isclose(
        value.item(), (shared + own.logsumexp(-1).sum(1)).logsumexp(0).item(), abs_tol=1e-12
    )
    rows, dims = sum_out(factors[1:], {"z"}, keep=frozenset({"rows"}))
    assert set(dims) == {"s", "rows"} and torch.allclose(rows.sum(dims.index("rows")), own.logsumexp(-1).sum(1))


def test_conflicting_factors_do_not_underflow():
    """Two features that prefer different states by 2,000 nats each: exp of their sum must not vanish."""
    a, b = torch.tensor([0.0, -2000.0]).double(), torch.tensor([-2000.0, 0.0]).double()
    factors = [LogFactor("a", a, ("z",), frozenset()), LogFactor("b", b, ("z",), frozenset())]
    value, _ = sum_out(factors, {"z"})
    assert math.isclose(value.item(), -2000 + math.log(2), abs_tol=1e-9)


def test_impossible_states_have_zero_gradient():
    """All states impossible: the answer is -inf and the gradient 0, not NaN."""
    a = torch.full((3,), -math.inf).double().requires_grad_()
    value, _ = sum_out([LogFactor("a", a, ("z",), frozenset())], {"z"})
    (grad,) = torch.autograd.grad(value, a)
    assert value.item() == -math.inf and torch.equal(grad, torch.zeros(3).double())


def test_crossed_plates_are_refused():
    factors = [
        LogFactor("u", torch.zeros(3, 2), ("rows", "u"), frozenset({"rows"})),
        LogFactor("v", torch.zeros(4, 2), ("columns", "v"), frozenset({"columns"})),
        LogFactor("x", torch.zeros(3, 4, 2, 2), ("rows", "columns", "u", "v"), frozenset({"rows", "columns"})),
    ]
    with pytest.raises(ValueError, match="neither"):
        sum_out(factors, {"u", "v"})


def test_size_of_a_chain_is_linear_and_of_a_clique_exponential():
    sizes = {f"z_{i}": 2 for i in range(40)}
    steps = [(f"z_{i}", f"z_{i + 1}") for i in range(39)]
    assert elimination_size(steps, set(sizes), sizes) == 4
    assert elimination_size([tuple(sizes)], set(sizes), sizes) == 2.0**40


@pytest.mark.parametrize("size", [1, 2, 4])
def test_positive_definite_jacobian(size):
    """Against the autograd Jacobian of the free entries; catches a wrong power of the diagonal."""
    transform = PositiveDefiniteTransform()
    u = torch.randn(size * (size + 1) // 2, dtype=torch.float64)
    matrix = transform(u)
    rows, cols = torch.tril_indices(size, size)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[rows, cols], u)
    assert torch.allclose(transform.inv(matrix), u, atol=1e-10)
    assert math.isclose(
        transform.log_abs_det_jacobian(u, matrix).item(), torch.linalg.slogdet(jacobian)[1].item(), abs_tol=1e-9
    )


def test_unknown_support_says_what_to_do():
    class Odd(torch.distributions.constraints.Constraint):
        pass

    with pytest.raises(ValueError, match="biject_to"):
        unconstrain_to(Odd())
    real = unconstrain_to(torch.distributions.constraints.real)
    assert log_jacobian(real, torch.ones(3), torch.ones(3)).item() == 0.0
