"""Topic models that were interrupted between two passes go on to the same bits, and to nothing else."""

import pytest
import torch

from inference import EM, SVI, fit
from inference.topics import pass_file
from zoo import LDA


class Stop(Exception):
    """Stands for a machine that goes down."""


def counts(seed: int = 0, documents: int = 120) -> dict[str, torch.Tensor]:
    """Documents of thirty words in two topics."""
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(documents, 1, generator=g, dtype=torch.float64)
    rates = torch.rand(2, 30, generator=g, dtype=torch.float64) ** 4 * 8
    return {"w": torch.poisson(share * rates[0] + (1 - share) * rates[1], generator=g)}


METHODS = {
    "batch": (LDA(2, None, None), lambda path: EM(restarts=1, max_iter=9, tol=1e-300, driver="batch", checkpoint=path)),
    "stepwise": (
        LDA(2, None, None),
        lambda path: EM(restarts=1, max_iter=9, tol=1e-300, driver="stepwise", checkpoint=path),
    ),
    "svi": (LDA(2), lambda path: SVI(steps=40, starts=2, draws=30, checkpoint=path)),
}


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_fit_goes_on_to_the_same_bits(name, after, tmp_path, monkeypatch):
    """A forgotten concentration, a random order that is drawn again otherwise, a history that is cut, would show."""
    story, method = METHODS[name]
    path = tmp_path / "state"
    whole = fit(story, counts(), method(None), seed=1)
    monkeypatch.setattr(pass_file, "EVERY", 0.0)
    write, seen = pass_file.PassFile.write, []

    def once(self, *args, **kwargs):
        write(self, *args, **kwargs)
        seen.append(1)
        if len(seen) == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(pass_file.PassFile, "write", once)
        with pytest.raises(Stop):
            fit(story, counts(), method(path), seed=1)
    assert path.exists()
    again = fit(story, counts(), method(path), seed=1)
    assert again.history == whole.history
    assert all(torch.equal(again.draws[n], whole.draws[n]) for n in whole.draws)
    assert not path.exists(), "a fit that has ended leaves no file"


def test_a_state_belongs_to_one_fit(tmp_path, monkeypatch):
    """Other documents or another seed are refused; and topics of every word are not kept."""
    monkeypatch.setattr(pass_file, "EVERY", 0.0)
    story, method = METHODS["batch"]
    path = tmp_path / "state"

    def stop(i: int, value: float, values: dict) -> None:
        if i == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(
            story,
            counts(),
            EM(restarts=1, max_iter=9, tol=1e-300, driver="batch", checkpoint=path, callback=stop),
            seed=1,
        )
    for data, seed in ((counts(1), 1), (counts(), 2)):
        with pytest.raises(ValueError, match="belongs to another fit"):
            fit(story, data, method(path), seed=seed)
    with pytest.raises(ValueError, match="driver='batch' or 'stepwise'"):
        fit(story, counts(), EM(checkpoint=path), seed=1)
