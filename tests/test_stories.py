"""The zoo's stories: densities against scipy and scikit-learn, guides, settings, catalog."""

import random
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.util import site_is_subsample
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

import zoo
from zoo import GMM, PoissonMixture, load
from zoo.catalog import catalog, get
from zoo.mixtures import Wishart, cluster_means

COVARIANCES = ("full", "diag", "tied", "spherical")
STORIES = [GMM(3, covariance, scale=2.0) for covariance in COVARIANCES] + [PoissonMixture(3)]
NAMES = [*COVARIANCES, "poisson"]


@pytest.fixture(autouse=True)
def own_world():
    """Float64 and a fixed seed for each test, and nothing of it for the next."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)


def data_for(story):
    return load("three_clusters" if isinstance(story, GMM) else "poisson_counts").x


def run(program, *args, **kwargs):
    """Sample sites of one run, by name, without the plates."""
    nodes = poutine.trace(program).get_trace(*args, **kwargs).nodes
    return {n: s for n, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}


def enumerated(story, x, values):
    """log p(x_n, z_n = k | values) by Pyro's enumeration: (K, N)."""
    model = poutine.enum(config_enumerate(poutine.condition(story.model, values)), first_available_dim=-2)
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    z, x_site = trace.nodes["z"]["log_prob"], trace.nodes["x"]["log_prob"]
    assert x_site.shape == (story.num_components, len(x))
    return z + x_site


def global_values(story, x):
    """A draw of pi, mu, ... from the prior."""
    sites = run(story.model, num_data=2, **({} if x.ndim == 1 else {"num_features": x.shape[1]}))
    return {name: site["value"] for name, site in sites.items() if name not in ("z", "x")}


# The Wishart distribution


@pytest.mark.parametrize("given", ["precision_matrix", "scale_tril", "covariance_matrix"])
def test_wishart_density_is_scipys(given):
    """Scale and inverse scale mixed up, or a missing normaliser."""
    df, scale = 6.5, torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.2], [0.1, -0.2, 0.7]])
    argument = {
        "precision_matrix": torch.linalg.inv,
        "scale_tril": torch.linalg.cholesky,
        "covariance_matrix": torch.clone,
    }[given](scale)
    ours = Wishart(df, **{given: argument})
    theirs = scipy.stats.wishart(df=df, scale=scale.numpy())
    value = torch.from_numpy(theirs.rvs(5, random_state=0))
    np.testing.assert_allclose(ours.log_prob(value).numpy(), theirs.logpdf(value.numpy().T), rtol=1e-10)


def test_wishart_draws_have_the_moments_of_a_wishart():
    """A wrong Bartlett factor: E = df V and Var_ij = df (V_ij^2 + V_ii V_jj), within 5 standard errors."""
    fn = Wishart(torch.tensor([5.0, 9.0]), covariance_matrix=torch.tensor([[2.0, 0.6], [0.6, 0.5]]))
    draws = fn.rsample((40_000,))
    assert draws.shape == (40_000, 2, 2, 2)
    error = (fn.variance / len(draws)).sqrt()
    assert ((draws.mean(0) - fn.mean).abs() < 5 * error).all()
    torch.testing.assert_close(draws.var(0), fn.variance, rtol=0.05, atol=0)


def test_wishart_draws_warn_of_nothing_and_keep_what_the_story_gave():
    """torch's own draws warn "Singular sample detected" of sound matrices; a draw must not add a scale_tril."""
    fn = Wishart(4, precision_matrix=torch.eye(2)).expand([3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fn.support.check(fn.sample()).all()
    assert "precision_matrix" in vars(fn) and "scale_tril" not in vars(fn)


def test_wishart_gradients_are_those_of_the_mean():
    """A draw that is not differentiable in df or scale: E[tr M] = df tr(L L^T) has gradients tr(L L^T), 2 df L."""
    df = torch.tensor(6.0, requires_grad=True)
    L = torch.tensor([[1.0, 0.0], [0.4, 0.8]], requires_grad=True)
    draws = Wishart(df, scale_tril=L).rsample((40_000,))
    draws.diagonal(dim1=-2, dim2=-1).sum(-1).mean().backward()
    torch.testing.assert_close(df.grad, (L @ L.mT).trace().detach(), rtol=0.03, atol=0)
    torch.testing.assert_close(L.grad.tril(), 2 * 6 * L.detach(), rtol=0.03, atol=0.05)


# Densities


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_summing_out_z_gives_scikit_learns_density(covariance):
    """Precision taken for covariance, z paired with the wrong component, broadcasting along the wrong axis."""
    story, x = GMM(4, covariance), load("iris").x
    values = global_values(story, x)
    reference = GaussianMixture(4, covariance_type=covariance)
    reference.weights_, reference.means_ = values["pi"].numpy(), values["mu"].numpy()
    precision = values["Lambda"] if "Lambda" in values else values["tau"]
    if covariance in ("full", "tied"):
        # scikit-learn's factor U is upper triangular with U U^T the precision.
        factor = torch.linalg.cholesky(precision.flip((-1, -2))).flip((-1, -2))
    else:
        factor = precision.sqrt()
    reference.precisions_cholesky_ = factor.numpy()
    ours = enumerated(story, x, values).logsumexp(0)
    np.testing.assert_allclose(ours.numpy(), reference.score_samples(x.numpy()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("columns", [None, 3])
def test_summing_out_z_gives_a_mixture_of_poissons(columns):
    """Columns of one row added outside the sum over z."""
    story = PoissonMixture(3)
    x = torch.poisson(torch.full((20,) if columns is None else (20, columns), 5.0))
    values = global_values(story, x)
    lam = values["lam"].reshape(3, 1, -1).numpy()
    mass = scipy.stats.poisson(lam).logpmf(x.reshape(1, 20, -1).numpy()).sum(-1)
    expected = scipy.special.logsumexp(values["pi"].log().numpy()[:, None] + mass, axis=0)
    np.testing.assert_allclose(enumerated(story, x, values).logsumexp(0).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_priors_are_those_of_the_docstring(covariance):
    """A rate taken for a scale, a standard deviation for a variance; a column's scale that reaches another."""
    loc, scale, K, D = [0.0, 3.0], np.array([1.0, 6.0]), 3, 2
    story = GMM(K, covariance, concentration=1.5, loc=loc, scale=scale)
    trace = poutine.trace(story.model).get_trace(num_data=5)
    trace.compute_log_prob()
    sites = {n: trace.nodes[n]["value"].numpy() for n in ("pi", "mu", "tau", "Lambda") if n in trace.nodes}
    sums = {n: trace.nodes[n]["log_prob_sum"].item() for n in sites}
    variance = 2 * (scale / 3) ** 2
    expected = {
        "pi": scipy.stats.dirichlet([1.5] * K).logpdf(sites["pi"]),
        "mu": scipy.stats.norm(loc, 5 * scale).logpdf(sites["mu"]).sum(),
    }
    if covariance in ("full", "tied"):
        prior = scipy.stats.wishart(df=D + 2, scale=np.diag(1 / variance))
        expected["Lambda"] = np.sum(prior.logpdf(np.moveaxis(sites["Lambda"].reshape(-1, D, D), 0, -1)))
    else:
        rate = variance if covariance == "diag" else variance.mean()
        expected["tau"] = scipy.stats.gamma(2, scale=1 / rate).logpdf(sites["tau"]).sum()
    assert sums == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_component_is_one_gaussian(covariance):
    """K = 1: an index that needs two components."""
    story, x = GMM(1, covariance), load("three_clusters", num_data=10).x
    values = global_values(story, x)
    precision = values["Lambda"] if "Lambda" in values else values["tau"]
    if covariance in ("diag", "spherical"):
        precision = precision.reshape(1, -1) * torch.eye(2)
    expected = scipy.stats.multivariate_normal(
        values["mu"][0].numpy(), torch.linalg.inv(precision.reshape(2, 2)).numpy()
    ).logpdf(x.numpy())
    np.testing.assert_allclose(enumerated(story, x, values)[0].numpy(), expected, rtol=1e-10)


# Guides


@pytest.mark.parametrize("story", STORIES, ids=NAMES)
def test_guide_guesses_every_global_in_its_shape(story):
    """A latent that the guide forgets, one that it adds, or a shape that only broadcasts."""
    x = data_for(story)
    model, guide = run(story.model, x), run(story.guide, x)
    latents = set(model) - {"z", "x"}
    assert set(guide) == latents
    for name, site in guide.items():
        assert site["value"].shape == model[name]["value"].shape
        assert site["fn"].support.check(site["value"]).all()
    assert {name.split(".")[0] for name in pyro.get_param_store().keys()} == latents


@pytest.mark.parametrize("story", STORIES, ids=NAMES)
def test_every_guide_parameter_feels_the_bound(story):
    """A parameter that no gradient reaches, or a bound that is not finite from the start."""
    x = data_for(story)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.differentiable_loss(config_enumerate(story.model), story.guide, x)
    assert loss.isfinite()
    loss.backward()
    for name, value in pyro.get_param_store().named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and (value.grad != 0).any(), name


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_guide_starts_where_the_bound_is_already_good(covariance):
    """Parameters that start far from the data: with the truth's own scale the bound is within 20 % of a fitted one."""
    story, x = GMM(3, covariance, scale=2.0), load("three_clusters").x
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=20, vectorize_particles=False)
    best = GaussianMixture(3, covariance_type=covariance, random_state=0).fit(x.numpy()).score(x.numpy()) * len(x)
    for seed in range(4):
        torch.manual_seed(seed)
        with pyro.get_param_store().scope():
            start = elbo.loss(config_enumerate(story.model), story.guide, x)
        assert -best < start < -1.2 * best, seed


def test_centres_start_at_the_means_of_clusters():
    """Two centres in one of three far clusters, or columns of another unit: k-means++ and k-means on standardised columns."""
    centres = torch.tensor([[0.0, 0.0], [1000.0, 0.0], [0.0, 1.0]])
    rows = centres[:, None] + 0.001 * torch.randn(3, 30, 2)
    found, wanted = cluster_means(rows.flatten(0, 1), 3), rows.mean(1)
    nearest = ((found - wanted[:, None]) / torch.tensor([1000.0, 1.0])).square().sum(-1).argmin(0)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found, wanted[nearest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("story", STORIES, ids=NAMES)
def test_guide_starts_on_poor_data(story):
    """NaN cells, fewer rows than components, equal rows: each breaks k-means++ unless it is met."""
    x = data_for(story)[:50].clone()
    holes = x.clone()
    holes[::3] = torch.nan
    for poor in (holes, x[:2], x[:1].expand(50, *x.shape[1:]), torch.zeros_like(x)):
        with pyro.get_param_store().scope(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all(site["value"].isfinite().all() for site in run(story.guide, poor).values())


@pytest.mark.parametrize("story", STORIES, ids=NAMES)
def test_trained_guide_dreams_without_data(story):
    """`guide()` without data after a fit, for posterior predictive draws."""
    x = data_for(story)
    story.guide(x)
    guide = poutine.trace(story.guide).get_trace(num_data=7)
    rows = poutine.replay(story.model, trace=guide)(num_data=7)
    assert rows.shape == (7, *x.shape[1:])


# Sizes, types, settings


@pytest.mark.parametrize("story", STORIES, ids=NAMES)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_story_takes_the_dtype_of_its_data(story, default, dtype):
    """`expected Float but found Double` where data and torch's default differ: the latents take the finer of the two."""
    torch.set_default_dtype(default)
    x, finer = data_for(story).to(dtype), torch.promote_types(dtype, default)
    sites = run(story.model, x)
    assert all(site["fn"].log_prob(site["value"]).isfinite().all() for site in sites.values())
    assert {site["value"].dtype for name, site in sites.items() if name not in "xz"} == {finer}
    assert sites["x"]["value"].dtype == dtype
    assert {site["value"].dtype for site in run(story.guide, x).values()} == {finer}


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_dreams_have_the_sizes_asked_for(covariance):
    """D lost between data, settings and argument."""
    assert GMM(2, covariance).model(num_data=7, num_features=3).shape == (7, 3)
    assert GMM(2, covariance, loc=[0.0] * 4).model(num_data=7).shape == (7, 4)
    assert GMM(2, covariance, scale=torch.ones(5)).model(load("three_clusters").x.repeat(1, 3)[:, :5]).shape[1] == 5


def test_counts_come_single_or_in_rows():
    """One count a row must be (N,), not (N, 1)."""
    assert PoissonMixture(2).model(num_data=7).shape == (7,)
    assert PoissonMixture(2).model(num_data=7, num_features=1).shape == (7, 1)
    assert PoissonMixture(2, rate=[0.1, 1.0]).model(num_data=7).shape == (7, 2)


def test_stories_compare_hash_and_print_by_value():
    """Tensors among the settings, which neither compare nor hash."""
    ours, same = GMM(2, loc=torch.tensor([1.0, 2.0])), GMM(2, loc=np.array([1.0, 2.0]))
    assert ours == same == GMM(2, loc=(1, 2)) and hash(ours) == hash(same)
    assert repr(ours) == "GMM(num_components=2, covariance='full', concentration=1.0, loc=(1.0, 2.0), scale=1.0)"
    assert ours != GMM(2, loc=[1.0, 2.5])


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda: GMM(3, "round"), ["covariance", "'full', 'diag', 'tied', 'spherical'", "'round'"]),
        (lambda: GMM(0), ["num_components", "0"]),
        (lambda: GMM(2.0), ["num_components", "2.0"]),
        (lambda: GMM(True), ["num_components"]),
        (lambda: GMM(2, scale=0.0), ["scale", "positive", "0"]),
        (lambda: GMM(2, scale=[1.0, -3.0]), ["scale", "-3", "column 1"]),
        (lambda: GMM(2, scale=float("nan")), ["scale", "nan"]),
        (lambda: GMM(2, loc=float("inf")), ["loc", "inf"]),
        (lambda: GMM(2, loc=torch.zeros(2, 2)), ["loc", "(2, 2)"]),
        (lambda: GMM(2, concentration=-1.0), ["concentration", "positive", "-1"]),
        (lambda: GMM(2, concentration=[1.0, 2.0]), ["concentration", "one number"]),
        (lambda: GMM(2).model(torch.zeros(5)), ["x", "(5,)", "x[:, None]"]),
        (lambda: GMM(2, loc=[0.0] * 3).model(torch.zeros(5, 2)), ["loc has 3", "x has 2"]),
        (lambda: GMM(2, loc=[0.0] * 3, scale=[1.0] * 2).model(), ["scale has 2", "loc has 3"]),
        (lambda: GMM(2).model(num_features=0), ["num_features", "0"]),
        (lambda: PoissonMixture(2, rate=0.0), ["rate", "positive"]),
        (lambda: PoissonMixture(-1), ["num_components", "-1"]),
        (lambda: PoissonMixture(2, rate=[0.1, 0.2]).model(torch.zeros(5)), ["x", "(5,)"]),
        (lambda: PoissonMixture(2).model(num_features=0), ["num_features", "0"]),
    ],
)
def test_settings_out_of_range_are_named(make, texts):
    """A setting that fails later, inside a distribution, without its name."""
    with pytest.raises(ValueError) as error:
        make()
    assert all(text in str(error.value) for text in texts), error.value


def test_settings_of_the_wrong_type_are_named():
    """Words where numbers belong."""
    with pytest.raises(TypeError, match=r"scale must be a number .*'wide'"):
        GMM(2, scale="wide")


# Examples and the catalog


def same_story(one, other):
    """Equal settings, and equal weights where there are networks."""
    if not isinstance(one, torch.nn.Module):
        return one == other
    weights, others = one.state_dict(), other.state_dict()
    return repr(one) == repr(other) and all(torch.equal(weights[n], others[n]) for n in weights | others)


@pytest.mark.parametrize("entry", catalog(), ids=lambda entry: entry.name)
def test_example_leaves_the_world_alone_and_repeats_itself(entry):
    """A global seed that an example moves, parameters that it leaves, data that differ from call to call."""
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    story, data = entry.example()
    again = entry.example()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    assert not list(pyro.get_param_store().keys())
    assert same_story(story, again[0]) and data.keys() == again[1].keys()
    assert all(torch.equal(torch.as_tensor(data[name]), torch.as_tensor(again[1][name])) for name in data)
    assert isinstance(story, entry.story)


@pytest.mark.parametrize("entry", [get("GMM"), get("PoissonMixture")], ids=lambda entry: entry.name)
def test_example_can_be_explained_by_its_story(entry):
    """Clusters that even the truth cannot tell apart, or truth under other names than the story's sites."""
    story, data = entry.example()
    dataset = load("three_clusters" if entry.name == "GMM" else "poisson_counts")
    truth = {name: value for name, value in dataset.truth.items() if name != "z"}
    guess = enumerated(story, data["x"], truth).argmax(0)
    assert adjusted_rand_score(dataset.labels.numpy(), guess.numpy()) > 0.8
    assert set(run(story.model, **data)) - {"x"} == set(dataset.truth)


def test_catalog_finds_stories_by_name():
    """A misspelt name without a hint; a name in lower case refused."""
    assert get("gmm").story is GMM and get("PoissonMixture").story is PoissonMixture
    names = {entry.name for entry in catalog()}
    assert set(zoo.examples()) == names >= {"GMM", "PoissonMixture", "FactorAnalysis"} and names <= set(zoo.__all__)
    with pytest.raises(ValueError, match=r"'GNM'.*'PoissonMixture'.*mean 'GMM'"):
        get("GNM")
    with pytest.raises(AttributeError, match="GMN"):
        zoo.GMN  # noqa: B018


def in_a_new_process(program):
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_names_are_listed_without_torch():
    """A second of imports for a list of names."""
    in_a_new_process(
        "import sys, zoo; from zoo import catalog, datasets; "
        "assert [e.name for e in catalog()] and datasets() and 'GMM' in dir(zoo) and zoo.__version__; "
        "heavy = {'torch', 'pyro', 'pandas', 'numpy', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )


def test_catalog_stays_a_function_beside_its_module():
    """`zoo.catalog` turning into the module once something imports from it."""
    in_a_new_process(
        "import zoo.catalog; from zoo.catalog import get; from zoo import catalog; assert callable(catalog), catalog"
    )


def test_namesake_of_our_other_package_is_reported(tmp_path):
    """The unrelated distribution `inference` installed over ours, in silence."""
    info = tmp_path / "inference-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: inference\nVersion: 0.9\n")
    said = in_a_new_process(f"import sys; sys.path.append({str(tmp_path)!r}); import zoo")
    assert "inference (0.9)" in said and "pip uninstall inference" in said
    assert "inference" not in in_a_new_process("import zoo")
