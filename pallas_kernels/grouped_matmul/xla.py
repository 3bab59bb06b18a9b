"""The grouped product in plain XLA: `ragged_dot`, and on CPU a loop over the tiles that have rows.

XLA on CPU computes `ragged_dot` as a dense product of every row with every group: with 64 groups of
[512, 1024] and 64 rows of bfloat16 36 ms, the loop takes 3 ms of which reading the weights once is 2.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.grouped_matmul.backend import Backend
from pallas_kernels.grouped_matmul.tiles import cut_tiles, from_bits, mesh_axes

ROWS = 16
"""Of a tile on CPU: at 64 groups and 512 rows 5.9 ms, with 8 or 32 rows 6 to 7, with 64 rows 9."""


def grouped_matmul_xla(
    x: Float[Array, "tokens in"],
    weights: Shaped[Array, "groups in out"],
    group_sizes: Int[Array, " groups"],
    /,
    *,
    out_dtype: DTypeLike,
) -> Float[Array, "tokens out"]:
    """See `grouped_matmul`."""
    out = lax.platform_dependent(x, weights, group_sizes, cpu=_loop, default=_ragged_dot)
    return out.astype(out_dtype)


def _ragged_dot(x: Array, weights: Array, group_sizes: Array) -> Float[Array, "tokens out"]:
    weights = from_bits(weights)
    dtype = jnp.promote_types(x.dtype, weights.dtype)
    out = lax.ragged_dot(
        x.astype(dtype),
        weights.astype(dtype),
        group_sizes.astype(jnp.int32),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    # what ragged_dot leaves in rows without a group is not promised
    return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], out, 0.0)


def _loop(x: Array, weights: Array, group_sizes: Array) -> Float[Array, "tokens out"]:
    """Tile by tile, each starting at a group's row; its excess is overwritten by the tiles after it.

    A slice of bfloat16 at a place known only when run makes XLA convert all groups to float32 beforehand, at
    every call; of weights given as bits one group's are read.
    """
    tokens = x.shape[0]
    tiles = cut_tiles(group_sizes, tokens, ROWS, aligned=False)
    if weights.dtype == jnp.bfloat16:
        weights = lax.bitcast_convert_type(weights, jnp.uint16)  # half of what float32 would cost
    dtype = jnp.promote_types(x.dtype, jnp.bfloat16 if weights.dtype == jnp.uint16 else weights.dtype)
    rows = jnp.pad(x.astype(dtype), ((0, ROWS), (0, 0)))

    def multiply(item: Array, out: Array) -> Array:
        start = tiles.start[item]
        weight = from_bits(lax.dynamic_index_in_dim(weights, tiles.group[item], keepdims=False))
        product = lax.dot(
            lax.dynamic_slice_in_dim(rows, start, ROWS),
            weight.astype(dtype),
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        return lax.dynamic_update_slice_in_dim(out, product, start, axis=0)

    out = jnp.zeros((tokens + ROWS, weights.shape[2]), jnp.float32)
    out = lax.pcast(out, tuple(mesh_axes(x, weights, group_sizes).varying), to="varying")
    out = lax.fori_loop(0, tiles.counts[0], multiply, out)
    return jnp.where((jnp.arange(tokens) < group_sizes.sum())[:, None], out[:tokens], 0.0)


BACKEND = Backend("xla", grouped_matmul_xla)
