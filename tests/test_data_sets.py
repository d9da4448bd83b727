"""Data sets and readers: what is loaded, what is refused and in which words."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from zoo import Dataset, datasets, load, read

ROOT = Path(__file__).parent.parent

SIMULATED = ("old_faithful", "poisson_counts", "three_clusters")


def table(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Data sets by name


@pytest.mark.parametrize("name", datasets())
def test_every_set_is_complete_and_leaves_the_random_states_alone(name):
    """A set without names or origin, of another type than float64, or a global seed that loading moves."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = load(name)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert data.x.dtype == torch.float64 and data.x.isfinite().all()
    assert data.labels is None if name in ("two_factors", "rectangle", "faces") else data.labels.dtype == torch.long
    assert data.name == name and data.description and data.source
    assert len(data.feature_names) == (data.x.shape[1] if data.x.ndim == 2 else 1)
    assert torch.equal(data.x, load(name).x)
    assert f"{name}: {len(data)} rows" in repr(data) and data.description in repr(data)


def test_the_first_load_of_a_process_leaves_every_random_stream_alone():
    """A library that draws from a global stream at its first import: seen only in a process that has not loaded it yet."""
    program = """
import random
import numpy, torch
import zoo
from zoo.data.library import datasets
def streams():
    _, keys, place, *_ = numpy.random.get_state()
    return random.getstate(), keys.tobytes(), place, torch.get_rng_state().numpy().tobytes()
random.seed(0)
before = streams()
loads = {name: (zoo.load, name) for name in datasets()} | {"load_corpus": (zoo.load_corpus,)}
for name, (load, *given) in loads.items():
    load(*given)
    if streams() != before:
        print(name, end=" ")
        before = streams()
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr


def test_bundled_sets_are_scikit_learns():
    """Columns or labels in another order; sizes from the sets' descriptions."""
    sizes = {"iris": (150, 4), "wine": (178, 13), "digits": (1797, 64), "breast_cancer": (569, 30)}
    assert {name: tuple(load(name).x.shape) for name in sizes} == sizes
    iris = load("iris")
    assert iris.x[0].tolist() == [5.1, 3.5, 1.4, 0.2] and iris.feature_names[0] == "sepal length (cm)"
    assert iris.labels.bincount().tolist() == [50, 50, 50]
    assert iris.label_names == ("setosa", "versicolor", "virginica")


@pytest.mark.parametrize("name", ["old_faithful", "three_clusters"])
def test_simulated_clusters_have_their_true_moments(name):
    """Truth that is not what the rows were drawn with: means and scatter within 5 standard errors."""
    data = load(name, num_data=100_000, seed=1)
    share = data.labels.bincount() / len(data)
    assert ((share - data.truth["pi"]).abs() < 5 * 0.5 / len(data) ** 0.5).all()
    for k, (mu, precision) in enumerate(zip(data.truth["mu"], data.truth["Lambda"], strict=True)):
        rows = data.x[data.truth["z"] == k]
        covariance = torch.linalg.inv(precision)
        assert ((rows.mean(0) - mu).abs() < 5 * (covariance.diagonal() / len(rows)).sqrt()).all()
        torch.testing.assert_close(rows.T.cov(), covariance, rtol=0.1, atol=0.02)


def test_simulated_counts_have_their_true_rates():
    """A rate paired with another component's counts: mean and variance of a Poisson are its rate."""
    data = load("poisson_counts", num_data=100_000)
    for k, rate in enumerate(data.truth["lam"]):
        counts = data.x[data.labels == k]
        assert (counts.mean() - rate).abs() < 5 * (rate / len(counts)).sqrt()
        assert counts.var().item() == pytest.approx(rate.item(), rel=0.05)


@pytest.mark.parametrize("name", SIMULATED)
def test_seed_and_size_reach_the_simulator(name):
    """Settings that are taken and forgotten."""
    assert len(load(name, num_data=17)) == 17
    assert not torch.equal(load(name, seed=1).x, load(name).x)
    for wrong in ({"num_data": 0}, {"num_data": 2.5}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load(name, **wrong)


def test_unknown_sets_and_settings_are_named():
    """A KeyError, or a download that somebody's typing error starts."""
    with pytest.raises(ValueError, match=r"'irsi'.*'breast_cancer'.*mean 'iris'.*read\(path\)"):
        load("irsi")
    with pytest.raises(TypeError, match=r"'iris' has no setting 'seed'; it takes none"):
        load("iris", seed=1)
    with pytest.raises(TypeError, match=r"no setting 'rows'; it has \['num_data', 'seed'\]"):
        load("old_faithful", rows=3)


# What a Dataset does


def test_standardized_columns_can_be_turned_back():
    """Units lost, a constant column divided by 0, NaN that spreads to its whole column."""
    x = load("iris").x.clone()
    x[3, 1] = torch.nan
    x = torch.cat([x, torch.full((150, 1), 0.1)], 1)
    data = Dataset("example", x)
    unit = data.standardized()
    seen = unit.x[torch.arange(150) != 3]
    torch.testing.assert_close(seen.mean(0), torch.tensor([seen[:, 0].mean(), 0.0, *seen[:, 2:].mean(0)]).double())
    torch.testing.assert_close(seen[:, 1].std(correction=0), torch.tensor(1.0).double())
    assert (unit.x[:, 4].abs() < 1e-12).all() and unit.x[3, 1].isnan() and unit.x.isnan().sum() == 1
    torch.testing.assert_close(unit.original(unit.x), x, equal_nan=True)
    twice = unit.standardized()
    torch.testing.assert_close(twice.original(twice.x), x, equal_nan=True)
    assert data.loc is None and data.original(x) is x


def test_split_parts_are_disjoint_and_whole():
    """Rows lost, doubled or parted from their labels; a seed that is not used."""
    data = load("three_clusters")
    train, test = data.split(0.2, seed=3)
    assert (len(train), len(test)) == (240, 60)
    rows = torch.cat([train.x, test.x])
    assert torch.equal(rows.sort(0).values, data.x.sort(0).values)
    assert torch.equal(test.truth["z"], test.labels)
    found = (data.x[:, None] == test.x).all(-1).int().argmax(0)
    assert torch.equal(data.labels[found], test.labels)
    assert torch.equal(data.split(0.2, seed=3)[1].x, test.x)
    assert not torch.equal(data.split(0.2, seed=4)[1].x, test.x)
    for share in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="test"):
            data.split(share)
    assert [len(part) for part in load("three_clusters", num_data=2).split(0.01)] == [1, 1]
    with pytest.raises(ValueError, match="1 rows"):
        load("three_clusters", num_data=1).split()


def test_names_and_labels_must_fit_the_table():
    """Names that stand over the wrong columns."""
    with pytest.raises(ValueError, match="feature_names of 'a' has 1 names and x has 2"):
        Dataset("a", torch.zeros(3, 2), feature_names=("one",))
    with pytest.raises(ValueError, match=r"labels of 'a' has shape \(2,\), expected \(3,\)"):
        Dataset("a", torch.zeros(3, 2), labels=torch.zeros(2))


# Readers: what is read


def test_csv_keeps_numbers_to_the_last_bit_and_holes_as_nan(tmp_path):
    """A parser that rounds; empty cells that become 0, or shift the rest of the row."""
    path = table(tmp_path, "a, b,c\n0.1,,3\nNA,0.30000000000000004,-1e-5\n\n,2,nan\n")
    data = read(path)
    expected = [[0.1, np.nan, 3.0], [np.nan, 0.30000000000000004, -1e-5], [np.nan, 2.0, np.nan]]
    np.testing.assert_array_equal(data.x.numpy(), expected)
    assert data.feature_names == ("a", "b", "c") and data.name == "table" and data.source == str(path)
    assert "missing  4 cells" in repr(data)
    assert torch.equal(read(str(path), ["c", 0]).x.nan_to_num(9), data.x[:, [2, 0]].nan_to_num(9))
    assert read(path, "b").feature_names == read(path, [-2]).feature_names == ("b",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.tsv", "a\tb\n1\t2\n3\t4\n"),
        ("t.csv", "a;b\n1;2\n3;4\n"),
        ("t.csv", "a,b\r\n1,2\r\n3,4\r\n\r\n"),
        ("t.CSV", '"a","b"\n"1","2"\n"3","4"'),
        ("t.csv", "\n  \na,b\n1,2\n   \n3,4\n"),
        ("t.csv", b"\xef\xbb\xbfa,b\n1,2\n3,4\n"),
    ],
    ids=["tabs", "semicolons", "windows", "quotes", "blank lines", "byte-order mark"],
)
def test_tables_of_every_dialect_read_the_same(tmp_path, name, text):
    """A separator, line end or mark that ends up in the numbers or in the first name."""
    data = read(table(tmp_path, text, name))
    assert data.x.tolist() == [[1.0, 2.0], [3.0, 4.0]] and data.feature_names == ("a", "b")


def test_first_row_of_numbers_is_a_row(tmp_path):
    """A table without names that loses its first row."""
    data = read(table(tmp_path, "1,2\n3,4\n"))
    assert data.x.tolist() == [[1.0, 2.0], [3.0, 4.0]] and data.feature_names == ("x1", "x2")


def test_single_column_keeps_its_empty_lines_as_missing(tmp_path):
    """A missing cell of a single column is an empty line, which pandas drops; one at the end is no row."""
    data = read(table(tmp_path, "a\n1\n\n3\n\n"))
    np.testing.assert_array_equal(data.x.numpy(), [[1.0], [np.nan], [3.0]])


def test_labels_are_kept_apart(tmp_path):
    """Labels that end up in x, or codes that are not those of their names."""
    path = table(tmp_path, "a,kind,number\n1,red,7\n2,blue,0\n3,red,7\n")
    data = read(path, columns=["a"], labels="kind")
    assert data.x.tolist() == [[1.0], [2.0], [3.0]]
    assert data.labels.tolist() == [1, 0, 1] and data.label_names == ("blue", "red")
    data = read(path, ["a"], labels="number")
    assert data.labels.tolist() == [7, 0, 7] and data.label_names == ()


def test_other_encodings_are_read_when_named(tmp_path):
    """`encoding=` that is not passed on."""
    for encoding in ("latin-1", "utf-16", "utf-16-le", "utf-8"):
        data = read(table(tmp_path, "größe,b\n1,2\n".encode(encoding)), encoding=encoding)
        assert data.feature_names == ("größe", "b") and data.x.tolist() == [[1.0, 2.0]]


def test_arrays_are_read_with_their_shape(tmp_path):
    """(N,) turned into (N, 1), integers left integer, arrays of an archive in a wrong order."""
    matrix, vector = (
        np.arange(6, dtype=np.int32).reshape(3, 2),
        np.array([1.5, np.nan, 2.5], dtype=np.float32),
    )
    np.save(tmp_path / "m.npy", matrix)
    np.save(tmp_path / "v.npy", vector)
    np.savez(tmp_path / "both.npz", m=matrix, v=vector)
    assert torch.equal(read(tmp_path / "m.npy").x, torch.from_numpy(matrix).double())
    assert read(tmp_path / "v.npy").x.shape == (3,)
    both = read(tmp_path / "both.npz")
    assert both.feature_names == ("m1", "m2", "v") and both.x.shape == (3, 3) and both.x.dtype == torch.float64
    assert read(tmp_path / "both.npz", ["m2"]).x.tolist() == [[1.0], [3.0], [5.0]]


def test_data_frames_of_every_kind():
    """Nullable integers, numbers as text or categories, and frames of other libraries."""
    frame = pd.DataFrame({"a": pd.array([1, None, 3], dtype="Int64"), "b": ["1.5", "", "nan"], 3: [1, 2, 3]})
    expected = [[1.0, 1.5, 1.0], [np.nan, np.nan, 2.0], [3.0, np.nan, 3.0]]

    class Foreign:
        def to_pandas(self):
            return frame

    class Streamed:
        def to_pandas(self):
            raise ImportError("needs a library")

        def __dataframe__(self, **options):
            return frame.drop(columns="b").__dataframe__(**options)

    for source in (frame, Foreign()):
        data = read(source)
        np.testing.assert_array_equal(data.x.numpy(), expected)
        assert data.feature_names == ("a", "b", "3") and data.name == "table"
    if hasattr(frame, "__dataframe__"):
        np.testing.assert_array_equal(read(Streamed()).x.numpy()[:, 1], [1.0, 2.0, 3.0])
    assert read(frame["a"]).x.shape == (3,) and read(frame["a"]).feature_names == ("a",)
    assert read(frame, ["b", 2]).feature_names == ("b", "3")
    assert read(frame.astype({3: "category"})).x[:, 2].tolist() == [1.0, 2.0, 3.0]


def test_reading_leaves_the_frame_alone():
    """A tensor that shares memory with the user's frame."""
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    read(frame).x.zero_()
    read(frame["a"]).x.zero_()
    assert frame.to_numpy().tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_parquet_is_read_or_says_what_it_needs(tmp_path, monkeypatch):
    """An error from pandas' engines where pyarrow is missing; values that change on the way."""
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1")

    def missing(*args, **kwargs):
        raise ImportError("no engine")

    with monkeypatch.context() as patch:
        patch.setattr(pd, "read_parquet", missing)
        with pytest.raises(ImportError, match=r"t\.parquet: Parquet needs pyarrow.*pip install pyarrow"):
            read(path)
    pyarrow = pytest.importorskip("pyarrow")
    pd.DataFrame({"a": [1.0, np.nan], "b": [3, 4]}).to_parquet(path)
    np.testing.assert_array_equal(read(path).x.numpy(), [[1.0, 3.0], [np.nan, 4.0]])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"t\.parquet is no Parquet file, or damaged"):
        read(path)

    class Stream:
        def __arrow_c_stream__(self, requested_schema=None):
            return pyarrow.table({"a": [1, 2]}).__arrow_c_stream__(requested_schema)

    assert read(Stream()).x.tolist() == [[1.0], [2.0]]


# Readers: what is refused


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        (b"", ["table.csv is empty"]),
        ("\n \n", ["table.csv is empty"]),
        ("a,b\n", ["table.csv is empty", "['a', 'b']"]),
        ("a,b\n1,2\n3\n", ["line 3", "has 1 cells", "first line 2"]),
        ("a,b\n1,2\n\n3,4,5\n", ["line 4", "has 3 cells"]),
        ("1,2\n3,4,5\n", ["line 2", "has 3 cells"]),
        ('a,b\n1,"2\n3,4\n', ["table.csv, line"]),
        ("a,a\n1,2\n", ["several columns called 'a'"]),
        ("a,b\n1,red\n2,\n", ["'b'", "'red'", "row 0 (line 2)", "columns=['a']"]),
        ("a,b\n\n1,2\n\n,5\n3,4 cm\n", ["'b'", "'4 cm'", "row 2 (line 6)"]),
        ("a,b\n1,True\n2,False\n", ["'b'", "True", "row 0"]),
        ("a;b\n1,5;2\n", ["'a'", "'1,5'", "row 0 (line 2)"]),
        ("a\nred\n", ["'a'", "'red'", "no column of this table holds numbers"]),
        ("a,b\n1,\xff\n".encode("latin-1"), ["not utf-8", "0xff", "offset 6", "encoding='latin-1'"]),
        ("a,b\n1,2\n".encode("utf-16"), ["not utf-8", "offset 0", "encoding='utf-16'"]),
        ("a,b\n1,2\n".encode("utf-16-le"), ["NUL byte at offset 1", "encoding='utf-16-le'"]),
        (b"a,b\n1,2\n\x003,4\n", ["NUL byte at offset 8"]),
    ],
)
def test_faulty_text_is_told_with_its_place(tmp_path, text, texts):
    """A message without the file, line, column or value that the user must mend."""
    with pytest.raises(ValueError) as error:
        read(table(tmp_path, text))
    message = str(error.value)
    assert "table.csv" in message and all(word in message for word in texts), message


def test_what_is_no_table_is_told(tmp_path):
    """Errors of numpy, pandas or the file system instead of ours."""
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.csv"):
        read(tmp_path / "gone.csv")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"'\.xlsx'; these can be read: \.csv, \.tsv, \.parquet, \.npy, \.npz"):
        read(table(tmp_path, "x", "t.xlsx"))
    with pytest.raises(ValueError, match="encoding='utf-9' is not known"):
        read(table(tmp_path, "a\n1\n"), encoding="utf-9")
    for source, kind in (
        (np.zeros((2, 2)), "ndarray"),
        (torch.zeros(2), "Tensor"),
        (3, "int"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=f"a path or a data frame, got {kind}"):
            read(source)
    for frame in (pd.DataFrame(), pd.DataFrame({"a": []})):
        with pytest.raises(ValueError, match="the table is empty"):
            read(frame)


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (["c"], ["no column 'c'", "['alpha', 'b']", "0 to 1"]),
        (["alhpa"], ["mean 'alpha'"]),
        ([2], ["no column 2"]),
        ([True], ["no column True"]),
        (["b", 1], ["'b' twice"]),
        ([], ["no columns"]),
    ],
)
def test_unknown_columns_are_told(columns, texts):
    """A KeyError; a column that is silently left out."""
    with pytest.raises(ValueError) as error:
        read(pd.DataFrame({"alpha": [1.0], "b": [2.0]}), columns)
    assert all(text in str(error.value) for text in texts), error.value


@pytest.mark.parametrize(
    "column",
    [
        pd.array([True, False]),
        pd.to_datetime(["2020-01-01", "2021-01-01"]),
        pd.to_timedelta([1, 2], unit="s"),
        np.array([1j, 2j]),
        pd.Categorical(["x", "y"]),
        pd.Series([1, True], dtype=object),
        pd.Series([[1], [2]], dtype=object),
        pd.period_range("2020", periods=2),
    ],
    ids=["truths", "dates", "durations", "complex", "categories", "mixed", "lists", "periods"],
)
def test_cells_that_only_look_like_numbers_are_refused(column):
    """Dates read as nanoseconds, truth values as 0 and 1."""
    with pytest.raises(ValueError, match=r"column 'odd' of the table holds .* in row \d, .*columns=\['a'\]"):
        read(pd.DataFrame({"a": [1.0, 2.0], "odd": column}))


def test_labels_must_be_there_for_every_row():
    """A missing label that becomes a class of its own."""
    frame = pd.DataFrame({"a": [1.0, 2.0], "kind": ["x", None]})
    with pytest.raises(ValueError, match="'kind' of the table is empty in row 1"):
        read(frame, labels="kind")
    with pytest.raises(ValueError, match="labels='sort' is no column"):
        read(frame, labels="sort")


class Bomb:
    """Says that it has been unpickled."""

    def __reduce__(self):
        return (sys.modules["builtins"].exec, ("raise SystemExit('a pickle was executed')",))


@pytest.mark.parametrize("name", ["t.npy", "t.npz"])
def test_arrays_that_are_damaged_or_hostile_are_refused(tmp_path, name):
    """A pickle that runs; a truncated archive that raises from the depth of zipfile; shapes that are no table."""
    path = tmp_path / name
    save = np.save if name.endswith("npy") else np.savez
    buffer = io.BytesIO()
    save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    for content in (buffer.getvalue(), pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no NP[YZ] file of plain numbers.*never loaded"):
            read(path)
    save(path, np.arange(1000.0))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"junk"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no"):
            read(path)
    for array, text in (
        (np.zeros((2, 2, 2)), r"shapes .*\(2, 2, 2\)"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([True]), "dtype bool"),
        (np.zeros(0), "empty"),
    ):
        save(path, array)
        with pytest.raises(ValueError, match=text):
            read(path)


def test_archives_of_unequal_arrays_are_refused(tmp_path):
    """Arrays of different lengths glued together."""
    np.savez(tmp_path / "t.npz", a=np.zeros(3), b=np.zeros(4))
    with pytest.raises(ValueError, match=r"different lengths.*\(3,\).*\(4,\)"):
        read(tmp_path / "t.npz")
