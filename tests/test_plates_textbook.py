"""Every diagram of the zoo against the drawing of its textbook: the same arrows, the same boxes around the same nodes."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference.plates_fold import fold_loops
from inference.plates_graph import graph
from inference.provenance import relations
from zoo.catalog import catalog
from zoo.topics import RandomWalk

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
    "DTM": (
        ["m > beta_1", "beta_1 > beta_2", "beta_2 > dots", "dots > beta_6",
         "beta_1 theta_1 > w_1", "beta_2 theta_2 > w_2", "beta_6 theta_6 > w_6"],
        {"topics": "beta_1 beta_2 dots beta_6", "documents_1": "theta_1 w_1", "documents_2": "theta_2 w_2",
         "documents_6": "theta_6 w_6"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTBOOK)
def test_arrows_and_boxes_are_those_of_the_book(name):
    """An arrow lost between trace and picture, one too many, or a node in the wrong box."""
    story, data = STORIES[name].example()
    drawn = graph(fold_loops(relations(story, **data)))
    linked = {n for edge in drawn.edges for n in edge}
    short = {n.name: "dots" if n.kind == "dots" and n.name in linked else n.name for n in drawn.nodes.values()}
    free = {n.name for n in drawn.nodes.values() if n.kind == "dots" and n.name not in linked}
    arrows, boxes = TEXTBOOK[name]
    expected = {(p, a.partition(" > ")[2]) for a in arrows for p in a.partition(" > ")[0].split()}
    assert {(short[a], short[b]) for a, b in drawn.edges} == expected
    members = {
        p: {short[n.name] for n in drawn.nodes.values() if p in n.plates and n.name not in free} for p in drawn.plates
    }
    wanted = {plate: set(inside.split()) for plate, inside in boxes.items()}
    assert members == wanted


def test_columns_of_the_dynamic_topic_model_count_the_documents_of_their_slice():
    """Documents in another column than their slice's, or a learned drift with an arrow to the first slice."""
    story, data = STORIES["DTM"].example()
    plates = graph(fold_loops(relations(story, **data))).plates
    sizes = {p.part[1]: p.size for p in plates.values() if p.part}
    assert sizes == {t: int((data["times"] == t - 1).sum()) for t in (1, 2, 6)}
    learned = graph(fold_loops(relations(replace(story, drift=None), **data)))
    assert {b for a, b in learned.edges if a == "sigma"} == {"beta_2", "beta_6"}
    assert {b for a, b in learned.edges if a == "m"} == {"beta_1"}


def test_bare_stories_with_a_chain_in_one_site_are_unfolded_by_what_their_rows_see():
    """Columns where each row sees one step; one node wherever a row sees two of them, or rows have to do with rows."""

    def local_level(y, both=False):
        x = pyro.sample("x", RandomWalk(torch.zeros(1), torch.tensor(1.0), torch.tensor(0.5), 6))[:, 0]
        seen = (x + x.roll(1)) / 2 if both else x
        with pyro.plate("days", 6):
            pyro.sample("y", dist.Normal(seen, 0.1), obs=y)

    drawn = graph(fold_loops(relations(local_level, torch.zeros(6))))
    assert set(drawn.edges) == {
        ("x_1", "x_2"), ("x_2", "x ..."), ("x ...", "x_6"), ("x_1", "y_1"), ("x_2", "y_2"), ("x_6", "y_6"),
    }  # fmt: skip
    assert not drawn.plates  # one row a step: the column is box enough
    mixed = graph(fold_loops(relations(local_level, torch.zeros(6), both=True)))
    assert [p.size for p in mixed.plates.values()] == [6]
    assert {(a, b) for a, b in mixed.edges if b == "y"} == {("x_1", "y"), ("x_2", "y"), ("x_6", "y")}


def test_what_is_seen_is_shaded_and_nothing_else():
    """In each of these diagrams the shaded nodes are the data."""
    seen = {"MixedMixture": {"real", "counts", "binary", "categories"}, "Box": {"x"}, "LDA": {"w"}, "PPCA": {"x"}}
    for name, expected in seen.items():
        story, data = STORIES[name].example()
        nodes = graph(fold_loops(relations(story, **data))).nodes.values()
        assert {n.name for n in nodes if n.kind == "observed"} == expected
