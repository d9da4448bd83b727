"""Files that are broken, foreign or hostile, and disks that cannot be written."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import kills
import pytest
import torch
from fault_stories import ALL, QUICK, WORDS, X, answer, real
from fault_table import row
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from stories import normal_mixture

from inference import EM, NUTS, SVI, CheckpointError, fit, load
from inference.checkpoint import checksum
from inference.saved_state import SavedState
from zoo import GMM, read, read_corpus

Y = torch.cat([X[:, 0] - 2, X[:, 1] + 2])
STORY = GMM(2, covariance="diag")
KEPT = {
    "em": EM(restarts=2, tol=0.0, max_iter=40),
    "svi": SVI(steps=150, starts=1, draws=50, schedule="constant"),
    "nuts": NUTS(chains=2, warmup=90, draws=10, dense_mass=True, backend="graph"),
}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Checkpoints are written at every occasion."""
    from inference.methods.climb_file import ClimbFile

    monkeypatch.setattr("inference.methods.nuts.EVERY", 0.05)
    monkeypatch.setattr(ClimbFile, "every", 0.0)
    monkeypatch.setattr("os.fsync", lambda handle: None)  # a thousand files in a test need not reach the disk


def kept(method, path):
    """The method with a checkpoint."""
    from dataclasses import replace

    return replace(KEPT[method], checkpoint=path)


def states(method, folder, monkeypatch):
    """Three copies of the checkpoint of an unbroken fit, made on the way, and the fit."""
    write, copies = SavedState.write, []

    def copying(self, tensors, card):
        write(self, tensors, card)
        copying.count += 1
        if self.path.name == "whole":  # other restarts have files of their own
            copies.append(Path(shutil.copy(self.path, folder / f"copy{copying.count:06d}")))

    copying.count = 0
    with monkeypatch.context() as patch:
        patch.setattr(SavedState, "write", copying)
        posterior = fit(normal_mixture, Y, kept(method, folder / "whole"), seed=0)
    return [copies[len(copies) * i // 4] for i in (1, 2, 3)], posterior


@row("killed at a random moment, resumed", ("em", "nuts", "svi"))
def test_every_state_goes_on_to_the_same_bits(method, tmp_path, monkeypatch):
    """A state that was written at any moment leads to the answer of the run that nobody stopped."""
    copies, whole = states(method, tmp_path, monkeypatch)
    for copy in copies:
        again = fit(normal_mixture, Y, kept(method, copy), seed=0)
        assert again.history == whole.history
        assert all(torch.equal(v, again.draws[n]) for n, v in whole.draws.items()), copy.name


@row("killed at a random moment, resumed", ("em", "nuts", "svi"))
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills(method):
    met, done, wrong = kills.killed(method, 20)
    assert met == 20 and done and not wrong


@row("killed at a random moment, resumed", ("any",))
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_in_the_midst_of_saving(method):
    met, read_, mixed = kills.saves_killed(20)
    assert met == 20 and read_ and not mixed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with an answer, and the answer."""
    posterior = fit(STORY, X, EM(restarts=1), seed=0)
    return posterior.save(tmp_path_factory.mktemp("answers") / "a.safetensors"), posterior


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def damages(raw):
    """Broken versions of a file."""
    rng = random.Random(0)
    yield "empty", b""
    yield from ((f"cut at {n}", raw[:n]) for n in (1, 7, 8, 100, len(raw) // 2, len(raw) - 1))
    yield "longer", raw + b"\0"
    for _ in range(24):
        at, bit = rng.randrange(len(raw)), rng.randrange(8)
        yield f"bit {bit} of byte {at}", raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


@row("a truncated, flipped or empty checkpoint", ("answer",))
def test_a_damaged_answer_is_refused_by_name(method, saved, tmp_path):
    path = tmp_path / "bad.safetensors"
    for what, content in damages(saved[0].read_bytes()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
            load(path, STORY)
            pytest.fail(f"{what} was not seen")


@row("a truncated, flipped or empty checkpoint", ("em", "nuts", "svi"))
def test_a_damaged_state_is_refused_and_the_one_before_offered(method, tmp_path, monkeypatch):
    copies, whole = states(method, tmp_path, monkeypatch)
    path = tmp_path / "state"
    before = Path(shutil.copy(copies[0], f"{path}.previous"))
    for what, content in damages(copies[1].read_bytes()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state .*(damaged|checkpoint).*state\.previous"):
            fit(normal_mixture, Y, kept(method, path), seed=0)
            pytest.fail(f"{what} was not seen")
    again = fit(normal_mixture, Y, kept(method, before), seed=0)
    assert all(torch.equal(v, again.draws[n]) for n, v in whole.draws.items())


@row("a hostile pickle", ("answer", "em", "nuts", "svi"))
def test_a_pickle_is_never_run(method, tmp_path):
    path, sprung = tmp_path / "hostile", tmp_path / "sprung"
    for content in (pickle.dumps(Trap(sprung)), b"\x80\x02" + pickle.dumps(Trap(sprung))[2:]):
        path.write_bytes(content)
        refuse(method, path)
    torch.save({"state": Trap(sprung)}, path)
    refuse(method, path)
    assert not sprung.exists()


def refuse(method, path):
    """Loading or resuming from `path` is refused."""
    with pytest.raises(CheckpointError, match=path.name):
        load(path, STORY) if method == "answer" else fit(normal_mixture, Y, kept(method, path), seed=0)


@row("a checkpoint of another story, version or size", ("answer",))
def test_another_story_is_refused_with_the_differences(method, saved):
    cases = {
        "mu": GMM(3, covariance="diag"),
        "Lambda": GMM(2),
        "settings": GMM(2, covariance="diag", scale=2.0),
    }
    for word, story in cases.items():
        with pytest.raises(CheckpointError, match=word):
            load(saved[0], story)


def rewritten(source, target, **changes):
    """The file with parts of its card changed, checksum and all."""
    with safe_open(str(source), framework="pt") as file:
        card, tensors = json.loads(file.metadata()["card"]), {n: file.get_tensor(n) for n in file.keys()}
    text = json.dumps({**card, **changes}, sort_keys=True)
    target.write_bytes(to_bytes(tensors, metadata={"card": text, "sha256": checksum(tensors, text)}))
    return target


@row("a checkpoint of another story, version or size", ("answer",))
def test_other_formats_and_precisions_are_refused_and_other_versions_told(method, saved, tmp_path):
    with pytest.raises(CheckpointError, match="format 'posterior 0'"):
        load(rewritten(saved[0], tmp_path / "f", format="posterior 0"), STORY)
    with pytest.raises(CheckpointError, match=r"dtype: saved torch\.float32, given torch\.float64"):
        load(rewritten(saved[0], tmp_path / "d", dtype="torch.float32"), STORY)
    with pytest.raises(CheckpointError, match="'psychic'"):
        load(rewritten(saved[0], tmp_path / "m", method="psychic"), STORY)
    old = load(rewritten(saved[0], tmp_path / "v", versions={"torch": "1.0", "pyro": "0.1"}), STORY)
    assert any("torch 1.0" in w and "pyro 0.1" in w for w in old.warnings)


@row("a checkpoint of another story, version or size", ("em", "nuts", "svi"))
def test_the_state_of_another_fit_is_refused_with_the_differences(method, tmp_path, monkeypatch):
    copies, _ = states(method, tmp_path, monkeypatch)

    def other(x, num_components=3):
        return normal_mixture(x, num_components)

    cases = [
        (normal_mixture, Y, 1, "seed: saved 0, now 1"),
        (normal_mixture, Y[:50], 0, r"data: saved x \(60,\), now x \(50,\)"),
        (normal_mixture, Y + 1, 0, "numbers in the data"),
        (other, Y, 0, "story: saved normal_mixture, now .*other"),
    ]
    for story, data, seed, words in cases:
        with pytest.raises(CheckpointError, match=words):
            fit(story, data, kept(method, copies[0]), seed=seed)


@row("a full disk or a read-only folder", ("answer",))
def test_places_that_cannot_be_written_are_named(method, saved, tmp_path):
    posterior = saved[1]
    for path, kind in (
        (Path("/dev/full"), OSError),
        (Path("/proc/answer"), OSError),
        (tmp_path / "nowhere" / "a", FileNotFoundError),
        (tmp_path, IsADirectoryError),
    ):
        if path.parent.exists() or path.parent.parent == tmp_path:
            with pytest.raises(kind, match=str(path if path.parent.exists() else path.parent)):
                posterior.save(path)
    assert not Path("/dev/full").exists() or Path("/dev/full").is_char_device()


FULL = """
    import resource, signal, sys, warnings
    from pathlib import Path
    import torch
    sys.path[:0] = {paths!r}
    from stories import normal_mixture
    from inference import EM, NUTS, fit
    import inference.methods.nuts
    inference.methods.nuts.EVERY = 0.0
    x, folder = torch.linspace(-3, 3, 40), Path({folder!r})
    methods = {{"em": lambda p: EM(restarts=1, tol=0.0, max_iter=20, checkpoint=p),
               "nuts": lambda p: NUTS(chains=2, warmup=40, draws=20, backend="graph", checkpoint=p)}}
    make = methods[{method!r}]
    whole = fit(normal_mixture, x, make(None), seed=0)
    whole.save(folder / "answer")
    old = (folder / "answer").read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # as a disk that is full
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = fit(normal_mixture, x, make(folder / "state"), seed=0)
    assert all(torch.equal(v, found.draws[n]) for n, v in whole.draws.items())
    assert any("is not kept" in str(w.message) and "state" in str(w.message) for w in told), told
    assert any("cannot write" in w and "state" in w for w in found.warnings), found.warnings
    try:
        found.save(folder / "answer")
        raise SystemExit("the full disk was not noticed")
    except OSError as error:
        assert "answer" in str(error), error
    assert (folder / "answer").read_bytes() == old
    assert sorted(p.name for p in folder.iterdir()) == ["answer"], list(folder.iterdir())
"""


@row("a full disk or a read-only folder", ("em", "nuts"))
@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
def test_a_fit_survives_a_full_disk(method, tmp_path):
    """Nothing can be written: the answer is the same, the old file is whole, and both failures are told."""
    paths = [str(kills.ROOT), str(kills.ROOT / "tests")]
    code = textwrap.dedent(FULL.format(paths=paths, folder=str(tmp_path), method=method))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@row("a full disk or a read-only folder", ("em", "nuts", "svi"))
def test_a_folder_that_is_missing_is_told_before_the_fit(method, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        fit(normal_mixture, Y, kept(method, tmp_path / "nowhere" / "state"), seed=0)
    with pytest.raises(ValueError, match="is no file"):
        fit(normal_mixture, Y, kept(method, tmp_path), seed=0)


@row("archive members and links that lead outside", ("corpus",))
def test_a_link_out_of_a_folder_of_texts_is_refused(method, tmp_path):
    (tmp_path / "secret.txt").write_text("nothing for readers")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some words here")
    assert read_corpus(folder).num_words == 3
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"b\.txt is a link to .*secret\.txt"):
        read_corpus(folder)


@row("archive members and links that lead outside", ("table",))
def test_members_of_an_archive_are_read_and_never_written(method, tmp_path):
    import zipfile

    for name in ("../outside.npy", "/tmp/outside.npy", "..\\outside.npy"):
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"no array")
        before = sorted(p for p in tmp_path.parent.rglob("*"))
        with pytest.raises(ValueError, match=r"a\.npz"):
            read(path)
        assert sorted(p for p in tmp_path.parent.rglob("*")) == before


ENCODINGS = {
    "latin": ("größe,b\n1,2\n".encode("latin-1"), ["0xf6", "offset 2", "encoding='latin-1'"]),
    "utf16": ("a,b\n1,2\n".encode("utf-16"), ["offset 0", "encoding='utf-16'"]),
    "nul": (b"a,b\n1,\x002\n", ["NUL byte", "offset 6"]),
}


@row("a text file in another encoding", ("table", "corpus"), **ENCODINGS)
def test_other_encodings_are_told_with_the_offset(method, case, tmp_path):
    content, words = case
    path = tmp_path / "data.csv"
    path.write_bytes(content.replace(b"a,b", b"text,b") if method == "corpus" else content)
    with pytest.raises(ValueError, match=r"data\.csv") as error:
        read_corpus(path) if method == "corpus" else read(path)
    text = str(error.value)
    assert all(w in text for w in words if method == "table" or "offset" not in w), text


@row("a text file in another encoding", ("table", "corpus"))
def test_a_byte_order_mark_is_no_part_of_the_text(method, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (b"text\nwords here\n" if method == "corpus" else b"a,b\n1,2\n3,4\n"))
    if method == "corpus":
        assert set(read_corpus(path).vocabulary) == {"words", "here"}
    else:
        assert list(read(path).feature_names) == ["a", "b"]


@row("a checkpoint of another story, version or size", ALL)
def test_answers_of_every_method_come_back(method, tmp_path):
    story, data, _ = real(method)
    posterior = answer(story, data, method)
    again = load(posterior.save(tmp_path / "a"), story)
    assert all(torch.equal(v, again.draws[n]) for n, v in posterior.draws.items())
    assert str(again.summary()) == str(posterior.summary()) and os.listdir(tmp_path) == ["a"]
    assert QUICK and len(WORDS)
