"""Shared fixtures: quiet plots, and proof that a test leaves nothing behind."""

import functools
import gc
import random
import sys
from pathlib import Path

import fault_table
import numpy as np
import pyro
import pytest
import torch
from pretended_card import pretended

#: Corpora, tables and reference posteriors that are not part of the project.
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=["cpu", "cuda", "pretended"],
        help="where every fit that names no device runs; a pretended card refuses what a card refuses",
    )


def pytest_configure(config):
    fault_table.configure(config)


def pytest_collection_modifyitems(config, items):
    fault_table.tag(items)
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="--device cuda: no CUDA device was found"))


def pytest_terminal_summary(terminalreporter):
    fault_table.summarise(terminalreporter)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same data, and finds the parameter store empty."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    pyro.clear_param_store()
    yield


@pytest.fixture(autouse=True)
def on_the_device(request):
    """With `--device cuda` every fit runs there that names no device; what it answers is compared as ever."""
    device = request.config.getoption("--device")
    if request.node.get_closest_marker("processor"):
        device = "cpu"
    with pytest.MonkeyPatch.context() as patch:  # of its own, which no test undoes
        if device == "pretended":
            pretend_in_fits(patch)
        if device != "cpu":
            everything_on("cuda", patch)
        elif torch.cuda.is_available():  # "auto" would ask a clock
            patch.setattr("inference.devices.available", lambda: ["cpu"])
        yield


def pretend_in_fits(patch):
    """Let there be a card inside every fit, of which nothing may be left: all else runs at its usual speed."""
    from inference import fit

    cell = dict(zip(fit.__code__.co_freevars, fit.__closure__, strict=True))["function"]  # tests have imported the rest
    function, inside = cell.cell_contents, []

    @functools.wraps(function)
    def fitted(*args, **kwargs):
        if inside or torch.cuda.is_available():  # the test has a card of its own
            return function(*args, **kwargs)
        with pretended(own_stream=True) as card:
            inside.append(card)
            try:
                found = function(*args, **kwargs)
            finally:
                inside.pop()
            if card.used():
                gc.collect()
            assert not card.used(), f"{card.used()} bytes are left on the card"
        return found

    patch.setattr(cell, "cell_contents", fitted)


def everything_on(device, patch):
    """Let "auto" mean a device, without a trial of steps."""
    from inference import devices, fit

    front = sys.modules[fit.__module__]
    prepare = front.prepare
    patch.setattr(
        front,
        "prepare",
        lambda *args, **kw: prepare(*args, **{**kw, "device": device if kw["device"] == "auto" else kw["device"]}),
    )
    patch.setattr(front, "settled", lambda found, method, on: (found, devices.DeviceChoice(device, (), "--device")))


@pytest.fixture
def untouched():
    """After the test, the process-wide state is what it was."""
    import warnings

    import arviz  # noqa: F401  (libraries that set warning filters of their own when first imported)
    import scipy.special  # noqa: F401
    import sympy  # noqa: F401

    before = (torch.get_default_dtype(), torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    filters = list(warnings.filters)
    yield
    from pyro.poutine.runtime import _PYRO_STACK

    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]
    assert random.getstate() == before[3]
    assert not pyro.get_param_store().keys()
    assert not _PYRO_STACK
    assert list(warnings.filters) == filters
