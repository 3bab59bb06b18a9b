"""From a config to an engine's parts: tokenizer, weights on the mesh, pages, compiled programs."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
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
from jaxllm.config import EngineConfig
from jaxllm.engine.core import EngineCore
from jaxllm.engine.inputs import InputProcessor, default_sampling_params, find_eos_token_ids
from jaxllm.engine.laps import Laps
from jaxllm.engine.replicas import Replicas
from jaxllm.engine.sizing import fit_pages, make_lowering, make_scheduler
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.engine.waiting import waiting
from jaxllm.models import abstract
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.loading import load_weights
from jaxllm.models.registry import ModelRegistry
from jaxllm.parallel import make_mesh
from jaxllm.parallel.hosts import HostGroup
from jaxllm.runner.hosts import LeadingRunner, agree_on_pages, check_hosts
from jaxllm.runner.identity import CannotIdentifyError, identify
from jaxllm.runner.kept import KeptPrograms
from jaxllm.runner.kernels import check_kernel, choose_attention, prepare_attention
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.products import Products, check_products, choose_products, prepare_products
from jaxllm.runner.programs import Programs, use_compilation_cache
from jaxllm.runner.runner import Runner, allocate
from pallas_kernels.paged_attention import Backend
from pallas_kernels.registry import Choice

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineParts:
    """What an engine is put together from."""

    config: EngineConfig
    model: DecoderConfig
    mesh: Mesh
    attention: Choice[Backend]
    """The attention kernel, and why it is not another one."""
    products: Products
    """What multiplies with weights."""
    core: EngineCore | Replicas
    cores: tuple[EngineCore, ...]
    """`core` itself, or those of the replicas."""
    inputs: InputProcessor
    tokenizer: TextTokenizer | None
    load_weights: "tuple[WeightSource, ...]"
    """For each of `cores`, loads the weights once more, after a sleep that dropped them."""
    hosts: HostGroup | None
    """The hosts that it runs on, where they are several."""
    load_seconds: Mapping[str, float]
    """What the parts of loading took, in order; for what ran beside others, how long it was waited for."""


@dataclass(frozen=True)
class WeightSource:
    """Where a model's weights come from, onto which mesh."""

    config: EngineConfig
    architecture: type[CausalLM]
    model: DecoderConfig
    mesh: Mesh
    parameters: Mapping[str, abstract.Parameter]

    def __call__(self) -> tuple[Array, ...]:
        """Loads the weights, or makes random ones, each in its sharding."""
        with closing(_open(self.config)) as checkpoint:
            return self.load(checkpoint)

    def load(self, checkpoint: Checkpoint) -> tuple[Array, ...]:
        """The same, of a checkpoint that is open already."""
        with jax.set_mesh(self.mesh):
            if self.config.model.load_format == "dummy":
                return abstract.materialize(self.parameters, self.mesh, self.config.model.seed)
            return load_weights(
                checkpoint,
                self.architecture.rules,
                self.parameters,
                self.model.geometry,
                self.mesh,
                progress=self.config.compile.progress,
            )

    def copy(self, weights: Sequence[Array]) -> tuple[Array, ...]:
        """The same as they are on another mesh, from device to device."""
        shardings = [parameter.kept(self.mesh).sharding for parameter in self.parameters.values()]
        return tuple(jax.device_put(list(weights), shardings))


def load_parts(
    config: EngineConfig,
    mesh: Mesh | None = None,
    laps: Laps | None = None,
    weights: Sequence[Array] | None = None,
    hosts: HostGroup | None = None,
) -> EngineParts:
    """Builds the parts of an engine of one replica; `load_engine` does so for any number.

    Weights, tokenizer, pages and programs are made at the same time, in threads. It returns when there are
    enough programs to run every request; others go on being compiled, unless the config says otherwise.

    Args:
        mesh: with the axes of `make_mesh`, to run on other devices than the first ones.
        laps: written to as the parts of loading end, for somebody who looks on.
        weights: to be copied from another mesh, rather than loaded.
        hosts: that the mesh spans, each of which calls this.

    Raises:
        CheckpointError: the model cannot be found, read or recognised.
        NotImplementedError: a kernel that was asked for does not serve the model.
        TypeError: the attention kernel is none.
        ValueError: the config does not suit the model or the machine.
    """
    kernel, progress = config.compile.attention_backend, config.compile.progress
    check_kernel(kernel)
    check_products(config.compile.matmul_backend)
    laps = Laps() if laps is None else laps
    mesh = make_mesh(config.parallel.tensor_parallel_size) if mesh is None else mesh
    if hosts is not None:
        check_hosts(mesh)
    laps.end("devices")
    prepare_attention(kernel, mesh)
    prepare_products(config.compile.matmul_backend, mesh)
    with (
        ThreadPoolExecutor(thread_name_prefix="load") as threads,
        # closed before the threads are waited for: so they end soon, if something has failed
        closing(_open(config)) as checkpoint,
        ExitStack() as failed,
    ):
        _compare_options(threads)
        architecture = ModelRegistry.resolve(checkpoint.config)
        model = _read_model(config, checkpoint, architecture, mesh)
        choose = partial(choose_attention, kernel, model, mesh, config.cache.page_size)
        # what is wrong with somebody's own kernel shows before the weights are loaded
        attention = None if isinstance(kernel, str) else choose()
        laps.end("config")
        with waiting("Building the kernel for products", progress=progress):
            products = choose_products(config.compile.matmul_backend, model, mesh)
        with jax.set_mesh(mesh):
            structure, parameters = abstract.split(architecture, model, products.backend)
        laps.end("structure")
        source = WeightSource(config, architecture, model, mesh, parameters)
        if weights is None:
            loaded = threads.submit(source.load, checkpoint)
        else:
            loaded = threads.submit(source.copy, weights)
        opened = threads.submit(_load_tokenizer, config, checkpoint)
        if attention is None:
            with waiting("Building the attention kernel", progress=progress):
                attention = choose()
        laps.end("kernels")
        merge = partial(abstract.merge, structure)
        lowering = make_lowering(config, model, merge, parameters, mesh, attention.backend, products.backend)

        def kept(lowering: Lowering) -> KeptPrograms | None:
            return threads.submit(_kept_programs, config, architecture, lowering).result()

        if hosts is None:
            lowering, num_pages = fit_pages(config, lowering, kept)
        else:
            lowering, num_pages = fit_pages(config, lowering, kept, partial(agree_on_pages, hosts))
        programs = Programs(lowering.programs(num_pages), kept(lowering))
        failed.callback(programs.close)
        first = list(lowering.first_programs if config.compile.compile_in_background else programs)
        laps.programs = lambda: (sum(key in programs for key in first), len(first))
        if not config.compile.enforce_eager:
            programs.begin()
        state = threads.submit(allocate, programs)
        laps.end("sizes")
        tokenizer = opened.result()
        generation, eos_config = checkpoint.generation_config, checkpoint.config
        laps.end("tokenizer")
        params = loaded.result()
        laps.end("weights")
        made = (lowering, params, num_pages, programs, state.result())
        exact = config.compile.enforce_eager
        if hosts is None or not hosts.leads:
            runner = Runner(*made, exact=exact)
        else:
            runner = LeadingRunner(*made, hosts, exact=exact)
        laps.end("pages")
        programs.wait(first, progress=progress)
        programs.serve_beside()
        laps.end("programs")
        failed.pop_all()
    core = EngineCore(
        runner,
        make_scheduler(config, lowering, num_pages),
        None if tokenizer is None else Vocabulary(tokenizer),
        depth=int(config.scheduler.async_scheduling),
        seed=config.model.seed,
    )
    inputs = InputProcessor(
        tokenizer,
        vocab_size=model.vocab_size,
        max_model_len=lowering.sizes.max_model_len,
        max_logprobs=config.model.max_logprobs,
        eos_token_ids=find_eos_token_ids(tokenizer, generation, eos_config),
        default_params=default_sampling_params(generation),
    )
    laps.end("rest")
    return EngineParts(
        config,
        model,
        mesh,
        attention,
        products,
        core,
        (core,),
        inputs,
        tokenizer,
        (source,),
        hosts,
        laps.seconds,
    )


def _compare_options(threads: ThreadPoolExecutor) -> None:
    """Warns of options of jax that only the calling thread has: programs are traced in others."""
    here, there = dict(jax.config.values), threads.submit(lambda: dict(jax.config.values)).result()
    if names := [name for name, value in here.items() if there[name] != value]:
        logger.warning(
            "%s: set for this thread alone, which programs do not see; use jax.config.update",
            ", ".join(names),
        )


def _kept_programs(
    config: EngineConfig, architecture: type[CausalLM], lowering: Lowering
) -> KeptPrograms | None:
    """Where programs are kept whole. Where they cannot be, jax keeps what XLA makes of them.

    Not both: what jax has kept cannot be kept whole any more, see `compile_watched`.
    """
    if not config.compile.compilation_cache:
        return None
    folder = config.compile.compilation_cache_dir or Path(platformdirs.user_cache_dir("jaxllm")) / "programs"
    try:
        if config.compile.keep_executables:
            identity = identify(lowering, architecture)
            return KeptPrograms(folder / "whole", identity, list(lowering.mesh.devices.flat))
    except CannotIdentifyError as reason:
        logger.info("programs are traced at each start, because they cannot be kept whole: %s", reason)
    use_compilation_cache(folder)
    return None


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
