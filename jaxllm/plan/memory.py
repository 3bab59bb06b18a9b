"""What lives in a chip's memory, and what requests that leaves room for."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from jaxllm.cache.manager import CacheManager
from jaxllm.config import EngineConfig
from jaxllm.engine.sizing import fit_pages
from jaxllm.plan.layout import Layout
from jaxllm.plan.step import Step
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.memory import DEFAULT_UTILIZATION, MemoryUse, bytes_per_device, memory_use, page_bytes


class TooLargeError(ValueError):
    """A model does not fit; the message says by how much."""


@dataclass(frozen=True)
class ChipMemory:
    """Bytes on each chip.

    Attributes:
        usable: what programs get of the chip's memory.
        rows: what is kept of each running request besides its pages.
        temporaries: of the largest step: activations, and the outputs of two steps in flight.
        page_size: tokens of a page.
        num_pages: that requests can have.
        unused: what nothing above takes; code goes there.
        code: of the programs of all sizes, extrapolated from two of them; 0 where the compiler does not tell.
    """

    usable: int
    weights: int
    rows: int
    temporaries: int
    pages: int
    page_size: int
    num_pages: int
    unused: int
    code: int

    @property
    def code_fits(self) -> bool:
        """Whether the programs of all sizes fit into what is unused."""
        return self.code <= self.unused


def fit_memory(
    config: EngineConfig, layout: Layout, stages: Sequence[Lowering], prefill: Sequence[Step]
) -> tuple[list[Lowering], int]:
    """As many pages as fit beside all else, in the fullest stage.

    Args:
        prefill: the largest step, of each stage.

    Returns:
        The stages, for shorter requests where the pages hold no longer ones, and the pages, the null page
        included.

    Raises:
        TooLargeError: too few fit; the message has the numbers.
    """

    def use(stage: Lowering) -> MemoryUse:
        step = prefill[stage.stage.index]
        return memory_use(stage, step.temporaries, step.outputs)

    def usable(_: Mesh) -> int:
        return layout.target.chip.usable_hbm

    try:
        fitted, num_pages = fit_pages(config, stages, use, usable)
    except ValueError as error:
        raise TooLargeError(str(error)) from error
    total = max(use(stage).total + num_pages * page_bytes(stage) for stage in fitted)
    chip = layout.target.chip
    if total > chip.usable_hbm:
        raise TooLargeError(
            f"{num_pages - 1} pages make {total} bytes with all else on a chip, and {chip.name} has "
            f"{chip.usable_hbm}; lower num_pages or kv_cache_memory, or leave them out"
        )
    return fitted, num_pages


def describe_memory(
    layout: Layout, lowering: Lowering, num_pages: int, prefill: Step, decode: Step
) -> ChipMemory:
    """What the memory of a stage's chips holds, once it is known."""
    use = memory_use(lowering, prefill.temporaries, prefill.outputs)
    pages, usable = num_pages * page_bytes(lowering), layout.target.chip.usable_hbm
    return ChipMemory(
        usable=usable,
        weights=use.weights,
        rows=use.state,
        temporaries=use.temporaries,
        pages=pages,
        page_size=lowering.sizes.page_size,
        num_pages=num_pages - 1,
        unused=usable - use.total - pages,
        code=_all_code(lowering, prefill, decode),
    )


def require_weights(config: EngineConfig, layout: Layout, stages: Sequence[Lowering]) -> None:
    """Refuses a layout whose weights are too large in any stage, before anything is compiled.

    Raises:
        TooLargeError: they are; the message says by how much.
    """
    cache, usable = config.cache, layout.target.chip.usable_hbm
    if cache.num_pages is None and cache.kv_cache_memory is None:
        share = cache.memory_utilization or DEFAULT_UTILIZATION
        source = f"memory_utilization={share} of its"
    else:  # pages do not fill a share of the memory then
        share, source = 1.0, "its"
    sizes = [bytes_per_device(stage.params) + bytes_per_device(stage.rows_shapes) for stage in stages]
    needed = max(sizes)
    if (excess := needed - usable * share) > 0:
        chips = "each chip" if len(sizes) == 1 else f"each chip of stage {sizes.index(needed)}"
        raise TooLargeError(
            f"weights and rows take {needed / 1e9:.1f} GB of {chips}, {excess / 1e9:.1f} GB more than "
            f"{source} {usable / 1e9:.1f} GB"
        )


def count_requests(lowering: Lowering, num_pages: int, length: int) -> int:
    """How many requests of that many tokens have their pages at the same time."""
    cache = CacheManager(lowering.layout.groups, num_pages=num_pages, page_size=lowering.sizes.page_size)
    return (num_pages - 1) // max(1, cache.growth(length - 1))


def _all_code(lowering: Lowering, prefill: Step, decode: Step) -> int:
    """Of the forward passes of all buckets: those smaller than the decode step's are taken to be like it."""
    if prefill.tokens == decode.tokens:
        return prefill.code * len(lowering.buckets.sizes)
    slope = (prefill.code - decode.code) / (prefill.tokens - decode.tokens)
    return round(
        sum(decode.code + slope * max(0, bucket.tokens - decode.tokens) for bucket in lowering.buckets.sizes)
    )
