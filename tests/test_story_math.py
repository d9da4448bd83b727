"""The story as LaTeX and MathML says what the program says."""

import re
from xml.etree import ElementTree

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import draw_plates, story_density, story_latex, story_mathml, story_text, to_graphviz
from inference.provenance import relations
from zoo.catalog import catalog

STORIES = {entry.name: entry for entry in catalog()}
MATHML = "{http://www.w3.org/1998/Math/MathML}"


def coin(x=None):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", 10):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def chain(x):
    A = pyro.sample("A", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    z = 0
    for t, seen in enumerate(x):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Bernoulli(0.1 + 0.8 * z), obs=seen)


def learned(X, y):
    w = pyro.param("w", torch.ones(2))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ w + b, 1.0), obs=y)


def test_a_coin_is_written_as_a_page_would_have_it():
    told, product = story_latex(coin, torch.ones(10)).split("\\end{aligned} \\\\[1.5ex]\n")
    assert told.splitlines()[1:] == [
        r"\begin{aligned}",
        r"p &\sim \mathrm{Beta}(1, 1) \\",
        r"x_{n} &\sim \mathrm{Bernoulli}(p) &&\text{for } n = 1, \ldots, N \\",
        r"& &&\text{where } N = 10",
    ]
    assert r"p(p, x) &= p(p) \, \prod_{n=1}^{N} p(x_{n} \mid p)" in product


def test_the_density_of_a_chain_multiplies_over_its_steps():
    """A factor that conditions on all steps, or a product that begins at the wrong one, would show."""
    text = story_density(chain, torch.zeros(6))
    assert text == ("p(A, z, x) = p(A) p(z_0 | A) p(x_0 | z_0) ∏_t p(z_t | A, z_{t-1}) p(x_t | z_t)")
    assert r"\prod_{t=1}^{5} p(z_{t} \mid A, z_{t-1})" in story_latex(chain, torch.zeros(6))


def test_what_is_learned_or_given_stands_behind_the_semicolon():
    text = story_density(learned, torch.arange(8.0).view(4, 2), torch.zeros(4))
    assert text == "p(b, y; X, w) = p(b) ∏_n p(y_n | b; X_n, w)"


@pytest.mark.parametrize("name", STORIES)
def test_every_sampled_site_is_a_factor_given_its_parents(name):
    """A dependency lost or invented on the way from trace to page."""
    story, data = STORIES[name].example()
    sites = relations(story, **data)
    random = {n: s for n, s in sites.items() if s.kind in ("latent", "observed")}
    text = re.sub(r"\{[^}]*\}", "", story_density(story, **data))  # indices hold commas too
    factors = re.findall(r"p\(([^()]*)\)", text.partition(" = ")[2])
    given = {f.partition(" | ")[2].count(",") + bool(f.partition(" | ")[2]) for f in factors}
    expected = {sum(sites[p].kind not in ("input", "parameter", "module") for p in s.parents) for s in random.values()}
    assert given == expected
    assert len(factors) <= len(random)


@pytest.mark.parametrize("name", STORIES)
def test_every_formula_is_valid_in_two_other_readers(name):
    """matplotlib's mathtext parses every cell of the LaTeX; an XML parser reads the MathML, and no command is left."""
    from matplotlib.mathtext import MathTextParser

    story, data = STORIES[name].example()
    latex = story_latex(story, **data)
    assert latex.count("{") == latex.count("}")
    parser = MathTextParser("path")
    for line in latex.splitlines():
        if not line.startswith(("\\begin", "\\end")):
            for cell in line.removesuffix(r" \\").split("&"):
                parser.parse(f"${cell.strip() or 'x'}$")
    for element in re.findall(r"<math.*?</math>", story_mathml(story, **data), re.S):
        root = ElementTree.fromstring(element)
        assert root.tag == f"{MATHML}math" and "\\" not in "".join(root.itertext())
        widths = {len(row) for row in root.iter(f"{MATHML}mtr")}
        assert len(widths) == 1


def test_relations_are_relations_in_mathml():
    """latex2mathml takes the tilde for a letter, which browsers then set without space."""
    text = story_mathml(coin, torch.ones(10))
    assert text.count('<mo form="infix">&#x0223C;</mo>') == 2 and "<mi>&#x0007E;</mi>" not in text


def named(x=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("kinds", 2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.2))
    with pyro.plate("data", 5):
        kind = pyro.sample("kind", dist.Categorical(weights))
        pyro.sample("arrivals", dist.Poisson(rate[kind]), obs=x)


class Named:
    """The same, with the lecture's symbols."""

    symbols = {"weights": "pi", "rate": "lam", "kind": "z", "arrivals": "x", "data": "i"}  # noqa: RUF012

    def model(self, x=None):
        return named(x)


def test_a_story_brings_its_own_symbols():
    """Words where the lecture has letters, in any of the forms; symbols of one story that stay for the next."""
    own, x = Named(), torch.arange(5.0)
    assert story_density(own, x) == "p(π, λ, z, x) = p(π) ∏_k p(λ_k) ∏_i p(z_i | π) p(x_i | λ, z_i)"
    assert r"x_{i} &\sim \mathrm{Poisson}(\lambda_{z_{i}}) &&\text{for } i = 1, \ldots, I" in story_latex(own, x)
    assert "x_i ~ Poisson(λ[z_i])" in story_text(own, x) and "weights" not in to_graphviz(own, x)
    drawn = [text.get_text() for text in draw_plates(own, x).axes[0].texts]
    assert r"$\lambda_{k}$" in drawn and "$z_{i}$" in drawn
    assert "p(weights, rate, kind, arrivals)" in story_density(named, x)


def test_symbols_of_another_kind_are_refused():
    story = Named()
    story.symbols = {"rate": 3}
    with pytest.raises(TypeError, match="symbols of the story must map names"):
        story_density(story, torch.arange(5.0))
