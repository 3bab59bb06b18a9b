"""A step's program as the compiler made it: what it has to do, send and keep on each chip."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.runner.buckets import Bucket
from jaxllm.runner.lowering import Lowering
from pallas_kernels.targets.compiled import CompiledText, Instruction, Traffic
from pallas_kernels.targets.work import grouped_kernels, memory_bytes, product_flops, ragged_flops


@dataclass(frozen=True)
class Step:
    """A forward pass on one chip, without what kernels of Pallas do: XLA cannot look into them.

    Attributes:
        tokens: of its bucket.
        flops: of its products.
        nbytes: that it reads from and writes to the chip's memory.
        grouped_kernels: products with experts' weights that are kernels.
        collectives: what it sends to other chips, of its data group where there are several, by kind.
        temporaries: bytes of the chip's memory beside arguments and results.
        outputs: bytes of results that are no arguments updated in place.
        code: bytes of the program; 0 where the compiler does not tell.
        compile_seconds: that tracing and compiling took.
        sent: bytes that each chip sends to the next stage, or from the last to the first; 0 without stages.
        between_groups: collectives of chips of several data groups, by kind.
    """

    tokens: int
    flops: float
    nbytes: float
    grouped_kernels: int
    collectives: Mapping[str, Traffic]
    temporaries: int
    outputs: int
    code: int
    compile_seconds: float
    sent: int = 0
    between_groups: Mapping[str, Traffic] = field(default_factory=dict)


def compile_step(lowering: Lowering, bucket: Bucket, num_pages: int) -> Step:
    """Compiles a bucket's forward pass, and reads what came out."""
    begin = time.perf_counter()
    with compiling_anew():
        compiled = lowering.forward(bucket, num_pages).compile()
    seconds = time.perf_counter() - begin
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None, "the compiler tells no sizes"
    text = CompiledText.parse(compiled.as_text() or "")
    chips, group = lowering.mesh.size, lowering.mesh.size // lowering.num_groups

    def passes(one: Instruction, *, between_groups: bool) -> bool:
        """Devices are numbered in the mesh's order, so those of a data group follow one another."""
        pieces = one.device_groups or [list(range(chips))]
        crosses = any(len({device // group for device in piece}) > 1 for piece in pieces)
        return crosses if between_groups else not crosses and len(pieces[0]) > 1

    return Step(
        bucket.tokens,
        costs["flops"] - ragged_flops(text) if costs else product_flops(text),
        memory_bytes(text),
        grouped_kernels(text),
        text.collectives(partial(passes, between_groups=False)),
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        seconds,
        _sent(lowering, bucket),
        text.collectives(partial(passes, between_groups=True)),
    )


def _sent(lowering: Lowering, bucket: Bucket) -> int:
    """Hidden states, of which every chip has all; from the last stage the chosen tokens, as int32."""
    model, stage = lowering.model, lowering.stage
    if stage.count == 1:
        return 0
    if stage.is_last:
        return 4 * bucket.sampled
    return bucket.tokens * model.hidden_size * jnp.dtype(model.dtype).itemsize


def on_line(first: Step, second: Step, share: float) -> Step:
    """What lies on the straight line through two steps: at 0 the first, at 1 the second, at 3 far beyond."""

    def along(name: str) -> float:
        start, end = getattr(first, name), getattr(second, name)
        return max(0.0, start + share * (end - start))

    def traffic(name: str) -> dict[str, Traffic]:
        start, end, none = getattr(first, name), getattr(second, name), Traffic(0, 0)
        pairs = {kind: (start.get(kind, none), end.get(kind, none)) for kind in sorted({*start, *end})}
        return {
            kind: Traffic(
                round(one.count + share * (other.count - one.count)),
                round(one.nbytes + share * (other.nbytes - one.nbytes)),
            )
            for kind, (one, other) in pairs.items()
        }

    return Step(
        round(along("tokens")),
        along("flops"),
        along("nbytes"),
        round(along("grouped_kernels")),
        traffic("collectives"),
        round(along("temporaries")),
        round(along("outputs")),
        round(along("code")),
        first.compile_seconds + second.compile_seconds,
        round(along("sent")),
        traffic("between_groups"),
    )


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Without jax's cache on disk: a program for another chip cannot be loaded from there."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
