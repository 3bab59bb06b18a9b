"""Rows of pages as 32-bit words: numbers of 16 and 8 bits share a word with those of the rows below.

So a row is put into a page by masking words, bit by bit and whatever the dtype, where a copy of a single row
cannot be expressed.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped


def rows_in_word(dtype: jnp.dtype) -> int:
    """How many rows' numbers share a word."""
    return 4 // dtype.itemsize


def to_words(x: Shaped[Array, "rows lanes"]) -> Int32[Array, "words lanes"]:
    """The bits of rows."""
    return x if x.dtype == jnp.int32 else pltpu.bitcast(x, jnp.int32)


def from_words(words: Int32[Array, "words lanes"], dtype: jnp.dtype) -> Shaped[Array, "rows lanes"]:
    """The inverse of `to_words`."""
    return pltpu.bitcast(words, dtype)


def bits_of_row(row: int, dtype: jnp.dtype) -> np.int32:
    """The part of a word that belongs to its `row`-th row."""
    bits = 8 * dtype.itemsize
    return np.int32(np.uint32(((1 << bits) - 1) << (bits * row)).view(np.int32))


def mask_rows(
    first: Array | int, end: Array | int, shape: tuple[int, int], dtype: jnp.dtype
) -> Int32[Array, "words lanes"]:
    """All bits of the rows from `first` up to `end` in words of this shape, none of the others."""
    per_word = rows_in_word(dtype)
    top = per_word * lax.broadcasted_iota(jnp.int32, shape, 0)
    mask = jnp.zeros(shape, jnp.int32)
    for i in range(per_word):
        inside = (top + i >= first) & (top + i < end)
        mask |= jnp.where(inside, bits_of_row(i, dtype), 0)
    return mask
