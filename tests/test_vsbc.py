"""Variational calibration: which way a guide is off, told from its ranks; planted biases are named with their direction."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from stories import regression

from inference import SVI, Exact, check
from inference.calibration import asymmetry
from inference.methods.base import Verdict
from zoo.__main__ import main


def normal(x):
    """Normal with a conjugate mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@dataclass(frozen=True)
class Guide:
    """The closed form, moved by `shift` posterior sd and `scale` times as wide, taken for a guide."""

    name: ClassVar[str] = "planted"
    shift: float = 0.0
    scale: float = 1.0

    def check(self, structure):
        return Verdict(True, "a test")

    def run(self, problem):
        found = Exact(draws=200).run(problem)
        mu = found.draws["mu"]
        moved = mu.mean() + self.scale * (mu - mu.mean()) + self.shift * mu.std()
        return replace(found, method=self, kind="variational", draws={"mu": moved}, diagnostics={})


@pytest.mark.parametrize(
    ("guide", "bias", "width"),
    [
        (Guide(), "", ""),
        (Guide(shift=0.9), "overestimated", ""),
        (Guide(shift=-0.9), "underestimated", ""),
        (Guide(scale=0.4), "", "too narrow"),
        (Guide(scale=2.5), "", "too wide"),
    ],
    ids=["right", "high", "low", "narrow", "wide"],
)
def test_the_direction_is_named(guide, bias, width):
    """A shift is a bias and no width, a wrong width is no bias."""
    found = check(normal, torch.zeros(5), guide, simulations=40)
    assert found.kind == "variational" and found.bias("mu") == bias and found.biased == (["mu"] if bias else [])
    if not bias:
        assert found.width("mu") == width
    said = repr(found).splitlines()
    row = next(line for line in said if line.startswith("  mu") and len(line.split()) >= 3 and line in found.lean())
    assert all(word in row for word in (bias, width))
    assert any(line.startswith("biased: " if bias else "no bias shows") for line in said)
    assert "mirrored" in found.plot().get_supxlabel()


def test_symmetric_ranks_are_rarely_called_lopsided():
    """Ranks that pile up at both ends (a narrow guide) are no bias: the test keeps its level, ties included."""
    rng = np.random.default_rng(0)
    p = np.array([asymmetry(np.round(99 * rng.beta(0.4, 0.4, 60)), 99, seed=s) for s in range(300)])
    for level in (0.05, 0.2):
        assert (p <= level).mean() < level + 3 * math.sqrt(level / 300)
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 1e-3


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    """Ranks all on one side are as lopsided as can be; mirrored pairs are not lopsided at all."""
    assert asymmetry(np.arange(60, 90), 99) < 0.001 and asymmetry(np.array([3, 96, 20, 79, 41, 58]), 99) == 1.0


@pytest.mark.slow
def test_mean_field_on_collinear_columns_is_narrow_and_not_biased():
    """The textbook failure of mean field: each coefficient's spread is that given the other."""
    X = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    X = torch.cat([X, X + 0.3 * torch.randn(20, 1, generator=torch.Generator().manual_seed(1))], 1)
    method = SVI(guide="mean_field", steps=300, starts=1)
    found = check(regression, {"X": X, "y": torch.zeros(20)}, method, simulations=60)
    assert {"w[0]", "w[1]"} <= set(found.wrong) and not {"w[0]", "w[1]"} & set(found.biased)
    assert found.width("w[0]") == found.width("w[1]") == "too narrow"


@pytest.mark.slow
def test_on_the_command_line(tmp_path, capsys):
    picture = tmp_path / "symmetry.png"
    words = ["calibrate", "NaiveBayes", "--method", "svi", "--simulations", "2", "--plot", str(picture), "--quiet"]
    assert main(words) in (0, 1)
    assert "symmetric" in capsys.readouterr().out and picture.stat().st_size > 1000
