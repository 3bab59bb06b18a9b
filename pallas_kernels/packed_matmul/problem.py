"""What is static about a call of the op: what a backend looks at to say whether it serves it."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Problem:
    """A product with a packed weight on a kind of device.

    Attributes:
        platform: as in `jax.Device.platform`: "cpu", "gpu" or "tpu".
        device_kind: as in `jax.Device.device_kind`; empty where it is not known.
        rows, inputs, outputs: sizes of the axes.
        dtype: of the rows and of the weight.
        out_dtype: of the result.
    """

    platform: str
    device_kind: str
    rows: int
    inputs: int
    outputs: int
    dtype: jnp.dtype
    out_dtype: jnp.dtype
