"""How large an engine's steps and its pool of pages are, from its config and the machine."""

import bisect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from jax.sharding import Mesh

from jaxllm.cache.groups import group_layers
from jaxllm.cache.manager import CacheManager
from jaxllm.config import EngineConfig
from jaxllm.models.abstract import Parameter, Structure
from jaxllm.models.base import DecoderConfig
from jaxllm.models.expert_slots import expert_layers
from jaxllm.models.stages import Stage, stage_merge
from jaxllm.runner.lowering import Lowering, Sizes
from jaxllm.runner.memory import MemoryUse, count_pages, device_memory, page_bytes
from jaxllm.runner.step import Merge
from jaxllm.sampling import SamplerConfig, registered_logits_processors
from jaxllm.scheduler.grouped import GroupedScheduler
from jaxllm.scheduler.scheduler import Scheduler
from pallas_kernels.packed_matmul import Backend as ProductsBackend
from pallas_kernels.paged_attention import Backend

logger = logging.getLogger(__name__)

CPU_DEFAULTS = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "bucket_growth": 4}
"""XLA on CPU takes some 8 s of a core for a step program of a model with 30 layers: so there are few."""
ACCELERATOR_DEFAULTS = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "bucket_growth": 2}


def make_lowering(
    config: EngineConfig,
    model: DecoderConfig,
    merge: Merge,
    parameters: Mapping[str, Parameter],
    mesh: Mesh,
    backend: Backend,
    products: ProductsBackend | None,
    stage: Stage,
    *,
    comes_from_host: bool = False,
    goes_to_host: bool = False,
) -> Lowering:
    """The programs, of the sizes that the config asks for.

    Args:
        merge, parameters, mesh: of the stage.
        comes_from_host, goes_to_host: see `Lowering`.

    Raises:
        ValueError: experts are to be counted of a model that has none.
    """
    if config.compile.expert_metrics and model.mixture is None:
        raise ValueError("expert_metrics=True: this model has no experts; leave it out")
    platform = mesh.devices.flat[0].platform
    defaults = CPU_DEFAULTS if platform == "cpu" else ACCELERATOR_DEFAULTS
    tokens = config.scheduler.max_num_batched_tokens or defaults["max_num_batched_tokens"]
    return Lowering(
        model,
        merge,
        tuple(parameter.kept(mesh) for parameter in parameters.values()),
        mesh,
        group_layers(model.layer_windows).part(stage.layers(model.num_layers)),
        Sizes(
            max_num_seqs=config.scheduler.max_num_seqs or defaults["max_num_seqs"],
            max_num_batched_tokens=tokens,
            max_model_len=config.model.max_model_len or model.max_position_embeddings,
            page_size=config.cache.page_size,
            bucket_growth=defaults["bucket_growth"],
            num_logprobs=model.vocab_size if config.model.max_logprobs == -1 else config.model.max_logprobs,
            count_experts=config.compile.expert_metrics or config.parallel.enable_eplb,
        ),
        SamplerConfig(model.vocab_size, processors=registered_logits_processors()),
        backend,
        products,
        stage,
        expert_layers(parameters),
        comes_from_host,
        goes_to_host,
    )


def make_stages(
    config: EngineConfig,
    model: DecoderConfig,
    structure: Structure,
    parameters: Mapping[str, Parameter],
    parts: Sequence[Mapping[str, Parameter]],
    meshes: Sequence[Mesh],
    backend: Backend,
    products: ProductsBackend | None,
    *,
    first: int = 0,
    count: int | None = None,
) -> list[Lowering]:
    """The programs of all stages, or of those of one host, as `make_lowering` makes those of one.

    Args:
        structure, parameters: of the whole model.
        parts: what `cut_parameters` gives for these stages.
        meshes: of these stages.
        first: number of the first of them.
        count: of stages, on all hosts; by default there are no others.
    """
    last, count = first + len(meshes) - 1, len(meshes) if count is None else count
    stages = [Stage(index, count) for index in range(first, last + 1)]
    return [
        make_lowering(
            config,
            model,
            stage_merge(structure, parameters, part, stage),
            part,
            mesh,
            backend,
            products,
            stage,
            comes_from_host=stage.index == first > 0,
            goes_to_host=stage.index == last < count - 1,
        )
        for stage, part, mesh in zip(stages, parts, meshes, strict=True)
    ]


def fit_pages(
    config: EngineConfig,
    stages: Sequence[Lowering],
    measure_use: Callable[[Lowering], MemoryUse],
    memory_of: Callable[[Mesh], int] = device_memory,
    agree: Callable[[int], int] | None = None,
) -> tuple[list[Lowering], int]:
    """As many pages as fit in every stage, the null page included, and no request longer than they hold.

    Args:
        measure_use, memory_of: see `jaxllm.runner.memory.count_pages`.
        agree: where there are several hosts, what they make of how many fit on this one.

    Raises:
        ValueError: too few fit; the message has the numbers and the settings to change.
    """
    fitting = min(
        count_pages(config.cache, page_bytes(stage), stage.mesh, partial(measure_use, stage), memory_of)
        for stage in stages
    )
    num_pages, lowering = fitting if agree is None else agree(fitting), stages[0]
    longest = longest_request(lowering, num_pages)
    if longest >= lowering.sizes.max_model_len:
        return list(stages), num_pages
    if config.model.max_model_len is not None:
        raise ValueError(
            f"max_model_len={config.model.max_model_len}: {num_pages - 1} pages of {config.cache.page_size} "
            f"tokens hold a request of at most {longest}; lower it to that, or give the cache more memory"
        )
    logger.warning(
        "the pages hold a request of at most %d tokens, fewer than the model's %d; max_model_len=%d",
        longest, lowering.sizes.max_model_len, longest,
    )  # fmt: skip
    return [stage.with_max_model_len(longest) for stage in stages], num_pages


def longest_request(lowering: Lowering, num_pages: int) -> int:
    """Tokens of the longest request that the pages could hold alone, at most `max_model_len`."""
    cache = CacheManager(lowering.layout.groups, num_pages=num_pages, page_size=lowering.sizes.page_size)
    lengths = range(1, lowering.sizes.max_model_len + 1)
    return bisect.bisect_right(lengths, num_pages - 1, key=lambda length: cache.growth(length - 1))


def make_scheduler(config: EngineConfig, lowering: Lowering, num_pages: int) -> Scheduler | GroupedScheduler:
    """A scheduler of the programs' sizes, without requests; with data groups, one of one for each."""
    groups = [_make_scheduler(config, lowering, num_pages) for _ in range(lowering.num_groups)]
    return GroupedScheduler(groups) if len(groups) > 1 else groups[0]


def _make_scheduler(config: EngineConfig, lowering: Lowering, num_pages: int) -> Scheduler:
    sizes = lowering.sizes
    return Scheduler(
        CacheManager(
            lowering.layout.groups,
            num_pages=num_pages,
            page_size=sizes.page_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        ),
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        policy=config.scheduler.policy,
        enable_chunked_prefill=config.scheduler.enable_chunked_prefill,
        num_stages=lowering.stage.count,
    )
