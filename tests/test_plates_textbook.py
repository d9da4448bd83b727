"""Every diagram of the zoo against the drawing of its textbook: the same arrows, the same boxes around the same nodes."""

import pytest

from inference.plates_fold import fold_loops, graph
from inference.provenance import relations
from zoo.catalog import catalog

STORIES = {entry.name: entry for entry in catalog()}

# Arrows as "parents > child", boxes as plate: members; of a chain the first two steps and the last one are drawn.
# Bishop, PRML: figures 8.24 (naive Bayes), 9.6 (mixtures), 12.10 (PPCA), 13.5 (HMM); Murphy, PML 1: 28.10 (factor
# analysis), 28.11 (mixture of factor analysers); Blei, Ng and Jordan 2003, figure 1 (LDA); Blei and Lafferty 2006.
TEXTBOOK = {
    "Box": (["low size > high", "low high > x"], {"data": "x"}),
    "CellTable": (["theta > x"], {"data": "x"}),
    "NaiveBayes": (["theta_0 > x_0", "theta_1 > x_1", "theta_4 > x_4"], {"data": "x_0 x_1 x_4"}),
    "GMM": (["pi > z", "z mu Lambda > x"], {"components": "mu Lambda", "data": "z x"}),
    "ConjugateGMM": (["pi > z", "Lambda > mu", "z mu Lambda > x"], {"components": "mu Lambda", "data": "z x"}),
    "KMeans": (["z mu > x"], {"components": "mu", "data": "z x"}),
    "PoissonMixture": (["pi > z", "z lam > x"], {"components": "lam", "data": "z x"}),
    "BernoulliMixture": (["pi > z", "z p > x"], {"components": "p", "data": "z x"}),
    "MultinomialMixture": (["pi > z", "z phi > x"], {"components": "phi", "data": "z x"}),
    "CategoricalMixture": (["pi > z", "z phi > x"], {"components": "phi", "data": "z x"}),
    "MixedMixture": (
        ["pi > z", "z mu tau > real", "z lam > counts", "z p > binary", "z phi > categories"],
        {"components": "mu tau lam p phi", "data": "z real counts binary categories"},
    ),
    "PPCA": (["W mu psi z > x"], {"data": "z x"}),
    "FactorAnalysis": (["W mu psi z > x"], {"data": "z x"}),
    "MixtureOfFactorAnalysers": (["pi > c", "c z W mu psi > x"], {"components": "mu W", "data": "c z x"}),
    "GaussianHMM": (
        ["pi > z_0", "A z_0 > z_1", "A > z_19", "z_1 > dots", "dots > z_19",
         "z_0 mu tau > x_0", "z_1 mu tau > x_1", "z_19 mu tau > x_19"],
        {"states": "A mu tau", "data": "z_0 z_1 dots z_19 x_0 x_1 x_19"},
    ),
    "CategoricalHMM": (
        ["pi > z_0", "A z_0 > z_1", "A > z_19", "z_1 > dots", "dots > z_19",
         "z_0 B > x_0", "z_1 B > x_1", "z_19 B > x_19"],
        {"states": "A B", "data": "z_0 z_1 dots z_19 x_0 x_1 x_19"},
    ),
    "LDA": (["theta phi > w"], {"topics": "phi", "documents": "theta w"}),
    "TokenLDA": (["theta > z", "z phi > w"], {"topics": "phi", "documents": "theta z w", "words": "z w"}),
    "DTM": (["m > beta", "theta beta times > w"], {"topics": "beta", "documents": "theta w times"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTBOOK)
def test_arrows_and_boxes_are_those_of_the_book(name):
    """An arrow lost between trace and picture, one too many, or a node in the wrong box."""
    story, data = STORIES[name].example()
    drawn = graph(fold_loops(relations(story, **data)))
    short = {n.name: "dots" if n.kind == "dots" and n.family == "z" else n.name for n in drawn.nodes.values()}
    free = {n.name for n in drawn.nodes.values() if n.kind == "dots" and n.family != "z"}  # no arrow leads there
    arrows, boxes = TEXTBOOK[name]
    expected = {(p, a.partition(" > ")[2]) for a in arrows for p in a.partition(" > ")[0].split()}
    assert {(short[a], short[b]) for a, b in drawn.edges} == expected
    members = {
        p: {short[n.name] for n in drawn.nodes.values() if p in n.plates and n.name not in free} for p in drawn.plates
    }
    wanted = {plate: set(inside.split()) for plate, inside in boxes.items()}
    # A given array stands beside the box or in it, as the layout likes.
    assert {p: m - {"times"} for p, m in members.items()} == {p: m - {"times"} for p, m in wanted.items()}


def test_what_is_seen_is_shaded_and_nothing_else():
    """In each of these diagrams the shaded nodes are the data."""
    seen = {"MixedMixture": {"real", "counts", "binary", "categories"}, "Box": {"x"}, "LDA": {"w"}, "PPCA": {"x"}}
    for name, expected in seen.items():
        story, data = STORIES[name].example()
        nodes = graph(fold_loops(relations(story, **data))).nodes.values()
        assert {n.name for n in nodes if n.kind == "observed"} == expected
