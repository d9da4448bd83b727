"""Plate diagrams and story lines: relations against the stories' own text, geometry against rules."""

import itertools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK

from inference.plates import draw_plates
from inference.plates_algebra import Index, Opaque, Ref
from inference.plates_fold import fold_loops
from inference.plates_picture import picture
from inference.plates_symbols import symbol
from inference.provenance import dependencies, relations
from inference.story_text import story_lines, story_text
from zoo.catalog import get


@pytest.fixture(autouse=True)
def float64():
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(old)


def gmm(x, K=3):
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(x.shape[1]), 5.0).to_event(1))
        tau = pyro.sample("tau", dist.Gamma(torch.full((x.shape[1],), 2.0), 2 / 9).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Normal(mu[z], tau[z].rsqrt()).to_event(1), obs=x)


def hmm(x, K=3):
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("states", K):
        A = pyro.sample("A", dist.Dirichlet(torch.ones(K)))
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def lda(w, K=3, V=7):
    with pyro.plate("topics", K):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((V,), 0.1)))
    with pyro.plate("documents", w.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((K,), 0.5)))
        with pyro.plate("words", w.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(theta))
            pyro.sample("w", dist.Categorical(phi[z]), obs=w)


def factorisation(r, K=2):
    users, items = pyro.plate("users", r.shape[0], dim=-2), pyro.plate("items", r.shape[1], dim=-1)
    with users:
        U = pyro.sample("U", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with items:
        V = pyro.sample("V", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with users, items:
        pyro.sample("r", dist.Normal((U * V).sum(-1), 0.5), obs=r)


def regression(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(X)):
        mean = pyro.deterministic("mean", X @ w)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def large(x, group, y):
    mu_0 = pyro.sample("mu_0", dist.Normal(0.0, 1.0))
    sigma_0 = pyro.sample("sigma_0", dist.HalfNormal(1.0))
    nu, beta = pyro.sample("nu", dist.Gamma(2.0, 0.1)), pyro.sample("beta", dist.Normal(0.0, 1.0))
    rho, sigma = pyro.sample("rho", dist.Beta(1.0, 1.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", 6):
        alpha = pyro.sample("group_effect", dist.Normal(mu_0, sigma_0))
        gamma = pyro.sample("gamma", dist.Normal(beta, 1.0))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Bernoulli(rho))
        m = pyro.deterministic("m", alpha[group] + gamma[group] * x + u)
        s = pyro.deterministic("s", sigma * (1 + u))
        pyro.sample("y", dist.StudentT(nu, m, s), obs=y)


X = torch.linspace(-1.0, 1.0, 24).reshape(8, 3)
STORIES = {
    "gmm": (gmm, (torch.linspace(-2, 2, 40).reshape(10, 4),)),
    "hmm": (hmm, (torch.linspace(-1, 1, 10),)),
    "lda": (lda, (torch.arange(20).reshape(4, 5) % 7,)),
    "factorisation": (factorisation, (torch.linspace(0, 1, 15).reshape(5, 3),)),
    "regression": (regression, (X, X[:, 0])),
    "schools": (schools, (torch.arange(8.0), torch.arange(8.0) + 1)),
    "large": (large, (torch.linspace(0, 1, 12), torch.arange(12) % 6, torch.zeros(12))),
}  # single precision, as the default is while this file is read


def test_data_of_another_precision_are_no_hindrance():
    """`X @ w` of single and double precision fails in torch; which site depends on which is the same."""
    story, args = STORIES["regression"]
    assert args[0].dtype != torch.get_default_dtype()
    assert dependencies(story, *args) == dependencies(story, *(a.double() for a in args))


def parents(sites):
    return {name: set(site.parents) for name, site in sites.items()}


def test_a_mixture_is_read_as_it_was_written():
    """Fails when indexing loses a parent, a family or a constant is misread, or a plate is mixed up."""
    sites = relations(gmm, STORIES["gmm"][1][0])
    assert parents(sites) == {"pi": set(), "mu": set(), "tau": set(), "z": {"pi"}, "x": {"mu", "tau", "z"}}
    assert {n: s.kind for n, s in sites.items()}["x"] == "observed"
    assert [(p.name, p.size, p.dim) for p in sites["x"].plates] == [("data", 10, -1)]
    assert (sites["tau"].family, sites["tau"].constants) == ("Gamma", {"concentration": 2.0, "rate": 2 / 9})
    assert dict(sites["x"].arguments)["loc"] == Index(Ref("mu"), (Ref("z"),))


def test_a_markov_chain_depends_on_the_step_before_alone():
    sites = relations(hmm, torch.zeros(6))
    for t in range(1, 6):
        assert set(sites[f"z_{t}"].parents) == {"A", f"z_{t - 1}"}
        assert set(sites[f"x_{t}"].parents) == {"mu", f"z_{t}"}
    assert sites["z_0"].parents == ("pi",)


def test_nested_and_overlapping_plates():
    """Fails when plates are mixed up, or row-by-row dependence is claimed where there is none."""
    sites = relations(*[STORIES["lda"][0], *STORIES["lda"][1]])
    assert [p.name for p in sites["w"].plates] == ["documents", "words"]
    assert sites["w"].aligned == {"documents", "words"} and sites["z"].aligned == {"documents"}
    sites = relations(factorisation, STORIES["factorisation"][1][0])
    assert {p.name for p in sites["r"].plates} == {"users", "items"} and sites["r"].aligned == {
        "users",
        "items",
    }
    assert parents(sites)["r"] == {"U", "V"}


def test_deterministic_sites_are_nodes_or_seen_through():
    story, args = STORIES["regression"]
    assert dependencies(story, *args) == {"w": (), "mean": ("w",), "y": ("mean",)}
    assert dependencies(story, *args, through_deterministic=True) == {"w": (), "y": ("w",)}
    sites = relations(story, *args)
    assert (sites["sigma"].kind, sites["X"].kind, sites["mean"].kind) == (
        "parameter",
        "input",
        "deterministic",
    )
    assert [p.name for p in sites["X"].plates] == ["data"]  # row n of X is used for row n alone
    assert set(sites["y"].parents) == {"mean", "sigma"}


def test_a_network_is_one_node():
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))

    def decoder_story(x):
        pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    net.double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    sites = relations(decoder_story, torch.ones(5, 3))
    assert sites["decoder"].kind == "module" and set(sites["x"].parents) == {"decoder", "z"}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # running averages too


def test_values_that_leave_torch_are_followed_by_numbers():
    """`.item()`, branches, jitted functions and writing in place hide a dependence from the watch."""
    double = torch.jit.trace(lambda v: v * 2 + 1, torch.tensor(0.5))

    def story():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a.item() + 1.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.5))
        pyro.sample("d", dist.Normal(1.0 if c else -1.0, 1.0))
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        pyro.sample("f", dist.Normal(double(e), 1.0))
        loc = torch.zeros(3)
        view = loc[1:]
        loc[2] = e
        pyro.sample("g", dist.Normal(view, 1.0).to_event(1))
        pyro.sample("h", dist.Normal(torch.zeros_like(e), 1.0))

    assert dependencies(story) == {
        "a": (), "b": ("a",), "c": (), "d": ("c",), "e": (), "f": ("e",), "g": ("e",), "h": (),
    }  # fmt: skip


def test_any_program_gets_a_picture_even_if_it_cannot_be_watched(monkeypatch):
    """Without the watch the same graph is found by changing values."""
    story, args = STORIES["schools"]
    watched = parents(relations(story, *args))
    watched.pop("sigma")

    def refuse(self):
        raise RuntimeError("no modes here")

    monkeypatch.setattr("inference.plates_algebra.Watch.__enter__", refuse)
    assert {n: p - {"sigma"} for n, p in watched.items()} == parents(relations(story, *args))


def test_data_that_are_read_again_are_the_observed_sites():
    def autoregression(y):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        pyro.sample("y_0", dist.Normal(0.0, 1.0), obs=y[0])
        for t in range(1, len(y)):
            pyro.sample(f"y_{t}", dist.Normal(phi * y[t - 1], 1.0), obs=y[t])

    assert dependencies(autoregression, torch.arange(4.0))["y_3"] == ("phi", "y_2")
    assert story_text(autoregression, torch.arange(6.0)).splitlines()[1:] == [
        "y_0 ~ Normal(0, 1)", "for t in 1..5:", "    y_t ~ Normal(φ·y_{t-1}, 1)",
    ]  # fmt: skip


def test_row_by_row_is_not_claimed_where_rows_mix():
    def story(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)

    sites = relations(story, torch.zeros(5))
    assert "data" not in sites["x"].aligned
    assert story_text(story, torch.zeros(5)).splitlines()[-2] == "    x_n ~ Normal(z - f(z), 1)"


def test_story_lines_of_a_mixture():
    x = STORIES["gmm"][1][0]
    assert story_lines(gmm, x) == [
        r"$\pi \sim \mathrm{Dirichlet}(1, \ldots, 1)$",
        "for $k$ in 1..$K$  components:",
        r"    $\mu_{k} \sim \mathrm{Normal}(0, 5)$",
        r"    $\tau_{k} \sim \mathrm{Gamma}(2, 0.222)$",
        "for $n$ in 1..$N$  data:",
        r"    $z_{n} \sim \mathrm{Categorical}(\pi)$",
        r"    $x_{n} \sim \mathrm{Normal}(\mu_{z_{n}}, \tau_{z_{n}}^{-1/2})$",
    ]
    assert story_text(gmm, x).splitlines()[-2:] == [
        "    x_n ~ Normal(μ[z_n], τ[z_n]^(-1/2))",
        "where K = 3, N = 10",
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hmm", "    z_t ~ Categorical(A[z_{t-1}])"),
        ("lda", "        w_dn ~ Categorical(φ[z_dn])"),
        ("factorisation", "        r_ij ~ Normal(U_iᵀ V_j, 0.5)"),
        ("regression", "    mean_n = X_n·w"),
        ("schools", "    θ_j = μ + τ·η_j"),
        ("large", "    m_n = group effect[group_n] + γ[group_n]·x_n + u_n"),
    ],
)
def test_story_lines_elsewhere(name, line):
    story, args = STORIES[name]
    assert line in story_text(story, *args).splitlines()


def test_precision_and_unknown_functions_are_written_truly():
    def story(x):
        L = pyro.sample("Lambda", dist.Wishart(torch.tensor(5.0), torch.eye(2)))
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.MultivariateNormal(m.flip(0), precision_matrix=L), obs=x)
        pyro.factor("penalty", -(m.sum() ** 2))

    assert story_text(story, torch.zeros(2)).splitlines() == [
        "Λ ~ Wishart(5, I)", "m ~ Normal(0, 1)", "x ~ MultivariateNormal(f(m), Λ^(-1))",
        "penalty: factor exp(-g(m)^2)",
    ]  # fmt: skip
    assert dict(relations(story, torch.zeros(2))["x"].arguments)["loc"] == Opaque(frozenset({"m"}))


def test_sequential_plates_fold_only_where_rounds_are_alike():
    def alike(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def unlike(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(float(i), 1.0), obs=x[i])

    folded = fold_loops(relations(alike, torch.zeros(5)))
    assert list(folded) == ["mu", "z", "x"] and [(p.name, p.size) for p in folded["x"].plates] == [("data", 5)]
    unfolded = fold_loops(relations(unlike, torch.zeros(5)))
    assert len(unfolded) == 5 and not any(s.plates for s in unfolded.values())


@pytest.mark.parametrize(
    ("name", "indices", "math_text", "plain"),
    [
        ("pi", [], r"\pi", "π"), ("Lambda", ["k"], r"\Lambda_{k}", "Λ_k"), ("lam", [], r"\lambda", "λ"),
        ("mu_0", ["k"], r"\mu_{0,k}", "μ_{0,k}"), ("z3", [], "z_{3}", "z_3"),
        ("Alpha", [], r"\mathrm{Alpha}", "Alpha"), ("sigma_beta", [], r"\sigma_{\beta}", "σ_β"),
        ("rate", ["n"], r"\mathrm{rate}_{n}", "rate_n"), ("log_sigma", [], r"\log\,\sigma", "log σ"),
        ("school_effect", [], r"\mathrm{school\ effect}", "school effect"),
    ],
)  # fmt: skip
def test_symbols(name, indices, math_text, plain):
    assert symbol(name, indices) == math_text
    assert symbol(name, indices, math_text=False) == plain


def rectangle(laid, name):
    (x, y), (w, h) = laid.centres[name], laid.halves[name]
    return x - w, y - h, x + w, y + h


def apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def inside(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


@pytest.mark.parametrize("name", STORIES)
def test_nothing_overlaps(name):
    """Nodes apart, plates around their members alone, labels inside, no arrow through a third node."""
    story, args = STORIES[name]
    laid = picture(fold_loops(relations(story, *args)))
    nodes = laid.graph.nodes
    for a, b in itertools.combinations(nodes, 2):
        assert apart(rectangle(laid, a), rectangle(laid, b)), (a, b)
    for plate, frame in laid.frames.items():
        for node in nodes.values():
            if plate in node.plates:
                assert inside(rectangle(laid, node.name), frame), (plate, node.name)
            else:
                assert apart(rectangle(laid, node.name), frame), (plate, node.name)
        label = laid.plate_labels[plate].box
        assert inside(label, frame) and all(apart(label, rectangle(laid, n)) for n in nodes)
    for a, b in itertools.combinations(laid.frames, 2):
        members = [{n.name for n in nodes.values() if p in n.plates} for p in (a, b)]
        if not members[0] & members[1]:
            assert apart(laid.frames[a], laid.frames[b]), (a, b)
    for parent, child in laid.graph.edges:
        start, end = np.array(laid.centres[parent]), np.array(laid.centres[child])
        for other in set(nodes) - {parent, child}:
            scale = 1 / np.array(laid.halves[other])
            points = (start + np.linspace(0, 1, 101)[:, None] * (end - start) - laid.centres[other]) * scale
            assert np.hypot(*points.T).min() > 1, (parent, child, other)


def test_chains_show_their_first_steps_dots_and_the_last():
    laid = picture(fold_loops(relations(hmm, torch.zeros(30))))
    assert {n for n in laid.graph.nodes if n.startswith("z")} == {"z_0", "z_1", "z ...", "z_29"}
    assert ("z_1", "z ...") in laid.graph.edges and ("z ...", "z_29") in laid.graph.edges
    heights = {laid.centres[n][1] for n in ("z_0", "z_1", "z ...", "z_29")}
    assert len(heights) == 1 and laid.centres["z_0"][0] < laid.centres["z_1"][0] < laid.centres["z_29"][0]


def test_the_same_story_gets_the_same_picture(tmp_path):
    """Whatever the state of the random generators."""
    story, args = STORIES["gmm"]
    pictures = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pictures.append(picture(fold_loops(relations(story, *args))))
    assert pictures[0] == pictures[1]
    for suffix in ("png", "svg", "pdf"):
        draw_plates(story, *args, title="mixture").savefig(tmp_path / f"story.{suffix}")
        assert (tmp_path / f"story.{suffix}").stat().st_size > 1000


def snapshot():
    import matplotlib
    import matplotlib.pyplot as plt

    return (
        torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
        torch.get_default_dtype(), dict(matplotlib.rcParams), plt.get_fignums(), list(warnings.filters),
        dict(pyro.get_param_store().get_state()["params"]), len(_PYRO_STACK),
        torch.distributions.Distribution._validate_args, poutine.util.is_validation_enabled(),
        torch.is_grad_enabled(),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["regression", "hmm"])
def test_nothing_is_left_behind(name):
    story, args = STORIES[name]
    copies = [a.clone() for a in args]
    before = snapshot()
    draw_plates(story, *args)
    assert snapshot() == before
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


def test_the_storys_own_exception_passes_and_the_stack_is_clean():
    class Mine(Exception):
        pass

    def broken(x):
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0))
            raise Mine("line 3")

    before = snapshot()
    with pytest.raises(Mine, match="line 3") as caught:
        draw_plates(broken, torch.zeros(3))
    assert caught.value.__context__ is None and snapshot() == before
    assert dependencies(gmm, STORIES["gmm"][1][0])["z"] == ("pi",)


def test_what_is_no_story_is_refused():
    class Mixture:
        def model(self, x):
            gmm(x)

    assert set(relations(Mixture(), np.ones((4, 2)))) == {"pi", "mu", "tau", "z", "x"}
    with pytest.raises(TypeError, match="is the class Mixture"):
        draw_plates(Mixture)
    with pytest.raises(TypeError, match="story is int"):
        relations(3)


def test_drawing_into_given_axes_keeps_the_figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    first, second = figure.subplots(1, 2)
    assert draw_plates(gmm, STORIES["gmm"][1][0], ax=second, show_lines=False) is figure
    assert not first.patches and len(second.patches) == 5 + 2 + 4  # nodes, plates, arrows


@pytest.mark.parametrize("name", ["RealNVP", "VAE", "GMM"])
def test_view_of_svi_with_and_without_a_guide(name):
    """A flow has networks and nothing to guess: its view needs no guide."""
    story, data = get(name).example()
    figure = draw_plates(story, view="svi", **data)
    assert figure.axes
