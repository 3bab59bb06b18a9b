"""Compiling for a chip that is not there, and keeping what was found."""

import datetime
import importlib.metadata
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.targets.compiled import CompiledText
from pallas_kernels.targets.proofs import Proof
from pallas_kernels.targets.target import Target

KERNELS = {"tpu": "tpu_custom_call", "gpu": "mosaic_gpu_v2"}
"""What a program calls kernels by."""
PROOFS: list[Proof] = []
"""What this run has shown."""
EVERYTHING = ("-m", "aot", "tests/aot")
"""What `make aot` calls pytest with."""


@dataclass
class GpuKernels:
    """What ptxas and Mosaic GPU said about the kernels of one program."""

    registers: int | None = None
    spilled: int = 0
    shared_memory: int | None = None

    @classmethod
    def read(cls, folder: Path) -> "GpuKernels":
        """Reads a folder that MOSAIC_GPU_DUMP_TO named; it has nothing where the program has no kernel."""
        found = cls()
        for path in folder.glob("*.ptxas"):
            text = path.read_text()
            used = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
            found.registers = max([*used, found.registers or 0])
            found.spilled += sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text))
        for path in folder.glob("*.mlir-passes.log"):
            with path.open() as lines:  # 20 MB, of which the first launch says it
                size = next(
                    (
                        m[1]
                        for line in lines
                        if (m := re.search(r"dynamic_shared_memory_size %c(\d+)_", line))
                    ),
                    None,
                )
            if size is not None:
                found.shared_memory = max(int(size), found.shared_memory or 0)
        return found


@dataclass(frozen=True)
class Result:
    """A compiled program and what is read from it."""

    target: Target
    compiled: jax.stages.Compiled
    seconds: float
    gpu: GpuKernels
    text: CompiledText = field(repr=False)

    @property
    def memory(self) -> Any:
        """jax's `CompiledMemoryStats`, of one device."""
        return self.compiled.memory_analysis()

    @property
    def kernel_memory(self) -> int | None:
        """Bytes beside the cores that the largest kernel of the program uses."""
        return self.text.vmem() if self.target.chip.platform == "tpu" else self.gpu.shared_memory

    def record(self, op: str, backend: str, devices: int, shape: str, pages: str, *checked: str) -> None:
        """Keeps it as proven."""
        traffic = self.text.collectives()
        PROOFS.append(
            Proof(
                op=op,
                backend=backend,
                target=str(self.target),
                devices=devices,
                shape=shape,
                pages=pages,
                checked=checked,
                kernel_memory=self.kernel_memory,
                registers=self.gpu.registers,
                temporaries=self.memory.temp_size_in_bytes,
                collectives={kind: (one.count, one.nbytes) for kind, one in traffic.items()},
                seconds=round(self.seconds, 1),
                compiler=compiler(self.target),
                date=datetime.date.today().isoformat(),
            )
        )


def compile_lowered(target: Target, lowered: jax.stages.Lowered) -> Result:
    """Compiles, and reads what the compiler says."""
    with _dumping() as folder:
        begin = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - begin
        gpu = GpuKernels.read(folder)
    return Result(target, compiled, seconds, gpu, CompiledText.parse(compiled.as_text() or ""))


def check_kernel(result: Result) -> list[str]:
    """That a kernel is there, and the compiler's own count of what it uses against what the chip has.

    Returns:
        What was checked, in words.
    """
    chip = result.target.chip
    assert KERNELS[chip.platform] in result.text.custom_calls(), "the kernel is not in the program"
    assert 0 < (result.kernel_memory or 0) <= chip.kernel_memory
    if chip.platform == "tpu":
        return ["kernel memory within the chip's"]
    assert 0 < (result.gpu.registers or 0) <= (chip.registers or 0)
    assert result.gpu.spilled == 0, "registers are spilled to memory"
    return ["kernel memory within the chip's", "no registers spilled"]


def replaces_all(arguments: Iterable[object]) -> bool:
    """Whether pytest, called so, runs all tests: there are more ways to choose some than can be listed."""
    return tuple(arguments) == EVERYTHING


def compiler(target: Target) -> str:
    """Names and versions of what compiles for it."""
    packages = (
        ("libtpu",) if target.chip.platform == "tpu" else ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    )
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", *packages))


@contextmanager
def _dumping() -> Iterator[Path]:
    """Mosaic GPU says there what it does."""
    with tempfile.TemporaryDirectory() as folder:
        names = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        os.environ.update(names)
        try:
            yield Path(folder)
        finally:
            for name in names:
                del os.environ[name]
