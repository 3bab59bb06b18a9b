"""Cuts rows that are sorted by group into tiles that kernels work through, each with one group's weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int, Int32, Shaped


class Tiles(NamedTuple):
    """The work, item by item: all rows that one group has in one tile.

    Every row is in exactly one item. Items of rows without a group come last; what is beyond `total` repeats
    the last item and is not to be done.

    Attributes:
        group: whose weights; of items without a group, those of the item before it.
        start: the row at which the tile starts.
        first, end: the rows of the tile that are the group's, counted from the first of all rows.
        counts: (items that have a group, items in all).
    """

    group: Int32[Array, " items"]
    start: Int32[Array, " items"]
    first: Int32[Array, " items"]
    end: Int32[Array, " items"]
    counts: Int32[Array, " 2"]


def cut_tiles(group_sizes: Int[Array, " groups"], tokens: int, rows: int, *, aligned: bool) -> Tiles:
    """The items for tiles of that many rows.

    Args:
        aligned: tiles start at multiples of `rows`, and groups that meet within one share it; otherwise each
            group's tiles start at its own first row, and the last one reaches beyond the group.
    """
    groups = group_sizes.shape[0]
    sizes = jnp.concatenate([group_sizes.astype(jnp.int32), jnp.full(1, tokens, jnp.int32)])
    end = jnp.minimum(jnp.cumsum(sizes), tokens)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    base = first // rows * rows if aligned else first
    tiles = jnp.where(end > first, -(-(end - base) // rows), 0)
    until = jnp.cumsum(tiles)
    item = jnp.minimum(jnp.arange(most_items(tokens, groups, rows), dtype=jnp.int32), until[-1] - 1)
    group = jnp.searchsorted(until, item, side="right").astype(jnp.int32)
    start = base[group] + (item - (until[group] - tiles[group])) * rows
    counts = jnp.stack([until[-2], until[-1]])
    return Tiles(
        group=group[jnp.clip(item, 0, jnp.maximum(until[-2] - 1, 0))] % groups,
        start=start,
        first=jnp.maximum(first[group], start),
        end=jnp.minimum(end[group], start + rows),
        counts=counts,
    )


def most_items(tokens: int, groups: int, rows: int) -> int:
    """Items of any sizes of the groups: each group that has rows adds at most one to those of the rows."""
    return min(tokens, -(-tokens // rows) + groups)


def from_bits(weights: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Weights that are given as the bits of bfloat16 as what they are."""
    return lax.bitcast_convert_type(weights, jnp.bfloat16) if weights.dtype == jnp.uint16 else weights


def mesh_axes(*arrays: Array) -> ManualAxisType:
    """Axes of the mesh over which any of the arrays may differ, within `shard_map`; outside none."""
    return ManualAxisType(
        varying=frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
    )
