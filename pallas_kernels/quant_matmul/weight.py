"""Weights of 8 or 4 bits with their scales."""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Shaped

Kind = Literal["int8", "int4", "fp8"]
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""The magnitude that `quantize` gives to the largest weight of a block."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix `[in, out]`: element (i, j) is `(value - zero) * scale[i // block[0], j // block[1]]`.

    A part of it that holds whole blocks, or is within one, is a QuantizedWeight too, so that a mesh can cut
    it along either axis: `values`, and `scale` and `zero` where they have several elements on that axis.

    Attributes:
        values: int8 or float8_e4m3fn `[in, out]`. int4: int8 `[in / 2, out]`, row r holding row 2r in its low
            and row 2r + 1 in its high four bits, both in two's complement: the bytes, one after the other, of
            GPTQ's int32 once `value ^ 8` has made them signed.
        scale: one number for each block of `in` and block of `out`.
        zero: of int4 only, between -8 and 8 and of the shape of `scale`; None: 0.
        block: rows and columns that share a scale. `(in, 1)` is a scale per output channel, `(in, out)` one
            for the whole, `(128, 1)` groups of 128, `(128, 128)` DeepSeek's blocks.
    """

    values: Shaped[Array, "rows out"]
    scale: Float32[Array, "in_blocks out_blocks"]
    zero: Int8[Array, "in_blocks out_blocks"] | None = None
    kind: Kind = field(default="int8", metadata={"static": True})
    block: tuple[int, int] = field(default=(1, 1), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        rows, outputs = self.values.shape
        return (2 * rows if self.kind == "int4" else rows), outputs

    def scale_per_column(self) -> Float32[Array, "in_blocks out"]:
        """The scales, repeated for each column of their blocks."""
        return self._per_column(self.scale)

    def zero_per_column(self) -> Float32[Array, "in_blocks out"] | None:
        """The zero points, likewise, in float32."""
        return None if self.zero is None else self._per_column(self.zero.astype(jnp.float32))

    def dequantize(self) -> Float32[Array, "in out"]:
        """The matrix in float32."""
        values = unpack(self.values).astype(jnp.float32) if self.kind == "int4" else self.values
        values, zero = values.astype(jnp.float32), self.zero_per_column()
        if zero is not None:
            values -= self._per_row(zero)
        return values * self._per_row(self.scale_per_column())

    def _per_column(self, x: Array) -> Array:
        outputs = self.values.shape[1]
        if x.shape[1] in (1, outputs):
            return jnp.broadcast_to(x, (x.shape[0], outputs))
        return jnp.repeat(x, self.block[1], axis=1)[:, :outputs]

    def _per_row(self, x: Array) -> Array:
        return x if x.shape[0] == 1 else jnp.repeat(x, self.block[0], axis=0)[: self.shape[0]]


def quantize(
    weight: Float[Array, "in out"], kind: Kind, block: tuple[int, int] | None = None
) -> QuantizedWeight:
    """Rounds a matrix to the nearest values, with the largest of each block at the end of the range.

    Args:
        block: see `QuantizedWeight`; None: a scale per output channel.

    Raises:
        ValueError: there is no such kind, or an int4 weight or block has an odd number of rows.
    """
    if kind not in LARGEST:
        raise ValueError(f"kind={kind!r}: there are {', '.join(LARGEST)}")
    inputs, outputs = weight.shape
    rows, columns = block or (inputs, 1)
    if kind == "int4" and (inputs % 2 or rows % 2):
        raise ValueError(f"weight{list(weight.shape)} in blocks of {rows} rows: int4 needs even numbers")
    weight = weight.astype(jnp.float32)
    padded = jnp.pad(weight, ((0, -inputs % rows), (0, -outputs % columns)))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    largest = jnp.abs(blocks).max(axis=(1, 3))
    scale = jnp.where(largest > 0, largest / LARGEST[kind], 1.0)
    values = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:inputs, :outputs]
    stored = values.astype(jnp.float8_e4m3fn) if kind == "fp8" else jnp.round(values).astype(jnp.int8)
    if kind == "int4":
        stored = pack(stored)
    return QuantizedWeight(stored, scale, None, kind, (rows, columns))


def pack(values: Int8[Array, "in out"]) -> Int8[Array, "in/2 out"]:
    """Two rows between -8 and 7 to one of bytes, the even one in the low bits."""
    return (values[0::2] & 15) | (values[1::2] << 4)


def unpack(packed: Int8[Array, "rows out"]) -> Int8[Array, "2*rows out"]:
    """The inverse of `pack`."""
    low = lax.shift_right_arithmetic(packed << 4, jnp.int8(4))
    high = lax.shift_right_arithmetic(packed, jnp.int8(4))
    return jnp.stack([low, high], axis=1).reshape(2 * packed.shape[0], packed.shape[1])
