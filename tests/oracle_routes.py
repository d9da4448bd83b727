"""Log evidence of the zoo's tiny instances by formulas that never run a story: conjugacy, sums over labels, scipy."""

import itertools
import math

import numpy as np
from scipy import integrate, stats
from scipy.special import betaln, expit, gammaln, logsumexp


def dirichlet(counts, prior):
    """log of the Dirichlet-categorical probability of a sequence with these counts."""
    counts, prior = np.asarray(counts, float), np.asarray(prior, float)
    return float(
        gammaln(prior.sum()) - gammaln(prior.sum() + counts.sum()) + (gammaln(prior + counts) - gammaln(prior)).sum()
    )


def over_labels(n, k, prior, part):
    """log of the sum over all labels of n rows: their own probability, and that of each component's rows, `part(rows)`."""
    terms = []
    for z in itertools.product(range(k), repeat=n):
        z = np.array(z)
        terms.append(
            dirichlet(np.bincount(z, minlength=k), [prior] * k) + sum(part(np.flatnonzero(z == c)) for c in range(k))
        )
    return logsumexp(terms)


def box(story, data):
    x = data["x"].double().numpy()[:, 0]
    low, high, n = x.min(), x.max(), len(x)

    def below(corner):  # integral over the size of size^-n
        return ((high - corner) ** (1 - n) - 20.0 ** (1 - n)) / (n - 1)

    return math.log(integrate.quad(below, -10, low, epsabs=1e-14)[0] / 400)


def cells(story, data):
    return dirichlet(np.bincount(data["x"].numpy(), minlength=3), [2.0] * 3)


def naive_bayes(story, data):
    x = data["x"].numpy()
    return over_labels(4, 2, 2.0, lambda r: sum(dirichlet(np.bincount(x[r, j], minlength=2), [2, 2]) for j in range(2)))


def categorical(story, data):
    x = data["x"].numpy().astype(int)
    a = story.concentration
    return over_labels(4, 2, a, lambda r: sum(dirichlet(np.bincount(x[r, j], minlength=2), [2, 2]) for j in range(2)))


def multinomial(story, data):
    x = data["x"].double().numpy()
    coefficient = (gammaln(x.sum(1) + 1) - gammaln(x + 1).sum(1)).sum()
    return coefficient + over_labels(4, 2, story.concentration, lambda r: dirichlet(x[r].sum(0), [2, 2]))


def poisson(story, data):
    x, a, b = data["x"].double().numpy(), story.shape, story.rate

    def part(r):
        total = x[r].sum()
        return (
            a * math.log(b)
            - gammaln(a)
            + gammaln(a + total)
            - (a + total) * math.log(b + len(r))
            - gammaln(x[r] + 1).sum()
        )

    return over_labels(len(x), 2, story.concentration, part)


def precision(x, centre):
    """log evidence of rows under tau ~ Gamma(a, b) times `centre(tau, x)`, the log density with the mean integrated out."""

    def part(r, shape, rate):
        def f(tau):
            return math.exp(stats.gamma.logpdf(tau, shape, scale=1 / rate) + centre(tau, x[r]))

        return math.log(
            sum(integrate.quad(f, a, b, epsabs=1e-15)[0] for a, b in ((0, 1), (1, 10), (10, 60), (60, 800)))
        )

    return part


def normal_centre(tau, x, variance=25.0):
    """Rows around a mean with a Normal(0, variance) prior."""
    n = len(x)
    if not n:
        return 0.0
    spread = np.eye(n) / tau + variance
    return -0.5 * (x @ np.linalg.solve(spread, x) + np.linalg.slogdet(2 * math.pi * spread)[1])


def gmm(story, data):
    part = precision(data["x"].double().numpy()[:, 0], normal_centre)
    return over_labels(4, 2, story.concentration, lambda r: part(r, 1.5, (1 / 3) ** 2))


def niw(story, data):
    part = precision(data["x"].double().numpy()[:, 0], lambda tau, x: normal_centre(tau, x, 1 / (0.5 * tau)))
    return over_labels(4, 2, story.concentration, lambda r: part(r, 1.5, (1 / 3) ** 2))


def kmeans(story, data):
    x = data["x"].double().numpy()[:, 0]
    labels = itertools.product(range(2), repeat=4)
    parts = [
        -4 * math.log(2) + sum(normal_centre(1 / 0.2**2, x[np.array(z) == k], 100.0**2) for k in range(2))
        for z in labels
    ]
    return logsumexp(parts)


def mixed(story, data):
    real, counts = data["real"].double().numpy()[:, 0], data["counts"].double().numpy()[:, 0]
    yes, level = data["binary"].numpy()[:, 0].astype(int), data["categories"].numpy()[:, 0]
    part = precision(real, normal_centre)

    def all_columns(r):
        total, n, b = counts[r].sum(), len(r), 1.0 / story.rate
        poissons = math.log(b) + gammaln(1 + total) - (1 + total) * math.log(b + n) - gammaln(counts[r] + 1).sum()
        answers = betaln(2 + yes[r].sum(), 2 + n - yes[r].sum()) - betaln(2, 2)
        return part(r, 2.0, 2 / 9) + poissons + answers + dirichlet(np.bincount(level[r], minlength=2), [1.1, 1.1])

    return over_labels(3, 2, story.concentration, all_columns)


def paths(x, states, a):
    """Every path of every sequence with the log probability of its moves under Dirichlet priors: (log p, labels)."""
    n, t = x.shape
    for z in itertools.product(range(states), repeat=n * t):
        z = np.array(z).reshape(n, t)
        log = dirichlet(np.bincount(z[:, 0], minlength=states), [a] * states)
        for k in range(states):
            moves = z[:, 1:][z[:, :-1] == k]
            log += dirichlet(np.bincount(moves, minlength=states), [a] * states)
        yield log, z


def categorical_hmm(story, data):
    x = data["x"].numpy()
    terms = [
        log + sum(dirichlet(np.bincount(x[z == k], minlength=2), [2, 2]) for k in range(2))
        for log, z in paths(x, 2, 2.0)
    ]
    return logsumexp(terms)


def gaussian_hmm(story, data):
    x = data["x"].double().numpy()
    part = precision(x.reshape(-1), normal_centre)
    known = {}

    def cached(rows):
        return (
            known.setdefault(tuple(rows), None)
            or known.update({tuple(rows): part(rows, 2.0, 2 / 9)})
            or known[tuple(rows)]
        )

    return logsumexp(
        [log + sum(cached(np.flatnonzero(z.reshape(-1) == k)) for k in range(2)) for log, z in paths(x, 2, 2.0)]
    )


def tokens(story, data):
    w = data["w"].numpy()
    terms = []
    for z in itertools.product(range(2), repeat=w.size):
        z = np.array(z).reshape(w.shape)
        topics = sum(dirichlet(np.bincount(w[z == k], minlength=2), [1.5, 1.5]) for k in range(2))
        terms.append(topics + sum(dirichlet(np.bincount(row, minlength=2), [1.5, 1.5]) for row in z))
    return logsumexp(terms)


def lda(story, data):
    rows = [[v for v, c in enumerate(row) for _ in range(int(c))] for row in data["w"].tolist()]
    document = np.concatenate([[d] * len(row) for d, row in enumerate(rows)])
    w = np.concatenate(rows)
    terms = []
    for z in itertools.product(range(2), repeat=len(w)):
        z = np.array(z)
        topics = sum(dirichlet(np.bincount(w[z == k], minlength=2), [1.5, 1.5]) for k in range(2))
        terms.append(topics + sum(dirichlet(np.bincount(z[document == d], minlength=2), [1.5, 1.5]) for d in range(2)))
    return logsumexp(terms)


def dtm(story, data):
    """The difference of the two words' weights drifts: N(0, 2 * 25 + 2), then steps of variance 2 * 0.5^2."""
    w = data["w"].numpy()

    def f(b, a):
        prior = stats.norm.pdf(a, 0, math.sqrt(52)) * stats.norm.pdf(b, a, math.sqrt(0.5))
        return prior * np.prod([expit(d) ** c[0] * expit(-d) ** c[1] for d, c in zip((a, b), w)])

    return math.log(integrate.dblquad(f, -40, 40, lambda a: a - 8, lambda a: a + 8, epsabs=1e-13)[0])


def linear_vae(story, data):
    W, b = story.decoder.map.weight.detach().double().numpy(), story.decoder.map.bias.detach().double().numpy()
    noise = math.exp(2 * float(story.decoder.log_sigma.detach()))
    return stats.multivariate_normal(b, W @ W.T + noise * np.eye(2)).logpdf(data["x"].double().numpy()).sum()


def factors(shared):
    """PPCA or factor analysis with one factor and two columns: loadings by Gauss-Hermite, noise by panels in its logarithm."""

    def route(story, data):
        x = data["x"].double().numpy()
        nodes, weights = (grid := np.linspace(-8, 8, 121), stats.norm.pdf(grid) * (grid[1] - grid[0]))
        W = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
        log_w = np.log(np.outer(weights, weights).reshape(-1))
        u, v = (np.linspace(-3.2, 13, 110) for _ in range(2))
        step = u[1] - u[0]
        terms = []
        for i, j in ((i, i) for i in range(len(u))) if shared else itertools.product(range(len(u)), repeat=2):
            psi = np.exp([u[i], v[j]])
            own = [stats.invgamma.logpdf(p, 2.0) + math.log(p * step) for p in (psi[:1] if shared else psi)]
            S = W[:, :, None] * W[:, None, :] + np.diag(psi)
            full = (
                np.einsum("nm,wab->wnamb", np.eye(2), S)
                + np.einsum("nm,ab->namb", np.ones((2, 2)), 25 * np.eye(2))[None]
            )
            full = full.reshape(-1, 4, 4)
            flat = np.broadcast_to(x.reshape(4, 1), (len(full), 4, 1))
            quadratic = (flat[:, :, 0] * np.linalg.solve(full, flat)[:, :, 0]).sum(1)
            log = -0.5 * (quadratic + np.linalg.slogdet(2 * math.pi * full)[1])
            terms.append(sum(own) + logsumexp(log + log_w))
        return logsumexp(terms)

    return route


ROUTES = {
    "Box": box,
    "CellTable": cells,
    "NaiveBayes": naive_bayes,
    "GMM": gmm,
    "PoissonMixture": poisson,
    "ConjugateGMM": niw,
    "KMeans": kmeans,
    "BernoulliMixture": categorical,
    "MultinomialMixture": multinomial,
    "CategoricalMixture": categorical,
    "MixedMixture": mixed,
    "PPCA": factors(shared=True),
    "GaussianHMM": gaussian_hmm,
    "CategoricalHMM": categorical_hmm,
    "LDA": lda,
    "TokenLDA": tokens,
    "DTM": dtm,
    "LinearVAE": linear_vae,
}
