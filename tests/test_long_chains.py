"""Chains of finite latents that Python loops write out: folded, recorded and compiled, against sums made otherwise."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_capture import joint_of

from inference import EM, NUTS, fit
from inference.capture import value_and_grad
from inference.enumeration import LogFactor, sum_out
from inference.folding import fold_chains, paths
from inference.recorder import pure_graph
from inference.session import isolated


def forward(start, moves, points):
    """log of the sum over all paths by the forward algorithm: (K,), (T - 1, K, K), (T, K)."""
    alpha = start + points[0]
    for move, point in zip(moves, points[1:], strict=True):
        alpha = (alpha.unsqueeze(-1) + move).logsumexp(-2) + point
    return alpha.logsumexp(-1)


@pytest.mark.parametrize("length", [8, 9, 15, 16])
def test_folded_chains_are_the_forward_algorithm(length):
    """Even and odd lengths, value and gradient; factors come in any order and with their dimensions turned."""
    torch.manual_seed(length)
    tables = [torch.randn(s, dtype=torch.float64) for s in ((3,), (length - 1, 3, 3), (length, 3))]
    start, moves, points = (t.requires_grad_() for t in tables)
    factors = [LogFactor("start", start, ("z_0",), frozenset())]
    for t in range(length):
        factors.append(LogFactor(f"y_{t}", points[t], (f"z_{t}",), frozenset()))
        if t:
            turned = t % 2
            dims = (f"z_{t}", f"z_{t - 1}") if turned else (f"z_{t - 1}", f"z_{t}")
            factors.append(LogFactor(f"z_{t}", moves[t - 1].mT if turned else moves[t - 1], dims, frozenset()))
    factors = [factors[i] for i in torch.randperm(len(factors))]
    value, dims = sum_out(factors, {f"z_{t}" for t in range(length)})
    exact = forward(start, moves, points)
    assert dims == ()
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(v, (start, moves, points)) for v in (value, exact)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rows_and_outer_latents_stay_dimensions():
    """Ten steps in each of four rows under one of two regimes: by brute force over the regime, row by row."""
    torch.manual_seed(1)
    moves = torch.randn(2, 9, 2, 2, dtype=torch.float64)
    points, start = torch.randn(10, 4, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    factors = [LogFactor("r", torch.tensor([0.3, -0.2]).double(), ("r",), frozenset())]
    factors.append(LogFactor("z_0", start, ("z_0",), frozenset({"rows"})))
    for t in range(10):
        factors.append(LogFactor(f"y_{t}", points[t], ("rows", f"z_{t}"), frozenset({"rows"})))
        if t:
            own = ("r", f"z_{t - 1}", f"z_{t}")
            factors.append(LogFactor(f"z_{t}", moves[:, t - 1], own, frozenset({"rows"})))
    value, _ = sum_out(factors, {"r", *(f"z_{t}" for t in range(10))})
    rows = torch.stack([torch.stack([forward(start, moves[r], points[:, n]) for n in range(4)]).sum() for r in (0, 1)])
    torch.testing.assert_close(value, (torch.tensor([0.3, -0.2]).double() + rows).logsumexp(0), rtol=1e-12, atol=0)


def test_impossible_moves_have_no_slope_and_no_nan():
    """A chain that only goes up: one table entry is -inf, and gradients are those of the forward algorithm."""
    moves = torch.randn(11, 3, 3, dtype=torch.float64)
    moves = moves.masked_fill(torch.ones(3, 3).tril(-1).bool(), -torch.inf).requires_grad_()
    points = torch.randn(12, 3, dtype=torch.float64)
    group = [(points[t], (f"z_{t}",)) for t in range(12)] + [(moves[t], (f"z_{t}", f"z_{t + 1}")) for t in range(11)]
    sizes = {f"z_{t}": 3 for t in range(12)}
    (found,), done = fold_chains(group, set(sizes), sizes)
    assert done == set(sizes)
    exact = forward(torch.zeros(3).double(), moves, points)
    torch.testing.assert_close(found[0], exact, rtol=1e-12, atol=0)
    got, wanted = (torch.autograd.grad(v, moves)[0] for v in (found[0], exact))
    assert got.isfinite().all()
    torch.testing.assert_close(got, wanted.nan_to_num(0.0), rtol=1e-9, atol=1e-12)


def test_what_is_no_chain_is_left_alone():
    """Rings, forks, pairs of latents in one factor with a third, and short chains go the old way."""
    one = torch.zeros(2, 2)
    names = [f"z_{t}" for t in range(9)]
    line = [(one, pair) for pair in itertools.pairwise(names)]
    assert paths(line, set(names)) == [names]
    assert paths([*line, (one, ("z_8", "z_0"))], set(names)) == []
    assert paths([*line, (one, ("z_4", "other"))], {*names, "other"}) == []
    assert paths([*line, (torch.zeros(2, 2, 2), ("z_1", "z_2", "z_3"))], set(names)) == []
    assert paths(line[:6], set(names[:7])) == []


def markov(y):
    with pyro.plate("states", 3):
        A = pyro.sample("A", dist.Dirichlet(torch.ones(3)))
        mu, s = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("s", dist.HalfNormal(2.0))
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], s[z]), obs=y[t])


def series(length):
    rng = np.random.default_rng(1)
    z = np.cumsum(rng.random(length) < 0.1) % 3
    return torch.as_tensor(np.array([-3.0, 0, 3])[z] + 0.7 * rng.normal(size=length))


def test_a_loop_of_sixty_steps_is_a_short_program():
    """103 operations a step made long loops too long for machine code; density and gradient are the forward algorithm's."""
    y = series(60)
    joint = joint_of(markov, y)
    with isolated(0, torch.float64):
        found = value_and_grad(joint)
        flat = found.points[0].clone().requires_grad_()
        value, slope = found.single(flat.detach())
        theta = joint.constrain(flat.detach())
        assert found.mode == "graph", found.reason
        assert len(found.single.call.module.graph.nodes) < 40 * 60
        A, mu, s = (theta[n].clone().requires_grad_() for n in ("A", "mu", "s"))
        points = dist.Normal(mu, s).log_prob(y.unsqueeze(-1))
        own = forward(A[0].log(), A.log().expand(59, 3, 3), points)
        prior = dist.Dirichlet(torch.ones(3)).log_prob(A).sum() + dist.Normal(0.0, 5.0).log_prob(mu).sum()
        prior = prior + dist.HalfNormal(2.0).log_prob(s).sum()
        wanted = own + prior
        torch.testing.assert_close(joint.density(theta), wanted.detach(), rtol=1e-10, atol=0)
        step = 1e-5 * torch.randn(len(flat), dtype=torch.float64)
        up, down = (found.single(flat.detach() + k * step)[0] for k in (1, -1))
        assert float(slope @ step) == pytest.approx(float(up - down) / 2, rel=1e-5)
    assert value.isfinite()


def test_programs_do_not_grow_with_their_loops():
    """Twice as many steps are one more fold, not twice as many operations."""
    counts = []
    for length in (24, 48):
        joint = joint_of(markov, series(length))
        with isolated(0, torch.float64):
            counts.append(len(value_and_grad(joint).single.call.module.graph.nodes))
    assert counts[1] - counts[0] < 200 and counts[1] < 900


def laid_out(flat):
    """Steps of three shapes, of shared and own numbers, with dimensions turned; two of them are no entrywise operation."""
    data = torch.arange(1.0, 15.0, dtype=torch.float64)
    a, b = flat[:3], flat[3:].reshape(2, 3)
    rows = []
    for t in range(14):
        wide = [a, b, b.unsqueeze(-2)][t % 3]
        row = -((data[t] - wide) ** 2) / (1 + a.exp()) + torch.where(b > 0, b.abs(), b * data[t]).sum(0)
        row = row.reshape(-1, 3).mean(0) if t in (4, 9) else row.reshape(-1, 3)[0]
        rows.append(row.unsqueeze(-1).transpose(0, 1).squeeze(0))
    return (torch.stack(rows).logsumexp(0) * torch.stack([a.exp() + 0 * r for r in rows]).sum(0)).sum()


def test_steps_side_by_side_are_those_one_by_one():
    """Values and gradients of a loop whose steps differ in kind, at several points and in many at once."""
    torch.manual_seed(0)
    points = torch.randn(5, 9, dtype=torch.float64)
    with isolated(0, torch.float64):
        graph = pure_graph(laid_out, (points[0],), differentiable=True)
        for point in points:
            x, y = point.clone().requires_grad_(), point.clone().requires_grad_()
            torch.testing.assert_close(graph(x), laid_out(y), rtol=1e-12, atol=0)
            with torch.enable_grad():
                slopes = [torch.autograd.grad(f(v), v)[0] for f, v in ((graph, x), (laid_out, y))]
            torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.vmap(graph)(points), torch.stack([laid_out(p) for p in points]))


def test_entrywise_steps_are_one_operation():
    """A stack of sums of squares over twelve numbers of data: the graph holds one power, not twelve."""
    data = torch.arange(12.0, dtype=torch.float64)

    def program(flat):
        return torch.stack([((flat - d) ** 2 / 2).unsqueeze(0) for d in data]).sum()

    with isolated(0, torch.float64):
        graph = pure_graph(program, (torch.zeros(3, dtype=torch.float64),), differentiable=True)
    powers = [n for n in graph.module.graph.nodes if "pow" in str(n.target)]
    assert len(powers) == 1
    flat = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(graph(flat), program(flat), rtol=1e-14, atol=0)


def test_em_and_nuts_see_the_same_chain():
    """States by EM are those of forward-backward at its point; NUTS runs in seconds where it did not end in ten minutes."""
    y = series(24)
    point = fit(markov, y, EM(restarts=1, max_iter=4), seed=0)
    A, mu, s = (point.draws[n][0].double() for n in ("A", "mu", "s"))
    points = dist.Normal(mu, s).log_prob(y.unsqueeze(-1)).requires_grad_()
    with torch.enable_grad():
        states = torch.autograd.grad(forward(A[0].log(), A.log().expand(23, 3, 3), points), points)[0]
    found = torch.stack([point.local(f"z_{t}").flatten() for t in range(24)])
    torch.testing.assert_close(found, states, rtol=1e-6, atol=1e-8)
    draws = fit(markov, y, NUTS(chains=1, warmup=150, draws=100), seed=0)
    assert draws.num_draws == 100 and draws.diagnostics["divergences"] < 10
