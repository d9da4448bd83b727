"""Kill one of several processes of a fit at a random moment, go on with another number of them, and compare the answer.

    python tests/faults/rank_kills.py [kills [seed]] [--ranks 3] [--json FILE] [method ...]     20 kills of each by default

Every kill is a SIGKILL of one rank between joining and the end.  Nothing looks after the others (there is no torchrun to end
them): they have to notice by themselves, say so, and end.  The fit then goes on from what is left of it, on two, three or one
process in turn, and has to come to the answer of one process that nobody disturbed.
"""

import argparse
import faulthandler
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
#: Seconds that a survivor may need to end.
PATIENCE = 30.0
#: How many processes go on, in turn.
NEXT = (2, 3, 1)


def clusters() -> torch.Tensor:
    """2,000 rows of three columns in three clusters."""
    g = torch.Generator().manual_seed(0)
    z = torch.randint(0, 3, (2000,), generator=g)
    return 4.0 * torch.randn(3, 3, generator=g, dtype=torch.float64)[z] + torch.randn(
        2000, 3, generator=g, dtype=torch.float64
    )


def schools() -> dict[str, torch.Tensor]:
    import stories

    return {n: torch.tensor(v, dtype=torch.float64) for n, v in stories.SCHOOLS.items()}


def words() -> dict[str, torch.Tensor]:
    """Counts of the hundred commonest words of a corpus."""
    from zoo import load_corpus

    return {"w": torch.from_numpy(load_corpus().pruned(most=100).counts.toarray()).double()}


def em(path: Path) -> object:
    """Sums of a mixture, two restarts."""
    from inference import EM, fit
    from zoo import GMM

    method = EM(restarts=2, max_iter=60, tol=0.0, checkpoint=path, callback=lambda *_: time.sleep(0.02))
    return fit(GMM(num_components=3), clusters(), method, seed=1)


def unhurried() -> None:
    """Steps of SVI that take their time, most of a fit, and are kept."""
    from inference.methods import ascent, climb_file

    climb_file.ClimbFile.every = 0.0
    step = ascent.Ascent.step

    def slow(self: object) -> None:
        step(self)
        time.sleep(0.01)

    ascent.Ascent.step = slow


def svi(path: Path) -> object:
    """A derived guide on full batches."""
    import stories

    from inference import SVI, fit

    unhurried()
    method = SVI(steps=120, starts=2, particles=2, guide="mean_field", mode="eager", checkpoint=path)
    return fit(stories.normal_mixture, clusters()[:, 0], method, seed=1)


def params(path: Path) -> object:
    """Functions with `pyro.param`, a guide of the story's own."""
    import ranks_work

    from inference import SVI, fit

    unhurried()
    method = SVI(guide="story", steps=200, starts=1, draws=100, mode="eager", checkpoint=path)
    return fit(ranks_work.line, ranks_work.lines(), method, guide=ranks_work.line_guide, seed=1)


def hmc(path: Path) -> object:
    """Chains that learn from each other at every iteration."""
    import stories

    from inference import HMC, fit
    from inference.methods import hmc_file

    hmc_file.EVERY = 0.05
    return fit(
        stories.eight_schools, schools(), HMC(chains=5, warmup=60, draws=40, backend="graph", checkpoint=path), seed=1
    )


def nuts(path: Path) -> object:
    """Chains that move apart and meet at the end."""
    import stories

    from inference import NUTS, fit
    from inference.methods import nuts as module

    module.EVERY = 0.05
    return fit(
        stories.eight_schools, schools(), NUTS(chains=3, warmup=40, draws=30, backend="graph", checkpoint=path), seed=1
    )


def lda(path: Path) -> object:
    """Expected counts of words in topics, documents held apart."""
    from inference import EM, fit
    from inference.topics import pass_file
    from zoo import LDA

    pass_file.EVERY = 0.05
    method = EM(restarts=1, max_iter=20, tol=1e-300, driver="batch", checkpoint=path)
    return fit(LDA(4, None, None), words(), method, seed=1)


#: Fit, and how far its answer may be from that of one process: relative to the largest number of a site.
FITS: dict[str, tuple[Callable[[Path], object], float]] = {
    "em": (em, 1e-10),
    "svi": (svi, 1e-8),
    "params": (params, 1e-8),
    "hmc": (hmc, 1e-9),
    "nuts": (nuts, 0.0),
    "lda": (lda, 1e-3),  # counted in single precision, run by run
}


def rank(name: str, folder: Path, number: int, size: int, port: int) -> None:
    """What one process does."""
    if size > 1:
        told = {"RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({n: str(v) for n, v in told.items()})
    torch.set_num_threads(1)
    with open(folder / f"said.{number}", "wb") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    from inference.distributed import leave

    module = importlib.import_module("inference.fit")
    join = module.start

    def joined(share: str) -> object:
        found = join(share)
        (folder / f"joined.{number}").touch()
        return found

    module.start = joined
    posterior = FITS[name][0](folder / "state")
    history = {"history": np.asarray(posterior.history)}
    np.savez(folder / f"answer.{number}.npz", **{n: v.numpy() for n, v in posterior.draws.items()}, **history)
    leave()


def begun(name: str, folder: Path, size: int) -> list[BaseProcess]:
    """All ranks of a fit, forked so that nothing has to be imported again."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank, args=(name, folder, r, size, port)) for r in range(size)]
    for process in processes:
        process.start()
    return processes


def whole(name: str, folder: Path, size: int) -> dict[str, np.ndarray]:
    """The answer of the first of `size` ranks that come to the end; all have the same."""
    processes = begun(name, folder, size)
    for process in processes:
        process.join(300)
    codes = [p.exitcode for p in processes]
    assert codes == [0] * size, f"{name} on {size} ended with {codes}: " + (folder / "said.0").read_text()[-2000:]
    answers = [dict(np.load(folder / f"answer.{r}.npz")) for r in range(size)]
    for other in answers[1:]:
        assert all(np.array_equal(answers[0][n], other[n], equal_nan=True) for n in answers[0]), "ranks differ"
    return answers[0]


def deviation(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest number of its site."""
    assert found.keys() == wanted.keys(), (sorted(found), sorted(wanted))
    if any(found[n].shape != wanted[n].shape for n in wanted):
        return float("inf")
    some = {n: v for n, v in wanted.items() if v.size}
    return max(float(np.abs(found[n] - v).max() / max(1.0, np.abs(v).max())) for n, v in some.items())


@dataclass
class Tally:
    """What kills of one method came to.

    Attributes
    ----------
    waits
        Seconds that each survivor needed to end.
    deviations
        Of every answer from that of one process.
    wrong
        What should not have been.
    resumed
        Fits that found a checkpoint.
    """

    name: str
    waits: list[float] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    resumed: int = 0

    def line(self) -> str:
        """One row of the table."""
        worst = max(self.deviations, default=0.0)
        return (
            f"{self.name:<7}{self.kills:>6}{statistics.median(self.waits):>9.2f}{max(self.waits):>9.2f}{self.resumed:>9}"
            f"{len(self.deviations):>9}{worst:>11.1e}   {'; '.join(sorted(set(self.wrong))) or 'every answer equal'}"
        )


HEAD = f"{'method':<7}{'kills':>6}{'median s':>9}{'most s':>9}{'resumed':>9}{'answers':>9}{'deviation':>11}"


def killed(name: str, kills: int, seed: int = 0, size: int = 3) -> Tally:
    """Kill a random rank at a random moment, wait for the others, go on; `kills` times."""
    chance, tally = random.Random(f"{name} {seed}"), Tally(name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "alone").mkdir()
        wanted = whole(name, folder / "alone", 1)
        (folder / "several").mkdir()
        began = time.perf_counter()
        tally.deviations.append(deviation(whole(name, folder / "several", size), wanted))
        took = time.perf_counter() - began
        while tally.kills < kills:
            trial = folder / f"trial{tally.kills}"
            trial.mkdir(exist_ok=True)
            if not one_kill(name, trial, chance.uniform(0.0, 1.0) * took, chance.randrange(size), size, tally):
                continue
            tally.resumed += any(trial.glob("state*"))
            goes_on = NEXT[(tally.kills - 1) % len(NEXT)]
            found = whole(name, trial, goes_on)
            tally.deviations.append(deviation(found, wanted))
            print(f"{name} {tally.kills}: {tally.waits[-2:]}, {tally.deviations[-1]:.1e}", file=sys.stderr, flush=True)
            if name != "em" and any(trial.glob("state*")):  # EM leaves its file, so that max_iter may be raised
                tally.wrong.append("the checkpoint of a fit that has ended is left")
        if not max(tally.deviations) <= FITS[name][1]:
            tally.wrong.append(f"answers differ by {max(tally.deviations):.1e}")
    return tally


def one_kill(name: str, folder: Path, after: float, victim: int, size: int, tally: Tally) -> bool:
    """Whether the kill met a running rank; the survivors are waited for, and what they leave is judged."""
    processes = begun(name, folder, size)
    try:
        while not all((folder / f"joined.{r}").exists() for r in range(size)):
            assert all(p.is_alive() for p in processes), (folder / "said.0").read_text()[-2000:]
            time.sleep(0.005)
        time.sleep(after)
        survivors = [p for r, p in enumerate(processes) if r != victim]
        if not all(p.is_alive() for p in processes):  # too late: it came to its end
            for process in processes:
                process.join(60)
            for path in folder.iterdir():
                path.unlink()
            return False
        processes[victim].kill()
        began = time.perf_counter()
        tally.kills += 1
        ended: dict[int, float] = {}
        while len(ended) < len(survivors) and time.perf_counter() - began < PATIENCE:
            for i, process in enumerate(survivors):
                if i not in ended and not process.is_alive():
                    ended[i] = time.perf_counter() - began
            time.sleep(0.01)
        tally.waits += [ended.get(i, PATIENCE) for i in range(len(survivors))]
        if len(ended) < len(survivors):
            left = next(p for i, p in enumerate(survivors) if i not in ended)
            os.kill(left.pid or 0, signal.SIGUSR1)
            time.sleep(1.0)
            stack = (folder / f"said.{processes.index(left)}").read_text()
            tally.wrong.append(f"survivors are still there after {PATIENCE:g} s: {stack}")
        for i, process in enumerate(survivors):
            number = processes.index(process)
            said = (folder / f"said.{number}").read_text() if (folder / f"said.{number}").exists() else ""
            done = process.exitcode == 0 and (folder / f"answer.{number}.npz").exists()
            if i in ended and not done and (process.exitcode == 0 or "RankError" not in said):
                tally.wrong.append(f"a survivor ended with {process.exitcode} and no RankError: {said[-300:]!r}")
        return True
    finally:
        for process in processes:
            process.kill()
            process.join()


def main(arguments: list[str]) -> int:
    """Print a row for each method; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description="Kill one of several ranks at random moments, and go on.")
    parser.add_argument("words", nargs="*", help=f"kills, seed, methods of {', '.join(FITS)}")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    given = [int(a) for a in asked.words if a.isdigit()]
    methods = [a for a in asked.words if not a.isdigit()] or list(FITS)
    if unknown := [m for m in methods if m not in FITS]:
        parser.error(f"{unknown[0]!r} is no method; there are {', '.join(FITS)}")
    kills, seed = (*given, *(20, 0)[len(given) :])[:2]
    prepare()
    print(HEAD)
    tallies = []
    for method in methods:
        tallies.append(killed(method, kills, seed, asked.ranks))
        print(tallies[-1].line(), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([vars(t) for t in tallies], indent=1) + "\n")
    return int(any(t.wrong for t in tallies))


def prepare() -> None:
    """Import before the forks what every rank needs."""
    torch.set_num_threads(1)
    for place in (ROOT / "tests", ROOT):
        sys.path.insert(0, str(place))
    import ranks_work  # noqa: F401
    import stories  # noqa: F401

    import inference.methods  # noqa: F401


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
