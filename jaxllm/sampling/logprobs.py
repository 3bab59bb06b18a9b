"""Log probabilities of tokens, from the model's own logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(
    logits: Float[Array, "tokens vocab"], tokens: Int[Array, "tokens"], k: int
) -> tuple[Float[Array, "tokens"], Int[Array, "tokens"], Int[Array, "tokens k"], Float[Array, "tokens k"]]:
    """Log probabilities of the given tokens and of the `k` likeliest at each position.

    Args:
        k: how many of the likeliest; static. The vocabulary's size gives all of them, 0 none.

    Returns:
        The token's log probability; its rank, counting tokens at least as likely, so 1 is the likeliest; the
        likeliest tokens' ids, in order, the lower id first among equals; their log probabilities.
    """
    logits = logits.astype(jnp.float32)
    largest = jnp.max(logits, axis=1, keepdims=True)
    normalizer = largest[:, 0] + jnp.log(jnp.sum(jnp.exp(logits - largest), axis=1))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = jnp.sum(jnp.where(logits >= chosen, 1.0, 0.0), axis=1).astype(jnp.int32)
    top, ids = jax.lax.top_k(logits, k)
    return chosen[:, 0] - normalizer, rank, ids, top - normalizer[:, None]
