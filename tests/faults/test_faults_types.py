"""Data of other types and shapes than the story wants: taken as what they are, or refused by name."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from fault_stories import (
    ALL,
    COUNTS,
    DENSITY,
    GRADIENT,
    WORDS,
    X,
    answer,
    line,
    location,
    rates,
    real,
    refused,
    series,
    sound,
    topics,
)
from fault_table import row
from stories import gaussian_mixture

from inference import EM, HMC, NUTS, SVI, Exact, Gibbs, fit

pytestmark = pytest.mark.usefixtures("untouched")


def same(a, b):
    """Equal draws to the last bit."""
    return a.draws.keys() == b.draws.keys() and all(torch.equal(a.draws[n], b.draws[n]) for n in a.draws)


@row("whole numbers where floats are meant", DENSITY)
def test_whole_numbers_answer_like_floats_and_say_so(method):
    whole = torch.arange(12)
    as_whole, as_float = (answer(series, x, method) for x in (whole, whole.double()))
    assert same(as_whole, as_float) and any(
        "x holds whole numbers" in w and "converted" in w for w in as_whole.warnings
    )


@row("whole numbers where floats are meant", GRADIENT)
def test_whole_covariates_answer_like_floats_and_say_so(method):
    """A matrix product of whole numbers and floats is an error of PyTorch."""
    data = {"X": torch.arange(12).reshape(4, 3), "y": X[:4, 0]}
    as_whole = answer(line, data, method)
    assert same(as_whole, answer(line, {**data, "X": data["X"].double()}, method))
    assert any("converted" in w for w in as_whole.warnings)


@row("whole numbers where floats are meant", ("gibbs", "em", "svi"))
def test_whole_word_counts_answer_like_floats(method):
    assert same(answer(topics(), WORDS.long(), method), answer(topics(), WORDS, method))


@pytest.mark.processor  # the story holds a tensor of its own there
@row("data in double and story in single precision", GRADIENT)
def test_one_precision_is_chosen_and_told(method):
    prior = torch.zeros(3)

    def story(X, y):
        w = pyro.sample("w", dist.Normal(prior, 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ (torch.eye(3, dtype=torch.float32) @ w.float()), 1.0), obs=y)

    posterior = sound(answer(story, {"X": X, "y": X[:, 0]}, method))
    assert any("float32" in w for w in posterior.warnings)


@row("data in double and story in single precision", ("svi",))
def test_a_network_in_single_precision_takes_doubles(method):
    class Autoencoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.net = torch.nn.utils.skip_init(torch.nn.Linear, 2, 3)
            for p in self.net.parameters():
                p.data = 0.1 * torch.randn(p.shape, generator=generator)

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    posterior = answer(Autoencoder(), X, method)
    assert posterior.problem.dtype == torch.float32 and np.isfinite(posterior.history).all()


BAD_TYPES = {
    "bool": (lambda d: d.numpy() > 0, "bool"),
    "bool_tensor": (lambda d: d > 0, "bool"),
    "complex": (lambda d: d.numpy() + 1j, "complex128"),
    "objects": (lambda d: d.numpy().astype(object), "object"),
    "text": (lambda d: d.numpy().astype(str), "<U"),
    "dates": (lambda d: np.full(d.shape, np.datetime64("2020-01-01")), "datetime64"),
}


@row("booleans, complex numbers, objects and text", ALL, **BAD_TYPES)
def test_what_is_no_number_is_named_with_its_type(method, case):
    story, data, name = real(method)
    make, dtype = case
    refused(TypeError, [name, dtype], story, make(data), method)


FORMS = {
    "array": lambda d: d.numpy(),
    "lists": lambda d: d.tolist(),
    "frame": lambda d: pd.DataFrame(d.numpy(), columns=[f"c{i}" for i in range(d.shape[1])]),
    "reversed": lambda d: d.numpy()[::-1].copy()[::-1],
    "fortran": lambda d: np.asfortranarray(d.numpy()),
    "big_endian": lambda d: d.numpy().astype(">f8"),
    "read_only": lambda d: np.frombuffer(d.numpy().tobytes()).reshape(d.shape),
    "leaf": lambda d: d.clone().requires_grad_(),
}


@row("arrays, lists, frames, series and sparse matrices", ALL, **FORMS)
def test_forms_of_data_give_the_same_answer(method, case):
    story, data, _ = real(method)
    assert same(answer(story, case(data), method), answer(story, data, method))


@row("arrays, lists, frames, series and sparse matrices", DENSITY)
def test_a_series_is_a_vector(method):
    assert same(answer(series, pd.Series(X[:, 0].numpy(), index=range(5, 35)), method), answer(series, X[:, 0], method))


@row("arrays, lists, frames, series and sparse matrices", ALL)
def test_a_sparse_matrix_is_named(method):
    story, data, name = real(method)
    refused(TypeError, [f"{name} is a sparse matrix", "toarray"], story, scipy.sparse.csr_matrix(data.numpy()), method)


@row(
    "arrays, lists, frames, series and sparse matrices",
    ALL,
    ragged=[[1.0, 2.0], [3.0]],
    words=pd.DataFrame({"a": [1.0], "b": ["u"]}),
)
def test_ragged_lists_and_columns_of_words_are_named(method, case):
    story, _, name = real(method)
    refused(TypeError, [f"{name} is not a rectangular" if isinstance(case, list) else "'b'"], story, case, method)


@row("a column where a vector is meant", DENSITY)
def test_a_column_for_a_vector_is_refused(method):
    """Broadcast (N, 1) against (N,) gives (N, N) and, in silence, another posterior."""
    words = ["site 'y'", r"\(30, 1\)", r"\(30,\)", r"squeeze\(-1\)"]
    refused(ValueError, words, line, {"X": X, "y": X[:, :1]}, method)


@row("one number for a plate of many", DENSITY, scalar=torch.tensor(1.0), single=torch.ones(1))
def test_one_number_for_many_is_refused(method, case):
    refused(ValueError, ["'y'", r"30", "expand|equal"], line, {"X": X, "y": case}, method)


@row("arguments of different lengths", DENSITY)
def test_different_lengths_are_both_named(method):
    refused(ValueError, ["'y'", r"\b29\b", r"\b30\b"], line, {"X": X, "y": X[:29, 0]}, method)


@row("square data, transposed", ALL)
def test_shapes_are_shown_site_by_site(method):
    """Nobody can know which way round a square is: the reader must see which side became rows."""
    story, data, name = real(method)
    posterior = answer(story, data[:3, :3], method)
    text = str(posterior.summary())
    assert f"{name} (3 rows of 3)" in text, text


@row("data on one device, story on another", GRADIENT)
def test_data_and_story_on_two_devices_are_both_named(method):
    """The device "meta" stands in where there is no GPU: it holds no numbers, so it can only be refused."""
    there = torch.zeros(3, device="meta")

    def story(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ (w + there), 1.0), obs=y)

    refused(ValueError, ["meta", "cpu", "device"], story, {"X": X, "y": X[:, 0]}, method)


@row("data on one device, story on another", GRADIENT)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_data_on_a_gpu_are_moved_to_the_story(method):
    assert same(answer(series, X[:, 0].cuda(), method), answer(series, X[:, 0], method))


@row("an unknown or a missing argument", ALL)
def test_arguments_that_the_story_lacks_are_named(method):
    story, data, name = real(method)
    refused(TypeError, ["'typo'", "arguments are", f"'{name}'"], story, {name: data, "typo": data}, method)


@row("an unknown or a missing argument", DENSITY)
def test_arguments_that_the_data_lack_are_named(method):
    refused(TypeError, [r"needs \['y'\]", r"\['X'\]"], line, {"X": X}, method)


@row("an unknown or a missing argument", ALL)
def test_too_many_parts_are_counted(method):
    story, data, _ = real(method)
    refused(TypeError, ["data has 9 parts"], story, (data,) * 9, method)


@row("a misspelt method", ("em", "svi", "nuts", "hmc", "exact", "gibbs"))
def test_the_closest_method_is_offered(method):
    refused(ValueError, [rf"'{method}'\?", "'em'", "'nuts'", "'gibbs'"], location, X, method + "z")


OPTIONS = {
    "em": [
        (EM, n, v)
        for n, v in (
            ("restarts", 0),
            ("max_iter", 0),
            ("tol", -1.0),
            ("tol", float("nan")),
            ("ridge", -1.0),
            ("batch_size", 0),
            ("estimate", "mode"),
            ("driver", "x"),
        )
    ],
    "svi": [
        (SVI, n, v)
        for n, v in (
            ("steps", 0),
            ("lr", -1),
            ("lr", float("nan")),
            ("lr", 0),
            ("draws", 0),
            ("starts", 0),
            ("particles", 0),
            ("batch_size", 0),
            ("guide", "x"),
            ("mode", "x"),
            ("clip", -1.0),
        )
    ],
    "nuts": [
        (NUTS, n, v)
        for n, v in (
            ("chains", 0),
            ("draws", 0),
            ("warmup", -1),
            ("target_accept", 1.0),
            ("max_depth", 0),
            ("target_accept", float("nan")),
            ("backend", "x"),
            ("init", "x"),
            ("draws", 1.5),
        )
    ],
    "hmc": [
        (HMC, n, v)
        for n, v in (
            ("chains", 0),
            ("draws", 0),
            ("warmup", -1),
            ("target_accept", 1.0),
            ("max_steps", 0),
            ("backend", "x"),
        )
    ],
    "exact": [(Exact, "draws", 0), (Exact, "draws", "many")],
    "gibbs": [(Gibbs, n, v) for n, v in (("chains", 0), ("draws", 0), ("thin", 0), ("warmup", -1))],
}


@row("impossible options", ALL)
def test_impossible_options_are_named(method):
    for kind, name, value in OPTIONS[method]:
        with pytest.raises(ValueError, match=f"{kind.__name__}\\({name}={value!r}\\): {name} must"):
            kind(**{name: value})


@row("impossible options", ALL, seed=-1, budget=-1.0, want="x", device="x")
def test_impossible_arguments_of_fit_are_named(method, case, request):
    story, data, _ = real(method)
    name = request.node.callspec.id.split("-")[0]
    with pytest.raises(ValueError, match=name):
        fit(story, data, method, **{"seed": 0, name: case})


@row("impossible options", ("svi", "em"))
def test_a_batch_of_more_rows_than_there_are_is_the_full_batch(method):
    kinds = {
        "svi": (SVI, {"steps": 40, "starts": 1, "draws": 20}),
        "em": (EM, {"restarts": 1, "max_iter": 5, "driver": "incremental"}),
    }
    kind, options = kinds[method]
    story, data = (gaussian_mixture, X) if method == "em" else (location, X)
    wide, full = (fit(story, data, kind(batch_size=b, **options), seed=0) for b in (10_000, 30))
    assert same(wide, full) and any("batch_size=10000 exceeds the 30 rows" in w for w in wide.warnings)


@row("a label outside the classes", ("em",))
def test_one_float_label_is_no_whole_label(method):
    def story(x):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(p), obs=x)

    refused(ValueError, ["'x'", r"1\.5", "index 2"], story, torch.tensor([0.0, 1.0, 1.5]), method)


@row("half a count", ("em",))
def test_counts_of_a_frame_are_checked_too(method):
    refused(ValueError, ["'x'", r"1\.5", "index 1"], rates, pd.DataFrame({"x": [2.0, 1.5]})["x"], method)
    assert float(COUNTS.min()) >= 0
