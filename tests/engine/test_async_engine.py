"""Many callers at once: nobody loses a token, and nobody takes another one down."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from small import golden, greedy, small_engine

from jaxllm import AsyncEngine, Engine, RequestOutput, RequestOutputKind, SamplingParams
from jaxllm.engine.core import EngineFailedError, RequestFailedError
from jaxllm.engine.restarts import RestartBudget

PROMPTS = [np.random.default_rng(i).integers(3, 125, 5 + 3 * i).tolist() for i in range(8)]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[list[int]]]:
    with small_engine(max_model_len=96, num_pages=60) as engine:
        yield [list(engine.generate([p], greedy(12))[0].outputs[0].token_ids) for p in PROMPTS]


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(small_engine(max_model_len=96, num_pages=60))
    yield engine
    engine.close()


@pytest.fixture
def doomed() -> Iterator[AsyncEngine]:
    """One that the test may break, and that does not start over."""
    engine = AsyncEngine(small_engine(max_model_len=96, num_pages=60), max_restarts=0)
    yield engine
    engine.close()


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    """Reads to the end."""
    found = None
    async for output in outputs:
        found = output
    assert found is not None
    return found


def test_many_at_once(engine: AsyncEngine, expected: list[list[int]]) -> None:
    async def main() -> None:
        outputs = await asyncio.gather(*(last(engine.generate(p, greedy(12))) for p in PROMPTS))
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
        assert engine.health == "running"

    asyncio.run(main())


def test_deltas_join_to_the_whole(engine: AsyncEngine, expected: list[list[int]]) -> None:
    async def collect(prompt: list[int]) -> list[int]:
        params = greedy(12, output_kind=RequestOutputKind.DELTA)
        return [
            token async for output in engine.generate(prompt, params) for token in output.outputs[0].token_ids
        ]

    async def main() -> None:
        assert await asyncio.gather(*map(collect, PROMPTS)) == expected

    asyncio.run(main())


def test_who_stops_listening_ends_only_their_own(engine: AsyncEngine, expected: list[list[int]]) -> None:
    async def leave(prompt: list[int]) -> None:
        generator = engine.generate(prompt, greedy(60))
        async for _ in generator:
            break
        await generator.aclose()

    async def listen(started: asyncio.Event) -> None:
        async for _ in engine.generate(PROMPTS[7], greedy(60)):
            started.set()

    async def main() -> None:
        started = asyncio.Event()
        stay = [last(engine.generate(p, greedy(12))) for p in PROMPTS[:4]]
        cancelled = asyncio.create_task(listen(started))
        leaving = [leave(p) for p in PROMPTS[4:]]
        staying, left = asyncio.gather(*stay), asyncio.gather(*leaving)
        await started.wait()
        cancelled.cancel()
        outputs, _ = await staying, await left
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected[:4]
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        while engine.get_metrics()["requests_running"]:
            await asyncio.sleep(0.01)
        assert engine._engine.num_unfinished_requests == 0

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_closed_stream_ends_its_request_within_a_step(engine: AsyncEngine) -> None:
    async def main() -> None:
        async with await engine.submit({"left": await engine.make_input(PROMPTS[0], greedy(80))}) as stream:
            await stream.take()
            before = engine.get_metrics()["steps_total"]
        await engine.reset_prefix_cache()  # comes after what closing has sent
        assert engine.get_metrics()["requests_running"] == 0
        assert engine.get_metrics()["steps_total"] <= before + 2  # one that ran, and one that had begun

    asyncio.run(asyncio.wait_for(main(), 60))


def test_abort(engine: AsyncEngine) -> None:
    async def main() -> None:
        task = asyncio.create_task(last(engine.generate(PROMPTS[0], greedy(80), request_id="long")))
        while not engine._engine.num_unfinished_requests:
            await asyncio.sleep(0.001)
        assert await engine.abort("long")
        assert not await engine.abort("nobody")
        output = await task
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_bad_requests_are_refused_and_the_next_is_served(
    engine: AsyncEngine, expected: list[list[int]]
) -> None:
    async def main() -> None:
        for prompt, message in (([], "no tokens"), ([999], "999"), (list(range(3, 120)), "max_model_len")):
            with pytest.raises(ValueError, match=message):
                await last(engine.generate(prompt, greedy(4)))
        output = await last(engine.generate(PROMPTS[1], greedy(12)))
        assert list(output.outputs[0].token_ids) == expected[1]

    asyncio.run(main())


def test_a_failed_step_fails_its_requests_and_the_loop_goes_on(
    engine: AsyncEngine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine._engine._core.runner
    dispatch, calls = runner.dispatch, iter(range(100))

    def fail_once(*args, **options):
        if next(calls) == 3:
            raise RuntimeError("the device is gone")
        return dispatch(*args, **options)

    monkeypatch.setattr(runner, "dispatch", fail_once)

    async def main() -> None:
        with pytest.raises(RequestFailedError, match="the device is gone"):
            await last(engine.generate(PROMPTS[0], greedy(40)))
        assert engine.health == "running"
        output = await last(engine.generate(PROMPTS[2], greedy(12)))
        assert list(output.outputs[0].token_ids) == expected[2]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_steps_that_always_fail_fail_the_engine(doomed: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args, **_options):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(doomed._engine._core.runner, "dispatch", fail)

    async def main() -> None:
        results = await asyncio.gather(
            *(last(doomed.generate(p, SamplingParams(max_tokens=4, detokenize=False))) for p in PROMPTS * 3),
            return_exceptions=True,
        )
        assert all(isinstance(r, RequestFailedError | EngineFailedError) for r in results)
        while doomed.health == "restarting":
            await asyncio.sleep(0.001)
        assert doomed.health == "failed"
        with pytest.raises(EngineFailedError):
            await last(doomed.generate(PROMPTS[0], greedy(4)))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_step_loop_that_breaks_tells_everybody(
    doomed: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail():
        raise RuntimeError("no plan")

    async def main() -> None:
        running = [asyncio.create_task(last(doomed.generate(p, greedy(60)))) for p in PROMPTS[:3]]
        while doomed._engine.num_unfinished_requests < 3:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(doomed._engine._core.scheduler, "schedule", fail)
        for task in running:
            with pytest.raises(EngineFailedError, match="no plan"):
                await task
        while doomed.health == "restarting":
            await asyncio.sleep(0.001)
        assert doomed.health == "failed"
        with pytest.raises(EngineFailedError):
            await last(doomed.generate(PROMPTS[0], greedy(4)))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_too_many_restarts_are_the_end(
    doomed: AsyncEngine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(doomed, "_restarts", RestartBudget(2, 60, lambda: now[0]))
    scheduler = doomed._engine._core.scheduler
    schedule = scheduler.schedule

    def fail() -> None:
        monkeypatch.setattr(scheduler, "schedule", schedule)
        raise RuntimeError("no plan")

    async def main() -> None:
        for now[0], health in ((0, "running"), (50, "running"), (61, "running"), (70, "failed")):
            monkeypatch.setattr(scheduler, "schedule", fail)
            with pytest.raises(EngineFailedError, match="no plan"):
                await last(doomed.generate(PROMPTS[0], greedy(4)))
            while doomed.health == "restarting":
                await asyncio.sleep(0.001)
            assert doomed.health == health
            if health == "running":
                output = await last(doomed.generate(PROMPTS[1], greedy(12)))
                assert list(output.outputs[0].token_ids) == expected[1]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_lost_host_is_the_end_at_once(doomed: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the moment in which it is lost, and listeners have not been told."""
    monkeypatch.setattr(doomed, "_restarts", RestartBudget())
    restarts: list[None] = []

    def fail() -> None:
        monkeypatch.setattr(Engine, "hosts", SimpleNamespace(lost=RuntimeError("gone")))
        raise RuntimeError("no plan")

    monkeypatch.setattr(doomed._engine._core.scheduler, "schedule", fail)
    monkeypatch.setattr(doomed._engine, "restart", lambda: restarts.append(None))

    async def main() -> None:
        with pytest.raises(EngineFailedError, match="no plan"):
            await last(doomed.generate(PROMPTS[0], greedy(4)))
        while doomed.health == "restarting":
            await asyncio.sleep(0.001)
        assert doomed.health == "failed"

    asyncio.run(asyncio.wait_for(main(), 60))
    assert not restarts


def test_sleep_and_wake(engine: AsyncEngine, expected: list[list[int]]) -> None:
    async def main() -> None:
        await engine.sleep()
        assert engine.health == "sleeping"
        with pytest.raises(RuntimeError, match="wake_up"):
            await last(engine.generate(PROMPTS[0], greedy(4)))
        await engine.wake_up()
        output = await last(engine.generate(PROMPTS[3], greedy(12)))
        assert list(output.outputs[0].token_ids) == expected[3]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_close_ends_what_runs(doomed: AsyncEngine) -> None:
    async def main() -> None:
        task = asyncio.create_task(last(doomed.generate(PROMPTS[0], greedy(80))))
        while not doomed._engine.num_unfinished_requests:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(doomed.close)
        assert (await task).outputs[0].finish_reason == "abort"
        assert doomed.health == "closed"
        with pytest.raises(RuntimeError, match="closed"):
            await last(doomed.generate(PROMPTS[0], greedy(4)))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_golden_through_the_thread(engine: AsyncEngine) -> None:
    reference = golden("llama")
    output = asyncio.run(last(engine.generate(reference["prompt0"].tolist(), greedy(16))))
    assert output.outputs[0].token_ids == reference["tokens0"].tolist()
