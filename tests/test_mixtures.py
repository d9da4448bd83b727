"""Mixtures of every kind of column, k-means as a limit, conjugate priors, and naive Bayes: oracles and lecture numbers."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.cluster import KMeans as Peer
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.naive_bayes import CategoricalNB

from inference import EM, NUTS, fit
from zoo import (
    GMM,
    BernoulliMixture,
    CategoricalMixture,
    ConjugateGMM,
    KMeans,
    MixedMixture,
    NaiveBayes,
    load,
)
from zoo.catalog import get

NAMES = ["BernoulliMixture", "CategoricalMixture", "MixedMixture", "MultinomialMixture", "ConjugateGMM"]


def log_rows(name, d, data):
    """log p(x_n | k) of every row and component, by scipy."""
    d, data = ({n: v.numpy() for n, v in m.items()} for m in (d, data))
    K, found = len(d["pi"]), []
    for k in range(K):
        total = 0.0
        if name == "BernoulliMixture":
            total = scipy.stats.bernoulli.logpmf(data["x"], d["p"][k]).sum(1)
        elif name == "MultinomialMixture":
            total = np.array([scipy.stats.multinomial.logpmf(r, int(r.sum()), d["phi"][k]) for r in data["x"]])
        elif name == "CategoricalMixture":
            total = sum(np.log(d["phi"][k, j][data["x"][:, j]]) for j in range(data["x"].shape[1]))
        elif name == "ConjugateGMM":
            cov = np.linalg.inv(d["Lambda"][k])
            total = scipy.stats.multivariate_normal.logpdf(data["x"], d["mu"][k], cov)
        else:
            total = scipy.stats.norm.logpdf(data["real"], d["mu"][k], d["tau"][k] ** -0.5).sum(1)
            total = total + scipy.stats.poisson.logpmf(data["counts"], d["lam"][k]).sum(1)
            total = total + scipy.stats.bernoulli.logpmf(data["binary"], d["p"][k]).sum(1)
            total = total + np.log(d["phi"][k, 0][data["categories"][:, 0]])
        found.append(total)
    return np.stack(found)


@pytest.mark.parametrize("name", NAMES)
def test_rows_equal_the_sum_over_all_assignments(name):
    """Four rows, K^4 assignments by brute force with scipy's densities, against log_prob."""
    story, data = get(name).example()
    few = {n: v[:4] for n, v in data.items()}
    posterior = fit(story, few, EM(restarts=1, max_iter=5), seed=0)
    d = posterior.draw(0)
    table = log_rows(name, d, few) + np.log(d["pi"].numpy())[:, None]
    total = [sum(table[k, n] for n, k in enumerate(z)) for z in itertools.product(range(len(table)), repeat=4)]
    assert math.isclose(float(posterior.log_prob().sum()), np.logaddexp.reduce(total), abs_tol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_every_update_is_closed_climbs_and_recovers_the_truth(name):
    story, data = get(name).example()
    posterior = fit(story, data, EM(restarts=5), seed=0)
    plan = posterior.diagnostics["plan"]
    assert "L-BFGS" not in plan and "softmax" in plan
    assert np.diff(posterior.history).min() > -1e-8 and posterior.converged
    names = {"MixedMixture": "patients", "BernoulliMixture": "answers", "ConjugateGMM": "three_clusters"}
    names |= {"MultinomialMixture": "bags_of_words", "CategoricalMixture": "survey"}
    labels = load(names[name]).labels
    truth = load(names[name]).truth
    best = log_rows(name, truth, data) + np.log(truth["pi"].numpy())[:, None]
    reachable = adjusted_rand_score(labels, best.argmax(0))
    assert adjusted_rand_score(labels, posterior.local("z").argmax(1)) > reachable - 0.05
    assert set(posterior.draws) == set(truth) - {"z"}


@pytest.mark.parametrize("name", NAMES)
def test_stories_dream_and_kernels_agree(name):
    """A prior draw can be explained; the kernel equals the contraction to 1e-8."""
    story, data = get(name).example()
    few = {n: v[:60] for n, v in data.items()}
    fast = fit(story, few, EM(restarts=1, max_iter=8, tol=0.0), seed=0)
    slow = fit(story, few, EM(restarts=1, max_iter=8, tol=0.0, kernels=False), seed=0)
    np.testing.assert_allclose(fast.history, slow.history, rtol=0, atol=1e-7)
    torch.manual_seed(0)
    seen = story.model(num_data=7)
    assert all(len(v) == 7 for v in (seen.values() if isinstance(seen, dict) else [seen]))


@pytest.mark.parametrize("name", ["BernoulliMixture", "CategoricalMixture", "MultinomialMixture"])
def test_guides_reach_what_em_reaches(name):
    """SVI by the story's guide: the same rows together as EM's mode."""
    story, data = get(name).example()
    svi, em = fit(story, data, "svi", seed=0), fit(story, data, EM(restarts=5), seed=0)
    assert adjusted_rand_score(svi.local("z").argmax(1), em.local("z").argmax(1)) > 0.9


@pytest.mark.slow
def test_em_svi_and_nuts_agree_on_binary_answers():
    """Shares of yes within 2 posterior sd of NUTS's mean, components matched by the fit."""
    story, data = BernoulliMixture.example()
    from inference import compare

    table = compare(story, data, methods=["em", "svi", NUTS(warmup=300, draws=300)], test=None, seed=0)
    reference = table.posteriors["nuts"]
    mean, sd = reference.draws["p"].mean(0), reference.draws["p"].std(0)
    for name in ("em", "svi"):
        p = table.posteriors[name].draws["p"].mean(0)
        gaps = [((p[list(order)] - mean).abs() / sd).max() for order in ([0, 1], [1, 0])]
        assert min(gaps) < 2.5


def test_digits_as_binary_pictures():
    """Ten Bernoulli components on binarised digits: far better than independent pixels, labels far from chance."""
    digits = load_digits()
    x = (torch.from_numpy(digits.data) > 7).double()
    mixture = fit(BernoulliMixture(10), x, EM(restarts=3), seed=0)
    independent = fit(BernoulliMixture(1), x, EM(restarts=1), seed=0)
    assert mixture.log_prob().mean() > independent.log_prob().mean() + 4
    assert adjusted_rand_score(digits.target, mixture.local("z").argmax(1)) > 0.45


def test_missing_cells_of_mixed_columns_drop_out():
    """The log-likelihood of rows with holes is that of the cells that are seen, and holes are imputed."""
    story, data = MixedMixture.example()
    few = {n: v[:40].clone() for n, v in data.items()}
    few["real"][3, 1] = few["counts"][5, 0] = math.nan
    posterior = fit(story, few, EM(restarts=1, max_iter=20), seed=0)
    assert "L-BFGS" not in posterior.diagnostics["plan"]
    d = posterior.draw(0)
    filled = {n: v.nan_to_num(0.0) if v.is_floating_point() else v for n, v in few.items()}
    table = log_rows("MixedMixture", d, filled)
    for k in range(2):
        table[k, 3] -= scipy.stats.norm.logpdf(0.0, d["mu"][k, 1], d["tau"][k, 1] ** -0.5)
        table[k, 5] -= scipy.stats.poisson.logpmf(0, d["lam"][k, 0])
    expected = np.logaddexp.reduce(table + np.log(d["pi"].numpy())[:, None])
    np.testing.assert_allclose(posterior.log_prob(), expected, atol=1e-9)
    assert len(posterior.impute(draws=20).index) == 1


# k-means


@pytest.mark.parametrize("name", ["three_clusters", "iris"])
def test_the_limit_is_lloyds_algorithm(name):
    """From the same centres: scikit-learn's centres, inertia and labels; responsibilities that are 0 or 1."""
    x = load(name).x
    start = x[torch.tensor([0, len(x) // 2, len(x) - 1])]
    peer = Peer(3, init=start.numpy(), n_init=1, tol=0.0).fit(x.numpy())
    scale = tuple(float(v) for v in x.std() * torch.ones(x.shape[1]))
    posterior = fit(
        KMeans(3, loc=tuple(x.mean(0).tolist()), scale=scale), x, EM(start={"mu": start}, tol=0.0, max_iter=60), seed=0
    )
    centres, z = posterior.draw(0)["mu"], posterior.local("z")
    np.testing.assert_allclose(centres, peer.cluster_centers_, atol=1e-6)
    assert ((z < 1e-6) | (z > 1 - 1e-6)).double().mean() > 0.999
    assert torch.equal(z.argmax(1), torch.from_numpy(peer.labels_).long())
    inertia = ((x - centres[z.argmax(1)]) ** 2).sum()
    assert math.isclose(float(inertia), peer.inertia_, rel_tol=1e-6)


def test_a_gaussian_mixture_hardens_into_k_means():
    """One shared variance sent to 0: GMM's own E-step gives the nearest centre."""
    x = load("three_clusters").x
    centres = torch.tensor([[-2.0, 0.0], [1.5, 1.0], [2.0, -1.5]], dtype=torch.float64)
    start = {"pi": torch.ones(3) / 3, "mu": centres, "tau": torch.full((3,), 1e6)}
    posterior = fit(GMM(3, covariance="spherical"), x, EM(start=start, max_iter=1), seed=0)
    nearest = torch.cdist(x, centres).argmin(1)
    assert torch.equal(posterior.local("z").argmax(1), nearest)


def test_conjugate_objective_is_scipys():
    x = load("three_clusters").x
    posterior = fit(ConjugateGMM(2, scale=2.0, strength=0.5), x, EM(restarts=2), seed=0)
    d = {n: v.numpy() for n, v in posterior.draw(0).items()}
    total = float(posterior.log_prob().sum()) + math.lgamma(2)
    for k in range(2):
        total += scipy.stats.wishart.logpdf(d["Lambda"][k], 4, np.eye(2) / (2 * (2 / 3) ** 2))
        total += scipy.stats.multivariate_normal.logpdf(d["mu"][k], np.zeros(2), np.linalg.inv(0.5 * d["Lambda"][k]))
    assert math.isclose(posterior.diagnostics["objective"], total, abs_tol=1e-7)


# Naive Bayes

FACES = load("faces").x.long()
SIZES = (7, 6, 3, 4, 8)


def test_the_lectures_product_of_shares():
    """0.46 * 0.16 * 0.44 * 0.38 * 0.44 = 0.0054 for straight red hair, round glasses, scoop neck, white."""
    posterior = fit(NaiveBayes(SIZES), FACES, EM(estimate="mle"), seed=0)
    row = torch.tensor([[3, 4, 1, 2, 7]])
    p = float(posterior.log_prob(row).exp())
    assert math.isclose(p, 0.46 * 0.16 * 0.44 * 0.38 * 0.44, rel_tol=1e-10) and round(p, 4) == 0.0054


def test_a_seen_class_makes_scikit_learns_classifier():
    """Smoothed shares and p(y | x) equal CategoricalNB's (alpha = 1), and the exact posterior's mean is these shares."""
    survey = load("survey")
    x, y = survey.x.long(), survey.labels
    story = NaiveBayes((3,) * 5, num_classes=2)
    peer = CategoricalNB(alpha=1.0).fit(x.numpy(), y.numpy())
    exact = fit(story, {"x": x, "y": y}, seed=0)
    assert exact.method.name == "exact"
    mean = exact.diagnostics["mean"]
    for j in range(5):
        np.testing.assert_allclose(mean[f"theta_{j}"], np.exp(peer.feature_log_prob_[j]), rtol=1e-10)
    mode = fit(NaiveBayes((3,) * 5, num_classes=2, pseudo_count=2.0), {"x": x, "y": y}, "em", seed=0).draw(0)
    np.testing.assert_allclose(mode["theta_2"], mean["theta_2"], rtol=1e-10)
    shares = torch.bincount(y).double() / len(y)
    found = story.classify({**mean, "pi": shares}, x)
    np.testing.assert_allclose(found, peer.predict_proba(x.numpy()), atol=1e-6)


def test_a_hidden_class_is_found_again():
    survey = load("survey")
    posterior = fit(NaiveBayes((3,) * 5, num_classes=2, pseudo_count=1.1), survey.x.long(), EM(restarts=5), seed=0)
    assert adjusted_rand_score(survey.labels, posterior.local("y").argmax(1)) > 0.75
    same = fit(CategoricalMixture(2, 3), survey.x.long(), EM(restarts=5), seed=0)
    assert math.isclose(posterior.diagnostics["log_likelihood"], same.diagnostics["log_likelihood"], abs_tol=1e-3)


def test_independent_features_fail_on_pictures():
    """The lectures' warning: rows of independent pixels are far less likely than rows of a mixture."""
    x = (torch.from_numpy(load_digits().data[:400]) > 7).long()
    live = [j for j in range(64) if 0 < int(x[:, j].sum()) < 400][:30]
    one = fit(NaiveBayes((2,) * len(live)), x[:, live], EM(), seed=0).log_prob().mean()
    ten = (
        fit(NaiveBayes((2,) * len(live), num_classes=6, pseudo_count=1.5), x[:, live], EM(restarts=2), seed=0)
        .log_prob()
        .mean()
    )
    assert ten > one + 2


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: NaiveBayes(3), "sizes"),
        (lambda: NaiveBayes((2, 0)), "sizes"),
        (lambda: BernoulliMixture(0), "num_components"),
        (lambda: CategoricalMixture(2, 3, concentration=-1.0), "concentration"),
        (lambda: KMeans(2, spread=0.0), "spread"),
        (lambda: MixedMixture(2, rate=math.inf), "rate"),
        (lambda: NaiveBayes((2, 2)).model(torch.zeros(4, 3).long()), "2 columns"),
        (lambda: NaiveBayes((2, 2)).model(torch.zeros(4, 2).long(), torch.zeros(4).long()), "num_classes"),
        (lambda: BernoulliMixture(2).model(torch.zeros(4)), r"\(N, D\)"),
    ],
)
def test_settings_are_checked(make, word):
    with pytest.raises(ValueError, match=word):
        make()
