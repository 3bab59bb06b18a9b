"""Ragged paged attention: writes a step's keys and values into pages and attends over them, in one op."""

from dataclasses import dataclass
from typing import Protocol

import jax
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_attention.batch import RaggedBatch, TokenPlace, locate_tokens
from pallas_kernels.paged_attention.layout import (
    LayoutFunction,
    PageGeometry,
    PageLayout,
    head_major,
    interleaved,
)
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.xla import paged_attention_xla

__all__ = [
    "Backend",
    "PageGeometry",
    "PageLayout",
    "RaggedBatch",
    "TokenPlace",
    "head_major",
    "interleaved",
    "list_backends",
    "locate_tokens",
    "paged_attention",
    "register_backend",
    "resolve_backend",
]


class AttentionFunction(Protocol):
    """What a backend implements: `paged_attention` less its `backend` argument."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        pages: Array,
        batch: RaggedBatch,
        /,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        sinks: Array | None,
    ) -> tuple[Array, Array]: ...


@dataclass(frozen=True)
class Backend:
    """A way to compute the op, and the packing of pages that it works on."""

    name: str
    attend: AttentionFunction
    layout: LayoutFunction = interleaved


_BACKENDS: dict[str, Backend] = {}


def register_backend(name: str, attend: AttentionFunction, layout: LayoutFunction = interleaved) -> None:
    """Makes `backend=name` stand for `attend`, on pages packed as `layout` says.

    Raises:
        ValueError: the name is taken, or is "auto".
    """
    if name == "auto" or name in _BACKENDS:
        raise ValueError(f"backend {name!r} exists already; take another name")
    _BACKENDS[name] = Backend(name, attend, layout)


def list_backends() -> list[str]:
    """The registered names."""
    return sorted(_BACKENDS)


def resolve_backend(name: str = "auto") -> Backend:
    """The backend of that name; "auto" is the one that serves on every platform, "xla".

    Raises:
        ValueError: no such backend; the message lists those there are.
    """
    backend = _BACKENDS.get("xla" if name == "auto" else name)
    if backend is None:
        raise ValueError(
            f"attention_backend={name!r}: there is no such backend; there are {', '.join(list_backends())}"
        )
    return backend


register_backend("reference", paged_attention_reference, interleaved)
register_backend("xla", paged_attention_xla, head_major)


@jax.named_scope("paged_attention")
def paged_attention(
    q: Float[Array, "tokens heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    pages: Shaped[Array, "..."],
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "tokens heads dim"], Shaped[Array, "..."]]:
    """Writes the step's keys and values into the pages, then attends causally within each row.

    Args:
        q, k, v: of the step's tokens, flat, as `batch` lays them out; query head `h` reads kv head
            `h * kv_heads // heads`.
        pages: one layer's pool, as the backend's `layout` packs it.
        scale: multiplies the scores before the soft cap.
        sliding_window: a token at position p sees the positions j with p - sliding_window < j <= p.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
        sinks: a score per head that takes part in the softmax and has no value.
        backend: a registered name; see `resolve_backend`.

    Returns:
        The attention's output, zero for padding tokens, and the pages with the new keys and values.

    Raises:
        ValueError: there is no such backend, or heads is not a multiple of kv_heads.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"heads={q.shape[1]}: must be a multiple of kv_heads={k.shape[1]}")
    return resolve_backend(backend).attend(
        q, k, v, pages, batch, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks
    )
