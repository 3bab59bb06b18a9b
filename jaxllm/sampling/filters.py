"""min_p, top_k and top_p without a sort.

They work on weights: probabilities relative to the row's likeliest token, so 1 is the largest. A sort of a
49,152-token row takes XLA on CPU milliseconds; finding a threshold takes about a dozen passes over the row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.sampling.state import RowScalars

_ONE_BITS = 0x3F800000
"""float32 1.0 as an integer. The order of positive floats is the order of their bits."""


def filter_weights(weights: Float[Array, "seqs vocab"], scalars: RowScalars) -> Float[Array, "seqs vocab"]:
    """Zeroes the weights of what min_p, then top_k, then top_p leave out, in rows that ask for it.

    Tokens with equal weights stay or go together; the likeliest always stays.
    """
    min_p = scalars.min_p[:, None]
    weights = jnp.where(weights >= min_p, weights, 0.0)
    weights = jax.lax.cond(jnp.any(scalars.top_k > 0), _keep_top_k, lambda w, k: w, weights, scalars.top_k)
    return jax.lax.cond(jnp.any(scalars.top_p > 0), _keep_top_p, lambda w, p: w, weights, scalars.top_p)


def _keep_top_k(weights: Float[Array, "seqs vocab"], top_k: Array) -> Float[Array, "seqs vocab"]:
    """Keeps tokens that fewer than `top_k` are heavier than."""
    limits = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    return _keep(weights, limits, by_mass=False)


def _keep_top_p(weights: Float[Array, "seqs vocab"], top_p: Array) -> Float[Array, "seqs vocab"]:
    """Keeps tokens where the heavier ones together do not reach `top_p`."""
    limits = jnp.where(top_p > 0, top_p * jnp.sum(weights, axis=1), jnp.inf)
    return _keep(weights, limits, by_mass=True)


def _keep(
    weights: Float[Array, "seqs vocab"], limits: Float[Array, "seqs"], *, by_mass: bool
) -> Float[Array, "seqs vocab"]:
    """Keeps each token whose heavier tokens' mass, or number, is below its row's limit.

    Bisects the integer images of the weights in at most 30 rounds: a token at `low` is left out, one at
    `high` stays. A row is done early when a single token is between them; that one then stays.
    """
    size = weights.shape[0]

    def heavier(bits: Array) -> tuple[Array, Array]:
        above = weights > jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]
        # float32 counts exactly up to 2**24, far above any vocabulary, and sums faster than int32 on CPU
        count = jnp.sum(jnp.where(above, 1.0, 0.0), axis=1)
        return (jnp.sum(jnp.where(above, weights, 0.0), axis=1) if by_mass else count), count

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        low, high, _, _ = carry
        return jnp.any(high - low > 1)

    def halve(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        low, high, low_count, high_count = carry
        middle = low + (high - low) // 2
        total, count = heavier(middle)
        stays = total < limits
        low, low_count = jnp.where(stays, low, middle), jnp.where(stays, low_count, count)
        high, high_count = jnp.where(stays, middle, high), jnp.where(stays, count, high_count)
        alone = low_count - high_count == 1
        return low, jnp.where(alone, low + 1, high), low_count, high_count

    low = jnp.zeros(size, jnp.int32)
    total, count = heavier(low)
    high = jnp.where(total < limits, low + 1, _ONE_BITS)  # nothing is left out: done at once
    _, high, _, _ = jax.lax.while_loop(unfinished, halve, (low, high, count, jnp.zeros(size)))
    threshold = jax.lax.bitcast_convert_type(high, jnp.float32)
    return jnp.where(weights >= threshold[:, None], weights, 0.0)
