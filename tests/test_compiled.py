"""Machine code against the graphs and chains that it replaces, and a cache that may be damaged, shared and full."""

import ctypes
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from stories import SCHOOLS, eight_schools
from test_capture import STORIES, joint_of

from inference import NUTS, fit
from inference import compiled_cache as cache
from inference.capture import value_and_grad
from inference.codegen import translate
from inference.compiled import Compiled, NotCompiled, build, build_library, find, simple
from inference.methods import hamiltonian
from inference.recorder import pure_graph
from inference.session import isolated

try:
    from inference.compiled import compiler

    compiler()
except NotCompiled:
    pytest.skip("no C compiler here", allow_module_level=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test finds an empty cache."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def potential_of(story, data):
    joint = joint_of(story, data)
    with isolated(0, torch.float64):
        return value_and_grad(joint)


def run(program, x, tmp_path):
    """Value and gradient of a program of one vector, translated to C and run."""

    def both(q):
        with torch.enable_grad():
            q = q.detach().requires_grad_()
            value = program(q)
            return value.detach(), torch.autograd.grad(value, q)[0]

    graph = pure_graph(both, (x,))
    module, constants = graph.module, graph.constants
    source, arena = translate(simple(module, (x, *constants)), (x, *constants))
    build_library(source, tmp_path / "program.so")
    library = ctypes.CDLL(str(tmp_path / "program.so"))
    inputs = (ctypes.c_void_p * max(1, len(constants)))(*[c.data_ptr() for c in constants])
    address = ctypes.cast(library.potential, ctypes.c_void_p).value
    code = Compiled(len(x), address, inputs, arena, True, [library, constants])
    return code(x.numpy()), both(x)


# -- the translation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORIES)
def test_machine_code_is_the_graph(name):
    """Value and gradient to 1e-10 far from the points that the package itself compares."""
    potential = potential_of(*STORIES[name])
    code = build(potential)
    for point in np.random.default_rng(5).normal(size=(5, code.dim)):
        value, gradient = potential.numpy(point)
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            continue
        found, slope = code(point)
        assert math.isclose(found, value, rel_tol=1e-10)
        np.testing.assert_allclose(slope, gradient, rtol=1e-9, atol=1e-10 * max(1.0, np.abs(gradient).max()))


INDEX = torch.tensor([[0, 3, -1], [2, 2, 1]])
SPD = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]], dtype=torch.float64)

PROGRAMS = {
    "a transposed product": lambda q: ((q.reshape(3, 2).T @ q.reshape(3, 2)) ** 2).sum(),
    "repeated places add up": lambda q: (q[INDEX] ** 3).sum(),
    "a constant mask": lambda q: (q[torch.tensor([True, False, True, True, False, True])] ** 3).sum(),
    "a part that is set": lambda q: (torch.where(torch.arange(6) < 2, 0.5, q).cumsum(0) ** 2).sum(),
    "sums of sums": lambda q: (q.reshape(2, 3) - q.reshape(2, 3).logsumexp(0)).logsumexp(1).sum(),
    "largest of a row": lambda q: (q.reshape(2, 3).max(1).values * q[:2]).sum(),
    "solve with a factor": lambda q: (
        torch.linalg.solve_triangular(
            torch.linalg.cholesky(SPD + torch.diag(q[:3] ** 2)), q[3:].unsqueeze(-1), upper=False
        )
        .pow(2)
        .sum()
    ),
    "solve from the right": lambda q: (
        torch.linalg.solve_triangular(
            torch.linalg.cholesky(SPD + torch.diag(q[:3] ** 2)).mT, q.reshape(2, 3), upper=True, left=False
        )
        .pow(2)
        .sum()
    ),
    "a log determinant": lambda q: torch.linalg.slogdet(SPD + torch.outer(q[:3], q[3:]))[1],
    "backwards and triangles": lambda q: (q.flip(0) * q).cumsum(0).sum() + torch.outer(q, q).tril(-1).exp().sum(),
    "joined and padded": lambda q: torch.nn.functional.pad(torch.cat([q, q[1:3] ** 2]), (1, 2), value=2.0).pow(2).sum(),
    "gamma functions": lambda q: (torch.lgamma(q.exp()) + torch.digamma(q.exp() + 0.1)).sum(),
    "by place": lambda q: q.reshape(2, 3).gather(1, torch.tensor([[2, 2], [0, 1]])).pow(3).sum(),
    "a batch of products": lambda q: torch.bmm(q.reshape(2, 3, 1), q.reshape(2, 1, 3)).exp().sum(),
    "many kinds at once": lambda q: (
        q.sigmoid().clamp(0.3, 0.6) * q.abs().sqrt() + q.atan().tanh() / (1 + q**2)
    ).mean(),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_operations_and_their_gradients(name, tmp_path):
    """Each against torch's own answer: a stride, a sign or an order of loops that is wrong shows in the numbers."""
    x = torch.tensor([0.3, -1.2, 0.8, 1.7, -0.4, 0.6], dtype=torch.float64)
    (value, gradient), (expected, slope) = run(PROGRAMS[name], x, tmp_path)
    assert math.isclose(value, float(expected), rel_tol=1e-11)
    # torch's own trigamma is good to 1e-9; ours is held against SciPy's below.
    np.testing.assert_allclose(gradient, slope.numpy(), rtol=2e-9 if "gamma" in name else 1e-10, atol=1e-11)


@pytest.mark.parametrize("order", [0, 1])
def test_polygamma(order, tmp_path):
    """Digamma and trigamma over four decades and below zero, against SciPy."""
    x = np.array([-2.3, -0.4, 1e-3, 0.2, 1.0, 3.7, 9.99, 12.0, 150.0, 2e4])
    names = ("digamma", "trigamma")
    lines = "".join(f"gradient[{i}] = {names[order]}(q[{i}]);\n" for i in range(len(x)))
    head = "void potential(const double *q, void *const *inputs, char *arena, double *value, double *gradient)"
    build_library(f'#include "support.h"\n{head} {{ *value = 0; {lines} }}', tmp_path / "p.so")
    library = ctypes.CDLL(str(tmp_path / "p.so"))
    found, value = np.zeros(len(x)), np.zeros(1)
    library.potential(*[ctypes.c_void_p(p) for p in (x.ctypes.data, 0, 0, value.ctypes.data, found.ctypes.data)])
    np.testing.assert_allclose(found, special.polygamma(order, x) if order else special.digamma(x), rtol=1e-13)


def test_a_failed_factorisation_is_no_number():
    """Off the positive-definite matrices a density is NaN, not the density of something else."""

    def correlation(x):
        r = pyro.sample("r", dist.Normal(0.0, 0.1))
        C = torch.eye(2) + r * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), C), obs=x)

    code = build(potential_of(correlation, torch.tensor([0.3, 0.1])))
    assert math.isnan(code(np.array([3.0]))[0]) and math.isfinite(code(np.array([0.3]))[0])


def test_single_precision_stories_are_built_too(tmp_path):
    x = torch.tensor([0.3, -1.2], dtype=torch.float32)

    def both(q):
        return (q.exp() * q).sum(), q.exp() * (q + 1)

    graph = pure_graph(both, (x,))
    source, arena = translate(simple(graph.module, (x, *graph.constants)), (x, *graph.constants))
    assert "float" in source and arena > 0


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_the_sampler_follows_the_path_of_the_python_one(dense):
    """The same random numbers give the same trajectories through the warm-up: two implementations of one algorithm."""
    options = {"chains": 2, "warmup": 40, "draws": 10, "dense_mass": dense}
    slow, fast = (fit(eight_schools, SCHOOLS, NUTS(backend=b, **options), seed=3) for b in ("graph", "compiled"))
    assert slow.diagnostics["backend"].startswith("graph") and fast.diagnostics["backend"].startswith("compiled")
    for name in ("n_steps", "tree_depth", "diverging"):
        assert np.array_equal(slow.sample_stats[name], fast.sample_stats[name]), name
    for name in ("energy", "lp", "acceptance_rate", "step_size"):
        np.testing.assert_allclose(slow.sample_stats[name], fast.sample_stats[name], rtol=1e-3, atol=1e-3)
    for name, draws in slow.draws.items():
        np.testing.assert_allclose(draws, fast.draws[name], rtol=1e-2, atol=1e-2)


def test_normal_draws_are_normal():
    from inference.methods.adaptation import normals

    found = normals(np.random.default_rng(0), 20_001)
    assert len(found) == 20_001 and stats.kstest(found, "norm").pvalue > 0.01


def test_chains_do_not_depend_on_each_other():
    """The first chain of four is the first of two, bit by bit: threads share nothing."""
    four, two = (
        fit(eight_schools, SCHOOLS, NUTS(chains=c, warmup=100, draws=50, backend="compiled"), seed=1) for c in (4, 2)
    )
    for name, draws in two.draws.items():
        assert torch.equal(draws[:50], four.draws[name][:50])


@pytest.mark.parametrize("calls", [0, 3])
def test_ctrl_c_returns_what_there_is(monkeypatch, untouched, calls):
    """Interrupted while machine code runs: the chains stop, and what there is comes back, flagged."""
    from inference.methods.nuts import Watch

    left, look = [calls], Watch.__call__

    def interrupted(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return look(self)

    monkeypatch.setattr(Watch, "__call__", interrupted)
    posterior = fit(eight_schools, SCHOOLS, NUTS(chains=2, warmup=100, draws=2_000_000, backend="compiled"), seed=0)
    assert not posterior.converged and any("interrupted" in w for w in posterior.warnings)
    assert 1 <= len(posterior.draws["mu"]) // 2 < 2_000_000
    assert all(t.name != "chain" for t in threading.enumerate() if t.name.startswith("chain"))


def test_an_improper_posterior_is_named():
    def flat(x):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(0 * a, 1.0), obs=x)

    from inference.errors import DivergenceError

    with pytest.raises(DivergenceError, match="improper"):
        fit(flat, torch.tensor(0.0), NUTS(chains=2, warmup=50, draws=50, backend="compiled"), seed=0)


# -- choice ------------------------------------------------------------------------------------------------------------


def branching(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    m = m * 2 if m > 0 else m
    pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def test_what_cannot_be_built_runs_all_the_same_or_is_refused():
    short = {"chains": 1, "warmup": 5, "draws": 5}
    posterior = fit(branching, torch.tensor(1.0), NUTS(**short), seed=0)
    assert "looks at the value" in posterior.diagnostics["backend"]
    for backend in ("compiled", "graph"):
        with pytest.raises(ValueError, match=f"{backend}.*impossible.*looks at the value"):
            fit(branching, torch.tensor(1.0), NUTS(backend=backend, **short), seed=0)


def test_without_a_compiler_the_graph_serves_with_a_notice(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    posterior = fit(eight_schools, SCHOOLS, NUTS(chains=1, warmup=100, draws=300), seed=0)
    assert posterior.diagnostics["backend"].startswith("graph")
    assert any("no C compiler" in w and "CC" in w for w in posterior.warnings)


def test_a_compiler_that_fails_is_no_end(monkeypatch):
    monkeypatch.setenv("CC", "false")
    posterior = fit(eight_schools, SCHOOLS, NUTS(chains=1, warmup=100, draws=300), seed=0)
    assert posterior.diagnostics["backend"].startswith("graph") and "compiler" in posterior.diagnostics["backend"]


def test_code_that_disagrees_is_not_trusted(monkeypatch):
    """A wrong translation is found before the first draw."""
    from inference.codegen import elementwise

    monkeypatch.setitem(elementwise.ELEMENTWISE, "log1p", "log({0})")
    with pytest.raises(NotCompiled, match="disagrees"):
        build(potential_of(eight_schools, SCHOOLS))


def smooth(x, y):
    ell, amp = pyro.sample("ell", dist.LogNormal(0.0, 1.0)), pyro.sample("amp", dist.HalfNormal(2.0))
    K = amp**2 * (-0.5 * (x[:, None] - x) ** 2 / ell**2).exp() + 1e-6 * torch.eye(len(x))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=torch.linalg.cholesky(K)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((f + 1).exp()), obs=y)


def smooth_data(n=60):
    x = torch.linspace(0, 5, n, dtype=torch.float64)
    return {"x": x, "y": torch.as_tensor(np.random.default_rng(0).poisson(np.exp(1 + np.sin(2 * x.numpy())))).double()}


def test_covariances_near_to_singular_are_built(monkeypatch):
    """A latent function of 60 places: rounding, a millionth of a large gradient, was taken for a wrong program."""
    from inference import compiled

    potential = potential_of(smooth, smooth_data())
    code = build(potential)
    for point in potential.points:
        value, slope = potential.numpy(point.numpy())
        found, own = code(point.numpy())
        assert found == pytest.approx(float(value), rel=1e-7)
        assert np.abs(own - slope).max() < 1e-6 * np.abs(slope).max()
    for wrong in (1 + 1e-4, 1 - 1e-3):  # a planted error is no rounding, wherever it sits
        point = potential.points[0].numpy()
        value, slope = potential.numpy(point)
        bent = slope.copy()
        bent[np.abs(slope).argsort()[len(slope) // 2]] *= wrong
        assert compiled.same(potential, point, (value, slope), (value, slope))
        assert not compiled.same(potential, point, (value, slope), (value * wrong, slope))
        assert not compiled.same(potential, point, (value, slope), (value, bent))


def test_latent_functions_learn_all_covariances():
    """Variances alone asked for four times as many steps, where most unknowns are one multivariate normal."""
    few, many = NUTS(), NUTS(warmup=2000)
    function, apart = joint_of(smooth, smooth_data()), joint_of(eight_schools, SCHOOLS)
    assert few.dense(function) and few.dense(apart) and not NUTS(warmup=300).dense(function)
    assert many.dense(function) and not NUTS(dense_mass=False).dense(function)


def test_few_iterations_do_not_pay_for_a_compiler():
    posterior = fit(eight_schools, SCHOOLS, NUTS(chains=1, warmup=5, draws=5), seed=0)
    assert posterior.diagnostics["backend"].startswith("graph") and "pay" in posterior.diagnostics["backend"]


def test_eager_gives_the_same_posterior():
    """Three back ends, one path, as far as rounding goes."""
    options = {"chains": 1, "warmup": 10, "draws": 5}
    eager, graph = (fit(eight_schools, SCHOOLS, NUTS(backend=b, **options), seed=2) for b in ("eager", "graph"))
    np.testing.assert_allclose(eager.draws["mu"], graph.draws["mu"], rtol=1e-6)


# -- where chains begin ------------------------------------------------------------------------------------------------


def test_chains_begin_where_they_are_told(monkeypatch):
    begun = []
    first = hamiltonian.Record.__post_init__

    def noted(self):
        begun.append(self.position.copy())
        first(self)

    monkeypatch.setattr(hamiltonian.Record, "__post_init__", noted)
    none = {"chains": 2, "warmup": 0, "draws": 1, "backend": "graph"}
    values = {"mu": torch.tensor([1.0, 2.0]), "tau": torch.tensor(math.e), "raw": torch.zeros(8)}
    posterior = fit(eight_schools, SCHOOLS, NUTS(init=values, **none), seed=0)
    np.testing.assert_allclose(begun[:2], [[1.0, 1.0, *[0.0] * 8], [2.0, 1.0, *[0.0] * 8]], atol=1e-12)
    fit(eight_schools, SCHOOLS, NUTS(init=posterior, **none), seed=1)
    for position, mu in zip(begun[2:4], posterior.draws["mu"], strict=True):
        assert math.isclose(position[0], float(mu))
    with pytest.raises(ValueError, match="nu; the continuous latents are mu, tau"):
        fit(eight_schools, SCHOOLS, NUTS(init={"nu": 1.0}), seed=0)
    with pytest.raises(ValueError, match=r"'mu'.*shape \(3,\)"):
        fit(eight_schools, SCHOOLS, NUTS(init={"mu": torch.zeros(3)}), seed=0)


@pytest.mark.parametrize(
    "options", [{"backend": "numba"}, {"init": "best"}, {"dense_mass": "no"}], ids=lambda o: next(iter(o))
)
def test_new_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NUTS(**options)
    with pytest.raises(TypeError, match="init"):
        NUTS(init=3)


# -- the cache ---------------------------------------------------------------------------------------------------------


def moved(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def test_other_data_of_the_same_shape_are_not_built_again():
    """Numbers are inputs: the second data set finds the first's code, and gets its own density."""
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-4.0, 0.0, 9.0])
    assert build(potential_of(moved, x)).fresh
    code = build(potential_of(moved, y))
    assert not code.fresh
    assert math.isclose(code(np.array([0.5]))[1][0], float((y.double() - 0.5).sum()) - 0.5)
    assert find(potential_of(moved, torch.zeros(4))) is None


def test_a_damaged_library_is_built_anew(own_cache):
    """One byte off is found by the hash: it is neither run nor an error."""
    build(potential_of(moved, torch.zeros(3)))
    (library,) = own_cache.glob("*.so")
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.unlink()
    library.write_bytes(content)
    assert find(potential_of(moved, torch.zeros(3))) is None
    assert build(potential_of(moved, torch.zeros(3))).fresh
    for note in own_cache.glob("*.json"):
        note.write_text("{")
    assert build(potential_of(moved, torch.zeros(3))).fresh


def test_the_folder_stays_below_its_limit(own_cache):
    root = cache.folder()
    for i in range(5):
        (root / f"{i}.so").write_bytes(bytes(1000))
        os.utime(root / f"{i}.so", (i + 1, i + 1))
    cache.sweep(root, limit=2500)
    assert sorted(p.name for p in root.iterdir()) == ["3.so", "4.so"]


def test_processes_that_build_at_once_do_not_meet(own_cache):
    """Four processes, one key: all end well, one library serves, nothing half-made is left."""
    code = (
        "from pathlib import Path; import time, inference.compiled_cache as c\n"
        "def make(p):\n    p.write_bytes(b'x' * 100000); time.sleep(0.05); return {'arena': 1}\n"
        "for _ in range(5): c.keep('key', make); assert c.find('key')[1] == {'arena': 1}\n"
    )
    root = Path(__file__).parents[1]
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=root) for _ in range(4)]
    assert [r.wait(60) for r in runs] == [0] * 4
    assert len(list(own_cache.glob("*.so"))) == 1 and not list(own_cache.glob("building-*"))
    assert json.loads((own_cache / "key.json").read_text())["facts"] == {"arena": 1}


# -- another project's sampler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORIES)
def test_jax_is_the_graph(name):
    """Value and gradient of the graph in JAX to 1e-9."""
    jax = pytest.importorskip("jax")
    from inference.jax_graph import sixty_four_bits, value_and_grad_in_jax

    potential = potential_of(*STORIES[name])
    with sixty_four_bits():
        both = jax.jit(value_and_grad_in_jax(potential))
        for point in potential.points:
            value, gradient = potential(point)
            found, slope = both(point.numpy())
            assert math.isclose(float(found), float(value), rel_tol=1e-9)
            np.testing.assert_allclose(slope, gradient.numpy(), rtol=1e-8, atol=1e-9 * float(gradient.abs().max()))


def test_numpyro_agrees_with_the_machine_code():
    """Two samplers that share nothing but the graph: the same means within 4 Monte Carlo errors."""
    pytest.importorskip("numpyro")
    ours, theirs = (fit(eight_schools, SCHOOLS, NUTS(backend=b), seed=0) for b in ("auto", "jax"))
    assert theirs.diagnostics["backend"].startswith("jax") and theirs.diagnostics["rhat"] < 1.02
    for name in ("mu", "tau"):
        a, b = ours.draws[name], theirs.draws[name]
        error = 4 * float(a.std()) * math.sqrt(sum(1 / p.diagnostics["ess_bulk"] for p in (ours, theirs)))
        assert abs(float(a.mean() - b.mean())) < error


def test_jax_is_told_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ValueError, match="pip install jax numpyro"):
        fit(eight_schools, SCHOOLS, NUTS(backend="jax"), seed=0)
