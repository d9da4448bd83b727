"""NumPyro's NUTS on the captured graph in JAX: `NUTS(backend="jax")`, where jax and numpyro are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..compiled import NotCompiled
from ..jax_graph import sixty_four_bits, value_and_grad_in_jax

if TYPE_CHECKING:
    from ..capture import ValueAndGrad
    from .nuts import NUTS


def run_in_jax(
    method: NUTS, potential: ValueAndGrad, starts: NDArray, dense: bool, seed: int
) -> tuple[NDArray, dict[str, NDArray]]:
    """Positions (chains, draws, dim) and statistics (chains, draws), chain after chain.

    Parameters
    ----------
    starts
        Where chains begin, (chains, dim).
    dense
        Whether all covariances are learned.

    Raises
    ------
    ValueError
        JAX or NumPyro is missing, or the graph has no translation, or it disagrees with JAX's answer.
    """
    try:
        import jax
        import numpyro  # noqa: F401
    except ImportError:
        raise ValueError("NUTS(backend='jax') needs jax and numpyro: pip install jax numpyro") from None
    with sixty_four_bits():
        try:
            both = jax.jit(value_and_grad_in_jax(potential))
        except NotCompiled as error:
            raise ValueError(f"NUTS(backend='jax') is impossible: {error}. Use backend='auto'") from None
        agree(potential, both)
        return sample(method, both, starts, dense, seed)


def agree(potential: ValueAndGrad, both: Any) -> None:
    """Refuse a translation that differs from the graph at the points where that was held against the story."""
    for point in potential.points:
        value, gradient = potential(point)
        found, slope = both(point.double().numpy())
        size = 1e-8 * (1 + float(gradient.abs().max()))
        if (
            abs(float(found) - float(value)) > 1e-8 * (1 + abs(float(value)))
            or np.abs(slope - gradient.numpy()).max() > size
        ):
            raise ValueError(
                "NUTS(backend='jax') is impossible: JAX's answer disagrees with the graph. Use backend='auto'"
            )


def sample(method: NUTS, both: Any, starts: NDArray, dense: bool, seed: int) -> tuple[NDArray, dict[str, NDArray]]:
    """NumPyro's chains."""
    import jax
    from numpyro.infer import MCMC
    from numpyro.infer import NUTS as Kernel

    @jax.custom_vjp
    def energy(flat: Any) -> Any:
        return -both(flat)[0]

    def forward(flat: Any) -> tuple[Any, Any]:
        value, gradient = both(flat)
        return -value, gradient

    energy.defvjp(forward, lambda gradient, weight: (-weight * gradient,))
    kernel = Kernel(
        potential_fn=energy, target_accept_prob=method.target_accept, max_tree_depth=method.max_depth, dense_mass=dense
    )
    chains = MCMC(
        kernel,
        num_warmup=method.warmup,
        num_samples=method.draws,
        num_chains=method.chains,
        chain_method="sequential",
        progress_bar=False,
    )
    fields = ("potential_energy", "energy", "num_steps", "accept_prob", "diverging", "adapt_state.step_size")
    begun = jax.numpy.asarray(starts if method.chains > 1 else starts[0])
    chains.run(jax.random.PRNGKey(seed), init_params=begun, extra_fields=fields)
    found = {n: np.asarray(v) for n, v in chains.get_extra_fields(group_by_chain=True).items()}
    steps = found["num_steps"].astype(np.int64)
    stats = {
        "diverging": found["diverging"].astype(bool),
        "energy": found["energy"],
        "tree_depth": np.ceil(np.log2(steps + 1)).astype(np.int64),
        "n_steps": steps,
        "acceptance_rate": found["accept_prob"],
        "step_size": found["adapt_state.step_size"],
        "lp": -found["potential_energy"],
    }
    positions = np.asarray(chains.get_samples(group_by_chain=True), np.float64)
    return positions, {n: np.array(v) for n, v in stats.items()}
