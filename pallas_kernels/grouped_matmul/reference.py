"""The grouped product written to be read: the definition that every other backend is held to."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.grouped_matmul.backend import Backend
from pallas_kernels.grouped_matmul.tiles import from_bits


def grouped_matmul_reference(
    x: Float[Array, "tokens in"],
    weights: Shaped[Array, "groups in out"],
    group_sizes: Int[Array, " groups"],
    /,
    *,
    out_dtype: DTypeLike,
) -> Float[Array, "tokens out"]:
    """See `grouped_matmul`: one group after the other over all rows."""
    end = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    out = jnp.zeros((x.shape[0], weights.shape[2]), jnp.float32)
    for group, weight in enumerate(from_bits(weights)):
        product = jnp.dot(x.astype(jnp.float32), weight.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        mine = (row >= end[group] - group_sizes[group]) & (row < end[group])
        out = jnp.where(mine[:, None], product, out)
    return out.astype(out_dtype)


BACKEND = Backend("reference", grouped_matmul_reference)
