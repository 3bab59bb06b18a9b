"""The cases that every backend is held to: fixed corners."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels.quant_matmul.activations import Activation
from pallas_kernels.quant_matmul.weight import Kind, QuantizedWeight, quantize


@dataclass(frozen=True)
class Case:
    """A product; `block` as in `QuantizedWeight`, None: a scale per output channel."""

    kind: Kind
    tokens: int = 5
    inputs: int = 256
    outputs: int = 256
    block: tuple[int, int] | None = None
    zero: bool = False
    activation: Activation = "none"
    dtype: str = "float32"
    out_dtype: str = "float32"
    seed: int = 0

    @property
    def tolerance(self) -> float:
        """Relative to the largest magnitude of the expected output."""
        return 1e-5 if "bfloat16" not in (self.dtype, self.out_dtype) else 1e-2


_GROUPS = {"32": (32, 1), "64": (64, 1), "128": (128, 1)}
_FLOAT32 = {
    "int8": Case("int8"),
    "int8, one token": Case("int8", tokens=1),
    "int8, a scale for all": Case("int8", block=(256, 256)),
    "int8, many tokens and columns": Case("int8", tokens=300, inputs=2048, outputs=640),
    "int8, sizes of no tile": Case("int8", tokens=37, inputs=200, outputs=200),
    "int8, groups of 128": Case("int8", block=(128, 1)),
    "fp8": Case("fp8"),
    "fp8, a scale for all": Case("fp8", block=(256, 256)),
    "fp8, blocks": Case("fp8", block=(128, 128), inputs=1280),
    "fp8, blocks cut short": Case("fp8", block=(128, 128), outputs=200),
    "int4, a scale per channel": Case("int4"),
    "int4, many tokens and columns": Case("int4", tokens=300, inputs=2048, outputs=640, block=(128, 1)),
    **{f"int4, groups of {name}": Case("int4", block=block) for name, block in _GROUPS.items()},
    **{
        f"int4, groups of {name}, zeros": Case("int4", block=block, zero=True)
        for name, block in _GROUPS.items()
    },
}
_LOW = {
    f"{name}, bfloat16": replace(_FLOAT32[name], dtype="bfloat16")
    for name in ("int8", "int8, many tokens and columns", "fp8", "fp8, blocks", "int4, groups of 32, zeros")
}
_ACTIVATIONS = {
    "int8 by int8": Case("int8", activation="int8", inputs=2048),
    "int8 by int8, bfloat16": Case("int8", activation="int8", dtype="bfloat16", out_dtype="bfloat16"),
    "int8 by int8, a scale for all": Case("int8", activation="int8", block=(256, 256)),
    "fp8 by fp8": Case("fp8", activation="fp8"),
    "fp8 by fp8, blocks": Case("fp8", activation="fp8", block=(128, 128)),
    "fp8 by fp8, bfloat16": Case("fp8", activation="fp8", dtype="bfloat16"),
}
CORNERS = _FLOAT32 | _LOW | _ACTIVATIONS


@dataclass(frozen=True)
class Arrays:
    """A case's inputs, and what must come out, in float64."""

    x: Float[np.ndarray, "tokens in"]
    weight: QuantizedWeight
    out: Float[np.ndarray, "tokens out"]


def build(case: Case) -> Arrays:
    """Draws the case's numbers and computes its result from what is stored of them."""
    rng = np.random.default_rng(case.seed)
    x = rng.normal(size=(case.tokens, case.inputs)).astype(jnp.dtype(case.dtype))
    x[-1] = 0  # a row whose scale must not be 0
    weight = quantize(jnp.asarray(rng.normal(size=(case.inputs, case.outputs))), case.kind, case.block)
    if case.zero:
        zero = rng.integers(-8, 9, size=weight.scale.shape)
        weight = replace(weight, zero=jnp.asarray(zero, jnp.int8))
    left = _rounded(x.astype(np.float32), case, weight.block[0])
    return Arrays(x, weight, left @ _matrix(weight))


def _matrix(weight: QuantizedWeight) -> Float[np.ndarray, "in out"]:
    """The definition, element by element, in float64."""
    values = np.asarray(weight.values)
    if weight.kind == "int4":
        low = (values.view(np.uint8) & 15).astype(int)
        high = (values.view(np.uint8) >> 4).astype(int)
        values = np.stack([low, high], axis=1).reshape(weight.shape)
        values = np.where(values > 7, values - 16, values)
    row, column = np.indices(weight.shape)
    block = row // weight.block[0], column // weight.block[1]
    zero = 0 if weight.zero is None else np.asarray(weight.zero, np.float64)[block]
    return (values.astype(np.float64) - zero) * np.asarray(weight.scale, np.float64)[block]


def _rounded(x: Float[np.ndarray, "tokens in"], case: Case, rows: int) -> Float[np.ndarray, "tokens in"]:
    """What the product sees of the tokens, in float64; the rounding itself is defined in float32."""
    out = x.astype(np.float64)
    if case.activation == "none":
        return out
    for first in range(0, case.inputs, rows):
        part = x[:, first : first + rows]
        largest = np.abs(part).max(axis=1, keepdims=True)
        limit = np.float32(127 if case.activation == "int8" else 448)
        scale = np.where(largest > 0, largest / limit, np.float32(1))
        values = part / scale
        values = np.round(values) if case.activation == "int8" else values.astype(jnp.float8_e4m3fn)
        out[:, first : first + rows] = values.astype(np.float64) * scale
    return out
