"""What belongs to the process: stories, threads, processes, and everything that the user has set."""

import concurrent.futures
import multiprocessing
import pickle
import random
import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fault_stories import ALL, GRADIENT, X, answer, good, real
from fault_table import row

from inference import EM, SVI, fit


def learned(x):
    """One learned parameter, as wide as the data."""
    w = pyro.param("w", lambda: torch.zeros(x.shape[1]))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


def numbers(method, seed=0):
    """Draws of a quick fit as lists: what crosses a process unharmed."""
    from fault_stories import QUICK

    story, data, _ = real(method)
    return {n: v.tolist() for n, v in fit(story, data, QUICK[method], seed=seed).draws.items()}


@row("two fits with the same site names and other shapes", ALL)
def test_fits_of_other_shapes_are_independent(method):
    """Pyro's store would hand the second story the first one's parameters."""
    story, data, _ = real(method)
    before = answer(story, data, method)
    answer(story, data[:10, :2], method)
    assert all(torch.equal(before.draws[n], v) for n, v in answer(story, data, method).draws.items())


@row("two fits with the same site names and other shapes", ("em", "svi"))
def test_learned_parameters_do_not_leak(method):
    options = EM() if method == "em" else SVI(steps=100, starts=1, draws=10)
    first = fit(learned, X, options, seed=0)
    fit(learned, X[:, :2], options, seed=0)
    again = fit(learned, X, options, seed=0)
    assert torch.equal(first.draws["w"], again.draws["w"]) and first.history == again.history


@row("the same fit twice", ALL)
def test_the_second_fit_starts_cold(method):
    story, data, _ = real(method)
    first, second = (answer(story, data, method) for _ in range(2))
    assert first.history == second.history
    assert all(torch.equal(v, second.draws[n]) for n, v in first.draws.items())


@row("the same fit twice", GRADIENT)
def test_the_users_own_parameters_are_neither_read_nor_changed(method):
    pyro.param("loc", torch.full((3,), 99.0))
    pyro.param("w", torch.full((3,), 99.0))
    fresh = answer(*real(method)[:2], method)
    assert all(torch.equal(v, fresh.draws[n]) for n, v in good(method).items())
    assert float(pyro.param("w")[0]) == 99.0 and sorted(pyro.get_param_store().keys()) == ["loc", "w"]


@pytest.mark.processor  # a pretended card is one thread's
@row("four threads at once", ALL)
def test_four_threads_are_right_or_refused(method, untouched):
    """Pyro's handler stack belongs to the process: fits that share it tear it."""
    wanted, found, gate = good(method), [], threading.Barrier(4)

    def work():
        gate.wait()
        try:
            found.append(answer(*real(method)[:2], method).draws)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    answers = [f for f in found if isinstance(f, dict)]
    errors = [f for f in found if not isinstance(f, dict)]
    assert answers and all(torch.equal(a[n], wanted[n]) for a in answers for n in wanted)
    assert all(isinstance(e, RuntimeError) and "another thread" in str(e) for e in errors), errors
    assert all(torch.equal(v, wanted[n]) for n, v in answer(*real(method)[:2], method).draws.items())


@pytest.fixture(scope="module", params=["spawn", "fork"])
def pool(request):
    """Four workers of either kind."""
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {request.param} on this system")
    torch.set_num_threads(1)
    context = multiprocessing.get_context(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork beside threads
        with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as workers:
            yield workers


@pytest.mark.processor  # the processes run there, too
@row("four processes at once", ALL)
def test_four_processes_equal_serial_runs(method, pool):
    wanted = [numbers(method, seed) for seed in range(2)]
    assert [f.result(120) for f in [pool.submit(numbers, method, s) for s in (0, 1, 0, 1)]] == wanted * 2


@row("four processes at once", ("em", "svi", "nuts"))
def test_a_story_that_cannot_cross_is_named(method, pool):
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pool.submit(fit, lambda x: None, X, method).result(60)


@pytest.mark.processor  # the processes run there, too
@row("four processes at once", ALL)
def test_answers_cross_processes(method, pool):
    story, data, _ = real(method)
    there = pool.submit(answer, story, data, method).result(120)
    assert all(torch.equal(v, there.draws[n]) for n, v in good(method).items())
    assert str(there.summary()) == str(answer(story, data, method).summary())


def snapshot():
    """Everything of the process that a fit could change."""
    import matplotlib
    from pyro.poutine.runtime import _PYRO_STACK

    state = {
        "dtype": torch.get_default_dtype(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "filters": list(warnings.filters),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "validation": torch.distributions.Distribution._validate_args,
        "errors": np.geterr(),
        "store": sorted(pyro.get_param_store().keys()),
        "stack": list(_PYRO_STACK),
        "backend": matplotlib.get_backend(),
        "rc": dict(matplotlib.rcParams),
    }
    state["pyro validation"] = (
        pyro.infer.is_validation_enabled() if hasattr(pyro.infer, "is_validation_enabled") else None
    )
    return state


@row("the user's own state", ALL)
def test_a_fit_changes_nothing_of_the_users(method):
    good(method)  # libraries set filters of their own when they are first imported
    story, data, _ = real(method)
    str(answer(story, data, method).summary())
    torch.set_default_dtype(torch.float64)
    np.seterr(over="raise")
    pyro.enable_validation(False)
    try:
        before = snapshot()
        str(answer(story, data, method).summary())
        after = snapshot()
    finally:
        torch.set_default_dtype(torch.float32)
        np.seterr(over="warn")
        pyro.enable_validation(True)
    assert {n: v for n, v in before.items() if after[n] != v} == {}


@row("the user's own state", ALL)
def test_the_users_settings_do_not_change_the_answer(method):
    wanted = good(method)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    torch.manual_seed(99)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            found = answer(*real(method)[:2], method).draws
    finally:
        torch.set_default_dtype(torch.float32)
        pyro.enable_validation(True)
    assert all(torch.equal(v, found[n]) for n, v in wanted.items())


@row("the user's own state", ALL)
def test_the_users_data_are_not_written_to(method):
    story, data, _ = real(method)
    array = data.numpy().copy()
    array.setflags(write=False)
    answer(story, array, method)
    assert np.array_equal(array, data.numpy())
