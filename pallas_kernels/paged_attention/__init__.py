"""Ragged paged attention: writes a step's keys and values into pages and attends over them, in one op."""

import jax
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_attention.backend import AttentionFunction, Backend
from pallas_kernels.paged_attention.backends import (
    Kernel,
    as_backend,
    choose_backend,
    list_backends,
    register_backend,
)
from pallas_kernels.paged_attention.batch import RaggedBatch, TokenPlace, locate_tokens
from pallas_kernels.paged_attention.call import Call, check_values
from pallas_kernels.paged_attention.check import check
from pallas_kernels.paged_attention.layout import (
    HEAD_MAJOR,
    INTERLEAVED,
    PageGeometry,
    PageLayout,
)
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.paged_attention.scales import Scale, check_scales

__all__ = [
    "HEAD_MAJOR",
    "INTERLEAVED",
    "AttentionFunction",
    "Backend",
    "Kernel",
    "PageGeometry",
    "PageLayout",
    "Problem",
    "RaggedBatch",
    "TokenPlace",
    "as_backend",
    "check",
    "choose_backend",
    "list_backends",
    "locate_tokens",
    "paged_attention",
    "register_backend",
]


@jax.named_scope("paged_attention")
def paged_attention(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads value_dim"],
    pages: Shaped[Array, "..."],
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    backend: Kernel = "auto",
) -> tuple[Float[Array, "tokens heads value_dim"], Shaped[Array, "..."]]:
    """Writes the step's keys and values into the pages, then attends causally within each row.

    Args:
        q, k, v: of the step's tokens, flat, as `batch` lays them out; query head `h` reads kv head
            `h * kv_heads // heads`. Values have as many dimensions as keys, unless the pages hold
            keys alone (`PageGeometry.shared`): then `v` is the first dimensions of `k`, and is not read.
        pages: one layer's pool, as the backend's `layout` packs it.
        scale: multiplies the scores before the soft cap.
        sliding_window: a token at position p sees the positions j with p - sliding_window < j <= p.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        sinks: a score per head that takes part in the softmax and has no value.
        k_scale, v_scale: a number for each kv head, by which keys and values are divided before they are
            stored in pages of 8 bits; int8 pages need them, for float8 pages 1 is the default. Pages of
            keys alone take none.
        backend: a registered name, a backend or a function; "auto" is the first in the platform's order that
            serves this call and whose packing the pages have.

    Returns:
        The attention's output, zero for padding tokens, and the pages with the new keys and values.

    Raises:
        ValueError: there is no such backend, the pages are not in its packing, heads is not a multiple of
            kv_heads, or values or scales do not go with the pages.
        NotImplementedError: the backend does not serve this call; the message says what.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"heads={q.shape[1]}: must be a multiple of kv_heads={k.shape[1]}")
    call = Call(q, k, pages, sliding_window, soft_cap, sinks is not None)
    chosen = call.choose() if backend == "auto" else call.require(as_backend(backend))
    geometry = call.problem(chosen).geometry
    check_values(geometry, k, v)
    check_scales(geometry, k_scale, v_scale)
    return chosen.attend(
        q,
        k,
        v,
        pages,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
