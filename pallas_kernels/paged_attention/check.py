"""Holds a backend, or any function in its form, to the op's cases."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.check import run_cases
from pallas_kernels.paged_attention.backend import AttentionFunction, Backend
from pallas_kernels.paged_attention.backends import REGISTRY, Kernel, as_backend
from pallas_kernels.paged_attention.cases import CORNERS, Arrays, Case, Definition, attend, build
from pallas_kernels.paged_attention.layout import INTERLEAVED, PageGeometry, PageLayout
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.report import Report


def check(
    kernel: Kernel,
    *,
    layout: PageLayout = INTERLEAVED,
    cases: Mapping[str, Case] = CORNERS,
    definition: Definition = attend,
    interpret: bool = False,
) -> Report:
    """Runs the op's cases on a kernel and compares outputs and pages with the definition in float64.

    Args:
        kernel: a registered backend's name, a backend, or a function in the form of `AttentionFunction`.
        layout: how the pages of a function are packed; a backend has its own.
        definition: what one token's attention is, for variants of the op.
        interpret: run the kernel's interpreted form on the CPU.

    Returns:
        What became of each case. A case is refused where the kernel raises NotImplementedError.

    Raises:
        ValueError: there is no such backend, or it has no interpreted form.
    """
    backend = as_backend(kernel)
    if not isinstance(kernel, str | Backend):
        backend = Backend(backend.name, backend.attend, layout)

    def check_one(case: Case, function: AttentionFunction) -> None:
        check_case(case, backend, function, definition)

    def problem_here(case: Case, platform: str, device_kind: str) -> Problem:
        where = (backend.platform or platform, "") if interpret else (platform, device_kind)
        return problem_of(case, *where)

    return run_cases(REGISTRY, backend, cases, check_one, problem_here, interpret=interpret)


def check_case(
    case: Case, backend: Backend, function: AttentionFunction, definition: Definition = attend
) -> None:
    """Runs one case on a function that works on the backend's packing of pages.

    Raises:
        AssertionError: the output or the pages are not what they should be; the message says where.
        NotImplementedError: the function does not serve the case.
    """
    arrays = build(case, definition)
    out, pages = run_case(case, arrays, backend, function)
    limit = case.tolerance * max(1e-30, np.abs(arrays.out).max(initial=0.0))
    error = np.abs(np.asarray(out, np.float64) - arrays.out)
    if not (error <= limit).all():  # NaN is not
        token, head, _ = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        raise AssertionError(
            f"output of token {token}, head {head} is off by {error.max():.3g}, allowed are {limit:.3g}"
        )
    different = _bits(pages) != _bits(arrays.pages_after)
    if different.any():
        page, slot, *_ = np.unravel_index(np.argmax(different), different.shape)
        raise AssertionError(f"page {page}, slot {slot} is not what it should be after the step")


def run_case(
    case: Case, arrays: Arrays, backend: Backend, function: AttentionFunction
) -> tuple[np.ndarray, np.ndarray]:
    """The function's output, and the pages after it in the op's own packing."""
    as_array = partial(jax.tree.map, jnp.asarray)
    step = jax.jit(
        partial(function, scale=case.scale, sliding_window=case.sliding_window, soft_cap=case.soft_cap),
        donate_argnums=3,
    )
    out, pages = step(
        *as_array((arrays.q, arrays.k, arrays.v)),
        jnp.array(backend.layout.pack(jnp.asarray(arrays.pages))),
        arrays.batch,
        sinks=as_array(arrays.sinks),
        k_scale=as_array(arrays.k_scale),
        v_scale=as_array(arrays.v_scale),
    )
    return np.asarray(out), np.asarray(backend.layout.unpack(pages, case.kv_heads, case.head_dim))


def problem_of(case: Case, platform: str, device_kind: str) -> Problem:
    """The case as what a backend's `require` looks at."""
    geometry = PageGeometry(
        0,
        case.page_size,
        case.kv_heads,
        case.head_dim,
        jnp.dtype(case.page_dtype or case.dtype),
        shared=case.value_dim is not None,
    )
    return Problem(
        platform,
        device_kind,
        case.heads,
        geometry,
        jnp.dtype(case.dtype),
        case.sliding_window,
        case.soft_cap,
        case.sinks,
    )


def _bits(x: np.ndarray) -> np.ndarray:
    """The bytes of each number, so that NaN equals itself."""
    return np.ascontiguousarray(x)[..., None].view(np.uint8)
