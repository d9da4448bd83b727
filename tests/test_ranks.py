"""Several processes under torchrun against one: the same numbers, whatever the shards; see `ranks_work.py`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks_work

ROOT = Path(__file__).parents[1]
EM_PIECES = [
    "gmm",
    "gmm_split",
    "contraction",
    "on_rows",
    "mixed",
    "hmm",
    "ppca",
    "ppca_mle",
    "fa_missing",
    "mfa",
]
SVI_PIECES = ["svi_derived", "svi_params", "svi_rows"]
CHAINS = ["nuts", "hmc"]
QUICK = [*EM_PIECES, *CHAINS, "gmm_incremental", *SVI_PIECES, "svi_batches", "svi_network"]


def environment() -> dict[str, str]:
    """One thread a rank, this tree first on the path."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(size: int, *words: str | Path, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a script or module on `size` ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.run(
        [*command, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def together(size: int, folder: Path, names: list[str]) -> list[dict[str, np.ndarray]]:
    """Results of pieces of work by `size` ranks, one dictionary a rank."""
    done = torchrun(size, ROOT / "tests" / "ranks_work.py", folder, *names)
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(folder / f"{size}-{rank}.npz")) for rank in range(size)]


@pytest.fixture(scope="module")
def alone():
    """Results of one process: this one."""
    found = ranks_work.work(QUICK)
    return {f"{name}/{key}": np.asarray(v) for name, part in found.items() for key, v in part.items()}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """Results of two and of three ranks."""
    return together(request.param, tmp_path_factory.mktemp("ranks"), QUICK)


def parts(results: dict[str, np.ndarray], piece: str) -> dict[str, np.ndarray]:
    return {k.split("/", 1)[1]: v for k, v in results.items() if k.startswith(f"{piece}/")}


@pytest.mark.parametrize("piece", EM_PIECES)
def test_em_on_shards_is_em_on_all_rows(alone, ranks, piece):
    """A prior that counts twice, a row that is left out, or a start from the own rows of one rank shows."""
    wanted, found = parts(alone, piece), parts(ranks[0], piece)
    assert wanted.keys() == found.keys()
    for name in wanted:
        size = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-10 * max(1.0, size), err_msg=name)


def test_blocks_of_several_ranks_climb_to_the_same_maximum(alone, ranks):
    """Blocks hold other rows than those of one process, so that only the end is the same."""
    wanted, found = parts(alone, "gmm_incremental"), parts(ranks[0], "gmm_incremental")
    for name in wanted.keys() - {"history"}:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("piece", SVI_PIECES)
def test_svi_on_shards_is_svi_on_all_rows(alone, ranks, piece):
    """Losses, parameters, ELBO: gradients that are not weighed by rows, or a prior counted twice, show in the first steps."""
    wanted, found = parts(alone, piece), parts(ranks[0], piece)
    assert wanted.keys() == found.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-8, atol=1e-8, err_msg=name)


def test_batches_of_several_ranks_find_the_least_squares(ranks):
    """Ranks that drew the same rows, or weighed them wrongly, would end elsewhere than the exact answer."""
    X, y = (v.numpy() for v in ranks_work.lines().values())
    exact = np.linalg.solve(X.T @ X, X.T @ y)
    np.testing.assert_allclose(parts(ranks[0], "svi_batches")["w"].mean(0), exact, atol=0.02)


def test_networks_are_averaged_and_rows_put_together(alone, ranks):
    """The same bound as one process reaches, and draws of all 2,000 rows in their order."""
    wanted, found = parts(alone, "svi_network"), parts(ranks[0], "svi_network")
    assert found["z"].shape == wanted["z"].shape == (50, 2000, 2)
    assert abs(float(found["elbo"]) - float(wanted["elbo"])) < 0.01 * abs(float(wanted["elbo"]))
    x = ranks_work.factors().numpy()
    guess = x @ found["encoder.weight"].T + found["encoder.bias"]
    np.testing.assert_allclose(found["z"].mean(0), guess, atol=0.6)  # the scale of z is about 0.3, of 50 draws 0.05


@pytest.mark.parametrize("piece", CHAINS)
def test_chains_draw_the_same_wherever_they_run(alone, ranks, piece):
    """Chain by chain, draw by draw: a chain that takes another one's random numbers, or a wrong order, shows at once."""
    wanted, found = parts(alone, piece), parts(ranks[0], piece)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_every_rank_has_the_same_answer(ranks):
    """To the last bit: nothing is fitted on one rank alone."""
    for other in ranks[1:]:
        for name, value in ranks[0].items():
            assert np.array_equal(value, other[name], equal_nan=True), name
