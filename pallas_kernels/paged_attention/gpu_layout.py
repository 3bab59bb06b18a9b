"""How the GPU backend packs pages."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.paged_attention.layout import LogicalPages, PageGeometry


@dataclass(frozen=True)
class PageMajor:
    """`[pages, kv_heads, 2, page_size, head_dim]`: a head's page is one run of bytes, keys and then values.

    One bulk copy brings them, and a page with all its heads is one run too.
    """

    heads_axis: int = 1

    def array(self, geometry: PageGeometry) -> jax.ShapeDtypeStruct:
        """See `PageLayout`."""
        shape = (geometry.num_pages, geometry.kv_heads, 2, geometry.page_size, geometry.head_dim)
        return jax.ShapeDtypeStruct(shape, geometry.dtype)

    def read(self, array: Array, kv_heads: int, head_dim: int) -> PageGeometry | None:
        """See `PageLayout`."""
        if array.ndim != 5 or (array.shape[1], array.shape[2], array.shape[4]) != (kv_heads, 2, head_dim):
            return None
        return PageGeometry(array.shape[0], array.shape[3], kv_heads, head_dim, jnp.dtype(array.dtype))

    def pack(self, pages: LogicalPages) -> Array:
        """See `PageLayout`."""
        count, size, heads, dim = pages.shape
        return pages.reshape(count, size, heads // 2, 2, dim).transpose(0, 2, 3, 1, 4)

    def unpack(self, array: Array, kv_heads: int, head_dim: int) -> LogicalPages:
        """See `PageLayout`."""
        count, heads, _, size, dim = array.shape
        return array.transpose(0, 3, 1, 2, 4).reshape(count, size, 2 * heads, dim)
