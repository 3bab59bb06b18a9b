"""Paged attention written to be read: the definition that every other backend is held to."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.batch import RaggedBatch, locate_tokens

MASKED = -1e30


def paged_attention_reference(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    pages: Float[Array, "pages page_size 2*kv_heads dim"],
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " heads"] | None,
) -> tuple[Float[Array, "tokens heads dim"], Float[Array, "pages page_size 2*kv_heads dim"]]:
    """See `paged_attention`; the cache's layout is `interleaved`."""
    tokens, heads, dim = q.shape
    page_size, kv_heads = pages.shape[1], k.shape[1]
    place = locate_tokens(batch, tokens)

    page = batch.page_table[place.row, place.position // page_size]
    page = jnp.where(place.valid, page, pages.shape[0])  # out of range: dropped
    new = jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, dim)
    pages = pages.at[page, place.position % page_size].set(new.astype(pages.dtype), mode="drop")

    context = batch.page_table.shape[1] * page_size
    kv = pages[batch.page_table].reshape(-1, context, kv_heads, 2, dim)[place.row].astype(jnp.float32)
    key_position = jnp.arange(context)
    seen = key_position <= place.position[:, None]
    if sliding_window is not None:
        seen &= key_position > place.position[:, None] - sliding_window
    seen &= place.valid[:, None]
    kv = jnp.where(seen[:, :, None, None, None], kv, 0.0)

    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, heads // kv_heads, dim)
    exact = lax.Precision.HIGHEST
    scores = jnp.einsum("thgd,tchd->thgc", grouped, kv[..., 0, :], precision=exact) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, None, None, :], scores, MASKED)
    sink = jnp.full(heads, MASKED) if sinks is None else sinks.astype(jnp.float32)
    sink = sink.reshape(1, kv_heads, heads // kv_heads, 1)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = jnp.where(seen[:, None, None, :], jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top)
    out = jnp.einsum("thgc,tchd->thgd", weights / total, kv[..., 1, :], precision=exact)
    return out.reshape(q.shape).astype(q.dtype), pages
