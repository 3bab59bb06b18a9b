"""Compiles the steps of a model for a layout: of all its layers, or of few and extrapolated."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import Mesh

from jaxllm.config import EngineConfig
from jaxllm.engine.sizing import make_stages
from jaxllm.models import abstract
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.stages import cut_parameters
from jaxllm.plan.step import Step, compile_step, on_line
from jaxllm.runner.kernels import choose_attention
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.products import choose_products


@dataclass(frozen=True)
class StagePrograms:
    """The forward passes of one stage of a model on its mesh; of all of it where it has one stage.

    Attributes:
        few: the same for two models whose stages have few layers: how many, and what lowers them. Empty: what
            is asked for is compiled with all layers.
    """

    lowering: Lowering
    few: tuple[tuple[int, Lowering], ...] = ()

    @property
    def layers(self) -> range:
        """The stage's own."""
        return self.lowering.stage.layers(self.lowering.model.num_layers)

    def step(self, compile: Callable[[Lowering], Step]) -> Step:
        """A step of the stage, from what `compile` makes of lowerings."""
        if not self.few:
            return compile(self.lowering)
        (small, first), (large, second) = self.few
        share = (len(self.layers) - small) / (large - small)
        # the compiler lets layers share code as it sees fit, which does not grow with their number
        return dataclasses.replace(on_line(compile(first), compile(second), share), code=0)


@dataclass(frozen=True)
class StepPrograms:
    """The forward passes of a model's stages."""

    stages: tuple[StagePrograms, ...]

    @property
    def lowerings(self) -> list[Lowering]:
        """Of the stages, with all of their layers."""
        return [stage.lowering for stage in self.stages]

    @property
    def compiled_layers(self) -> tuple[int, ...]:
        """Numbers of layers of the models, or of the stages, that are compiled."""
        few = tuple(count for count, _ in self.stages[0].few)
        return few or tuple(dict.fromkeys(len(stage.layers) for stage in self.stages))

    @property
    def extrapolated(self) -> bool:
        """Whether models of few layers stand for this one."""
        return bool(self.stages[0].few)

    def steps(self, tokens: int, num_pages: int) -> tuple[Step, ...]:
        """Of each stage, the step of the smallest bucket that holds so many tokens.

        Stages that are alike but for the chips that they are on are compiled once.
        """
        compiled: dict[Hashable, Step] = {}

        def compile(lowering: Lowering) -> Step:
            key = _likeness(lowering)
            if key not in compiled:
                compiled[key] = compile_step(lowering, lowering.buckets.fit(tokens), num_pages)
            return compiled[key]

        return tuple(stage.step(compile) for stage in self.stages)


def _likeness(lowering: Lowering) -> Hashable:
    """What tells a stage's programs from those of the model's other stages."""
    stage, kinds = lowering.stage, _layer_kinds(lowering.model)
    layers = stage.layers(lowering.model.num_layers)
    return stage.is_first, stage.is_last, lowering.layout.slots, tuple(kinds[layer] for layer in layers)


def make_programs(
    config: EngineConfig,
    architecture: type[CausalLM],
    model: DecoderConfig,
    meshes: Sequence[Mesh],
    *,
    few_layers: bool = False,
) -> StepPrograms:
    """The programs as the engine would have them, none of which is compiled yet.

    Args:
        meshes: of the stages.

    Raises:
        NotImplementedError: a kernel that was asked for does not serve the model, or it has no stages.
        ValueError: it has fewer layers than stages.
    """
    lower = partial(_lower, config, architecture, meshes)
    counts = few_layer_counts(model, len(meshes)) if few_layers else None
    few = [lower(_with_layers(model, count * len(meshes))) for count in counts or ()]
    return StepPrograms(
        tuple(
            StagePrograms(lowering, tuple(zip(counts or (), (each[index] for each in few), strict=True)))
            for index, lowering in enumerate(lower(model))
        )
    )


def _lower(
    config: EngineConfig, architecture: type[CausalLM], meshes: Sequence[Mesh], model: DecoderConfig
) -> list[Lowering]:
    attention = choose_attention(config.compile.attention_backend, model, meshes[0], config.cache.page_size)
    products = choose_products(config.compile.matmul_backend, model, meshes[0])
    with jax.set_mesh(meshes[0]):
        structure, parameters = abstract.split(architecture, model, products.backend)
    parts = cut_parameters(architecture, model, parameters, len(meshes))
    return make_stages(
        config, model, structure, parameters, parts, meshes, attention.backend, products.backend
    )


def few_layer_counts(model: DecoderConfig, stages: int = 1) -> tuple[int, int] | None:
    """Two numbers of layers to draw a line through, each with all kinds in the model's own proportions.

    Both are fewer than any stage has. None where those have too few for that, or layers do not repeat.
    """
    layers, kinds = model.num_layers, _layer_kinds(model)
    period = next(n for n in range(1, layers + 1) if all(kinds[i] == kinds[i % n] for i in range(layers)))
    small = period * -(-2 // period)
    return (small, 2 * small) if 2 * small < layers // stages else None


def _layer_kinds(model: DecoderConfig) -> list[Hashable]:
    """For each layer what tells it from layers of other kinds."""
    dense = [layer in model.dense_layers for layer in range(model.num_layers)]
    return list(zip(dense, *(getattr(model, name) for name in _layer_fields(model)), strict=True))


def _with_layers(model: DecoderConfig, count: int) -> DecoderConfig:
    cut = {name: getattr(model, name)[:count] for name in _layer_fields(model)}
    dense = frozenset(layer for layer in model.dense_layers if layer < count)
    return dataclasses.replace(model, num_layers=count, dense_layers=dense, **cut)


def _layer_fields(model: DecoderConfig) -> list[str]:
    """Fields that have an entry for each layer."""
    return [
        field.name
        for field in dataclasses.fields(model)
        if isinstance(value := getattr(model, field.name), tuple) and len(value) == model.num_layers
    ]
