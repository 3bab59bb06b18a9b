"""Norms, computed in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layers.parameter import Initializer, ones, parameter, zeros
from jaxllm.parallel import Axes
from pallas_kernels import packed_matmul


@runtime_checkable
class Norm(Protocol):
    """What the two norms have in common."""

    def __call__(self, x: Float[Array, "... dims"]) -> Float[Array, "... dims"]: ...


@dataclass(frozen=True)
class NormOptions:
    """What sets one family's norms apart from another's.

    Attributes:
        epsilon: added to the mean square.
        zero_centered: weights are kept as their difference from one (Gemma).
    """

    epsilon: float
    zero_centered: bool = False


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight`, the mean taken over all axes of the weight.

    https://arxiv.org/abs/1910.07467. Over heads and their dimensions it is OLMo 2's norm of queries.

    Args:
        shape, axes: of the weight, which are the last of `x`'s.
    """

    def __init__(
        self, shape: Sequence[int], axes: Axes, options: NormOptions, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        start: Initializer = zeros if options.zero_centered else ones
        self.weight = parameter(shape, axes, dtype, rngs, start)
        self.options = options

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        weight = self.weight[...].astype(jnp.float32)
        if self.options.zero_centered:
            weight += 1.0
        y = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(y), axis=tuple(range(-weight.ndim, 0)), keepdims=True)
        return (y * jax.lax.rsqrt(square + self.options.epsilon) * weight).astype(x.dtype)

    def before_product(self) -> packed_matmul.Norm:
        """The same for a product with a packed weight that begins with it."""
        offset = float(self.options.zero_centered)
        return packed_matmul.Norm(self.weight[...], self.options.epsilon, offset)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + epsilon) * weight + bias` over the last axis (GPT-2)."""

    def __init__(self, size: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.weight = parameter((size,), ("embed",), dtype, rngs, ones)
        self.bias = parameter((size,), ("embed",), dtype, rngs, zeros)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        y = x.astype(jnp.float32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
