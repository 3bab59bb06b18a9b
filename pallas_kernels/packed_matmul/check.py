"""Holds a backend, or any function in its form, to the op's cases."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.check import compare_products, run_cases
from pallas_kernels.packed_matmul.backend import PackedMatmulFunction
from pallas_kernels.packed_matmul.backends import REGISTRY, Kernel
from pallas_kernels.packed_matmul.cases import CORNERS, EPSILON, OFFSET, Case, build
from pallas_kernels.packed_matmul.norm import Norm
from pallas_kernels.packed_matmul.panels import pack, pack_gated
from pallas_kernels.packed_matmul.problem import Problem
from pallas_kernels.report import Report


def check(kernel: Kernel, *, cases: Mapping[str, Case] = CORNERS, interpret: bool = False) -> Report:
    """Runs the op's cases on a kernel and compares with products in float64.

    Args:
        kernel: a registered backend's name, a backend, or a function.
        interpret: run the kernel's interpreted form on the CPU.

    Returns:
        What became of each case. A case is refused where the kernel raises NotImplementedError.

    Raises:
        ValueError: there is no such backend, or it has no interpreted form.
    """
    return run_cases(REGISTRY, kernel, cases, check_case, problem_of, interpret=interpret)


def check_case(case: Case, function: PackedMatmulFunction) -> None:
    """Runs one case.

    Raises:
        AssertionError: the output is not what it should be; the message says where.
        NotImplementedError: the function does not serve the case.
    """
    arrays = build(case)
    weight, residual = arrays.norm_weight, arrays.residual
    options = {
        "outputs": case.outputs,
        "gate": case.gate,
        "norm": None if weight is None else Norm(jnp.asarray(weight), EPSILON, OFFSET),
        "residual": None if residual is None else jnp.asarray(residual),
        "out_dtype": jnp.dtype(case.out_dtype),
    }
    panels = (pack if case.gate is None else pack_gated)(jnp.asarray(arrays.weight))
    out = jax.jit(partial(function, **options))(jnp.asarray(arrays.x), panels)
    compare_products(out, arrays.out, case.out_dtype, case.tolerance)


def problem_of(case: Case, platform: str, device_kind: str) -> Problem:
    """The case as what a backend's `require` looks at."""
    return Problem(
        platform,
        device_kind,
        case.rows,
        case.inputs,
        case.outputs,
        jnp.dtype(case.dtype),
        jnp.dtype(case.out_dtype),
    )
