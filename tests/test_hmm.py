"""Hidden Markov models: the chain kernel and the stories against Baum-Welch, all paths, and the contraction."""

import itertools
import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import SHARED
from scipy.special import logsumexp
from scipy.stats import norm
from stories import hidden_markov
from test_em import baum_welch

from inference import EM, fit
from inference.methods.em.chain import forward_backward
from zoo import CategoricalHMM, GaussianHMM, load

REGIMES, WEATHER = load("regimes"), load("weather")


def matched(found, wanted):
    """The permutation of states that suits the truth best."""
    K = len(wanted)
    return min(itertools.permutations(range(K)), key=lambda p: float((found[list(p)] - wanted).abs().sum()))


def test_likelihoods_follow_baum_welch_to_rounding():
    """Log-likelihood of every iteration and the unknowns after ten, to 1e-10 of an independent implementation."""
    x = np.random.RandomState(0).randn(30, 12) + 3 * (np.random.RandomState(1).rand(30, 12) > 0.6)
    start = {"pi": [0.5, 0.5], "A": [[0.7, 0.3], [0.4, 0.6]], "mu": [-1.0, 2.0]}
    expected = baum_welch(x, *(np.array(start[n]) for n in ("pi", "A", "mu")), 10)
    posterior = fit(hidden_markov, x, EM(start=start, max_iter=10, tol=0.0), seed=0)
    assert "forward-backward" in posterior.diagnostics["plan"]
    np.testing.assert_allclose(
        posterior.diagnostics["log_likelihoods"], [h[0] for h in expected], rtol=1e-12, atol=1e-10
    )
    for site, value in zip(("pi", "A", "mu"), expected[-1][1:4]):
        np.testing.assert_allclose(posterior.draws[site][0], value, atol=1e-10)


def test_forward_backward_equals_the_sum_over_all_paths():
    """States, moves and likelihood of one short chain by brute force."""
    T, K = 4, 3
    first, move = torch.rand(K).double(), torch.rand(K, K).double()
    first, move = first / first.sum(), move / move.sum(1, keepdim=True)
    logits = 2 * torch.randn(T, 1, K, 1, dtype=torch.float64)
    states, pairs, total = forward_backward(first[None], [move[None]] * (T - 1), logits)
    paths = list(itertools.product(range(K), repeat=T))
    weights = []
    for path in paths:
        value = math.log(first[path[0]]) + sum(math.log(move[a, b]) for a, b in itertools.pairwise(path))
        weights.append(value + sum(float(logits[t, 0, k, 0]) for t, k in enumerate(path)))
    assert math.isclose(float(total), logsumexp(weights), abs_tol=1e-10)
    p = np.exp(weights - logsumexp(weights))
    for t in range(T):
        for k in range(K):
            assert math.isclose(
                float(states[t, 0, k, 0]), sum(w for w, path in zip(p, paths) if path[t] == k), abs_tol=1e-10
            )
    for a in range(K):
        for b in range(K):
            wanted = sum(w for w, path in zip(p, paths) if path[1] == a and path[2] == b)
            assert math.isclose(float(pairs[1, 0, a, b]), wanted, abs_tol=1e-10)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("story", [GaussianHMM(2, scale=3.0), CategoricalHMM(2, 3)])
def test_kernel_equals_contraction(story, lengths):
    """Same start, same objective at every iteration to 1e-8; shorter sequences too."""
    x = REGIMES.x[:12, :6] if isinstance(story, GaussianHMM) else WEATHER.x[:12, :6].long()
    data = {"x": x, "lengths": torch.arange(12) % 6 + 1} if lengths else {"x": x}
    values = story.guide and fit(story, data, EM(restarts=1, max_iter=2, kernels=False), seed=0).draw(0)
    fast, slow = (fit(story, data, EM(start=values, kernels=k, max_iter=8, tol=0.0), seed=0) for k in (True, False))
    assert "forward-backward" in fast.diagnostics["plan"] and "contraction" in slow.diagnostics["plan"]
    np.testing.assert_allclose(fast.history, slow.history, rtol=0, atol=1e-8)


def test_rows_of_several_columns_and_missing_steps():
    """x (N, T, D) with NaN: the log-likelihood of the seen cells by the forward algorithm in numpy."""
    x = torch.stack([REGIMES.x[:10, :5], -REGIMES.x[:10, :5] + 1.0], -1)
    x[2, 3, 1] = x[4, 0] = math.nan
    posterior = fit(GaussianHMM(2, scale=3.0), x, EM(restarts=1, max_iter=10), seed=0)
    d = {n: v.numpy() for n, v in posterior.draw(0).items()}
    expected = []
    for row in x.numpy():
        logs = np.nan_to_num(norm.logpdf(row[:, None], d["mu"], d["tau"] ** -0.5), nan=0.0).sum(-1)
        alpha = np.log(d["pi"]) + logs[0]
        for b in logs[1:]:
            alpha = logsumexp(alpha[:, None] + np.log(d["A"]), axis=0) + b
        expected.append(logsumexp(alpha))
    np.testing.assert_allclose(posterior.log_prob(), expected, atol=1e-8)
    assert np.diff(posterior.history).min() > -1e-8


def test_long_sequences_far_from_every_state_do_not_underflow():
    """Densities of e^-2000 a step: scaled passes stay finite where products would be 0."""
    x = torch.full((3, 300), 60.0, dtype=torch.float64)
    x[:, ::2] += 0.1
    start = {"pi": [0.5, 0.5], "A": [[0.9, 0.1], [0.1, 0.9]], "mu": [-2.0, 1.0]}
    posterior = fit(hidden_markov, x, EM(start=start, max_iter=1), seed=0)
    assert math.isfinite(posterior.diagnostics["log_likelihood"]) and posterior.diagnostics["log_likelihood"] < -1e6


def test_gaussian_example_recovers_its_truth():
    story, data = GaussianHMM.example()
    posterior = fit(story, data, seed=0)
    assert posterior.method.name == "em"
    d, truth = posterior.draw(0), REGIMES.truth
    p = list(matched(d["mu"], truth["mu"]))
    np.testing.assert_allclose(d["mu"][p], truth["mu"], atol=0.2)
    np.testing.assert_allclose(d["A"][p][:, p], truth["A"], atol=0.08)
    z = posterior.local("z").argmax(-1)
    assert (torch.tensor(p).argsort()[z] == truth["z"]).double().mean() > 0.97


def test_categorical_example_recovers_its_truth():
    story, data = CategoricalHMM.example()
    posterior = fit(story, data, EM(restarts=5), seed=0)
    d, truth = posterior.draw(0), WEATHER.truth
    p = list(matched(d["B"], truth["B"]))
    np.testing.assert_allclose(d["B"][p], truth["B"], atol=0.12)
    z = torch.tensor(p).argsort()[posterior.local("z").argmax(-1)]
    assert (z == truth["z"]).double().mean() > 0.8


def test_one_state_is_a_normal_and_wrong_lengths_are_named():
    posterior = fit(GaussianHMM(1, scale=3.0), REGIMES.x, "em", seed=0)
    assert abs(float(posterior.draw(0)["mu"]) - float(REGIMES.x.mean())) < 0.01
    with pytest.raises(ValueError, match=r"1\.\.20"):
        fit(GaussianHMM(2), {"x": REGIMES.x, "lengths": torch.full((60,), 21)}, "em", seed=0)
    with pytest.raises(ValueError, match="lengths has shape"):
        GaussianHMM(2).model(REGIMES.x, lengths=torch.ones(3).long())


@pytest.mark.slow
def test_em_svi_and_nuts_agree_on_a_small_chain():
    """Means within 2 posterior sd of NUTS's."""
    from inference import NUTS

    story, x = GaussianHMM(2, concentration=2.0, scale=3.0), REGIMES.x[:15, :8]
    em, svi, nuts = (fit(story, x, m, seed=0) for m in (EM(), "svi", NUTS(warmup=300, draws=300)))
    mean, sd = nuts.draws["mu"].mean(0), nuts.draws["mu"].std(0)
    for p in (em, svi):
        mu = p.draws["mu"].mean(0)
        assert ((mu[list(matched(mu, mean))] - mean).abs() < 2 * sd).all()


def published(y):
    """The two-state chain of posteriordb's hmm_example, which begins in either state alike."""
    A = pyro.sample("A", dist.Dirichlet(torch.ones(2)).expand([2]).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = None
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([0.5, 0.5]) if z is None else A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[:, t])


@pytest.mark.slow
def test_reference_posterior_of_an_hmm():
    """EM's mode within a posterior sd of the published draws, NUTS's means within 0.1 sd + 4 MCSE."""
    path = SHARED / "reference" / "data" / "hmm_example.json"
    if not path.exists():
        pytest.skip("the reference posteriors are not here")
    from inference import NUTS

    y = torch.tensor(json.loads(path.read_text())["y"], dtype=torch.float64)[None]
    known = json.loads((path.parents[1] / "summary" / "hmm_example-hmm_example.json").read_text())["params"]
    mode = fit(published, y, EM(restarts=3), seed=0).draw(0)
    nuts = fit(published, y, NUTS(chains=2, warmup=300, draws=500), seed=0)
    assert nuts.diagnostics["rhat"] < 1.02
    for name, found, point in (
        *((f"mu[{k + 1}]", nuts.draws["mu"][:, k], mode["mu"][k]) for k in range(2)),
        *((f"theta{k + 1}[{j + 1}]", nuts.draws["A"][:, k, j], mode["A"][k, j]) for k in range(2) for j in range(2)),
    ):
        mean, sd = known[name]["mean"], known[name]["sd"]
        assert abs(float(found.mean()) - mean) < 0.1 * sd + 4 * sd / 200**0.5
        assert abs(float(point) - mean) < sd
