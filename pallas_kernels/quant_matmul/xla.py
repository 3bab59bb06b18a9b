"""The product with quantized weights in plain XLA.

On TPU and GPU the conversion is left to XLA. Compiled for a TPU, int8 and fp8 with a scale per channel become
part of the product, blocks of scales and int4 are written out in float32 first; compiled for an H100 every
weight is written out, in the tokens' dtype. XLA on CPU writes out all of them; there the matrix of
8-bit values is made and used in blocks of columns that stay in the cache.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.quant_matmul.activations import Activation, quantize_rows
from pallas_kernels.quant_matmul.backend import Backend
from pallas_kernels.quant_matmul.weight import QuantizedWeight

COLUMNS = 256
"""At most this many at once on CPU: of 4096 rows, 4 MiB in float32."""


def quant_matmul_xla(
    x: Float[Array, "tokens in"],
    weight: QuantizedWeight,
    /,
    *,
    activation: Activation,
    out_dtype: DTypeLike,
) -> Float[Array, "tokens out"]:
    """See `quant_matmul`."""
    if activation != "none":
        return _of_few_bits(x, weight, activation).astype(out_dtype)
    out = lax.platform_dependent(x, weight, cpu=_in_columns, default=_whole)
    return out.astype(out_dtype)


def _whole(x: Array, weight: QuantizedWeight) -> Float[Array, "tokens out"]:
    """One product; a scale for all rows is applied to its result."""
    if weight.scale.shape[0] > 1 or weight.zero is not None:
        return _dot(x, weight.dequantize().astype(x.dtype))
    scale = weight.scale_per_column()
    values = replace(weight, scale=jnp.ones((1, 1))).dequantize()
    return _dot(x, values.astype(x.dtype)) * scale


def _in_columns(x: Array, weight: QuantizedWeight) -> Float[Array, "tokens out"]:
    """Block by block of columns. Slices are of integers: XLA on CPU converts all of any other small type."""
    outputs = weight.shape[1]
    columns = next((n for n in range(COLUMNS, 31, -8) if outputs % n == 0), outputs)
    if columns == outputs or weight.kind == "int4":
        return _whole(
            x, weight
        )  # unpacked in a loop, 4 bits took 14 ms instead of 1.8 (8 tokens, [1024, 4096])
    values = weight.values
    bits = _to_bits(values)
    scale = weight.scale_per_column()
    zero = None if weight.zero is None else weight.zero_per_column()

    def multiply(first: Array) -> Array:
        def cut(matrix: Array) -> Array:
            return lax.dynamic_slice_in_dim(matrix, first, columns, axis=1)

        part = QuantizedWeight(
            lax.bitcast_convert_type(cut(bits), values.dtype),
            cut(scale),
            None if zero is None else cut(zero).astype(jnp.int8),
            weight.kind,
            (weight.block[0], 1),
        )
        return _whole(x, part)

    parts = lax.map(multiply, jnp.arange(0, outputs, columns))
    return parts.transpose(1, 0, 2).reshape(x.shape[0], outputs)


def _of_few_bits(x: Array, weight: QuantizedWeight, activation: Activation) -> Float[Array, "tokens out"]:
    """Products of the values, each block of inputs with its scales."""
    assert activation != "none"
    rows = min(weight.block[0], x.shape[1])
    values, scale = quantize_rows(x, activation, rows)
    weight_scale = weight.scale_per_column()
    result = jnp.int32 if activation == "int8" else jnp.float32

    def multiply(left: Array, right: Array) -> Float[Array, "tokens out"]:
        return lax.dot(left, right, preferred_element_type=result).astype(jnp.float32)

    if scale.shape[1] == 1:
        return multiply(values, weight.values) * scale * weight_scale
    pad = (0, -x.shape[1] % rows)
    left = jnp.pad(values, ((0, 0), pad)).reshape(x.shape[0], -1, rows).swapaxes(0, 1)
    right = jnp.pad(weight.values, (pad, (0, 0))).reshape(-1, rows, weight.shape[1])
    operands = (_to_bits(left), _to_bits(right), scale.T, weight_scale)

    def add(total: Array, block: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        left, right, per_token, per_column = block
        left, right = (lax.bitcast_convert_type(part, values.dtype) for part in (left, right))
        return total + multiply(left, right) * per_token[:, None] * per_column, None

    # a loop: 32 blocks one after the other took XLA 55 s to compile for a TPU
    start = jnp.zeros_like(x[:, :1] * weight_scale[:1], jnp.float32)
    return lax.scan(add, start, operands)[0]


def _to_bits(values: Array) -> Array:
    return values if values.dtype == jnp.int8 else lax.bitcast_convert_type(values, jnp.int8)


def _dot(x: Array, values: Array) -> Float[Array, "tokens out"]:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot(x, values, precision=precision, preferred_element_type=jnp.float32)


BACKEND = Backend("xla", quant_matmul_xla)
