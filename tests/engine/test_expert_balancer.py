"""Experts that move to other devices while requests run: the same tokens, and more even work."""

from typing import Any, cast

import numpy as np
import pytest
from small import golden, greedy, small_engine
from test_parallel_engine import Layout
from test_tensor_parallel_engine import SIZES, collectives

from jaxllm import Engine
from jaxllm.engine.core import RequestFailedError

pytestmark = pytest.mark.usefixtures("quick_compile")

BALANCED: dict[str, Any] = SIZES | {"enable_eplb": True, "eplb_step_interval": 3}
COPIES = {"expert_parallel_size": 4, "num_redundant_experts": 4}
GROUPS = {"data_parallel_size": 2, "data_parallel_experts": True}
Weights = dict[str, list[np.ndarray]]
"""For each weight of experts, by its path and stage, those of each expert, copies after one another."""


def run(engine: Engine, model: str) -> list[list[int]]:
    prompts = [golden(model)[f"prompt{row}"].tolist() for row in (0, 1)]
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, greedy(16))]


def expected(model: str) -> list[list[int]]:
    return [golden(model)[f"tokens{row}"].tolist() for row in (0, 1)]


def placed(engine: Engine) -> list[list[list[int]]]:
    """Which expert lies in which slot, of each layer of each stage that has some."""
    return [placement.experts.tolist() for placement in engine._cores[0].runner.placements.values()]


def weights_of_experts(engine: Engine, slots_per_device: int) -> Weights:
    """As they lie on the devices, found by the tables that programs read."""
    found: Weights = {}
    for stage, own in enumerate(engine.get_weights()):
        for path, table in own.items():
            prefix, is_table, _ = path.partition("copies.table")
            for name in [name for name in own if is_table and name.startswith(prefix) and name != path]:
                assert {shard.data.shape[0] for shard in own[name].addressable_shards} == {slots_per_device}
                slots = np.asarray(own[name])
                copies = [slots[places[places >= 0]] for places in np.asarray(table)]
                assert all((one == one[0]).all() for one in copies)
                found[f"{stage} {name}"] = [one[0] for one in copies]
    return found


def check_collectives(engine: Engine) -> None:
    """A step moves no weights: beside what there is without copies, it gathers the counts."""
    for stage in engine._cores[0].runner.stages:
        lowering = stage.lowering
        largest = lowering.buckets.largest
        key = lowering.stage.key(("forward", largest.tokens, largest.rows))
        found = collectives(engine._cores[0].runner.programs[key].as_text())
        kinds = [kind for _, kind in found]
        layers = len(lowering.stage.layers(lowering.model.num_layers))
        assert kinds.count("all-reduce") == lowering.stage.is_first + 2 * layers
        assert set(kinds) == {"all-reduce", "all-gather"}
        gathered = [shape for shape, kind in found if kind == "all-gather" and not shape.startswith("f32")]
        assert len(gathered) == 1
        assert gathered[0].startswith("s32"), gathered
        assert kinds.count("all-gather") == 1 + lowering.stage.is_last


@pytest.mark.parametrize(
    ("model", "layout", "redundant"),
    [
        ("mixtral", Layout(expert=4), 4),
        ("mixtral", Layout(expert=2, stage=2), 0),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_experts_move_and_tokens_stay(model: str, layout: Layout, redundant: int) -> None:
    with small_engine(model, **layout.options, **BALANCED, num_redundant_experts=redundant) as engine:
        mixture = engine._parts.model.mixture
        assert mixture is not None
        share = (mixture.routing.experts + redundant) // layout.expert
        places, weights = placed(engine), weights_of_experts(engine, share)
        assert weights
        assert run(engine, model) == expected(model)
        late = engine.get_metrics()["programs_compiled_late_total"]
        again = placed(engine)
        assert again != places
        assert run(engine, model) == expected(model)
        assert placed(engine) != again
        figures = engine.get_metrics()
        assert figures["programs_compiled_late_total"] == late  # tables are inputs of the same programs
        assert figures["expert_rebalances_total"] > 1
        moved = weights_of_experts(engine, share)
        for path, experts in weights.items():
            np.testing.assert_array_equal(moved[path], experts)
        check_collectives(engine)


def test_the_fullest_device_gets_less() -> None:
    """The same requests before and after; also after sleeps, one of which loads the weights again."""
    options = BALANCED | COPIES | {"eplb_step_interval": 21}
    options |= {"expert_metrics": True, "enable_prefix_caching": False}
    prompts = [[7] * 80, [7] * 80]  # which go to few experts
    with small_engine("mixtral", **options) as engine:
        even = placed(engine)
        first = engine.generate(prompts, greedy(4))
        figures = engine.get_metrics()
        assert figures["expert_rebalances_total"] == 1
        assert figures["expert_imbalance_before"] > 1.5
        engine.generate(prompts, greedy(4))
        figures = engine.get_metrics()
        assert 1 <= figures["expert_imbalance_before"] < 1.2  # and then there is nothing to be gained
        assert figures["expert_rebalances_total"] == 1
        tokens = engine.metrics.expert_tokens
        assert tokens is not None
        np.testing.assert_array_equal(tokens.sum(axis=1), 3 * figures["scheduled_tokens_total"])
        busy = placed(engine)
        assert busy != even
        for level, places in ((1, busy), (2, even)):
            engine.sleep(level)
            engine.wake_up()
            assert placed(engine) == places
            outputs = engine.generate(prompts[:1], greedy(4))
            assert outputs[0].outputs[0].token_ids == first[0].outputs[0].token_ids


def fail_to_move(engine: Engine, replica: int, how: str) -> list[Any]:
    """Has the first move of a layer's last weight fail: at once, or on the device, which shows later.

    Returns:
        What grows by one with each move of such a weight.
    """
    runner, calls = engine._cores[replica].runner, []
    key = runner.lowering.gather_programs[-1]
    program = runner.programs[key]

    def move(weight: Any, source: Any) -> Any:
        calls.append(source)
        if len(calls) == 1 and how == "at once":
            raise RuntimeError("no memory")
        moved = program(weight, source)
        if len(calls) == 1:
            moved.delete()  # nobody can read what the device has failed to make
        return moved

    runner.programs._compiled[key] = cast(Any, move)
    return calls


@pytest.mark.parametrize("how", ["at once", "later"])
def test_weights_that_moved_in_part_are_loaded_again(how: str) -> None:
    """A move that fails ends the requests of its step; others find whole weights, and experts move on."""
    with small_engine("mixtral", **BALANCED | COPIES) as engine:
        before, even = weights_of_experts(engine, 3), placed(engine)
        calls = fail_to_move(engine, 0, how)
        with pytest.raises(RequestFailedError):
            engine.generate([[7] * 5], greedy(16))
        assert len(calls) == 1
        assert placed(engine) == even
        after = weights_of_experts(engine, 3)
        for path, experts in before.items():
            np.testing.assert_array_equal(after[path], experts)
        assert run(engine, "mixtral") == expected("mixtral")
        assert len(calls) > 1
        assert placed(engine) != even
        assert engine.get_metrics()["expert_rebalances_total"] > 0

        engine._core.runner._free()  # weights that could not be loaded again, say
        engine.restart()
        assert placed(engine) == even
        assert run(engine, "mixtral") == expected("mixtral")


def test_replicas_place_their_own() -> None:
    """One whose move fails starts over with other weights, while the other takes its requests."""
    options = BALANCED | COPIES | {"enable_prefix_caching": False}
    with small_engine("mixtral", **options, data_parallel_size=2) as engine:
        assert run(engine, "mixtral") == expected("mixtral")
        own = [
            figures["expert_rebalances_total"]
            for figures in engine.get_replica_metrics().values()
            if "replica_up" in figures
        ]
        assert len(own) == 2
        assert all(own)
        assert engine.get_metrics()["expert_rebalances_total"] == sum(own)

        calls = fail_to_move(engine, 1, "later")
        for _ in range(20):  # it may be out for some of them
            assert run(engine, "mixtral") == expected("mixtral")
            if len(calls) > 1:
                break
        replicas = engine.get_replica_metrics()
        assert [replicas[name]["engine_restarts_total"] for name in "01"] == [0, 1]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("mixtral", {"enable_eplb": True}, "enable_eplb=True: needs .* an expert_parallel_size above 1"),
        (
            "llama",
            {"enable_eplb": True, "tensor_parallel_size": 2},
            "enable_eplb=True: needs a model with exp",
        ),
        ("mixtral", {"num_redundant_experts": 2}, "num_redundant_experts=2: must be 0 without enable_eplb"),
        ("mixtral", {"eplb_step_interval": -1}, "eplb_step_interval=-1: must be 0 or a count"),
        (
            "mixtral",
            {"enable_eplb": True, "num_redundant_experts": -2},
            "num_redundant_experts=-2: must be 0",
        ),
        (
            "mixtral",
            {"enable_eplb": True, "expert_parallel_size": 4, "num_redundant_experts": 2},
            "num_redundant_experts=2: must be a multiple of expert_parallel_size=4",
        ),
        (
            "mixtral",
            GROUPS | {"enable_eplb": True, "expert_parallel_size": 2, "num_redundant_experts": 2},
            r"=2: must be a multiple of data_parallel_size \* expert_parallel_size=4 and at most 24",
        ),
        (
            "mixtral",
            {"enable_eplb": True, "expert_parallel_size": 2, "num_redundant_experts": 10},
            "num_redundant_experts=10: must be .* at most 8, which put all 8 experts on every device",
        ),
    ],
)
def test_what_cannot_be_balanced_is_named(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_engine(model, **options, **SIZES)
