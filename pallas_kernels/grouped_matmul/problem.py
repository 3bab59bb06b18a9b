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

    @property
    def tuning_key(self) -> dict[str, str | int]:
        """What decides which blocks are good: sizes, and rows of a group on average as a power of two."""
        return {
            "rows": 1 << (-(-self.tokens // self.groups) - 1).bit_length(),
            "groups": self.groups,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "weights": self.weight_dtype.name,
        }
