"""Products with weights of 8 or 4 bits."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import current_device
from pallas_kernels.quant_matmul.activations import Activation, quantize_rows
from pallas_kernels.quant_matmul.backend import Backend, QuantMatmulFunction
from pallas_kernels.quant_matmul.backends import (
    Kernel,
    as_backend,
    choose_backend,
    list_backends,
    register_backend,
)
from pallas_kernels.quant_matmul.check import check
from pallas_kernels.quant_matmul.problem import Problem
from pallas_kernels.quant_matmul.weight import Kind, QuantizedWeight, pack, quantize, unpack

__all__ = [
    "Activation",
    "Backend",
    "Kernel",
    "Kind",
    "Problem",
    "QuantMatmulFunction",
    "QuantizedWeight",
    "as_backend",
    "check",
    "choose_backend",
    "list_backends",
    "pack",
    "quant_matmul",
    "quantize",
    "quantize_rows",
    "register_backend",
    "unpack",
]


@jax.named_scope("quant_matmul")
def quant_matmul(
    x: Float[Array, "tokens in"],
    weight: QuantizedWeight,
    *,
    activation: Activation = "none",
    out_dtype: DTypeLike = jnp.float32,
    backend: Kernel = "auto",
) -> Float[Array, "tokens out"]:
    """`x @ weight`, summed in float32.

    Args:
        activation: "none" multiplies with `x` as it is; "int8" and "fp8" round each token first, with a scale
            for each block of inputs that the weight has, and need a weight of the same kind.

    Raises:
        ValueError: there is no such backend, the sizes do not go together, or `activation` does not go with
            the weight.
        NotImplementedError: the backend does not serve this call; the message says what.
    """
    inputs, outputs = weight.shape
    if x.shape[1] != inputs:
        raise ValueError(f"x{list(x.shape)}: the weight has {inputs} inputs")
    if activation not in ("none", weight.kind) or activation == "int4":
        raise ValueError(f"activation={activation!r}: goes with a weight of that kind, not {weight.kind!r}")
    if weight.zero is not None and weight.kind != "int4":
        raise ValueError(f"a weight of kind {weight.kind!r} has no zero points")
    platform, device_kind = current_device()
    problem = Problem(
        platform=platform,
        device_kind=device_kind,
        tokens=x.shape[0],
        inputs=inputs,
        outputs=outputs,
        dtype=jnp.dtype(x.dtype),
        kind=weight.kind,
        scale_rows=weight.block[0],
        zero=weight.zero is not None,
        activation=activation,
    )
    chosen = choose_backend(backend, problem).backend
    return chosen.multiply(x, weight, activation=activation, out_dtype=out_dtype)
