"""Values that no story can explain, or that stretch it: named before any work, or answered without a NaN."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fault_stories import (
    ALL,
    COUNTS,
    DENSITY,
    GRADIENT,
    LABELS,
    WORDS,
    X,
    answer,
    classes,
    line,
    rates,
    real,
    refused,
    seconds,
    series,
    sound,
    topics,
)
from fault_table import row
from stories import gaussian_mixture, normal_mixture, ppca

from inference import EM, fit
from zoo import GMM, PPCA, FactorAnalysis

pytestmark = pytest.mark.usefixtures("untouched")


NOISE = torch.Generator()


def noise(*shape):
    """Standard normal numbers that leave the user's own random state alone."""
    return torch.randn(*shape, generator=NOISE.manual_seed(5))


def spoiled(data, index, value):
    """The data with one value changed."""
    data = data.clone()
    data[index] = value
    return data


def student(x):
    """Rows whose cells have no closed marginal."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateStudentT(torch.tensor(5.0), loc, torch.eye(3)), obs=x)


@row("a NaN among the values", GRADIENT)
def test_a_nan_without_a_marginal_is_refused(method):
    words = ["x holds 1 NaN", r"first at index \(3, 1\)", "mask", "MultivariateNormal"]
    refused(ValueError, words, student, spoiled(X, (3, 1), math.nan), method)


@row("a NaN among the values", ("gibbs",))
def test_a_nan_among_word_counts_is_refused(method):
    refused(ValueError, ["w holds 1 NaN", r"\(3, 1\)"], topics(), spoiled(WORDS, (3, 1), math.nan), method)


@row("a NaN among the values", GRADIENT)
def test_a_nan_that_can_be_integrated_out_is_announced_and_equals_a_shorter_series(method):
    """Filling in zero or the mean instead of integrating would move the posterior."""
    hole = answer(series, spoiled(X[:, 0], 3, math.nan), method)
    assert "1 cell of x missing (NaN), the first at index 3: integrated out" in " ".join(hole.warnings)
    short = answer(series, torch.cat([X[:3, 0], X[4:, 0]]), method)
    if method == "em":
        assert torch.allclose(hole.draws["loc"], short.draws["loc"], atol=1e-8)
    else:
        assert abs(float(hole.draws["loc"].mean() - short.draws["loc"].mean())) < 0.15


@row("an infinity among the values", ALL, plus=math.inf, minus=-math.inf)
def test_an_infinity_is_named(method, case):
    story, data, name = real(method)
    refused(
        ValueError, [f"{name} holds 1 infinite", rf"{case}", r"\(3, 1\)"], story, spoiled(data, (3, 1), case), method
    )


@row("a NaN in a covariate", DENSITY)
def test_a_nan_in_a_covariate_is_named(method):
    data = {"X": spoiled(X, (5, 2), math.nan), "y": X[:, 0]}
    refused(ValueError, ["X holds 1 NaN", r"\(5, 2\)", "covariate"], line, data, method)


@row("a column of NaN", ALL)
def test_a_column_of_nan_is_named(method):
    story, data, name = real(method)
    refused(
        ValueError,
        [f"column 1 of {name}", "NaN in every row"],
        story,
        spoiled(data, (slice(None), 1), math.nan),
        method,
    )


@row("no rows", ALL)
def test_no_rows_are_refused(method):
    story, data, name = real(method)
    refused(ValueError, [f"{name} is empty"], story, data[:0], method)


@row("one row", ALL)
def test_one_row_runs_with_a_warning(method):
    story, data, _ = real(method)
    posterior = sound(answer(story, data[:1], method))
    assert any("one row" in w for w in posterior.warnings)


@row("constant data", ALL)
def test_a_constant_column_runs_with_a_warning(method):
    story, data, _ = real(method)
    posterior = sound(answer(story, spoiled(data, (slice(None), 2), 4.0), method))
    assert method == "gibbs" or any("constant" in w for w in posterior.warnings)


@row("constant data", GRADIENT)
def test_a_learned_scale_of_constant_data_stays_above_zero(method):
    posterior = sound(answer(normal_mixture, torch.full((20,), 2.0), method))
    assert (posterior.draws["sigma"] > 0).all()


@row("constant data", ("em",))
def test_the_variance_floor_of_maximum_likelihood_is_told(method):
    """A variance that falls to zero has no likelihood; stopping there must not look like an answer."""
    mle = EM(restarts=2, estimate="mle", max_iter=200)
    posterior = sound(fit(normal_mixture, torch.full((20,), 2.0), mle, seed=0))
    assert (posterior.draws["sigma"] > 0).all() and any("collapsed" in w or "floor" in w for w in posterior.warnings)


@row(
    "fewer rows than columns",
    ("em", "svi"),
    ppca=PPCA(2),
    factors=FactorAnalysis(2),
    diagonal=GMM(2, covariance="diag"),
)
def test_five_rows_of_fifty_columns_run(method, case):
    sound(answer(case, noise(5, 50), method))


@row("fewer rows than columns", ("nuts", "hmc"))
def test_five_rows_of_twenty_columns_are_sampled(method):
    sound(answer(ppca, noise(5, 20), method))


@row("fewer rows than columns", ("em",))
def test_full_covariances_of_too_few_rows_are_regularised_and_said(method):
    found = fit(GMM(2), noise(5, 50), EM(restarts=2, estimate="mle", max_iter=30), seed=0)
    assert any("collapsed" in w or "ridge" in w for w in sound(found).warnings)
    sound(answer(GMM(2), noise(5, 50), method))  # the prior holds every covariance


@row("more components than rows", GRADIENT)
def test_more_components_than_rows_run(method):
    story = GMM(100, covariance="diag") if method in ("em", "svi") else GMM(12, covariance="diag")
    posterior = sound(answer(story, X[:10], method))
    assert posterior.local("z").sum(-1) == pytest.approx(1.0)


@row("more components than rows", ("gibbs",))
def test_more_topics_than_documents_run(method):
    from zoo import LDA

    sound(answer(LDA(10, 0.5, 0.5), WORDS[:3], method))


@row("values of 1e30", DENSITY)
def test_huge_values_ask_to_be_standardised(method):
    story, data, name = real(method)
    refused(
        ValueError, [f"scale of {name}", "1e\\+30|2e\\+30|3e\\+30", "standardise"], story, data.sign() * 1e30, method
    )


@row("a negative count", DENSITY)
def test_a_negative_count_is_named(method):
    refused(ValueError, ["'x'", "1 of 30", "-2", "index 7"], rates, spoiled(COUNTS, 7, -2.0), method)


@row("half a count", DENSITY)
def test_half_a_count_is_named(method):
    refused(ValueError, ["'x'", "1 of 30", r"1\.5", "index 7"], rates, spoiled(COUNTS, 7, 1.5), method)


@row("a negative count", ("em", "svi", "gibbs"))
def test_a_negative_word_count_is_named(method):
    refused(ValueError, ["'w'", "-2", r"\b7\b"], topics(), spoiled(WORDS, (7, 1), -2.0), method)


@row("half a count", ("em", "svi", "gibbs"))
def test_half_a_word_count_is_named(method):
    refused(ValueError, ["'w'", r"1\.5", r"\b7\b"], topics(), spoiled(WORDS, (7, 1), 1.5), method)


@row("a label outside the classes", DENSITY, beyond=3, negative=-1)
def test_a_label_outside_the_classes_is_named(method, case):
    refused(ValueError, ["'x'", "0 to 2", f"{case}", "index 7"], classes, spoiled(LABELS, 7, case), method)


@row("an empty document or a word beyond the vocabulary", ("em", "svi", "gibbs", "nuts"))
def test_the_shares_of_an_empty_document_are_the_prior(method):
    data = spoiled(WORDS, (4, slice(None)), 0.0)
    posterior = sound(answer(topics(), data, method))
    shares = posterior.local("theta").mean(0)[4]
    assert float((shares - 1 / 3).abs().max()) < 0.3, shares  # three standard errors of twenty draws


@row("an empty document or a word beyond the vocabulary", ("em", "svi", "gibbs"))
def test_a_word_beyond_the_vocabulary_is_named(method):
    ids = torch.arange(6).expand(20, 6).clone()
    ids[4, 5] = 9
    words = ["words", r"\b9\b", r"4"]
    refused(ValueError, words, topics(), {"w": WORDS, "words": ids, "num_words": 6}, method)


@row("a word of the vocabulary that never occurs", ("em", "svi", "gibbs"))
def test_a_word_that_never_occurs_keeps_a_share(method):
    posterior = sound(answer(topics(), spoiled(WORDS, (slice(None), 2), 0.0), method))
    phi = posterior.draws["phi"].mean(0)
    assert (phi[:, 2] > 0).all() and float(phi[:, 2].max()) < 0.1


@row("pixels in 0..255 for a Bernoulli", GRADIENT)
def test_pixels_are_told_how_to_become_bits(method):
    def bits(x):
        p = pyro.sample("p", dist.Beta(2.0, 3.0).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(p).to_event(1), obs=x)

    data = torch.arange(40).reshape(10, 4) * 6.0
    refused(ValueError, ["'x'", r"\{0, 1\}", "/ 255"], bits, data, method)


@row("all rows equal", GRADIENT)
def test_equal_rows_run(method):
    posterior = sound(answer(GMM(3, covariance="diag"), torch.ones(20, 2), method))
    assert posterior.local("z").isfinite().all()


@row("all rows equal", ("gibbs",))
def test_equal_documents_run(method):
    posterior = sound(answer(topics(), WORDS[:1].expand(20, 6).clone(), method))
    assert not torch.allclose(posterior.draws["phi"][:, 0], posterior.draws["phi"][:, 1])


@row("all rows equal", ("em",))
def test_a_symmetric_start_is_broken(method):
    """Components that start equal stay equal for ever: the starts must differ."""
    x = torch.cat([noise(30, 2) - 8, noise(30, 2) + 8]).double()
    mu = fit(gaussian_mixture, {"x": x, "num_components": 2}, EM(restarts=2), seed=0).draws["mu"][0]
    assert float((mu[0] - mu[1]).norm()) > 10


@row("a NaN among the values", ("em", "svi", "nuts", "hmc"))
def test_a_million_bad_rows_are_reported_in_a_second(method):
    """One pass, and no second one to say where."""
    x = np.random.default_rng(0).normal(size=(1_000_000, 3))
    for value, at in ((math.inf, (765_432, 1)), (-math.inf, (999_999, 2))):
        x[at] = value
        took, text = seconds(lambda: fit(gaussian_mixture, x, method))
        assert str(at) in text and took < 1.0, (took, text)
        x[at] = 0.0
    x[765_432, 1] = math.nan
    took, text = seconds(lambda: fit(student, x, method))
    assert "(765432, 1)" in text and took < 1.0, (took, text)
    counts = np.random.default_rng(0).poisson(3.0, size=1_000_000).astype(float)
    counts[654_321] = -1.0
    took, text = seconds(lambda: fit(rates, counts, method))
    assert "654321" in text and took < 1.0, (took, text)
