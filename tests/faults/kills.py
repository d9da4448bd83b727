"""Kill a fit at random moments until it is through, and compare its answer with that of one that nobody killed.

    python tests/faults/kills.py [kills [seed]] [method ...]     methods: em, nuts, svi, saves; 50 kills each by default

Every kill is a SIGKILL: nothing in the process can prepare for it. Fits go on from their checkpoint and must end with the
same bits; saves must leave the old file or the new one, whole.
"""

import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

METHODS = ("em", "nuts", "svi", "saves")
ROOT = Path(__file__).parents[2]


def work(method: str, folder: Path, checkpoint: bool) -> None:
    """What the child does: one fit, its answer written at the end; or one save after another for ever."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stories import gaussian_mixture, normal_mixture

    from inference import EM, NUTS, SVI, fit

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(20, generator=generator) - 2, torch.randn(20, generator=generator) + 2]).double()
    path = folder / "state" if checkpoint else None
    if method == "saves":
        data = x.reshape(-1, 2)
        answers = [fit(gaussian_mixture, data, EM(restarts=1, max_iter=n), seed=0) for n in (2, 30)]
        while True:
            for answer in answers:
                answer.save(folder / "answer")
                (folder / "begun").touch()  # from here on there is a file to lose
    if method == "em":
        options = EM(restarts=2, tol=0.0, max_iter=60, checkpoint=path)
    elif method == "nuts":
        import inference.methods.nuts
        import inference.methods.snapshots

        inference.methods.nuts.EVERY = inference.methods.snapshots.EVERY = 0.02
        options = NUTS(chains=2, warmup=150, draws=150, backend="graph", checkpoint=path)
    else:
        from inference.methods.climb_file import ClimbFile

        ClimbFile.every = 0.02
        options = SVI(steps=600, starts=2, schedule="constant", checkpoint=path)
    posterior = fit(normal_mixture, x, options, seed=0)
    posterior.save(folder / "answer")


def child(method: str, folder: Path, checkpoint: bool) -> multiprocessing.process.BaseProcess:
    """The work in a process of its own, forked so that nothing has to be imported again."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(method, folder, checkpoint))
    process.start()
    return process


def killed(method: str, kills: int, seed: int = 0) -> tuple[int, int, list[str]]:
    """Kills that met a running fit, fits completed, and what was not that of an unbroken run."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (whole := folder / "whole").mkdir()
        (broken := folder / "broken").mkdir()
        began = time.perf_counter()
        process = child(method, whole, False)
        process.join()
        assert process.exitcode == 0, "the unbroken fit failed"
        took = time.perf_counter() - began
        wanted, done, met, wrong = numbers(whole / "answer"), 0, 0, []
        while met < kills or not done:
            process = child(method, broken, True)
            process.join(rng.uniform(0.1, 0.8) * took if met < kills else 600)
            if process.exitcode is None:
                process.kill()
                process.join()
                met += 1
                continue
            assert process.exitcode == 0, f"the resumed fit failed with {process.exitcode}"
            done += 1
            found = numbers(broken / "answer")
            wrong += [
                n for n in {*wanted, *found} if n not in wanted or n not in found or not same(wanted[n], found[n])
            ]
            for path in broken.iterdir():
                path.unlink()
        return met, done, sorted(set(wrong))


def saves_killed(kills: int, seed: int = 0) -> tuple[int, int, list[str]]:
    """Kills between and within saves, files read, and what was neither of the two answers."""
    from inference.checkpoint import read

    rng, met, seen = random.Random(seed), 0, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(kills):
            (folder / "begun").unlink(missing_ok=True)
            process = child("saves", folder, True)
            while not (folder / "begun").exists():
                time.sleep(0.01)
                assert process.is_alive()
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            process.join()
            met += 1
            tensors, card = read(folder / "answer")  # raises where the file is lost or not whole
            seen.setdefault(len(card["history"]), []).append(float(tensors["draws/mu"].sum()))
    mixed = [f"answer of {n} iterations" for n, values in seen.items() if len(set(values)) > 1 or len(seen) > 2]
    return met, sum(map(len, seen.values())), mixed


def numbers(path: Path) -> dict[str, torch.Tensor]:
    """Draws in a saved answer."""
    from inference.checkpoint import read

    return {n: v for n, v in read(path)[0].items() if n.startswith(("draws/", "stats/"))}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit; no number is equal to no number."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def main(arguments: list[str]) -> int:
    """Print a line for each method and one for all; 1 where anything differs."""
    torch.set_num_threads(1)
    given = [int(a) for a in arguments if a.isdigit()]
    methods = [a for a in arguments if not a.isdigit()] or list(METHODS)
    if unknown := [m for m in methods if m not in METHODS]:
        print(f"{unknown[0]!r} is no method; there are {', '.join(METHODS)}", file=sys.stderr)
        return 2
    kills, seed = (*given, *(50, 0)[len(given) :])[:2]
    total, answers, bad = 0, 0, 0
    for method in methods:
        met, done, wrong = saves_killed(kills, seed) if method == "saves" else killed(method, kills, seed)
        total, answers, bad = total + met, answers + done, bad + bool(wrong)
        print(
            f"{method:<6} {met} kills, {done} answers: {'differ in ' + ', '.join(wrong) if wrong else 'all equal'}",
            flush=True,
        )
    what = f"{bad} methods lost or mixed something" if bad else "no file lost or mixed, every resume equal"
    print(f"{total} kills at random moments (seed {seed}), {answers} answers: {what}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
