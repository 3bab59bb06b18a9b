"""The queries of a step as tiles for the GPU kernel, and the tokens' outputs from those of the tiles."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.gpu_kernel import Tiles


class TokenTile(NamedTuple):
    """Where the output of each token is."""

    tile: Int32[Array, " tokens"]
    slot: Int32[Array, " tokens"]
    """Which of the tile's tokens."""
    valid: Bool[Array, " tokens"]


def single_tiles(batch: RaggedBatch, num_tokens: int) -> tuple[Tiles, TokenTile]:
    """A tile for each row of one token."""
    rows = min(batch.kv_lens.shape[0], num_tokens)
    row = jnp.arange(rows, dtype=jnp.int32)
    place = jnp.stack([row, row, batch.kv_lens[:rows] - 1, jnp.ones_like(row)], axis=1)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    singles = batch.num_rows[0]
    tile = jnp.minimum(token, rows - 1)
    return Tiles(place, batch.num_rows[:1]), TokenTile(tile, jnp.zeros_like(token), token < singles)


def ragged_tiles(batch: RaggedBatch, num_tokens: int, tile_tokens: int) -> tuple[Tiles, TokenTile]:
    """Tiles of `tile_tokens` tokens for the rows of more than one; the last tile of a row may have fewer."""
    rows = batch.kv_lens.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    counts = batch.query_start[1:] - batch.query_start[:-1]
    several = (row >= batch.num_rows[0]) & (row < batch.num_rows[1])
    of_row = jnp.where(several, -(-counts // tile_tokens), 0)
    tiles_end = jnp.cumsum(of_row).astype(jnp.int32)
    most = (num_tokens + min(rows, num_tokens // 2) * (tile_tokens - 1)) // tile_tokens
    index = jnp.arange(most, dtype=jnp.int32)
    tile_row = jnp.minimum(jnp.searchsorted(tiles_end, index, side="right"), rows - 1).astype(jnp.int32)
    offset = (index - (tiles_end - of_row)[tile_row]) * tile_tokens
    first = batch.query_start[tile_row] + offset
    position = batch.kv_lens[tile_row] - counts[tile_row] + offset
    tokens = jnp.minimum(counts[tile_row] - offset, tile_tokens)

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    token_row = jnp.minimum(jnp.searchsorted(batch.query_start[1:], token, side="right"), rows - 1)
    within = token - batch.query_start[token_row]
    tile = jnp.clip((tiles_end - of_row)[token_row] + within // tile_tokens, 0, most - 1)
    valid = several[token_row] & (token < batch.query_start[batch.num_rows[1]])
    place = jnp.stack([tile_row, first, position, tokens], axis=1).astype(jnp.int32)
    return Tiles(place, tiles_end[-1:]), TokenTile(tile, within % tile_tokens, valid)


def merge_splits(
    out: Float[Array, "tiles splits kv_heads rows dim"],
    weight: Float[Array, "tiles splits kv_heads rows_of_warpgroups"] | None,
) -> Float[Array, "tiles kv_heads rows dim"]:
    """The attention over all keys from that over the keys of each split and the log2 of their weights."""
    if weight is None:
        return out[:, 0]
    weight = weight[..., : out.shape[3]]
    share = jnp.exp2(weight - weight.max(axis=1, keepdims=True))
    share = share / share.sum(axis=1, keepdims=True)
    return (out * share[..., None]).sum(axis=1)


def gather_tokens(
    out: Float[Array, "tiles kv_heads rows dim"], place: TokenTile, tile_tokens: int, group: int
) -> Float[Array, "tokens heads dim"]:
    """The output of each token; zero for those that are in no tile."""
    tiles, kv_heads, _, dim = out.shape
    out = out[:, :, : tile_tokens * group].reshape(tiles, kv_heads, tile_tokens, group, dim)
    tokens = out[place.tile, :, place.slot]
    tokens = jnp.where(place.valid[:, None, None, None], tokens, 0)
    return tokens.reshape(-1, kv_heads * group, dim)
