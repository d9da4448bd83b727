"""What a pretended card allows is what PyTorch allows: every operation of some fits again on PyTorch's own fake tensors."""

import pytest
import torch
from card_cases import CASES, CUDA
from pretended_card import pretended
from pretended_memory import CARD, Kernels
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from inference import fit

pytestmark = [
    pytest.mark.skipif(CUDA, reason="of a card that is pretended"),
    pytest.mark.processor,  # each test says itself when there is a card
]


class Form:
    """A tensor without its numbers."""

    def __init__(self, tensor, there):
        self.size, self.stride, self.dtype, self.there = tensor.size(), tensor.stride(), tensor.dtype, there

    def fake(self):
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="cuda" if self.there else "cpu")


def device_of(leaf):
    """The device that a mark stands for."""
    if isinstance(leaf, torch.device):
        return torch.device("cuda:0") if leaf == CARD else torch.device("cpu")
    return leaf


@pytest.fixture
def operations(monkeypatch):
    """Every operation with an operand on the card: what it was given, and whether its result lies there."""
    seen, run = {}, Kernels.run

    def watched(self, func, args, kwargs):
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        plain = all(leaf.layout is torch.strided and not leaf.is_meta for leaf in leaves)
        given = None
        if plain and any(map(self.card.holds, leaves)):
            named = {n: v for n, v in kwargs.items() if v != torch.device("cpu")}  # that was filled in
            given = tree_map(lambda v: Form(v, self.card.holds(v)) if isinstance(v, torch.Tensor) else v, (args, named))
        out = run(self, func, args, kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if given is not None and made:
            forms = [(len(f.size), f.dtype, f.there) for f in tree_leaves(given) if isinstance(f, Form)]
            seen.setdefault((func, *forms), (*given, {self.card.holds(t) for t in made}))
        return out

    monkeypatch.setattr(Kernels, "run", watched)
    return seen


@pytest.mark.parametrize("case", ["em", "svi of networks", "hmc", "em of a chain"])
def test_results_lie_where_pytorch_puts_them(case, operations):
    """A rule of the pretence that is its own would let pass what a card refuses, or refuse what it takes."""
    story, data, method = CASES[case]
    with pretended():
        fit(story() if isinstance(story, type) else story, data, method, seed=1, device="cuda")
    compared = 0
    for (func, *_), (args, kwargs, there) in operations.items():
        try:
            with FakeTensorMode():
                args, kwargs = tree_map(lambda v: v.fake() if isinstance(v, Form) else device_of(v), (args, kwargs))
                found = {t.device.type for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)}
        except (DataDependentOutputException, DynamicOutputShapeException):
            continue  # their results hang on numbers
        except (AssertionError, RuntimeError) as error:
            if "CUDA enabled" in str(error) or "support for cuda" in str(error) or "CUDA driver" in str(error):
                continue  # PyTorch without cards does not tell
            raise
        assert found == {"cuda" if on else "cpu" for on in there}, (func, args)
        compared += 1
    assert compared > 50
