"""What the kernels for NVIDIA's Hopper GPUs share: the hardware's limits, and whom they serve."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels._compat import cuda_version

NAMES = ("H100", "H200", "H800", "H20", "GH200")
"""In `jax.Device.device_kind`."""
ROWS = 64
"""Rows of a wgmma."""
SHARED_MEMORY = 232_448
"""Bytes that a thread block can have (CUDA C++ programming guide, compute capability 9.0)."""
RESERVED = 4096
"""Of those, left for barriers and reductions."""
MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM; on a card with fewer, some thread blocks wait for others."""
MISCOMPILES = range(12080, 12091)
"""CUDA 12.8.0 to 12.9.0, as CUDA counts: their ptxas miscompiles causal masks."""


def swizzle_bytes(row_bytes: int) -> int:
    """The widest swizzle whose rows fill a row of that many bytes; 0: none does."""
    return next((width for width in (128, 64, 32) if row_bytes % width == 0), 0)


def tiled(shape: tuple[int, ...], dtype: Any, most: int = 128) -> Any:
    """Shared memory in the tiles and swizzle, of `most` bytes, that wgmma and the copy engine agree on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    itemsize = jnp.dtype(dtype).itemsize
    width = min(most, swizzle_bytes(shape[-1] * itemsize))
    transforms = (plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def share_roles(
    warpgroups: int,
    registers: tuple[int, int] | None,
    bring: Callable[[], None],
    compute: Callable[[Array], None],
) -> None:
    """One warpgroup's part: the last of a thread block brings what those before it compute with.

    Args:
        warpgroups: that compute.
        registers: for each thread of the one that brings, and of the others; None: as they are.
        compute: is given the warpgroup's number, along the axis `warpgroup`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == warpgroups)
    def _() -> None:
        if registers is not None:
            plgpu.set_max_registers(registers[0], action="decrease")
        bring()

    @pl.when(warpgroup < warpgroups)
    def _() -> None:
        if registers is not None:
            plgpu.set_max_registers(registers[1], action="increase")
        compute(warpgroup)


def require_hopper(platform: str, device_kind: str) -> None:
    """Raises NotImplementedError, with the reason, for other cards and for compilers that are wrong."""
    if platform != "gpu" or not any(name in device_kind for name in NAMES):
        raise NotImplementedError(f"{device_kind or platform}: only Hopper GPUs are served")
    if (version := cuda_version()) in MISCOMPILES:
        raise NotImplementedError(f"CUDA {version}: ptxas of 12.8.0 to 12.9.0 miscompiles it; take 12.9.1")
