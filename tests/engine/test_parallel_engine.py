"""The engine cut in every way: the same tokens, nothing whole that is to be cut, and no needless traffic."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import CHECKPOINTS, OPTIONS, golden, greedy, small_engine
from test_tensor_parallel_engine import SIZES, collectives, run

from jaxllm import Engine
from jaxllm.models import CausalLM, DecoderConfig
from jaxllm.models.stages import Stage, stage_parameters
from jaxllm.runner.stage import StageRunner

pytestmark = pytest.mark.usefixtures("quick_compile")


class Layout(NamedTuple):
    """Devices along the mesh's axes."""

    tensor: int = 1
    expert: int = 1
    stage: int = 1

    @property
    def options(self) -> dict[str, int]:
        """As the engine is told."""
        return {
            "tensor_parallel_size": self.tensor,
            "expert_parallel_size": self.expert,
            "pipeline_parallel_size": self.stage,
        }


# Dense; with full and sliding layers and a tied head; with experts; with biased experts, attention sinks and
# sliding layers; with latents on pages, and some layers without experts. Dense models with tensor parallelism
# alone are in test_tensor_parallel_engine.py.
LAYOUTS = {
    "llama": [Layout(stage=2), Layout(4, 1, 2)],
    "gemma3": [Layout(stage=3), Layout(2, 1, 2)],
    "mixtral": [
        Layout(tensor=2),
        Layout(expert=2),
        Layout(expert=8),
        Layout(2, 2, 1),
        Layout(1, 2, 2),
        Layout(2, 2, 2),
    ],
    "gpt-oss": [Layout(2, 4, 1)],  # and three stages, in test_own_mesh
    "deepseek-v2": [Layout(1, 2, 2)],
}

WHOLE = ("router", "positions", "experts.down.bias", "attention.latent")
"""Matrices that every device of a stage has: small ones, of which each needs all."""


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, list[list[int]]]:
    """Each model's tokens."""
    found = {}
    for model in LAYOUTS:
        with small_engine(model, **SIZES) as engine:
            found[model] = run(engine, model)
    return found


@pytest.mark.parametrize(
    ("model", "layout"),
    [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_cut_engine(model: str, layout: Layout, on_one_device: dict[str, list[list[int]]]) -> None:
    with small_engine(model, **layout.options, **SIZES) as engine:
        check_engine(engine, model, layout, on_one_device[model])


def check_engine(engine: Engine, model: str, layout: Layout, expected: list[list[int]]) -> None:
    """Its tokens, and all that is said of each stage."""
    found = run(engine, model)
    assert found == expected
    assert found[:2] == [golden(model)[f"tokens{row}"].tolist() for row in (0, 1)]
    stages = engine._core.runner.stages
    assert len(stages) == layout.stage
    check_devices(stages, layout)
    for stage in stages:
        check_shards(engine, stage, layout)
        check_collectives(engine, stage, layout)


def check_devices(stages: tuple[StageRunner, ...], layout: Layout) -> None:
    """Stages share no device, and have as many as heads are cut over."""
    used = [
        {device for array in jax.tree.leaves(stage.arrays) for device in array.devices()} for stage in stages
    ]
    assert [len(devices) for devices in used] == [layout.tensor * layout.expert] * layout.stage
    assert len(set.union(*used)) == sum(map(len, used))


def check_shards(engine: Engine, stage: StageRunner, layout: Layout) -> None:
    """A stage has its own layers and no others; on each device lies the share that the axes' names tell."""
    share = {"experts": layout.expert, "expert_mlp": layout.tensor, "embed": 1, "positions": 1, None: 1}
    model, lowering = engine._parts.model, stage.lowering
    weights, pages = engine.get_weights()[lowering.stage.index], engine.get_pages()[lowering.stage.index]
    parameters = engine._parts.weight_sources[0].parameters
    layers = lowering.stage.layers(model.num_layers)
    found = {int(path.split(".")[1]) for path in weights if path.startswith("layers.")}
    assert found == set(layers)
    matrices = 0
    for path, array in weights.items():
        assert parameters[path].packing is not None or array.shape == parameters[path].shape
        pieces = np.prod([share.get(axis, layout.tensor * layout.expert) for axis in parameters[path].axes])
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // pieces}, path
        may_be_whole = array.ndim == 1 or any(part in path for part in WHOLE)
        assert pieces > 1 or may_be_whole or layout.tensor * layout.expert == 1, path
        matrices += array.ndim > 1
    assert matrices >= 2 * len(layers)
    kinds = Counter(model.layer_windows[layer] for layer in layers)
    assert len(pages) == lowering.layout.num_pools <= max(kinds.values())
    for pool in pages:
        pieces = layout.tensor * layout.expert
        assert {shard.data.size for shard in pool.addressable_shards} == {pool.size // pieces}


def check_collectives(engine: Engine, stage: StageRunner, layout: Layout) -> None:
    """A sum for the embedding and two a layer, and a gather of logits; inside a stage nothing else moves."""
    lowering = stage.lowering
    largest = lowering.buckets.largest
    key = lowering.stage.key(("forward", largest.tokens, largest.rows))
    found = collectives(engine._core.runner.programs[key].as_text())
    layers = len(lowering.stage.layers(lowering.model.num_layers))
    expected = {"all-reduce": lowering.stage.is_first + 2 * layers, "all-gather": int(lowering.stage.is_last)}
    alone = layout.tensor * layout.expert == 1
    assert Counter(kind for _, kind in found) == (Counter() if alone else +Counter(expected))


def test_stages_overlap() -> None:
    """The first stage computes a step while the second still works on the one before."""
    with small_engine(pipeline_parallel_size=2, **SIZES) as engine:
        run(engine, "llama")  # so that all programs are there
        _, second = engine._core.runner.stages
        sharding = second.lowering.replicated

        @jax.jit
        def take_long(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, 10**7, lambda i, y: y + 0 * jax.numpy.sin(y + i), x)

        forward, outputs = second.forward, []

        def slow(bucket: Any, hidden: Any, packed: Any) -> Any:
            outputs.append(hidden)
            return forward(bucket, take_long(jax.device_put(hidden, sharding)), packed)

        take_long.lower(jax.ShapeDtypeStruct((2, 64), "float32", sharding=sharding)).compile()
        second.forward = slow
        for name, prompt in (("a", [5]), ("b", [6, 7, 8, 9, 10, 11, 12, 13, 14])):
            engine.add_request(name, prompt, greedy(2))
        while len(outputs) < 2:
            engine.step()
        in_flight = [flight.step for flight in engine._core._in_flight]
        assert len(in_flight) == 2
        outputs[1].block_until_ready()
        assert not in_flight[0].is_done()
        engine.abort_all()


def test_everything_else_works_in_stages() -> None:
    """Prompts' logprobs, penalties, preemption, prefixes, sleep: as on one device."""
    prompts = [golden("llama")["prompt0"].tolist(), *([n, *range(3, 30)] for n in range(6))]
    params = [greedy(20, logprobs=2, prompt_logprobs=1), *[greedy(24, presence_penalty=0.5)] * 6]
    options = {"num_pages": 40, "max_model_len": 96, "max_num_batched_tokens": 16}
    found = []
    for stages in (1, 2):
        with small_engine(pipeline_parallel_size=stages, **options) as engine:
            outputs = engine.generate(prompts, params)
            assert engine.get_metrics()["preemptions_total"] > 0
            for level in (1, 2):
                engine.sleep(level)
                engine.wake_up()
            outputs += engine.generate(prompts[:3], params[:3])
            assert engine.get_metrics()["programs_compiled_late_total"] == 0
        found.append([(o.outputs[0], _numbers(o.prompt_logprobs)) for o in outputs])
    for (one, one_prompt), (two, two_prompt) in zip(*found, strict=True):
        assert one.token_ids == two.token_ids
        np.testing.assert_allclose(one_prompt, two_prompt, atol=1e-4)
        np.testing.assert_allclose(_numbers(one.logprobs), _numbers(two.logprobs), atol=1e-4)


def _numbers(logprobs: Any) -> list[float]:
    return [entry.logprob for position in logprobs or [] if position for entry in position.values()]


def test_programs_of_stages_are_kept(tmp_path: Path, no_jax_cache: None) -> None:
    options = SIZES | {"compilation_cache": True, "compilation_cache_dir": tmp_path, "enforce_eager": False}
    found = []
    for _ in range(2):
        with small_engine(pipeline_parallel_size=2, **options) as engine:
            metrics = engine.get_metrics()
            found.append((metrics["programs"] - metrics["programs_loaded"], run(engine, "llama")))
    (compiled, tokens), again = found
    assert compiled > 0
    assert again == (0, tokens)


def own_mesh(shape: tuple[int, ...], *axes: str) -> Mesh:
    """As somebody makes it with their own choice of axes, of the last devices."""
    return jax.make_mesh(shape, axes, devices=jax.devices()[-math.prod(shape) :])


def test_own_mesh(on_one_device: dict[str, list[list[int]]]) -> None:
    """Axes in any order, those of size one left out."""
    mesh = own_mesh((2, 3), "expert", "stage")
    options = OPTIONS | SIZES | {"mesh": mesh}
    with Engine.from_pretrained(str(CHECKPOINTS / "gpt-oss"), **options) as engine:
        check_engine(engine, "gpt-oss", Layout(1, 2, 3), on_one_device["gpt-oss"])
        devices = [stage.lowering.mesh.devices.ravel().tolist() for stage in engine._core.runner.stages]
        assert devices == mesh.devices.T.tolist()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", {"pipeline_parallel_size": 3}, "pipeline_parallel_size=3: must be at most the model's 2"),
        ("llama", {"expert_parallel_size": 2}, "expert_parallel_size=2: the model has no experts"),
        (
            "mixtral",
            {"expert_parallel_size": 3},
            "num_experts=8: must be a multiple of expert_parallel_size=3",
        ),
        (
            "gpt-oss",
            {"expert_parallel_size": 8, "tensor_parallel_size": 1, "pipeline_parallel_size": 4},
            r"pipeline_parallel_size=4 \* expert_parallel_size=8: there are only 8 devices",
        ),
        ("llama", {"expert_parallel_size": 0}, "expert_parallel_size=0: must be a whole number"),
        (
            "mixtral",
            {"expert_exchange": "all_to_all"},
            "expert_exchange='all_to_all': needs an expert_parall",
        ),
        ("mixtral", {"expert_exchange": "ragged"}, "expert_exchange='ragged': must be one of 'auto', 'sum'"),
        ("llama", {"mesh": own_mesh((2,), "model")}, "mesh: axis 'model' is not one of stage, data, expert"),
        (
            "llama",
            {"mesh": own_mesh((2, 2), "data", "tensor")},
            "mesh: axis 'data' has 2 devices; set data_parallel_size=2",
        ),
        (
            "llama",
            {"mesh": own_mesh((2,), "tensor"), "tensor_parallel_size": 4},
            "tensor_parallel_size=4: the mesh has 2 in its axis 'tensor'",
        ),
    ],
)
def test_what_cannot_be_cut_is_named(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_engine(model, **options, **SIZES)


def test_what_a_platform_or_a_model_lacks_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"expert_exchange='all_to_all': XLA on CPU .*'sum'"):
        small_engine("mixtral", expert_parallel_size=2, expert_exchange="all_to_all", **SIZES)
    with pytest.raises(NotImplementedError, match=r"pipeline_parallel_size=2: CausalLM is no .*Decoder"):
        stage_parameters(CausalLM, cast(DecoderConfig, None), {}, Stage(0, 2))
