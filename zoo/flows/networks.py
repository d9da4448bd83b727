"""Networks that tell a transform its parameters: a plain one, and one that looks at earlier columns only."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def silence(layer: nn.Module) -> None:
    """Zero the last layer, so that the flow starts as the identity."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()


class Perceptron(nn.Module):
    """A multilayer perceptron (..., inputs) -> (..., outputs) that starts at zero.

    Parameters
    ----------
    inputs, outputs
        Columns that go in, without the context, and that come out.
    hidden
        Widths of the hidden layers.
    num_context
        Columns of context, appended to the inputs.
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int], num_context: int = 0) -> None:
        super().__init__()
        widths = (inputs + num_context, *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1], outputs)
        silence(self.last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters."""
        h = x if context is None else torch.cat((x, context), -1)
        for layer in self.layers:
            h = functional.relu(layer(h))
        return self.last(h)


class MaskedLinear(nn.Linear):
    """A linear layer some of whose weights are held at zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """Masked autoencoder: parameters of column d depend on the columns before d in `order`, and on the context.

    Parameters
    ----------
    order
        Place of each column in the chain, 0 to D - 1: a list of D numbers.
    num_parameters
        P, parameters of a column.
    hidden
        Widths of the hidden layers.
    num_context
        Columns of context, which all may look at.

    Notes
    -----
    Germain, Gregor, Murray & Larochelle, *MADE* (ICML 2015).  A hidden unit of degree m sees places below m; degrees are
    dealt out in turn, so that the masks depend on the sizes alone.
    """

    def __init__(self, order: Sequence[int], num_parameters: int, hidden: Sequence[int], num_context: int = 0) -> None:
        super().__init__()
        D = len(order)
        self.num_parameters = num_parameters
        place = torch.tensor(order)
        before = torch.cat((place + 1, torch.zeros(num_context, dtype=torch.long)))  # context comes before everything
        layers, first = [], 0 if num_context else 1  # a unit of degree 0 sees the context alone
        for width in hidden:
            degree = torch.arange(width) % (D - first) + first if D > first else torch.zeros(width, dtype=torch.long)
            layers.append(MaskedLinear(degree[:, None] >= before))
            before = degree
        self.layers = nn.ModuleList(layers)
        last = (place + 1).repeat_interleave(num_parameters)
        self.last = MaskedLinear(last[:, None] > before)
        silence(self.last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D, P)."""
        h = x if context is None else torch.cat((x, context), -1)
        for layer in self.layers:
            h = functional.relu(layer(h))
        return self.last(h).unflatten(-1, (-1, self.num_parameters))
