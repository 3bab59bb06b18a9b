"""Paged attention written to be read: the definition that every other backend is held to."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_attention.backend import Backend
from pallas_kernels.paged_attention.batch import RaggedBatch, locate_tokens
from pallas_kernels.paged_attention.scales import to_stored

MASKED = -1e30


def paged_attention_reference(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads value_dim"],
    pages: Shaped[Array, "pages page_size vectors*kv_heads dim"],
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " heads"] | None,
    k_scale: Float[Array, " kv_heads"] | None,
    v_scale: Float[Array, " kv_heads"] | None,
) -> tuple[Float[Array, "tokens heads value_dim"], Shaped[Array, "pages page_size vectors*kv_heads dim"]]:
    """See `paged_attention`; the pages are packed as `INTERLEAVED`."""
    tokens, heads, dim = q.shape
    page_size, kv_heads = pages.shape[1], k.shape[1]
    place = locate_tokens(batch, tokens)

    page = batch.page_table[place.row, place.position // page_size]
    page = jnp.where(place.valid, page, pages.shape[0])  # out of range: dropped
    new = [to_stored(k, pages.dtype, k_scale), to_stored(v, pages.dtype, v_scale)]
    vectors = pages.shape[2] // kv_heads  # one where values are shared with keys
    new = jnp.stack(new[:vectors], axis=2).reshape(tokens, -1, dim)
    pages = pages.at[page, place.position % page_size].set(new, mode="drop")

    context = batch.page_table.shape[1] * page_size
    kv = pages[batch.page_table].reshape(-1, context, kv_heads, vectors, dim)[place.row].astype(jnp.float32)
    key_position = jnp.arange(context)
    seen = key_position <= place.position[:, None]
    if sliding_window is not None:
        seen &= key_position > place.position[:, None] - sliding_window
    seen &= place.valid[:, None]
    kv = jnp.where(seen[:, :, None, None, None], kv, 0.0)
    keys = kv[..., 0, :] if k_scale is None else kv[..., 0, :] * k_scale[:, None]
    values = kv[..., vectors - 1, : v.shape[2]]
    values = values if v_scale is None else values * v_scale[:, None]

    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, heads // kv_heads, dim)
    exact = lax.Precision.HIGHEST
    scores = jnp.einsum("thgd,tchd->thgc", grouped, keys, precision=exact) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, None, None, :], scores, MASKED)
    sink = jnp.full(heads, MASKED) if sinks is None else sinks.astype(jnp.float32)
    sink = sink.reshape(1, kv_heads, heads // kv_heads, 1)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = jnp.where(seen[:, None, None, :], jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top)
    out = jnp.einsum("thgc,tchd->thgd", weights / total, values, precision=exact)
    return out.reshape(tokens, heads, -1).astype(q.dtype), pages


BACKEND = Backend("reference", paged_attention_reference)
