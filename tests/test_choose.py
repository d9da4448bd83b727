"""The rules as a table: stories x methods."""

import pytest
import torch
from stories import (
    SCHOOLS,
    beta_bernoulli,
    bits,
    box,
    coupled_bits,
    eight_schools,
    factor_model,
    gaussian_mixture,
    generator,
    hidden_markov,
    mixed_columns,
    mixed_columns_data,
    poisson_latent,
    ppca,
    regression,
)

from inference import NoMethodError, choose, fit, inspect
from inference.choose import verdicts

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
COUNTS = torch.poisson(torch.ones(8, 3), generator=torch.Generator().manual_seed(0))

# story, data, (em, nuts, svi) admissible, method under want=auto, posterior, point, word in a rejection
TABLE = {
    "mixture": (gaussian_mixture, X, (True, True, True), "em", "nuts", "em", None),
    "mixed columns": (mixed_columns, mixed_columns_data(20), (True, True, True), "em", "nuts", "em", None),
    "HMM": (hidden_markov, X, (True, True, True), "em", "nuts", "em", None),
    "regression": (regression, {"X": X, "y": X[:, 0]}, (True, True, True), "nuts", "nuts", "em", None),
    "coin": (beta_bernoulli, torch.ones(5), (True, True, True), "exact", "exact", "em", None),
    "PPCA": (ppca, X, (True, True, True), "nuts", "nuts", "em", None),
    "factor model": (factor_model, COUNTS, (False, True, True), "nuts", "nuts", "nuts", "integral"),
    "schools": (eight_schools, SCHOOLS, (True, True, True), "nuts", "nuts", "em", None),
    "box": (box, torch.rand(5), (False, False, False), None, None, None, "support"),
    "2**40 in one site": (bits, X[:, 0], (False, False, False), None, None, None, "joint states"),
    "2**40 in forty sites": (coupled_bits, X[:, 0], (False, False, False), None, None, None, "markov"),
    "Poisson latent": (poisson_latent, X[:, 0], (False, False, False), None, None, None, "infinitely many"),
    "implicit generator": (generator, X[:, 0], (False, False, False), None, None, None, "no density"),
}


@pytest.mark.parametrize("name", TABLE)
def test_table_of_stories_and_methods(name, untouched):
    story, data, admissible, auto, posterior, point, word = TABLE[name]
    structure = inspect(story, data)
    opinions = verdicts(structure)
    assert tuple(opinions[m].applies for m in ("em", "nuts", "svi")) == admissible
    assert all(v.reason for v in opinions.values())
    if word:
        assert any(word in v.reason for v in opinions.values() if not v.applies)
    for want, expected in (("auto", auto), ("posterior", posterior), ("point", point)):
        if expected is None:
            with pytest.raises(NoMethodError, match=word):
                choose(structure, want)
        else:
            choice = choose(structure, want)
            assert choice.method.name == expected
            assert all(text in str(choice) for text in ("em ", "nuts", "svi"))


def test_large_data_go_to_svi():
    """The rule looks at sizes only: it is pure."""
    from dataclasses import replace

    structure = replace(inspect(regression, {"X": X, "y": X[:, 0]}), data_bytes=8 * 10**8)
    assert choose(structure).method.name == "svi"


def test_a_refused_method_gives_the_reason_and_the_admissible_ones():
    with pytest.raises(NoMethodError, match=r"integral.*admissible: nuts, hmc, svi"):
        fit(factor_model, COUNTS, "em")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nutz"}, "did you mean 'nuts'"),
        ({"want": "mean"}, "'posterior'"),
        ({"seed": -1}, "seed"),
        ({"budget": 0.0}, "budget"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_wrong_arguments_name_themselves(arguments, message, untouched):
    with pytest.raises(ValueError, match=message):
        fit(beta_bernoulli, torch.ones(5), **arguments)


@pytest.mark.processor
def test_cuda_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ValueError, match="no CUDA device"):
        fit(beta_bernoulli, torch.ones(5), device="cuda")
