"""From a config to an engine's parts: tokenizer, weights on the mesh, pages, compiled programs."""

import dataclasses
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import platformdirs
from jax.sharding import Mesh

from converters.checkpoint import Checkpoint
from converters.tokenizer import TextTokenizer, open_tokenizer
from jaxllm.config import EngineConfig, ParallelConfig
from jaxllm.engine.core import EngineCore
from jaxllm.engine.devices import choose_devices
from jaxllm.engine.expert_balancer import ExpertBalancer
from jaxllm.engine.inputs import InputProcessor, default_sampling_params, find_eos_token_ids
from jaxllm.engine.laps import Laps
from jaxllm.engine.replicas import Replicas
from jaxllm.engine.sizing import fit_pages, make_scheduler, make_stages
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.engine.waiting import waiting
from jaxllm.engine.weight_source import WeightSource, open_model
from jaxllm.layers.expert_copies import Copies
from jaxllm.layers.expert_exchange import exchange_ragged
from jaxllm.models import abstract
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.registry import ModelRegistry
from jaxllm.models.stages import StageWeights, cut_parameters
from jaxllm.parallel.hosts import HostGroup
from jaxllm.runner.hosts import LeadingRunner, agree_on_pages, find_far_stages, find_links
from jaxllm.runner.identity import CannotIdentifyError, identify
from jaxllm.runner.kept import KeptPrograms
from jaxllm.runner.kernels import check_kernel, choose_attention, prepare_attention
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.memory import PROBE_PAGES, measure
from jaxllm.runner.pipeline import first_programs, make_programs
from jaxllm.runner.products import Products, check_products, choose_products, prepare_products
from jaxllm.runner.programs import use_compilation_cache
from jaxllm.runner.runner import Runner
from jaxllm.runner.stage import StageRunner, allocate
from jaxllm.structured.compiler import GrammarCompiler
from jaxllm.structured.tokens import TokenTable
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
    weight_sources: tuple[WeightSource, ...]
    """Of each of `cores`."""
    hosts: HostGroup | None
    """The hosts that it runs on, where they are several."""
    load_seconds: Mapping[str, float]
    """What the parts of loading took, in order; for what ran beside others, how long it was waited for."""


def load_parts(
    config: EngineConfig,
    mesh: Mesh | None = None,
    laps: Laps | None = None,
    weights: StageWeights | None = None,
    hosts: HostGroup | None = None,
) -> EngineParts:
    """Builds the parts of an engine of one replica; `load_engine` does so for any number.

    Weights, tokenizer, pages and programs are made at the same time, in threads. It returns when there are
    enough programs to run every request; others go on being compiled, unless the config says otherwise.

    Args:
        mesh: with axes of `make_mesh`, to run on other devices than the first ones.
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
    devices = choose_devices(config, mesh, hosts)
    meshes = devices.own_meshes
    laps.end("devices")
    prepare_attention(kernel, meshes[0])
    prepare_products(config.compile.matmul_backend, meshes[0])
    with (
        ThreadPoolExecutor(thread_name_prefix="load") as threads,
        # closed before the threads are waited for: so they end soon, if something has failed
        closing(open_model(config)) as checkpoint,
        ExitStack() as failed,
    ):
        _compare_options(threads)
        devices.check_checkpoint(checkpoint)
        architecture = ModelRegistry.resolve(checkpoint.config)
        model = read_model(config, checkpoint, architecture, devices.mesh)
        choose = partial(choose_attention, kernel, model, meshes[0], config.cache.page_size)
        # what is wrong with somebody's own kernel shows before the weights are loaded
        attention = None if isinstance(kernel, str) else choose()
        laps.end("config")
        with waiting("Building the kernel for products", progress=progress):
            products = choose_products(config.compile.matmul_backend, model, meshes[0])
        with jax.set_mesh(meshes[0]):
            structure, parameters = abstract.split(architecture, model, products.backend)
        parts = cut_parameters(architecture, model, parameters, devices.num_stages)[devices.own]
        laps.end("structure")
        source = WeightSource(config, architecture, model, parameters, parts, meshes)
        if weights is None:
            loaded = threads.submit(source.load, checkpoint)
        else:
            loaded = threads.submit(source.copy, weights)
        opened = threads.submit(_load_tokenizer, config, checkpoint)
        if attention is None:
            with waiting("Building the attention kernel", progress=progress):
                attention = choose()
        laps.end("kernels")
        lowerings = make_stages(
            config,
            model,
            structure,
            parameters,
            parts,
            meshes,
            attention.backend,
            products.backend,
            first=devices.own.start,
            count=devices.num_stages,
        )

        def kept(lowering: Lowering, num_pages: int) -> KeptPrograms | None:
            return threads.submit(_kept_programs, config, architecture, lowering, num_pages).result()

        lowerings, num_pages = fit_pages(
            config,
            lowerings,
            lambda lowering: measure(lowering, kept(lowering, PROBE_PAGES)),
            agree=None
            if hosts is None
            else partial(agree_on_pages, hosts, lowerings[0], parameters, devices.mesh),
        )
        links = find_links(lowerings, devices.stages)
        keeping = [kept(lowering, num_pages) for lowering in lowerings]
        programs = make_programs(lowerings, num_pages, keeping, links)
        failed.callback(programs.close)
        first = first_programs(lowerings, links) if config.compile.compile_in_background else list(programs)
        laps.programs = lambda: (sum(key in programs for key in first), len(first))
        if not config.compile.enforce_eager:
            programs.begin()
        states = [threads.submit(allocate, lowering, programs) for lowering in lowerings]
        laps.end("sizes")
        tokenizer = opened.result()
        generation, eos_config = checkpoint.generation_config, checkpoint.config
        laps.end("tokenizer")
        params = loaded.result()
        laps.end("weights")
        stage_runners = [
            StageRunner(lowering, programs, part, state.result())
            for lowering, part, state in zip(lowerings, params, states, strict=True)
        ]
        exact = config.compile.enforce_eager
        far = None if hosts is None else find_far_stages(hosts, devices.where, links, programs)
        if hosts is None or not hosts.leads:
            runner = Runner(stage_runners, num_pages, programs, source, exact=exact, far=far)
        else:
            runner = LeadingRunner(stage_runners, num_pages, programs, source, hosts, exact=exact, far=far)
        laps.end("pages")
        programs.wait(first, progress=progress)
        programs.serve_beside()
        laps.end("programs")
        failed.pop_all()
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    core = EngineCore(
        runner,
        make_scheduler(config, runner.lowering, num_pages),
        vocabulary,
        ExpertBalancer(
            runner, interval=config.parallel.eplb_step_interval, report=config.compile.expert_metrics
        ),
        depth=devices.num_stages - 1 + int(config.scheduler.async_scheduling),
        seed=config.model.seed,
    )
    eos_token_ids = find_eos_token_ids(tokenizer, generation, eos_config)
    grammars = None
    if tokenizer is not None and vocabulary is not None:
        make_tokens = partial(_token_table, tokenizer, vocabulary, model.vocab_size, eos_token_ids)
        grammars = GrammarCompiler(make_tokens)
    inputs = InputProcessor(
        tokenizer,
        vocab_size=model.vocab_size,
        max_model_len=runner.lowering.sizes.max_model_len,
        max_logprobs=config.model.max_logprobs,
        eos_token_ids=eos_token_ids,
        default_params=default_sampling_params(generation),
        grammars=grammars,
    )
    laps.end("rest")
    return EngineParts(
        config,
        model,
        devices.mesh,
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


def _token_table(
    tokenizer: TextTokenizer, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: frozenset[int]
) -> TokenTable:
    """The tokens that the model knows; those that the tokenizer does not know write nothing."""
    return TokenTable(
        [vocabulary.token_bytes(token) or b"" for token in range(vocab_size)],
        special_ids=[token for token in vocabulary.special_ids if token < vocab_size],
        eos_ids=[token for token in eos_token_ids if token < vocab_size],
        encode=partial(tokenizer.encode, add_special_tokens=False),
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
    config: EngineConfig, architecture: type[CausalLM], lowering: Lowering, num_pages: int
) -> KeptPrograms | None:
    """Where programs are kept whole. Where they cannot be, jax keeps what XLA makes of them.

    Not both: what jax has kept cannot be kept whole any more, see `compile_watched`.
    """
    if not config.compile.compilation_cache:
        return None
    own = config.compile.compilation_cache_dir
    folder = Path(platformdirs.user_cache_dir("jaxllm")) / "programs" if own is None else Path(own)
    try:
        if config.compile.keep_executables:
            return keep_whole(folder, architecture, lowering, num_pages)
    except CannotIdentifyError as reason:
        logger.info("programs are traced at each start, because they cannot be kept whole: %s", reason)
    use_compilation_cache(folder)
    return None


def keep_whole(
    folder: Path, architecture: type[CausalLM], lowering: Lowering, num_pages: int
) -> KeptPrograms:
    """Where programs are kept whole in a cache folder.

    Raises:
        CannotIdentifyError: nobody could tell them from others.
    """
    identity = identify(lowering, architecture, num_pages)
    return KeptPrograms(folder / "whole", identity, list(lowering.mesh.devices.flat))


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


def _cut_experts(parallel: ParallelConfig, model: DecoderConfig, mesh: Mesh) -> DecoderConfig:
    """The model with its experts cut over the mesh, and the way that tokens come to them."""
    model = dataclasses.replace(model, expert_parallel_size=mesh.shape["expert"])
    wanted, platform = parallel.expert_exchange, mesh.devices.flat[0].platform
    groups, shares = mesh.shape["data"], mesh.shape["data"] * mesh.shape["expert"]
    if groups > 1 and model.mixture is None:
        raise ValueError("data_parallel_experts=True: the model has no experts; leave it out, for replicas")
    if model.mixture is not None and (experts := model.mixture.routing.experts) % shares:
        raise ValueError(
            f"data_parallel_size={groups}: with data_parallel_experts the model's {experts} experts must be "
            f"a multiple of data_parallel_size * expert_parallel_size={shares}"
        )
    if wanted == "all_to_all" and shares == 1:
        raise ValueError("expert_exchange='all_to_all': needs an expert_parallel_size of at least 2")
    if wanted == "all_to_all" and platform == "cpu":
        raise NotImplementedError("expert_exchange='all_to_all': XLA on CPU cannot send rows so; use 'sum'")
    sends = wanted == "all_to_all" or (wanted == "auto" and platform == "tpu")
    if model.mixture is None or shares == 1 or not sends:
        return model
    return dataclasses.replace(model, mixture=dataclasses.replace(model.mixture, exchange=exchange_ragged))


def _copy_experts(parallel: ParallelConfig, model: DecoderConfig, mesh: Mesh) -> DecoderConfig:
    """The model with slots for its experts to move between, where the config asks for that."""
    if not parallel.enable_eplb:
        return model
    redundant, groups = parallel.num_redundant_experts, mesh.shape["data"]
    devices = groups * mesh.shape["expert"]
    if model.mixture is None or devices == 1:
        raise ValueError(
            "enable_eplb=True: needs a model with experts, and an expert_parallel_size above 1 or "
            "data_parallel_experts"
        )
    experts = model.mixture.routing.experts
    if redundant % devices or redundant > experts * (devices - 1):
        sizes = "data_parallel_size * expert_parallel_size" if groups > 1 else "expert_parallel_size"
        raise ValueError(
            f"num_redundant_experts={redundant}: must be a multiple of {sizes}={devices} and at "
            f"most {experts * (devices - 1)}, which put all {experts} experts on every device"
        )
    copies = Copies(experts, redundant, devices)
    return dataclasses.replace(model, mixture=dataclasses.replace(model.mixture, copies=copies))


def read_model(
    config: EngineConfig, checkpoint: Checkpoint, architecture: type[CausalLM], mesh: Mesh
) -> DecoderConfig:
    """The model's sizes, cut for the mesh.

    Raises:
        ValueError: it cannot be cut so, or has something that is not supported.
    """
    dtype = checkpoint.dtype if config.model.dtype == "auto" else jnp.dtype(config.model.dtype)
    wanted = config.model.max_model_len
    model = architecture.read_config(
        checkpoint.config, dtype=dtype, tensor_parallel_size=mesh.shape["tensor"], max_model_len=wanted
    )
    model = _copy_experts(config.parallel, _cut_experts(config.parallel, model, mesh), mesh)
    if wanted is not None and wanted > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={wanted}: the model has positions up to {model.max_position_embeddings}; lower it"
        )
    return model
