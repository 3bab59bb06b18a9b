"""Replicas behind one queue: the same tokens as one engine, near their prefixes, whatever fails."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small import CHECKPOINTS, OPTIONS, golden, greedy, small_engine
from small_text import text_checkpoint

from jaxllm import AsyncEngine, Engine, RequestOutputKind, SamplingParams, StructuredOutputsParams
from jaxllm.engine import restarts
from jaxllm.engine.core import EngineFailedError, RequestFailedError
from jaxllm.engine.replicas import Replicas
from jaxllm.parallel import make_mesh
from jaxllm.scheduler.routing import Candidate, choose_replica

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES: dict[str, Any] = {
    "max_model_len": 96,
    "num_pages": 60,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 8,
    "enforce_eager": True,
}
PROMPTS = [np.random.default_rng(i).integers(3, 125, 5 + 3 * i).tolist() for i in range(12)]


def params(index: int) -> SamplingParams:
    """Greedy, sampled with a seed or without one, several outputs, logprobs, penalties."""
    if index % 2:
        return greedy(12, logprobs=2, prompt_logprobs=1 if index % 3 == 0 else None)
    return SamplingParams(
        temperature=1.0,
        seed=index if index % 3 else None,
        n=1 + index % 3,
        presence_penalty=0.4,
        max_tokens=9,
        ignore_eos=True,
        detokenize=False,
    )


PARAMS = [params(i) for i in range(len(PROMPTS))]


def replicated(**options: Any) -> Engine:
    return small_engine(**(SIZES | {"data_parallel_size": 3} | options))


def replicas_of(engine: Engine) -> Replicas:
    assert isinstance(engine._core, Replicas)
    return engine._core


def answers(engine: Engine) -> list[list[tuple[list[int], Any]]]:
    """Tokens and logprobs of all outputs, and of the prompts."""
    return [
        [(list(sample.token_ids), sample.logprobs) for sample in output.outputs]
        + [([], output.prompt_logprobs)]
        for output in engine.generate(PROMPTS, PARAMS)
    ]


def repeatable(found: list[Any]) -> list[Any]:
    """Those answers that do not depend on the requests before: of the others, the engine draws the seeds."""
    return [answer for i, answer in enumerate(found) if i % 6]


def break_steps(engine: Engine, index: int, when: Callable[[int], bool]) -> None:
    """Lets those steps of a replica fail whose number, from 1 on, `when` says."""
    runner = replicas_of(engine).cores[index].runner
    dispatch, count = runner.dispatch, iter(range(1, 10**6))

    def breaking(*arguments: Any, **options: Any) -> Any:
        if when(next(count)):
            raise RuntimeError("the device is gone")
        return dispatch(*arguments, **options)

    runner.dispatch = breaking  # pyright: ignore[reportAttributeAccessIssue]


def lost_device() -> None:
    raise RuntimeError("no device")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that have failed start over at once."""
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.0)


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    with small_engine(**SIZES) as engine:
        return answers(engine)


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    """One that no test breaks."""
    with replicated() as engine:
        yield engine


def test_the_same_tokens_as_one_engine(shared: Engine, expected: list[Any]) -> None:
    assert answers(shared) == expected
    total, each = shared.get_metrics(), shared.get_replica_metrics()
    assert set(each) == {"0", "1", "2", "front"}
    for name in ("requests_total", "prompt_tokens_total", "generation_tokens_total", "num_pages"):
        assert total[name] == sum(figures[name] for figures in each.values()), name
    assert total["requests_total"] == len(PROMPTS)
    assert all(each[name]["requests_total"] >= 2 for name in "012")
    assert total["prompt_tokens_total"] == sum(map(len, PROMPTS))
    devices = [
        {device for array in jax.tree.leaves(core.runner.params) for device in array.devices()}
        for core in replicas_of(shared).cores
    ]
    assert devices == [{device} for device in jax.devices()[:3]]


@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_each_replica_on_several_devices(expected: list[Any], size: str) -> None:
    with replicated(data_parallel_size=2, **{size: 2}) as engine:
        found = answers(engine)
        assert [[tokens for tokens, _ in one] for one in found] == [
            [tokens for tokens, _ in one] for one in expected
        ]
        for level in (1, 2):
            engine.sleep(level)
            engine.wake_up()
        assert list(engine.generate(PROMPTS[1], greedy(12))[0].outputs[0].token_ids) == expected[1][0][0]


def test_each_replica_with_stages_and_experts() -> None:
    """On somebody's own mesh, its axes in another order; what is counted of experts is summed."""
    mesh = jax.make_mesh((2, 2, 2), ("expert", "data", "stage"))
    prompts = [golden("mixtral")[f"prompt{row}"].tolist() for row in (0, 1)]
    options = OPTIONS | SIZES | {"mesh": mesh, "expert_metrics": True}
    with Engine.from_pretrained(str(CHECKPOINTS / "mixtral"), data_parallel_size=2, **options) as engine:
        outputs = engine.generate(prompts, greedy())
        for row, output in enumerate(outputs):
            assert output.outputs[0].token_ids == golden("mixtral")[f"tokens{row}"].tolist()
        each = engine.get_replica_metrics()
        for figures in (engine.get_metrics(), each["0"], each["1"]):
            tokens = [n for name, n in figures.items() if name.startswith('expert_tokens_total{layer="1"')]
            assert sum(tokens) == 3 * figures["scheduled_tokens_total"] > 0
        stages = [core.runner.stages for core in replicas_of(engine).cores]
        devices = [[stage.lowering.mesh.devices.ravel().tolist() for stage in found] for found in stages]
        assert devices == [[mesh.devices[:, data, stage].tolist() for stage in (0, 1)] for data in (0, 1)]
        assert [len(weights) > 0 for weights in engine.get_weights()] == [True] * 4


def test_the_pages_of_all_replicas_are_shown(shared: Engine) -> None:
    shared.reset_prefix_cache()
    pool = replicas_of(shared).cores[1].scheduler.cache.pool
    [page] = pool.allocate(1)
    found = shared.page_occupancy(3)
    pool.release(page)
    assert (found.run, found.used, found.cached) == (60, (0, 1, 0), (0, 0, 0))


def test_steps_are_counted_by_their_programs(shared: Engine) -> None:
    shared.generate(PROMPTS, greedy(2))
    for figures in (shared.get_metrics(), *map(shared.get_replica_metrics().__getitem__, "012")):
        of_buckets = sum(n for name, n in figures.items() if name.startswith("bucket_steps_total{"))
        assert of_buckets == figures["steps_total"] > 0


def test_grammars_hold_where_steps_fail(tmp_path: Path) -> None:
    """A request that goes on elsewhere is held to what its grammar still allows."""
    folder = text_checkpoint(tmp_path / "model")
    held = StructuredOutputsParams(regex="[a-f]{6,9}(-[0-9]{2}){2,3}")
    asked = [SamplingParams(seed=seed, max_tokens=40, n=2, structured_outputs=held) for seed in range(6)]
    options = OPTIONS | SIZES | {"skip_tokenizer_init": False}
    found = []
    for count in (1, 2):
        with Engine.from_pretrained(str(folder), data_parallel_size=count, **options) as engine:
            if count > 1:
                for index in range(count):
                    break_steps(engine, index, lambda step, index=index: step % 30 == 8 + 10 * index)
            outputs = engine.generate(["abc"] * len(asked), asked)
            found.append([sample.text for output in outputs for sample in output.outputs])
            assert count == 1 or "device is gone" in str(engine.last_error)
    assert found[0] == found[1]
    assert all(re.fullmatch("[a-f]{6,9}(-[0-9]{2}){2,3}", text) for text in found[0])


def test_too_few_devices_and_other_meshes_are_named() -> None:
    with pytest.raises(ValueError, match=r"data_parallel_size=5: replicas of 2 devices .* need 10"):
        replicated(data_parallel_size=5, tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"its axis data has the size 1; .* data_parallel_size=3"):
        Engine.from_pretrained("x", mesh=make_mesh(1), data_parallel_size=3)


def test_a_prompt_goes_where_its_beginning_is(shared: Engine) -> None:
    prefix = np.random.default_rng(99).integers(3, 125, 64).tolist()

    def hits() -> list[float]:
        figures = shared.get_replica_metrics()
        return [figures[name]["prefix_cache_hits_total"] for name in "012"]

    shared.generate([*PROMPTS[:2], [*prefix, 5]], greedy(3))
    before = hits()
    for last in range(6, 10):
        shared.generate([[*prefix, last]], greedy(3))
    gained = [after - earlier for after, earlier in zip(hits(), before, strict=True)]
    assert sorted(gained) == [0, 0, 4 * 64]
    # all at once, before any has been computed
    shared.reset_prefix_cache()
    before = hits()
    shared.generate([[*prefix[::-1], last] for last in range(6, 8)], greedy(3))
    gained = [after - earlier for after, earlier in zip(hits(), before, strict=True)]
    assert sorted(gained) == [0, 0, 64]


@pytest.mark.parametrize(
    ("loads", "found", "chosen"),
    [
        ((0, 0), (0, 0), 0),
        ((1, 0), (0, 0), 1),
        ((2, 0), (80, 0), 0),  # worth waiting for
        ((9, 0), (80, 0), 1),  # too much to do
        ((2, 0), (16, 0), 1),  # too little to save
        ((3, 3), (16, 32), 1),
    ],
)
def test_prefixes_against_load(loads: tuple[int, ...], found: tuple[int, ...], chosen: int) -> None:
    candidates = [Candidate(load, tokens) for load, tokens in zip(loads, found, strict=True)]
    assert choose_replica(candidates, 80, 32) == chosen


def test_what_fails_is_run_again_elsewhere(expected: list[Any]) -> None:
    """Steps fail here and there; nothing is said twice, nothing is lost, and nobody ends with an error."""
    with replicated() as engine:
        for index in range(3):
            break_steps(engine, index, lambda count, index=index: count % 60 == 5 + 20 * index)
        assert answers(engine) == expected
        assert engine.failure is None
        assert engine.get_metrics()["requests_finished_error_total"] == 0
        assert "device is gone" in str(engine.last_error)


def test_a_replica_that_is_gone_is_taken_out(expected: list[Any]) -> None:
    with replicated() as engine:
        break_steps(engine, 1, lambda count: count > 4)
        replicas_of(engine).cores[1].runner.reset = lost_device  # pyright: ignore[reportAttributeAccessIssue]
        deltas: dict[str, list[int]] = {}
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, greedy(12, output_kind=RequestOutputKind.DELTA))
        while engine.has_unfinished_requests():
            for output in engine.step():
                deltas.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
        for i in range(1, len(PROMPTS), 2):  # those that are greedy there, too
            assert deltas[str(i)] == expected[i][0][0]
        assert all(len(tokens) == 12 for tokens in deltas.values())
        figures = engine.get_replica_metrics()
        assert [figures[name]["replica_up"] for name in "012"] == [1, 0, 1]
        assert engine.get_metrics()["replicas_failed"] == 1
        assert repeatable(answers(engine)) == repeatable(expected)


def test_a_request_that_breaks_every_replica_ends_alone(expected: list[Any]) -> None:
    with replicated() as engine:
        for core in replicas_of(engine).cores:
            dispatch = core.runner.dispatch

            def breaking(plan: Any, admissions: Any, dispatch: Any = dispatch, **options: Any) -> Any:
                if any(list(a.token_ids[:2]) == [7, 7] for a in admissions.values()):
                    raise RuntimeError("poison")
                return dispatch(plan, admissions, **options)

            core.runner.dispatch = breaking  # pyright: ignore[reportAttributeAccessIssue]
        engine.add_request("poison", [7, 7, 7, 7, 7], greedy(4))
        finished = []
        while engine.has_unfinished_requests():
            finished += [output for output in engine.step() if output.finished]
        assert [output.outputs[0].finish_reason for output in finished] == ["error"]
        assert engine.failure is None
        assert repeatable(answers(engine)) == repeatable(expected)


def test_when_all_are_gone_everybody_is_told() -> None:
    async def ask(engine: AsyncEngine, prompt: list[int]) -> None:
        async for _ in engine.generate(prompt, greedy(12)):
            pass

    async def main() -> None:
        with_replicas = replicated()
        for index in range(3):
            break_steps(with_replicas, index, lambda count: count > 2)
        async with AsyncEngine(with_replicas) as engine:
            failed = await asyncio.gather(*(ask(engine, p) for p in PROMPTS * 3), return_exceptions=True)
            assert {type(error) for error in failed} <= {RequestFailedError, EngineFailedError}
            while engine.health != "failed":
                with pytest.raises((RequestFailedError, EngineFailedError)):
                    await ask(engine, PROMPTS[0])
            with pytest.raises(EngineFailedError):
                await ask(engine, PROMPTS[0])

    asyncio.run(asyncio.wait_for(main(), 60))


def test_all_start_over_together(expected: list[Any]) -> None:
    """Also one that had been taken out, whether requests were running, waiting, or on their way."""

    async def main() -> None:
        with_replicas = replicated()
        broken = True
        for index in range(3):
            break_steps(with_replicas, index, lambda count: broken and count > 2)
        async with AsyncEngine(with_replicas) as engine:
            with_replicas.limit_restarts(0, 1)  # none by itself
            failed = await asyncio.gather(*(last(engine, p) for p in PROMPTS * 3), return_exceptions=True)
            assert all(isinstance(error, RequestFailedError | EngineFailedError) for error in failed)
            broken = False
            while engine.health == "restarting":
                await asyncio.sleep(0.01)
            assert engine.health == "running"
            found = [await last(engine, PROMPTS[i]) for i in (1, 3)]
            assert found == [expected[1][0][0], expected[3][0][0]]
            figures = engine.get_metrics()
            assert figures["replicas_failed"] == 0
            assert figures["engine_restarts_total"] in (3, 6, 9)  # some have come when it had started over
            assert figures["requests_total"] == 36 + 2
            assert sum(n for name, n in figures.items() if name.startswith("requests_finished_")) == 36 + 2

    async def last(engine: AsyncEngine, prompt: list[int]) -> list[int]:
        return [list(o.outputs[0].token_ids) async for o in engine.generate(prompt, greedy(12))][-1]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_replica_that_cannot_start_over_stays_out() -> None:
    with replicated() as engine:
        replicas_of(engine).cores[1].runner.reset = lost_device  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(2):
            engine.add_request("left", PROMPTS[0], greedy(4))
            engine.step()
            engine.restart()
            assert not engine.has_unfinished_requests()
        assert [engine.get_replica_metrics()[name]["replica_up"] for name in "012"] == [1, 0, 1]
        assert len(engine.generate(PROMPTS, greedy(3))) == len(PROMPTS)
        for core in replicas_of(engine).cores:
            core.runner.reset = lost_device  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(RuntimeError, match="no device"):
            engine.restart()
        with pytest.raises(EngineFailedError, match=r"call restart\(\)"):
            engine.generate(PROMPTS[0], greedy(1))


def test_aborts_and_priorities() -> None:
    with replicated(data_parallel_size=2, policy="priority") as engine:
        for i in range(20):  # for sixteen rows
            engine.add_request(str(i), PROMPTS[i % 10], greedy(40))
        engine.add_request("urgent", PROMPTS[0], greedy(2), priority=-1)
        engine.add_request("patient", PROMPTS[0], greedy(2), priority=1)
        with pytest.raises(ValueError, match="choose another"):
            engine.add_request("9", PROMPTS[0], greedy(1))
        engine.add_request("pair", PROMPTS[0], SamplingParams(n=2, max_tokens=1, detokenize=False))
        with pytest.raises(ValueError, match="request_id='pair/1'"):
            engine.add_request("pair/1", PROMPTS[0], greedy(1))
        engine.abort_request("pair")
        engine.add_request("pair/1", PROMPTS[0], greedy(1))
        engine.abort_request("pair/1")
        with pytest.raises(ValueError, match="max_model_len"):
            engine.add_request("long", [5] * 200, greedy(1))
        order = [output.request_id for output in engine.step() if output.finished]
        assert engine.get_replica_metrics()["front"]["requests_waiting"] >= 1
        jobs = replicas_of(engine)._jobs
        while engine.has_unfinished_requests():
            order += [output.request_id for output in engine.step() if output.finished]
            begun = [name for name in ("urgent", "patient") if name not in jobs or jobs[name].place]
            assert begun != ["patient"]  # which may yet end first, where the other's replica is slow
            if "urgent" in order:
                break
        assert engine.abort_request("nobody") is None
        for name in ("patient", *map(str, range(20))):
            if name not in order:
                output = engine.abort_request(name)
                assert output is not None
                assert output.finished
        assert not engine.has_unfinished_requests()
        assert engine.num_unfinished_requests == 0
        for core in engine._cores:
            assert not core.scheduler.has_unfinished
            assert core.scheduler.cache.pool.num_used == 0
        assert all(not replica.load and not replica.coming for replica in replicas_of(engine)._replicas)
        assert engine.reset_prefix_cache()
