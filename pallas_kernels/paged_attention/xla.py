"""Paged attention in plain XLA: a loop over the pages in use, with an online softmax.

Its time follows the context that a step really has, not the limit it was compiled for: the loops' bounds are
data. Small programs take each token for itself; large ones cut rows into tiles of tokens that share their
reads. Both are one short piece of code for each layer, because compile time grows with it: with separate
loops for decode and prefill in every program, a model of 30 layers took three times as long to compile.
Source of the online softmax: https://arxiv.org/abs/1805.02867.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.paged_attention.backend import Backend
from pallas_kernels.paged_attention.batch import RaggedBatch, TokenPlace, locate_tokens
from pallas_kernels.paged_attention.layout import BITS, HEAD_MAJOR, values_dtype
from pallas_kernels.paged_attention.scales import Scale, to_stored

MASKED = -1e30
"""Finite, so that a query whose keys are all masked so far stays free of NaN."""
MOST_SINGLE_TOKENS = 64
"""Tokens up to which a program takes each for itself."""
TOKENS_PER_TILE = 16
"""Few, because a row that decodes beside a prefill pays for a whole tile."""
KEYS_IN_FLIGHT = 8192
"""Keys of all queries handled at once: with their values 12 MB for 3 heads of 64 in float32."""
MOST_KEYS_PER_CHUNK = 512

Pages = Shaped[Array, "kv_heads pages vectors page_size dim"]


class Options(NamedTuple):
    """What is the same for all queries of a step."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: Float[Array, " heads"] | None
    k_scale: Scale | None
    v_scale: Scale | None
    value_dim: int


class Softmax(NamedTuple):
    """An online softmax half-way: largest score so far, sum of weights, weighted sum of values."""

    top: Float[Array, "tiles kv_heads queries"]
    total: Float[Array, "tiles kv_heads queries"]
    out: Float[Array, "tiles kv_heads queries value_dim"]


def paged_attention_xla(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads value_dim"],
    pages: Pages,
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " heads"] | None,
    k_scale: Scale | None,
    v_scale: Scale | None,
) -> tuple[Float[Array, "tokens heads value_dim"], Pages]:
    """See `paged_attention`; the pages are packed as `HEAD_MAJOR`."""
    options = Options(scale, sliding_window, soft_cap, sinks, k_scale, v_scale, v.shape[2])
    place = locate_tokens(batch, q.shape[0])
    pages = _write(k, v, pages, batch, place, options)
    if q.shape[0] <= MOST_SINGLE_TOKENS:
        out = _attend_tokens(q, pages, batch, place, options)
    else:
        out = _attend_tiles(q, pages, batch, options)
    return out.astype(q.dtype), pages


def _write(
    k: Array, v: Array, pages: Pages, batch: RaggedBatch, place: TokenPlace, options: Options
) -> Pages:
    """Scatters the step's keys and values, one vector each, into the flat pool."""
    _, kv_heads, dim = k.shape
    _, num_pages, vectors, page_size, _ = pages.shape
    page = batch.page_table[place.row, place.position // page_size]
    head = jnp.arange(kv_heads)[None, :, None]
    half = jnp.arange(vectors)[None, None, :]
    index = ((head * num_pages + page[:, None, None]) * vectors + half) * page_size
    index = index + (place.position % page_size)[:, None, None]
    index = jnp.where(place.valid[:, None, None], index, kv_heads * num_pages * vectors * page_size)
    dtype = values_dtype(pages.dtype)
    new = [to_stored(k, dtype, options.k_scale), to_stored(v, dtype, options.v_scale)]
    new = _to_bits(jnp.stack(new[:vectors], axis=2).reshape(-1, dim))
    flat = pages.reshape(-1, dim).at[index.reshape(-1)].set(new, mode="drop")
    return flat.reshape(pages.shape)


def _attend_tokens(q: Array, pages: Pages, batch: RaggedBatch, place: TokenPlace, options: Options) -> Array:
    """Every token reads its row's context for itself."""
    last = jnp.where(place.valid, place.position, -1)
    return _attend(q[:, None], last[:, None], batch.page_table[place.row], pages, options)[:, 0]


def _attend_tiles(q: Array, pages: Pages, batch: RaggedBatch, options: Options) -> Array:
    """Tile by tile in the order of the tokens, each within one row.

    A row's last tile spills over the tokens after it, which the tiles after it then overwrite.
    """
    counts = batch.query_start[1:] - batch.query_start[:-1]
    tiles_before = jnp.cumsum(-(-counts // TOKENS_PER_TILE))
    queries = jnp.pad(q, ((0, TOKENS_PER_TILE), (0, 0), (0, 0)))

    def attend_tile(tile: Array, out: Array) -> Array:
        row = jnp.searchsorted(tiles_before, tile, side="right")
        of_row = tile - jnp.where(row > 0, tiles_before[row - 1], 0)
        first = batch.query_start[row] + of_row * TOKENS_PER_TILE
        end = batch.query_start[row + 1]
        token = first + jnp.arange(TOKENS_PER_TILE)
        last = jnp.where(token < end, batch.kv_lens[row] - end + token, -1)
        block = lax.dynamic_slice_in_dim(queries, first, TOKENS_PER_TILE)
        result = _attend(block[None], last[None], batch.page_table[row][None], pages, options)
        return lax.dynamic_update_slice_in_dim(out, result[0], first, axis=0)

    none = jnp.zeros((*queries.shape[:-1], options.value_dim), jnp.float32)
    out = lax.fori_loop(0, tiles_before[-1], attend_tile, none)
    return out[: q.shape[0]]


def _attend(
    q: Float[Array, "tiles tokens heads dim"],
    last: Int32[Array, "tiles tokens"],
    table: Int32[Array, "tiles columns"],
    pages: Pages,
    options: Options,
) -> Float[Array, "tiles tokens heads value_dim"]:
    """Attention of a dense block of queries; `last` is the last position that each may see, -1 for none."""
    tiles, tokens, heads, dim = q.shape
    kv_heads, _, _, page_size, _ = pages.shape
    group = heads // kv_heads
    keys_wanted = min(KEYS_IN_FLIGHT // tiles, MOST_KEYS_PER_CHUNK)
    pages_per_chunk = max(1, min(keys_wanted // page_size, table.shape[1]))
    keys_per_chunk = pages_per_chunk * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_per_chunk)))
    grouped = q.astype(jnp.float32).reshape(tiles, tokens, kv_heads, group, dim) * options.scale
    grouped = grouped.transpose(0, 2, 1, 3, 4).reshape(tiles, kv_heads, tokens * group, dim)
    if options.k_scale is not None:  # a scale of all keys is as well one of the queries
        grouped *= options.k_scale[:, None, None]
    last_per_query = jnp.repeat(last, group, axis=1)
    window = options.sliding_window
    first_per_query = jnp.zeros_like(last_per_query) if window is None else last_per_query - window + 1

    def attend_chunk(i: Array, state: Softmax) -> Softmax:
        ids = lax.dynamic_slice_in_dim(table, i * pages_per_chunk, pages_per_chunk, axis=1)
        position = i * keys_per_chunk + jnp.arange(keys_per_chunk)
        seen = (position <= last_per_query[..., None]) & (position >= first_per_query[..., None])
        keys, values = _gather(pages, ids, options.value_dim)
        return _online_softmax(state, grouped, keys, values, seen, options.soft_cap)

    begins = jnp.where(last_per_query >= 0, first_per_query, jnp.iinfo(jnp.int32).max)
    first_chunk = jnp.maximum(begins.min(), 0) // keys_per_chunk
    num_chunks = (last.max() + keys_per_chunk) // keys_per_chunk
    state = lax.fori_loop(first_chunk, num_chunks, attend_chunk, _start(grouped, options, tokens))
    # a query that sees nothing has a total of zero, and its output stays zero
    out = state.out / jnp.where(state.total > 0, state.total, 1.0)[..., None]
    if options.v_scale is not None:
        out *= options.v_scale[:, None, None]
    out = out.reshape(tiles, kv_heads, tokens, group, -1).transpose(0, 2, 1, 3, 4)
    return jnp.where((last >= 0)[..., None, None], out.reshape(tiles, tokens, heads, -1), 0.0)


def _start(grouped: Array, options: Options, tokens: int) -> Softmax:
    """An empty softmax, or one that has seen its head's sink: a score with no value."""
    tiles, kv_heads, queries, _ = grouped.shape
    out = jnp.zeros_like(grouped, shape=(tiles, kv_heads, queries, options.value_dim))
    if options.sinks is None:
        top = jnp.full(grouped.shape[:-1], MASKED)
        return Softmax(top, jnp.zeros_like(top), out)
    per_query = jnp.tile(options.sinks.astype(jnp.float32).reshape(kv_heads, -1), (1, tokens))
    top = jnp.broadcast_to(per_query, (tiles, kv_heads, queries))
    return Softmax(top, jnp.ones_like(top), out)


def _online_softmax(
    state: Softmax,
    q: Float[Array, "tiles kv_heads queries dim"],
    k: Float[Array, "tiles kv_heads keys dim"],
    v: Float[Array, "tiles kv_heads keys value_dim"],
    seen: Bool[Array, "tiles queries keys"],
    soft_cap: float | None,
) -> Softmax:
    """Takes one more chunk of keys into account."""
    # keys first: with few queries XLA on CPU takes a third of the time of the other order
    scores = jnp.einsum("rhkd,rhqd->rhqk", k, q, precision=lax.Precision.HIGHEST)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, None], scores, MASKED)
    top = jnp.maximum(state.top, scores.max(axis=-1))
    weights = jnp.where(seen[:, None], jnp.exp(scores - top[..., None]), 0.0)
    rescale = jnp.exp(state.top - top)
    # pages that nobody sees may hold anything, NaN too, and 0 * NaN is NaN
    v = jnp.where(seen.any(axis=1)[:, None, :, None], v, 0.0)
    out = jnp.einsum("rhqk,rhkd->rhqd", weights, v, precision=lax.Precision.HIGHEST)
    return Softmax(top, state.total * rescale + weights.sum(axis=-1), state.out * rescale[..., None] + out)


def _gather(pages: Pages, ids: Int32[Array, "tiles columns"], value_dim: int) -> tuple[Array, Array]:
    """Keys `[tiles, kv_heads, keys, dim]` and values of some pages, in float32.

    Flat halves of a head's page are gathered: from a pool of four axes XLA on CPU takes five times as long,
    and whole pages would have to be cut afterwards.
    """
    kv_heads, num_pages, vectors, page_size, dim = pages.shape
    index = vectors * (jnp.arange(kv_heads)[None, :, None] * num_pages + ids[:, None, :]).reshape(-1)
    flat = pages.reshape(kv_heads * num_pages * vectors, page_size * dim)
    shape = (ids.shape[0], kv_heads, -1, dim)
    keys = _from_bits(jnp.take(flat, index, axis=0, mode="clip")).reshape(shape)
    if vectors == 1:
        return keys, keys[..., :value_dim]
    values = jnp.take(flat, index + 1, axis=0, mode="clip")
    return keys, _from_bits(values).reshape(shape)


def _to_bits(x: Array) -> Array:
    bits = BITS.get(jnp.dtype(x.dtype))
    return x if bits is None else lax.bitcast_convert_type(x, bits)


def _from_bits(x: Array) -> Float[Array, "..."]:
    if x.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    values = values_dtype(x.dtype)
    return (x if values == x.dtype else lax.bitcast_convert_type(x, values)).astype(jnp.float32)


BACKEND = Backend("xla", paged_attention_xla, HEAD_MAJOR)
