"""What is static about a call of the op: what a backend looks at to say whether it serves it."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Problem:
    """A grouped product on a kind of device.

    Attributes:
        platform: as in `jax.Device.platform`: "cpu", "gpu" or "tpu".
        device_kind: as in `jax.Device.device_kind`; empty where it is not known.
        tokens, groups, inputs, outputs: sizes of the axes, on one device.
        dtype: of the tokens.
        weight_dtype: of the weights; bfloat16 for weights given as their bits.
        out_dtype: of the result.
    """

    platform: str
    device_kind: str
    tokens: int
    groups: int
    inputs: int
    outputs: int
    dtype: jnp.dtype
    weight_dtype: jnp.dtype
    out_dtype: jnp.dtype
