"""Plate diagrams as they are painted: bounding boxes of the rendered artists, not of the layout that planned them."""

import itertools
import re

import matplotlib.patches
import matplotlib.text
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from inference import draw_plates, draw_sheet, to_graphviz, to_mermaid
from inference.plates_views import VIEWS
from zoo.catalog import catalog

STORIES = {entry.name: entry for entry in catalog()}


def boxes(figure):
    """Every painted thing by its id: (left, bottom, right, top) in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = {}
    for axes in figure.axes:
        for artist in (*axes.patches, *axes.texts):
            if artist.get_gid():
                found[artist.get_gid()] = artist, artist.get_window_extent(renderer).extents
    return found


def of(found, *kinds):
    return {n: b for n, (_, b) in found.items() if n.split("-")[0] in kinds}


def overlap(a, b):
    """Pixels that two boxes share along the narrower side; a hairline of half a pixel is none."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 0.5 and min(a[3], b[3]) - max(a[1], b[1]) > 0.5


def inside(a, b):
    return b[0] <= a[0] + 0.5 and b[1] <= a[1] + 0.5 and a[2] <= b[2] + 0.5 and a[3] <= b[3] + 0.5


def check(figure):
    """Nothing lies on anything that it does not belong to."""
    found = boxes(figure)
    words = of(found, "text", "name", "size", "line", "key", "title")
    nodes, plates = of(found, "node"), of(found, "plate")
    for (one, a), (other, b) in itertools.combinations(words.items(), 2):
        assert not overlap(a, b), f"{one} and {other}"
    for (one, a), (other, b) in itertools.combinations(nodes.items(), 2):
        assert not overlap(a, b), f"{one} and {other}"
    for name, box in words.items():
        kind, _, site = name.partition("-")
        for node, outline in nodes.items():
            if kind == "text" and node == f"node-{site}":
                assert inside(box, outline), f"{name} does not fit into its circle"
            else:
                assert not overlap(box, outline), f"{name} lies on {node}"
        for plate, frame in plates.items():
            crosses = overlap(box, frame) and not inside(box, frame)
            assert not crosses, f"the border of {plate} runs through {name}"
    for name, box in nodes.items():
        for plate, frame in plates.items():
            assert inside(box, frame) or not overlap(box, frame), f"the border of {plate} runs through {name}"
    page = figure.bbox.extents
    for name, (_, box) in found.items():
        assert inside(box, page), f"{name} leaves the page"
    return found


@pytest.mark.parametrize("name", STORIES)
def test_nothing_painted_overlaps(name):
    """Labels, circles, borders, lines of mathematics and the title of every story of the zoo."""
    story, data = STORIES[name].example()
    found = check(draw_plates(story, title=name, **data))
    assert of(found, "node") and of(found, "line")


@pytest.mark.parametrize("name", STORIES)
def test_no_arrow_runs_through_a_foreign_circle(name):
    story, data = STORIES[name].example()
    figure = draw_plates(story, show_lines=False, **data)
    found = boxes(figure)
    circles = {n: a for n, (a, _) in found.items() if n.startswith("node-")}
    for edge, (arrow, _) in found.items():
        if not edge.startswith("edge-"):
            continue
        parent, _, child = edge.removeprefix("edge-").partition("_3e_")
        path = arrow.get_path()
        drawn = path.vertices[path.codes != path.CLOSEPOLY]
        tip = drawn[np.hypot(*(drawn - drawn[0]).T).argmax()]
        points = arrow.get_transform().transform(drawn[0] + np.linspace(0, 1, 60)[:, None] * (tip - drawn[0]))
        for node, circle in circles.items():
            if node not in (f"node-{parent}", f"node-{child}"):
                assert not circle.contains_points(points).any(), f"{edge} runs through {node}"


@pytest.mark.parametrize("view", [v for v in VIEWS if v not in ("plain", "guide")])
def test_views_colour_every_latent_and_say_what_the_colours_mean(view):
    """A latent without a colour, or a key that lies on the diagram."""
    name = {"exact": "CellTable", "gibbs": "TokenLDA"}.get(view, "PPCA")
    story, data = STORIES[name].example()
    found = check(draw_plates(story, view=view, title=name, **data))
    white = [n for n, (a, _) in found.items() if n.startswith("node-") and a.get_facecolor()[:3] == (1.0, 1.0, 1.0)]
    assert not white and of(found, "key")


def colour_of(figure, gid):
    return boxes(figure)[gid][0].get_facecolor()[:3]


def keys(figure):
    return [a.get_text() for n, (a, _) in boxes(figure).items() if n.startswith("key-")]


def test_a_method_is_shown_as_it_runs():
    """Enumerated, integrated, amortised and point latents must not be mixed up."""
    story, data = STORIES["MixtureOfFactorAnalysers"].example()
    figure = draw_plates(story, view="em", show_lines=False, **data)
    assert keys(figure) == [
        "enumerated: summed out exactly", "marginalised: integrated out exactly", "a point, the best value",
    ]  # fmt: skip
    assert len({colour_of(figure, f"node-{n}") for n in "cz"}) == 2
    story, data = STORIES["PPCA"].example()
    assert keys(draw_plates(story, view="svi", **data))[0].startswith("amortised")
    assert keys(draw_plates(story, view="nuts", **data)) == ["marginalised: integrated out exactly", "draws"]


def paired(x=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    c = pyro.sample("c", dist.Normal(b, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Normal(b + c, 1.0), obs=x)


def paired_guide(x=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.3 * a, 1.0))
    pyro.sample("c", dist.Normal(x.mean() + 0.1 * a, 1.0))
    return b


def edge_colours(figure):
    return {n: a.get_edgecolor() for n, (a, _) in boxes(figure).items() if n.startswith("edge-")}


def test_a_guide_keeps_what_it_says_and_drops_the_rest():
    """a to b is kept, b to c dropped (and lost given x), a to c and x to c are the guide's own."""
    figure = draw_plates(paired, torch.arange(5.0), guide=paired_guide)
    check(figure)
    found = edge_colours(figure)
    assert len({found["edge-a_3e_b"], found["edge-b_3e_c"], found["edge-b_3e_x"], found["edge-a_3e_c"]}) == 4
    assert found["edge-x_3e_c"] == found["edge-a_3e_c"]
    told = keys(figure)
    assert told[:3] == ["kept by the guide", "dropped by the guide", "the guide's own"]
    assert told[3] == "held independent given the data: $b$ and $c$"
    mean_field = keys(draw_plates(paired, torch.arange(5.0), guide="mean_field"))
    assert mean_field[0] == "dropped by the guide" and len(mean_field) == 2
    assert keys(draw_plates(paired, torch.arange(5.0), guide="full_rank")) == ["kept by the guide"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "bright"}, "view='bright' is unknown; use one of 'plain'"),
        ({"view": "guide"}, "has no guide; give one"),
        ({"guide": "broad"}, "guide='broad' is unknown"),
        ({"view": "gibbs"}, "gibbs cannot answer this story: "),
    ],
)
def test_views_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_plates(paired, torch.arange(5.0), **options)


def test_the_contact_sheet_holds_every_story_apart(tmp_path):
    """Stories at one scale, and none on another."""
    stories = {name: STORIES[name].example() for name in ("GMM", "PPCA", "TokenLDA", "CategoricalHMM", "DTM", "Box")}
    figure = draw_sheet(stories, width=14.0, view="scope")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    areas = [axes.get_window_extent().extents for axes in figure.axes]
    assert len(areas) == len(stories)
    assert not any(overlap(a, b) for a, b in itertools.combinations(areas, 2))
    radii = {
        round(p.get_window_extent().height, 1)
        for axes in figure.axes
        for p in axes.patches
        if isinstance(p, matplotlib.patches.Ellipse) and "-node-" in (p.get_gid() or "") and p.height > 0.3
    }
    assert len(radii) == 1
    titles = [t.get_text() for axes in figure.axes for t in axes.texts if t.get_gid().endswith("-title")]
    assert titles == list(stories)
    figure.savefig(tmp_path / "sheet.svg")
    ids = re.findall(r'\bid="((?:\w+-)(?:node|edge|plate|title)[^"]*)"', (tmp_path / "sheet.svg").read_text())
    assert len(ids) == len(set(ids)) > 40
    with pytest.raises(ValueError, match="stories is empty"):
        draw_sheet({})


@pytest.mark.parametrize("name", STORIES)
def test_text_for_other_tools_names_every_node_once_and_closes_every_plate(name):
    story, data = STORIES[name].example()
    dot, mermaid = to_graphviz(story, **data), to_mermaid(story, **data)
    assert dot.count("{") - dot.count("_{") == dot.count("}") - len(re.findall(r"_\{[^}]*\}", dot))
    assert mermaid.count("subgraph ") == len(re.findall(r"^ *end$", mermaid, re.M)) == dot.count("subgraph ")
    assert len(re.findall(r"\bn\d+ \[label", dot)) == len(re.findall(r'\bn\d+(?:\(\(|\[)"', mermaid))
    assert dot.count("->") == mermaid.count("-->") + mermaid.count("---")


def test_crossing_plates_have_a_place_in_text_too():
    """Clusters cannot cross: the second plate stands once inside the first and once outside."""

    def ratings(r=None):
        users, items = pyro.plate("users", 4, dim=-2), pyro.plate("items", 3, dim=-1)
        with users:
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with items:
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with users, items:
            pyro.sample("r", dist.Normal(u * v, 1.0), obs=r)

    dot = to_graphviz(ratings, torch.zeros(4, 3))
    assert len(re.findall(r'label="items ', dot)) == 2 and len(re.findall(r'label="users ', dot)) == 1
    check(draw_plates(ratings, torch.zeros(4, 3)))
