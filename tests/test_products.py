"""Matrix products by another kernel, and repeated operations that run once: the graph says what it said before."""

import pytest
import torch

import inference.products as products
from inference.products import pays, quick_products
from inference.recorder import pure_graph

aten = torch.ops.aten


def layers(x, first, shift, second):
    """An addmm and a mm that pay, and one that is too small to."""
    hidden = torch.relu(torch.addmm(shift, x, first))
    return hidden @ second, second.t()[:2] @ first.t()[:, :2]


def inputs(rows=64, inner=200, outer=180):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inner), (inner, outer), (outer,), (outer, inner)
    return tuple(torch.randn(s, generator=generator) for s in shapes)


def targets(graph):
    return [node.target for node in graph.module.graph.nodes if node.op == "call_function"]


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine where oneDNN is the faster of two."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN products")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def test_products_agree_with_double_precision_and_small_ones_stay(elsewhere):
    """A transposed factor or a lost bias would be off by the size of the result."""
    given = inputs()
    graph = pure_graph(layers, given)
    quick = quick_products(graph, given)
    wanted = layers(*(t.double() for t in given))
    for a, b in zip(quick(*given), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert targets(quick).count(products.product()) == 2
    assert targets(quick).count(aten.mm.default) == 1  # the small one
    assert targets(graph).count(aten.addmm.default) == 1  # the graph itself is left as it was


def test_products_by_columns_and_scaled_biases(elsewhere):
    """A factor stored by columns is multiplied right; `beta` and `alpha`, which the kernel lacks, keep the old one."""
    x, first, shift, _ = inputs()

    def scaled(x, first, shift):
        return x.t() @ (x @ first), torch.addmm(shift, x, first, beta=2.0, alpha=3.0)

    quick = quick_products(pure_graph(scaled, (x, first, shift)), (x, first, shift))
    for a, b in zip(quick(x, first, shift), scaled(x.double(), first.double(), shift.double()), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert targets(quick).count(products.product()) == 2
    assert targets(quick).count(aten.addmm.default) == 1


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "dtype", "turned", "wanted"),
    [
        (128, 784, 400, torch.float32, False, True),
        (128, 784, 400, torch.float64, False, False),  # there is no such kernel
        (64, 16, 16, torch.float32, False, False),  # the call costs more than the product
        (400, 512, 20, torch.float32, True, False),  # copying the left factor costs more than is won
    ],
)
def test_what_pays_is_said_by_shapes_alone(rows, inner, columns, dtype, turned, wanted):
    a = torch.zeros(inner, rows, dtype=dtype).t() if turned else torch.zeros(rows, inner, dtype=dtype)
    assert pays(a, torch.zeros(inner, columns, dtype=dtype)) is wanted


def test_elsewhere_the_graph_is_returned_as_it_is(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    graph = pure_graph(layers, inputs())
    assert quick_products(graph, inputs()) is graph


def test_a_repeated_operation_runs_once_and_draws_stay_two():
    """Merging two draws would make them equal; merging 1 with 1.0 would change a type."""

    def program(x, rows):
        noise = torch.randn_like(x) - torch.randn_like(x)
        return x[rows].exp().sum() + x[rows].exp().sum(), noise, (x > 0).add(1), (x > 0).add(1.0)

    given = torch.randn(8, 3), torch.tensor([1, 2])
    graph = pure_graph(program, given, random=True)
    names = targets(graph)
    assert (names.count(aten.index.Tensor), names.count(aten.exp.default)) == (1, 1)
    value, noise, whole, real = graph(*given)
    assert noise.abs().min() > 0
    assert (whole.dtype, real.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(value, 2 * given[0][given[1]].exp().sum())
