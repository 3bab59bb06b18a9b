"""Where an engine's weights come from."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from converters.blank import BlankCheckpoint, locate_configs
from converters.checkpoint import Checkpoint, open_checkpoint
from jaxllm.config import EngineConfig
from jaxllm.models import abstract
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.expert_slots import fill_slots, stored_parameters
from jaxllm.models.loading import load_weights
from jaxllm.models.stages import StageWeights, load_stages


@dataclass(frozen=True)
class WeightSource:
    """Where a model's weights come from, onto which mesh."""

    config: EngineConfig
    architecture: type[CausalLM]
    model: DecoderConfig
    parameters: Mapping[str, abstract.Parameter]
    parts: Sequence[Mapping[str, abstract.Parameter]]
    """Those of each stage."""
    meshes: Sequence[Mesh]
    """Of each stage."""

    def __call__(self) -> StageWeights:
        """Loads the weights, or makes random ones, each in its sharding."""
        with closing(open_model(self.config)) as checkpoint:
            return self.load(checkpoint)

    def load(self, checkpoint: Checkpoint) -> StageWeights:
        """The same, of a checkpoint that is open already."""
        copies = None if self.model.mixture is None else self.model.mixture.copies
        stored = stored_parameters(self.parameters, copies)
        parts = [stored_parameters(part, copies) for part in self.parts]

        def load(meshes: Mapping[str, Mesh]) -> tuple[Array, ...]:
            if self.config.model.load_format == "dummy":
                return abstract.materialize(stored, meshes, self.config.model.seed)
            return load_weights(
                checkpoint,
                self.architecture.rules,
                stored,
                self.model.geometry,
                meshes,
                progress=self.config.compile.progress,
            )

        weights = load_stages(load, stored, parts, self.meshes)
        if copies is None:
            return weights
        return tuple(
            fill_slots(own, part, copies, mesh)
            for own, part, mesh in zip(weights, self.parts, self.meshes, strict=True)
        )

    def copy(self, weights: StageWeights) -> StageWeights:
        """The same as they are on other meshes, from device to device."""
        shardings = [
            [parameter.kept(mesh).sharding for parameter in part.values()]
            for part, mesh in zip(self.parts, self.meshes, strict=True)
        ]
        return tuple(
            tuple(jax.device_put(list(arrays), own)) for arrays, own in zip(weights, shardings, strict=True)
        )


def open_model(config: EngineConfig) -> Checkpoint:
    """The model's checkpoint; of dummy weights the configs are enough.

    Raises:
        CheckpointError: it cannot be found, read or recognised.
    """
    model = config.model
    where = {"revision": model.revision, "cache_dir": model.cache_dir, "token": model.token}
    if model.load_format != "dummy":
        return open_checkpoint(model.model, load_format=model.load_format, **where)
    path = locate_configs(model.model, **where)
    return BlankCheckpoint(path) if path.is_dir() else open_checkpoint(str(path))
