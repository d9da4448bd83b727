"""Several processes under torchrun against one: the same numbers, whatever the shards; see `ranks_work.py`."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks_work
import torch

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
TOPICS = ["topics", "topics_own"]
RESUMED = ["svi_goes_on", "hmc_goes_on"]
QUICK = [
    *EM_PIECES,
    *CHAINS,
    "alike",
    "faults",
    "gmm_incremental",
    *SVI_PIECES,
    "svi_batches",
    "svi_network",
    *RESUMED,
    *TOPICS,
]


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
def folder(tmp_path_factory):
    """Where pieces leave their files."""
    with pytest.MonkeyPatch.context() as patch:
        found = tmp_path_factory.mktemp("files")
        patch.setenv("RANKS_FOLDER", str(found))
        yield found


@pytest.fixture(scope="module")
def alone(folder):
    """Results of one process: this one."""
    found = ranks_work.work(QUICK)
    return {f"{name}/{key}": np.asarray(v) for name, part in found.items() for key, v in part.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, alone):
    """Results of two ranks (all pieces in one run), or of three (those that are asked for)."""
    kept: dict[tuple, list[dict[str, np.ndarray]]] = {}

    def results(size: int, names: list[str]) -> list[dict[str, np.ndarray]]:
        names = QUICK if size == 2 else names
        if (size, *names) not in kept:
            kept[size, *names] = together(size, tmp_path_factory.mktemp("ranks"), names)
        return kept[size, *names]

    return results


@pytest.fixture(scope="module", params=[2, 3])
def em_ranks(request, run):
    """EM on two and on three ranks."""
    return run(request.param, EM_PIECES)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, run):
    """All the rest."""
    return run(request.param, [n for n in QUICK if n not in EM_PIECES])


def parts(results: dict[str, np.ndarray], piece: str) -> dict[str, np.ndarray]:
    return {k.split("/", 1)[1]: v for k, v in results.items() if k.startswith(f"{piece}/")}


@pytest.mark.parametrize("piece", EM_PIECES)
def test_em_on_shards_is_em_on_all_rows(alone, em_ranks, piece):
    """A prior that counts twice, a row that is left out, or a start from the own rows of one rank shows."""
    wanted, found = parts(alone, piece), parts(em_ranks[0], piece)
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


@pytest.mark.parametrize("piece", RESUMED)
def test_ranks_go_on_from_where_one_process_stopped(alone, ranks, piece):
    """The answer of the run that nobody disturbed: lost moments, rows of another rank, another random stream would show."""
    wanted, found = parts(alone, piece), parts(ranks[0], piece)
    assert wanted.keys() == found.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.processor  # the processes of ranks run there, too
def test_one_process_goes_on_from_where_ranks_stopped(alone, ranks, folder):
    """The file of several ranks holds the rows of all."""
    for name, call in ranks_work.svi_fits().items():
        path = folder / f"{name}.{len(ranks)}"
        assert path.exists()
        found = ranks_work.result(call(path))
        for key, value in found.items():
            wanted = parts(alone, "svi_goes_on")[f"{name}/{key}"]
            np.testing.assert_allclose(value, wanted, rtol=1e-8, atol=1e-8, err_msg=f"{name} {key}")


def test_topics_of_documents_held_apart(alone, ranks):
    """Full passes are those of one process, but for rounding in single precision; runs side by side end as high."""
    wanted, found = parts(alone, "topics"), parts(ranks[0], "topics")
    for name in ("phi", "alpha", "eta", "theta"):
        np.testing.assert_allclose(found[f"batch/{name}"], wanted[f"batch/{name}"], rtol=1e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(found["batch/history"], wanted["batch/history"], rtol=1e-6)
    assert found["stepwise/theta"].shape == wanted["stepwise/theta"].shape
    assert found["stepwise/history"][-1] > wanted["stepwise/history"][-1] - 0.002 * abs(wanted["stepwise/history"][-1])
    bound, own = (float(parts(r, "topics_own")["elbo"]) for r in (alone, ranks[0]))
    assert abs(own / bound - 1) < 0.01, (own, bound)


def test_what_cannot_be_shared_is_done_by_all(alone, ranks):
    """Not half of the rows by each."""
    for name, value in parts(alone, "alike").items():
        np.testing.assert_allclose(parts(ranks[0], "alike")[name], value, rtol=1e-9, err_msg=name)


def test_faults_are_told_on_every_rank(ranks):
    """Each with what to do; nobody is left waiting for a rank that has stopped."""
    wanted = {
        "different": "ValueError: the ranks were given different data.*ranks='own'",
        "columns": "ValueError: ranks='own': the rows of rank 1 do not fit those of rank 0.*3.*2",
        "latent": "ValueError: ranks='own': the derived guide has a latent 'z' for every row",
        "chains": "ValueError: ranks='own': nuts does not share out rows.*ranks='split'",
        "word": "ValueError.*must be one of 'split', 'own', 'alone'",
    }
    for found in ranks:
        texts = {name: bytes(value.tolist()).decode() for name, value in parts(found, "faults").items()}
        for name, text in wanted.items():
            assert re.match(text, texts[name]), texts[name]
    first, last = (bytes(parts(r, "faults")["one rank"].tolist()).decode() for r in (ranks[0], ranks[-1]))
    assert last == "ValueError: rows beyond a million"
    assert first.startswith(f"RuntimeError: rank {len(ranks) - 1} of {len(ranks)} failed") and "a million" in first


def test_the_command_line_speaks_once(tmp_path):
    """One summary and one file, from the first of two processes."""
    np.save(tmp_path / "x.npy", ranks_work.clusters().numpy())
    words = ["-m", "zoo", "fit", "GMM", "--data", tmp_path / "x.npy", "--method", "em", "--seed", "1"]
    kept = tmp_path / "kept"
    done = torchrun(2, *words, "--set", "num_components=3", "--save", kept)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("point by EM, seed 1") == 1 and kept.exists()


@pytest.mark.slow
def test_the_command_line_tells_an_error_once(tmp_path):
    """Both processes meet it."""
    bad = torchrun(2, "-m", "zoo", "fit", "GMM", "--data", "iris", "--set", "num_components=0")
    assert bad.returncode != 0 and bad.stderr.count("zoo: ") == 1, bad.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_are_one_processor(alone, tmp_path, monkeypatch):
    """Sums through NCCL, starts and random states through gloo: the numbers of the CPU but for rounding."""
    monkeypatch.setenv("RANKS_DEVICE", "cuda")
    found = together(2, tmp_path, ["gmm", "svi_params"])
    for name, value in parts(alone, "gmm").items():
        np.testing.assert_allclose(parts(found[0], "gmm")[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    exact = parts(alone, "svi_params")["w"].mean(0)  # other random numbers
    np.testing.assert_allclose(parts(found[0], "svi_params")["w"].mean(0), exact, atol=0.05)
    assert all(np.array_equal(found[0][k], found[1][k]) for k in found[0])


def worker(rank: int, size: int, port: int, folder: Path, pause: float, piece: str = "lasting") -> subprocess.Popen:
    """One rank of a piece that lasts, without torchrun to look after it."""
    told = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANKS_PAUSE": pause}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "ranks_work.py"), str(folder), piece],
        env={**environment(), **{k: str(v) for k, v in told.items()}, "RANKS_FOLDER": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(condition, seconds: float) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def reached(folder: Path) -> int:
    """Iterations done so far."""
    file = folder / "iteration"
    return int(file.read_text() or 0) if file.exists() else -1


def check_answer(folder: Path, size: int, wanted: dict[str, np.ndarray], piece: str = "lasting") -> None:
    found = dict(np.load(folder / f"{size}-0.npz"))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[f"{piece}/{name}"], value, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["lasting", "lasting_svi"])
def test_the_death_of_a_rank_ends_the_others_and_two_go_on(piece, tmp_path, monkeypatch):
    """Survivors notice by themselves, say so once each, and leave a checkpoint from which fewer ranks reach the same end."""
    monkeypatch.setenv("RANKS_FOLDER", str(tmp_path / "alone"))
    (tmp_path / "alone").mkdir()
    wanted = {k: np.asarray(v) for k, v in ranks_work.work([piece])[piece].items()}
    folder = tmp_path / "three"
    folder.mkdir()
    port = free_port()
    ranks = [worker(r, 3, port, folder, 0.2, piece) for r in range(3)]
    try:
        assert until(lambda: reached(folder) >= 12, 120)
        ranks[1].kill()
        texts = [ranks[r].communicate(timeout=30)[1] for r in (0, 2)]
    finally:
        for process in ranks:
            process.kill()
    assert all(ranks[r].returncode not in (0, None) for r in (0, 2))
    assert all("RankError" in text and "lost another rank" in text for text in texts), texts
    assert (folder / "state").exists()
    before = reached(folder)
    pair = [worker(r, 2, port + 1, folder, 0.0, piece) for r in range(2)]
    assert [p.wait(120) for p in pair] == [0, 0], pair[0].stderr.read()[-2000:]
    assert before >= 12
    check_answer(folder, 2, wanted, piece)


@pytest.mark.slow
def test_chains_go_on_with_another_number_of_ranks(tmp_path, monkeypatch):
    """Three ranks keep four chains, one dies, two go on: the draws of a run that nobody disturbed, and no file is left."""
    (tmp_path / "alone").mkdir()
    monkeypatch.setenv("RANKS_FOLDER", str(tmp_path / "alone"))
    wanted = ranks_work.work(["lasting_chains"])["lasting_chains"]
    folder = tmp_path / "three"
    folder.mkdir()
    monkeypatch.setenv("RANKS_FOLDER", str(folder))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    run = subprocess.Popen(
        [*command, str(ROOT / "tests" / "ranks_work.py"), str(folder), "lasting_chains"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert until(lambda: all((folder / f"chains.{r}").exists() for r in range(3)), 200)
    os.kill(int((folder / "1.pid").read_text()), signal.SIGKILL)
    assert run.wait(60) != 0
    done = torchrun(2, ROOT / "tests" / "ranks_work.py", folder, "lasting_chains")
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(np.load(folder / "2-0.npz"))
    for name, value in wanted.items():
        assert np.array_equal(found[f"lasting_chains/{name}"], value), name
    assert not list(folder.glob("chains*"))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_rank_killed_at_any_moment(trial, tmp_path, monkeypatch):
    """Under torchrun: from joining to the last iteration; all are gone within 30 s, and any number of ranks goes on."""
    monkeypatch.setenv("RANKS_FOLDER", str(tmp_path))
    monkeypatch.setenv("RANKS_PAUSE", "0.05")
    chance = random.Random(trial)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    run = subprocess.Popen(
        [*command, str(ROOT / "tests" / "ranks_work.py"), str(tmp_path), "lasting"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    files = [tmp_path / f"{r}.pid" for r in range(3)]
    assert until(lambda: all(f.exists() and f.read_text() for f in files), 120)
    pids = [int(f.read_text()) for f in files]
    time.sleep(chance.uniform(0.0, 6.0))
    victim = chance.randrange(3)
    try:
        os.kill(pids[victim], signal.SIGKILL)
    except ProcessLookupError:  # it had come to its end
        assert run.wait(60) == 0
        return
    began = time.monotonic()
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30), "a survivor is still there"
    assert run.wait(60) != 0 and time.monotonic() - began < 60
    monkeypatch.setenv("RANKS_PAUSE", "0")
    size = chance.choice([2, 3])
    done = torchrun(size, ROOT / "tests" / "ranks_work.py", tmp_path, "lasting")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.setenv("RANKS_FOLDER", str(alone))
    check_answer(tmp_path, size, {k: np.asarray(v) for k, v in ranks_work.work(["lasting"])["lasting"].items()})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "svi", "params", "hmc", "nuts", "lda"])
def test_survivors_of_a_rank_end_by_themselves(method):
    """No torchrun looks after them: a few kills of `faults/rank_kills.py`, resumed by two, three and one process."""
    command = [sys.executable, str(ROOT / "tests" / "faults" / "rank_kills.py"), "3", method]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert done.returncode == 0 and "every answer equal" in done.stdout, done.stdout + done.stderr[-2000:]


def same_everywhere(results: list[dict[str, np.ndarray]]) -> None:
    first, *others = results
    for other in others:
        for name in first.keys() - {"faults/one rank"}:
            assert np.array_equal(first[name], other[name], equal_nan=True), name


def test_every_rank_has_the_same_answer_of_em(em_ranks):
    """To the last bit: nothing is fitted on one rank alone."""
    same_everywhere(em_ranks)


def test_every_rank_has_the_same_answer_of_all_else(ranks):
    """To the last bit: draws, networks, statistics."""
    same_everywhere(ranks)
