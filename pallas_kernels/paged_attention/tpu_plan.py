"""What is static about a call of the TPU kernels, and which of a row's keys a tile of queries sees."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.paged_attention.tpu_layout import LANES, SUBLANES, Lanes, rows_per_token

Scalar = Int32[Array, ""]


@dataclass(frozen=True)
class Blocks:
    """How much the attention kernel does at once; all are powers of two.

    Attributes:
        queries: tokens of a tile; with a block of keys they are one matrix product for each kv head. 1 for
            rows of one token.
        pages: pages copied at once.
        keys: keys of one product; a divisor of what the pages hold.
        slots: buffers of `pages` pages; all but one are filled while the last is read.
    """

    queries: int
    pages: int
    keys: int
    slots: int = 2


@dataclass(frozen=True)
class Plan:
    """One call of the attention kernel.

    Attributes:
        decode: the rows of one token, whose keys and values the kernel writes too; else the rows after them.
        dtype: of the pages.
        product: in which products take their operands; they are accumulated in float32.
    """

    decode: bool
    heads: int
    kv_heads: int
    lanes: Lanes
    page_size: int
    columns: int
    dtype: jnp.dtype
    product: jnp.dtype
    sliding_window: int | None
    soft_cap: float | None
    blocks: Blocks

    @property
    def group(self) -> int:
        """Query heads of each kv head."""
        return self.heads // self.kv_heads

    @property
    def folds(self) -> int:
        """Rows of 128 lanes of one query head."""
        return self.lanes.operand // LANES

    @property
    def new_folds(self) -> int:
        """Rows of 128 lanes of one kv head's key and value."""
        return self.lanes.row // LANES

    @property
    def query_rows(self) -> int:
        """Rows of 128 lanes of a token's queries."""
        return rows_per_token(self.heads, self.lanes.operand)

    @property
    def new_rows(self) -> int:
        """Rows of 128 lanes of a token's keys and values."""
        return rows_per_token(self.kv_heads, self.lanes.row)

    @property
    def matrix_rows(self) -> int:
        """Rows of a kv head's matrix of queries: its heads, and for each the tile's tokens."""
        return -(-self.group * self.blocks.queries // SUBLANES) * SUBLANES

    @property
    def tile_rows(self) -> int:
        """Rows of a page that are read and written together: 8, and 32 of 8 bits, which share registers."""
        return 32 if self.dtype.itemsize == 1 else SUBLANES

    @property
    def keys_in_block(self) -> int:
        """Keys copied at once."""
        return self.blocks.pages * self.page_size


class Span(NamedTuple):
    """What a tile of one row's queries sees."""

    first: Scalar
    """Position of the tile's first query."""
    low: Scalar
    """The first position that any of its queries sees."""
    end: Scalar
    """One past the last."""
    first_page: Scalar
    """The page of `low`, as a column of the row's table."""
    pages: Scalar
    """How many pages there are from it to `end`."""


def span(plan: Plan, start: Scalar, end: Scalar, kv_len: Scalar, tile: Scalar) -> Span:
    """The span of a tile of the row that owns the tokens from `start` to `end`."""
    first = kv_len - (end - start) + tile * plan.blocks.queries
    stop = jnp.minimum(first + plan.blocks.queries, kv_len)
    low = jnp.zeros_like(first)
    if plan.sliding_window is not None:
        low = jnp.maximum(first - plan.sliding_window + 1, 0)
    first_page = divide(low, plan.page_size)
    return Span(first, low, stop, first_page, divide_up(stop, plan.page_size) - first_page)


def divide(x: Scalar, power: int) -> Scalar:
    """`x // power` for a power of two, which the scalar unit has no division for."""
    return lax.shift_right_arithmetic(x, jnp.int32(power.bit_length() - 1))


def divide_up(x: Scalar, power: int) -> Scalar:
    """`x / power`, rounded up, for a power of two."""
    return divide(x + (power - 1), power)


def remainder(x: Scalar, power: int) -> Scalar:
    """`x % power` for a power of two."""
    return x & (power - 1)
