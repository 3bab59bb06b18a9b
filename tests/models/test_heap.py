"""What has been freed goes back to the system, where the C library can be asked for it."""

import ctypes
import subprocess
import sys

import pytest

from jaxllm.models import heap

CODE = """
import ctypes
from jaxllm.models.heap import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(65536) for _ in range(1024)]  # small enough for the heap
for block in blocks:
    ctypes.memset(block, 1, 65536)
for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
    libc.free(block)
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc has it")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 48 * 2**20


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none(name: object) -> object:
        return object()

    monkeypatch.setattr(ctypes, "CDLL", find_none)
    heap._malloc_trim.cache_clear()
    heap.give_back()
    heap._malloc_trim.cache_clear()
