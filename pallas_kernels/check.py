"""Holds backends to cases: what the ops' own `check` have in common."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.registry import BackendT, Problem, Registry, function_of
from pallas_kernels.report import Outcome, Report

CaseT = TypeVar("CaseT")


def run_cases(
    registry: Registry[BackendT],
    kernel: str | BackendT | Callable[..., Any],
    cases: Mapping[str, CaseT],
    check_case: Callable[[CaseT, Any], None],
    problem_of: Callable[[CaseT, str, str], Problem],
    *,
    interpret: bool,
) -> Report:
    """Runs an op's cases on a kernel.

    Args:
        registry: the op's.
        kernel: a registered backend's name, a backend, or a function.
        check_case: runs a case on a function; raises NotImplementedError where the function does not serve
            it, and anything else where the result is wrong.
        problem_of: the case as a problem, on a platform and a kind of device.
        interpret: run the kernel's interpreted form on the CPU.

    Raises:
        ValueError: there is no such backend, or it has no interpreted form.
    """
    backend = registry.as_backend(kernel)
    function = backend.interpreted if interpret else function_of(backend)
    if function is None:
        raise ValueError(f"backend {backend.name!r} has no interpreted form")
    device = jax.devices()[0]
    outcomes = []
    for name, case in cases.items():
        try:
            backend.require(problem_of(case, device.platform, device.device_kind))
            check_case(case, function)
        except NotImplementedError as error:
            outcomes.append(Outcome(name, "refused", str(error)))
        except Exception as error:  # whatever a kernel under test raises is its failure
            outcomes.append(Outcome(name, "failed", f"{type(error).__name__}: {error}"))
        else:
            outcomes.append(Outcome(name, "passed"))
    how = "interpreted" if interpret else f"run on {device.device_kind}"
    return Report(registry.op, backend.name, how, tuple(outcomes))


def compare_products(
    out: Float[Array, "rows out"],
    wanted: Float[np.ndarray, "rows out"],
    dtype: DTypeLike,
    tolerance: float,
) -> None:
    """Compares products with those in float64.

    Args:
        dtype: what the products are to be of.
        tolerance: how far one may be off, relative to the largest.

    Raises:
        AssertionError: they are not what they should be; the message says where.
    """
    if (out.shape, out.dtype) != (wanted.shape, jnp.dtype(dtype)):
        raise AssertionError(f"the output is {out.dtype}{list(out.shape)}")
    limit = tolerance * np.abs(wanted).max(initial=0.0)
    error = np.abs(np.asarray(out, np.float64) - wanted)
    if not (error <= limit).all():  # NaN is not
        row, column = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        raise AssertionError(
            f"row {row}, column {column} is off by {error[row, column]:.3g}, allowed are {limit:.3g}"
        )
