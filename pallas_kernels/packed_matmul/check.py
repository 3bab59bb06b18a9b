"""Holds a backend, or any function in its form, to the op's cases."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packed_matmul.backend import PackedMatmulFunction
from pallas_kernels.packed_matmul.backends import Kernel, as_backend
from pallas_kernels.packed_matmul.cases import CORNERS, Case, build
from pallas_kernels.packed_matmul.panels import pack, pack_gated
from pallas_kernels.packed_matmul.problem import Problem
from pallas_kernels.report import Outcome, Report


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
    backend = as_backend(kernel)
    if interpret and backend.interpreted is None:
        raise ValueError(f"backend {backend.name!r} has no interpreted form")
    function = backend.interpreted if interpret and backend.interpreted is not None else backend.multiply
    outcomes = []
    for name, case in cases.items():
        try:
            backend.require(problem_of(case, jax.default_backend(), jax.devices()[0].device_kind))
            check_case(case, function)
            outcomes.append(Outcome(name, "passed"))
        except NotImplementedError as error:
            outcomes.append(Outcome(name, "refused", str(error)))
        except Exception as error:  # whatever a kernel under test raises is its failure
            outcomes.append(Outcome(name, "failed", f"{type(error).__name__}: {error}"))
    how = "interpreted" if interpret else f"run on {jax.devices()[0].device_kind}"
    return Report("packed_matmul", backend.name, how, tuple(outcomes))


def check_case(case: Case, function: PackedMatmulFunction) -> None:
    """Runs one case.

    Raises:
        AssertionError: the output is not what it should be; the message says where.
        NotImplementedError: the function does not serve the case.
    """
    arrays = build(case)
    options = {"outputs": case.outputs, "gate": case.gate, "out_dtype": jnp.dtype(case.out_dtype)}
    panels = (pack if case.gate is None else pack_gated)(jnp.asarray(arrays.weight))
    out = jax.jit(partial(function, **options))(jnp.asarray(arrays.x), panels)
    if (out.shape, out.dtype) != (arrays.out.shape, jnp.dtype(case.out_dtype)):
        raise AssertionError(f"the output is {out.dtype}{list(out.shape)}")
    limit = case.tolerance * np.abs(arrays.out).max(initial=0.0)
    error = np.abs(np.asarray(out, np.float64) - arrays.out)
    if not (error <= limit).all():  # NaN is not
        row, column = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        raise AssertionError(
            f"row {row}, column {column} is off by {error[row, column]:.3g}, allowed are {limit:.3g}"
        )


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
