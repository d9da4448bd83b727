"""What the zoo holds: one entry a story, listed without importing any of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One story of the zoo.

    Attributes
    ----------
    name
        What the story is called, in code and on the command line.
    chapter
        Its folder in the package.
    description
        One line.
    path
        "module:class".
    symbols
        Latent sites with their shapes.
    methods
        What fits it, and what each gives.
    """

    name: str
    chapter: str
    description: str
    path: str
    symbols: str
    methods: str

    @property
    def story(self) -> type:
        """The story's class; imports it."""
        module, _, name = self.path.partition(":")
        return getattr(import_module(module), name)

    def example(self) -> tuple[Any, Mapping[str, Any]]:
        """A story with settings that suit it, and data by argument that it can explain."""
        return self.story.example()  # type: ignore[attr-defined]

    def tiny(self) -> tuple[Any, Mapping[str, Any]]:
        """The story and data of an instance that is small enough for an exact answer (`inference.oracles.solve`)."""
        return self.story.tiny()  # type: ignore[attr-defined]


_ENTRIES = (
    Entry(
        name="Box",
        chapter="basics",
        description="A uniform density on a rectangle, which two corners describe",
        path="zoo.basics.box:Box",
        symbols="low, size (D,)",
        methods="exact (closed form); EM, SVI and NUTS do not see the jump at the edge",
    ),
    Entry(
        name="CellTable",
        chapter="basics",
        description="Every combination of categorical features is a cell with a probability of its own",
        path="zoo.basics.cells:CellTable",
        symbols="theta (C,)",
        methods="exact (closed form), EM (point), NUTS (samples), SVI (approximation)",
    ),
    Entry(
        name="NaiveBayes",
        chapter="basics",
        description="Features that are independent given the class, seen, hidden or left out",
        path="zoo.basics.naive_bayes:NaiveBayes",
        symbols="pi (C,); theta_j (C, V_j); y (N,)",
        methods="exact where the class is seen or left out; EM, NUTS, SVI where it is hidden and summed out",
    ),
    Entry(
        name="GMM",
        chapter="mixtures",
        description="Gaussian mixture: every row picks a component, then a place around its centre",
        path="zoo.mixtures.gmm:GMM",
        symbols="pi (K,); mu (K, D); Lambda (K, D, D) or tau (K, D); z (N,)",
        methods="EM (point), NUTS (samples), SVI (approximation); z is summed out exactly",
    ),
    Entry(
        name="PoissonMixture",
        chapter="mixtures",
        description="Poisson mixture: every row picks a component, then a count around its rate",
        path="zoo.mixtures.poisson:PoissonMixture",
        symbols="pi (K,); lam (K,) or (K, D); z (N,)",
        methods="EM (point), NUTS (samples), SVI (approximation); z is summed out exactly",
    ),
    Entry(
        name="ConjugateGMM",
        chapter="mixtures",
        description="Gaussian mixture with normal-inverse-Wishart priors",
        path="zoo.mixtures.niw:ConjugateGMM",
        symbols="pi (K,); Lambda (K, D, D); mu (K, D); z (N,)",
        methods="EM (point), NUTS (samples), SVI (approximation); z is summed out exactly",
    ),
    Entry(
        name="KMeans",
        chapter="mixtures",
        description="k-means as the limit of a Gaussian mixture whose spread vanishes",
        path="zoo.mixtures.kmeans:KMeans",
        symbols="mu (K, D); z (N,)",
        methods="EM (Lloyd's algorithm); z is summed out exactly",
    ),
    Entry(
        name="BernoulliMixture",
        chapter="mixtures",
        description="Every row picks a component, then says yes or no to every question",
        path="zoo.mixtures.bernoulli:BernoulliMixture",
        symbols="pi (K,); p (K, D); z (N,)",
        methods="EM (point), NUTS (samples), SVI (approximation); z is summed out exactly",
    ),
    Entry(
        name="MultinomialMixture",
        chapter="mixtures",
        description="Every document has one topic and draws all of its words from it",
        path="zoo.mixtures.multinomial:MultinomialMixture",
        symbols="pi (K,); phi (K, V); z (N,)",
        methods="EM (point), NUTS (samples), SVI (approximation); z is summed out exactly",
    ),
    Entry(
        name="CategoricalMixture",
        chapter="mixtures",
        description="Latent class analysis: every row picks a class, then a level of every feature",
        path="zoo.mixtures.categorical:CategoricalMixture",
        symbols="pi (K,); phi (K, D, V); z (N,)",
        methods="EM (point), NUTS (samples), SVI (approximation); z is summed out exactly",
    ),
    Entry(
        name="MixedMixture",
        chapter="mixtures",
        description="One mixture over real, count, binary and categorical columns",
        path="zoo.mixtures.mixed:MixedMixture",
        symbols="pi (K,); mu, tau (K, R); lam (K, C); p (K, B); phi (K, F, V); z (N,)",
        methods="EM (point), NUTS (samples), SVI (approximation); z is summed out exactly",
    ),
    Entry(
        name="PPCA",
        chapter="factors",
        description="Probabilistic PCA: a few factors a row, equal noise in all columns",
        path="zoo.factors.ppca:PPCA",
        symbols="W (D, K); mu (D,); psi (); z (N, K)",
        methods="EM (point, closed form without priors), NUTS (samples), SVI (linear encoder); z is integrated exactly",
    ),
    Entry(
        name="FactorAnalysis",
        chapter="factors",
        description="Factor analysis: a few factors a row, each column with noise of its own",
        path="zoo.factors.fa:FactorAnalysis",
        symbols="W (D, K); mu (D,); psi (D,); z (N, K)",
        methods="EM (point), NUTS (samples), SVI (linear encoder); z is integrated exactly",
    ),
    Entry(
        name="MixtureOfFactorAnalysers",
        chapter="factors",
        description="Clusters, each with a few factors of its own",
        path="zoo.factors.mfa:MixtureOfFactorAnalysers",
        symbols="pi (C,); mu (C, D); W (C, D, K); psi (D,); c (N,); z (N, K)",
        methods="EM (point), NUTS (samples), SVI (approximation); c is summed out and z integrated exactly",
    ),
    Entry(
        name="GaussianHMM",
        chapter="sequences",
        description="Hidden Markov model: a state moves from step to step, each seen through a normal",
        path="zoo.sequences.gaussian_hmm:GaussianHMM",
        symbols="pi (K,); A (K, K); mu, tau (K,) or (K, D); z_t (N,)",
        methods="EM (Baum-Welch), NUTS (samples), SVI (approximation); z is summed out by forward-backward",
    ),
    Entry(
        name="CategoricalHMM",
        chapter="sequences",
        description="Hidden Markov model: a state moves from step to step and emits a symbol at each",
        path="zoo.sequences.categorical_hmm:CategoricalHMM",
        symbols="pi (K,); A (K, K); B (K, V); z_t (N,)",
        methods="EM (Baum-Welch), NUTS (samples), SVI (approximation); z is summed out by forward-backward",
    ),
    Entry(
        name="LDA",
        chapter="topics",
        description="Latent Dirichlet allocation: every document mixes topics in shares of its own",
        path="zoo.topics.lda:LDA",
        symbols="phi (K, V); theta (D, K)",
        methods="EM (points, on expected counts), SVI (natural gradients), Gibbs (samples), NUTS where it is tiny",
    ),
    Entry(
        name="TokenLDA",
        chapter="topics",
        description="Latent Dirichlet allocation told word by word, every topic assignment in the open",
        path="zoo.topics.tokens:TokenLDA",
        symbols="phi (K, V); theta (D, K); z (D, N)",
        methods="EM (points, on expected counts), SVI (natural gradients), Gibbs (samples), NUTS where it is tiny",
    ),
    Entry(
        name="DTM",
        chapter="topics",
        description="Dynamic topic model: topics whose words drift from one slice of time to the next",
        path="zoo.topics.dtm:DTM",
        symbols="m (V,); beta (K, T, V); theta (D, K)",
        methods="EM (points, Newton steps over whole walks), SVI (a Gaussian Markov chain over time)",
    ),
    Entry(
        name="NICE",
        chapter="flows",
        description="Coupling flow that shifts half of the columns by what the others say",
        path="zoo.flows.coupling:NICE",
        symbols="none: x is noise that a learned map bends",
        methods="SVI (maximum likelihood; the density is exact)",
    ),
    Entry(
        name="RealNVP",
        chapter="flows",
        description="Coupling flow that shifts and scales half of the columns by what the others say",
        path="zoo.flows.coupling:RealNVP",
        symbols="none: x is noise that a learned map bends",
        methods="SVI (maximum likelihood; the density is exact)",
    ),
    Entry(
        name="MAF",
        chapter="flows",
        description="Masked autoregressive flow: every column moves by those before it, scored in one pass",
        path="zoo.flows.autoregressive:MAF",
        symbols="none: x is noise that a learned map bends",
        methods="SVI (maximum likelihood; the density is exact)",
    ),
    Entry(
        name="IAF",
        chapter="flows",
        description="Inverse autoregressive flow: every column moves by those before it, drawn in one pass",
        path="zoo.flows.autoregressive:IAF",
        symbols="none: x is noise that a learned map bends",
        methods="SVI (maximum likelihood; the density is exact)",
    ),
    Entry(
        name="NeuralSplineFlow",
        chapter="flows",
        description="Flow of rational-quadratic splines, in couplings or column by column",
        path="zoo.flows.spline:NeuralSplineFlow",
        symbols="none: x is noise that a learned map bends",
        methods="SVI (maximum likelihood; the density is exact)",
    ),
    Entry(
        name="PlanarFlow",
        chapter="flows",
        description="Noise is stretched and pressed along a few directions",
        path="zoo.flows.planar:PlanarFlow",
        symbols="none: x is noise that a learned map bends",
        methods="SVI (maximum likelihood; the density is exact)",
    ),
    Entry(
        name="Glow",
        chapter="flows",
        description="Multi-scale flow over images: channels are scaled, turned and coupled",
        path="zoo.flows.glow:Glow",
        symbols="none: x is noise that a learned map bends",
        methods="SVI (maximum likelihood; the density is exact)",
    ),
    Entry(
        name="VAE",
        chapter="deep",
        description="Variational autoencoder: a network turns a few numbers a row into what is seen",
        path="zoo.deep.vae:VAE",
        symbols="z (N, K); networks encoder, decoder",
        methods="SVI (encoder); ELBO, IWAE and importance-sampled log p(x)",
    ),
    Entry(
        name="LinearVAE",
        chapter="deep",
        description="Linear VAE: linear decoder and encoder, whose best bound is PPCA's likelihood",
        path="zoo.deep.linear_vae:LinearVAE",
        symbols="z (N, K); networks encoder, decoder",
        methods="SVI (linear encoder)",
    ),
    Entry(
        name="DeepLatentGaussian",
        chapter="deep",
        description="Layers of codes, each the place and scale of the next, down to what is seen",
        path="zoo.deep.deep_latent_gaussian:DeepLatentGaussian",
        symbols="z1 (N, K_1), ..., zL (N, K_L); networks encoder, decoder",
        methods="SVI (encoders, bottom up); ELBO, IWAE and importance-sampled log p(x)",
    ),
    Entry(
        name="Autoencoder",
        chapter="deep",
        description="Plain autoencoder, the baseline without a density: squared error through a few numbers",
        path="zoo.deep.autoencoder:Autoencoder",
        symbols="z (N, K), flat; networks encoder, decoder",
        methods="SVI (a point a row: squared error); log densities are n/a",
    ),
)


def catalog() -> tuple[Entry, ...]:
    """Every story, chapter by chapter."""
    return _ENTRIES


def get(name: str) -> Entry:
    """The entry called `name`, in any mixture of upper and lower case.

    Raises
    ------
    ValueError
        No story is called so; names the closest ones and all there are.
    """
    entries = {entry.name.lower(): entry for entry in _ENTRIES}
    if isinstance(name, str) and name.lower() in entries:
        return entries[name.lower()]
    close = get_close_matches(str(name).lower(), entries, n=1)
    guess = f" Did you mean {entries[close[0]].name!r}?" if close else ""
    raise ValueError(f"no story is called {name!r}; the zoo has {[e.name for e in _ENTRIES]}.{guess}")


def examples() -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Every story's own example, by name: the story and data by argument."""
    return {entry.name: entry.example() for entry in _ENTRIES}
