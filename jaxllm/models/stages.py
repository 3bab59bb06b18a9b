"""A model cut into stages: runs of its layers, each on devices of its own (https://arxiv.org/abs/1811.06965)."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllm.layers.batch import Batch, Cache
from jaxllm.models.abstract import Parameter, Structure, merge
from jaxllm.models.base import CausalLM, DecoderConfig
from jaxllm.models.decoder import Decoder


@dataclass(frozen=True)
class Stage:
    """Number `index` of `count` stages; by default a whole model.

    The first one embeds tokens, too, and the last one has the norm and the head.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here, and not hidden states."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether logits leave here."""
        return self.index == self.count - 1

    def key(self, key: Hashable) -> Hashable:
        """The name of one of its programs among those of all stages."""
        return key if self.count == 1 else (self.index, key)

    def layers(self, num_layers: int) -> range:
        """Its layers, of so many. Stages differ by one at most; the last one, with the head, has the fewest.

        Raises:
            ValueError: there are fewer layers than stages.
        """
        if self.count > num_layers:
            raise ValueError(
                f"pipeline_parallel_size={self.count}: must be at most the model's {num_layers} layers"
            )
        begin, end = (-(-num_layers * index // self.count) for index in (self.index, self.index + 1))
        return range(begin, end)


WHOLE = Stage()
"""A model that is not cut."""


def stage_parameters(
    model: type[CausalLM], config: DecoderConfig, parameters: Mapping[str, Parameter], stage: Stage
) -> dict[str, Parameter]:
    """Those that a stage needs, in order. A tied embedding is needed by the first and by the last.

    Raises:
        NotImplementedError: the model is not made of the frame's parts, of which it is known who needs them.
        ValueError: there are fewer layers than stages.
    """
    if stage.count == 1:
        return dict(parameters)
    if not issubclass(model, Decoder):
        raise NotImplementedError(
            f"pipeline_parallel_size={stage.count}: {model.__name__} is no jaxllm.models.decoder.Decoder, "
            "and only those are cut into stages; use tensor_parallel_size"
        )
    ends = {
        *(model.entrance if stage.is_first else ()),
        *(("norm", "embedding" if config.tie_word_embeddings else "head") if stage.is_last else ()),
    }

    layers = stage.layers(config.num_layers)

    def is_needed(path: str) -> bool:
        part, _, rest = path.partition(".")
        return part in ends or (part == "layers" and int(rest.partition(".")[0]) in layers)

    return {path: parameter for path, parameter in parameters.items() if is_needed(path)}


def cut_parameters(
    model: type[CausalLM], config: DecoderConfig, parameters: Mapping[str, Parameter], count: int
) -> list[dict[str, Parameter]]:
    """Those of each of so many stages; raises as `stage_parameters` does."""
    return [stage_parameters(model, config, parameters, Stage(index, count)) for index in range(count)]


StageWeights = tuple[tuple[Array, ...], ...]
"""For each stage its weights, in the order of its parameters."""


def load_stages(
    load: Callable[[Mapping[str, Mesh]], Sequence[Array]],
    parameters: Mapping[str, Parameter],
    parts: Sequence[Mapping[str, Parameter]],
    meshes: Sequence[Mesh],
) -> StageWeights:
    """Every stage's weights, each made or read on the devices of the first stage that needs it.

    Args:
        load: gives the parameters that it is told a mesh of, in order, each on its mesh.
        parts: what `stage_parameters` gives for each stage that is this host's.
        meshes: of these stages.
    """
    home: dict[str, Mesh] = {}
    for part, mesh in zip(parts, meshes, strict=True):
        home |= dict.fromkeys(part.keys() - home.keys(), mesh)
    arrays = dict(zip((path for path in parameters if path in home), load(home), strict=True))
    return tuple(
        tuple(jax.device_put(arrays[path], parameter.kept(mesh).sharding) for path, parameter in part.items())
        for part, mesh in zip(parts, meshes, strict=True)
    )


class StageModel:
    """What a stage runs of a model: called as the model is, with hidden states where it is not the first."""

    def __init__(self, model: Decoder, stage: Stage) -> None:
        self.model = model
        self.stage = stage

    def __call__(
        self, entering: Int[Array, " tokens"] | Float[Array, "tokens embed"], cache: Cache, batch: Batch
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        """Runs the stage's layers; `batch` has the slots of these."""
        x = self.model.embed(entering, batch) if self.stage.is_first else entering
        layers = self.stage.layers(self.model.config.num_layers)
        x, cache = self.model.run_layers(x, cache, batch, layers)
        return self.model.norm(x) if self.stage.is_last else x, cache

    def logits(self, hidden: Float[Array, "n embed"]) -> Float[Array, "n vocab"]:
        """The model's, which only the last stage can compute."""
        return self.model.logits(hidden)


def stage_merge(
    structure: Structure, parameters: Iterable[str], part: Iterable[str], stage: Stage
) -> Callable[[Sequence[Array]], CausalLM | StageModel]:
    """Makes of a stage's arrays what it runs. What belongs to other stages has shapes there and no arrays.

    Args:
        parameters: the whole model's, by path, in order.
        part: the stage's.
    """
    if stage.count == 1:
        return partial(merge, structure)
    place_of = {path: place for place, path in enumerate(parameters)}
    places = [place_of[path] for path in part]

    def make(arrays: Sequence[Array]) -> StageModel:
        leaves = jax.tree.leaves(structure.state)
        for place, array in zip(places, arrays, strict=True):
            leaves[place] = array
        model = merge(structure, leaves)
        assert isinstance(model, Decoder)
        return StageModel(model, stage)

    return make
