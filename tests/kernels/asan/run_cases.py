"""Runs the CPU kernels under AddressSanitizer, and without some of the processor's instructions: `make asan`.

The kernels are built with it into a folder of their own. Their process is started again with the sanitizer's
library loaded first, and with every fresh allocation full of NaN, so that an output nobody wrote shows.
"""

import dataclasses
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pallas_kernels.native import Library
from pallas_kernels.packed_matmul import cpu as products
from pallas_kernels.packed_matmul.cases import CORNERS as PRODUCTS
from pallas_kernels.packed_matmul.check import check_case as check_product
from pallas_kernels.paged_attention import cpu
from pallas_kernels.paged_attention.cases import KEYS_AND_VALUES, Case
from pallas_kernels.paged_attention.check import check_case

SANITIZERS = ("-fsanitize=address,bounds,float-cast-overflow", "-fno-sanitize-recover=all", "-g1", "-O1")
"""The other checks of undefined behaviour make the compiler work for minutes."""
OPTIONS = "detect_leaks=0:abort_on_error=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
"""Python and jax keep what they allocate, so leaks are not looked for; bytes of 255 are NaN."""

LIBRARIES = (cpu.LIBRARY, products.LIBRARY)
NO_AMX = ("-O1", "-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
INSTRUCTIONS = {"all": (), "AVX-512": NO_AMX, "AVX2": (*NO_AMX, "-mno-avx512f")}
"""What compilers for x86 are to leave out, so that processors which lack it are tested on others. Sanitizers,
which slow the cases down by much, go with all instructions only."""

SPLIT = {
    "split": Case(rows=((1, 2100),), heads=3, kv_heads=1, page_size=16, dtype="bfloat16"),
    "split, all at once": Case(rows=((5, 1801),), page_size=16, sliding_window=1500, sinks=True),
    "head_dim 24": Case(rows=((1, 20), (6, 11)), head_dim=24, page_size=2, dtype="bfloat16"),
    "table without a spare column": Case(rows=((1, 16), (9, 32)), spare_columns=0, padding_rows=0),
}


def runtime() -> str:
    """What must be loaded before anything else: the sanitizer's library, and the C++ one it looks into."""
    compiler = cpu.LIBRARY.source.find_compiler()
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            sys.exit(f"{compiler} has no {name}")
        paths.append(path)
    return " ".join(paths)


def built(library: Library, folder: Path, instructions: str) -> Library:
    """The library with sanitizers, or without some of the instructions that the processor has."""
    flags = INSTRUCTIONS[instructions] or SANITIZERS
    return Library(dataclasses.replace(library.source, flags=flags, folder=folder), library.handlers)


def run(folder: Path, instructions: str) -> None:
    """All cases on the kernels; under a sanitizer the process dies at the first report."""
    cpu.LIBRARY = built(cpu.LIBRARY, folder, instructions)
    products.LIBRARY = built(products.LIBRARY, folder, instructions)
    for name, case in (KEYS_AND_VALUES | SPLIT).items():
        check_case(case, cpu.BACKEND, cpu.paged_attention_cpu)
        print(f"passed {name} ({instructions})", flush=True)
    for name, case in PRODUCTS.items():
        check_product(case, products.packed_matmul_cpu)
        print(f"passed {name} ({instructions})", flush=True)


def start() -> int:
    """Builds, outside the sanitizer, which would slow the compiler down, and runs the cases inside."""
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    for instructions in INSTRUCTIONS if on_x86 else ("all",):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        if not INSTRUCTIONS[instructions]:
            environment |= {"LD_PRELOAD": runtime(), "ASAN_OPTIONS": OPTIONS}
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
            libraries = (built(library, Path(folder), instructions) for library in LIBRARIES)
            list(threads.map(lambda library: library.source.build(), libraries))
            command = [sys.executable, __file__, folder, instructions]
            if status := subprocess.call(command, env=environment):
                return status
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(start())
