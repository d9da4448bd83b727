"""The second opinion: right answers agree with it, planted errors do not, and asking for it changes nothing."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import gaussian_mixture, normal_mixture, regression

from inference import EM, NUTS, SVI, CrossCheck, Exact, Posterior, compare, fit, load
from inference.crosscheck import SPREAD, held, settings_of
from inference.methods.base import Verdict
from inference.replica import ROWS
from zoo import PPCA, Box, LinearVAE
from zoo.__main__ import main


def normal(x):
    """Normal with a conjugate mean: N(mu; 0, 10^2), known spread."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = seeded(50)
TWO = torch.cat([seeded(30) - 2, seeded(30, seed=1) + 2])


@dataclass(frozen=True)
class Planted:
    """The closed form, moved by `shift` posterior sd and `scale` times as wide."""

    name: ClassVar[str] = "planted"
    shift: float = 0.0
    scale: float = 1.0

    def check(self, structure):
        return Verdict(True, "a test")

    def run(self, problem) -> Posterior:
        found = Exact(draws=4000).run(problem)
        mu = found.draws["mu"]
        moved = mu.mean() + self.scale * (mu - mu.mean()) + self.shift * mu.std()
        return replace(found, method=self, kind="variational", draws={"mu": moved}, diagnostics={})


def test_a_right_answer_agrees_and_says_on_what():
    posterior = fit(normal, X, Planted(), seed=0, cross_check=True)
    check = posterior.cross_check
    assert isinstance(check, CrossCheck) and check.verdict == "agrees" and check.second == "EXACT"
    assert check.rows == check.total == 50 and check.gap < 0.1 and abs(check.ratio - 1) < 0.1
    assert posterior.warnings == [] and check.line in str(posterior.summary()) and check.line in posterior.why()
    assert posterior.timings["cross_check"] == check.seconds > 0


@pytest.mark.parametrize("shift", [0.4, 0.8])
def test_a_shift_is_measured_in_posterior_sd(shift):
    """The gap is the shift that was planted; beyond half a posterior sd it is a warning, and the first one."""
    posterior = fit(normal, X, Planted(shift=shift), seed=0, cross_check=True)
    check = posterior.cross_check
    assert abs(check.gap - shift) < 4 * check.errors["mu"]
    assert check.verdict == ("agrees" if shift < 0.5 else "disagrees")
    if shift > 0.5:
        assert str(posterior.summary()).startswith("warning: cross-check: PLANTED and EXACT DISAGREE on all 50 rows")


def test_a_wrong_spread_is_warned_of():
    posterior = fit(normal, X, Planted(scale=0.5), seed=0, cross_check=True)
    assert posterior.cross_check.verdict == "agrees" and abs(posterior.cross_check.ratio - 0.5) < 0.05 < 1 / SPREAD
    assert "the sd of mu is 0.5 times as large" in posterior.warnings[0]


@pytest.mark.parametrize(
    ("story", "data", "method"),
    [
        (normal_mixture, TWO, EM()),
        (normal, X, NUTS(chains=2, warmup=100, draws=100)),
        (regression, (seeded(40, 2), seeded(40, seed=2)), SVI(steps=100)),
    ],
    ids=["em", "nuts", "svi"],
)
def test_asking_changes_no_bit_of_the_answer(story, data, method):
    """Draws, history and the user's random numbers are those of a fit without a cross-check."""
    torch.manual_seed(7)
    alone = fit(story, data, method, seed=3)
    state = torch.get_rng_state()
    beside = fit(story, data, method, seed=3, cross_check=True)
    assert torch.equal(state, torch.get_rng_state()) and not pyro.get_param_store().keys()
    assert alone.history == beside.history and alone.draws.keys() == beside.draws.keys()
    assert all(torch.equal(alone.draws[n], beside.draws[n]) for n in alone.draws)
    assert alone.cross_check is None and not beside.cross_check.refused
    assert [w for w in beside.warnings if not w.startswith("cross-check")] == alone.warnings


def test_many_rows_are_checked_on_few():
    """The replica holds 200 of 1,000 rows, and its posterior is that of 200 rows: sqrt(5) times as wide."""
    seen = []

    @dataclass(frozen=True)
    class Watching(Planted):
        def run(self, problem):
            seen.append(problem.structure.num_rows)
            return super().run(problem)

    posterior = fit(normal, seeded(1000), Watching(), seed=0, cross_check=True)
    assert seen == [1000, ROWS] and posterior.cross_check.rows == ROWS and posterior.cross_check.verdict == "agrees"
    assert "200 of 1,000 rows" in posterior.cross_check.line
    assert abs(float(posterior.draws["mu"].std()) * math.sqrt(1000) - 1) < 0.1


def test_numbering_of_components_is_no_disagreement():
    """The same draws with the components the other way round: no gap."""
    posterior = fit(gaussian_mixture, torch.stack([TWO, TWO.flip(0)], 1), NUTS(chains=2, warmup=200, draws=200), seed=0)
    turned = {n: v.flip(1) for n, v in posterior.draws.items()}
    found = held(CrossCheck("A", "B"), replace(posterior, draws=turned), posterior)
    assert found.gap < 1e-12 and len(found.gaps) > 5


def test_rotation_of_factors_is_no_disagreement():
    """W in another rotation: W W^T is what is compared."""
    posterior = fit(PPCA(1), seeded(40, 3), NUTS(chains=2, warmup=200, draws=200), seed=0)
    turned = {n: -v if n == "W" else v for n, v in posterior.draws.items()}
    found = held(CrossCheck("A", "B"), replace(posterior, draws=turned), posterior)
    assert found.gap < 1e-12 and any(n.startswith("W W^T") for n in found.gaps)


def test_a_mode_that_a_draw_beats_is_no_mode():
    """EM held at a symmetric point, a saddle: within a few sd of everything, and far below draws of NUTS."""
    saddle = {"pi": torch.full((2,), 0.5), "mu": torch.zeros(2), "sigma": torch.full((2,), float(TWO.std()))}
    posterior = fit(normal_mixture, TWO, EM(start=saddle), seed=0, cross_check=True)
    assert posterior.cross_check.rival > 5 and posterior.cross_check.verdict == "disagrees"
    assert "nats above the mode" in posterior.warnings[0]
    assert fit(normal_mixture, TWO, EM(), seed=0, cross_check=True).cross_check.rival == 0


def test_what_nobody_asked_is_said_with_the_line_that_asks():
    posterior = fit(normal, X, Planted(), seed=0)
    assert posterior.cross_check is None
    for told in (str(posterior.summary()), posterior.why()):
        assert (
            "not cross-checked: posterior.cross_checked() or fit(..., cross_check=True) holds it beside EXACT" in told
        )
    assert posterior.cross_checked("nuts").cross_check.second == "NUTS"


def test_against_a_reference_of_ones_own():
    """Draws from the formula, as a mapping: a right answer agrees, a shifted one is off by its shift."""
    precision = 1 / 100 + len(X)
    known = {"mu": X.sum() / precision + seeded(4000, seed=5) / precision**0.5}
    assert fit(normal, X, NUTS(chains=2, warmup=200, draws=500), seed=0).against(known).verdict == "agrees"
    moved = fit(normal, X, Planted(shift=1.0), seed=0)
    assert abs(moved.against(known).gap - 1) < 0.1 and moved.against(known).verdict == "disagrees"
    assert moved.against(fit(normal, X, "exact", seed=1)).second == "EXACT (reference)"
    for wrong, text in (
        ({"nu": [1.0, 2.0]}, "'nu'"),
        ({"mu": torch.zeros(9, 2)}, r"\(9, 2\)"),
        ({}, "shares? no|share no"),
    ):
        with pytest.raises(ValueError, match=text):
            moved.against(wrong)
    with pytest.raises(TypeError, match="mapping"):
        moved.against([1.0])


def test_where_no_second_method_exists_it_says_why():
    check = fit(*Box.example(), seed=0, cross_check=True).cross_check
    assert (
        check.verdict == "not made" and check.refused.startswith("no second method is valid") and math.isnan(check.gap)
    )
    assert "depends on a latent" in repr(check)


def test_the_same_method_twice_is_refused():
    with pytest.raises(ValueError, match="the same mistake twice"):
        fit(normal, X, "exact", seed=0, cross_check="exact")
    with pytest.raises(ValueError, match="unknown"):
        fit(normal, X, "exact", seed=0, cross_check="nutz")


def test_it_is_kept_in_files(tmp_path):
    posterior = fit(normal, X, "exact", seed=0, cross_check=True)
    again = load(posterior.save(tmp_path / "kept"), normal)
    assert again.cross_check == posterior.cross_check and again.summary().heading[-1] == posterior.cross_check.line
    assert load(fit(normal, X, "exact", seed=0).save(tmp_path / "kept"), normal).cross_check is None


def test_files_and_starts_stay_with_the_first_fit(tmp_path):
    """A checkpoint of the fit must not be taken for one of the replica."""
    em = EM(restarts=3, checkpoint=tmp_path / "state", callback=print)
    assert settings_of(em) == em and settings_of(em).checkpoint is None and settings_of(em).callback is None


def test_rows_under_networks_are_found_a_second_time():
    """A linear VAE's guide and normals fitted row by row give one posterior of the codes, and the weights stay."""
    story, data = LinearVAE.example()
    posterior = fit(story, data, SVI(steps=400), seed=0)
    before = {n: v.clone() for n, v in posterior.extra["networks"].items()}
    checked = posterior.cross_checked()
    assert checked.cross_check.second == "row-by-row normals" and checked.cross_check.verdict == "agrees"
    assert checked.cross_check.rows == 40 and set(checked.cross_check.gaps) == {"z[0]", "z[1]"}
    assert all(torch.equal(v, checked.extra["networks"][n]) for n, v in before.items())


def test_compare_holds_answers_beside_each_other():
    """Answers to the same rows check each other; a method alone gets a replica; the verdict names what disagrees."""
    found = compare(normal, X, {"right": Exact(), "wrong": Planted(shift=1.5)}, seed=0)
    assert found.posteriors["wrong"].cross_check.verdict == "disagrees"
    assert abs(found.posteriors["wrong"].cross_check.gap - 1.5) < 0.15 and "with EXACT, wrong lies" in found.verdict
    assert found.table.loc["wrong", "cross-check"].startswith("disagrees")
    assert found.posteriors["right"].cross_check.second == "NUTS"  # a weaker promise is no measure of a stronger one
    good = compare(normal, X, {"right": Exact(), "also": Planted()}, seed=0)
    assert good.posteriors["right"].cross_check.second == "PLANTED"  # where it agrees, it will do
    alone = compare(normal, X, ["exact"], seed=0)
    assert alone.table.loc["exact", "cross-check"].startswith("agrees") and "not cross-checked" not in alone.verdict
    never = compare(normal, X, ["exact"], seed=0, cross_check=False)
    assert never.posteriors["exact"].cross_check is None and "exact is not cross-checked" in never.verdict
    with pytest.raises(ValueError, match="'auto'"):
        compare(normal, X, ["exact"], cross_check="nuts")


def test_on_the_command_line(capsys):
    assert main(["fit", "NaiveBayes", "--cross-check", "--seed", "0", "--quiet"]) == 0
    assert "cross-check: EXACT and NUTS agree on all" in capsys.readouterr().out
