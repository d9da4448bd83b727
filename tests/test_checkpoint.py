"""Answers on disk: what comes back is what was saved, and nothing else is let in."""

import pickle

import pytest
import torch
from stories import normal_mixture

from inference import EM, NUTS, CheckpointError, fit, load
from zoo import GMM
from zoo import load as data_set

X = data_set("iris").x[::3]
STORY = GMM(2, covariance="diag")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    posterior = fit(STORY, X, EM(restarts=1), seed=0)
    path = tmp_path_factory.mktemp("answers") / "a.safetensors"
    assert posterior.save(path) == path
    return posterior, path


def test_the_answers_are_the_same_bits(saved, untouched):
    posterior, path = saved
    again = load(path, STORY)
    assert torch.equal(again.log_prob(), posterior.log_prob()) and torch.equal(again.local("z"), posterior.local("z"))
    assert torch.equal(again.sample(20)["x"], posterior.sample(20)["x"])
    assert again.kind == posterior.kind and again.seed == posterior.seed and again.history == posterior.history
    assert again.why().splitlines()[0] == posterior.why().splitlines()[0]


def test_another_story_is_refused_with_the_differences(saved):
    for story, word in (
        (GMM(3, covariance="diag"), "mu"),
        (GMM(2), "Lambda"),
        (GMM(2, covariance="diag", scale=2.0), "settings"),
    ):
        with pytest.raises(CheckpointError, match=word):
            load(saved[1], story)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "pickle", "text"])
def test_damaged_and_hostile_files_are_refused_by_name(saved, tmp_path, damage):
    raw = saved[1].read_bytes()

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    half = len(raw) // 2
    content = {
        "truncated": raw[:-20],
        "flipped": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
        "empty": b"",
        "pickle": pickle.dumps(Trap()),
        "text": b"hello" + raw[half:],
    }[damage]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        load(path, STORY)
    assert not (tmp_path / "sprung").exists()


def test_places_that_cannot_be_written_keep_the_old_file(saved, tmp_path, monkeypatch):
    posterior, _ = saved
    with pytest.raises(FileNotFoundError, match="nowhere"):
        posterior.save(tmp_path / "nowhere" / "a")
    with pytest.raises(IsADirectoryError):
        posterior.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load(tmp_path / "missing", STORY)
    path = tmp_path / "kept"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"kept.*No space left"):
        posterior.save(path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_the_method_comes_back_with_its_options(tmp_path):
    """An answer of two chains must not claim four."""
    x = torch.linspace(-1, 1, 12)
    method = NUTS(chains=2, warmup=30, draws=20, init={"mu": torch.tensor([0.0, 1.0])})
    fit(normal_mixture, x, method, seed=0).save(tmp_path / "p")
    assert load(tmp_path / "p", normal_mixture).method == method


def test_a_story_of_a_plain_class_is_known_again(tmp_path):
    """Its default text holds an address, which is another one in every process."""

    class Plain:
        def model(self, x):
            return normal_mixture(x)

    kept, x = Plain(), torch.linspace(-1, 1, 12)
    posterior = fit(kept, x, EM(restarts=1), seed=0)
    posterior.save(tmp_path / "p")
    assert torch.equal(load(tmp_path / "p", Plain()).draws["mu"], posterior.draws["mu"])
