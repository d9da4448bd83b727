"""Ranks that are asked badly, and what they answer together beyond a fit; the work is in `ranks_contract.py`."""

import re

import numpy as np
import pytest
import ranks_contract
from test_ranks import ROOT, torchrun

NAMES = list(ranks_contract.WORK)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: this one; it leaves the file from which ranks go on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKS_FOLDER", str(tmp_path_factory.mktemp("files")))
        found = ranks_contract.work(NAMES)
        yield {f"{n}/{k}": ranks_contract.plain(v) for n, part in found.items() for k, v in part.items()}


@pytest.fixture(scope="module")
def ranks(alone, tmp_path_factory):
    """Two ranks, all pieces in one run."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(2, ROOT / "tests" / "ranks_contract.py", folder, *NAMES)
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(folder / f"2-{rank}.npz")) for rank in range(2)]


def parts(results: dict[str, np.ndarray], piece: str) -> dict[str, np.ndarray]:
    return {k.split("/", 1)[1]: v for k, v in results.items() if k.startswith(f"{piece}/")}


def text(value: np.ndarray) -> str:
    return bytes(value.tolist()).decode()


WANTED = {
    "seed": "ValueError: the ranks call fit with different arguments.*seed: 1 on rank 0, 2 on rank 1",
    "option": "ValueError: the ranks call fit.*: method.steps: 20 on rank 0, 21 on rank 1",
    "method": "ValueError: the ranks call fit.*method: EM on rank 0, SVI on rank 1",
    "share": "ValueError: the ranks call fit.*ranks: 'split' on rank 0, 'own' on rank 1",
    "story": "ValueError: the ranks call fit.*story: GMM.*scale=1.0.* on rank 0, GMM.*scale=2.0.* on rank 1",
    "function": "ValueError: the ranks do not call the same function: rank 0 calls compare, rank 1 calls fit",
    "methods": "ValueError: the ranks call compare with different arguments.*methods",
    "shared table": "ValueError: ranks='own': 'scale' differs between the ranks",
    "no rows": "(ValueError: |RuntimeError: rank 1 of 2 failed.*)x is empty",
    "names": "(TypeError: |RuntimeError: rank 1 of 2 failed.*)data has .'target'., which the story does not take",
}


@pytest.mark.parametrize("name", WANTED)
def test_ranks_that_are_not_asked_alike_are_told_on_each(ranks, name):
    """A mismatch would end in a hang or an abort of the process: each rank names it, and goes on to the next call."""
    for found in ranks:
        said = text(parts(found, "calls")[name])
        assert re.match(WANTED[name], said), said


@pytest.mark.parametrize("piece", ["few_rows", "frames"])
def test_any_form_of_rows_is_the_answer_of_one_process(alone, ranks, piece):
    """An empty share, a frame that is cut, a table that all rows share and is counted twice, would show."""
    wanted = parts(alone, piece)
    for found in ranks:
        for name, value in wanted.items():
            rounding = 1e-5 if name == "precision" else 1e-8  # one rank brought single precision
            np.testing.assert_allclose(parts(found, piece)[name], value, rtol=rounding, atol=rounding, err_msg=name)


def test_a_posterior_over_ranks_answers(alone, ranks):
    """Own rows for what each brought, in the order of the ranks; the same numbers on each for rows that both ask about."""
    wanted, (first, second) = parts(alone, "questions"), (parts(r, "questions") for r in ranks)
    for name, value in wanted.items():
        if name == "summary":
            assert text(first[name]) == text(second[name])
        elif name == "own/imputed":  # by draws, which ranks make apart
            holes = np.zeros(value.shape, bool)
            holes[::50, 1] = True
            both = np.concatenate([first[name], second[name]])
            np.testing.assert_allclose(both[~holes], value[~holes])
            assert np.abs(both - value)[holes].max() < 1.0 and np.isfinite(both).all()
        elif name.startswith("own/"):
            np.testing.assert_allclose(np.concatenate([first[name], second[name]]), value, rtol=1e-8, atol=1e-8)
        else:
            assert np.array_equal(first[name], second[name]), name
            np.testing.assert_allclose(first[name], value, rtol=1e-7, atol=1e-7, err_msg=name)


def test_networks_that_are_made_late_are_one(ranks):
    """Networks that start apart end as one to the last bit, and the bound has risen by more than its noise."""
    first, second = (parts(r, "lazy_networks") for r in ranks)
    assert first.keys() == second.keys() and len(first) == 8, sorted(first)
    assert all(np.array_equal(first[n], second[n]) for n in first)
    early, late = first["history"][:20], first["history"][-20:]
    assert late.mean() - early.mean() > 5 * (early.std() + late.std()) / 20**0.5


def test_compare_says_the_same_on_every_rank(alone, ranks):
    """The rows of one process are held out, its table comes out, and no rank has a verdict of its own."""
    wanted, (first, second) = parts(alone, "compared"), (parts(r, "compared") for r in ranks)
    assert text(first["verdict"]) == text(second["verdict"]) and text(first["table"]) == text(second["table"])
    before = text(wanted["verdict"]).partition("Fastest")[0]
    assert text(first["verdict"]).startswith(before.partition("svi is not cross-checked")[0])
    for name in ("numbers", "held", "trained"):
        assert np.array_equal(first[name], second[name], equal_nan=True)
        np.testing.assert_allclose(first[name], wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.processor  # the processes of ranks run there, too
def test_batches_go_on_with_other_ranks(ranks):
    """Steps, moments and schedule are kept, rows drawn anew: the run ends as near to the truth as runs of other seeds."""
    found = parts(ranks[0], "batches_go_on")
    others = [ranks_contract.batches(None, seed) for seed in range(1, 6)]
    assert set(found["steps"].tolist()) == {150}, "Adam counts its steps from where they were"
    assert len(found["history"]) == 400
    begin = others[0].history[:150]  # the same seed: to the bit what the one process had done
    assert found["history"][:150].tolist() == begin
    X, y = (v.numpy() for v in ranks_contract.lines().values())
    exact = np.linalg.solve(X.T @ X, X.T @ y)
    errors = [np.abs(p.draws["w"].mean(0).numpy() - exact).max() for p in others]
    assert np.abs(found["w"] - exact).max() < np.mean(errors) + 4 * np.std(errors, ddof=1)
    ends = np.array([np.mean(p.history[-100:]) for p in others])
    assert abs(found["history"][-100:].mean() - ends.mean()) < 4 * ends.std(ddof=1)
    noises = np.array([float(p.draws["noise"][0]) for p in others])
    assert abs(float(found["noise"]) - noises.mean()) < 4 * noises.std(ddof=1)
    # a step size that began again at its height would throw the last steps about
    roughness = [np.std(np.diff(p.history[-60:])) for p in others]
    assert np.std(np.diff(found["history"][-60:])) < 2 * max(roughness)


def test_one_rank_speaks(ranks):
    """Bars and warnings of the first rank; the second one says nothing at all."""
    first, second = (text(parts(r, "warned")["said"]) for r in ranks)
    assert second == ""
    assert all(word in first for word in ("SVI:", "EM:", "NUTS:", "told by rank 0"))
