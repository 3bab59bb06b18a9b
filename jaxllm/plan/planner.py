"""Makes plans of a model: compiles its steps for a layout, and reads what they need."""

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from converters.checkpoint import Checkpoint
from jaxllm.config import EngineConfig
from jaxllm.engine.loading import read_model
from jaxllm.engine.waiting import waiting
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.registry import ModelRegistry
from jaxllm.plan.estimate import Estimator
from jaxllm.plan.kernels import Kernels
from jaxllm.plan.layout import Layout
from jaxllm.plan.memory import count_requests, describe_memory, fit_memory, require_weights
from jaxllm.plan.options import PLANNED
from jaxllm.plan.plan import Plan
from jaxllm.plan.programs import StepPrograms, make_programs
from jaxllm.plan.saving import save_programs
from jaxllm.plan.source import open_configs
from jaxllm.plan.step import Step
from jaxllm.plan.workload import Workload
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.memory import PROBE_PAGES

LOGIT_BYTES = 4
"""Logits are in float32."""


@dataclass(frozen=True)
class Planner:
    """Makes plans of one model, for one layout after the other.

    Attributes:
        few_layers: compile models of a few layers, and extrapolate from them.
        progress: say on stderr what is being compiled.
    """

    config: EngineConfig
    checkpoint: Checkpoint
    architecture: type[CausalLM]
    workload: Workload
    few_layers: bool = False
    progress: bool = True

    def plan(self, layout: Layout, price_per_chip_hour: float | None = None) -> Plan:
        """The plan for a layout; compiles two programs, or four with `few_layers`.

        Raises:
            NotImplementedError: a kernel that was asked for does not serve the model.
            RuntimeError: the compiler for the chips is not installed.
            ValueError: the model cannot be laid out so, or does not fit; the message says by how much.
        """
        model, programs = self.programs(layout)
        require_weights(self.config, layout, programs.lowering)
        largest = programs.lowering.buckets.largest.tokens
        prefill = self._compile(programs, "prefill", layout, largest, PROBE_PAGES)
        lowering, num_pages = fit_memory(self.config, layout, programs.lowering, prefill)
        requests = self._requests(lowering, num_pages)
        decode = self._compile(programs, "decode", layout, requests, num_pages)
        kernels = Kernels.of(model, lowering.mesh, lowering.sizes.page_size, prefill.grouped_kernels)
        estimator = Estimator(
            layout, lowering.buckets, kernels, decode, prefill, LOGIT_BYTES * model.vocab_size
        )
        max_model_len = lowering.sizes.max_model_len
        return Plan(
            model=self.config.model.model,
            layout=layout,
            dtype=jnp.dtype(model.dtype).name,
            num_layers=model.num_layers,
            weight_bytes=sum(param.size * param.dtype.itemsize for param in lowering.params),
            attention_backend=lowering.backend.name,
            max_model_len=max_model_len,
            memory=describe_memory(layout, lowering, num_pages, prefill, decode),
            full_requests=count_requests(lowering, num_pages, max_model_len),
            workload_requests=count_requests(lowering, num_pages, self.workload.length),
            prefill=prefill,
            decode=decode,
            compiled_layers=programs.compiled_layers,
            workload=self.workload,
            estimate=estimator.estimate(self.workload, requests, price_per_chip_hour),
        )

    def programs(self, layout: Layout) -> tuple[DecoderConfig, StepPrograms]:
        """The model cut for the layout, and its programs, none of which is compiled yet."""
        mesh = layout.mesh()
        model = read_model(self.config, self.checkpoint, self.architecture, mesh)
        if (dtype := jnp.dtype(model.dtype)) != jnp.bfloat16:
            raise ValueError(f"dtype={dtype.name}: rates are known for bfloat16; give dtype='bfloat16'")
        self.workload.check(self.config.model.max_model_len or model.max_position_embeddings)
        return model, make_programs(self.config, self.architecture, model, mesh, few_layers=self.few_layers)

    def save(self, plan: Plan, folder: Path) -> str:
        """Keeps all programs of a plan, see `jaxllm.plan.saving`, and says how an engine finds them."""
        _, programs = self.programs(plan.layout)
        lowering = programs.lowering.with_max_model_len(plan.max_model_len)
        pages = plan.memory.num_pages
        count = save_programs(folder, self.architecture, lowering, pages + 1, progress=self.progress)
        return (
            f"{count} programs are in {folder}; an engine with the same options and --num-pages {pages} "
            f"--max-model-len {plan.max_model_len} --compilation-cache-dir {folder} looks for them there"
        )

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        model = self.architecture.read_config(
            self.checkpoint.config, dtype=jnp.bfloat16, tensor_parallel_size=1
        )
        return model.mixture is not None

    def _requests(self, lowering: Lowering, num_pages: int) -> int:
        """At a time on each replica."""
        sizes, length = lowering.sizes, self.workload.length
        most = min(sizes.max_num_seqs, sizes.max_num_batched_tokens)  # each has a token in every step
        fitting = min(count_requests(lowering, num_pages, length), most)
        wanted = self.workload.concurrency
        if fitting < (wanted or 1):
            raise ValueError(
                f"concurrency={wanted or 1}: {num_pages - 1} pages, max_num_seqs={sizes.max_num_seqs} and "
                f"max_num_batched_tokens={sizes.max_num_batched_tokens} hold {fitting} requests of {length} "
                "tokens; lower it, input_len or output_len"
            )
        return wanted or fitting

    def _compile(self, programs: StepPrograms, kind: str, layout: Layout, tokens: int, pages: int) -> Step:
        size = programs.lowering.buckets.fit(tokens).tokens
        what = f"Compiling for {layout.replica}, {layout.replica_chips} chips: {kind}, {size} tokens"
        with waiting(what, progress=self.progress):
            return programs.step(tokens, pages)


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
