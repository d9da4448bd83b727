"""Components have no names: which sites share them, and whether draws are matched."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from stories import gaussian_mixture, hidden_markov, mixed_columns, mixed_columns_data, normal_mixture

from inference import labels
from inference.joint import LogJoint
from inference.problem import prepare
from inference.session import isolated

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def axes_of(story, data):
    with isolated(0, torch.float64):
        return labels.exchangeable_axes(LogJoint(prepare(story, data, seed=0)))


def test_exchangeable_axes_are_found_even_when_k_equals_d():
    """K = D = 3: the component axis of `mu` and `precision` must not be taken for a feature axis."""
    assert axes_of(gaussian_mixture, X) == {"pi": (0,), "mu": (0,), "precision": (0,)}
    assert axes_of(normal_mixture, X[:, 0]) == {"pi": (0,), "mu": (0,), "sigma": (0,)}
    assert axes_of(mixed_columns, mixed_columns_data(10)) == {"pi": (0,), "p": (0,), "rate": (0,), "phi": (0,)}


def test_transition_matrices_permute_rows_and_columns():
    assert axes_of(hidden_markov, X) == {"pi": (0,), "A": (0, 1), "mu": (0,)}


def test_ordered_or_fixed_components_are_not_exchangeable():
    def story(x):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    assert axes_of(story, X[:, 0]) == {}


def test_permuted_draws_are_matched():
    """Draws whose labels were shuffled come back as one mode, up to one permutation of all."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.tensor([[-3.0, 0.0], [0.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    clean = truth + 0.2 * torch.randn(200, 3, 2, generator=rng, dtype=torch.float64)
    orders = torch.stack([torch.randperm(3, generator=rng) for _ in range(200)])
    shuffled = torch.stack([c[o] for c, o in zip(clean, orders)])
    axes = {"mu": (0,)}
    pooled = labels.features({"mu": clean}, axes)
    matched = labels.match_to({"mu": shuffled}, axes, pooled.mean(0), pooled.std(0))["mu"]
    np.testing.assert_allclose(matched, clean)


def test_chains_in_other_numberings_and_swaps_on_the_way_are_matched():
    """Three chains of overlapping components, one renumbered and one that swaps half-way: one mode comes out."""
    rng = torch.Generator().manual_seed(0)
    clean = torch.tensor([-1.5, 1.5], dtype=torch.float64) + 0.4 * torch.randn(
        3, 100, 2, generator=rng, dtype=torch.float64
    )
    mixed = clean.clone()
    mixed[1] = mixed[1].flip(-1)
    axes = {"mu": (0,)}
    chains = labels.match_chains({"mu": mixed.reshape(300, 2)}, axes, 3)["mu"]
    np.testing.assert_array_equal(chains, clean.reshape(300, 2))
    swapped = clean.reshape(300, 2).clone()
    swapped[250:] = swapped[250:].flip(-1)
    found = labels.features({"mu": clean.reshape(300, 2)}, axes)
    again = labels.match_to({"mu": swapped}, axes, found.mean(0), found.std(0), gain=labels.SWAP)["mu"]
    np.testing.assert_array_equal(again, clean.reshape(300, 2))
