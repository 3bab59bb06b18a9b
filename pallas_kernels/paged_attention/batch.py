"""The shape of a step: which tokens belong to which row, and which pages hold each row's keys."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


class RaggedBatch(NamedTuple):
    """A flat ragged batch of tokens over rows, decode rows first.

    Row `s` owns the tokens `query_start[s]:query_start[s + 1]`, the newest of its `kv_lens[s]` keys.
    Rows that are not in use are empty and come last, and so do tokens that belong to no row.
    """

    query_start: Int32[Array, "rows+1"]
    kv_lens: Int32[Array, " rows"]
    """Keys of each row once this step's own are written."""
    page_table: Int32[Array, "rows pages"]
    """Page ids in the order of positions; 0 is the null page, which is never read as a key."""
    num_rows: Int32[Array, " 2"]
    """How many rows hold exactly one token and come first, and how many rows are in use at all."""


class TokenPlace(NamedTuple):
    """Where each token of the flat batch stands."""

    row: Int32[Array, " tokens"]
    position: Int32[Array, " tokens"]
    valid: Bool[Array, " tokens"]
    """False for padding tokens, whose row and position are meaningless."""


def locate_tokens(batch: RaggedBatch, num_tokens: int) -> TokenPlace:
    """The row and the position in its row of each of `num_tokens` tokens."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(batch.query_start[1:], token, side="right").astype(jnp.int32)
    row = jnp.minimum(row, batch.kv_lens.shape[0] - 1)
    position = batch.kv_lens[row] - batch.query_start[row + 1] + token
    return TokenPlace(row, position, token < batch.query_start[batch.num_rows[1]])
