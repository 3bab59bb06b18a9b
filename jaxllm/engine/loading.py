"""From a config to an engine's parts: tokenizer, weights on the mesh, pages, compiled programs."""

import bisect
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import platformdirs
from jax.sharding import Mesh
from jaxtyping import Array

from converters.blank import BlankCheckpoint, locate_configs
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.tokenizer import TextTokenizer, open_tokenizer
from jaxllm.cache.groups import group_layers
from jaxllm.cache.manager import CacheManager
from jaxllm.config import EngineConfig
from jaxllm.engine.core import EngineCore
from jaxllm.engine.inputs import InputProcessor, default_sampling_params, find_eos_token_ids
from jaxllm.engine.laps import Laps
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.models import abstract
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.loading import load_weights
from jaxllm.models.registry import ModelRegistry
from jaxllm.parallel import make_mesh
from jaxllm.runner.kernels import check_kernel, choose_attention, prepare_attention
from jaxllm.runner.lowering import Lowering, Sizes
from jaxllm.runner.memory import count_pages, measure, page_bytes
from jaxllm.runner.programs import use_compilation_cache
from jaxllm.runner.runner import Runner
from jaxllm.sampling import SamplerConfig, registered_logits_processors
from jaxllm.scheduler.scheduler import Scheduler
from pallas_kernels.paged_attention import Backend
from pallas_kernels.registry import Choice

logger = logging.getLogger(__name__)

CPU_DEFAULTS = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "bucket_growth": 4}
"""XLA on CPU takes some 8 s of a core for a step program of a model with 30 layers: so there are few."""
ACCELERATOR_DEFAULTS = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "bucket_growth": 2}


@dataclass(frozen=True)
class EngineParts:
    """What an engine is put together from."""

    config: EngineConfig
    model: DecoderConfig
    mesh: Mesh
    attention: Choice[Backend]
    """The attention kernel, and why it is not another one."""
    core: EngineCore
    inputs: InputProcessor
    tokenizer: TextTokenizer | None
    load_weights: "WeightSource"
    """Loads the weights once more, after a sleep that dropped them."""
    load_seconds: Mapping[str, float]
    """What the parts of loading took, in order."""


@dataclass(frozen=True)
class WeightSource:
    """Where a model's weights come from, onto which mesh."""

    config: EngineConfig
    architecture: type[CausalLM]
    model: DecoderConfig
    mesh: Mesh

    def __call__(self) -> tuple[Array, ...]:
        """Loads the weights, or makes random ones, each in its sharding."""
        with jax.set_mesh(self.mesh):
            if self.config.model.load_format == "dummy":
                return abstract.materialize(self.architecture, self.model, self.mesh, self.config.model.seed)
            _, parameters = abstract.split(self.architecture, self.model)
            with closing(_open(self.config)) as checkpoint:
                return load_weights(
                    checkpoint,
                    self.architecture.rules,
                    parameters,
                    self.model.geometry,
                    self.mesh,
                    progress=self.config.compile.progress,
                )


def load_parts(config: EngineConfig, mesh: Mesh | None = None) -> EngineParts:
    """Builds an engine's parts.

    Args:
        mesh: with the axes of `make_mesh`, to run on other devices than the first ones.

    Raises:
        CheckpointError: the model cannot be found, read or recognised.
        NotImplementedError: the attention kernel that was asked for does not serve the model.
        TypeError: the attention kernel is none.
        ValueError: the config does not suit the model or the machine.
    """
    kernel = config.compile.attention_backend
    check_kernel(kernel)
    if config.compile.compilation_cache:
        folder = config.compile.compilation_cache_dir
        use_compilation_cache(folder or Path(platformdirs.user_cache_dir("jaxllm")) / "programs")
    laps = Laps()
    mesh = make_mesh(config.parallel.tensor_parallel_size) if mesh is None else mesh
    laps.end("devices")
    prepare_attention(kernel, mesh)
    with closing(_open(config)) as checkpoint:
        architecture = ModelRegistry.resolve(checkpoint.config)
        model = _read_model(config, checkpoint, architecture, mesh)
        choose = partial(choose_attention, kernel, model, mesh, config.cache.page_size)
        # what is wrong with somebody's own kernel shows before the weights are loaded
        attention = None if isinstance(kernel, str) else choose()
        tokenizer = _load_tokenizer(config, checkpoint)
        generation = checkpoint.generation_config
        eos = find_eos_token_ids(tokenizer, generation, checkpoint.config)
    laps.end("config_and_tokenizer")
    source = WeightSource(config, architecture, model, mesh)
    params = source()
    laps.end("weights")
    attention = attention or choose()  # late: what was begun above has had time
    laps.end("kernels")
    lowering, num_pages = _size(config, model, architecture, params, mesh, attention.backend)
    laps.end("sizes")
    sizes = lowering.sizes
    scheduler = Scheduler(
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
    )
    runner = Runner(lowering, params, num_pages)
    laps.end("pages")
    if not config.compile.enforce_eager:
        runner.programs.compile_ahead(progress=config.compile.progress)
    laps.end("programs")
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    depth = int(config.scheduler.async_scheduling)
    core = EngineCore(runner, scheduler, vocabulary, depth=depth, seed=config.model.seed)
    inputs = InputProcessor(
        tokenizer,
        vocab_size=model.vocab_size,
        max_model_len=sizes.max_model_len,
        max_logprobs=config.model.max_logprobs,
        eos_token_ids=eos,
        default_params=default_sampling_params(generation),
    )
    return EngineParts(config, model, mesh, attention, core, inputs, tokenizer, source, laps.seconds)


def _open(config: EngineConfig) -> Checkpoint:
    model = config.model
    where = {"revision": model.revision, "cache_dir": model.cache_dir, "token": model.token}
    if model.load_format != "dummy":
        return open_checkpoint(model.model, load_format=model.load_format, **where)
    path = locate_configs(model.model, **where)
    return BlankCheckpoint(path) if path.is_dir() else open_checkpoint(str(path))


def _load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> TextTokenizer | None:
    model = config.model
    if model.skip_tokenizer_init:
        return None
    # a repo's own tokenizer code is not among the files that are downloaded for the weights
    own = model.model if model.trust_remote_code else checkpoint.path
    return open_tokenizer(
        own if model.tokenizer is None else model.tokenizer,
        revision=model.revision,
        cache_dir=model.cache_dir,
        token=model.token,
        trust_remote_code=model.trust_remote_code,
    )


def _read_model(
    config: EngineConfig, checkpoint: Checkpoint, architecture: type[CausalLM], mesh: Mesh
) -> DecoderConfig:
    dtype = checkpoint.dtype if config.model.dtype == "auto" else jnp.dtype(config.model.dtype)
    wanted = config.model.max_model_len
    model = architecture.read_config(
        checkpoint.config, dtype=dtype, tensor_parallel_size=mesh.shape["tensor"], max_model_len=wanted
    )
    if wanted is not None and wanted > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={wanted}: the model has positions up to {model.max_position_embeddings}; lower it"
        )
    return model


def _size(
    config: EngineConfig,
    model: DecoderConfig,
    architecture: type[CausalLM],
    params: tuple[Array, ...],
    mesh: Mesh,
    backend: Backend,
) -> tuple[Lowering, int]:
    """The programs' sizes, and the number of pages: as many as fit, and no request longer than they hold."""
    device = mesh.devices.flat[0]
    defaults = CPU_DEFAULTS if device.platform == "cpu" else ACCELERATOR_DEFAULTS
    with jax.set_mesh(mesh):
        structure, _ = abstract.split(architecture, model)
    lowering = Lowering(
        model,
        partial(abstract.merge, structure),
        tuple(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for p in params),
        mesh,
        group_layers(model.layer_windows),
        Sizes(
            max_num_seqs=config.scheduler.max_num_seqs or defaults["max_num_seqs"],
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens
            or defaults["max_num_batched_tokens"],
            max_model_len=config.model.max_model_len or model.max_position_embeddings,
            page_size=config.cache.page_size,
            bucket_growth=defaults["bucket_growth"],
            num_logprobs=model.vocab_size if config.model.max_logprobs == -1 else config.model.max_logprobs,
        ),
        SamplerConfig(model.vocab_size, processors=registered_logits_processors()),
        backend,
    )
    num_pages = count_pages(config.cache, page_bytes(lowering), mesh, partial(measure, lowering))
    longest = longest_request(lowering, num_pages)
    if longest >= lowering.sizes.max_model_len:
        return lowering, num_pages
    if config.model.max_model_len is not None:
        raise ValueError(
            f"max_model_len={config.model.max_model_len}: {num_pages - 1} pages of {config.cache.page_size} "
            f"tokens hold a request of at most {longest}; lower it to that, or give the cache more memory"
        )
    logger.warning(
        "the pages hold a request of at most %d tokens, fewer than the model's %d; max_model_len=%d",
        longest, lowering.sizes.max_model_len, longest,
    )  # fmt: skip
    return lowering.with_max_model_len(longest), num_pages


def longest_request(lowering: Lowering, num_pages: int) -> int:
    """Tokens of the longest request that the pages could hold alone, at most `max_model_len`."""
    cache = CacheManager(lowering.layout.groups, num_pages=num_pages, page_size=lowering.sizes.page_size)
    lengths = range(1, lowering.sizes.max_model_len + 1)
    return bisect.bisect_right(lengths, num_pages - 1, key=lambda length: cache.growth(length - 1))
