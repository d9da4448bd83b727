"""Plant an error in a copy of the project and see whether the test that should notice turns red.

    python tests/mutations.py [name ...]

A suite that stays green whatever the code does proves nothing. Every mutation is one change of the source, and names the
test that must fail with it and pass without.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """`before` becomes `after` in `file`; `test` must notice."""

    name: str
    file: str
    before: str
    after: str
    test: str


MUTATIONS = (
    Mutation(
        "dropped Jacobian",
        "inference/transforms.py",
        "    return transform.log_abs_det_jacobian(u, value).sum()\n",
        "    return u.new_zeros(())\n",
        "tests/test_joint.py::test_jacobian_is_the_difference_of_the_two_densities",
    ),
    Mutation(
        "forgotten N/B in the density",
        "inference/joint.py",
        "sum_out(outside, set())[0] + scale * rows.sum()",
        "sum_out(outside, set())[0] + rows.sum()",
        "tests/test_joint.py::test_scaled_batches_average_to_the_whole",
    ),
    Mutation(
        "forgotten N/B in the batches",
        "inference/methods/batches.py",
        "self.scale = 1.0 if self.size is None else self.rows / self.size",
        "self.scale = 1.0",
        "tests/test_svi.py::test_batches_average_to_the_whole",
    ),
    Mutation(
        "prior draws for the posterior",
        "inference/methods/sampling.py",
        "    draws = {n: v.double().cpu() for n, v in constrain_many(joint, flat).items()}\n",
        "    prior = [joint.prior_draw() for _ in flat]\n"
        "    draws = {n: torch.stack([p[n] for p in prior]).double().cpu() for n in prior[0]}\n",
        "tests/test_honest_draws.py::test_mean_and_spread_are_those_of_algebra[nuts]",
    ),
    Mutation(
        "sd x 0.8 of a sampler",
        "inference/methods/sampling.py",
        "    draws = {n: v.double().cpu() for n, v in constrain_many(joint, flat).items()}\n",
        "    flat = flat.mean(0) + 0.8 * (flat - flat.mean(0))\n"
        "    draws = {n: v.double().cpu() for n, v in constrain_many(joint, flat).items()}\n",
        "tests/test_honest_draws.py::test_mean_and_spread_are_those_of_algebra[hmc]",
    ),
    Mutation(
        "sd x 0.8 of a guide",
        "inference/methods/gaussian.py",
        '    scale, lower = q["log_scale"].exp(), q["lower"].tril(-1)\n    z = q["loc"]',
        '    scale, lower = q["log_scale"].exp(), q["lower"].tril(-1)\n    scale = 0.8 * scale\n    z = q["loc"]',
        "tests/test_svi.py::test_gaussian_posterior_and_evidence_are_met[full_rank]",
    ),
    Mutation(
        "one chain stuck",
        "inference/methods/nuts.py",
        "return np.stack([r.positions for r in records]), stacked(records, count), []",
        "return np.stack([r.positions if i else 0 * r.positions + r.positions[:1] for i, r in enumerate(records)]), "
        "stacked(records, count), []",
        "tests/test_honest_draws.py::test_every_chain_moves_and_they_agree[nuts]",
    ),
    Mutation(
        "swapped labels",
        "inference/labels.py",
        "    for name, where in axes.items():\n        for axis in where:\n"
        "            result[name] = result[name].index_select",
        "    for name, where in list(axes.items())[1:]:\n        for axis in where:\n"
        "            result[name] = result[name].index_select",
        "tests/test_honest_draws.py::test_components_keep_one_number_in_every_site",
    ),
    Mutation(
        "a column for a vector taken in silence",
        "inference/shapes.py",
        "    if found == wanted:\n        return\n",
        "    if found[:1] == wanted[:1]:\n        return\n",
        "tests/faults/test_faults_types.py::test_a_column_for_a_vector_is_refused",
    ),
    Mutation(
        "a state resumed without its checksum",
        "inference/saved_state.py",
        "        if checksum(tensors, text) != sha256:\n",
        "        if False:\n",
        "tests/faults/test_faults_files.py::test_a_damaged_state_is_refused_and_the_one_before_offered",
    ),
    Mutation(
        "a second opinion that is never asked",
        "inference/crosscheck.py",
        "    theirs = answered(problem, partner.method, progress, partner.seconds)\n",
        "    theirs = mine\n",
        "tests/test_cross_check.py::test_a_shift_is_measured_in_posterior_sd[0.8]",
    ),
    Mutation(
        "components compared in the order they came",
        "inference/agreement.py",
        "        ours = matched(ours, theirs, axes)\n",
        "        pass\n",
        "tests/test_cross_check.py::test_numbering_of_components_is_no_disagreement",
    ),
    Mutation(
        "bias with the wrong sign",
        "inference/calibration.py",
        'return "underestimated" if self.shares(name).mean() > 0.5',
        'return "underestimated" if self.shares(name).mean() < 0.5',
        "tests/test_vsbc.py::test_the_direction_is_named[high]",
    ),
)


def copy_to(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in ("inference", "zoo", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def passes(folder: Path, test: str) -> bool:
    """Whether a test passes on the sources in `folder`.

    Raises
    ------
    RuntimeError
        There is no such test, or it could not be run.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def survives(mutation: Mutation) -> str:
    """What is wrong with the suite: nothing where the test turns red with the error and is green without."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_to(Path(name))
        if not passes(folder, mutation.test):
            return "the test fails without the error too"
        path = folder / mutation.file
        source = path.read_text()
        if source.count(mutation.before) != 1:
            return f"{mutation.file} holds the line {source.count(mutation.before)} times: {mutation.before!r}"
        path.write_text(source.replace(mutation.before, mutation.after))
        return "the test does not notice" if passes(folder, mutation.test) else ""


def main(names: list[str]) -> int:
    """One line a mutation; 1 where one survives."""
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    alive = 0
    for mutation in chosen:
        trouble = survives(mutation)
        alive += bool(trouble)
        print(f"{mutation.name:<34} {trouble or 'turns red':<12} {mutation.test}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} planted errors turn a test red")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
