"""How parameters are made: a shape, the names of its axes, and how it begins."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxllm.parallel import Axes

Initializer = Callable[[Array, tuple[int, ...], Any], Array]
"""`(key, shape, dtype) -> array`."""

ones: Initializer = nnx.initializers.ones
zeros: Initializer = nnx.initializers.zeros


@partial(jax.jit, static_argnums=(1, 2))
def noise(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Even noise with a deviation of 0.02, a hash of each element's place.

    For weights that stand in for real ones. `jax.random.normal` over four axes takes XLA on CPU 5 seconds to
    compile and is 15 times slower to run; this is cut over devices as easily. Jitted, so that it is traced
    once for each shape, and not for each layer.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    # The finalizer of https://github.com/skeeto/hash-prospector.
    bits = place + jax.random.bits(key)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    signed = jax.lax.bitcast_convert_type(bits ^ (bits >> 16), jnp.int32)
    return (signed.astype(jnp.float32) * (0.02 * 3**0.5 / 2**31)).astype(dtype)


def parameter(
    shape: Sequence[int], axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs, initializer: Initializer = noise
) -> nnx.Param[Array]:
    """A parameter whose metadata carry `axes` (the logical axes' names) and `initializer`.

    Raises:
        ValueError: not one name for each axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes={axes!r}: must name each of the {len(shape)} axes of shape {tuple(shape)}")
    return nnx.Param(initializer(rngs.params(), tuple(shape), dtype), axes=axes, initializer=initializer)
