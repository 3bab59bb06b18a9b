"""What is static about a call of the op: what a backend looks at to say whether it serves it."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.quant_matmul.activations import Activation
from pallas_kernels.quant_matmul.weight import Kind

FEW_TOKENS = 64
"""Up to this many are few."""


@dataclass(frozen=True)
class Problem:
    """A product with a quantized weight on a kind of device.

    Attributes:
        platform: as in `jax.Device.platform`: "cpu", "gpu" or "tpu".
        device_kind: as in `jax.Device.device_kind`; empty where it is not known.
        tokens, inputs, outputs: sizes of the axes, on one device.
        dtype: of the tokens.
        kind: of the weight.
        scale_rows: inputs that share a scale; at least `inputs` where there is one for all.
        zero: whether there are zero points.
        activation: what the tokens are rounded to.
    """

    platform: str
    device_kind: str
    tokens: int
    inputs: int
    outputs: int
    dtype: jnp.dtype
    kind: Kind
    scale_rows: int
    zero: bool = False
    activation: Activation = "none"

    @property
    def phase(self) -> str:
        """Whether the weight takes the time ("few") or the products ("many"): blocks are tuned for each."""
        return "few" if self.tokens <= FEW_TOKENS else "many"

    @property
    def tuning_key(self) -> dict[str, str | int]:
        """What decides which blocks are good, beside the phase."""
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "kind": self.kind,
            "scale_rows": self.scale_rows,
        }
