"""How the TPU kernels pack pages, and the rows of 128 lanes in which they take queries and new tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.paged_attention.layout import LogicalPages, PageGeometry

LANES = 128
"""Lanes of a vector register, and the width that XLA pads an array's last axis to."""
SUBLANES = 8
"""Rows of a vector register, and those of a tile in memory, whatever the dtype."""


@dataclass(frozen=True)
class Lanes:
    """Where a token's key and value lie in its row of a page.

    With a head_dim of up to 64 both share 128 lanes: a narrower array would be padded in memory to twice its
    size, and XLA copies the whole pool around a kernel that takes it otherwise. With more, the key takes the
    first half of the row and the value the second, each padded to whole registers.
    """

    head_dim: int

    @property
    def shared(self) -> bool:
        """Whether key and value share 128 lanes."""
        return self.head_dim <= LANES // 2

    @property
    def operand(self) -> int:
        """Lanes of what a product with keys or values takes; both, where they share."""
        return LANES if self.shared else -(-self.head_dim // LANES) * LANES

    @property
    def value_first(self) -> int:
        """First lane of the value in the row."""
        return LANES // 2 if self.shared else self.operand

    @property
    def row(self) -> int:
        """Lanes of key and value together."""
        return LANES if self.shared else 2 * self.operand

    @property
    def values(self) -> slice:
        """The lanes that a product with values takes."""
        return slice(0, LANES) if self.shared else slice(self.operand, 2 * self.operand)

    def join(
        self, k: Shaped[Array, "*axes dim"], v: Shaped[Array, "*axes dim"]
    ) -> Shaped[Array, "*axes lanes"]:
        """Key and value side by side, zeros in the lanes that neither uses."""
        half = [(0, 0)] * (k.ndim - 1) + [(0, self.value_first - self.head_dim)]
        return jnp.concatenate([jnp.pad(k, half), jnp.pad(v, half)], axis=-1)


@dataclass(frozen=True)
class SideBySide:
    """`[pages, kv_heads, page_size, lanes]`: a token's key and then its value in the lanes of one row.

    A page is one run of bytes, and a head's page is what a matrix product takes. The last axis fills whole
    registers and the one before has at least 8 rows: such an array a kernel updates in place, while around
    one with 64 lanes, or one row, XLA puts two copies of the pool.
    """

    heads_axis: int = 1

    def array(self, geometry: PageGeometry) -> jax.ShapeDtypeStruct:
        """See `PageLayout`."""
        lanes = Lanes(geometry.head_dim).row
        shape = (geometry.num_pages, geometry.kv_heads, geometry.page_size, lanes)
        return jax.ShapeDtypeStruct(shape, geometry.dtype)

    def read(self, array: Array, kv_heads: int, head_dim: int) -> PageGeometry | None:
        """See `PageLayout`."""
        if array.ndim != 4 or (array.shape[1], array.shape[3]) != (kv_heads, Lanes(head_dim).row):
            return None
        return PageGeometry(array.shape[0], array.shape[2], kv_heads, head_dim, jnp.dtype(array.dtype))

    def pack(self, pages: LogicalPages) -> Array:
        """See `PageLayout`."""
        return Lanes(pages.shape[3]).join(pages[:, :, 0::2], pages[:, :, 1::2]).swapaxes(1, 2)

    def unpack(self, array: Array, kv_heads: int, head_dim: int) -> LogicalPages:
        """See `PageLayout`."""
        first = Lanes(head_dim).value_first
        halves = [array[..., :head_dim], array[..., first : first + head_dim]]
        pages, heads, size, _ = array.shape
        return jnp.stack(halves, axis=2).transpose(0, 3, 1, 2, 4).reshape(pages, size, 2 * heads, head_dim)


SIDE_BY_SIDE = SideBySide()


def rows_per_token(heads: int, lanes: int) -> int:
    """Rows of 128 lanes that hold one token's heads, rounded up so that tokens begin at whole registers."""
    return -(-heads * lanes // (LANES * SUBLANES)) * SUBLANES


def to_rows(
    x: Shaped[Array, "tokens heads lanes"], before: int, after: int
) -> Shaped[Array, "tokens*rows 128"]:
    """Each token's heads as rows of 128 lanes, with so many tokens of zeros before and after.

    In such an array of 32 bits a token begins at a whole register, so any run of tokens can be copied, and
    one head of many tokens is a load with a stride.
    """
    tokens, heads, lanes = x.shape
    used = heads * lanes // LANES
    padding = rows_per_token(heads, lanes) - used
    x = jnp.pad(x.reshape(tokens, used, LANES), ((before, after), (0, padding), (0, 0)))
    return x.reshape(-1, LANES)


def query_rows(
    q: Float[Array, "tokens heads dim"], scale: Float[Array, " heads"] | float, after: int
) -> Float[Array, "tokens*rows 128"]:
    """Queries times `scale` as the kernel takes them, with `after` tokens of zeros behind them."""
    scale = jnp.asarray(scale, jnp.float32)
    scaled = q.astype(jnp.float32) * (scale[:, None] if scale.ndim else scale)
    padding = Lanes(q.shape[2]).operand - q.shape[2]
    return to_rows(jnp.pad(scaled, ((0, 0), (0, 0), (0, padding))), 0, after)


def output_of_rows(
    rows: Float[Array, "tokens*rows 128"], tokens: int, heads: int, head_dim: int
) -> Float[Array, "tokens heads dim"]:
    """What the kernel computed for the first `tokens` tokens."""
    lanes = Lanes(head_dim)
    used = heads * lanes.operand // LANES
    per_token = rows_per_token(heads, lanes.operand)
    x = rows.reshape(-1, per_token, LANES)[:tokens, :used].reshape(tokens, heads, lanes.operand)
    first = lanes.value_first if lanes.shared else 0
    return x[..., first : first + head_dim]


def new_rows(
    k: Shaped[Array, "tokens kv_heads dim"], v: Shaped[Array, "tokens kv_heads dim"], around: int
) -> Int32[Array, "tokens*rows 128"]:
    """Keys and values as pages hold them, each number's bits as often as they fit into 32.

    So a kernel puts a number at any row of a packed register by masking, whatever its dtype.

    Args:
        around: so many tokens of zeros before and behind.
    """
    joined = Lanes(k.shape[2]).join(k, v)
    bits = jnp.dtype(f"uint{8 * joined.dtype.itemsize}")
    times = sum(1 << (8 * bits.itemsize * i) for i in range(4 // bits.itemsize))
    words = lax.bitcast_convert_type(joined, bits).astype(jnp.uint32) * jnp.uint32(times)
    return to_rows(lax.bitcast_convert_type(words, jnp.int32), around, around)
