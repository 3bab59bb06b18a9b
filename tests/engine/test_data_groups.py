"""One engine with data groups: attention and pages are a group's own, experts lie over all devices."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from small import golden, greedy, small_engine
from small_text import text_checkpoint
from test_expert_balancer import placed, weights_of_experts
from test_tensor_parallel_engine import SIZES, run

from jaxllm import Engine, SamplingParams, StructuredOutputsParams
from jaxllm.config import ParallelConfig
from jaxllm.parallel import make_mesh
from pallas_kernels.targets.compiled import COLLECTIVES, CompiledText

pytestmark = pytest.mark.usefixtures("quick_compile")


class Layout(NamedTuple):
    """Devices along the mesh's axes."""

    data: int
    expert: int = 1
    tensor: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """As the engine is told."""
        return {
            "data_parallel_size": self.data,
            "data_parallel_experts": True,
            "expert_parallel_size": self.expert,
            "tensor_parallel_size": self.tensor,
        }

    @property
    def group(self) -> int:
        """Devices of a data group."""
        return self.expert * self.tensor


LAYOUTS = {
    "qwen3-moe": [Layout(2, 2)],
    "deepseek-v2": [Layout(4)],
    "gpt-oss": [Layout(4, 1, 2)],
}


@functools.cache
def on_one_device(model: str) -> list[list[int]]:
    """A model's tokens."""
    with small_engine(model, **SIZES) as engine:
        return run(engine, model)


@pytest.mark.parametrize(
    ("model", "layout"),
    [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_same_tokens_as_one_device(model: str, layout: Layout) -> None:
    with small_engine(model, **layout.options, **SIZES) as engine:
        found = run(engine, model)
        assert found[:2] == [golden(model)[f"tokens{row}"].tolist() for row in (0, 1)]
        check_weights(engine, layout)
        check_requests_parts(engine, layout)
        check_collectives(engine, layout)
        again = run(engine, model)
        assert again == found
        assert engine.get_metrics()["prefix_cache_hits_total"] > 0
    assert found == on_one_device(model)


@pytest.mark.parametrize(
    ("model", "layout", "redundant"),
    [("deepseek-v2", Layout(4), 4), ("qwen3-moe", Layout(2, 2, 2), 8)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_experts_move_between_groups(model: str, layout: Layout, redundant: int) -> None:
    """Copies lie on devices of all groups; tokens stay while experts move."""
    options = SIZES | {"enable_eplb": True, "num_redundant_experts": redundant, "eplb_step_interval": 10**6}
    with small_engine(model, **layout.options, **options) as engine:
        mixture = engine._parts.model.mixture
        assert mixture is not None
        share = mixture.slots // (layout.data * layout.expert)
        places, weights = placed(engine), weights_of_experts(engine, share)
        assert run(engine, model) == on_one_device(model)
        assert placed(engine) == places
        engine._core.balancer._interval = 3  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(2):
            assert run(engine, model) == on_one_device(model)
            assert placed(engine) != places
            places = placed(engine)
        assert engine.get_metrics()["expert_rebalances_total"] > 1
        moved = weights_of_experts(engine, share)
        assert moved.keys() == weights.keys()
        for path, experts in weights.items():
            np.testing.assert_array_equal(moved[path], experts)
        check_collectives(engine, layout)
        check_moves(engine, layout)


def check_moves(engine: Engine, layout: Layout) -> None:
    """Experts go from device to device of all groups, among those that have the same part of each."""
    runner = engine._core.runner  # pyright: ignore[reportAttributeAccessIssue]
    for key in runner.lowering.gather_programs:
        text = runner.programs[key].as_text()
        assert text is not None
        found = [one for one in CompiledText.parse(text).instructions if one.opcode in COLLECTIVES]
        assert found
        for one in found:
            assert one.opcode == "all-reduce"
            same_part = np.arange(layout.data * layout.group).reshape(-1, layout.tensor).T
            assert one.device_groups == same_part.tolist()


def check_weights(engine: Engine, layout: Layout) -> None:
    """No device has more of the experts than its share of all devices; the rest is cut within a group."""
    share = {"experts": layout.data * layout.expert, "expert_mlp": layout.tensor}
    parameters = engine._parts.weight_sources[0].parameters
    experts = 0
    for path, array in engine.get_weights()[0].items():
        axes = [axis for axis in parameters[path].axes if axis not in (None, "embed", "positions")]
        pieces = np.prod([share.get(axis, layout.group) for axis in axes], initial=1)
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // pieces}, path
        assert len(array.devices()) == layout.data * layout.group
        experts += "experts" in axes
    assert experts


def check_requests_parts(engine: Engine, layout: Layout) -> None:
    """A group's pages and rows are on its devices alone."""
    lowering, num_pages = engine._core.runner.lowering, engine._core.runner.num_pages  # pyright: ignore[reportAttributeAccessIssue]
    _, pools, rows = engine._core.runner.stages[0].arrays  # pyright: ignore[reportAttributeAccessIssue]
    group_of = {
        device: group for group in range(layout.data) for device in lowering.mesh.devices[:, group].flat
    }
    parts = [(pool, num_pages) for pool in pools]
    parts += [(array, lowering.table_shape[1]) for array in jax.tree.leaves(rows)]
    for array, size in parts:
        axis = array.shape.index(layout.data * size)
        for shard in array.addressable_shards:
            first = group_of[shard.device] * size
            assert shard.index[axis] == slice(first, first + size, None)
    for pool in pools:
        assert {shard.data.size for shard in pool.addressable_shards} == {
            pool.size // (layout.data * layout.group)
        }


def check_collectives(engine: Engine, layout: Layout) -> None:
    """Between data groups tokens go to experts and come back; within one it is as in an engine alone."""
    runner = engine._core.runner  # pyright: ignore[reportAttributeAccessIssue]
    lowering = runner.lowering
    largest, model = lowering.buckets.largest, lowering.model
    text = runner.programs["forward", largest.tokens, largest.rows].as_text()
    assert text is not None
    assert model.mixture is not None
    between: Counter[tuple[str, str]] = Counter()
    within: Counter[str] = Counter()
    for one in CompiledText.parse(text).instructions:
        if one.opcode not in COLLECTIVES:
            continue
        crossing = {len({device // layout.group for device in group}) for group in one.device_groups}
        if crossing != {1}:
            assert crossing == {layout.data}
            between[one.opcode, one.result.partition("{")[0]] += 1
        elif len(one.device_groups[0]) > 1:
            within[one.opcode] += 1
    mixtures = model.num_layers - len(model.dense_layers)
    everywhere, chosen = layout.data * largest.tokens, model.mixture.routing.per_token
    assert between == {
        ("all-gather", f"f32[{everywhere},{model.hidden_size}]"): mixtures,
        ("all-gather", f"s32[{everywhere},{chosen}]"): mixtures,
        ("all-gather", f"f32[{everywhere},{chosen}]"): mixtures,
        ("reduce-scatter", f"f32[{largest.tokens},{model.hidden_size}]"): mixtures,
    }
    counts = bool(lowering.experts) and layout.expert > 1
    alone = {"all-reduce": 1 + 2 * model.num_layers, "all-gather": 1 + counts}
    assert within == ({} if layout.group == 1 else alone)


def test_everything_else_works() -> None:
    """Prompts' logprobs, penalties, chunks, preemption, prefixes, samples, sleep: as on one device."""
    prompts = [golden("qwen3-moe")["prompt0"].tolist(), *([n, *range(3, 30)] for n in range(6))]
    params = [greedy(20, logprobs=2, prompt_logprobs=1), *[greedy(24, presence_penalty=0.5)] * 5]
    params.append(SamplingParams(n=3, seed=3, max_tokens=9, ignore_eos=True, detokenize=False))
    options = {"num_pages": 25, "max_model_len": 96, "max_num_batched_tokens": 16, "expert_metrics": True}
    found = []
    for layout in ({}, Layout(2, 2).options):
        with small_engine("qwen3-moe", **options, **layout) as engine:
            outputs = engine.generate(prompts, params)
            metrics, experts = engine.get_metrics(), engine.metrics.expert_tokens
            assert experts is not None
            np.testing.assert_array_equal(experts.sum(axis=1), 3 * metrics["scheduled_tokens_total"])
            assert metrics["preemptions_total"] > 0
            assert metrics["requests_finished_length_total"] == 7
            assert metrics["generation_tokens_total"] == 20 + 5 * 24 + 3 * 9
            assert metrics["num_pages"] == 25 * layout.get("data_parallel_size", 1)
            for level in (1, 2):
                engine.sleep(level)
                engine.wake_up()
            outputs += engine.generate(prompts[:3], params[:3])
            assert engine.get_metrics()["programs_compiled_late_total"] == 0
            assert engine.get_metrics()["pages_used"] == 0
        found.append([(o.outputs, _numbers(o.prompt_logprobs)) for o in outputs])
    for (one, one_prompt), (two, two_prompt) in zip(*found, strict=True):
        assert [output.token_ids for output in one] == [output.token_ids for output in two]
        np.testing.assert_allclose(one_prompt, two_prompt, atol=1e-4)
        np.testing.assert_allclose(_numbers(one[0].logprobs), _numbers(two[0].logprobs), atol=1e-4)


def _numbers(logprobs: Any) -> list[float]:
    return [entry.logprob for position in logprobs or [] if position for entry in position.values()]


def test_aborts_failures_and_grammars(tmp_path: Path) -> None:
    """Requests of both groups end as they should, and those after them have all pages."""
    folder = text_checkpoint(tmp_path, model="qwen3-moe")
    options = SIZES | Layout(2).options | {"dtype": "float32", "page_size": 4, "max_num_seqs": 2}
    with Engine.from_pretrained(str(folder), progress=False, compilation_cache=False, **options) as engine:
        chosen = [["yes", "no"], ["left", "right"], ["up"]]
        held = [
            SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(choice=words))
            for words in chosen
        ]
        outputs = engine.generate(["a", "b", "c"], held)
        assert all(one.outputs[0].text in words for one, words in zip(outputs, chosen, strict=True))

        for name in "abcdef":
            engine.add_request(name, [5, ord(name), 7], greedy(6))
        engine.step()
        metrics = engine.get_metrics()
        assert (metrics["requests_running"], metrics["requests_waiting"]) == (4, 2)
        assert engine.max_num_seqs == 4
        engine.abort_request("a")
        engine.abort_request("b")
        engine.abort_request("f")
        ended = [one.request_id for one in drain(engine) if one.finished]
        assert sorted(ended) == ["c", "d", "e"]

        runner = engine._core.runner  # pyright: ignore[reportAttributeAccessIssue]
        forward = runner.stages[0].forward

        def fail(*_: Any) -> None:
            raise RuntimeError("lost")

        for name in "ghi":
            engine.add_request(name, [5, ord(name), 7], greedy(6))
        engine.step()
        runner.stages[0].forward = fail
        failed = engine.step()
        runner.stages[0].forward = forward
        failed += drain(engine)
        reasons = {one.request_id: one.outputs[0].finish_reason for one in failed if one.finished}
        assert reasons == dict.fromkeys("ghi", "error")
        metrics = engine.get_metrics()
        assert metrics["pages_used"] == 0
        assert metrics["requests_finished_abort_total"] == 3
        assert metrics["requests_finished_error_total"] == 3
        alone = [engine.generate([[5, ord("c"), 7]], greedy(6))[0].outputs[0].token_ids for _ in range(2)]
        assert alone[0] == alone[1]


def drain(engine: Engine) -> list[Any]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", Layout(2).options, "data_parallel_experts=True: the model has no experts"),
        (
            "mixtral",
            Layout(3).options,
            r"data_parallel_size=3: .* the model's 8 experts must be a multiple of",
        ),
        (
            "mixtral",
            Layout(8, 2).options,
            "data_parallel_size=8 \\* expert_parallel_size=2: there are only 8 devices",
        ),
        (
            "mixtral",
            Layout(1).options,
            "data_parallel_experts=True: must be left out with a data_parallel_size",
        ),
        (
            "mixtral",
            Layout(2).options | {"pipeline_parallel_size": 2},
            "pipeline_parallel_size=2: must be 1 with data_parallel_experts",
        ),
        (
            "mixtral",
            Layout(2).options | {"mesh": make_mesh(2)},
            "mesh: axis 'data' has 1 devices; set data_parallel_size=1",
        ),
        (
            "mixtral",
            Layout(2).options | {"expert_exchange": "all_to_all"},
            "expert_exchange='all_to_all': XLA on CPU cannot",
        ),
    ],
)
def test_what_cannot_be_is_named(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        small_engine(model, **(SIZES | options))


def test_several_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match="data_parallel_size=2: must be 1 with several hosts"):
        ParallelConfig(
            data_parallel_size=2, data_parallel_experts=True, num_hosts=2, coordinator_address="host"
        )


def test_a_mesh_of_ones_own() -> None:
    mesh = make_mesh(1, jax.devices()[4:], data_parallel_size=2, expert_parallel_size=2)
    options = SIZES | {"data_parallel_size": 2, "data_parallel_experts": True, "mesh": mesh}
    with small_engine("mixtral", **options) as engine:
        assert run(engine, "mixtral")[0] == golden("mixtral")["tokens0"].tolist()
        arrays = jax.tree.leaves(engine._core.runner.stages[0].arrays)  # pyright: ignore[reportAttributeAccessIssue]
        assert {device for array in arrays for device in array.devices()} == set(jax.devices()[4:])
