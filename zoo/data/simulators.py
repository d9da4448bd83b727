"""Data sets drawn from a story whose parameters are known, to see whether inference finds them again."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset


def three_clusters(num_data: int = 300, seed: int = 0) -> Dataset:
    """Three Gaussian clusters in the plane, two of which overlap: the standard picture of a mixture.

    `truth` has the sites of `zoo.GMM`: pi (3,), mu (3, 2), Lambda (3, 2, 2) and z (N,).
    """
    return _gaussians(
        name="three_clusters",
        weights=[0.5, 0.3, 0.2],
        centres=[[-2.0, 0.0], [1.5, 1.2], [2.0, -1.6]],
        covariances=[[[0.8, 0.4], [0.4, 0.6]], [[0.7, -0.4], [-0.4, 0.5]], [[0.5, 0.1], [0.1, 0.4]]],
        num_data=num_data,
        seed=seed,
        feature_names=("first", "second"),
        description="Three overlapping Gaussian clusters in the plane.",
        source="simulated",
    )


def old_faithful(num_data: int = 272, seed: int = 0) -> Dataset:
    """Eruptions like those of the Old Faithful geyser: simulated, not the measurements themselves.

    Rows are drawn from the two-component Gaussian mixture that maximum likelihood fits to the well-known 272
    eruptions, with its parameters rounded: after a short eruption the next one comes soon.  (The measured
    waiting times are whole minutes; these are not.)  `truth` has the sites of `zoo.GMM`: pi (2,), mu (2, 2),
    Lambda (2, 2, 2) and z (N,).

    Azzalini & Bowman, *A look at some data on the Old Faithful geyser* (Applied Statistics 39, 1990).
    """
    return _gaussians(
        name="old_faithful",
        weights=[0.356, 0.644],
        centres=[[2.036, 54.48], [4.290, 79.97]],
        covariances=[[[0.0692, 0.435], [0.435, 33.70]], [[0.170, 0.941], [0.941, 36.05]]],
        num_data=num_data,
        seed=seed,
        feature_names=("eruption (min)", "waiting (min)"),
        description="Simulated eruptions like those of the Old Faithful geyser, and the waiting times.",
        source="simulated from the mixture that fits the data of Azzalini & Bowman (1990)",
        label_names=("short", "long"),
    )


def poisson_counts(num_data: int = 500, seed: int = 0) -> Dataset:
    """Counts of three rates, such as calls an hour at night, by day and at the peak.

    `truth` has the sites of `zoo.PoissonMixture`: pi (3,), lam (3,) and z (N,).
    """
    rng = _generator(num_data, seed)
    pi, lam = np.array([0.4, 0.35, 0.25]), np.array([2.0, 9.0, 22.0])
    z = rng.choice(3, size=num_data, p=pi)
    x = rng.poisson(lam[z]).astype(np.float64)
    truth = {"pi": torch.from_numpy(pi), "lam": torch.from_numpy(lam), "z": torch.from_numpy(z)}
    return Dataset(
        name="poisson_counts",
        x=torch.from_numpy(x),
        labels=truth["z"].clone(),
        feature_names=("count",),
        label_names=("low", "middle", "high"),
        description="Counts of three different rates.",
        source="simulated",
        truth=truth,
    )


def answers(num_data: int = 300, seed: int = 0) -> Dataset:
    """Yes (1) or no (0) to eight questions by two kinds of people. `truth` has the sites of `zoo.BernoulliMixture`."""
    rng, pi = _generator(num_data, seed), np.array([0.6, 0.4])
    p = np.array([[0.9, 0.8, 0.85, 0.2, 0.1, 0.5, 0.7, 0.3], [0.2, 0.3, 0.1, 0.8, 0.9, 0.5, 0.25, 0.75]])
    z = rng.choice(2, size=num_data, p=pi)
    x = (rng.random((num_data, 8)) < p[z]).astype(np.float64)
    names = tuple(f"question {j + 1}" for j in range(8))
    return _classes("answers", x, z, names, {"pi": pi, "p": p}, "Two kinds of people answer eight questions.")


def bags_of_words(num_data: int = 200, seed: int = 0) -> Dataset:
    """Counts of twelve words in short documents of one topic each. `truth` has the sites of `zoo.MultinomialMixture`."""
    rng, pi = _generator(num_data, seed), np.array([0.4, 0.35, 0.25])
    phi = np.full((3, 12), 0.02)
    for k in range(3):
        phi[k, 4 * k : 4 * k + 4] = 0.21
    z = rng.choice(3, size=num_data, p=pi)
    x = np.stack([rng.multinomial(n, phi[k] / phi[k].sum()) for n, k in zip(rng.integers(20, 60, num_data), z)])
    words = ("ball", "goal", "team", "match", "bank", "money", "price", "tax", "virus", "doctor", "dose", "fever")
    truth = {"pi": pi, "phi": phi / phi.sum(1, keepdims=True)}
    return _classes(
        "bags_of_words", x.astype(np.float64), z, words, truth, "Short documents of sport, money or health."
    )


def survey(num_data: int = 300, seed: int = 0) -> Dataset:
    """Five questions with three answers each, and two camps. `truth` has the sites of `zoo.CategoricalMixture`."""
    rng, pi = _generator(num_data, seed), np.array([0.55, 0.45])
    one = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2], [0.8, 0.1, 0.1]])
    phi = np.stack([one, one[:, ::-1]])
    z = rng.choice(2, size=num_data, p=pi)
    x = (rng.random((num_data, 5, 1)) > phi[z].cumsum(-1)).sum(-1).clip(max=2).astype(np.float64)
    names = tuple(f"question {j + 1}" for j in range(5))
    return _classes("survey", x, z, names, {"pi": pi, "phi": phi}, "Two camps answer five questions.")


def patients(num_data: int = 300, seed: int = 0) -> Dataset:
    """Two measurements, a count, a yes or no and one of three answers. `truth` has the sites of `zoo.MixedMixture`."""
    rng, pi = _generator(num_data, seed), np.array([0.6, 0.4])
    mu, tau = np.array([[-0.8, 0.5], [1.0, -0.4]]), np.array([[2.0, 2.0], [1.5, 2.5]])
    lam, p = np.array([[2.0], [7.0]]), np.array([[0.2], [0.8]])
    phi = np.array([[[0.7, 0.2, 0.1]], [[0.1, 0.3, 0.6]]])
    z = rng.choice(2, size=num_data, p=pi)
    real = mu[z] + rng.standard_normal((num_data, 2)) / np.sqrt(tau[z])
    level = (rng.random((num_data, 1)) > phi[z, 0].cumsum(-1)).sum(-1).clip(max=2)
    x = np.column_stack([real, rng.poisson(lam[z]), rng.random((num_data, 1)) < p[z], level]).astype(np.float64)
    names = ("pressure", "weight", "visits", "smoker", "mood")
    truth = {"pi": pi, "mu": mu, "tau": tau, "lam": lam, "p": p, "phi": phi}
    return _classes("patients", x, z, names, truth, "Patients of two kinds, columns of four kinds.")


def _classes(name: str, x: Any, z: Any, names: tuple[str, ...], truth: dict[str, Any], description: str) -> Dataset:
    """Rows of a mixture, with their component as label."""
    return Dataset(
        name=name,
        x=torch.from_numpy(x),
        labels=torch.from_numpy(z),
        feature_names=names,
        description=description,
        source="simulated",
        truth={site: torch.from_numpy(np.ascontiguousarray(v)) for site, v in {**truth, "z": z}.items()},
    )


def bars(num_data: int = 300, seed: int = 0) -> Dataset:
    """Counts of nine words, the cells of a grid, whose six topics are its rows and columns; labelled by the strongest.

    `truth` has the phi of `zoo.LDA`.

    Griffiths & Steyvers, *Finding scientific topics* (PNAS 101, 2004), figure 1, on a smaller grid.
    """
    rng, grid = _generator(num_data, seed), np.arange(9).reshape(3, 3)
    phi = np.zeros((6, 9))
    for k in range(3):
        phi[k, grid[k]] = phi[3 + k, grid[:, k]] = 1 / 3
    theta = rng.dirichlet(np.full(6, 0.5), num_data)
    x = np.stack([rng.multinomial(n, p / p.sum()) for n, p in zip(rng.integers(30, 60, num_data), theta @ phi)])
    names = tuple(f"row {i + 1}, column {j + 1}" for i in range(3) for j in range(3))
    return Dataset(
        name="bars",
        x=torch.from_numpy(x.astype(np.float64)),
        labels=torch.from_numpy(theta.argmax(1)),
        feature_names=names,
        description="Documents whose topics are the bars of a grid.",
        source="simulated",
        truth={"phi": torch.from_numpy(phi)},
    )


def drifting_words(num_data: int = 240, seed: int = 0) -> Dataset:
    """Counts of ten words in six slices of time (the labels), while two topics pass from old words to new ones.

    `truth` has the phi of every topic and slice, (2, 6, 10).
    """
    rng, T = _generator(num_data, seed), 6
    old = np.array([[4.0, 3, 4, 1, 0], [0, 1, 4, 3, 4]]).T
    beta = np.zeros((2, T, 10))
    for t in range(T):
        late = t / (T - 1)
        for k in range(2):
            beta[k, t, 5 * k : 5 * k + 5] = 0.6 * ((1 - late) * old[:, 0] + late * old[:, 1]) + 1.0
    phi = np.exp(beta) / np.exp(beta).sum(-1, keepdims=True)
    times = np.sort(rng.integers(T, size=num_data))
    times[:T] = np.arange(T)
    theta = rng.dirichlet([0.5, 0.5], num_data)
    probs = np.einsum("dk,kdv->dv", theta, phi[:, times])
    x = np.stack([rng.multinomial(n, p / p.sum()) for n, p in zip(rng.integers(40, 80, num_data), probs)])
    return Dataset(
        name="drifting_words",
        x=torch.from_numpy(x.astype(np.float64)),
        labels=torch.from_numpy(times.astype(np.int64)),
        feature_names=("quill", "ink", "letter", "wire", "mail", "ox", "plough", "field", "tractor", "drone"),
        description="Writing and farming, from old words to new ones.",
        source="simulated",
        truth={"phi": torch.from_numpy(phi)},
    )


def rectangle(num_data: int = 60, seed: int = 0) -> Dataset:
    """Points spread evenly over a rectangle. `truth` has the sites of `zoo.Box`: low (2,) and size (2,)."""
    low, size = np.array([-1.0, 0.5]), np.array([3.0, 1.0])
    x = low + size * _generator(num_data, seed).random((num_data, 2))
    return Dataset(
        name="rectangle",
        x=torch.from_numpy(x),
        feature_names=("first", "second"),
        description="Points in a rectangle.",
        source="simulated",
        truth={"low": torch.from_numpy(low), "size": torch.from_numpy(size)},
    )


def regimes(num_data: int = 60, seed: int = 0) -> Dataset:
    """Sequences of 20 steps that switch between a low, a middle and a high regime and stay a while in each.

    `truth` has the sites of `zoo.GaussianHMM`: pi (3,), A (3, 3), mu (3,) and tau (3,), and z (N, 20).
    """
    pi, mu, tau = np.array([0.5, 0.3, 0.2]), np.array([-3.0, 0.0, 4.0]), np.array([1.0, 4.0, 1.0])
    A = np.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.05, 0.25, 0.7]])
    rng = _generator(num_data, seed)
    z = _paths(rng, pi, A, num_data, 20)
    x = mu[z] + rng.standard_normal(z.shape) / np.sqrt(tau[z])
    return _sequences("regimes", x, {"pi": pi, "A": A, "mu": mu, "tau": tau, "z": z}, "Sequences that switch regimes.")


def weather(num_data: int = 100, seed: int = 0) -> Dataset:
    """What somebody does on 20 days: walk (0), shop (1) or clean (2), as the hidden weather, rainy or sunny, has it.

    `truth` has the sites of `zoo.CategoricalHMM`: pi (2,), A (2, 2) and B (2, 3), and z (N, 20).
    """
    pi, A = np.array([0.6, 0.4]), np.array([[0.8, 0.2], [0.3, 0.7]])
    B = np.array([[0.1, 0.3, 0.6], [0.7, 0.25, 0.05]])
    rng = _generator(num_data, seed)
    z = _paths(rng, pi, A, num_data, 20)
    x = (rng.random(z.shape)[..., None] > B[z].cumsum(-1)).sum(-1).clip(max=2).astype(np.float64)
    return _sequences("weather", x, {"pi": pi, "A": A, "B": B, "z": z}, "Days spent as the weather has it.")


def _paths(rng: np.random.Generator, pi: Any, A: Any, num_data: int, num_steps: int) -> Any:
    """States of Markov chains, (N, T)."""
    u = rng.random((num_data, num_steps))
    z = np.empty((num_data, num_steps), dtype=np.int64)
    for t in range(num_steps):
        p = np.broadcast_to(pi, (num_data, len(pi))) if t == 0 else A[z[:, t - 1]]
        z[:, t] = (u[:, t, None] > p.cumsum(-1)).sum(-1).clip(max=len(pi) - 1)
    return z


def _sequences(name: str, x: Any, truth: dict[str, Any], description: str) -> Dataset:
    """Sequences of one column; the label of a sequence is its last state."""
    return Dataset(
        name=name,
        x=torch.from_numpy(x),
        labels=torch.from_numpy(truth["z"][:, -1].copy()),
        feature_names=tuple(f"step {t}" for t in range(x.shape[1])),
        description=description,
        source="simulated",
        truth={site: torch.from_numpy(np.asarray(v)) for site, v in truth.items()},
    )


def two_factors(num_data: int = 300, seed: int = 0) -> Dataset:
    """Six test scores that two abilities, verbal and spatial, explain: standardised scores.

    `truth` has the sites of `zoo.FactorAnalysis`: W (6, 2), mu (6,), psi (6,) and z (N, 2).
    """
    rng = _generator(num_data, seed)
    W = np.array([[0.9, 0.0], [0.8, 0.1], [0.7, 0.2], [0.1, 0.8], [0.0, 0.9], [0.2, 0.6]])
    psi = np.array([0.19, 0.35, 0.47, 0.35, 0.19, 0.6])
    z = rng.standard_normal((num_data, 2))
    x = z @ W.T + np.sqrt(psi) * rng.standard_normal((num_data, 6))
    return Dataset(
        name="two_factors",
        x=torch.from_numpy(x),
        feature_names=("vocabulary", "reading", "analogies", "blocks", "mazes", "folding"),
        description="Six test scores that two abilities explain.",
        source="simulated",
        truth={name: torch.from_numpy(v) for name, v in (("W", W), ("mu", np.zeros(6)), ("psi", psi), ("z", z))},
    )


def two_moons(num_data: int = 1000, seed: int = 0, noise: float = 0.07) -> Dataset:
    """Two interleaved half circles, blurred by `noise` and standardised by their exact moments.

    Before it is standardised a row is (cos t, sin t) or (1 - cos t, 1/2 - sin t), t uniform on (0, pi), plus noise: the moons
    of scikit-learn's `make_moons`.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a number from 0, got {noise!r}")
    rng = _generator(num_data, seed)
    z = rng.integers(2, size=num_data)
    t = rng.uniform(0.0, math.pi, size=num_data)
    outer, inner = np.stack((np.cos(t), np.sin(t)), 1), np.stack((1 - np.cos(t), 0.5 - np.sin(t)), 1)
    x = np.where(z[:, None] == 0, outer, inner) + noise * rng.standard_normal((num_data, 2))
    variance = [0.75, 0.5 - 4 / math.pi**2 + (2 / math.pi - 0.25) ** 2]
    x = (x - [0.5, 0.25]) / np.sqrt(np.array(variance) + noise**2)
    return Dataset(
        name="two_moons",
        x=torch.from_numpy(x),
        labels=torch.from_numpy(z),
        feature_names=("first", "second"),
        label_names=("upper", "lower"),
        description="Two interleaved half circles, standardised.",
        source="simulated",
    )


def two_rods(num_data: int = 300, seed: int = 0) -> Dataset:
    """Two clusters in space, each long in one direction of its own and thin in the others.

    `truth` has the sites of `zoo.MixtureOfFactorAnalysers`: pi (2,), mu (2, 3), W (2, 3, 1), psi (3,), c (N,) and z (N, 1).
    """
    rng = _generator(num_data, seed)
    pi, psi = np.array([0.6, 0.4]), np.array([0.1, 0.1, 0.1])
    mu = np.array([[-1.5, 0.0, 0.0], [1.5, 0.5, 0.0]])
    W = np.array([[[0.0], [2.0], [0.5]], [[1.5], [0.0], [1.5]]])
    c = rng.choice(2, size=num_data, p=pi)
    z = rng.standard_normal((num_data, 1))
    x = mu[c] + np.einsum("ndk,nk->nd", W[c], z) + np.sqrt(psi) * rng.standard_normal((num_data, 3))
    values = {"pi": pi, "mu": mu, "W": W, "psi": psi, "c": c, "z": z}
    return Dataset(
        name="two_rods",
        x=torch.from_numpy(x),
        labels=torch.from_numpy(c),
        feature_names=("first", "second", "third"),
        description="Two clusters in space, each long in a direction of its own.",
        source="simulated",
        truth={name: torch.from_numpy(np.asarray(v)) for name, v in values.items()},
    )


def _gaussians(
    name: str, weights: Any, centres: Any, covariances: Any, num_data: int, seed: int, **words: Any
) -> Dataset:
    """Rows of a Gaussian mixture; the truth under the site names of `zoo.GMM`."""
    rng = _generator(num_data, seed)
    pi, mu, covariance = (np.array(value, dtype=np.float64) for value in (weights, centres, covariances))
    z = rng.choice(len(pi), size=num_data, p=pi)
    noise = rng.standard_normal((num_data, mu.shape[1]))
    x = mu[z] + np.einsum("nij,nj->ni", np.linalg.cholesky(covariance)[z], noise)
    truth: dict[str, Tensor] = {
        "pi": torch.from_numpy(pi),
        "mu": torch.from_numpy(mu),
        "Lambda": torch.from_numpy(np.linalg.inv(covariance)),
        "z": torch.from_numpy(z),
    }
    return Dataset(name=name, x=torch.from_numpy(x), labels=truth["z"].clone(), truth=truth, **words)


def _generator(num_data: int, seed: int) -> np.random.Generator:
    """A random state of our own."""
    if isinstance(num_data, bool) or not isinstance(num_data, int | np.integer) or num_data < 1:
        raise ValueError(f"num_data must be a whole number from 1, got {num_data!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
    return np.random.default_rng(seed)
