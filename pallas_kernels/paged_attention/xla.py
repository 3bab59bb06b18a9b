"""Paged attention in plain XLA: loops over the pages in use, with an online softmax.

Its time follows the tokens and the context that a step really has, not the limits it was compiled for: the loops'
bounds are data. Rows of one token go through in blocks of rows, longer rows in tiles of tokens.
Source of the online softmax: https://arxiv.org/abs/1805.02867.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.paged_attention.batch import RaggedBatch, locate_tokens

MASKED = -1e30
"""Finite, so that a row whose keys are all masked so far stays free of NaN."""
ROWS_PER_BLOCK = 8
TOKENS_PER_TILE = 64
KEYS_PER_CHUNK = 256

Pages = Shaped[Array, "kv_heads pages 2 page_size dim"]


class Softmax(NamedTuple):
    """An online softmax half-way: largest score so far, sum of weights, weighted sum of values."""

    top: Float[Array, "rows kv_heads queries"]
    total: Float[Array, "rows kv_heads queries"]
    out: Float[Array, "rows kv_heads queries dim"]


class Mask(NamedTuple):
    """What is the same for all queries of a step."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: Float[Array, " heads"] | None


def paged_attention_xla(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    pages: Pages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " heads"] | None,
) -> tuple[Float[Array, "tokens heads dim"], Pages]:
    """See `paged_attention`; the cache's layout is `head_major`."""
    mask = Mask(scale, sliding_window, soft_cap, sinks)
    pages = _write(k, v, pages, batch)
    out = _attend_prefill(q, pages, batch, mask, _attend_decode(q, pages, batch, mask))
    return out[: q.shape[0]].astype(q.dtype), pages


def _write(k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
    """Scatters the step's keys and values, one vector each, into the flat pool."""
    tokens, kv_heads, dim = k.shape
    _, num_pages, _, page_size, _ = pages.shape
    place = locate_tokens(batch, tokens)
    page = batch.page_table[place.row, place.position // page_size]
    head = jnp.arange(kv_heads)[None, :, None]
    half = jnp.arange(2)[None, None, :]
    index = ((head * num_pages + page[:, None, None]) * 2 + half) * page_size
    index = index + (place.position % page_size)[:, None, None]
    index = jnp.where(place.valid[:, None, None], index, kv_heads * num_pages * 2 * page_size)
    new = jnp.stack([k, v], axis=2).reshape(-1, dim)
    flat = pages.reshape(-1, dim).at[index.reshape(-1)].set(_to_bits(new, pages.dtype), mode="drop")
    return flat.reshape(pages.shape)


def _attend_decode(q: Array, pages: Pages, batch: RaggedBatch, mask: Mask) -> Float[Array, "padded heads dim"]:
    """Attention of the rows that have one token; zero for all other tokens, and a tile of padding after them."""
    tokens, heads, dim = q.shape
    rows = batch.kv_lens.shape[0]
    block = min(ROWS_PER_BLOCK, rows)
    spare = -rows % block
    kv_lens = jnp.pad(batch.kv_lens, (0, spare))
    table = jnp.pad(batch.page_table, ((0, spare), (0, 0)))
    queries = jnp.pad(q, ((0, max(0, rows + spare - tokens)), (0, 0), (0, 0)))
    decoding = jnp.arange(rows + spare) < batch.num_rows[0]

    def attend_block(i: Array, out: Array) -> Array:
        first = i * block
        inside = lax.dynamic_slice_in_dim(decoding, first, block)
        last = jnp.where(inside, lax.dynamic_slice_in_dim(kv_lens, first, block) - 1, -1)
        result = _attend(
            lax.dynamic_slice_in_dim(queries, first, block)[:, None],
            last[:, None],
            lax.dynamic_slice_in_dim(table, first, block),
            pages,
            mask,
        )
        return lax.dynamic_update_slice_in_dim(out, result[:, 0], first, axis=0)

    out = jnp.zeros((max(tokens, rows + spare) + TOKENS_PER_TILE, heads, dim), jnp.float32)
    return lax.fori_loop(0, (batch.num_rows[0] + block - 1) // block, attend_block, out)


def _attend_prefill(q: Array, pages: Pages, batch: RaggedBatch, mask: Mask, out: Array) -> Array:
    """Adds the attention of the rows that have several tokens, tile by tile in the order of the tokens.

    A row's last tile spills over the tokens after it, which the tiles after it then overwrite.
    """
    tile = min(TOKENS_PER_TILE, q.shape[0])
    queries = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))

    def attend_row(row: Array, out: Array) -> Array:
        start, end = batch.query_start[row], batch.query_start[row + 1]
        table = lax.dynamic_slice_in_dim(batch.page_table, row, 1)

        def attend_tile(i: Array, out: Array) -> Array:
            first = start + i * tile
            token = first + jnp.arange(tile)
            last = jnp.where(token < end, batch.kv_lens[row] - end + token, -1)
            block = lax.dynamic_slice_in_dim(queries, first, tile)[None]
            result = _attend(block, last[None], table, pages, mask)
            return lax.dynamic_update_slice_in_dim(out, result[0], first, axis=0)

        return lax.fori_loop(0, (end - start + tile - 1) // tile, attend_tile, out)

    return lax.fori_loop(batch.num_rows[0], batch.num_rows[1], attend_row, out)


def _attend(
    q: Float[Array, "rows tokens heads dim"],
    last: Int32[Array, "rows tokens"],
    table: Int32[Array, "rows pages"],
    pages: Pages,
    mask: Mask,
) -> Float[Array, "rows tokens heads dim"]:
    """Attention of a dense block of queries; `last` is the last position each may see, -1 for none."""
    rows, tokens, heads, dim = q.shape
    kv_heads, _, _, page_size, _ = pages.shape
    group = heads // kv_heads
    pages_per_chunk = max(1, min(KEYS_PER_CHUNK // page_size, table.shape[1]))
    keys_per_chunk = pages_per_chunk * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_per_chunk)))
    grouped = q.astype(jnp.float32).reshape(rows, tokens, kv_heads, group, dim) * mask.scale
    grouped = grouped.transpose(0, 2, 1, 3, 4).reshape(rows, kv_heads, tokens * group, dim)
    last_per_query = jnp.repeat(last, group, axis=1)
    window = mask.sliding_window
    first_per_query = jnp.zeros_like(last_per_query) if window is None else last_per_query - window + 1

    def attend_chunk(i: Array, state: Softmax) -> Softmax:
        ids = lax.dynamic_slice_in_dim(table, i * pages_per_chunk, pages_per_chunk, axis=1)
        position = i * keys_per_chunk + jnp.arange(keys_per_chunk)
        seen = (position <= last_per_query[..., None]) & (position >= first_per_query[..., None])
        return _online_softmax(state, grouped, *_gather(pages, ids), seen, mask.soft_cap)

    begins = jnp.where(last_per_query >= 0, first_per_query, jnp.iinfo(jnp.int32).max)
    first_chunk = jnp.maximum(begins.min(), 0) // keys_per_chunk
    num_chunks = (last.max() + keys_per_chunk) // keys_per_chunk
    state = lax.fori_loop(first_chunk, num_chunks, attend_chunk, _start(grouped, mask.sinks, tokens))
    # a query that sees nothing has a total of zero, and its output stays zero
    out = state.out / jnp.where(state.total > 0, state.total, 1.0)[..., None]
    out = out.reshape(rows, kv_heads, tokens, group, dim).transpose(0, 2, 1, 3, 4)
    return jnp.where((last >= 0)[..., None, None], out.reshape(q.shape), 0.0)


def _start(grouped: Array, sinks: Float[Array, " heads"] | None, tokens: int) -> Softmax:
    """An empty softmax, or one that has seen its head's sink: a score with no value."""
    rows, kv_heads, queries, _ = grouped.shape
    if sinks is None:
        top = jnp.full(grouped.shape[:-1], MASKED)
        return Softmax(top, jnp.zeros_like(top), jnp.zeros_like(grouped))
    per_query = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, -1), (1, tokens))
    top = jnp.broadcast_to(per_query, (rows, kv_heads, queries))
    return Softmax(top, jnp.ones_like(top), jnp.zeros_like(grouped))


def _online_softmax(
    state: Softmax,
    q: Float[Array, "rows kv_heads queries dim"],
    k: Float[Array, "rows kv_heads keys dim"],
    v: Float[Array, "rows kv_heads keys dim"],
    seen: Bool[Array, "rows queries keys"],
    soft_cap: float | None,
) -> Softmax:
    """Takes one more chunk of keys into account."""
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    scores = product("rhqd,rhkd->rhqk", q, k)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, None], scores, MASKED)
    top = jnp.maximum(state.top, scores.max(axis=-1))
    weights = jnp.where(seen[:, None], jnp.exp(scores - top[..., None]), 0.0)
    rescale = jnp.exp(state.top - top)
    # pages that nobody sees may hold anything, NaN too, and 0 * NaN is NaN
    v = jnp.where(seen.any(axis=1)[:, None, :, None], v, 0.0)
    out = state.out * rescale[..., None] + product("rhqk,rhkd->rhqd", weights, v)
    return Softmax(top, state.total * rescale + weights.sum(axis=-1), out)


def _gather(pages: Pages, ids: Int32[Array, "rows pages"]) -> tuple[Array, Array]:
    """Keys and values of some pages, `[rows, kv_heads, keys, dim]` in float32.

    Flat rows of a head's page are gathered: from a pool of four axes XLA on CPU takes five times as long.
    """
    kv_heads, num_pages, _, page_size, dim = pages.shape
    rows, count = ids.shape
    index = jnp.arange(kv_heads)[None, :, None] * num_pages + ids[:, None, :]
    flat = pages.reshape(kv_heads * num_pages, -1)
    taken = jnp.take(flat, index.reshape(-1), axis=0, mode="clip")
    taken = _from_bits(taken).reshape(rows, kv_heads, count, 2, page_size, dim)
    keys, values = taken[:, :, :, 0], taken[:, :, :, 1]
    return keys.reshape(rows, kv_heads, -1, dim), values.reshape(rows, kv_heads, -1, dim)


def _to_bits(x: Array, dtype: jnp.dtype) -> Array:
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def _from_bits(x: Array) -> Float[Array, "..."]:
    if x.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(jnp.float32)
