"""The norm of rows that a product may begin with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Norm(NamedTuple):
    """`x / sqrt(mean(x^2) + epsilon) * (offset + weight)` of each row (https://arxiv.org/abs/1910.07467).

    Attributes:
        weight: of the rows' dtype.
        offset: 1 where weights are kept as their difference from one.
    """

    weight: Float[Array, " in"]
    epsilon: float
    offset: float = 0.0

    def __call__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows in"]:
        """The rows normalized, computed in float32 and rounded once."""
        y = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale * (self.offset + self.weight.astype(jnp.float32))).astype(x.dtype)
