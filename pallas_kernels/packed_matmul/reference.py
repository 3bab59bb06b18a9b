"""The product with a packed weight written to be read: the definition that every other backend is held to."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.packed_matmul.backend import Backend
from pallas_kernels.packed_matmul.panels import Panels, unpack


def packed_matmul_reference(
    x: Float[Array, "rows in"], weight: Panels, /, *, outputs: int, out_dtype: DTypeLike
) -> Float[Array, "rows out"]:
    """See `packed_matmul`: the weight is unpacked, and the product is XLA's."""
    plain = unpack(weight, x.shape[1], outputs).astype(jnp.float32)
    return jnp.dot(x.astype(jnp.float32), plain, precision=lax.Precision.HIGHEST).astype(out_dtype)


BACKEND = Backend("reference", packed_matmul_reference)
