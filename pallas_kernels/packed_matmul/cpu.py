"""Products with a packed weight on CPU: a kernel in C++ that XLA calls, built when it is first needed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.native import BuildError, Library, Source
from pallas_kernels.packed_matmul.backend import Backend
from pallas_kernels.packed_matmul.norm import Norm
from pallas_kernels.packed_matmul.panels import Gate, Panels
from pallas_kernels.packed_matmul.problem import Problem

LIBRARY = Library(Source(Path(__file__).with_name("cpu.cc")), handlers=("PackedMatmul",))

GATES: tuple[Gate | None, ...] = (None, "silu", "gelu_tanh")
"""By the numbers that the source gives them."""
SERVED = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
"""Dtypes of rows and results."""


def require(problem: Problem) -> None:
    """Raises NotImplementedError for what the kernel does not serve, or where it cannot be built."""
    if problem.platform != "cpu":
        raise NotImplementedError(f"platform {problem.platform}: serves cpu")
    if (str(problem.dtype), str(problem.out_dtype)) not in SERVED:
        pairs = ", ".join(" to ".join(pair) for pair in SERVED)
        raise NotImplementedError(f"{problem.dtype} to {problem.out_dtype}: serves {pairs}")
    try:
        LIBRARY.targets()
    except BuildError as error:
        raise NotImplementedError(str(error)) from error


def packed_matmul_cpu(
    x: Float[Array, "rows in"],
    weight: Panels,
    /,
    *,
    outputs: int,
    gate: Gate | None,
    norm: Norm | None,
    residual: Float[Array, "rows out"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "rows out"]:
    """See `packed_matmul`. A row's result is the same to the last bit whatever other rows there are."""
    rows, inputs = x.shape
    as_they_are = norm is None and inputs * x.dtype.itemsize == weight.shape[1] * 4
    prepared = 0 if as_they_are else rows * weight.shape[1]  # room for the rows as the kernel reads them
    shapes = (jax.ShapeDtypeStruct((rows, outputs), out_dtype), jax.ShapeDtypeStruct((prepared,), jnp.uint32))
    multiply = jax.ffi.ffi_call(LIBRARY.targets()["PackedMatmul"], shapes)
    out, _ = multiply(
        x,
        weight,
        jnp.zeros(0, x.dtype) if norm is None else norm.weight,
        jnp.zeros(0, out_dtype) if residual is None else residual,
        gate=np.int64(GATES.index(gate)),
        epsilon=np.float32(0.0 if norm is None else norm.epsilon),
        offset=np.float32(0.0 if norm is None else norm.offset),
    )
    return out


BACKEND = Backend("cpu", packed_matmul_cpu, require, prepare=LIBRARY.prepare)
