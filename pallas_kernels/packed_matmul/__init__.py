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
from pallas_kernels.packed_matmul.norm import Norm
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
    "Norm",
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
    norm: Norm | None = None,
    residual: Float[Array, "rows out"] | None = None,
    out_dtype: DTypeLike = jnp.float32,
    backend: Kernel = "auto",
) -> Float[Array, "rows out"]:
    """Multiplies rows with a weight. Sums in float32 and rounds once.

    Args:
        weight: `pack(weight)` of a weight `[in, out]` of the rows' dtype.
        outputs: how many of the panels' outputs there are; the last panel may be padded.
        gate: the weight is from `pack_gated`, and the result is `gate(x @ first) * (x @ second)`.
        norm: of the rows, before the product.
        residual: added to the result before it is rounded; of `out_dtype`.

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
    if norm is not None and (norm.weight.shape, norm.weight.dtype) != ((x.shape[1],), x.dtype):
        raise ValueError(
            f"norm.weight {norm.weight.dtype}{list(norm.weight.shape)}: it is to be {x.dtype}[{x.shape[1]}]"
        )
    like = (x.shape[0], outputs), jnp.dtype(out_dtype)
    if residual is not None and (residual.shape, residual.dtype) != like:
        raise ValueError(
            f"residual {residual.dtype}{list(residual.shape)}: it is to be {like[1]}{list(like[0])}"
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
    options = {"outputs": outputs, "gate": gate, "norm": norm, "residual": residual}
    return multiply(x, weight, out_dtype=out_dtype, **options)
