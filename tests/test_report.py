"""The report of a comparison is one file that holds everything and asks nobody for anything."""

import re
from html import unescape

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import NUTS, compare


def arrivals(x=None, num_data=60):
    """Quiet and busy quarters of an hour."""
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        lam = pyro.sample("lam", dist.Gamma(2.0, 0.2))
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        return pyro.sample("x", dist.Poisson(lam[z]), obs=x)


@pytest.fixture(scope="module")
def found():
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([2.0, 12.0])[torch.randint(2, (60,), generator=generator)]
    x = torch.poisson(rates, generator=generator)
    return compare(arrivals, x, methods=("exact", "em", NUTS(chains=2, warmup=60, draws=60)), seed=0, progress=False)


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    return found.report(tmp_path_factory.mktemp("report") / "report.html").read_text(encoding="utf-8")


def test_it_holds_every_part(found, page):
    """A section lost on the way from the comparison to the page."""
    assert found.verdict.split(".")[0] in page
    assert all(w in unescape(page) for p in found.posteriors.values() for w in p.warnings)
    assert page.count("<svg") == 2 + 2 * len(found.posteriors)  # diagram, methods; each method's diagram and history
    assert page.count("<math") == 2  # the story, and its joint density
    assert "for&#x000A0;" in page and "&#x0220F;" in page
    assert "Quiet and busy quarters of an hour" in page  # the program itself
    assert "Not run" in page and "no closed form" in page
    for told in ("SHA-256 of the training data", "seed", "PyTorch", "Pyro", "NUTS(chains=2, warmup=60, draws=60"):
        assert told in page


def test_each_methods_diagram_says_what_it_does(page):
    """Points of EM and draws of NUTS are not the same colour."""
    plates = re.findall(r'id="(m\d)-plate-node-lam".*?fill: (#\w+)', page, re.S)
    assert len(dict(plates)) == 2 and len({colour for _, colour in plates}) == 2


def test_ids_are_unique_and_references_find_them(page):
    """Two figures with one id: the browser shows the first one's clipping and letters in both."""
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {r for r in re.findall(r'(?:href="#|url\(#)([^")]+)', page)} <= set(ids)


def test_nothing_is_fetched(page):
    fetched = re.findall(r'(?:src|srcset)="([^"]+)"|<link|<script|@import|url\((?!#)', page)
    assert not fetched
    addresses = {a for a in re.findall(r"(?:https?:)?//[\w./-]+", page) if "w3.org" not in a}
    assert not addresses  # namespaces are names, not places


def test_the_same_comparison_gives_the_same_page(found, tmp_path):
    first, second = (found.report(tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == second
