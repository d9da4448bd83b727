"""NUTS and many-chain HMC against Pyro's, NumPyro's and nutpie's NUTS: smallest bulk effective sample size a second.

Warm-up is included, set-up is not.

Every side draws from the same posterior with its own defaults, all on one processor core, a round at a time in rotating
order. Set-up (tracing, compiling) is timed apart. Pyro runs one shorter chain in the first round only: a round of four
would take minutes. Ours counts only where no R-hat is above 1.01. NumPyro, nutpie and PyMC are left out where they are not
installed.

    python benchmarks/nuts_vs_peers.py [--quick] [--only schools]
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from _peers import Case, Report, Times, arguments, rotating

from inference import HMC, NUTS, fit
from inference.diagnostics import rhat_ess

#: Draws of every side: name -> (chains, draws, ...).
Draws = dict[str, np.ndarray]
#: A side: seed -> (draws, seconds); the first call sets it up.
Side = Callable[[int], tuple[Draws, float]]

CHAINS, WARMUP, DRAWS = 4, 1000, 1000
#: Pyro's warm-up and draws by story: a gradient costs it about a millisecond, and some trajectories have hundreds.
SHORTER = {"factors": (150, 100), "autoregression": (200, 200)}
FEWER = (300, 300)


# -- data and stories --------------------------------------------------------------------------------------------------


def data_of(name: str) -> dict[str, np.ndarray]:
    """The same numbers for every side."""
    rng = np.random.default_rng(0)
    if name == "schools":
        return {
            "y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12]),
            "sigma": np.array([15.0, 10, 16, 11, 9, 11, 10, 18]),
        }
    if name == "logistic":
        X, w = rng.normal(size=(1000, 20)), rng.normal(size=20)
        return {"X": X, "y": (rng.random(1000) < 1 / (1 + np.exp(-X @ w - 0.3))).astype(float)}
    if name == "mixture":
        z = rng.random(1000) < 0.4
        return {"x": np.where(z, rng.normal(-1.5, 0.8, 1000), rng.normal(1.5, 1.1, 1000))}
    if name == "robust":
        from sklearn.datasets import load_diabetes

        found = load_diabetes()
        return {"X": found.data / found.data.std(0), "y": (found.target - found.target.mean()) / found.target.std()}
    if name == "groups":
        level = rng.normal(0.3, 0.8, 24)
        count = rng.integers(5, 60, 24).astype(float)
        return {"n": count, "y": rng.binomial(count.astype(int), 1 / (1 + np.exp(-level))).astype(float)}
    if name == "autoregression":
        y = np.zeros(300)
        for t in range(2, 300):
            y[t] = 0.3 + 0.6 * y[t - 1] - 0.3 * y[t - 2] + 0.4 * rng.normal()
        return {"lags": np.stack([y[5 - k : 300 - k] for k in range(1, 6)], 1), "y": y[5:]}
    W, psi = rng.normal(size=(10, 2)), 0.3 + 0.5 * rng.random(10)
    return {"x": rng.normal(size=(500, 2)) @ W.T + psi * rng.normal(size=(500, 10))}


def schools(y: torch.Tensor, sigma: torch.Tensor) -> None:
    """Eight schools, not centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)


def logistic(X: torch.Tensor, y: torch.Tensor) -> None:
    """Logistic regression."""
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=X @ w + b), obs=y)


def mixture(x: torch.Tensor) -> None:
    """Two normal components in order."""
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    low = pyro.sample("low", dist.Normal(0.0, 2.0))
    gap = pyro.sample("gap", dist.HalfNormal(4.0))
    s = pyro.sample("s", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    weights, means = torch.stack([theta, 1 - theta]), torch.stack([low, low + gap])
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, s)), obs=x)


def mixture_told(x: torch.Tensor) -> None:
    """The same mixture with its components in the open, which are summed out."""
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    low = pyro.sample("low", dist.Normal(0.0, 2.0))
    gap = pyro.sample("gap", dist.HalfNormal(4.0))
    s = pyro.sample("s", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    weights, means = torch.stack([theta, 1 - theta]), torch.stack([low, low + gap])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(means[z], s[z]), obs=x)


def factors(x: torch.Tensor) -> None:
    """Factor analysis with two factors; W is known up to rotation."""
    D = x.shape[1]
    W = pyro.sample("W", dist.Normal(torch.zeros(D, 2), 1.0).to_event(2))
    psi = pyro.sample("psi", dist.HalfNormal(torch.ones(D)).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, psi).to_event(1), obs=x)


def factors_marginal(x: torch.Tensor) -> None:
    """Factor analysis as its peers are given it, with the factors integrated out by hand."""
    D = x.shape[1]
    W = pyro.sample("W", dist.Normal(torch.zeros(D, 2), 1.0).to_event(2))
    psi = pyro.sample("psi", dist.HalfNormal(torch.ones(D)).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.LowRankMultivariateNormal(torch.zeros(D), W, psi**2), obs=x)


def robust(X: torch.Tensor, y: torch.Tensor) -> None:
    """Linear regression with Student-t noise."""
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.StudentT(nu, X @ w, s), obs=y)


def groups(n: torch.Tensor, y: torch.Tensor) -> None:
    """Binomial counts of groups with a level each, not centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.5))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(n)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Binomial(n, logits=mu + tau * raw), obs=y)


def autoregression(lags: torch.Tensor, y: torch.Tensor) -> None:
    """A series that hangs on its last five values."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    s = pyro.sample("s", dist.HalfCauchy(2.5))
    with pyro.plate("steps", len(y)):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, s), obs=y)


STORIES: dict[str, Callable[..., None]] = {
    "schools": schools,
    "logistic": logistic,
    "mixture": mixture,
    "mixture, enumerated": mixture_told,
    "factors": factors,
    "robust": robust,
    "groups": groups,
    "autoregression": autoregression,
}
#: What Pyro's own sampler is given instead, which knows no integrals.
BY_HAND = {"factors": factors_marginal}


def base(name: str) -> str:
    """The same posterior told in another way has the same data and peers."""
    return name.split(",")[0]


# -- sides -------------------------------------------------------------------------------------------------------------


def ours(name: str, quick: bool, method: Any = None) -> Side:
    """This project: seconds of warm-up and draws, as the posterior tells them."""
    data, method = data_of(base(name)), method or NUTS(chains=CHAINS, warmup=WARMUP, draws=DRAWS)

    def run(seed: int) -> tuple[Draws, float]:
        posterior = fit(STORIES[name], data, method, seed=seed, progress=False)
        draws = {n: v.numpy().reshape(posterior.chains, -1, *v.shape[1:]) for n, v in posterior.draws.items()}
        return draws, posterior.timings["warmup"] + posterior.timings["run"]

    return run


def many(name: str, quick: bool) -> Side:
    """This project's sixteen chains that move together."""
    return ours(name, quick, HMC())


def pyros(name: str, quick: bool) -> Side:
    """Pyro, as its documentation runs it."""
    from pyro.infer import MCMC
    from pyro.infer import NUTS as Kernel

    data = {n: torch.as_tensor(v) for n, v in data_of(base(name)).items()}
    warmup, draws = (50, 50) if quick else SHORTER.get(name, FEWER)

    def run(seed: int) -> tuple[Draws, float]:
        pyro.set_rng_seed(seed)
        torch.set_default_dtype(torch.float64)
        mcmc = MCMC(
            Kernel(BY_HAND.get(name, STORIES[name])), num_samples=draws, warmup_steps=warmup, disable_progbar=True
        )
        start = time.perf_counter()
        mcmc.run(**data)
        taken = time.perf_counter() - start
        torch.set_default_dtype(torch.float32)
        return {n: v.numpy() for n, v in mcmc.get_samples(group_by_chain=True).items()}, taken

    return run


def numpyros(name: str, quick: bool) -> Side:
    """NumPyro, chain after chain, compiled before the clock starts."""
    import jax
    import numpyro
    import numpyro.distributions as nd
    from numpyro.infer import NUTS as Kernel

    jax.config.update("jax_enable_x64", True)
    jnp, data, name = jax.numpy, data_of(base(name)), base(name)

    def story(**d: Any) -> None:
        sample = numpyro.sample
        if name == "schools":
            mu, tau = sample("mu", nd.Normal(0, 5)), sample("tau", nd.HalfCauchy(5))
            with numpyro.plate("schools", 8):
                raw = sample("raw", nd.Normal(0, 1))
                sample("y", nd.Normal(mu + tau * raw, d["sigma"]), obs=d["y"])
        elif name == "logistic":
            w, b = sample("w", nd.Normal(jnp.zeros(20), 1).to_event(1)), sample("b", nd.Normal(0, 1))
            with numpyro.plate("rows", 1000):
                sample("y", nd.Bernoulli(logits=d["X"] @ w + b), obs=d["y"])
        elif name == "mixture":
            theta, low, gap = (
                sample("theta", nd.Beta(5, 5)),
                sample("low", nd.Normal(0, 2)),
                sample("gap", nd.HalfNormal(4)),
            )
            s = sample("s", nd.HalfNormal(2 * jnp.ones(2)).to_event(1))
            parts = nd.Normal(jnp.stack([low, low + gap]), s)
            with numpyro.plate("rows", 1000):
                sample("x", nd.MixtureSameFamily(nd.Categorical(jnp.stack([theta, 1 - theta])), parts), obs=d["x"])
        elif name == "robust":
            w, s = sample("w", nd.Normal(jnp.zeros(10), 1).to_event(1)), sample("s", nd.HalfNormal(1))
            nu = sample("nu", nd.Gamma(2, 0.1))
            with numpyro.plate("rows", len(d["y"])):
                sample("y", nd.StudentT(nu, d["X"] @ w, s), obs=d["y"])
        elif name == "groups":
            mu, tau = sample("mu", nd.Normal(0, 1.5)), sample("tau", nd.HalfNormal(1))
            with numpyro.plate("groups", 24):
                raw = sample("raw", nd.Normal(0, 1))
                sample("y", nd.Binomial(d["n"].astype(int), logits=mu + tau * raw), obs=d["y"])
        elif name == "autoregression":
            alpha, beta = sample("alpha", nd.Normal(0, 10)), sample("beta", nd.Normal(jnp.zeros(5), 10).to_event(1))
            s = sample("s", nd.HalfCauchy(2.5))
            with numpyro.plate("steps", len(d["y"])):
                sample("y", nd.Normal(alpha + d["lags"] @ beta, s), obs=d["y"])
        else:
            W, psi = (
                sample("W", nd.Normal(jnp.zeros((10, 2)), 1).to_event(2)),
                sample("psi", nd.HalfNormal(jnp.ones(10)).to_event(1)),
            )
            with numpyro.plate("rows", 500):
                sample("x", nd.LowRankMultivariateNormal(jnp.zeros(10), W, psi**2), obs=d["x"])

    kernel = Kernel(story)

    def moved(state: Any, _: Any) -> tuple[Any, Any]:
        state = kernel.sample(state, (), data)
        return state, state.z

    @jax.jit
    def chain(state: Any) -> Any:
        state = jax.lax.scan(lambda s, _: (moved(s, None)[0], None), state, None, length=WARMUP)[0]
        return jax.lax.scan(moved, state, None, length=DRAWS)[1]

    # `MCMC.run` compiles anew at every call; this is its loop, compiled once, so that only sampling is timed.
    def run(seed: int) -> tuple[Draws, float]:
        keys = jax.random.split(jax.random.PRNGKey(seed), CHAINS)
        begun = [kernel.init(key, WARMUP, None, (), data) for key in keys]
        start = time.perf_counter()
        found = [jax.block_until_ready(chain(state)) for state in begun]
        taken = time.perf_counter() - start
        values = jax.vmap(jax.vmap(kernel.postprocess_fn((), data)))(jax.tree.map(lambda *v: jnp.stack(v), *found))
        return {n: np.asarray(v) for n, v in values.items()}, taken

    return run


def nutpies(name: str, quick: bool) -> Side:
    """nutpie on a PyMC model through Numba, on one core."""
    import nutpie
    import pymc as pm

    name = base(name)
    data = data_of(name)
    with pm.Model() as model:
        if name == "schools":
            mu, tau, raw = pm.Normal("mu", 0, 5), pm.HalfCauchy("tau", 5), pm.Normal("raw", 0, 1, shape=8)
            pm.Normal("y", mu + tau * raw, data["sigma"], observed=data["y"])
        elif name == "logistic":
            w, b = pm.Normal("w", 0, 1, shape=20), pm.Normal("b", 0, 1)
            pm.Bernoulli("y", logit_p=data["X"] @ w + b, observed=data["y"])
        elif name == "mixture":
            theta, low, gap = pm.Beta("theta", 5, 5), pm.Normal("low", 0, 2), pm.HalfNormal("gap", 4)
            s = pm.HalfNormal("s", 2, shape=2)
            weights, means = pm.math.stack([theta, 1 - theta]), pm.math.stack([low, low + gap])
            pm.NormalMixture("x", w=weights, mu=means, sigma=s, observed=data["x"])
        elif name == "robust":
            w, s, nu = pm.Normal("w", 0, 1, shape=10), pm.HalfNormal("s", 1), pm.Gamma("nu", 2, 0.1)
            pm.StudentT("y", nu=nu, mu=data["X"] @ w, sigma=s, observed=data["y"])
        elif name == "groups":
            mu, tau, raw = pm.Normal("mu", 0, 1.5), pm.HalfNormal("tau", 1), pm.Normal("raw", 0, 1, shape=24)
            pm.Binomial("y", n=data["n"].astype(int), logit_p=mu + tau * raw, observed=data["y"].astype(int))
        elif name == "autoregression":
            alpha, beta, s = pm.Normal("alpha", 0, 10), pm.Normal("beta", 0, 10, shape=5), pm.HalfCauchy("s", 2.5)
            pm.Normal("y", alpha + data["lags"] @ beta, s, observed=data["y"])
        else:
            W, psi = pm.Normal("W", 0, 1, shape=(10, 2)), pm.HalfNormal("psi", 1, shape=10)
            cov = W @ W.T + pm.math.stack([psi[i] ** 2 * np.eye(10)[i] for i in range(10)])
            pm.MvNormal("x", np.zeros(10), cov=cov, observed=data["x"])
    compiled = nutpie.compile_pymc_model(model)

    def run(seed: int) -> tuple[Draws, float]:
        start = time.perf_counter()
        trace = nutpie.sample(compiled, draws=DRAWS, tune=WARMUP, chains=CHAINS, cores=1, seed=seed, progress_bar=False)
        taken = time.perf_counter() - start
        names = [v.name for v in model.free_RVs]
        return {n: np.asarray(trace.posterior[n]) for n in names}, taken

    return run


#: Side -> (what has to be installed, what makes it).
SIDES: dict[str, tuple[tuple[str, ...], Callable[[str, bool], Side]]] = {
    "ours": ((), ours),
    "ours, hmc": ((), many),
    "pyro": ((), pyros),
    "numpyro": (("numpyro",), numpyros),
    "nutpie": (("nutpie", "pymc", "numba"), nutpies),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def identified(name: str, draws: Draws) -> Draws:
    """What the data can tell: factor loadings up to rotation."""
    draws = {n: v for n, v in draws.items() if n != "z"}
    if name != "factors":
        return draws
    W = draws["W"]
    rows, columns = np.triu_indices(W.shape[2])
    return {"psi": draws["psi"], "WW": np.einsum("cnik,cnjk->cnij", W, W)[:, :, rows, columns]}


def measure(case: Case, name: str, rounds: int, quick: bool) -> None:
    """Seconds an effective draw of every side."""
    installed = {n: make for n, (needs, make) in SIDES.items() if all(importlib.util.find_spec(m) for m in needs)}
    sides: dict[str, Side] = {}
    for side, make in installed.items():
        start = time.perf_counter()
        sides[side] = make(name, quick)
        if side != "pyro":
            _, taken = sides[side](99)
            case.facts[f"{side}, set-up at first use in s"] = time.perf_counter() - start - taken
    costs: dict[str, list[float]] = {n: [] for n in sides}
    worst: dict[str, float] = {n: 0.0 for n in sides}
    for r, side in rotating(list(sides), rounds):
        if side == "pyro" and r:
            continue
        draws, taken = sides[side](r)
        found = rhat_ess(identified(name, draws))
        costs[side].append(taken / found["ess_bulk"])
        worst[side] = max(worst[side], found["rhat"])
    case.times = {n: Times(c) for n, c in costs.items()}
    for side, rhat in worst.items():
        if side.startswith("ours"):
            case.check(f"R-hat of {side}", rhat, 1.01)
        else:
            case.facts[f"{side}, R-hat"] = rhat
    for side, times in case.times.items():
        case.facts[f"{side}, effective draws a second"] = 1.0 / times.median
    if "numpyro" in case.times:
        ratio = case.times["numpyro"].median / case.times["ours, hmc"].median
        case.facts["numpyro / ours, hmc"] = ratio
    case.faster("pyro", 20.0)
    for peer in ("numpyro", "nutpie"):
        if peer in case.times:
            case.faster(peer, 1.0 if peer == "numpyro" else 0.8)


def main() -> int:
    """Four posteriors."""
    options = arguments(__doc__, repeats=3)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    report = Report(__file__, options)
    for name in STORIES:
        if report.wants(name):
            with report.case(name, unit="effective draw") as case:
                measure(case, name, options.repeats, options.quick)
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
