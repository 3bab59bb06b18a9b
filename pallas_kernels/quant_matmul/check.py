"""Holds a backend, or any function in its form, to the op's cases."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.check import compare_products, run_cases
from pallas_kernels.quant_matmul.backend import QuantMatmulFunction
from pallas_kernels.quant_matmul.backends import REGISTRY, Kernel
from pallas_kernels.quant_matmul.cases import CORNERS, Case, build
from pallas_kernels.quant_matmul.problem import Problem
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


def check_case(case: Case, function: QuantMatmulFunction) -> None:
    """Runs one case.

    Raises:
        AssertionError: the output is not what it should be; the message says where.
        NotImplementedError: the function does not serve the case.
    """
    arrays = build(case)
    multiply = jax.jit(partial(function, activation=case.activation, out_dtype=jnp.dtype(case.out_dtype)))
    out = multiply(jnp.asarray(arrays.x), arrays.weight)
    compare_products(out, arrays.out, case.out_dtype, case.tolerance)


def problem_of(case: Case, platform: str, device_kind: str) -> Problem:
    """The case as what a backend's `require` looks at."""
    return Problem(
        platform,
        device_kind,
        case.tokens,
        case.inputs,
        case.outputs,
        jnp.dtype(case.dtype),
        case.kind,
        case.block[0] if case.block else case.inputs,
        case.zero,
        case.activation,
    )
