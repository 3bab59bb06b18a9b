"""Holds a backend, or any function in its form, to the op's cases."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.check import compare_products, run_cases
from pallas_kernels.grouped_matmul.backend import GroupedMatmulFunction
from pallas_kernels.grouped_matmul.backends import REGISTRY, Kernel
from pallas_kernels.grouped_matmul.cases import CORNERS, Case, build
from pallas_kernels.grouped_matmul.problem import Problem
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


def check_case(case: Case, function: GroupedMatmulFunction) -> None:
    """Runs one case.

    Raises:
        AssertionError: the output is not what it should be; the message says where.
        NotImplementedError: the function does not serve the case.
    """
    arrays = build(case)
    multiply = jax.jit(partial(function, out_dtype=jnp.dtype(case.out_dtype)))
    out = multiply(jnp.asarray(arrays.x), jnp.asarray(arrays.weights), jnp.asarray(arrays.group_sizes))
    compare_products(out, arrays.out, case.out_dtype, case.tolerance)


def problem_of(case: Case, platform: str, device_kind: str) -> Problem:
    """The case as what a backend's `require` looks at."""
    return Problem(
        platform,
        device_kind,
        case.tokens,
        len(case.sizes),
        case.inputs,
        case.outputs,
        jnp.dtype(case.dtype),
        jnp.dtype(case.stored_dtype),
        jnp.dtype(case.out_dtype),
    )
