"""How many pages fit: computed from what the compiler says that a step needs."""

import math
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from jaxllm.config import CacheConfig
from jaxllm.runner.kept import KeptPrograms
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs

GIB = 1024**3
CPU_CACHE_BYTES = GIB
"""Pages on CPU unless told otherwise: the machine's memory is shared with everything else that runs on it."""
DEFAULT_UTILIZATION = 0.9
"""Of an accelerator's memory, as in vLLM."""
PROCESS_BYTES = 768 * 1024**2
"""On CPU of Python, what it imports, and the compiled programs: 486 MB with 12 programs of a model of 30
layers, of any width, and 217 that the C library keeps (`benchmarks/growth.md`)."""
PROBE_PAGES = 64
"""Pages of the program that temporaries are read from; they are the same for any number."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on each device besides the pages, read from shapes and from the compiled program."""

    weights: int
    state: int
    """Rows on the device: known tokens, sampling parameters, counts."""
    temporaries: int
    """Of the largest step: activations, of the forward pass or the sampler, and the outputs of the steps in
    flight, one more than stages."""
    process: int = 0
    """On CPU, where device and host share their memory, what the process is besides."""

    @property
    def total(self) -> int:
        """What is there whatever the number of pages."""
        return self.weights + self.state + self.temporaries + self.process


def device_memory(mesh: Mesh) -> int:
    """Bytes that each device of the mesh has, by one on this host; on CPU those of the machine."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(lowering: Lowering, kept: KeptPrograms | None = None) -> MemoryUse:
    """Compiles the largest step, unless `kept` has its programs, and reads what it needs."""
    bucket = lowering.buckets.largest
    sources: dict[Hashable, Callable[[], Lowered]] = {"probe": partial(lowering.forward, bucket, PROBE_PAGES)}
    if lowering.stage.is_last:
        sources["sampler probe"] = partial(lowering.sample, bucket.sampled)
    programs = Programs(sources, kept)
    forward, *others = [_analyze(programs[key]) for key in sources]
    temporaries = max(analysis.temp_size_in_bytes for analysis in (forward, *others))
    return memory_use(lowering, temporaries, forward.output_size_in_bytes - forward.alias_size_in_bytes)


def _analyze(program: Compiled) -> Any:
    analysis = program.memory_analysis()
    assert analysis is not None, "the backend tells no sizes"
    return analysis


def memory_use(lowering: Lowering, temporaries: int, outputs: int) -> MemoryUse:
    """What there is besides the pages, with the largest step's temporaries and its forward pass's outputs.

    Between two steps experts may move, which takes their weights once more.
    """
    moved = max(map(_moving_bytes, lowering.experts_like), default=0)
    in_flight = (1 + lowering.stage.count) * outputs + _link_bytes(lowering)
    return MemoryUse(
        weights=bytes_per_device(lowering.params),
        state=bytes_per_device(lowering.rows_shapes),
        temporaries=max(temporaries, moved) + in_flight,
        process=PROCESS_BYTES if lowering.mesh.devices.flat[0].platform == "cpu" else 0,
    )


def _link_bytes(lowering: Lowering) -> int:
    """What links to other hosts take: what each gives with every step in flight, and what receivers send."""
    part = bytes_per_device(lowering.hidden_in_parts(lowering.buckets.largest.tokens))
    steps, entry, exit = 1 + lowering.stage.count, lowering.comes_from_host, lowering.goes_to_host
    return part * (steps * (entry + exit) + 2 * entry)


def _moving_bytes(weights: jax.ShapeDtypeStruct) -> int:
    """What it takes on each device to move experts from slot to slot.

    Its slots once more, and those of the experts on their way: compiled for v5e 602 MB, where a device has
    three slots of 117 MB.
    """
    assert weights.sharding is not None
    slots = weights.sharding.shard_shape(weights.shape)[0]
    return bytes_per_device(weights) * (slots + 3) // slots


def page_bytes(lowering: Lowering) -> int:
    """One page of every pool, on each device."""
    return bytes_per_device(lowering.cache_shapes(1))


def bytes_per_device(shapes: Any) -> int:
    """What arrays of these shapes and shardings take on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def count_pages(
    config: CacheConfig,
    page: int,
    mesh: Mesh,
    measure_use: Callable[[], MemoryUse],
    memory_of: Callable[[Mesh], int] = device_memory,
) -> int:
    """The number of pages, the null page included.

    Args:
        page: bytes of a page on each device.
        measure_use: called where the pages are to fill what other things leave of the device's memory.
        memory_of: tells how much each device of a mesh has.

    Raises:
        ValueError: not even one page fits; the message has the numbers and the settings to change.
    """
    if config.num_pages is not None:
        return config.num_pages + 1
    if config.kv_cache_memory is not None:
        budget, source = config.kv_cache_memory, f"kv_cache_memory={config.kv_cache_memory}"
    elif config.memory_utilization is None and mesh.devices.flat[0].platform == "cpu":
        budget, source = CPU_CACHE_BYTES, "the default on CPU"
    else:
        share = config.memory_utilization or DEFAULT_UTILIZATION
        use, whole = measure_use(), memory_of(mesh)
        budget = int(whole * share) - use.total
        process = f" and the process ({use.process})" if use.process else ""
        source = (
            f"memory_utilization={share} of {whole} bytes, less weights ({use.weights}), rows ({use.state}) "
            f"and temporaries ({use.temporaries}){process},"
        )
    if budget < 2 * page:
        raise ValueError(
            f"{source} leaves {budget} bytes for pages of {page} bytes, and two are the least; raise "
            "memory_utilization or kv_cache_memory, or lower max_num_seqs or max_num_batched_tokens"
        )
    return budget // page
