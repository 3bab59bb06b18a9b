"""How parameters are made: a shape, the names of its axes, and how it begins."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxllm.parallel import Axes

Initializer = Callable[[Array, Sequence[int], Any], Array]
"""`(key, shape, dtype) -> array`."""

normal: Initializer = nnx.initializers.normal(0.02)
ones: Initializer = nnx.initializers.ones
zeros: Initializer = nnx.initializers.zeros


def parameter(
    shape: Sequence[int], axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs, initializer: Initializer = normal
) -> nnx.Param[Array]:
    """A parameter whose metadata carry `axes` (the logical axes' names) and `initializer`.

    Raises:
        ValueError: not one name for each axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes={axes!r}: must name each of the {len(shape)} axes of shape {tuple(shape)}")
    return nnx.Param(initializer(rngs.params(), shape, dtype), axes=axes, initializer=initializer)
