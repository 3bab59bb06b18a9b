"""Facts about the chips that programs can be compiled for without having them."""

from dataclasses import dataclass
from typing import Literal

GIB = 1024**3
MIB = 1024**2
KIB = 1024


@dataclass(frozen=True)
class Chip:
    """One accelerator, as its vendor describes it. Bytes, bytes a second, operations a second; all per chip.

    Attributes:
        device_kind: what jax calls it.
        hbm: the datasheet's memory.
        usable_hbm: what programs get of it: the limit that the TPU's compiler states when a program is too
            large, and on NVIDIA's the memory that the driver reports.
        bandwidth: of that memory.
        bf16, int8: dense matrix products, with a multiplication and an addition counted as two.
        interconnect: to other chips of the slice or host, both directions together.
        kernel_memory: what one kernel instance may use of the memory beside the cores: on TPU a core's VMEM,
            on NVIDIA a block's shared memory.
        scalar_memory: a TPU core's SMEM; none on NVIDIA.
        registers: 32-bit registers a thread may use; none on TPU.
        slices: the shapes in which the vendor offers it, smallest first.
        sources: pages that say so.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    device_kind: str
    hbm: int
    usable_hbm: int
    bandwidth: float
    bf16: float
    int8: float
    interconnect: float
    kernel_memory: int
    scalar_memory: int | None
    registers: int | None
    slices: tuple[str, ...]
    sources: tuple[str, ...]


_SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
          "16x16x16", "16x16x24")  # fmt: skip
_TPU_INFO = "https://github.com/jax-ml/jax/blob/jax-v0.10.2/jax/_src/pallas/mosaic/tpu_info.py"
"""VMEM and SMEM, which are in none of the datasheets."""

V5E = Chip(
    name="v5e",
    platform="tpu",
    device_kind="TPU v5 lite",
    hbm=16 * GIB,
    usable_hbm=16_911_433_728,  # 15.75 GiB
    bandwidth=819e9,
    bf16=197e12,
    int8=393e12,
    interconnect=400e9,
    kernel_memory=128 * MIB,
    scalar_memory=MIB,
    registers=None,
    slices=_SQUARE,
    sources=("https://cloud.google.com/tpu/docs/v5e", _TPU_INFO),
)
V6E = Chip(
    name="v6e",
    platform="tpu",
    device_kind="TPU v6 lite",
    hbm=32 * GIB,
    usable_hbm=33_554_432_000,  # 31.25 GiB
    bandwidth=1600e9,
    bf16=918e12,
    int8=1836e12,
    interconnect=800e9,
    kernel_memory=128 * MIB,
    scalar_memory=MIB,
    registers=None,
    slices=_SQUARE,
    sources=("https://cloud.google.com/tpu/docs/v6e", _TPU_INFO),
)
V5P = Chip(
    name="v5p",
    platform="tpu",
    device_kind="TPU v5",
    hbm=95 * GIB,
    usable_hbm=int(95.74 * GIB),
    bandwidth=2765e9,
    bf16=459e12,
    int8=918e12,
    interconnect=1200e9,
    kernel_memory=64 * MIB,
    scalar_memory=MIB,
    registers=None,
    slices=_CUBIC,
    sources=(
        "https://cloud.google.com/tpu/docs/v5p",
        "https://cloud.google.com/blog/products/ai-machine-learning/introducing-cloud-tpu-v5p-and-ai-hypercomputer",
        _TPU_INFO,
    ),
)
H100 = Chip(
    name="h100",
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    hbm=80 * 10**9,
    usable_hbm=84_942_979_072,
    bandwidth=3.35e12,
    bf16=989e12,
    int8=1979e12,
    interconnect=900e9,
    kernel_memory=227 * KIB,
    scalar_memory=None,
    registers=255,
    slices=("1", "2", "4", "8", "16", "32", "64"),
    sources=(
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
        "https://docs.nvidia.com/cuda/hopper-tuning-guide/",
    ),
)

CHIPS = {chip.name: chip for chip in (V5E, V6E, V5P, H100)}
