"""How a backend packs keys and values into a pool of pages."""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

LogicalPages = Shaped[Array, "pages page_size 2*kv_heads dim"]
"""Pages as the op defines them: k0, v0, k1, v1, ... on the heads axis; of keys alone k0, k1, ..."""


@dataclass(frozen=True)
class PageGeometry:
    """What a pool of pages holds, whatever its packing."""

    num_pages: int
    page_size: int
    """Tokens a page holds."""
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    shared: bool = False
    """Only keys are kept: a value is the first dimensions of its key (multi-head latent attention)."""

    @property
    def vectors(self) -> int:
        """Kept for a token and a kv head: a key and a value, or one for both."""
        return 1 if self.shared else 2

    @property
    def bytes_per_page(self) -> int:
        """Keys and values of one page, all heads, without padding."""
        return self.vectors * self.page_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def logical_shape(self) -> tuple[int, int, int, int]:
        """Of `LogicalPages`."""
        return (self.num_pages, self.page_size, self.vectors * self.kv_heads, self.head_dim)

    def with_pages(self, num_pages: int) -> "PageGeometry":
        """The same pool with another number of pages."""
        return dataclasses.replace(self, num_pages=num_pages)


class PageLayout(Protocol):
    """A packing of pages. A part of a pool, cut along `heads_axis`, is the packing of fewer heads."""

    @property
    def heads_axis(self) -> int:
        """The axis of the array that tensor parallelism cuts."""
        ...

    def array(self, geometry: PageGeometry) -> jax.ShapeDtypeStruct:
        """The array that holds such a pool."""
        ...

    def read(self, array: Array, kv_heads: int, head_dim: int) -> PageGeometry | None:
        """What a pool in this packing holds; None for an array that is not one."""
        ...

    def pack(self, pages: LogicalPages) -> Array:
        """From the op's definition of pages to this packing."""
        ...

    def unpack(self, array: Array, kv_heads: int, head_dim: int) -> LogicalPages:
        """The inverse of `pack`."""
        ...


@dataclass(frozen=True)
class Interleaved:
    """`[pages, page_size, 2 * kv_heads, head_dim]`: the op's own definition."""

    heads_axis: int = 2

    def array(self, geometry: PageGeometry) -> jax.ShapeDtypeStruct:
        """See `PageLayout`."""
        return jax.ShapeDtypeStruct(geometry.logical_shape, geometry.dtype)

    def read(self, array: Array, kv_heads: int, head_dim: int) -> PageGeometry | None:
        """See `PageLayout`."""
        if array.ndim != 4 or array.shape[2] not in (kv_heads, 2 * kv_heads) or array.shape[3] != head_dim:
            return None
        count, size, heads, _ = array.shape
        dtype = jnp.dtype(array.dtype)
        return PageGeometry(count, size, kv_heads, head_dim, dtype, shared=heads == kv_heads)

    def pack(self, pages: LogicalPages) -> Array:
        """See `PageLayout`."""
        return pages

    def unpack(self, array: Array, kv_heads: int, head_dim: int) -> LogicalPages:
        """See `PageLayout`."""
        return array


@dataclass(frozen=True)
class HeadMajor:
    """`[kv_heads, pages, 2, page_size, head_dim]`: a head's page is one run of bytes, K and then V.

    Where values are shared, the third axis is one long; `pack` takes them of one head.

    bfloat16 and float8 are kept as their bits: XLA on CPU turns a whole array of them into float32 and back
    for each scatter or gather on it.
    """

    heads_axis: int = 0

    def array(self, geometry: PageGeometry) -> jax.ShapeDtypeStruct:
        """See `PageLayout`."""
        pages = (geometry.num_pages, geometry.vectors, geometry.page_size, geometry.head_dim)
        shape = (geometry.kv_heads, *pages)
        return jax.ShapeDtypeStruct(shape, BITS.get(geometry.dtype, geometry.dtype))

    def read(self, array: Array, kv_heads: int, head_dim: int) -> PageGeometry | None:
        """See `PageLayout`."""
        if array.ndim != 5 or (array.shape[0], array.shape[4]) != (kv_heads, head_dim):
            return None
        _, count, vectors, size, _ = array.shape
        if vectors not in (1, 2):
            return None
        dtype = values_dtype(array.dtype)
        return PageGeometry(count, size, kv_heads, head_dim, dtype, shared=vectors == 1)

    def pack(self, pages: LogicalPages) -> Array:
        """See `PageLayout`."""
        count, size, heads, dim = pages.shape
        vectors = min(2, heads)
        packed = pages.reshape(count, size, heads // vectors, vectors, dim).transpose(2, 0, 3, 1, 4)
        bits = BITS.get(jnp.dtype(pages.dtype))
        return packed if bits is None else jax.lax.bitcast_convert_type(packed, bits)

    def unpack(self, array: Array, kv_heads: int, head_dim: int) -> LogicalPages:
        """See `PageLayout`."""
        heads, count, vectors, size, dim = array.shape
        dtype = values_dtype(array.dtype)
        values = array if dtype == array.dtype else jax.lax.bitcast_convert_type(array, dtype)
        return values.transpose(1, 3, 0, 2, 4).reshape(count, size, vectors * heads, dim)


BITS = {
    jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16),
    jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8),
}
"""The dtypes that `HeadMajor` keeps as bits, and as which."""


def values_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype whose bits `HeadMajor` keeps in an array of `dtype`."""
    return {bits: values for values, bits in BITS.items()}.get(jnp.dtype(dtype), jnp.dtype(dtype))


INTERLEAVED = Interleaved()
HEAD_MAJOR = HeadMajor()
