"""Posteriors of posteriordb with Stan's reference draws, summarised; they are no part of the project."""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import SHARED


def reference(data, summary):
    """(data, parameter -> mean and sd) of one posterior; skips where the folder is absent."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip(f"reference posteriors are not here: {folder}")
    return json.loads((folder / "data" / data).read_text()), json.loads((folder / "summary" / summary).read_text())[
        "params"
    ]


def eight_schools_noncentred(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        raw = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)


def eight_schools_centred(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_interaction(kid_score, mom_hs, mom_iq):
    """Flat coefficients, half-Cauchy noise."""
    beta = pyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (4,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
    with pyro.plate("data", len(kid_score)):
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def low_dim_gauss_mix(y):
    """Ordered means, the component summed out."""
    start = pyro.sample("start", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
    pyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(start).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.stack([theta, 1 - theta])))
        pyro.sample("y", dist.Normal(start[z], sigma[z]), obs=y)


def ark(y, K=5):
    """Autoregression of order K."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = torch.stack([y[K - 1 - k : len(y) - 1 - k] for k in range(K)], -1)
    with pyro.plate("data", len(y) - K):
        pyro.sample("rest", dist.Normal(alpha + lags @ beta, sigma), obs=y[K:])


def schools():
    data, params = reference("eight_schools.json", "eight_schools-eight_schools_noncentered.json")
    given = {"y": np.array(data["y"], float), "sigma": np.array(data["sigma"], float)}

    def named(draws):
        theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["theta_trans"]
        return {"mu": draws["mu"], "tau": draws["tau"], **{f"theta[{i + 1}]": theta[:, i] for i in range(8)}}

    return eight_schools_noncentred, given, named, params


def kidiq():
    data, params = reference("kidiq.json", "kidiq-kidscore_interaction.json")
    given = {n: np.array(data[n], float) for n in ("kid_score", "mom_hs", "mom_iq")}

    def named(draws):
        return {"sigma": draws["sigma"], **{f"beta[{i + 1}]": draws["beta"][:, i] for i in range(4)}}

    return kidscore_interaction, given, named, params


def mixture():
    data, params = reference("low_dim_gauss_mix.json", "low_dim_gauss_mix-low_dim_gauss_mix.json")

    def named(draws):
        found = {f"mu[{i + 1}]": draws["start"][:, i] for i in range(2)}
        return {**found, **{f"sigma[{i + 1}]": draws["sigma"][:, i] for i in range(2)}, "theta": draws["theta"]}

    return low_dim_gauss_mix, {"y": np.array(data["y"], float)}, named, params


def autoregression():
    data, params = reference("arK.json", "arK-arK.json")

    def named(draws):
        found = {"alpha": draws["alpha"], "sigma": draws["sigma"]}
        return {**found, **{f"beta[{i + 1}]": draws["beta"][:, i] for i in range(5)}}

    return ark, {"y": np.array(data["y"], float)}, named, params
