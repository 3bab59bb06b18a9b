"""The product with quantized weights written to be read: the definition that every backend is held to."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.quant_matmul.activations import Activation, quantize_rows
from pallas_kernels.quant_matmul.backend import Backend
from pallas_kernels.quant_matmul.weight import QuantizedWeight


def quant_matmul_reference(
    x: Float[Array, "tokens in"],
    weight: QuantizedWeight,
    /,
    *,
    activation: Activation,
    out_dtype: DTypeLike,
) -> Float[Array, "tokens out"]:
    """See `quant_matmul`: everything in float32."""
    x = x.astype(jnp.float32)
    if activation != "none":
        values, scale = quantize_rows(x, activation, weight.block[0])
        x = values.astype(jnp.float32) * jnp.repeat(scale, weight.block[0], axis=1)[:, : x.shape[1]]
    return jnp.dot(x, weight.dequantize(), precision=lax.Precision.HIGHEST).astype(out_dtype)


BACKEND = Backend("reference", quant_matmul_reference)
