"""Compiles the steps of a model for a layout: of all its layers, or of few and extrapolated."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.config import EngineConfig
from jaxllm.engine.sizing import make_lowering
from jaxllm.models import abstract
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.plan.step import Step, compile_step, on_line
from jaxllm.runner.kernels import choose_attention
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.products import choose_products


@dataclass(frozen=True)
class StepPrograms:
    """The forward passes of a model on a mesh.

    Attributes:
        lowering: of the whole model.
        few: the same for two models of few layers: their number, and what lowers them. Empty: what is asked
            for is compiled with all layers.
    """

    lowering: Lowering
    few: tuple[tuple[int, Lowering], ...] = ()

    @property
    def compiled_layers(self) -> tuple[int, ...]:
        """Numbers of layers of the models that are compiled."""
        return tuple(count for count, _ in self.few) or (self.lowering.model.num_layers,)

    def step(self, tokens: int, num_pages: int) -> Step:
        """The step of the smallest bucket that holds so many tokens."""
        bucket = self.lowering.buckets.fit(tokens)
        if not self.few:
            return compile_step(self.lowering, bucket, num_pages)
        (small, first), (large, second) = self.few
        share = (self.lowering.model.num_layers - small) / (large - small)
        ends = compile_step(first, bucket, num_pages), compile_step(second, bucket, num_pages)
        # the compiler lets layers share code as it sees fit, which does not grow with their number
        return dataclasses.replace(on_line(*ends, share), code=0)


def make_programs(
    config: EngineConfig,
    architecture: type[CausalLM],
    model: DecoderConfig,
    mesh: Mesh,
    *,
    few_layers: bool = False,
) -> StepPrograms:
    """The programs as the engine would have them, none of which is compiled yet.

    Raises:
        NotImplementedError: a kernel that was asked for does not serve the model.
    """
    lower = partial(_lower, config, architecture, mesh)
    counts = few_layer_counts(model) if few_layers else None
    few = () if counts is None else tuple((count, lower(_with_layers(model, count))) for count in counts)
    return StepPrograms(lower(model), few)


def _lower(config: EngineConfig, architecture: type[CausalLM], mesh: Mesh, model: DecoderConfig) -> Lowering:
    attention = choose_attention(config.compile.attention_backend, model, mesh, config.cache.page_size)
    products = choose_products(config.compile.matmul_backend, model, mesh)
    with jax.set_mesh(mesh):
        structure, parameters = abstract.split(architecture, model, products.backend)
    merge: Callable[..., Any] = partial(abstract.merge, structure)
    return make_lowering(config, model, merge, parameters, mesh, attention.backend, products.backend)


def few_layer_counts(model: DecoderConfig) -> tuple[int, int] | None:
    """Two numbers of layers to draw a line through, each with all kinds in the model's own proportions.

    None where the model has too few for that, or layers that do not repeat.
    """
    layers = model.num_layers
    dense = [layer in model.dense_layers for layer in range(layers)]
    kinds = list(zip(dense, *(getattr(model, name) for name in _layer_fields(model)), strict=True))
    period = next(n for n in range(1, layers + 1) if all(kinds[i] == kinds[i % n] for i in range(layers)))
    small = period * -(-2 // period)
    return (small, 2 * small) if 2 * small < layers else None


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
