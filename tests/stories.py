"""Bare Pyro programs as users write them, shared by the tests."""

import pyro
import pyro.distributions as dist
import torch


def gaussian_mixture(x, num_components=3):
    """Full-covariance mixture with conjugate priors."""
    K, D = num_components, x.shape[1]
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([D]).to_event(1))
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(D + 2.0), precision_matrix=0.2 * torch.eye(D)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        return pyro.sample("x", dist.MultivariateNormal(mu[z], precision_matrix=precision[z]), obs=x)


def normal_mixture(x, num_components=2):
    """One-dimensional mixture whose scales have no conjugate prior."""
    K = num_components
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Normal(mu[z], sigma[z]), obs=x)


def hidden_markov(x, num_states=2):
    """Gaussian HMM over sequences (N, T)."""
    K = num_states
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))
    A = pyro.sample("A", dist.Dirichlet(torch.ones(K)).expand([K]).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    with pyro.plate("data", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[:, t])


def mixed_columns(b, c, k):
    """Two classes seen through a Bernoulli, a Poisson and a categorical column."""
    pi = pyro.sample("pi", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("classes", 2):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        phi = pyro.sample("phi", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("rows", len(b)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("b", dist.Bernoulli(p[z]), obs=b)
        pyro.sample("c", dist.Poisson(rate[z]), obs=c)
        pyro.sample("k", dist.Categorical(phi[z]), obs=k)


def mixed_columns_data(n=60):
    z = (torch.rand(n) > 0.4).long()
    b = torch.bernoulli(torch.tensor([0.2, 0.8])[z])
    c = torch.poisson(torch.tensor([2.0, 9.0])[z])
    k = torch.distributions.Categorical(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]])[z]).sample()
    return {"b": b, "c": c, "k": k}


def regression(X, y):
    """Linear regression with unknown noise."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, sigma), obs=y)


def eight_schools(y, sigma):
    """Non-centred, with the school effect as a deterministic site."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS = {"y": [28.0, 8, -3, 7, -1, 1, 18, 12], "sigma": [15.0, 10, 16, 11, 9, 11, 10, 18]}


def ppca(x, num_factors=2):
    """Probabilistic PCA with the factors in the open."""
    D = x.shape[1]
    W = pyro.sample("W", dist.Normal(0.0, 1.0).expand([D, num_factors]).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([num_factors]).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, sigma).to_event(1), obs=x)


def factor_model(x):
    """Gamma-Poisson factors: continuous locals, counts."""
    w = pyro.sample("w", dist.Gamma(1.0, 1.0).expand([x.shape[1], 2]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(1.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Poisson(z @ w.T).to_event(1), obs=x)


def box(x):
    """Uniform density on an interval whose ends are unknown."""
    low = pyro.sample("low", dist.Normal(-5.0, 1.0))
    width = pyro.sample("width", dist.HalfNormal(20.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(low, low + width, validate_args=False), obs=x)


def bits(x, num_bits=40):
    """A latent word of 40 bits per row: 2**40 states."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5).expand([num_bits]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def coupled_bits(x, num_bits=40):
    """The same as 40 sites that meet in one observation."""
    with pyro.plate("data", len(x)):
        z = [pyro.sample(f"z_{i}", dist.Bernoulli(0.5)) for i in range(num_bits)]
        pyro.sample("x", dist.Normal(sum(z), 1.0), obs=x)


def poisson_latent(x):
    """A count that cannot be enumerated."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Poisson(rate))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def generator(x=None, num_data=10):
    """An implicit model: it makes data and has no density."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.deterministic("out", torch.tanh(scale * z))


def beta_bernoulli(x):
    """Coin with a conjugate prior."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def recorded_mode(posterior):
    """How a recorded step runs where the fit was: launched as a CUDA graph on a card."""
    return "cudagraph" if posterior.diagnostics["device"].startswith("cuda") else "graph"
