"""The product with a packed weight written to be read: the definition that every other backend is held to."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.packed_matmul.backend import Backend
from pallas_kernels.packed_matmul.norm import Norm
from pallas_kernels.packed_matmul.panels import OUTPUTS, Gate, Panels, split_gated, unpack


def packed_matmul_reference(
    x: Float[Array, "rows in"],
    weight: Panels,
    /,
    *,
    outputs: int,
    gate: Gate | None,
    norm: Norm | None,
    residual: Float[Array, "rows out"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "rows out"]:
    """See `packed_matmul`: the weight is unpacked, and the product is XLA's."""
    columns = outputs if gate is None else len(weight) * OUTPUTS
    x = x if norm is None else norm(x)
    plain = unpack(weight, x.shape[1], columns).astype(jnp.float32)
    products = jnp.dot(x.astype(jnp.float32), plain, precision=lax.Precision.HIGHEST)
    if gate is not None:
        gates, others = split_gated(products, outputs)
        products = (jax.nn.silu if gate == "silu" else jax.nn.gelu)(gates) * others
    if residual is not None:
        products += residual.astype(jnp.float32)
    return products.astype(out_dtype)


BACKEND = Backend("reference", packed_matmul_reference)
