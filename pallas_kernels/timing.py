"""How fast a device is, and how long a compiled step takes on it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

MIB = 2**20
GIB = 2**30
CPU_MEMORY = GIB
"""What is taken of a CPU's memory, whose size jax does not tell."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: the median of `repeats`, each of so many calls that it takes about `seconds`."""

    repeats: int = 5
    seconds: float = 0.1


@dataclass(frozen=True)
class Limits:
    """What a device was measured to do.

    Attributes:
        copy: bytes read and bytes written a second, of an array far larger than the caches.
        matmul: operations a second of a large product of bfloat16 with sums in float32.
    """

    copy: float
    matmul: float

    def seconds(self, flops: float, nbytes: float) -> tuple[float, str]:
        """The least time for so much work, and which of the two limits it is."""
        times = {"copy": nbytes / self.copy, "matmul": flops / self.matmul}
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


def time_step(step: Callable[[Any], Any], carry: Any, effort: Effort) -> tuple[float, Any]:
    """Seconds of a step that takes what its last call gave, and what it gave at last.

    The calls are chained, so none can be left out or run beside another, and only the last is waited for.

    Args:
        step: a compiled function; its argument may be donated.
    """
    carry = jax.block_until_ready(step(carry))  # compiles
    count, times = 1, []
    while len(times) < effort.repeats:
        start = time.perf_counter()
        for _ in range(count):
            carry = step(carry)
        carry = jax.block_until_ready(carry)
        taken = time.perf_counter() - start
        if not times and taken < effort.seconds / 2 and count < 10_000:  # finds the count
            count = min(10_000, max(2 * count, int(count * effort.seconds / max(taken, 1e-6))))
            continue
        times.append(taken / count)
    return statistics.median(times), carry


def measure_limits(effort: Effort, *, nbytes: int | None = None, size: int | None = None) -> Limits:
    """The copy bandwidth and the rate of products of the device present.

    Args:
        nbytes: of the array that is copied; None: 256 MiB on CPU, 1 GiB elsewhere.
        size: of the square matrices; None: 1,024 on CPU, 8,192 elsewhere.
    """
    small = jax.default_backend() == "cpu"
    nbytes = nbytes or (256 * MIB if small else GIB)
    size = size or (1024 if small else 8192)
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds, _ = time_step(add_one, jnp.zeros(nbytes // 4, jnp.uint32), effort)
    copy = 2 * nbytes / seconds

    left, right = (
        jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2)
    )  # zeros would run faster than numbers do
    seconds, _ = time_step(jax.jit(partial(_multiply, right)), left, effort)
    return Limits(copy=copy, matmul=2 * size**3 / seconds)


def _multiply(right: jax.Array, left: jax.Array) -> jax.Array:
    product = jnp.dot(left, right, preferred_element_type=jnp.float32)
    return (product * right.shape[0] ** -0.5).astype(left.dtype)


def memory_budget() -> int:
    """Bytes that a measurement may take on the device: four fifths of what is free."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return CPU_MEMORY
    return int(0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
