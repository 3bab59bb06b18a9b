"""Tokens as rows, one for each expert that they go to, in the order of the experts."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from jaxllm.layers.embedding import take_rows


def count_rows(chosen: Int32[Array, "..."], experts: int) -> Int32[Array, " experts"]:
    """Rows of each expert; other numbers stand for none."""
    # not a histogram: scatters are slow on TPU, and this is one fused sum
    return (chosen.reshape(-1, 1) == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)


def sort_rows(
    x: Shaped[Array, "tokens embed"], chosen: Int32[Array, "tokens chosen"]
) -> tuple[Shaped[Array, "rows embed"], Int32[Array, " rows"]]:
    """The rows, and of each its number among the `chosen`."""
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    return take_rows(x, order // chosen.shape[1]), order


def add_rows(
    rows: Float[Array, "rows embed"],
    order: Int32[Array, " rows"],
    weights: Float[Array, "tokens chosen"],
) -> Float[Array, "tokens embed"]:
    """Of each token the weighted sum of what became of its rows, in float32."""
    out = rows[jnp.argsort(order)].reshape(*weights.shape, -1).astype(jnp.float32)
    return (weights[:, :, None] * out).sum(axis=1)
