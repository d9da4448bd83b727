"""Comparisons: the table and the verdict say what the numbers say, whatever the labels."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from stories import box, factor_model, normal_mixture
from test_posterior import ByHand, conjugate

from inference import EM, NUTS, SVI, compare
from zoo import PoissonMixture, load

X = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NORMAL = torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Named(ByHand):
    def __init__(self, name, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = name


def test_a_shift_of_one_sd_is_a_gap_of_one():
    """Same shape, shifted by one posterior sd: gap 1 and sd ratio 1; twice as wide: ratio 2."""
    methods = {
        "base": Named("base", {"mu": NORMAL}),
        "shifted": Named("shifted", {"mu": NORMAL + NORMAL.std()}),
        "wide": Named("wide", {"mu": 2 * (NORMAL - NORMAL.mean()) + NORMAL.mean()}),
    }
    c = compare(conjugate, X, methods, test=None)
    assert c.reference == "base" and c.table.loc["base", "gap (sd)"] == "reference"
    assert math.isclose(c.table.loc["shifted", "gap (sd)"], 1.0, rel_tol=1e-9)
    assert math.isclose(c.table.loc["wide", "sd ratio"], 2.0, rel_tol=1e-9)
    assert "2 times as large" in c.verdict and "shifted agrees with base" in c.verdict


def test_permuted_components_agree_exactly():
    """The same mixture under another numbering: gap 0."""
    g = torch.Generator().manual_seed(0)
    mu = torch.tensor([-3.0, 3.0]).double() + 0.1 * torch.randn(500, 2, generator=g, dtype=torch.float64)
    pi = torch.tensor([0.3, 0.7]).double() + 0.01 * torch.randn(500, 2, generator=g, dtype=torch.float64)
    sigma = torch.tensor([1.0, 2.0]).double() + 0.05 * torch.randn(500, 2, generator=g, dtype=torch.float64)
    draws = {"pi": pi, "mu": mu, "sigma": sigma}
    turned = {n: v.flip(1) for n, v in draws.items()}
    c = compare(normal_mixture, X, {"a": Named("a", draws), "b": Named("b", turned)}, test=None)
    assert c.table.loc["b", "gap (sd)"] < 1e-9


def test_a_far_point_is_called_a_disagreement():
    far = Named("far", {"mu": (NORMAL.mean() + 5 * NORMAL.std()).reshape(1)}, "point")
    c = compare(conjugate, X, {"base": Named("base", {"mu": NORMAL}), "far": far}, test=None)
    assert re.search(r"far disagrees with base in 1 of 1 entries.*mu: 5\)", c.verdict)


def test_held_out_rows_are_apart_and_paired_errors_are_numpys():
    c = compare(conjugate, X, {"a": Named("a", {"mu": NORMAL}), "b": Named("b", {"mu": NORMAL + 1})}, test=0.25, seed=3)
    again = compare(conjugate, X, {"a": Named("a", {"mu": NORMAL})}, test=0.25, seed=3)
    train = c.posteriors["a"].problem.kwargs["x"]
    assert len(train) == 30 and len(c.heldout["a"]) == 10
    assert torch.equal(train, again.posteriors["a"].problem.kwargs["x"])
    gap = (c.heldout["a"] - c.heldout["b"]).numpy()
    row = c.pairwise.loc["a - b"]
    np.testing.assert_allclose([row["difference"], row["± se"]], [gap.mean(), gap.std(ddof=1) / math.sqrt(10)])
    other = compare(conjugate, X[:30], {"a": Named("a", {"mu": NORMAL})}, test=X[30:])
    assert len(other.heldout["a"]) == 10


def test_refused_methods_stay_with_their_reason():
    counts = torch.poisson(torch.ones(8, 3))
    c = compare(factor_model, counts, ["em", NUTS(warmup=100, draws=50, chains=2)], test=None)
    assert "integral" in c.refused["em"] and c.table.loc["em", "kind"].startswith("n/a")
    assert "em: not run." in str(c) and set(c.posteriors) == {"nuts"}
    with pytest.raises(ValueError, match="none of the methods"):
        compare(box, torch.rand(10), ["em", "svi"], test=None)


@pytest.mark.parametrize(
    ("methods", "test", "error"),
    [("em", 0.2, TypeError), ([], 0.2, ValueError), (["em"], 1.5, ValueError), (["nutz"], 0.2, ValueError)],
)
def test_wrong_arguments_are_named(methods, test, error, untouched):
    with pytest.raises(error):
        compare(conjugate, X, methods, test=test)


@pytest.fixture(scope="module")
def three():
    """The real thing on a small set."""
    data = load("poisson_counts").x[:120]
    methods = ["em", SVI(guide="full_rank", steps=1500), NUTS(warmup=200, draws=200)]
    return compare(PoissonMixture(2), data, methods, seed=0, progress=False)


def test_three_methods_agree_on_counts(three):
    assert set(three.posteriors) == {"em", "svi", "nuts"} and three.reference == "nuts"
    assert three.table.loc["em", "gap (sd)"] < 1 and three.table.loc["svi", "gap (sd)"] < 1
    assert three.table["held-out log p"].max() - three.table["held-out log p"].min() < 0.05
    text = str(three)
    assert "Verdict:" in text and max(map(len, text.splitlines()[:25])) < 400
    assert "em agrees with nuts" in three.verdict


def test_report_is_one_file_that_asks_for_nothing(three, tmp_path):
    path = three.report(tmp_path / "report.html")
    page = path.read_text()
    assert three.verdict.split(".")[0] in page and "<math" in page and page.count("<svg") == 8
    outside = [u for u in re.findall(r'(?:src|href)="([^"#][^"]*)"', page)]
    addresses = set(re.findall(r"https?://[^\"' <)]+", page)) - {
        "http://www.w3.org/1998/Math/MathML",
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not outside and not [
        a for a in addresses if "w3.org" not in a and "purl.org" not in a and "creativecommons" not in a
    ]
    assert "<script" not in page and len(page) < 1_500_000
    three.plot().savefig(tmp_path / "c.png")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        three.report(tmp_path / "nowhere" / "r.html")


def test_report_escapes_names(tmp_path):
    """A site called like a tag stays text."""

    def story(x):
        mu = pyro.sample("<script>alert(1)</script>", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    page = compare(story, X, [EM(restarts=1)], test=None).report(tmp_path / "r.html").read_text()
    assert "<script>" not in page
