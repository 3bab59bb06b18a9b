"""How a backend packs keys and values into a pool of pages."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class PageGeometry:
    """What a pool of pages holds, whatever its packing."""

    num_pages: int
    page_size: int
    """Tokens a page holds."""
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    @property
    def bytes_per_page(self) -> int:
        """Keys and values of one page, all heads, without padding."""
        return 2 * self.page_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    def with_pages(self, num_pages: int) -> "PageGeometry":
        """The same pool with another number of pages."""
        return dataclasses.replace(self, num_pages=num_pages)


@dataclass(frozen=True)
class PageLayout:
    """An array that holds a pool: `heads_axis` is the one that tensor parallelism cuts."""

    array: jax.ShapeDtypeStruct
    heads_axis: int


LayoutFunction = Callable[[PageGeometry], PageLayout]


def interleaved(geometry: PageGeometry) -> PageLayout:
    """`[num_pages, page_size, 2 * kv_heads, head_dim]`: k0, v0, k1, v1, ... on the heads axis."""
    shape = (geometry.num_pages, geometry.page_size, 2 * geometry.kv_heads, geometry.head_dim)
    return PageLayout(jax.ShapeDtypeStruct(shape, geometry.dtype), heads_axis=2)


def head_major(geometry: PageGeometry) -> PageLayout:
    """`[kv_heads, num_pages, 2, page_size, head_dim]`: a head's page is one run of bytes, K and then V.

    bfloat16 is kept as its bits: XLA on CPU turns a whole bfloat16 array into float32 and back for each
    scatter or gather on it.
    """
    shape = (geometry.kv_heads, geometry.num_pages, 2, geometry.page_size, geometry.head_dim)
    dtype = jnp.dtype(jnp.uint16) if geometry.dtype == jnp.bfloat16 else geometry.dtype
    return PageLayout(jax.ShapeDtypeStruct(shape, dtype), heads_axis=0)
