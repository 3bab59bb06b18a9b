"""Products of rows with a weight that was packed beforehand for the processor that reads it."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.packed_matmul.backend import Backend, PackedMatmulFunction
from pallas_kernels.packed_matmul.backends import (
    Kernel,
    as_backend,
    choose_backend,
    list_backends,
    register_backend,
)
from pallas_kernels.packed_matmul.check import check
from pallas_kernels.packed_matmul.panels import (
    Gate,
    Panels,
    pack,
    pack_gated,
    packed_shape,
    take_outputs,
    unpack,
)
from pallas_kernels.packed_matmul.problem import Problem

__all__ = [
    "Backend",
    "Gate",
    "Kernel",
    "PackedMatmulFunction",
    "Panels",
    "Problem",
    "as_backend",
    "check",
    "choose_backend",
    "list_backends",
    "pack",
    "pack_gated",
    "packed_matmul",
    "packed_shape",
    "register_backend",
    "take_outputs",
    "unpack",
]


@jax.named_scope("packed_matmul")
def packed_matmul(
    x: Float[Array, "rows in"],
    weight: Panels,
    *,
    outputs: int,
    gate: Gate | None = None,
    out_dtype: DTypeLike = jnp.float32,
    backend: Kernel = "auto",
) -> Float[Array, "rows out"]:
    """Multiplies rows with a weight. Sums in float32 and rounds once.

    Args:
        weight: `pack(weight)` of a weight `[in, out]` of the rows' dtype.
        outputs: how many of the panels' outputs there are; the last panel may be padded.
        gate: the weight is from `pack_gated`, and the result is `gate(x @ first) * (x @ second)`.

    Raises:
        ValueError: there is no such backend, or the shapes do not go together.
        NotImplementedError: the backend does not serve this call; the message says what.
    """
    wanted = packed_shape(x.shape[1], outputs, x.dtype, gated=gate is not None)
    if (weight.shape, weight.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(
            f"weight {weight.dtype}{list(weight.shape)}: for {x.shape[1]} inputs of {x.dtype} and {outputs} "
            f"outputs it is to be {wanted.dtype}{list(wanted.shape)}"
        )
    device = jax.devices()[0]
    problem = Problem(
        platform=device.platform,
        device_kind=device.device_kind,
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=outputs,
        dtype=jnp.dtype(x.dtype),
        out_dtype=jnp.dtype(out_dtype),
    )
    multiply = choose_backend(backend, problem).backend.multiply
    return multiply(x, weight, outputs=outputs, gate=gate, out_dtype=out_dtype)
