"""Makes plans of a model: compiles its steps for a layout, and reads what they need."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from converters.blank import BlankCheckpoint
from converters.checkpoint import Checkpoint
from jaxllm.config import EngineConfig
from jaxllm.engine.loading import read_model
from jaxllm.engine.waiting import waiting
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.registry import ModelRegistry
from jaxllm.plan.estimate import Estimator, StageWork
from jaxllm.plan.kernels import Kernels
from jaxllm.plan.layout import Layout
from jaxllm.plan.memory import count_requests, describe_memory, fit_memory, require_weights
from jaxllm.plan.options import PLANNED
from jaxllm.plan.placement import stage_hops, stage_places, stage_torus
from jaxllm.plan.plan import Plan, StagePlan
from jaxllm.plan.programs import StepPrograms, make_programs
from jaxllm.plan.saving import save_programs
from jaxllm.plan.source import open_configs
from jaxllm.plan.step import Step
from jaxllm.plan.workload import Workload
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.memory import PROBE_PAGES
from pallas_kernels.targets import Target

LOGIT_BYTES = 4
"""Logits are in float32."""


@dataclass(frozen=True)
class Planner:
    """Makes plans of one model, for one layout after the other.

    Attributes:
        few_layers: compile models of a few layers, and extrapolate from them.
        progress: say on stderr what is being compiled.
        where: said there instead of the layout's chips; of a search, how far it is and which layout it tries.
    """

    config: EngineConfig
    checkpoint: Checkpoint
    architecture: type[CausalLM]
    workload: Workload
    few_layers: bool = False
    progress: bool = True
    where: str | None = None

    def layout(self, target: Target, data: int | None, *, data_parallel_experts: bool) -> Layout:
        """Cut as the config says; see `Layout.make`."""
        sizes = self.config.parallel
        return Layout.make(
            target,
            sizes.tensor_parallel_size,
            sizes.expert_parallel_size,
            data,
            pipeline=sizes.pipeline_parallel_size,
            data_parallel_experts=data_parallel_experts,
        )

    def plan(self, layout: Layout, price_per_chip_hour: float | None = None) -> Plan:
        """The plan for a layout; compiles two programs of each stage, or four with `few_layers`.

        Raises:
            NotImplementedError: a kernel that was asked for does not serve the model.
            RuntimeError: the compiler for the chips is not installed.
            ValueError: the model cannot be laid out so, or does not fit; the message says by how much.
        """
        model, programs = self.programs(layout)
        require_weights(self.config, layout, programs.lowerings)
        largest = programs.lowerings[0].buckets.largest.tokens
        prefill = self._compile(programs, "prefill", layout, largest, PROBE_PAGES)
        lowerings, num_pages = fit_memory(self.config, layout, programs.lowerings, prefill)
        first = lowerings[0]
        requests = self._requests(first, num_pages)
        in_a_step = -(-requests // layout.pipeline_parallel_size)
        decode = self._compile(programs, "decode", layout, in_a_step, num_pages)
        places = stage_places([lowering.mesh for lowering in lowerings], layout.replica.shape)
        stages = tuple(
            StagePlan(
                (own.layers.start, own.layers.stop),
                tuple(places[index]),
                describe_memory(layout, lowering, num_pages, prefill[index], decode[index]),
                prefill[index],
                decode[index],
            )
            for index, (own, lowering) in enumerate(zip(programs.stages, lowerings, strict=True))
        )
        works = [_work(lowering, stages, layout) for lowering in lowerings]
        estimator = Estimator(layout, first.buckets, works)
        max_model_len = first.sizes.max_model_len
        return Plan(
            model=self.config.model.model,
            layout=layout,
            dtype=jnp.dtype(model.dtype).name,
            num_layers=model.num_layers,
            weight_bytes=sum(
                param.size * param.dtype.itemsize for lowering in lowerings for param in lowering.params
            ),
            attention_backend=first.backend.name,
            max_model_len=max_model_len,
            stages=stages,
            full_requests=count_requests(first, num_pages, max_model_len),
            workload_requests=count_requests(first, num_pages, self.workload.length),
            compiled_layers=programs.compiled_layers,
            extrapolated=programs.extrapolated,
            workload=self.workload,
            estimate=estimator.estimate(self.workload, requests, price_per_chip_hour),
        )

    def programs(self, layout: Layout) -> tuple[DecoderConfig, StepPrograms]:
        """The model cut for the layout, and its programs, none of which is compiled yet."""
        meshes = layout.meshes()
        model = read_model(self.config, self.checkpoint, self.architecture, meshes[0])
        if (dtype := jnp.dtype(model.dtype)) != jnp.bfloat16:
            raise ValueError(f"dtype={dtype.name}: rates are known for bfloat16; give dtype='bfloat16'")
        self.workload.check(self.config.model.max_model_len or model.max_position_embeddings)
        return model, make_programs(self.config, self.architecture, model, meshes, few_layers=self.few_layers)

    def save(self, plan: Plan, folder: Path) -> str:
        """Keeps all programs of a plan, see `jaxllm.plan.saving`, and says how an engine finds them."""
        _, programs = self.programs(plan.layout)
        stages = [lowering.with_max_model_len(plan.max_model_len) for lowering in programs.lowerings]
        pages = plan.memory.num_pages
        count = save_programs(folder, self.architecture, stages, pages + 1, progress=self.progress)
        return (
            f"{count} programs are in {folder}; an engine with the same options and --num-pages {pages} "
            f"--max-model-len {plan.max_model_len} --compilation-cache-dir {folder} looks for them there"
        )

    @property
    def uncut_model(self) -> DecoderConfig:
        """The model on one chip."""
        return self.architecture.read_config(
            self.checkpoint.config, dtype=jnp.bfloat16, tensor_parallel_size=1
        )

    @property
    def quantization(self) -> str | None:
        """How weights are quantized that the engine unpacks when it loads them; None: they are not."""
        return self.checkpoint.quantization if isinstance(self.checkpoint, BlankCheckpoint) else None

    def _requests(self, lowering: Lowering, num_pages: int) -> int:
        """At a time on each replica, or in each data group."""
        sizes, length = lowering.sizes, self.workload.length
        # each has a token in every step, or in one of as many as there are stages
        most = min(sizes.max_num_seqs, lowering.stage.count * sizes.max_num_batched_tokens)
        fitting = min(count_requests(lowering, num_pages, length), most)
        wanted = self.workload.concurrency
        if fitting < (wanted or 1):
            raise ValueError(
                f"concurrency={wanted or 1}: {num_pages - 1} pages, max_num_seqs={sizes.max_num_seqs} and "
                f"max_num_batched_tokens={sizes.max_num_batched_tokens} hold {fitting} requests of {length} "
                "tokens; lower it, input_len or output_len"
            )
        return wanted or fitting

    def _compile(
        self, programs: StepPrograms, kind: str, layout: Layout, tokens: int, pages: int
    ) -> tuple[Step, ...]:
        size = programs.lowerings[0].buckets.fit(tokens).tokens
        where = self.where or f"Compiling for {layout.replica}, {layout.replica_chips} chips"
        with waiting(f"{where}: {kind}, {size} tokens", progress=self.progress):
            return programs.steps(tokens, pages)


def _work(lowering: Lowering, stages: Sequence[StagePlan], layout: Layout) -> StageWork:
    """What a stage has to do."""
    stage, model = lowering.stage, lowering.model
    own, following = stages[stage.index], stages[(stage.index + 1) % len(stages)]
    layers, grouped = range(*own.layers), own.prefill.grouped_kernels
    return StageWork(
        Kernels.of(model, layers, lowering.mesh, lowering.sizes.page_size, grouped),
        own.decode,
        own.prefill,
        LOGIT_BYTES * model.vocab_size if stage.is_last else 0,
        stage_torus(own.chips[: layout.group_chips]),
        stage_hops(own.chips, following.chips),
        stage_torus(own.chips) if layout.num_groups > 1 else (),
    )


def planner_of(
    model: str, workload: Workload, *, few_layers: bool = False, options: Mapping[str, Any]
) -> Planner:
    """What makes plans of a model.

    Args:
        options: of the engine.

    Raises:
        CheckpointError: the model's config cannot be found, read or reached.
        TypeError: an option that no plan depends on, or that is unknown.
        ValueError: an option out of range, or a model of a family that is not served.
    """
    if unused := sorted(set(options).difference(PLANNED)):
        raise TypeError(f"{unused[0]}: no option of plans; there are {', '.join(sorted(PLANNED))}")
    config = EngineConfig.create(model, **options)
    with closing(open_configs(config.model)) as checkpoint:
        if config.model.dtype == "auto" and not _names_dtype(checkpoint.config):
            # the weights would tell, which are not here; the chips' rates are for bfloat16
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
        architecture = ModelRegistry.resolve(checkpoint.config)
        return Planner(config, checkpoint, architecture, workload, few_layers, config.compile.progress)


def _names_dtype(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json says what its weights are."""
    return any(hf.get(name) is not None for name in ("dtype", "torch_dtype"))
